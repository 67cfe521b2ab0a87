"""Text to token ids and back, by the tokenizer that lies in the model's directory.

`tokenizers` (Rust) reads `tokenizer.json` and does all of it; `transformers` is imported only for what
that file does not hold: a chat template, or a tokenizer in another format. (Importing `tokenizers`
takes about 0.03 s, `transformers` with its AutoTokenizer about 2 s.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmlab.models.files import read_json
from llmlab.types import ModelError

Message = dict[str, Any]
_REPLACEMENT = "\ufffd"
_MAX_PENDING = 64


class IncrementalDecoder:
    """Text of a growing sequence of tokens, released only when no later token can change it.

    A character may be spread over several tokens, and how a token reads may depend on the one before it
    (a leading space). So the tokens since the last release are decoded together with those before them,
    and text is held back while it ends in the replacement character. A run of 64 tokens without a
    complete character is noise, not text, and is released as it is.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the tokens of the last release, then the pending ones
        self._pending_from = 0
        self._known = ""  # the text of the tokens of the last release

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the new text, "" while a character is incomplete."""
        return "".join([self._push(i) for i in ids])

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        noise = len(self._ids) - self._pending_from >= _MAX_PENDING
        if len(text) <= len(self._known) or (text.endswith(_REPLACEMENT) and not noise):
            return ""
        return self._release(text)

    def _release(self, text: str) -> str:
        new = text[len(self._known) :]
        self._ids = self._ids[self._pending_from :]
        self._pending_from = len(self._ids)
        self._known = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """The text still held back, at the end of a sequence (replacement characters where it broke off)."""
        text = self._decode(self._ids)
        return self._release(text) if len(text) > len(self._known) else ""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer. Ids are ints below the model's vocab_size."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def incremental(self, skip_special_tokens: bool = True) -> IncrementalDecoder: ...


class HFTokenizer:
    """The tokenizer of a Hugging Face model directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config = _config(directory)
        self._backend = _backend(directory)
        self._with_template: Any = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's text and its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end token that `tokenizer_config.json` names, if any."""
        token = self._config.get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        found = self._backend.token_to_id(content) if isinstance(content, str) else None
        return () if found is None else (int(found),)

    @property
    def has_chat_template(self) -> bool:
        folder = self._directory
        return "chat_template" in self._config or any(
            (folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation `[{"role": ..., "content": ...}, ...]` by the model's chat template."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, add_special_tokens=False)  # the template writes them itself

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model was trained on."""
        if not self.has_chat_template:
            way_out = "Pass a string or token ids, or put a chat_template.jinja into the directory."
            raise ModelError("prompt", list(messages), f"{self._directory} has no chat template", way_out)
        if self._with_template is None:
            self._with_template = _transformers_tokenizer(self._directory)
        try:
            rendered = self._with_template.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja's own errors, or what the template raises
            way_out = 'Messages are dicts such as {"role": "user", "content": "Hello"}.'
            raise ModelError(
                "prompt", list(messages), f"the chat template refused it: {error}", way_out
            ) from error
        return str(rendered)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def incremental(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return IncrementalDecoder(lambda ids: self.decode(ids, skip_special_tokens))


class NoTokenizer:
    """For a model directory without a tokenizer: prompts are token ids, and so is the text that comes back."""

    eos_token_ids: tuple[int, ...] = ()
    has_chat_template = False

    def __init__(self, directory: Path | str) -> None:
        self._directory = str(directory)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise self._error(text)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        raise self._error(list(messages))

    def _error(self, prompt: object) -> ModelError:
        way_out = "Pass token ids, such as [1, 2, 3], or put the model's tokenizer.json into its directory."
        return ModelError(
            "prompt", prompt, f"{self._directory} has no tokenizer, so it takes token ids only", way_out
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The ids themselves, with a space behind each."""
        return "".join(f"{i} " for i in ids)

    def incremental(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return IncrementalDecoder(self.decode)


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _backend(directory: Path) -> Any:
    """The Rust tokenizer of the directory."""
    path = directory / "tokenizer.json"
    if not path.exists():
        return _transformers_tokenizer(directory).backend_tokenizer
    from tokenizers import Tokenizer as RustTokenizer

    try:
        return RustTokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ModelError(
            "tokenizer.json", str(path), f"cannot be read ({error})", "Fetch it again."
        ) from error


def _transformers_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # many kinds, among them ImportError of sentencepiece
        way_out = "Fetch the tokenizer's files again; best is a tokenizer.json."
        raise ModelError(
            "tokenizer", str(directory), f"transformers cannot read it ({error})", way_out
        ) from error


def load_tokenizer(directory: Path) -> HFTokenizer | NoTokenizer:
    """The tokenizer of a model directory; `NoTokenizer` if it has none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    return HFTokenizer(directory) if any((directory / n).exists() for n in names) else NoTokenizer(directory)
