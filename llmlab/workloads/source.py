"""What a run is fed with: requests that come by themselves, and those that others' finishes bring about.

    load.source(vocab_size) -> Source
    source.arriving()       -> requests in order of arrival, drawn one by one
    source.on_finish(...)   -> the next request of the same client or session

No part of it knows the engine; `llmlab.running` brings the two together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmlab.types import SamplingParams


@dataclass(frozen=True)
class TimedRequest:
    """One request of a workload. `arrival` in seconds; `metadata["output_len"]` is its true output length, for oracles
    and simulation; `id=None` lets the engine choose a name."""

    arrival: float
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    session: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass(frozen=True)
class Finished:
    """How a request ended: its output, and `time` [s]. `refused`: the engine would not take it at all."""

    request: TimedRequest
    output_token_ids: Sequence[int]
    time: float
    refused: bool = False


class Source(Protocol):
    """The requests of one run; take a new one for every run, because it remembers who is where."""

    def arriving(self) -> Iterator[TimedRequest]:
        """The requests that come by themselves, in order of arrival. Lazy: each is drawn when it is asked for."""
        ...

    def on_finish(self, finished: Finished) -> Sequence[TimedRequest]:
        """The requests that this end brings about; none arrives before `finished.time`."""
        ...


class Load(Protocol):
    """Whatever `llmlab.run` can serve: a description that may be served again and again, always with the same requests
    for the same vocabulary. `len` counts them."""

    def __len__(self) -> int: ...

    def source(self, vocab_size: int) -> Source: ...


class OpenSource:
    """Requests that come by themselves, whatever happens to the others."""

    def __init__(self, requests: Iterator[TimedRequest]) -> None:
        self._requests = requests

    def arriving(self) -> Iterator[TimedRequest]:
        return self._requests

    def on_finish(self, finished: Finished) -> Sequence[TimedRequest]:
        return ()
