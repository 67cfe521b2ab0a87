"""Loads that answer to the system: clients that wait for their answers, and conversations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from llmlab.types import ConfigError
from llmlab.workloads.prompt_tokens import PromptTokens, RandomTokens
from llmlab.workloads.source import Finished, TimedRequest
from llmlab.workloads.workload import Workload


@dataclass(frozen=True)
class ClosedLoop:
    """The requests of `work`, asked by `concurrency` clients. Client c asks requests c, c + concurrency, ...: each when
    the one before it is answered and `think[index]` seconds have passed. So every client asks the same under every policy.
    Requests are named `c<client>.<turn>`."""

    work: Workload
    concurrency: int
    think: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.concurrency, int) or isinstance(self.concurrency, bool) or self.concurrency < 1:
            raise ConfigError("concurrency", self.concurrency, "must be a positive number of clients")

    def __len__(self) -> int:
        return len(self.work)

    def source(self, vocab_size: int) -> _Clients:
        """See `llmlab.workloads.source.Load`."""
        return _Clients(self, self.work.tokens(vocab_size))


class _Clients:
    """Who has asked what in one run."""

    def __init__(self, loop: ClosedLoop, tokens: PromptTokens) -> None:
        self._loop, self._tokens = loop, tokens
        self._asked: dict[str, int] = {}

    def arriving(self) -> Iterator[TimedRequest]:
        for client in range(min(self._loop.concurrency, len(self._loop))):
            yield self._ask(client, 0.0)

    def on_finish(self, finished: Finished) -> Sequence[TimedRequest]:
        index = self._asked.pop(finished.request.id or "")
        following = index + self._loop.concurrency
        return [self._ask(following, finished.time + self._loop.think[index])] if following < len(self._loop) else []

    def _ask(self, index: int, arrival: float) -> TimedRequest:
        turn, client = divmod(index, self._loop.concurrency)
        prompt = self._tokens.prompt(index, self._loop.work.prompt_lens[index])
        name = f"c{client}.{turn}"
        self._asked[name] = index
        return replace(self._loop.work.request(index, arrival, prompt), id=name, session=f"c{client}")


@dataclass(frozen=True)
class Sessions:
    """Conversations. Session s begins at `starts[s]` and has `turns[s]` turns, which are consecutive requests of `work`:
    their prompts are what the turn adds to all that was said before. `think[index]` seconds pass between the answer to
    request `index` and the next turn. Requests are named `s<session>.<turn>`; a refused one ends its session."""

    work: Workload
    starts: tuple[float, ...]
    turns: tuple[int, ...]
    think: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.work.blocks:
            raise ConfigError(
                "blocks", len(self.work.blocks), "conversations grow by their own words, not by named blocks"
            )
        if sum(self.turns) != len(self.work) or len(self.starts) != len(self.turns):
            raise ConfigError("turns", sum(self.turns), f"must add up to the {len(self.work)} requests of the workload")

    def __len__(self) -> int:
        return len(self.work)

    def source(self, vocab_size: int) -> _Conversations:
        """See `llmlab.workloads.source.Load`."""
        work = self.work
        return _Conversations(self, RandomTokens(vocab_size, work.seed, len(self.turns), work.shared_prefix, work.families,
                                                 work.family_skew))  # fmt: skip


class _Conversations:
    """Which turn each session of one run has come to."""

    def __init__(self, sessions: Sessions, tokens: RandomTokens) -> None:
        self._sessions, self._tokens = sessions, tokens
        self._first = [0, *accumulate(sessions.turns)]
        self._asked: dict[str, tuple[int, int]] = {}

    def arriving(self) -> Iterator[TimedRequest]:
        for session, start in enumerate(self._sessions.starts):
            length = self._sessions.work.prompt_lens[self._first[session]]
            yield self._turn(session, 0, start, self._tokens.prompt(session, length))

    def on_finish(self, finished: Finished) -> Sequence[TimedRequest]:
        session, turn = self._asked.pop(finished.request.id or "")
        index = self._first[session] + turn
        if finished.refused or turn + 1 == self._sessions.turns[session]:
            return ()
        fresh = self._tokens.own(len(self._sessions.turns) + index, self._sessions.work.prompt_lens[index + 1])
        prompt = (*finished.request.prompt_token_ids, *finished.output_token_ids, *fresh)
        return [self._turn(session, turn + 1, finished.time + self._sessions.think[index], prompt)]

    def _turn(self, session: int, turn: int, arrival: float, prompt: tuple[int, ...]) -> TimedRequest:
        request = self._sessions.work.request(self._first[session] + turn, arrival, prompt)
        name = f"s{session}.{turn}"
        self._asked[name] = session, turn
        return replace(request, id=name, session=f"s{session}", metadata={**request.metadata, "turn": turn})
