"""Choices compared: the frontier of a knob, and where the steps of a run lie under the roof of the hardware."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmlab.types import ConfigError, LabError
from llmlab.ui.chart import WIDTH, count, data, log_ticks, percent, seconds, sentence, setting, title, unit_for
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run
    from roofline.hardware import Hardware

Statistic = Literal["mean", "p50", "p90", "p99"]
NAMES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "time between tokens",
         "e2e": "end-to-end latency", "queue_time": "time in the queue"}  # fmt: skip
MAX_DOTS = 1500
_HEIGHT = 360
_ABOVE = 24  # pixels of a legend above the title of the y axis


# -------------------------------------------------------------------------------------- frontier
class Point(NamedTuple):
    """One setting of the knob. Seconds; `on_frontier`: no other setting is better in one and no worse in the other."""

    label: str
    x: float
    y: float
    on_frontier: bool


def frontier_points(runs: Mapping[Any, Run], x: str, y: str) -> list[Point]:
    """`x` and `y`: a latency and how it is summed up, for example "p99_itl". Raises ConfigError for another name."""
    found = [(str(label), _metric(run, x), _metric(run, y)) for label, run in runs.items()]
    known = [(label, a, b) for label, a, b in found if a is not None and b is not None]
    return [Point(label, a, b, not any(p <= a and q <= b and (p, q) != (a, b) for _, p, q in known)) for label, a, b in known]


def _metric(run: Run, name: str) -> float | None:
    statistic, _, latency = name.partition("_")
    if latency not in NAMES or statistic not in ("mean", "p50", "p90", "p99"):
        raise ConfigError("metric", name, "is not a latency with a statistic", f"Write for example p90_ttft; latencies: {', '.join(NAMES)}.")
    value: float | None = getattr(getattr(run.metrics, latency), statistic)
    return value


def _said(name: str) -> str:
    statistic, _, latency = name.partition("_")
    return f"{'median' if statistic == 'p50' else statistic} {NAMES[latency]}"


def frontier(runs: Mapping[Any, Run], knob: str = "setting", x: str = "p99_itl", y: str = "p90_ttft") -> Any:
    """What a knob trades: one labelled point a run, connected in the order of `runs` (by value of the knob). Filled: on
    the frontier; hollow: another setting is at least as good in both."""
    points = frontier_points(runs, x, y)
    first = next(iter(runs.values()), None)
    if not points or first is None:
        if first is None:
            raise ConfigError("runs", "{}", "is empty", "Give at least one run, by the value of the knob.")
        return sentence(f"What {knob} trades: nothing was recorded", "No run has both latencies.", setting(first))
    import altair as alt

    c, units = roles(), (unit_for(max(p.x for p in points)), unit_for(max(p.y for p in points)))
    rows: list[dict[str, Any]] = [
            {"i": i, "x": p.x * units[0].per_second, "y": p.y * units[1].per_second, "label": f"{knob} {p.label}" if i == 0 else p.label,
             "on": p.on_frontier} for i, p in enumerate(points)]  # fmt: skip
    axes: dict[str, Any] = {"x": alt.X("x:Q", **_axis([r["x"] for r in rows], f"{_said(x)} ({units[0].name})")),
            "y": alt.Y("y:Q", **_axis([r["y"] for r in rows], f"{_said(y)} ({units[1].name})"))}  # fmt: skip
    told = [alt.Tooltip("label:N", title=knob), alt.Tooltip("x:Q", title=_said(x), format=".4~g"), alt.Tooltip("y:Q", title=_said(y), format=".4~g")]
    base = alt.Chart(data(rows)).encode(**axes)
    line = base.mark_line(color=c.mute, strokeWidth=1.6, opacity=0.7).encode(order="i:O")
    fill = alt.condition("datum.on", alt.value(c.decode), alt.value(c.paper))
    dots = base.mark_point(size=110, opacity=1, stroke=c.decode, strokeWidth=2).encode(fill=fill, tooltip=told)
    text = base.mark_text(align="left", dx=10, dy=-8).encode(text="label:N")
    corner = alt.Chart(data([{"label": "better: both low"}])).mark_text(align="left", baseline="bottom", fontWeight="bold", color=c.cached)
    corner = corner.encode(x=alt.value(8), y=alt.value(_HEIGHT - 6), text="label:N")
    notes = [setting(first), f"A point is a run; hollow: another {knob} is at least as good in both"]
    return alt.layer(line, dots, text, corner).properties(width=WIDTH - 100, height=_HEIGHT, title=title(_traded(points, knob, x, y), *notes))


def _traded(points: Sequence[Point], knob: str, x: str, y: str) -> str:
    best, least = min(points, key=lambda p: (p.y, p.x)), min(points, key=lambda p: (p.x, p.y))
    if best == least:
        return f"What {knob} trades: {best.label} is best in both, {_said(y)} {seconds(best.y)} and {_said(x)} {seconds(best.x)}"
    return (f"What {knob} trades: from {least.label} to {best.label} the {_said(y)} changes from {seconds(least.y)} to {seconds(best.y)}, "
            f"the {_said(x)} from {seconds(least.x)} to {seconds(best.x)}")  # fmt: skip


def _axis(values: Sequence[float], name: str) -> dict[str, Any]:
    """Logarithmic if the values differ by more than a factor of five."""
    import altair as alt

    low, high = min(values), max(values)
    if low > 0 and high / low > 5:
        domain = [low / 1.25, high * 1.45]
        return {"scale": alt.Scale(type="log", domain=domain, nice=False), "title": f"{name}, log",
                "axis": alt.Axis(values=log_ticks(*domain), format="~r")}  # fmt: skip
    room = 0.12 * (high - low) or 0.1 * high or 1.0
    return {"scale": alt.Scale(domain=[max(0.0, low - room), high + 1.6 * room], nice=False), "title": name, "axis": alt.Axis(format="~r")}


# -------------------------------------------------------------------------------------- roofline
class Dot(NamedTuple):
    """One step under the roof. `intensity`: operations per byte of memory traffic; `rate`: operations a second; `seconds`
    that it took. Operations and bytes are the cost model's, the time is the run's."""

    step: int
    intensity: float
    rate: float
    seconds: float
    tokens: int
    prefill: bool


def roofline_dots(run: Run) -> list[Dot]:
    """One a finished step with a predicted cost (log level 2)."""
    dots = []
    for s in run.steps:
        if s.predicted is None or not s.measured or not s.predicted.bytes.hbm or not s.predicted.flops:
            continue
        prefill = any(item.num_tokens > 1 for item in s.items)
        dots.append(Dot(s.step, s.predicted.flops / s.predicted.bytes.hbm, s.predicted.flops / s.measured, s.measured, s.num_tokens, prefill))
    return dots


def roofline_steps(run: Run) -> Any:
    """The roofline of the run's hardware with the run's own steps under it, on log axes. Needs log level 2, and hardware
    whose numbers are known (`roofline.hardware`)."""
    dots, device = roofline_dots(run), _device(run)
    if not dots or device is None:
        why = ("Predicted costs are recorded from log_level=2 on." if run.started.level < 2 else
               "No step was computed in this run." if not dots else
               f"The peak rates of {run.started.hardware.get('name', 'this hardware')} are not in the table of roofline.hardware.")  # fmt: skip
        return sentence("Steps under the roof: nothing to draw", why, setting(run))
    import altair as alt

    c, dtype = roles(), _dtype(run, device)
    peak, ridge = device.peak[dtype], device.peak[dtype] / device.bandwidth
    low, high = min(min(d.intensity for d in dots) / 2, ridge / 20), max(max(d.intensity for d in dots) * 2, ridge * 8)
    bottom, top = min(min(d.rate for d in dots) / 2, low * device.bandwidth) / 1e12, peak * 2 / 1e12
    x = alt.X("x:Q", title="operations per byte, log", scale=alt.Scale(type="log", domain=[low, high], nice=False),
              axis=alt.Axis(values=log_ticks(low, high), format="~s"))  # fmt: skip
    y = alt.Y("y:Q", title="10^12 operations a second, log", scale=alt.Scale(type="log", domain=[bottom, top], nice=False),
              axis=alt.Axis(values=log_ticks(bottom, top), format="~g"))  # fmt: skip
    layers = [*_roof(device, dtype, (low, ridge, high), x, y, c), _steps(dots, x, y, c)]
    notes = [setting(run), "A mark is a step: its place from the operations and bytes of the cost model and the time that it took",
             f"Shown are {MAX_DOTS} of {count(len(dots), 'step')}" if len(dots) > MAX_DOTS else ""]  # fmt: skip
    return alt.layer(*layers).properties(width=WIDTH - 60, height=_HEIGHT, title=title(_under(dots, peak, ridge), *notes))


def _device(run: Run) -> Hardware | None:
    from roofline import hardware

    for key in ("device", "name"):
        try:
            return hardware.get(str(run.started.hardware.get(key, "")))
        except (LabError, ValueError):
            continue
    return None


def _dtype(run: Run, device: Hardware) -> str:
    precision = str(run.started.model.get("precision", ""))
    return precision if precision in device.peak else "fp16" if "fp16" in device.peak else next(iter(device.peak))


def _under(dots: Sequence[Dot], peak: float, ridge: float) -> str:
    total = sum(d.seconds for d in dots)
    bound = percent(sum(d.seconds for d in dots if d.intensity < ridge) / total)
    decode = [d for d in dots if not d.prefill] or list(dots)
    kind = "decode" if not decode[0].prefill else "prefill"
    reached = statistics.median(d.rate / peak for d in decode)
    share = f"{reached:.2%}" if reached < 0.01 else percent(reached)
    return f"Steps under the roof: memory limits {bound} of their time; the median {kind} step reaches {share} of the arithmetic"


def _roof(device: Hardware, dtype: str, span: tuple[float, float, float], x: Any, y: Any, c: Roles) -> list[Any]:
    import altair as alt

    low, ridge, high = span
    line = [{"x": v, "y": min(device.peak[dtype], v * device.bandwidth) / 1e12} for v in (low, ridge, high)]
    words = [{"x": high, "y": device.peak[dtype] / 1e12, "label": f"{device.name}, {dtype}: {device.peak[dtype] / 1e12:,.4g} x 10^12 a second"},
             ]  # fmt: skip
    along = math.sqrt(low * ridge)
    slope = [{"x": along, "y": along * device.bandwidth / 1e12, "label": f"memory: {device.bandwidth / 1e9:,.0f} GB/s"}]
    foot = [{"x": ridge, "label": f"ridge: {ridge:,.0f} operations per byte"}]
    roof = alt.Chart(data(line)).mark_line(color=c.ink, strokeWidth=2).encode(x=x, y=y)
    named = alt.Chart(data(words)).mark_text(align="right", dy=-9).encode(x=x, y=y, text="label:N")
    memory = alt.Chart(data(slope)).mark_text(align="right", dx=-10, dy=-6).encode(x=x, y=y, text="label:N")
    rule = alt.Chart(data(foot)).mark_rule(color=c.mute, strokeDash=[4, 4]).encode(x="x:Q")
    said = alt.Chart(data(foot)).mark_text(style="note", align="left", dx=6).encode(x="x:Q", y=alt.value(_HEIGHT - 10), text="label:N")
    return [roof, named, memory, rule, said]


def _steps(dots: Sequence[Dot], x: Any, y: Any, c: Roles) -> Any:
    import altair as alt

    rows = [{"x": d.intensity, "y": d.rate / 1e12, "kind": "with prefill" if d.prefill else "decode only", "step": d.step,
             "tokens": d.tokens, "took": seconds(d.seconds)} for d in dots[:: max(1, -(-len(dots) // MAX_DOTS))]]  # fmt: skip
    kinds = ["with prefill", "decode only"]
    legend = alt.Legend(offset=_ABOVE)
    shape = alt.Shape("kind:N", title=None, legend=legend, scale=alt.Scale(domain=kinds, range=["triangle-up", "circle"]))
    colour = alt.Color("kind:N", title=None, legend=legend, scale=alt.Scale(domain=kinds, range=[c.prefill, c.decode]))
    told = [alt.Tooltip("step:Q"), alt.Tooltip("tokens:Q"), alt.Tooltip("took:N"), alt.Tooltip("x:Q", title="operations per byte", format=".4~g")]
    return alt.Chart(data(rows)).mark_point(filled=True, size=48, opacity=0.6).encode(x=x, y=y, color=colour, shape=shape, tooltip=told)
