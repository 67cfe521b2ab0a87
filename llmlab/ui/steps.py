"""What the steps compute: the composition of batches, and how well their time was predicted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.events.export import StepSlice, step_slices
from llmlab.ui.chart import WIDTH, Unit, count, data, log_ticks, percent, sentence, setting, title, unit_for
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

MAX_STEPS = 800  # one rectangle a step up to here, then time bins
NUM_BINS = 240
MAX_DOTS = 2500
_SQUARE = 560
_ABOVE = 24  # pixels of a legend above the title of the y axis


class Bin(NamedTuple):
    """One step, or the time-weighted mean of all that ran in a bin of time. Seconds, tokens, requests; `after`: requests
    running and waiting when its last step was done."""

    start: float
    end: float
    prefill: float
    decode: float
    running: float
    waiting: float
    after: tuple[int, int]

    @property
    def tokens(self) -> float:
        return self.prefill + self.decode


def batch_composition(run: Run) -> Any:
    """What each step computes: prefill on top of decode tokens, under the token budget; below, the requests running and
    waiting. More than 800 steps are averaged in 240 bins of time. Needs log level 2; at level 1 the tokens are not told
    apart; at level 0 a sentence."""
    slices = [s for s in step_slices(run) if s.num_tokens]
    if not slices:
        why = ("Log level 0 keeps no steps. Run with log_level=1 for the size of each step, log_level=2 for what was in it."
               if run.started.level < 1 else "No step was computed in this run.")  # fmt: skip
        return sentence("What each step computes: nothing was recorded", why, setting(run))
    import altair as alt

    bins = binned(slices) if len(slices) > MAX_STEPS else [_bin(s) for s in slices]
    unit, c = unit_for(bins[-1].end - bins[0].start), roles()
    above, below = _tokens_panel(run, bins, unit, c), _requests_panel(bins, unit, c)
    notes = [setting(run), count(len(slices), "step") + (", averaged over time" if len(slices) > MAX_STEPS else "")]
    if run.started.level < 2:
        notes.append("Prefill and decode are told apart from log_level=2 on")
    return alt.vconcat(above, below, spacing=26).resolve_scale(x="shared", color="independent").properties(
        title=title(_batch_finding(run, slices), *notes))  # fmt: skip


def _batch_finding(run: Run, slices: Sequence[StepSlice]) -> str:
    budget = int(run.started.config.get("max_num_batched_tokens") or 0)
    total = sum(s.num_tokens for s in slices)
    mean = total / len(slices)
    idle = f"; {percent(1 - total / (budget * len(slices)))} of the token budget stays unused" if budget else ""
    if slices[0].decode_tokens is None:
        return f"What each step computes: {mean:.1f} tokens on average{idle}"
    decode = sum(s.decode_tokens or 0 for s in slices)
    return f"What each step computes: {mean:.1f} tokens on average, {percent(decode / total)} of them decode{idle}"


# ------------------------------------------------------------------------------------------ bins
def _bin(s: StepSlice) -> Bin:
    """A step as it is. What is not told apart counts as decode and is drawn in grey."""
    decode = s.num_tokens if s.decode_tokens is None else s.decode_tokens
    running = s.num_running if s.planned_running is None else s.planned_running
    waiting = s.num_waiting if s.planned_waiting is None else s.planned_waiting
    return Bin(s.start, s.end, s.prefill_tokens or 0, decode, running, waiting, (s.num_running, s.num_waiting))


def binned(slices: Sequence[StepSlice], num_bins: int = NUM_BINS) -> list[Bin]:
    """Means over equal bins of time, weighted by how long each step lasted in the bin; bins without a step are left
    out. Token-seconds are conserved."""
    start, end = slices[0].start, slices[-1].end
    width = (end - start) / num_bins
    if not width:
        return [_bin(s) for s in slices]
    sums = [[0.0] * 5 for _ in range(num_bins)]
    after = [(0, 0)] * num_bins
    for s in slices:
        one = _bin(s)
        for index in range(max(0, int((s.start - start) / width)), min(num_bins - 1, int((s.end - start) / width)) + 1):
            weight = max(0.0, min(s.end, start + (index + 1) * width) - max(s.start, start + index * width))
            after[index] = one.after if weight else after[index]
            for i, value in enumerate((1.0, one.prefill, one.decode, one.running, one.waiting)):
                sums[index][i] += weight * value
    return [_mean(start + i * width, width, row, after[i]) for i, row in enumerate(sums) if row[0] > 0]


def _mean(start: float, width: float, sums: Sequence[float], after: tuple[int, int]) -> Bin:
    """Tokens over the whole bin, requests over the part of it in which a step ran."""
    busy, prefill, decode, running, waiting = sums
    return Bin(start, start + width, prefill / width, decode / width, running / busy, waiting / busy, after)


# ---------------------------------------------------------------------------------------- panels
def _x(bins: Sequence[Bin], unit: Unit, labels: bool) -> Any:
    import altair as alt

    u = unit.per_second
    scale = alt.Scale(domain=[bins[0].start * u, bins[-1].end * u], nice=False, zero=False)
    axis = alt.Axis(tickCount=10, format="~r", labels=labels, grid=False)
    return alt.X("t0:Q", title=f"time ({unit.name})" if labels else None, scale=scale, axis=axis)


def _tokens_panel(run: Run, bins: Sequence[Bin], unit: Unit, c: Roles) -> Any:
    import altair as alt

    known = run.started.level >= 2
    colours = {"prefill": c.prefill, "decode": c.decode} if known else {"prefill and decode": c.mute}
    rows = _runs_of_equals([row for b in bins for row in _stacked(b, unit, known)], _apart(bins) * unit.per_second)
    budget = int(run.started.config.get("max_num_batched_tokens") or 0)
    most = max(b.tokens for b in bins)
    visible = 0 < budget <= 2.5 * most
    top = budget * 1.04 if visible else most * 1.2
    y = alt.Y("low:Q", title="tokens in a step", scale=alt.Scale(domain=[0, top], nice=False),
              axis=_token_axis(budget if visible else 0))  # fmt: skip
    colour = alt.Color("kind:N", title=None, legend=alt.Legend(offset=_ABOVE), scale=alt.Scale(domain=list(colours), range=list(colours.values())))
    told = [alt.Tooltip("kind:N"), alt.Tooltip("tokens:Q", format=".4~g"), alt.Tooltip("t0:Q", title=f"at ({unit.name})", format=".4~g")]
    bars = alt.Chart(data(rows)).mark_rect().encode(x=_x(bins, unit, False), x2="t1:Q", y=y, y2="high:Q", color=colour, tooltip=told)
    return alt.layer(bars, *_budget(budget, visible, c)).properties(width=WIDTH, height=210)


def _stacked(b: Bin, unit: Unit, known: bool) -> list[dict[str, Any]]:
    """Decode at the bottom, prefill on top of it."""
    at = {"t0": b.start * unit.per_second, "t1": b.end * unit.per_second}
    low = {**at, "kind": "decode" if known else "prefill and decode", "low": 0, "high": b.decode, "tokens": b.decode}
    high = {**at, "kind": "prefill", "low": b.decode, "high": b.tokens, "tokens": b.prefill}
    return [row for row in (low, high) if row["tokens"]]


def _apart(bins: Sequence[Bin]) -> float:
    """From how many seconds on a gap between two steps is a pause and not the scheduler's work: about two pixels."""
    return 2 / WIDTH * (bins[-1].end - bins[0].start)


