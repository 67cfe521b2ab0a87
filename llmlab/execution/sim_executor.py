"""The simulated executor: the same plans, costed instead of run, on a virtual clock.

Tokens come from a `TokenSource`; by default a request ends after `metadata["output_len"]` tokens and its tokens are
pseudo-random numbers keyed by (seed, request, position). Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

from llmlab import rng
from llmlab.clock import Clock
from llmlab.execution.base import Row, StepBatch, Ticket
from llmlab.seams import CostModel
from llmlab.types import Cost, Durations, ItemResult, Request, StepResult


class TokenSource(Protocol):
    """Which token a simulated request gets at `position`."""

    def token(self, request: Request, position: int) -> int: ...


class PseudoTokens:
    """Deterministic tokens; the end-of-sequence token when the request's true length is reached."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size, self._seed = vocab_size, seed

    def token(self, request: Request, position: int) -> int:
        produced = position - request.num_prompt_tokens + 1
        if request.eos_token_ids and produced >= request.metadata.get("output_len", 1 << 60):
            return request.eos_token_ids[0]
        token = rng.integer(self._seed, request.id, position, self._vocab_size)
        while token in request.eos_token_ids:
            token = (token + 1) % self._vocab_size
        return token


class SimTicket(NamedTuple):
    """A simulated step: known at once, but the clock reaches its end only when it is collected."""

    value: StepResult
    end: float
    clock: Clock

    def result(self) -> StepResult:
        self.clock.advance_to(self.end)
        return self.value


class SimExecutor:
    """Runs plans one after the other on one simulated device."""

    mode: Literal["measured", "simulated"] = "simulated"

    def __init__(self, cost: CostModel, tokens: TokenSource, clock: Clock, description: dict[str, Any]) -> None:
        self._cost = cost
        self._tokens = tokens
        self._clock = clock
        self._description = description
        self._busy_until = 0.0

    def submit(self, batch: StepBatch) -> Ticket:
        start = max(self._clock.now(), self._busy_until)
        seconds = self._seconds(batch)
        self._busy_until = start + seconds
        results = tuple(self._result(row) for row in batch.rows)
        return SimTicket(StepResult(batch.plan.step, results, Durations(seconds)), self._busy_until, self._clock)

    def _seconds(self, batch: StepBatch) -> float:
        compute = self._cost.step(batch.plan.items) if batch.plan.items else Cost(0.0)
        swapped = sum(len(move.src) for move in batch.plan.moves if move.kind != "copy")
        return compute.seconds + (self._cost.swap(swapped).seconds if swapped else 0.0)

    def _result(self, row: Row) -> ItemResult:
        if row.item.emit != "sample":
            return ItemResult(row.item.request)
        return ItemResult(row.item.request, (self._tokens.token(row.request, row.item.tokens[1]),))

    def describe(self) -> dict[str, Any]:
        return self._description

    def close(self) -> None:
        pass
