"""Why was a request late? Its life cut into stretches, each with the decisions that caused it, as sentences.

The stretches cover the life of the request without gaps, so their durations add up to its latency; every stretch
ends in a recorded cause. Works on any trace; what its log level did not record is said, not guessed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Literal

import msgspec

from llmlab.events import catalog as ev
from llmlab.types import TraceError

if TYPE_CHECKING:
    from llmlab.events.trace import Run, Step

Kind = Literal["queued", "prompt", "decode", "preempted", "recompute"]
TITLES: dict[Kind, str] = {
    "queued": "in the queue", "prompt": "computing its prompt", "decode": "decoding",
    "preempted": "preempted", "recompute": "computing again what was dropped",
}  # fmt: skip


class Stretch(msgspec.Struct, frozen=True):
    """One stretch of a request's life. `cause`: seq of the event that began it; `sentences`: why, and what else
    was possible."""

    kind: Kind
    start: float
    end: float
    cause: int
    sentences: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Why(msgspec.Struct, frozen=True):
    """The answer to `run.why`. `str()` of it is the text; `parts` adds up to the latency."""

    request: str
    headline: str
    stretches: tuple[Stretch, ...]
    chain: tuple[ev.Event, ...]

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by kind of stretch."""
        found: dict[str, float] = {}
        for stretch in self.stretches:
            found[stretch.kind] = found.get(stretch.kind, 0.0) + stretch.seconds
        return found

    @property
    def sentences(self) -> list[str]:
        return [self.headline, *(s for stretch in self.stretches for s in stretch.sentences)]

    def __str__(self) -> str:
        lines = [self.headline]
        for stretch in self.stretches:
            lines.append(f"  {seconds(stretch.start)} to {seconds(stretch.end)}  {TITLES[stretch.kind]}"
                         f" ({seconds(stretch.seconds)})")  # fmt: skip
            lines += [f"      {sentence}" for sentence in stretch.sentences]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def explain(run: Run, request: str, t: float | None = None) -> Why:
    """See `Run.why`. Raises TraceError for a request that the run does not know, or a time outside its life."""
    own = run.index.of_request.get(request, [])
    arrived = next((e for e in own if isinstance(e, ev.RequestArrived)), None)
    if arrived is None:
        return _refused(run, request, own)
    stretches = [_told(run, request, s) for s in _stretches(own, arrived, run.log_events[-1].t)]
    if t is not None:
        stretches = _at(request, stretches, t)
    return Why(request, _headline(run, request, stretches), tuple(stretches), tuple(_chain(run, stretches[-1].cause)))


def _refused(run: Run, request: str, own: Sequence[ev.Event]) -> Why:
    refusal = next((e for e in own if isinstance(e, ev.RequestRefused)), None)
    if refusal is None:
        known = ", ".join(list(run.requests)[:12])
        raise TraceError("request", request, "is not in this run", f"It has {len(run.requests)} requests: {known} ...")
    return Why(request, f"{request} never ran: it was refused at {seconds(refusal.t)}. {refusal.reason}", (), (refusal,))


def _at(request: str, stretches: list[Stretch], t: float) -> list[Stretch]:
    found = [s for s in stretches if s.start <= t <= s.end]
    if not found:
        raise TraceError("t", t, f"{request} did not live then",
                         f"It lived from {seconds(stretches[0].start)} to {seconds(stretches[-1].end)}.")  # fmt: skip
    return found[-1:]


class Index:
    """Where to look in a run, so that one answer does not read all of its events. Made once a run."""

    def __init__(self, run: Run) -> None:
        self.of_request: dict[str | None, list[ev.Event]] = {}
        self.queue: list[ev.Event] = []
        self.composed: dict[int, ev.Decision] = {}
        for event in run.log_events:
            if event.request is not None:
                self.of_request.setdefault(event.request, []).append(event)
            if isinstance(event, ev.Decision) and event.seam == "composer":
                self.composed.setdefault(event.step, event)
            if isinstance(event, (ev.RequestAdmitted, ev.RequestWaiting, ev.RequestResumed)) or (
                    isinstance(event, ev.Decision) and event.seam in ("ordering", "admission")):  # fmt: skip
                self.queue.append(event)
        self.queue_seqs = [event.seq for event in self.queue]
        self.steps = [step for step in run.steps if step.end is not None]
        self.starts = [step.start for step in self.steps]