def _runs_of_equals(rows: Sequence[dict[str, Any]], apart: float) -> list[dict[str, Any]]:
    """Steps of one height in a row become one rectangle: fewer marks, and no hairlines between them."""
    open_rows: dict[str, dict[str, Any]] = {}
    out: list[dict[str, Any]] = []
    for row in rows:
        last = open_rows.get(row["kind"])
        same = last is not None and (last["low"], last["high"]) == (row["low"], row["high"])
        if last is not None and same and row["t0"] - last["t1"] < apart:
            last["t1"] = row["t1"]
        else:
            open_rows[row["kind"]] = row
            out.append(row)
    return out


def _token_axis(budget: int) -> Any:
    import altair as alt

    if budget and budget % 4 == 0:
        return alt.Axis(values=[budget * i // 4 for i in range(5)])
    return alt.Axis(tickCount=5, tickMinStep=1)


def _budget(budget: int, visible: bool, c: Roles) -> list[Any]:
    """The token budget: a dashed rule with its name, or only the name if it lies far above everything."""
    import altair as alt

    if not budget:
        return []
    words = f"token budget {budget}" + ("" if visible else ", far above this chart")
    text = alt.Chart(data([{"low": budget, "label": words}])).mark_text(align="right", baseline="top", dy=5, color=c.ink)
    if not visible:
        return [text.encode(x=alt.value("width"), y=alt.value(0), text="label:N")]
    rule = alt.Chart(data([{"low": budget}])).mark_rule(color=c.ink, strokeDash=[5, 3]).encode(y="low:Q")
    return [rule, text.encode(x=alt.value("width"), y="low:Q", text="label:N")]


def _requests_panel(bins: Sequence[Bin], unit: Unit, c: Roles) -> Any:
    """Waiting as a grey area, running as a line."""
    import altair as alt

    rows, apart = [], _apart(bins)
    for b, following in zip(bins, [*bins[1:], None]):
        rows.append({"t0": b.start * unit.per_second, "running": b.running, "waiting": b.waiting})
        if following is None or following.start > b.end + apart:
            rows.append({"t0": b.end * unit.per_second, "running": b.after[0], "waiting": b.after[1]})
    base = alt.Chart(data(rows)).encode(x=_x(bins, unit, True))
    name = "requests running (line) and waiting (grey)"
    axis = alt.Axis(tickCount=4, tickMinStep=1, format="~s")
    area = base.mark_area(interpolate="step-after", color=c.waiting).encode(y=alt.Y("waiting:Q", title=name, axis=axis))
    line = base.mark_line(interpolate="step-after", color=c.ink, strokeWidth=1.4).encode(y=alt.Y("running:Q", title=name))
    return alt.layer(area, line).properties(width=WIDTH, height=90)


# ------------------------------------------------------------------------- predicted and measured
def predicted_vs_measured(run: Run) -> Any:
    """Step time, predicted by the cost model against what the executor took, on log axes; the dashed diagonal is a
    perfect prediction. Needs log level 2. More than 2,500 steps are thinned evenly; the title counts them all."""
    slices = [s for s in step_slices(run) if s.predicted and s.measured > 0]
    name = "measured" if run.mode == "measured" else "simulated"
    if not slices:
        why = ("Predictions are recorded from log_level=2 on." if run.started.level < 2 else "No step was computed in this run.")
        return sentence(f"Predicted and {name} step time: nothing was recorded", why, setting(run))
    import altair as alt

    ratios = [(s.predicted or 0.0) / s.measured for s in slices]
    unit, c = unit_for(statistics.median(s.measured for s in slices)), roles()
    axes = _Axes.of(slices, unit)
    layers = [_diagonal(axes, c), _dots(slices, axes, name, c)]
    notes = [setting(run), "A dot is a step; on the dashed line the prediction is exact"]
    if run.mode == "simulated":
        notes.append("The simulated executor spends what the same cost model predicts: this chart checks the bookkeeping")
    return alt.layer(*layers).properties(width=_SQUARE, height=_SQUARE * 0.7,
                                         title=title(_ratio_finding(ratios, name), *notes, width=_SQUARE))  # fmt: skip


def _ratio_finding(ratios: Sequence[float], name: str) -> str:
    """The median ratio and, with enough steps, where the middle 80% of them lie."""
    finding = f"The predicted step time is {statistics.median(ratios):.2f}x the {name} one"
    if len(ratios) < 10:
        return f"{finding} (median of {count(len(ratios), 'step')})"
    cuts = statistics.quantiles(ratios, n=10)
    if cuts[-1] - cuts[0] < 0.01:
        return f"{finding}, in nearly all of {len(ratios)} steps"
    return f"{finding} (median); 80% of {len(ratios)} steps lie between {cuts[0]:.2f}x and {cuts[-1]:.2f}x"


class _Axes(NamedTuple):
    """Both log axes have the same domain, so that the diagonal is the perfect prediction."""

    unit: Unit
    low: float
    high: float

    @classmethod
    def of(cls, slices: Sequence[StepSlice], unit: Unit) -> _Axes:
        values = [v * unit.per_second for s in slices for v in (s.predicted or s.measured, s.measured)]
        margin = max(1.02, (max(values) / min(values)) ** 0.08)
        return cls(unit, min(values) / margin, max(values) * margin)

    def encoding(self, field: str, name: str) -> dict[str, Any]:
        import altair as alt

        scale = alt.Scale(type="log", domain=[self.low, self.high], nice=False)
        axis = alt.Axis(format="~r", values=log_ticks(self.low, self.high))
        return {"shorthand": f"{field}:Q", "title": f"{name} step time ({self.unit.name}, log)", "scale": scale, "axis": axis}


def _diagonal(axes: _Axes, c: Roles) -> Any:
    import altair as alt

    ends = [{"measured": v, "predicted": v} for v in (axes.low, axes.high)]
    line = alt.Chart(data(ends)).mark_line(strokeDash=[4, 4], strokeWidth=1.2, color=c.mute)
    return line.encode(x="measured:Q", y="predicted:Q")


def _dots(slices: Sequence[StepSlice], axes: _Axes, name: str, c: Roles) -> Any:
    import altair as alt

    u = axes.unit.per_second
    rows = [{"measured": s.measured * u, "predicted": (s.predicted or 0.0) * u, "step": s.step, "tokens": s.num_tokens,
             "kind": "with prefill" if s.prefill_tokens else "decode only"}
            for s in slices[:: max(1, -(-len(slices) // MAX_DOTS))]]  # fmt: skip
    kinds, legend = ["with prefill", "decode only"], alt.Legend(offset=_ABOVE)
    shape = alt.Shape("kind:N", title=None, legend=legend, scale=alt.Scale(domain=kinds, range=["triangle-up", "circle"]))
    colour = alt.Color("kind:N", title=None, legend=legend, scale=alt.Scale(domain=kinds, range=[c.prefill, c.decode]))
    told = [alt.Tooltip(f"{f}:Q", title=t, format=".4~g")
            for f, t in (("step", "step"), ("tokens", "tokens"), ("predicted", "predicted"), ("measured", name))]  # fmt: skip
    x, y = alt.X(**axes.encoding("measured", name)), alt.Y(**axes.encoding("predicted", "predicted"))
    dots = alt.Chart(data(rows)).mark_point(filled=True, size=42, opacity=0.55)
    return dots.encode(x=x, y=y, color=colour, shape=shape, tooltip=told)
