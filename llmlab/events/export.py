"""A run as timelines: what each step computed, what each request did at every instant, and the file for Perfetto.

    step_slices(run)      when each step ran, and whose tokens it computed
    request_spans(run)    per request: disjoint spans waiting / prefill / decode, from arrival to finish
    merge_spans(spans)    neighbours of one kind become one (a bar, not a thousand slivers)
    write_perfetto(run)   all of it as Chrome-trace JSON for ui.perfetto.dev

A span is "waiting" when the request is in no step, "decode" once a step has given it a token, else "prefill"; what a
recompute computes again is prefill too. Level 0 logs have no steps: everything before the first token is "waiting".
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from llmlab.events import catalog as ev
from llmlab.types import ItemResult, TraceError

if TYPE_CHECKING:
    from llmlab.events.trace import Run

SpanKind = Literal["waiting", "prefill", "decode"]


class RequestSpan(msgspec.Struct, frozen=True):
    """What a request did between two instants (seconds of the run's clock). `tokens` were computed for it in `steps`
    steps; `tokens` is None where the log level does not tell."""

    request: str
    kind: SpanKind
    start: float
    end: float
    steps: int = 0
    tokens: int | None = 0

    @property
    def seconds(self) -> float:
        return self.end - self.start


class StepSlice(msgspec.Struct, frozen=True):
    """One finished step: when it ran (slices are disjoint, also when steps overlap in flight) and what it computed.
    `kinds`: what it was for each request in it. `num_running`, `num_waiting`, `used_blocks`: after it; the same with
    `planned_`: while it ran. Fields with the default None are not known below log level 2. Seconds."""

    step: int
    start: float
    end: float
    num_tokens: int
    num_running: int
    num_waiting: int
    used_blocks: int
    measured: float
    kinds: dict[str, SpanKind]
    prefill_tokens: int | None = None
    decode_tokens: int | None = None
    planned_blocks: int | None = None
    planned_running: int | None = None
    planned_waiting: int | None = None
    predicted: float | None = None
    tokens: dict[str, int] | None = None


# --------------------------------------------------------------------------------------- the steps
class StepFold:
    """Folds events into StepSlices, also those of the leaps of a simulation. A step's beginning is when it was planned, or, below level 2, its end less its
    measured time; never before the end of the step ahead of it, so that overlapped steps do not overlap."""

    def __init__(self) -> None:
        self.slices: list[StepSlice] = []
        self._plans: dict[int, ev.StepPlanned] = {}
        self._answering: dict[str, bool] = {}
        self._num_blocks = 0
        self._end = float("-inf")
        self._waiting = 0
        self._running: dict[str, None] = {}
        # Since the last step: who was let in, got a first token, ended, and when.
        self._joined: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._ended: list[str] = []

    def write(self, event: ev.Event) -> list[StepSlice]:
        """Take in one event; the slices that it completes: one of a step, as many as it has steps of a leap."""
        if isinstance(event, ev.StepPlanned):
            self._plans[event.seq] = event
        elif isinstance(event, ev.RunStarted):
            self._num_blocks = int(event.config.get("num_blocks") or 0)
        elif isinstance(event, ev.Reconfigured):
            self._num_blocks = int(event.changes.get("num_blocks") or self._num_blocks)
        elif isinstance(event, ev.StepFinished):
            return self._add([self._slice(event, self._plans.pop(event.plan, None))])
        elif isinstance(event, ev.Leapt):
            return self._add(list(self._leap(event)))
        elif event.request is not None:
            self._note(event, event.request)
        return []

    def _note(self, event: ev.Event, name: str) -> None:
        """Who runs, for the steps of a leap, which the log does not list."""
        if isinstance(event, (ev.RequestAdmitted, ev.RequestResumed)):
            self._running[name], self._joined[name] = None, event.t
            if isinstance(event, ev.RequestAdmitted):
                self._answering[name] = False
        elif isinstance(event, ev.RequestPreempted):
            self._running.pop(name, None)
        elif isinstance(event, ev.FirstToken):
            self._first[name] = event.t
        elif isinstance(event, ev.RequestFinished):
            self._ended.append(name)

    def _add(self, slices: list[StepSlice]) -> list[StepSlice]:
        self.slices += slices
        self._waiting = slices[-1].num_waiting if slices else self._waiting
        for name in self._ended:
            self._running.pop(name, None)
            self._answering.pop(name, None)
        self._joined, self._first, self._ended = {}, {}, []
        return slices

    def _leap(self, event: ev.Leapt) -> Iterator[StepSlice]:
        """The steps of a leap. Everybody who runs goes on; first tokens and admissions fall on the ends of steps, between
        which the log does not tell where one ends: they share time and tokens evenly."""
        begin = min(event.t, max(self._end, event.t - event.seconds))
        ends = _step_ends(begin, event.t, [*self._first.values(), *self._joined.values()], event.num_steps)
        least, more = divmod(event.num_tokens, event.num_steps)
        for i, end in enumerate(ends):
            start = ends[i - 1] if i else begin
            kinds = {name: self._kind_at(name, (start + end) / 2) for name in self._running
                     if self._joined.get(name, begin) <= (start + end) / 2}  # fmt: skip
            yield StepSlice(event.step - event.num_steps + 1 + i, start, end, least + (i < more), len(kinds), self._waiting,
                            event.used_blocks, end - start, kinds)  # fmt: skip
        self._end = event.t
        self._answering |= dict.fromkeys(self._first, True)

    def _kind_at(self, name: str, t: float) -> SpanKind:
        return "decode" if self._answering.get(name) or self._first.get(name, t + 1) <= t else "prefill"

    def _slice(self, event: ev.StepFinished, plan: ev.StepPlanned | None) -> StepSlice:
        start = plan.t if plan is not None else event.t - event.measured.execute
        start = min(event.t, max(start, self._end))
        self._end = event.t
        kinds = {result.request: self._kind(result) for result in event.results}
        known = StepSlice(event.step, start, event.t, event.num_tokens, event.num_running, event.num_waiting,
                          event.used_blocks, event.measured.execute, kinds)  # fmt: skip
        return known if plan is None else self._with_plan(known, plan)

    def _with_plan(self, known: StepSlice, plan: ev.StepPlanned) -> StepSlice:
        tokens = {item.request: item.num_tokens for item in plan.items}
        decode = sum(n for name, n in tokens.items() if known.kinds.get(name) == "decode")
        return msgspec.structs.replace(
            known, prefill_tokens=sum(tokens.values()) - decode, decode_tokens=decode, tokens=tokens,
            planned_blocks=self._num_blocks - plan.free_blocks if self._num_blocks else None,
            planned_running=plan.num_running, planned_waiting=plan.num_waiting,
            predicted=plan.predicted.seconds if plan.predicted is not None else None,
        )  # fmt: skip

    def _kind(self, result: ItemResult) -> SpanKind:
        """Prefill until a step brings a token, and again after each new admission."""
        answering = self._answering.get(result.request, False)
        if result.token_ids:
            self._answering[result.request] = True
        return "decode" if answering else "prefill"


def _step_ends(begin: float, end: float, known: Iterable[float], num_steps: int) -> list[float]:
    """`num_steps` ends of steps up to `end`, the `known` ones among them (as many as there is room for); the stretches
    between those are divided evenly, into steps of about the same length."""
    marks = [*sorted({t for t in known if begin < t < end})[: num_steps - 1], end]
    ends: list[float] = []
    for i, mark in enumerate(marks):
        start = ends[-1] if ends else begin
        left = num_steps - len(ends) - (len(marks) - 1 - i)  # every later stretch needs one
        share = left if i == len(marks) - 1 else max(1, min(left, round((num_steps - len(ends)) * (mark - start) / (end - start))))
        ends += [start + (mark - start) * (k + 1) / share for k in range(share)]
        ends[-1] = mark
    return ends


def step_slices(run: Run) -> list[StepSlice]:
    """All finished steps in order; empty at log level 0."""
    fold = StepFold()
    for event in run.log_events:
        fold.write(event)
    return fold.slices


# ------------------------------------------------------------------------------------ the requests
@dataclass
class _Life:
    """A request while its spans are being collected: covered up to `at`."""

    request: str
    begin: float
    at: float
    finish: float | None = None
    first_token: float | None = None
    last_slice: int = -2
    spans: list[RequestSpan] = field(default_factory=list)

    def add(self, kind: SpanKind, end: float, steps: int = 0, tokens: int | None = 0) -> None:
        if end > self.at:
            self.spans.append(RequestSpan(self.request, kind, self.at, end, steps, tokens))
            self.at = end

    def take_part(self, piece: StepSlice, number: int) -> None:
        """The request was in this step. The moment between two steps in a row belongs to the second one."""
        if self.finish is not None and self.finish <= piece.start:
            return  # it was aborted while the step was in flight
        if self.last_slice != number - 1:
            self.add("waiting", piece.start)
        end = piece.end if self.finish is None else min(piece.end, self.finish)
        tokens = None if piece.tokens is None else piece.tokens.get(self.request, 0)
        self.add(piece.kinds[self.request], end, 1, tokens)
        self.last_slice = number

    def close(self, end: float) -> list[RequestSpan]:
        end = end if self.finish is None else self.finish
        if not self.spans and self.first_token is not None:
            self.add("waiting", self.first_token)
            self.add("decode", end, 0, None)
        self.add("waiting", end)
        return self.spans


def request_spans(run: Run) -> dict[str, list[RequestSpan]]:
    """Spans of every request in order of arrival: disjoint, in order, and without gaps from its arrival to its finish
    (or to the end of the run). One span a step; see `merge_spans`. A request without duration has none."""
    lives: dict[str, _Life] = {}
    steps = StepFold()
    for event in run.log_events:
        pieces = steps.write(event)
        for number, piece in enumerate(pieces, len(steps.slices) - len(pieces) + 1):
            for name in piece.kinds:
                if name in lives:
                    lives[name].take_part(piece, number)
        if isinstance(event, ev.RequestArrived):
            begin = min(event.spec.arrival, event.t)  # aborted before its arrival: it never waited
            lives[event.spec.id] = _Life(event.spec.id, begin, begin)
        elif isinstance(event, ev.FirstToken):
            lives[event.request or ""].first_token = event.t
        elif isinstance(event, ev.RequestFinished):
            lives[event.request or ""].finish = event.t
    end = run.log_events[-1].t
    lives = dict(sorted(lives.items(), key=lambda entry: entry[1].begin))
    return {name: life.close(end) for name, life in lives.items()}


def merge_spans(spans: Iterable[RequestSpan]) -> list[RequestSpan]:
    """The same time with fewer spans: neighbours of one request and kind that touch become one."""
    merged: list[RequestSpan] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is None or (last.request, last.kind, last.end) != (span.request, span.kind, span.start):
            merged.append(span)
            continue
        tokens = None if last.tokens is None or span.tokens is None else last.tokens + span.tokens
        merged[-1] = RequestSpan(span.request, span.kind, last.start, span.end, last.steps + span.steps, tokens)
    return merged


def output_tokens(run: Run) -> dict[str, int]:
    """Output tokens of each request, also from level 0 logs, which have only the totals."""
    counts = {name: request.num_output_tokens for name, request in run.requests.items()}
    for event in run.log_events:
        if isinstance(event, ev.RequestFinished):
            counts[event.request or ""] = event.num_output_tokens
    return counts


# ---------------------------------------------------------------------------------------- Perfetto
_ENGINE, _REQUESTS, _RESOURCES = 1, 2, 3  # process ids; on the screen the resources stand between the other two
# Thread ids. None equals a process id: Perfetto takes such a thread for the main one and moves it to the top.
_STEPS, _DECISIONS, _FIRST_RESOURCE, _FIRST_REQUEST = 11, 12, 21, 101
_RESOURCE_ORDER = ("device", "cpu", "h2d", "d2h", "disk", "net")


def perfetto_trace(run: Run) -> dict[str, Any]:
    """The run as a Chrome trace: a plain dict for JSON. Times are integer microseconds of the run's clock.

    Process "engine": a track of steps, a track of decisions, counters kv_used, running, waiting. Process "resources" (of
    level 4 logs): a track each with its ops, and an instant where it had to wait. Process "requests": a track each, the
    request as one slice with its waiting / prefill / decode nested inside, preemptions as instants.
    """
    started = run.started
    about = {"mode": started.mode, "model": str(started.model.get("name", "?")), "seed": started.seed,
             "hardware": str(started.hardware.get("name", "?")), "log_level": started.level, "llmlab": started.code}  # fmt: skip
    events = [*_names(run), *_steps(run), *_decisions(run), *_resources(run), *_requests(run)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def write_perfetto(run: Run, path: str | Path) -> Path:
    """Write `perfetto_trace` to `path` (a name ending in .gz is compressed; Perfetto reads both). Raises TraceError."""
    path = Path(path)
    data = msgspec.json.encode(perfetto_trace(run))
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise TraceError("path", str(path), f"cannot be written ({error.strerror or error})",
                         "Give a path in a directory that exists and that you may write.") from None  # fmt: skip
    return path


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _slice(pid: int, tid: int, name: str, start: float, end: float, **args: Any) -> dict[str, Any]:
    """A complete event. Both ends are rounded, not the duration: what touches still touches, what nests still nests."""
    ts = _us(start)
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": _us(end) - ts, "args": args}


def _instant(pid: int, tid: int, name: str, t: float, **args: Any) -> dict[str, Any]:
    return {"ph": "i", "s": "t", "pid": pid, "tid": tid, "name": name, "ts": _us(t), "args": args}


def _counter(name: str, t: float, value: int) -> dict[str, Any]:
    return {"ph": "C", "pid": _ENGINE, "tid": 0, "name": name, "ts": _us(t), "args": {"value": value}}


def _named(pid: int, tid: int, what: str, name: str, order: int) -> Iterator[dict[str, Any]]:
    """Name of a process or of a track, and its place on the screen."""
    yield {"ph": "M", "pid": pid, "tid": tid, "name": f"{what}_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": tid, "name": f"{what}_sort_index", "args": {"sort_index": order}}


def _names(run: Run) -> Iterator[dict[str, Any]]:
    """Names of the engine's and the requests' processes and tracks."""
    yield from _named(_ENGINE, 0, "process", f"engine ({run.mode})", 0)
    yield from _named(_ENGINE, _STEPS, "thread", "steps", 0)
    yield from _named(_ENGINE, _DECISIONS, "thread", "decisions", 1)
    yield from _named(_REQUESTS, 0, "process", "requests", 2)
    outputs = output_tokens(run)
    for number, (name, request) in enumerate(run.requests.items(), _FIRST_REQUEST):
        label = f"{name} ({request.num_prompt_tokens} -> {outputs[name]})"
        yield from _named(_REQUESTS, number, "thread", label, number)


def _steps(run: Run) -> Iterator[dict[str, Any]]:
    for piece in step_slices(run):
        args: dict[str, Any] = {"step": piece.step, "tokens": piece.num_tokens, "requests": len(piece.kinds)}
        if piece.prefill_tokens is not None:
            args |= {"prefill_tokens": piece.prefill_tokens, "decode_tokens": piece.decode_tokens}
        if piece.predicted is not None:
            args |= {"predicted_us": round(piece.predicted * 1e6, 1)}
        args |= {f"{run.mode}_us": round(piece.measured * 1e6, 1)}
        yield _slice(_ENGINE, _STEPS, f"{piece.num_tokens} tokens", piece.start, piece.end, **args)
        for name, during, after in (
            ("kv_used", piece.planned_blocks, piece.used_blocks), ("running", piece.planned_running, piece.num_running),
            ("waiting", piece.planned_waiting, piece.num_waiting),
        ):  # fmt: skip
            if during is not None:
                yield _counter(name, piece.start, during)
            yield _counter(name, piece.end, after)


def _decisions(run: Run) -> Iterator[dict[str, Any]]:
    for event in run.events(ev.Decision):
        args = {"policy": event.policy, "chosen": event.chosen, "reason": event.reason, "seq": event.seq,
                "candidates": event.num_candidates}  # fmt: skip
        if event.predicted is not None:
            args["predicted_us"] = round(event.predicted.seconds * 1e6, 1)
        if event.alternatives:
            args["instead"] = [_option(a) for a in event.alternatives]
        yield _instant(_ENGINE, _DECISIONS, f"{event.seam}: {event.chosen}"[:80], event.t, **args)


def _option(option: ev.Alternative) -> str:
    notes = [option.why_not] if option.why_not else []
    if option.score is not None:
        notes.append(f"score {option.score}")
    if option.predicted is not None:
        notes.append(f"predicted {option.predicted.seconds * 1e6:.1f} us")
    return option.option + (f" ({'; '.join(notes)})" if notes else "")


def _resources(run: Run) -> Iterator[dict[str, Any]]:
    """What each resource did. What runs at once on one resource (a second copy, a second worker) gets a track of its own."""
    spans, gaps = run.events(ev.Span), run.events(ev.Idle, ev.JoinWait)
    names = sorted({event.resource for event in (*spans, *gaps) if not isinstance(event, ev.JoinWait)}, key=_resource_place)
    if names:
        yield from _named(_RESOURCES, 0, "process", f"resources ({run.mode})", 1)
    track, first = _FIRST_RESOURCE, dict.fromkeys(names, 0)
    for name in names:
        first[name] = track
        for number, lane in enumerate(_lanes(span for span in spans if span.resource == name)):
            yield from _named(_RESOURCES, track, "thread", f"{name} ({number + 1})" if number else name, track)
            for span in lane:
                about = {"request": span.request} if span.request else {}
                yield _slice(_RESOURCES, track, span.op, span.start, span.end, us=round((span.end - span.start) * 1e6, 3), **about)
            track += 1
    for gap in gaps:
        name, why = ("device", f"waits for {gap.op} (cpu)") if isinstance(gap, ev.JoinWait) else (gap.resource, gap.why)
        yield _instant(_RESOURCES, first.get(name, _FIRST_RESOURCE), why, gap.start, us=round((gap.end - gap.start) * 1e6, 3))


def _resource_place(name: str) -> tuple[int, str]:
    return (_RESOURCE_ORDER.index(name) if name in _RESOURCE_ORDER else len(_RESOURCE_ORDER), name)


def _lanes(spans: Iterable[ev.Span]) -> list[list[ev.Span]]:
    """As few rows as hold all spans side by side, each in the order of time."""
    lanes: list[list[ev.Span]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        free = next((lane for lane in lanes if lane[-1].end <= span.start), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _requests(run: Run) -> Iterator[dict[str, Any]]:
    spans, outputs = request_spans(run), output_tokens(run)
    for number, (name, metrics) in enumerate(run.requests.items(), _FIRST_REQUEST):
        if spans[name]:
            facts = {"finish_reason": metrics.finish_reason or "unfinished", "ttft_us": metrics.ttft and _us(metrics.ttft),
                     "prompt_tokens": metrics.num_prompt_tokens, "output_tokens": outputs[name],
                     "cached_tokens": metrics.num_cached_tokens, "preemptions": metrics.num_preemptions}  # fmt: skip
            yield _slice(_REQUESTS, number, name, spans[name][0].start, spans[name][-1].end, **facts)
        for span in merge_spans(spans[name]):
            args = {} if span.kind == "waiting" else {"steps": span.steps, "tokens": span.tokens}
            yield _slice(_REQUESTS, number, span.kind, span.start, span.end, **args)
    numbers = {name: number for number, name in enumerate(run.requests, _FIRST_REQUEST)}
    for event in run.events(ev.RequestPreempted):
        yield _instant(_REQUESTS, numbers[event.request], f"preempted for {event.beneficiary}" if event.beneficiary else "lost with the device", event.t, mode=event.mode,
                       tokens_lost=event.tokens_lost, blocks=event.num_blocks)  # fmt: skip
