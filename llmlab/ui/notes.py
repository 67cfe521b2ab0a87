"""The events of a step as short sentences, with what else was possible: what the timeline reads out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmlab.events import catalog as ev
from llmlab.events.why import count

MAX_TEXT = 240  # characters of one sentence
MAX_OPTIONS = 6
LOST = {"device memory": "all requests begin anew", "device": "all requests end"}


class Option(NamedTuple):
    """What could have been chosen instead. `cost`: predicted seconds, None if the policy priced nothing."""

    option: str
    score: str
    cost: float | None
    feasible: bool
    why_not: str


class Note(NamedTuple):
    """One sentence about one event. `kind` is the word in front of it; `cost`: predicted seconds of what was chosen."""

    step: int
    t: float
    kind: str
    request: str | None
    text: str
    cost: float | None = None
    options: tuple[Option, ...] = ()
    seq: int = -1


class Notes:
    """Folds events into notes. Evictions, of which a step may have hundreds, become one sentence a step."""

    def __init__(self) -> None:
        self._evicted: list[ev.Decision] = []
        self._verified: list[ev.Verified] = []
        self._let_in: dict[str, None] = {}
        self._waits = -1  # seq of the last decision to wait, which says why

    def write(self, event: ev.Event) -> list[Note]:
        """The notes that this event completes."""
        if isinstance(event, ev.StepPlanned):
            return self._evictions(event)
        if isinstance(event, ev.Verified):
            self._verified.append(event)
        if isinstance(event, ev.StepFinished):
            return self._verifications(event)
        if isinstance(event, ev.Decision):
            return self._decision(event)
        if isinstance(event, ev.RequestAdmitted):
            return self._admitted(event)
        said = _said(event)
        if said is None or (isinstance(event, ev.RequestWaiting) and event.cause == self._waits >= 0):
            return []
        return [Note(event.step, event.t, said[0], event.request, said[1][:MAX_TEXT], seq=event.seq)]

    def _decision(self, event: ev.Decision) -> list[Note]:
        if event.seam == "eviction":
            self._evicted.append(event)
            return []
        if event.seam == "admission" and event.chosen == "admit":
            self._let_in[event.request or ""] = None
        elif event.seam == "admission":
            self._waits = event.seq
        return [_decided(event)]

    def _admitted(self, event: ev.RequestAdmitted) -> list[Note]:
        """Said already if an admission decision was logged, but for tokens that were found in the cache."""
        said = event.request in self._let_in
        self._let_in.pop(event.request or "", None)
        if said and not event.num_cached_tokens:
            return []
        hit = f"{event.num_cached_tokens} of " if event.num_cached_tokens else ""
        text = f"{hit}{count(event.num_tokens, 'token')} {'found in the cache' if hit else 'to compute'}"
        return [Note(event.step, event.t, "admit", event.request, text, seq=event.seq)]

    def _evictions(self, plan: ev.StepPlanned) -> list[Note]:
        evicted, self._evicted = self._evicted, []
        if not evicted:
            return []
        first = evicted[0]
        text = f"{first.policy} gave away {count(len(evicted), 'cached block')}, first {first.chosen}"
        return [Note(plan.step, first.t, "evict", first.request, text, seq=first.seq)]


    def _verifications(self, step: ev.StepFinished) -> list[Note]:
        """What drafting brought in this step, over all requests."""
        verified, self._verified = self._verified, []
        if not verified:
            return []
        held, lost = sum(len(e.accepted) for e in verified), sum(len(e.rejected) for e in verified)
        one = verified[0].request if len(verified) == 1 else None
        text = f"{held} of {count(held + lost, 'drafted token')} held" + ("" if one else f", in {count(len(verified), 'request')}")
        return [Note(step.step, step.t, "draft", one, text, seq=verified[0].seq)]


def _decided(event: ev.Decision) -> Note:
    kind = {"admission": event.chosen if event.chosen in ("admit", "wait") else "admission", "composer": "batch",
            "ordering": "order", "victim": "victim", "tiering": "memory"}.get(event.seam, event.seam)  # fmt: skip
    said = kind in ("admit", "wait") or event.chosen == event.policy or event.reason.startswith(event.chosen)
    chosen = [] if said else [event.chosen]
    text = f"{event.policy}: {', '.join([*chosen, *filter(None, [event.reason])])}"
    cost = event.predicted.seconds if event.predicted is not None else None
    options = tuple(_option(a) for a in event.alternatives[:MAX_OPTIONS])
    return Note(event.step, event.t, kind, event.request, text[:MAX_TEXT], cost, options, event.seq)


def _option(a: ev.Alternative) -> Option:
    score = "" if a.score is None else f"{a.score:.4g}" if isinstance(a.score, float) else str(a.score)
    return Option(a.option, score, a.predicted.seconds if a.predicted is not None else None, a.feasible, a.why_not)


def _said(event: ev.Event) -> Sequence[str] | None:
    """(kind, sentence) of an event that is no decision; None if it is not worth one."""
    if isinstance(event, ev.RequestPreempted):
        lost = f"{count(event.tokens_lost, 'token')} to compute again" if event.mode == "recompute" else f"{count(event.num_blocks, 'block')} moved to the host"
        for_whom = "for itself" if event.beneficiary == event.request else f"for {event.beneficiary}" if event.beneficiary else "with the device"
        return "preempt", f"preempted {for_whom}: {lost}"
    if isinstance(event, ev.RequestResumed):
        return "resume", f"back on the device with {count(event.num_tokens, 'token')}"
    if isinstance(event, ev.RequestRehomed):
        return "move", f"{count(event.num_blocks, 'block')} of KV go to the {event.home}; it goes on there"
    if isinstance(event, ev.ResourceLost):
        return "failed", f"{event.resource} lost: {LOST.get(event.resource, 'others compute what it was given')}" + (f" ({event.why})" if event.why else "")
    if isinstance(event, ev.RequestFinished):
        tokens = count(event.num_output_tokens, "token")
        return "finish", f"{tokens}, {event.reason}" + (f": {event.detail}" if event.detail else "")
    if isinstance(event, ev.RequestWaiting):
        return "wait", event.detail or event.reason
    if isinstance(event, ev.ReserveFailed):
        return "full", f"needs {count(event.need, 'block')}, {event.free} free"
    if isinstance(event, ev.Reconfigured):
        return "set", ", ".join(f"{name} {value}" for name, value in event.changes.items() if name != "draft")
    if isinstance(event, ev.RequestRefused):
        return "refuse", event.reason
    if isinstance(event, ev.PolicyFailed):
        return "failed", f"{event.seam} policy {event.policy} failed, {event.fallback or 'the default'} decided: {event.error}"
    if isinstance(event, ev.InvariantViolated):
        return "failed", event.what
    return None