# ------------------------------------------------------------------------------------- the stretches
def _stretches(own: Sequence[ev.Event], arrived: ev.RequestArrived, end: float) -> list[Stretch]:
    """The life from arrival to end (or to the end of the trace), without gaps."""
    cuts: list[tuple[float, Kind, int]] = [(arrived.spec.arrival, "queued", arrived.seq)]
    answering = False
    for event in own:
        kind = _next_kind(event, cuts[-1][1], answering)
        answering = answering or isinstance(event, ev.FirstToken)
        if kind is not None:
            cuts.append((event.t, kind, event.seq))
        if isinstance(event, ev.RequestFinished):
            end = event.t
    ends = [start for start, _, _ in cuts[1:]] + [end]
    stretches = [Stretch(kind, start, stop, seq) for (start, kind, seq), stop in zip(cuts, ends)]
    return [s for s in stretches if s.seconds > 0 or s.kind == "preempted"] or stretches[-1:]


def _next_kind(event: ev.Event, now: Kind, answering: bool) -> Kind | None:
    if isinstance(event, ev.RequestPreempted):
        return "preempted"
    if isinstance(event, (ev.RequestAdmitted, ev.RequestResumed)):
        if answering and isinstance(event, ev.RequestAdmitted):
            return "recompute"
        return "decode" if answering else "prompt"
    if isinstance(event, ev.FirstToken) and now == "queued":  # level 0: admissions were not recorded
        return "decode"
    if isinstance(event, (ev.FirstToken, ev.TokensReleased)) and now in ("prompt", "recompute"):
        return "decode"
    return None


def _told(run: Run, request: str, stretch: Stretch) -> Stretch:
    tell = {"queued": _tell_queued, "preempted": _tell_preempted, "prompt": _tell_computing,
            "recompute": _tell_computing, "decode": _tell_decode}[stretch.kind]  # fmt: skip
    return msgspec.structs.replace(stretch, sentences=tuple(tell(run, request, stretch)))


def _headline(run: Run, request: str, stretches: Sequence[Stretch]) -> str:
    metrics = run.requests[request]
    total = sum(s.seconds for s in stretches)
    parts = Why(request, "", tuple(stretches), ()).parts
    shares = ", ".join(f"{seconds(v)} {TITLES[k]}" for k, v in parts.items() if v > 0)  # type: ignore[index]
    end = f"ended ({metrics.finish_reason})" if metrics.finished is not None else "was not finished"
    times = f", preempted {count(metrics.num_preemptions, 'time')}" if metrics.num_preemptions else ""
    return (f"{request} {end} {seconds(total)} after it arrived ({run.mode}), with {count(metrics.num_output_tokens, 'token')}"
            f" for a prompt of {metrics.num_prompt_tokens}{times}: {shares}.")  # fmt: skip


# -------------------------------------------------------------------------------------- the sentences
def _within(run: Run, stretch: Stretch) -> list[ev.Event]:
    """What happened to the queue in a stretch: admissions, waits, and the decisions on them."""
    first = bisect_left(run.index.queue_seqs, stretch.cause)
    return list(takewhile(lambda event: event.t <= stretch.end, islice(run.index.queue, first, None)))


def _tell_queued(run: Run, request: str, stretch: Stretch) -> Iterable[str]:
    events = _within(run, stretch)
    before = [e for e in events if isinstance(e, ev.RequestAdmitted) and e.request != request and e.t < stretch.end]
    names = list(dict.fromkeys(e.request or "" for e in before))
    if names:
        yield f"{listed(names)} went first."
    yield from _ordering_sentence(request, events)
    heads = [e for e in events if isinstance(e, ev.RequestWaiting) and (e.request == request or e.request in names)]
    for event in heads[:3]:
        who = "It" if event.request == request else f"The head of the queue, {event.request},"
        yield f"{who} had to wait at {seconds(event.t)}: {event.detail}."
    admitted = next((e for e in events if isinstance(e, ev.RequestAdmitted) and e.request == request), None)
    yield _admission_sentence(run, admitted) if admitted else _not_admitted(run, request)


