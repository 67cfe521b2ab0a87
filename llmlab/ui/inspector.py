"""Reading decisions: one as a card with its alternatives, and all of them behind a brush on the timeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.events import catalog as ev
from llmlab.events.export import merge_spans, request_spans, step_slices
from llmlab.types import TraceError
from llmlab.ui.chart import WIDTH, Unit, count, data, seconds, sentence, setting, title, unit_for
from llmlab.ui.notes import Note, Notes
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

MAX_ROWS = 40
LINES = 14  # sentences shown for the brushed window
_ROW = 13
FORKED = {"victim": "InsteadVictim", "tiering": "InsteadTiering"}  # seams whose options are choices of a plug-in


# ------------------------------------------------------------------------------------------ card
class Choice(NamedTuple):
    """One option of a decision. `cost`: predicted seconds."""

    option: str
    chosen: bool
    cost: float | None
    score: str
    feasible: bool
    why_not: str


def choices(run: Run, decision: ev.Decision) -> list[Choice]:
    """What was chosen, then the alternatives in the order in which they were logged. What a composer chose costs what was
    predicted for the step."""
    predicted = decision.predicted
    if predicted is None and decision.seam == "composer":
        plans = run.events(ev.StepPlanned, step=decision.step)
        predicted = plans[0].predicted if plans else None
    cost = predicted.seconds if predicted is not None else None
    others = [Choice(a.option, False, a.predicted.seconds if a.predicted is not None else None,
                     "" if a.score is None else f"{a.score:.4g}" if isinstance(a.score, float) else str(a.score), a.feasible, a.why_not)
              for a in decision.alternatives]  # fmt: skip
    return [Choice(decision.chosen, True, cost, "", True, decision.reason), *others]


def decision_of(run: Run, seq: int) -> ev.Decision:
    """The decision with this `seq`. Raises TraceError if that event is none."""
    event = run.event(seq)
    if not isinstance(event, ev.Decision):
        raise TraceError("seq", seq, f"is a {type(event).__name__}, not a Decision", 'run.events("Decision") lists them.')
    return event


def decision_card(run: Run, seq: int) -> Any:
    """One decision: what was chosen and what else there was, each with its predicted cost. `fork_call` prints how to try
    another option. Raises TraceError for an event that is no decision."""
    import altair as alt

    decision, c = decision_of(run, seq), roles()
    options = choices(run, decision)
    unit = unit_for(max((o.cost for o in options if o.cost is not None), default=0.0))
    rows: list[dict[str, Any]] = [
            {"option": o.option[:60], "cost": (o.cost or 0.0) * unit.per_second, "kind": "chosen" if o.chosen else "instead" if o.feasible else "not possible",
             "label": _label(o)} for o in options]  # fmt: skip
    y = alt.Y("option:N", title=None, sort=[r["option"] for r in rows], axis=alt.Axis(grid=False, labelLimit=330, labelFontSize=12.5))
    most = max((r["cost"] for r in rows), default=0.0)
    x = alt.X("cost:Q", title=f"predicted cost ({unit.name})" if most else None, scale=alt.Scale(domain=[0, 1.9 * most or 1.0], nice=False),
              axis=alt.Axis(tickCount=6) if most else None)  # fmt: skip
    colours = {"chosen": c.decode, "instead": c.waiting, "not possible": c.grid}
    kinds = [k for k in colours if any(r["kind"] == k for r in rows)]
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds, range=[colours[k] for k in kinds]))
    base = alt.Chart(data(rows)).encode(x=x, y=y)
    words = base.mark_text(align="left", dx=7).encode(text="label:N")
    notes = [f"Step {decision.step} at {seconds(decision.t)}" + (f", for {decision.request}" if decision.request else ""), decision.reason, setting(run)]
    return alt.layer(base.mark_bar(size=18, cornerRadius=2).encode(color=colour), words).properties(
        width=WIDTH - 200, height=34 * len(rows), title=title(card_finding(run, decision), *notes))  # fmt: skip


def _label(o: Choice) -> str:
    parts = [seconds(o.cost)] if o.cost is not None else [f"score {o.score}"] if o.score else []
    if not o.feasible:
        parts.append("not possible")
    if o.why_not and not o.chosen:
        parts.append(o.why_not)
    return ", ".join(parts)


def card_finding(run: Run, decision: ev.Decision) -> str:
    """The sentence above the card."""
    said = f"The {decision.seam} policy {decision.policy} chose {decision.chosen[:60]}"
    priced = [o for o in choices(run, decision) if o.cost is not None and o.feasible]
    mine = next((o.cost for o in priced if o.chosen), None)
    others = [o for o in priced if not o.chosen]
    if mine is None or not others:
        return f"{said} out of {count(max(decision.num_candidates, 1 + len(decision.alternatives)), 'option')}"
    best = min(others, key=lambda o: o.cost or 0.0)
    cost = best.cost or 0.0
    if cost < mine:
        return f"{said} for {seconds(mine)}; {best.option[:40]} was predicted to cost less, {seconds(cost)}"
    return f"{said} for {seconds(mine)}; the next best, {best.option[:40]}, was predicted to cost {seconds(cost)}"


class Forced(NamedTuple):
    """One option to be taken instead: the run is forked after step `at`, and in step `step`, on behalf of the request
    `asker`, the plug-in `plugin` of `llmlab.instead` answers `option`; otherwise `policy` decides."""

    at: int
    seam: str
    plugin: str
    option: str
    step: int
    asker: str | None
    policy: str


def fork_call(run: Run, seq: int, option: str) -> str:
    """The two lines that fork the run right before this decision and take `option` instead, once. Raises as `forced`."""
    f = forced(run, seq, option)
    return (f"from llmlab.instead import {f.plugin}\n"
            f"run.fork(at={f.at}, {f.seam}={f.plugin}({f.option!r}, {f.step}, {f.asker!r}, policy={f.policy!r}))")  # fmt: skip


def forced(run: Run, seq: int, option: str) -> Forced:
    """How to take `option` in this decision. Raises TraceError if the decision has no such option, or none of a kind that
    a fork can force (victims and tiers)."""
    decision = decision_of(run, seq)
    if decision.seam not in FORKED:
        raise TraceError("seq", seq, f"is a decision of the seam {decision.seam}", f"A fork can force {' and '.join(FORKED)}; "
                         f"for others fork under another policy: run.fork(at=..., {decision.seam}=...).")  # fmt: skip
    known = [o.option for o in choices(run, decision) if not o.chosen and o.feasible]
    if option not in known:
        raise TraceError("option", option, "is not an alternative of this decision", f"There were {', '.join(known) or 'none'}.")
    done = [e.step for e in run.log_events if isinstance(e, ev.StepFinished) and e.seq < seq]
    if not done:
        raise TraceError("seq", seq, "comes before the first finished step", "A fork begins after a step; choose a later decision.")
    name, who = FORKED[decision.seam], _asker(run, decision)
    before = [e for e in run.events(ev.Decision, step=decision.step) if e.seam == decision.seam and e.seq < seq]
    if any(_asker(run, e) == who for e in before):
        raise TraceError("seq", seq, f"is not the first decision of its step on {who}", f"Fork at {before[0].seq}.")
    return Forced(done[-1], decision.seam, name, option, decision.step, who, decision.policy)


def _asker(run: Run, decision: ev.Decision) -> str | None:
    """On whose behalf it was decided: the request that needed blocks, or, for a tier, the one that lost them."""
    cause = run.event(decision.cause) if decision.seam == "victim" and decision.cause >= 0 else decision
    return cause.request


# ------------------------------------------------------------------------------------- inspector
def event_inspector(run: Run, max_rows: int = MAX_ROWS) -> Any:
    """Drag a window over the timeline: below are the sentences on what was decided in it, and its batches and memory.
    Click a bar to follow one request. Needs log level 1; sentences on decisions from level 2 on."""
    spans = {name: merge_spans(own) for name, own in request_spans(run).items()}
    slices = [s for s in step_slices(run) if s.num_tokens]
    if not slices:
        why = "Steps are recorded from log_level=1 on." if run.started.level < 1 else "No step was computed in this run."
        return sentence("What was decided when: nothing was recorded", why, setting(run))
    import altair as alt

    notes = [note for note in _notes(run) if note.kind != "evict"]
    start, end = _opening(run, slices[0].start, slices[-1].end)
    unit, c = unit_for(slices[-1].end - slices[0].start), roles()
    names = _around(run, list(spans), start, end, max_rows)
    brush = alt.selection_interval(name="window", encodings=["x"], value={"x": [start * unit.per_second, end * unit.per_second]},
                                   mark=alt.BrushConfig(fill=c.mute, fillOpacity=0.18, stroke="transparent"))  # fmt: skip
    follow = alt.selection_point(name="follow", fields=["request"], on="click", empty=True)
    bars = [{"request": n, "kind": s.kind, "t0": s.start * unit.per_second, "t1": s.end * unit.per_second, "lasts": seconds(s.seconds)}
            for n in names for s in spans[n]]  # fmt: skip
    above = _timeline(bars, names, unit, c, (slices[0].start, slices[-1].end)).add_params(brush, follow)
    below = alt.hconcat(_sentences(notes, brush, follow, unit, c), alt.vconcat(_batches(slices, brush, unit, c), _memory(run, slices, brush, unit, c)), spacing=36)
    kinds = sum(1 for n in notes if n.options)
    said = f"What was decided when: {count(len(notes), 'sentence')} on {count(len(slices), 'step')}, {kinds} with alternatives"
    words = [setting(run), "Drag a window over the timeline; click a bar to follow one request",
             f"Shown are {len(names)} of {len(spans)} requests" if len(names) < len(spans) else ""]  # fmt: skip
    return alt.vconcat(above, below, spacing=24).resolve_scale(color="independent", x="independent", y="independent").properties(
        title=title(said, *words))  # fmt: skip


def _notes(run: Run) -> Iterator[Note]:
    fold = Notes()
    for event in run.log_events:
        yield from fold.write(event)


def _opening(run: Run, start: float, end: float) -> tuple[float, float]:
    """The window that is brushed at first: around the first preemption, or the middle of the run."""
    first = next((e.t for e in run.log_events if isinstance(e, ev.RequestPreempted)), (start + end) / 2)
    half = (end - start) * 0.05
    return max(start, first - half), min(end, first + half)


def _around(run: Run, names: list[str], start: float, end: float, most: int) -> list[str]:
    """At most `most` requests in order of arrival, around those that live in the window."""
    if len(names) <= most:
        return names
    inside = [i for i, n in enumerate(names) if run.requests[n].arrival <= end and (run.requests[n].finished or end) >= start]
    first = min(max(0, (inside[len(inside) // 2] if inside else 0) - most // 2), len(names) - most)
    return names[first : first + most]


def _x(unit: Unit, name: bool = True, scale: Any = None) -> Any:
    import altair as alt

    scale = alt.Scale(zero=False, nice=False) if scale is None else scale
    return alt.X("t0:Q", title=f"time ({unit.name})" if name else None, axis=alt.Axis(format="~r", tickCount=8 if name else 4), scale=scale)


def _timeline(bars: Sequence[Any], names: Sequence[str], unit: Unit, c: Roles, whole: tuple[float, float]) -> Any:
    import altair as alt

    scale = alt.Scale(domain=[whole[0] * unit.per_second, whole[1] * unit.per_second], nice=False, zero=False)
    y = alt.Y("request:N", title=None, axis=alt.Axis(grid=False, labelFontSize=10), scale=alt.Scale(domain=list(names), paddingInner=0.3))
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=list(c.phases), range=list(c.phases.values())))
    size = alt.Size("kind:N", legend=None, scale=alt.Scale(domain=list(c.phases), range=[3, _ROW * 0.7, _ROW * 0.7]))
    told = [alt.Tooltip("request:N"), alt.Tooltip("kind:N", title="doing"), alt.Tooltip("lasts:N", title="for")]
    faint = alt.condition("!length(data('follow_store')) || indata('follow_store', 'values.0', datum.request)", alt.value(1.0), alt.value(0.3))
    return alt.Chart(data(bars)).mark_bar().encode(x=_x(unit, scale=scale), x2="t1:Q", y=y, color=colour, size=size, tooltip=told,
                                                   opacity=faint).properties(width=WIDTH, height=_ROW * len(names))  # fmt: skip


def _sentences(notes: Sequence[Note], brush: Any, follow: Any, unit: Unit, c: Roles) -> Any:
    """The first sentences of the window, one a line."""
    import altair as alt

    rows = [{"t0": n.t * unit.per_second, "i": i, "when": seconds(n.t), "request": n.request or "", "kind": n.kind, "text": n.text[:72]}
            for i, n in enumerate(notes)]  # fmt: skip
    base = alt.Chart(data(rows)).transform_filter(brush).transform_filter(follow).transform_window(
        line="row_number()", sort=[alt.SortField("i")]).transform_filter(alt.datum.line <= LINES)  # fmt: skip
    y = alt.Y("line:O", axis=None, scale=alt.Scale(domain=list(range(1, LINES + 1))))
    loud = alt.condition("indexof(['preempt','victim','full','failed'], datum.kind) >= 0", alt.value(c.preempted), alt.value(c.ink))
    columns: list[tuple[int, str, dict[str, Any], Any]] = [(0, "when", {"style": "note"}, None), (66, "request", {}, None), (108, "kind", {"fontWeight": "bold"}, loud), (166, "text", {"style": "note"}, None)]  # fmt: skip
    layers = []
    for x, field, look, colour in columns:
        mark = base.mark_text(align="left", limit=330, **look).encode(x=alt.value(x), y=y, text=f"{field}:N")
        layers.append(mark if colour is None else mark.encode(color=colour))
    return alt.layer(*layers).properties(width=490, height=LINES * 19, title=alt.Title("Said in the window", fontSize=13, offset=6))


def _batches(slices: Sequence[Any], brush: Any, unit: Unit, c: Roles) -> Any:
    import altair as alt

    rows = []
    for s in slices:
        decode = s.num_tokens if s.decode_tokens is None else s.decode_tokens
        at = {"t0": s.start * unit.per_second, "t1": s.end * unit.per_second}
        rows.append({**at, "low": 0, "high": decode, "kind": "decode"})
        if s.prefill_tokens:
            rows.append({**at, "low": decode, "high": decode + s.prefill_tokens, "kind": "prefill"})
    colour = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=["prefill", "decode"], range=[c.prefill, c.decode]))
    y = alt.Y("low:Q", title="tokens in a step (square root)", scale=alt.Scale(type="sqrt"), axis=alt.Axis(tickCount=4, grid=True))
    return alt.Chart(data(rows)).mark_rect().encode(x=_x(unit, False), x2="t1:Q", y=y, y2="high:Q", color=colour).transform_filter(
        brush).properties(width=262, height=108)  # fmt: skip


def _memory(run: Run, slices: Sequence[Any], brush: Any, unit: Unit, c: Roles) -> Any:
    import altair as alt

    total = int(run.started.config.get("num_blocks") or 0)
    rows = [{"t0": s.start * unit.per_second, "blocks": s.used_blocks if s.planned_blocks is None else s.planned_blocks} for s in slices]
    y = alt.Y("blocks:Q", title=f"KV blocks in use of {total}" if total else "KV blocks in use", axis=alt.Axis(tickCount=3),
              scale=alt.Scale(domain=[0, total]) if total else alt.Scale())  # fmt: skip
    return alt.Chart(data(rows)).mark_area(interpolate="step-after", color=c.mute, opacity=0.3, line={"color": c.mute, "strokeWidth": 1.2}).encode(
        x=_x(unit), y=y).transform_filter(brush).properties(width=262, height=84)  # fmt: skip
