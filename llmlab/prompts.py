"""Prompts in all the forms that clients use, as checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmlab.seams import Limits
from llmlab.types import RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]


class PromptTokenizer(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]: ...


def token_ids_of(prompt: Prompt, tokenizer: PromptTokenizer | None) -> Sequence[Any]:
    """Token ids of text, ids, chat messages, {"prompt": text} or {"prompt_token_ids": ids}. Raises RequestError."""
    if isinstance(prompt, str):
        return _need_tokenizer(tokenizer, prompt).encode(prompt)
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            ids = prompt["prompt_token_ids"]
            return ids if type(ids) is tuple else list(ids)
        if isinstance(prompt.get("prompt"), str):
            return token_ids_of(prompt["prompt"], tokenizer)
        raise RequestError("prompt", sorted(map(str, prompt)), "a dict prompt needs the key 'prompt_token_ids' or 'prompt'")
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise RequestError("prompt", prompt, f"a {type(prompt).__name__} is not a prompt",
                           "Give text, a list of token ids, a list of chat messages, or {'prompt_token_ids': [...]}.")
    if prompt and isinstance(prompt[0], Mapping):
        return _need_tokenizer(tokenizer, prompt).encode_chat(prompt)  # type: ignore[arg-type]
    return list(prompt)


def _need_tokenizer(tokenizer: PromptTokenizer | None, prompt: object) -> PromptTokenizer:
    if tokenizer is None:
        raise RequestError("prompt", prompt, "this engine has no tokenizer, so it cannot read text",
                           "Give token ids: {'prompt_token_ids': [...]}.")  # fmt: skip
    return tokenizer


def checked_token_ids(ids: Sequence[Any], vocab_size: int, limits: Limits) -> tuple[int, ...]:
    """`ids` as a tuple, if the model can take them. Raises RequestError naming the first bad one."""
    if not ids:
        raise RequestError("prompt", list(ids), "is empty", "Give at least one token.")
    if not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):  # else find the first bad one
        _check_each(ids, vocab_size)
    if len(ids) >= limits.max_model_len:
        raise RequestError("prompt", f"{len(ids)} tokens",
                           f"leaves no room for an output: prompt and output share {limits.max_model_len} tokens",
                           "Shorten the prompt, or raise max_model_len or num_blocks (whichever is smaller).")  # fmt: skip
    return tuple(ids)


def _check_each(ids: Sequence[Any], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise RequestError(f"prompt_token_ids[{index}]", token, f"is not a token id in [0, {vocab_size})",
                               "Check that the ids come from this model's tokenizer.")  # fmt: skip