def _ordering_sentence(request: str, events: Sequence[ev.Event]) -> Iterable[str]:
    for event in events:
        if isinstance(event, ev.Decision) and event.seam == "ordering":
            passed = next((a for a in event.alternatives if a.option == request), None)
            if passed is not None:
                yield (f"The ordering policy {event.policy} put {event.chosen} before it at {seconds(event.t)}: "
                       f"{event.reason}, its own was {_score(passed.score)}.")  # fmt: skip
                return


def _admission_sentence(run: Run, admitted: ev.RequestAdmitted) -> str:
    hit = f"; {admitted.num_cached_tokens} of its {admitted.num_tokens} tokens were cached" if admitted.num_cached_tokens else ""
    because = next((e.reason for e in _chain(run, admitted.seq) if isinstance(e, ev.Decision) and e.seam == "admission"), "")
    return f"At {seconds(admitted.t)} it was let in{': ' + because if because else ''}{hit}."


def _not_admitted(run: Run, request: str) -> str:
    if run.started.level < 1:
        return "When it was let in was not recorded (log level 0)."
    if run.requests[request].finished is None:
        return "It has not been let in yet."
    return "It was never let in before it ended."


def _tell_preempted(run: Run, request: str, stretch: Stretch) -> Iterable[str]:
    event = run.event(stretch.cause)
    assert isinstance(event, ev.RequestPreempted)
    chain = _chain(run, event.seq)
    failed = next((e for e in chain if isinstance(e, ev.ReserveFailed)), None)
    if failed is not None:
        holders = ", ".join(f"{name} {n}" for name, n in failed.holders)
        yield (f"{failed.request} needed {count(failed.need, 'block')} and {failed.free} were free "
               f"(most blocks: {holders}).")  # fmt: skip
    victim = next((e for e in chain if isinstance(e, ev.Decision) and e.seam == "victim"), None)
    lost = next((e for e in chain if isinstance(e, ev.ResourceLost)), None)
    if lost is not None:
        yield f"The device lost its memory, and the request was queued again: {lost.why}."
    else:
        yield describe(victim) if victim else f"Its memory went to {event.beneficiary} (decisions were not recorded)."
    near = (e for e in run.index.of_request[request] if e.seq >= stretch.cause - 3)
    tier = next((e for e in near if isinstance(e, ev.Decision) and e.seam == "tiering"), None)
    if tier is not None:
        yield describe(tier)
    if event.mode == "recompute":
        yield f"{count(event.tokens_lost, 'computed token')} were dropped."
    else:
        yield f"{count(event.num_blocks, 'block')} went to the host."
    waits = [e for e in _within(run, stretch) if isinstance(e, ev.RequestWaiting) and e.request == request]
    for wait in waits[:2]:
        yield f"At {seconds(wait.t)} it could not come back: {wait.detail}."


def _tell_computing(run: Run, request: str, stretch: Stretch) -> Iterable[str]:
    spans = [(step, item) for step in _steps_of(run, request, stretch) for item in step.items if item.request == request]
    if not spans:
        yield "Its steps were not recorded (log level below 2)." if run.started.level < 2 else "It was not in any step."
        return
    tokens = sum(item.num_tokens for _, item in spans)
    others = sum(step.num_tokens for step, _ in spans) - tokens
    yield (f"{count(tokens, 'token')} in {count(len(spans), 'step')}, beside {count(others, 'token')} of other requests.")
    cut = next((run.index.composed[step.step] for step, item in spans
                if item.emit == "none" and step.step in run.index.composed), None)  # fmt: skip
    if cut is not None:
        yield f"Its prompt was cut into chunks: {describe(cut)}"


