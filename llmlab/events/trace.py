"""A run: its events and what can be asked of them. Needs neither the model nor the policies' code.

    run.metrics  run.requests  run.steps  run.events("RequestPreempted")
    run.at(412)          the state after step 412
    run.why("r17")       why was it late? a chain of causes, as sentences
    run.save(path)       Run.load(path)       run.to_perfetto(path)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.metrics import MetricsFold, RequestMetrics, RunMetrics, fold
from llmlab.events.state import LabState
from llmlab.events.tracefile import read_trace, write_trace
from llmlab.types import Cost, ItemResult, TraceError, WorkItem

if TYPE_CHECKING:
    from llmlab.events.why import Index, Why


_MORE = "Raise log_capacity, lower log_level, or give trace=FILE and Run.load it."


class Step(msgspec.Struct, frozen=True):
    """One step, planned and finished. Times in seconds of the run's clock; `end` is None while in flight."""

    step: int
    start: float
    end: float | None
    items: tuple[WorkItem, ...]
    num_tokens: int
    num_running: int
    num_waiting: int
    used_blocks: int
    predicted: Cost | None
    measured: float | None
    schedule_seconds: float
    results: tuple[ItemResult, ...]


class Run:
    """A finished (or still growing) run as a list of events. Immutable: take a new one to see more."""

    def __init__(self, events: Sequence[ev.Event], cut: str = "", live: MetricsFold | None = None) -> None:
        if not events:
            raise TraceError("events", "[]", "a run needs at least its RunStarted event")
        self.log_events = tuple(events)
        self.cut = cut
        if live is not None:
            self._fold = live

    # ------------------------------------------------------------------------------ from and to files
    @classmethod
    def of(cls, log: EventLog, live: MetricsFold | None = None) -> Self:
        """The events that a log still holds. If its beginning fell out of the ring, the metrics are those that were folded
        while it ran (`live`), and what needs every event says so; raises TraceError without them."""
        if log.first_seq == 0:
            return cls(tuple(log))
        if live is None or log.started is None:
            raise TraceError("log_capacity", log.capacity, f"the first {log.first_seq} events fell out of the ring", _MORE)
        return cls((log.started, *log), f"{log.first_seq - 1} events after the first fell out of the ring", live)

    @property
    def whole(self) -> bool:
        """Whether all events are here, from the first on."""
        return len(self.log_events) == 1 or self.log_events[1].seq == self.log_events[0].seq + 1

    def need_whole(self) -> None:
        """Raise TraceError unless all events are here."""
        if not self.whole:
            raise TraceError("log_capacity", self.cut, "the run is too long for its log, and this needs every event", _MORE)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a trace file. Raises TraceError; a damaged tail is cut off and named in `cut`."""
        loaded = read_trace(path)
        return cls(loaded.events, loaded.cut)

    def save(self, path: str | Path) -> Path:
        """Write a trace file: .jsonl, .jsonl.gz or .jsonl.zst. Raises TraceError."""
        self.need_whole()
        write_trace(path, self.log_events)
        return Path(path)

    def to_perfetto(self, path: str | Path) -> Path:
        """Write a timeline for ui.perfetto.dev or chrome://tracing (JSON)."""
        from llmlab.events.export import write_perfetto

        return write_perfetto(self, path)

    # ------------------------------------------------------------------------------------ the facts
    @cached_property
    def started(self) -> ev.RunStarted:
        """Configuration, seed, hardware and mode. Raises TraceError if the beginning is missing."""
        first = self.log_events[0]
        if not isinstance(first, ev.RunStarted):
            raise TraceError("trace", type(first).__name__, "a run begins with RunStarted", "Is the beginning missing?")
        return first

    @property
    def mode(self) -> str:
        """"measured" or "simulated": belongs beside every number."""
        return self.started.mode

    def events(self, *kinds: str | type[ev.Event], request: str | None = None, step: int | None = None) -> list[Any]:
        """Events of the given kinds (all if none), of one request, of one step."""
        names = {kind if isinstance(kind, str) else kind.__name__ for kind in kinds}
        for name in names - set(ev.EVENT_TYPES):
            from llmlab.types import unknown_name

            raise unknown_name("event", name, ev.EVENT_TYPES)
        return [
            e
            for e in self.log_events
            if (not names or type(e).__name__ in names)
            and (request is None or e.request == request)
            and (step is None or e.step == step)
        ]

    def event(self, seq: int) -> ev.Event:
        """The event with this `seq`."""
        if not self.whole and self.log_events[1].seq <= seq <= self.log_events[-1].seq:
            return self.log_events[1 + seq - self.log_events[1].seq]
        first = self.log_events[0].seq
        if not first <= seq < first + len(self.log_events):
            raise TraceError("seq", seq, f"this run has events {first} to {first + len(self.log_events) - 1}")
        return self.log_events[seq - first]

    @cached_property
    def _fold(self) -> MetricsFold:
        return fold(self.log_events)

    @cached_property
    def metrics(self) -> RunMetrics:
        """The run in numbers, defined in docs/metrics.md."""
        return self._fold.result()

    @property
    def requests(self) -> dict[str, RequestMetrics]:
        """Metrics of each request, in order of arrival."""
        return self._fold.requests

    @cached_property
    def steps(self) -> list[Step]:
        """All submitted steps in order (level 2 and up)."""
        finished = {e.plan: e for e in self.log_events if isinstance(e, ev.StepFinished)}
        return [
            _step(e, finished.get(e.seq))
            for e in self.log_events
            if isinstance(e, ev.StepPlanned) and (e.items or e.moves)
        ]

    @cached_property
    def index(self) -> Index:
        """Where to look for the answers of `why`."""
        from llmlab.events.why import Index

        return Index(self)

    # -------------------------------------------------------------------------------- time travel
    def at(self, step: int) -> LabState:
        """The state right after `step` finished, folded from the events. Raises TraceError for a step that
        this run does not have."""
        self.need_whole()
        state = LabState()
        for event in self.log_events:
            state.apply(event)
            if isinstance(event, ev.StepFinished) and event.step == step:
                return state
        raise TraceError("step", step, "has not finished in this run", f"Its last finished step is {self._last_step()}.")

    def _last_step(self) -> int:
        return max((e.step for e in self.log_events if isinstance(e, ev.StepFinished)), default=-1)

    def verify(self) -> list[str]:
        """View replay: every recorded state hash against the fold; the disagreements, as sentences. Raises TraceError
        for a run below level 2, whose log lacks what the state is folded from."""
        if self.started.level < 2:
            raise TraceError("log_level", self.started.level, "does not record what the state is folded from",
                             "Record with log_level=2 or more.")  # fmt: skip
        self.need_whole()
        state, wrong = LabState(), []
        for event in self.log_events:
            state.apply(event)
            if isinstance(event, ev.StepFinished):
                if event.state_hash != state.state_hash:
                    wrong.append(f"step {event.step}: state hash {event.state_hash:x}, folded {state.state_hash:x}")
                if self.started.level >= 3 and event.blocks_hash != state.blocks_hash:
                    wrong.append(f"step {event.step}: blocks hash {event.blocks_hash:x}, folded {state.blocks_hash:x}")
        return wrong

    # ----------------------------------------------------------------------------------------- why
    def why(self, request: str, t: float | None = None) -> Why:
        """Why `request` was as late as it was (or, with `t`, what it was waiting for at that moment)."""
        from llmlab.events.why import explain

        return explain(self, request, t)

    def __repr__(self) -> str:
        m = self.metrics
        return (f"Run({m.mode}, {self.started.model.get('name', '?')} on {self.started.hardware.get('name', '?')}: "
                f"{m.num_requests} requests, {m.num_steps} steps, {m.duration:.3g} s)")


def _step(planned: ev.StepPlanned, finished: ev.StepFinished | None) -> Step:
    return Step(
        planned.step, planned.t, finished.t if finished else None, planned.items, planned.num_tokens,
        planned.num_running, planned.num_waiting, finished.used_blocks if finished else 0, planned.predicted,
        finished.measured.execute if finished else None,
        finished.measured.schedule + finished.measured.commit if finished else 0.0,
        finished.results if finished else (),
    )  # fmt: skip

