"""What clients see: text, tokens and log-probabilities of a request, put together from the scheduler's updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from llmlab.events.metrics import RequestMetrics
from llmlab.scheduling.core import Update
from llmlab.types import FinishReason, Request, TokenLogprobs


@dataclass
class CompletionOutput:
    """One of the `n` answers. `logprobs` has one entry a token if they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """A request as its client sees it. Names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class TextStream(Protocol):
    """An incremental detokenizer: token ids in, finished characters out."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class AnswerState:
    """One answer in the making: its text, and whether a stop string has appeared in it."""

    def __init__(self, request: Request, parent: RequestOutput, index: int, stream: TextStream | None) -> None:
        self.request = request
        self.parent = parent
        self.output = CompletionOutput(index)
        self._stream = stream
        self._longest_stop = max((len(s) for s in request.sampling.stop), default=0)
        if request.sampling.logprobs is not None:
            self.output.logprobs = []

    def apply(self, update: Update) -> str | None:
        """Take in new tokens; the stop string that they completed, if any. Tokens behind it are not the client's."""
        if len(update.token_ids) > 1 and self.request.sampling.stop:
            return next((stop for one in _one_by_one(update) if (stop := self.apply(one)) is not None), None)
        out, result = self.output, update.result
        if result is not None and result.prompt_logprobs:
            self.parent.prompt_logprobs = list(result.prompt_logprobs)
        if result is not None and out.logprobs is not None:
            out.logprobs.extend(result.logprobs[: len(update.token_ids)])
        out.token_ids.extend(update.token_ids)
        stop = self._extend_text(update)
        if update.finish_reason is not None and stop is None:
            self._close(update)
        return stop

    def _extend_text(self, update: Update) -> str | None:
        out = self.output
        if self._stream is None:
            return None
        seen = len(out.text)
        visible = update.token_ids[:-1] if self._ends_with_stop_token(update) else update.token_ids
        out.text += self._stream.push(visible)
        if update.finish_reason is not None:
            out.text += self._stream.flush()
        if len(out.token_ids) < self.request.sampling.min_tokens:
            return None
        return self._cut_at_stop(max(0, seen - self._longest_stop + 1))

    def _ends_with_stop_token(self, update: Update) -> bool:
        """The token that ended a request is kept in `token_ids` but not shown in the text."""
        return update.finish_reason == "stop" and bool(update.token_ids)

    def _cut_at_stop(self, start: int) -> str | None:
        found = [(at, s) for s in self.request.sampling.stop if (at := self.output.text.find(s, start)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.output.text = self.output.text[:at]
        return stop

    def _close(self, update: Update) -> None:
        out = self.output
        out.finish_reason = update.finish_reason
        out.error = update.result.error if update.result is not None else None
        last = out.token_ids[-1] if out.token_ids else None
        if update.finish_reason == "stop" and last in self.request.sampling.stop_token_ids:
            out.stop_reason = last

    def end(self, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End from outside: an abort, or a stop string."""
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason


def _one_by_one(update: Update) -> Iterator[Update]:
    """The update, token by token."""
    last = len(update.token_ids) - 1
    for index, token in enumerate(update.token_ids):
        result = update.result
        if result is not None:
            scores = result.prompt_logprobs if index == 0 else ()
            result = msgspec.structs.replace(result, logprobs=result.logprobs[index : index + 1], prompt_logprobs=scores)
        yield Update(update.request, (token,), result, update.finish_reason if index == last else None)
