"""Replays of a trace: would the same be decided again, and where would another policy have parted ways?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.replay import INPUTS, ReplayClock, feed, timeless
from llmlab.events.trace import Run
from llmlab.events.why import count, describe
from llmlab.replaying import recorded_scheduler
from llmlab.types import TraceError

# Events that tell a scheduler something when they are fed to it; it answers with events of its own.
FED = (ev.RequestArrived, ev.FinishRequested, ev.StepPlanned, ev.StepFinished)


class Way(NamedTuple):
    """One side of a divergence: the event (None: nothing more came) and the replaced policy's decision behind it."""

    event: ev.Event | None
    choice: ev.Decision | None

    def __str__(self) -> str:
        return told(self.choice or self.event)


class Divergence(NamedTuple):
    """The first place where a replay went another way than the recording."""

    step: int
    t: float
    recorded: Way
    replayed: Way


def first_divergence(run: Run, **overrides: Any) -> Divergence | None:
    """Feed the recorded arrivals, finishes and results to a fresh scheduler until it does something else.

    `overrides` replace fields of the recorded configuration. The decisions of a replaced policy are not compared
    themselves (another policy has other scores), what comes of them is. Raises TraceError, ConfigError.
    """
    if run.started.level < 2:
        raise TraceError("log_level", run.started.level, "decisions were not recorded", "Record with --log-level 2 or more.")
    clock = ReplayClock()
    scheduler = recorded_scheduler(run, clock, **overrides)
    comparison = _Comparison(run, scheduler.log, tuple(overrides))
    for position, pair in enumerate(comparison.recorded):
        clock.t = pair.event.t
        feed(scheduler, pair.event)
        if isinstance(pair.event, FED):
            index = comparison.first_unequal(position + 1)
            if index is not None:
                return comparison.divergence(index)
    return None


class _Pair(NamedTuple):
    """An event as it was logged, and what of it is compared."""

    event: ev.Event
    compared: ev.Event


class _Comparison:
    """Recorded events beside those of a scheduler that replays them, with these fields `replaced`."""

    def __init__(self, run: Run, log: EventLog, replaced: Sequence[str]) -> None:
        self.recorded = _pairs(run.log_events, replaced)
        self.replayed: list[_Pair] = []
        self._run, self._log, self._replaced = run, log, replaced
        self._read = self._equal = 0

    def first_unequal(self, fed: int) -> int | None:
        """The first place where the two differ. The first `fed` recorded events must have been replayed by now."""
        new = [self._log[seq] for seq in range(self._read, self._log.num_emitted)]
        self._read = self._log.num_emitted
        self.replayed += _pairs(new, self._replaced)
        for index in range(self._equal, max(len(self.replayed), fed)):
            if index >= min(len(self.recorded), len(self.replayed)):
                return index
            if self.recorded[index].compared != self.replayed[index].compared:
                return index
        self._equal = len(self.replayed)
        return None

    def divergence(self, index: int) -> Divergence:
        a, b = (pairs[index].event if index < len(pairs) else None for pairs in (self.recorded, self.replayed))
        here = a or b
        assert here is not None
        return Divergence(here.step, here.t, Way(a, self._choice(self._run.log_events, a)),
                          Way(b, self._choice(tuple(self._log), b)))  # fmt: skip

    def _choice(self, events: Sequence[ev.Event], before: ev.Event | None) -> ev.Decision | None:
        """The latest decision of a replaced policy in the step of `before`."""
        if before is None:
            return None
        for event in reversed(events[: before.seq - events[0].seq]):
            if event.step != before.step:
                return None
            if isinstance(event, ev.Decision) and event.seam in self._replaced:
                return event
        return None


def _pairs(events: Sequence[ev.Event], replaced: Sequence[str]) -> list[_Pair]:
    return [_Pair(e, _substance(e) if replaced else timeless(e)) for e in events if _is_compared(e, replaced)]


def _is_compared(event: ev.Event, replaced: Sequence[str]) -> bool:
    """A replaced policy's own decisions are not, nor its words; nor is which block it was, if the pool is another."""
    if isinstance(event, INPUTS):
        return False
    if isinstance(event, ev.RequestWaiting) and "admission" in replaced:
        return event.reason not in ("memory", "policy")
    if "num_blocks" in replaced and (event.LEVEL >= 3 or isinstance(event, ev.PolicyFailed)):
        return False
    return not (isinstance(event, ev.Decision) and (event.seam in replaced or event.seam == "eviction"))


def _substance(event: ev.Event) -> ev.Event:
    """What an event says was done, without the reasons and the numbers of free blocks behind it."""
    event = timeless(event)
    if isinstance(event, ev.Decision):
        return msgspec.structs.replace(event, policy="", reason="", alternatives=(), predicted=None, num_candidates=0)
    if isinstance(event, ev.RequestWaiting):
        return msgspec.structs.replace(event, detail="")
    if isinstance(event, ev.StepPlanned):
        return msgspec.structs.replace(event, free_blocks=0, predicted=None)
    if isinstance(event, ev.StepFinished):
        return msgspec.structs.replace(event, blocks_hash=0)
    return event


# ------------------------------------------------------------------------------------------- wording
def agreement(run: Run) -> str:
    """The sentence for a replay that agreed."""
    m = run.metrics
    return (f"Replayed {len(run.log_events):,} events and {m.num_steps:,} steps: every state hash and every decision "
            "agrees with the recording.")  # fmt: skip


def told(event: ev.Event | None) -> str:
    """An event as a sentence."""
    if event is None:
        return "nothing more"
    if isinstance(event, ev.Decision):
        about = event.request is not None and event.request != event.chosen
        return (f"{event.request}: " if about else "") + describe(event)
    if isinstance(event, ev.StepPlanned):
        work = ", ".join(f"{item.request} ({count(item.num_tokens, 'token')})" for item in event.items)
        return f"Step {event.step} computes {work or 'nothing'}."
    return f"{type(event).__name__}{' of ' + event.request if event.request else ''}: {_fields(event)}."


def _fields(event: ev.Event) -> str:
    plain = msgspec.to_builtins(event)
    header = ("event", "seq", "t", "step", "instance", "request", "cause")
    return ", ".join(f"{name} {value}" for name, value in plain.items() if name not in header) or "no details"
