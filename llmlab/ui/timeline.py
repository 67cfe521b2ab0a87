"""Who runs when: the timeline of requests, and two of them racing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmlab.events.export import RequestSpan, merge_spans, output_tokens, request_spans
from llmlab.events.metrics import Summary
from llmlab.ui.chart import WIDTH, Unit, count, data, percent, seconds, sentence, setting, title, unit_for
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

MAX_ROWS = 60


class Rows(NamedTuple):
    """The requests that a timeline shows, in order of arrival, and all that is drawn of them."""

    run: Run
    names: list[str]
    spans: dict[str, list[RequestSpan]]
    outputs: dict[str, int]
    start: float
    end: float

    @property
    def step(self) -> float:
        """Height of one row in pixels."""
        n = len(self.names)
        return 22 if n <= 24 else 15 if n <= 40 else 11


def request_timeline(run: Run, max_rows: int = MAX_ROWS) -> Any:
    """Who runs when, who waits: one row a request. Thin grey: waiting; thick: prefill and decode; triangle: arrival;
    cross: preemption; label: prompt -> output tokens. With more than `max_rows` requests, those that arrived around the
    one with the latest first token. Needs log level 1; at level 0 only the first token is known."""
    if not run.requests:
        return sentence("No request arrived in this run", "There is nothing to show on a timeline.", setting(run))
    rows = _rows(run, max_rows)
    unit, c = unit_for(rows.end - rows.start), roles()
    layers = [*_bars(rows, unit, c), _arrivals(rows, unit, c), *_preemptions(rows, unit, c), _labels(rows, unit)]
    worst = _latest(run)
    if worst is not None and worst.request in rows.names:
        layers += _callout(rows, unit, worst)
    import altair as alt

    return alt.layer(*layers).properties(
        width=WIDTH, height=len(rows.names) * rows.step,
        title=title(_timeline_finding(run, rows, worst), setting(run), *_timeline_notes(run, rows)),
    )  # fmt: skip


def _rows(run: Run, max_rows: int) -> Rows:
    spans = {name: merge_spans(own) for name, own in request_spans(run).items()}
    names = list(spans)
    if len(names) > max_rows:
        worst = _latest(run)
        middle = names.index(worst.request) if worst is not None else 0
        first = min(max(0, middle - max_rows // 2), len(names) - max_rows)
        names = names[first : first + max_rows]
    shown = [span for name in names for span in spans[name]] or [span for own in spans.values() for span in own]
    start = min((s.start for s in shown), default=0.0)
    return Rows(run, names, spans, output_tokens(run), start, max((s.end for s in shown), default=start + 1e-6))


class _Latest(NamedTuple):
    """The request whose first token came last, counted from its arrival (seconds)."""

    request: str
    ttft: float


def _latest(run: Run) -> _Latest | None:
    """Read from the first tokens, which every log level has."""
    late = [_Latest(e.request, e.t - run.requests[e.request].arrival) for e in run.events("FirstToken")]
    return max(late, key=lambda one: one.ttft) if late else None


# ----------------------------------------------------------------------------------------- words
def _timeline_finding(run: Run, rows: Rows, worst: _Latest | None) -> str:
    spans = [span for own in rows.spans.values() for span in own]
    total = sum(span.seconds for span in spans)
    waiting = sum(span.seconds for span in spans if span.kind == "waiting")
    if worst is None:
        return f"Who runs when: none of {count(len(run.requests), 'request')} got a token"
    late = f"{worst.request} waits longest for its first token, {seconds(worst.ttft)}"
    if run.started.level < 1 or not total:
        return f"Who runs when: {late}"
    return f"Who runs when: requests spend {percent(waiting / total)} of their time waiting; {late}"


def _timeline_notes(run: Run, rows: Rows) -> list[str]:
    config = run.started.config
    notes = [f"{config.get('num_blocks', '?')} KV blocks, order {config.get('ordering', '?')}"]
    if run.started.level < 1:
        notes.append("Log level 0 keeps no steps: grey reaches to the first token; log_level=1 tells waiting from prefill")
    preemptions = run.metrics.num_preemptions
    notes.append("Triangle: arrival" + (f". Cross: preemption ({preemptions} in all)" if preemptions else "")
                 + ". Label: prompt → output tokens")  # fmt: skip
    if len(rows.names) < len(run.requests):
        notes.append(f"Shown are {len(rows.names)} of {len(run.requests)} requests, around the one that waits longest")
    return notes


# ---------------------------------------------------------------------------------------- layers
def _y(rows: Rows, labels: bool = True) -> Any:
    import altair as alt

    axis = alt.Axis(labelLimit=120, grid=False, labelFontSize=11 if rows.step >= 15 else 9) if labels else None
    return alt.Y("request:N", title=None, axis=axis, scale=alt.Scale(domain=rows.names, paddingInner=0.28))


def _x(rows: Rows, unit: Unit, end: float | None = None, named: bool = True) -> Any:
    """Time, with room on the right for the labels."""
    import altair as alt

    length = rows.end - rows.start
    end = rows.end + 0.1 * length if end is None else end
    start = (rows.start if rows.start > 0.1 * rows.end else min(0.0, rows.start)) - 0.012 * length
    scale = alt.Scale(domain=[start * unit.per_second, end * unit.per_second], nice=False, zero=False)
    name = f"time ({unit.name})" if named else None
    return alt.X("t0:Q", title=name, scale=scale, axis=alt.Axis(tickCount=10, format="~r"))


def _colour(run: Run, c: Roles) -> Any:
    import altair as alt

    phases = {k: v for k, v in c.phases.items() if run.started.level > 0 or k != "prefill"}
    return alt.Color("kind:N", title=None, scale=alt.Scale(domain=list(phases), range=list(phases.values())))


def _bars(rows: Rows, unit: Unit, c: Roles, end: float | None = None, labels: bool = True, named: bool = True) -> list[Any]:
    """Thin bars of waiting under thick bars of work."""
    import altair as alt

    work = [_bar(span, unit) for name in rows.names for span in rows.spans[name] if span.kind != "waiting"]
    wait = [_bar(span, unit) for name in rows.names for span in rows.spans[name] if span.kind == "waiting"]
    both = {"x": _x(rows, unit, end, named), "x2": "t1:Q", "y": _y(rows, labels), "color": _colour(rows.run, c)}
    told = [alt.Tooltip(f, title=t) for f, t in (("request:N", "request"), ("kind:N", "doing"), ("lasts:N", "for"),
                                                 ("detail:N", "in"))]  # fmt: skip
    thin = alt.Chart(data(wait)).mark_bar(size=3 if rows.step > 12 else 2).encode(**both, tooltip=told[:3])
    thick = alt.Chart(data(work)).mark_bar(cornerRadius=1.5).encode(**both, tooltip=told)
    return [thin, thick]


def _bar(span: RequestSpan, unit: Unit) -> dict[str, Any]:
    row = {"request": span.request, "kind": span.kind, "t0": span.start * unit.per_second,
           "t1": span.end * unit.per_second, "lasts": seconds(span.seconds)}  # fmt: skip
    if span.kind != "waiting":
        tokens = f", {count(span.tokens, 'token')}" if span.tokens is not None else ""
        row["detail"] = count(span.steps, "step") + tokens
    return row


def _arrivals(rows: Rows, unit: Unit, c: Roles, labels: bool = True) -> Any:
    import altair as alt

    points = [{"request": n, "t0": rows.run.requests[n].arrival * unit.per_second} for n in rows.names]
    size = 45 if rows.step > 12 else 22
    mark = alt.Chart(data(points)).mark_point(shape="triangle-right", filled=True, size=size, opacity=1, color=c.ink)
    return mark.encode(x="t0:Q", y=_y(rows, labels))


def _preemptions(rows: Rows, unit: Unit, c: Roles, labels: bool = True) -> list[Any]:
    import altair as alt

    events = [e for e in rows.run.events("RequestPreempted") if e.request in rows.names]
    points = [{"request": e.request, "t0": e.t * unit.per_second, "mode": e.mode, "for": e.beneficiary or "nobody",
               "lost": e.tokens_lost} for e in events]  # fmt: skip
    if not points:
        return []
    cross = alt.Chart(data(points)).mark_text(text="×", fontSize=16, fontWeight="bold", color=c.preempted, baseline="middle")
    told = [alt.Tooltip("request:N", title="preempted"), alt.Tooltip("for:N", title="to make room for"),
            alt.Tooltip("mode:N", title="mode"), alt.Tooltip("lost:Q", title="computed tokens dropped")]  # fmt: skip
    return [cross.encode(x="t0:Q", y=_y(rows, labels), tooltip=told)]


def _labels(rows: Rows, unit: Unit) -> Any:
    import altair as alt

    points = [{"request": n, "t0": (rows.spans[n][-1].end if rows.spans[n] else rows.run.requests[n].arrival) * unit.per_second,
               "label": _label(rows, n)} for n in rows.names]  # fmt: skip
    size = 10.5 if rows.step >= 15 else 8.5
    return alt.Chart(data(points)).mark_text(style="note", align="left", dx=6, fontSize=size).encode(
        x="t0:Q", y=_y(rows), text="label:N")  # fmt: skip


def _label(rows: Rows, name: str) -> str:
    request = rows.run.requests[name]
    end = {"": " ...", "abort": " aborted", "error": " failed"}.get(request.finish_reason, "")
    return f"{request.num_prompt_tokens} → {rows.outputs[name]}{end}"


def _callout(rows: Rows, unit: Unit, worst: _Latest) -> list[Any]:
    """The latest first token, said beside its row if there is room on the left or on the right."""
    import altair as alt

    length, spans = rows.end - rows.start, rows.spans[worst.request]
    if not spans or not length:
        return []
    left = (spans[0].start - rows.start) / length > 0.36
    if not left and (rows.end - spans[-1].end) / length < 0.42:
        return []
    point = {"request": worst.request, "t0": (spans[0].start if left else spans[-1].end) * unit.per_second,
             "label": f"{worst.request} waits {seconds(worst.ttft)} for its first token"}  # fmt: skip
    align: Literal["left", "right"] = "right" if left else "left"
    text = alt.Chart(data([point])).mark_text(style="strong", align=align, dx=-10 if left else 78)
    return [text.encode(x="t0:Q", y=_y(rows), text="label:N")]


# ------------------------------------------------------------------------------------------ race
def policy_race(run_a: Run, run_b: Run, names: tuple[str, str] | None = None, max_rows: int = 40) -> Any:
    """The same requests under two policies: two timelines on one axis, rows in the same order. `names` of the two;
    by default what differs in their configuration."""
    import altair as alt

    shared = [name for name in run_a.requests if name in run_b.requests]
    if not shared:
        return sentence("No race: the two runs share no request", "A race needs the same request ids in both runs.",
                        setting(run_a))  # fmt: skip
    labels = names or _difference(run_a, run_b)
    rows = [_race_rows(run, shared[:max_rows]) for run in (run_a, run_b)]
    start, end = min(r.start for r in rows), max(r.end for r in rows)
    rows = [r._replace(start=start, end=end) for r in rows]
    unit, c = unit_for(end - start), roles()
    headings = [_race_heading(run, shared, name) for run, name in zip((run_a, run_b), labels)]
    lanes = [_lane(r, unit, c, heading, end + 0.01 * (end - start), last) for r, heading, last in
             zip(rows, headings, (False, True))]  # fmt: skip
    finding = _race_finding(run_a, run_b, shared, *labels)
    notes = [setting(run_a), f"The same {count(len(shared), 'request')} in the same order; grey is waiting, a cross a preemption"]
    if len(shared) > max_rows:
        notes.append(f"Shown are the first {max_rows}; times are those of all")
    notes.append("One load only: repeat with other seeds before believing it")
    return alt.vconcat(*lanes, spacing=22).resolve_scale(x="shared", color="shared").properties(title=title(finding, *notes))


def _race_rows(run: Run, names: Sequence[str]) -> Rows:
    spans = {name: merge_spans(own) for name, own in request_spans(run).items()}
    every = [span for name in names for span in spans[name]]
    start = min((s.start for s in every), default=0.0)
    return Rows(run, list(names), spans, {}, start, max((s.end for s in every), default=start + 1e-6))


def _race_heading(run: Run, names: Sequence[str], label: str) -> str:
    """Of all requests, drawn or not, as the finding is."""
    ttft = Summary.of(run.requests[n].ttft for n in names)
    return label if ttft.mean is None else f"{label}: mean TTFT {seconds(ttft.mean)}, p90 {seconds(ttft.p90 or 0.0)}"


def _lane(rows: Rows, unit: Unit, c: Roles, heading: str, end: float, named: bool) -> Any:
    import altair as alt

    visible = len(rows.names) <= 24
    layers = [*_bars(rows, unit, c, end, visible, named), _arrivals(rows, unit, c, visible), *_preemptions(rows, unit, c, visible)]
    step = min(rows.step, 15)
    return alt.layer(*layers).properties(width=WIDTH, height=len(rows.names) * step,
                                         title=alt.Title(heading, fontSize=13, offset=6))  # fmt: skip


def _difference(run_a: Run, run_b: Run) -> tuple[str, str]:
    """What the configurations of the two differ in, as two names."""
    a, b = run_a.started.config, run_b.started.config
    skip = ("trace", "log_level", "log_capacity", "seed", "check_interval")
    keys = [k for k in a if a[k] != b.get(k) and k not in skip]
    return (_named(keys, a), _named(keys, b)) if keys else ("first run", "second run")


def _named(keys: Sequence[str], config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {config.get(key)}" for key in keys[:3])


def _race_finding(run_a: Run, run_b: Run, shared: Sequence[str], label_a: str, label_b: str) -> str:
    mean_a, mean_b = (Summary.of(run.requests[n].ttft for n in shared).mean for run in (run_a, run_b))
    if not mean_a or mean_b is None:
        return f"Policy race: {label_a} against {label_b}"
    change = mean_b / mean_a - 1
    if abs(change) < 0.005:
        return f"Policy race: the mean time to first token is the same, {label_a} or {label_b}"
    verb = "cuts" if change < 0 else "lengthens"
    return f"Policy race: {label_b} {verb} the mean time to first token by {percent(abs(change))} against {label_a}"