def _tell_decode(run: Run, request: str, stretch: Stretch) -> Iterable[str]:
    steps = _steps_of(run, request, stretch)
    if not steps:
        yield "Its steps were not recorded (log level below 2)." if run.started.level < 2 else "No step of its own fell into it."
        return
    mixed = [s for s in steps if any(i.num_committed > 1 and i.request != request for i in s.items)]
    pure = [s for s in steps if s not in mixed]
    each = "each on average, with" if len(steps) > 1 else "long, with"
    yield (f"{count(len(steps), 'step')}, {seconds(_mean(steps))} {each} "
           f"{sum(len(s.items) for s in steps) / len(steps):.1f} requests in a step.")  # fmt: skip
    if mixed and pure:
        guests = listed(list(dict.fromkeys(i.request for s in mixed for i in s.items if i.num_committed > 1 and i.request != request)))
        yield (f"{len(mixed)} of them also computed prompts of {guests}: they took {seconds(_mean(mixed))} against "
               f"{seconds(_mean(pure))} without.")  # fmt: skip
    yield from _tell_drafts(run, request, stretch)
    skipped = _skipped(run, request, stretch)
    if skipped:
        yield f"{count(skipped, 'step')} in between ran without it: the composer left it out."


def _tell_drafts(run: Run, request: str, stretch: Stretch) -> Iterable[str]:
    verified = [e for e in run.index.of_request.get(request, ())
                if isinstance(e, ev.Verified) and stretch.start <= e.t <= stretch.end]  # fmt: skip
    held = sum(len(e.accepted) for e in verified)
    drafts = held + sum(len(e.rejected) for e in verified)
    if drafts:
        yield (f"Of {count(drafts, 'draft')} ({verified[0].source}) {held} held: {1 + held / len(verified):.1f} tokens a "
               "verification.")  # fmt: skip


def _skipped(run: Run, request: str, stretch: Stretch) -> int:
    return sum(1 for s in _during(run, stretch) if all(i.request != request for i in s.items))


def _steps_of(run: Run, request: str, stretch: Stretch) -> list[Step]:
    return [s for s in _during(run, stretch) if any(i.request == request for i in s.items)]


def _during(run: Run, stretch: Stretch) -> list[Step]:
    """Finished steps that were planned within the stretch. A step that ends a stretch is released just before it
    is logged as finished, so its beginning is what tells where it belongs."""
    starts = run.index.starts
    return run.index.steps[bisect_left(starts, stretch.start) : bisect_left(starts, stretch.end)]


def _mean(steps: Sequence[Step]) -> float:
    return sum((s.end or s.start) - s.start for s in steps) / len(steps)


def _chain(run: Run, seq: int) -> list[ev.Event]:
    """The event and what led to it, back to something that came from outside."""
    chain: list[ev.Event] = []
    while seq >= 0 and len(chain) < 64:
        event = run.event(seq)
        chain.append(event)
        seq = event.cause
    return chain


# ----------------------------------------------------------------------------------------- wording
def describe(decision: ev.Decision) -> str:
    """A Decision as a sentence: who chose what, and what else there was at which cost."""
    cost = f" (predicted {seconds(decision.predicted.seconds)})" if decision.predicted is not None else ""
    text = f"The {decision.seam} policy {decision.policy} chose {decision.chosen}{cost}"
    text += f": {decision.reason}" if decision.reason else ""
    if decision.alternatives:
        text += "; instead: " + ", ".join(_alternative(a) for a in decision.alternatives)
    return text + "."


def _alternative(option: ev.Alternative) -> str:
    notes = []
    if option.predicted is not None:
        notes.append(f"predicted {seconds(option.predicted.seconds)}")
    elif option.score is not None:
        notes.append(f"score {_score(option.score)}")
    if not option.feasible:
        notes.append("not possible")
    if option.why_not:
        notes.append(option.why_not)
    return option.option + (f" ({', '.join(notes)})" if notes else "")


def _score(score: float | str | None) -> str:
    return f"{score:.6g}" if isinstance(score, float) else str(score)


def seconds(value: float) -> str:
    """A duration as people say it."""
    size = abs(value)
    if size >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if size >= 1e-3 or size == 0 else f"{value * 1e6:.3g} us"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names as a person would list them."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
