"""Printing answers: in the order of the prompts, whole or as they come, as text or as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

import msgspec

if TYPE_CHECKING:
    from llmlab.outputs import RequestOutput

METRICS = ("queue_time", "ttft", "tpot", "e2e", "num_prompt_tokens", "num_output_tokens", "num_cached_tokens",
           "num_preemptions")  # fmt: skip


class Asked(NamedTuple):
    """A queued request and what was asked."""

    id: str
    title: str


class Answers(Protocol):
    """Takes every output that changed; writes what can be written."""

    def update(self, output: RequestOutput) -> None: ...

    def close(self) -> None:
        """Write what is still held back, finished or not."""


class TextAnswers:
    """The answers' text in the order of the prompts, one after the other; token ids where there is no tokenizer."""

    def __init__(self, asked: Sequence[Asked], out: TextIO, stream: bool, titles: bool) -> None:
        self._asked, self._out, self._stream, self._titles = list(asked), out, stream, titles
        self._latest: dict[str, RequestOutput] = {}
        self._sent = 0
        self._titled = False

    def update(self, output: RequestOutput) -> None:
        self._latest[output.request_id] = output
        while self._asked and (head := self._latest.get(self._asked[0].id)) is not None:
            if self._stream or head.finished:
                self._write(head)
            if not head.finished:
                return
            self._next()

    def _write(self, output: RequestOutput) -> None:
        """Write what is new of the first answer that is not out yet."""
        if self._titles and not self._titled:
            self._out.write(f"> {' '.join((self._asked[0].title or output.request_id).split())}\n")
            self._titled = True
        text = text_of(output)
        self._out.write(text[self._sent :])
        self._sent = len(text)
        self._out.flush()

    def _next(self) -> None:
        self._out.write("\n")
        self._out.flush()
        self._latest.pop(self._asked.pop(0).id, None)
        self._sent, self._titled = 0, False

    def close(self) -> None:
        while self._asked:
            output = self._latest.get(self._asked[0].id)
            if output is None:
                self._asked.pop(0)
            else:
                self._write(output)
                self._next()


class JsonAnswers:
    """One JSON object a line: a record for every request, in the order of the prompts; with `stream` also the new
    text of any request, as it comes."""

    def __init__(self, asked: Sequence[Asked], out: TextIO, stream: bool) -> None:
        self._asked, self._out, self._stream = list(asked), out, stream
        self._latest: dict[str, RequestOutput] = {}
        self._sent: dict[str, int] = {}

    def update(self, output: RequestOutput) -> None:
        self._latest[output.request_id] = output
        if self._stream:
            self._delta(output)
        while self._asked and (head := self._latest.get(self._asked[0].id)) is not None and head.finished:
            self._record(self._asked.pop(0), head)

    def _delta(self, output: RequestOutput) -> None:
        text, sent = text_of(output), self._sent.get(output.request_id, 0)
        if len(text) > sent:
            self._sent[output.request_id] = len(text)
            self._line({"id": output.request_id, "delta": text[sent:]})

    def _record(self, asked: Asked, output: RequestOutput) -> None:
        self._line(record(asked, output))
        del self._latest[asked.id]

    def close(self) -> None:
        for asked in self._asked:
            if asked.id in self._latest:
                self._record(asked, self._latest[asked.id])
        self._asked.clear()

    def _line(self, value: Any) -> None:
        self._out.write(msgspec.json.encode(value).decode() + "\n")
        self._out.flush()


def text_of(output: RequestOutput) -> str:
    """The answer's text, or its token ids if there is no text."""
    answer = output.outputs[0]
    return answer.text or " ".join(map(str, answer.token_ids))


def record(asked: Asked, output: RequestOutput) -> dict[str, Any]:
    """A request as plain data: prompt, answer, why it ended, and its metrics in seconds and tokens."""
    answer, metrics = output.outputs[0], output.metrics
    return {
        "id": output.request_id, "prompt": asked.title or None, "text": answer.text, "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason, "error": answer.error,
        "metrics": {name: getattr(metrics, name) for name in METRICS} if metrics is not None else None,
    }  # fmt: skip
