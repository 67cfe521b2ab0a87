"""Decision replay: feed a recorded run's arrivals and results to a scheduler and compare what it decides.

The proof that a refactor changed nothing, and the seed of every fork: recorded inputs go in (arrivals, finishes
from outside, StepResults), decisions come out and must be identical to the recorded ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.spans import SPAN_EVENTS, SpanLog
from llmlab.events.trace import Run
from llmlab.types import Durations, FinishReason, Request, StepPlan, StepResult, TraceError

# What the scheduler is told, rather than what it decides.
EXPERT_EVENTS = (ev.ExpertFetched, ev.ExpertEvicted, ev.ExpertsDispatched)
INPUTS = (ev.RunStarted, ev.RequestRefused, *SPAN_EVENTS, *EXPERT_EVENTS)


class Schedules(Protocol):
    """The scheduler's interface, as far as replay needs it."""

    log: EventLog
    spans: SpanLog

    def add(self, request: Request, now: float) -> None: ...

    def finish(self, request: str, reason: FinishReason, detail: str = "") -> None: ...

    def schedule(self, now: float) -> StepPlan | None: ...

    def commit(self, result: StepResult) -> object: ...

    def reconfigure(self, changes: Mapping[str, Any], now: float) -> None: ...


class ReplayClock:
    """Shows the time of the recorded event that is being replayed."""

    def __init__(self) -> None:
        self.t = 0.0

    def now(self) -> float:
        return self.t

    def advance_to(self, t: float) -> None:
        self.t = t


class Difference(msgspec.Struct, frozen=True):
    """The first place where a replay decided otherwise."""

    index: int
    recorded: ev.Event | None
    replayed: ev.Event | None

    def __str__(self) -> str:
        return f"event {self.index}: recorded {self.recorded}, replayed {self.replayed}"


def replay(run: Run, scheduler: Schedules, clock: ReplayClock) -> list[Difference]:
    """Drive `scheduler`, whose log uses `clock`, with the inputs of `run`; differences, at most ten.

    Raises TraceError if the run was recorded below level 2.
    """
    run.need_whole()
    if run.started.level < 2:
        raise TraceError("log_level", run.started.level, "decisions were not recorded", "Record with log_level=2 or more.")
    for event in run.log_events:
        clock.t = event.t
        try:
            feed(scheduler, event)
        except Exception:  # a scheduler that went another way chokes on results that are not for its plans
            break
    return compare(run.log_events, tuple(scheduler.log))


def feed(scheduler: Schedules, event: ev.Event) -> None:
    """Tell the scheduler what `event` told it when it was recorded; nothing for its own decisions."""
    if isinstance(event, ev.RequestArrived):
        scheduler.add(event.spec, event.t)
    elif isinstance(event, ev.FinishRequested) and event.request is not None:
        scheduler.finish(event.request, event.reason, event.detail)
    elif isinstance(event, ev.Reconfigured):
        scheduler.reconfigure(event.changes, event.now)
    elif isinstance(event, ev.StepPlanned):
        scheduler.schedule(event.now)
    elif isinstance(event, SPAN_EVENTS):
        scheduler.log.step = event.step
        scheduler.spans.replay(event)
    elif isinstance(event, EXPERT_EVENTS):
        scheduler.log.step = event.step
        scheduler.log.append(msgspec.structs.replace(event, seq=scheduler.log.num_emitted))
    elif isinstance(event, ev.StepFinished):
        scheduler.commit(StepResult(event.step, event.results, event.measured, lost=event.lost, why=event.lost_why))


def compare(recorded: Sequence[ev.Event], replayed: Sequence[ev.Event]) -> list[Difference]:
    """Events that differ in anything but time, sequence numbers and causes being shifted by inputs."""
    left = [timeless(e) for e in recorded if not isinstance(e, INPUTS)]
    right = [timeless(e) for e in replayed if not isinstance(e, INPUTS)]
    differences = []
    for index in range(max(len(left), len(right))):
        a = left[index] if index < len(left) else None
        b = right[index] if index < len(right) else None
        if a != b:
            differences.append(Difference(index, a, b))
        if len(differences) == 10:
            break
    return differences


def timeless(event: ev.Event) -> ev.Event:
    """The event without anything that a clock or a machine measured, and without log positions."""
    event = msgspec.structs.replace(event, seq=0, t=0.0, cause=-1)
    if isinstance(event, ev.StepFinished):
        return msgspec.structs.replace(event, measured=Durations(), plan=0)
    if isinstance(event, ev.StepPlanned):
        return msgspec.structs.replace(event, now=0.0)
    if isinstance(event, ev.Reconfigured):
        return msgspec.structs.replace(event, now=0.0)
    return event
