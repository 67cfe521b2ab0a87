"""What the engine asks of an executor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from llmlab.types import Request, StepPlan, StepResult, WorkItem


class Row(NamedTuple):
    """One item with all that an executor needs for it. `block_ids` cover tokens [0, item.reach); they are host blocks if
    `item.home` is "cpu"."""

    item: WorkItem
    request: Request
    block_ids: tuple[int, ...]


class StepBatch(NamedTuple):
    """One step's work. `forget` names requests that ended: no later batch will mention them again."""

    plan: StepPlan
    rows: tuple[Row, ...]
    forget: tuple[str, ...] = ()


class Ticket(Protocol):
    """A step in flight."""

    def result(self) -> StepResult: ...


class Executor(Protocol):
    """Runs batches strictly in the order of submission. `submit` may return before the work is done;
    `result()` of its ticket waits for it. The executor remembers each request's tokens, so that a step may be
    submitted before the previous one's tokens are known to anybody else. Host blocks, too, are read and written in the
    order of submission, so a block given up by one request may be another's in the next batch."""

    mode: Literal["measured", "simulated"]

    def submit(self, batch: StepBatch) -> Ticket: ...

    def describe(self) -> dict[str, Any]:
        """Where and on what it runs, as plain data."""
        ...

    def draft_with(self, side: Any) -> None:
        """Draft with another side from the next step on (None: not at all), as `llmlab.executors.Redraft` makes it."""
        ...

    def close(self) -> None: ...


class Done(NamedTuple):
    """A ticket whose result is there already."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


def row_of(item: WorkItem, request: Request, block_ids: Sequence[int], block_size: int) -> Row:
    """A row with just the blocks that the item reads and writes."""
    return Row(item, request, tuple(block_ids[: -(-item.reach // block_size)]))
