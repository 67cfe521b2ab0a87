"""How latency is distributed over the requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmlab.events.metrics import percentile
from llmlab.types import ConfigError
from llmlab.ui.chart import Unit, count, data, log_ticks, percent, seconds, sentence, setting, title, unit_for
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

Metric = Literal["ttft", "e2e", "tpot"]
NAMES: dict[str, str] = {"ttft": "time to first token", "e2e": "end-to-end latency", "tpot": "time per output token"}
_WIDTH = 720
_MAX_STEPS = 600  # of a curve; more are thinned evenly


class _Curve(NamedTuple):
    """One run's samples in ascending order; `total` also counts the requests that have none."""

    name: str
    values: list[float]
    total: int

    def within(self, slo: float) -> float:
        return sum(v <= slo for v in self.values) / self.total


def latency_ecdf(run: Run | Mapping[str, Run], metric: Metric = "ttft", slo: float | None = None) -> Any:
    """The share of requests served within a time, on a log axis; the median is marked and labelled. `run` is one Run or
    several by name, compared. `slo` (seconds) draws the target and puts its attainment into the title; a request without
    the metric (not finished, one token) misses it. Raises ConfigError for an unknown metric."""
    if metric not in NAMES:
        raise ConfigError("metric", metric, "is not a latency", f"Choose one of {', '.join(NAMES)}.")
    runs = dict(run) if isinstance(run, Mapping) else {"": run}
    curves = [_curve(name, one, metric) for name, one in runs.items()]
    curves = [c for c in curves if c.values]
    first = next(iter(runs.values()))
    if not curves:
        why = (f"No request has a {NAMES[metric]} here. Log level 0 keeps no tokens, and an aborted request has none."
               if first.requests else "No request arrived in this run.")  # fmt: skip
        return sentence(f"Distribution of the {NAMES[metric]}: nothing was recorded", why, setting(first))
    return _drawn(curves, metric, slo, first)


def _curve(name: str, run: Run, metric: Metric) -> _Curve:
    values = sorted(v for r in run.requests.values() if (v := getattr(r, metric)) is not None and v > 0)
    return _Curve(name, values, len(run.requests))


def _drawn(curves: Sequence[_Curve], metric: Metric, slo: float | None, run: Run) -> Any:
    import altair as alt

    unit, c = unit_for(max(curve.values[-1] for curve in curves)), roles()
    colours = [c.decode, c.cached, c.preempted, c.mute]
    layers: list[Any] = _target(slo, unit, c) if slo is not None else []
    for i, curve in enumerate(curves):
        layers += _line(curve, metric, unit, colours[i % 4], (i, len(curves)), _domain(curves, slo, unit))
    note = f"The curve is the share of {count(curves[0].total, 'request')} served within that time"
    heading = title(_finding(curves, metric, slo), setting(run), note, width=_WIDTH)
    return alt.layer(*layers).properties(width=_WIDTH, height=300, title=heading)


def _finding(curves: Sequence[_Curve], metric: Metric, slo: float | None) -> str:
    name = NAMES[metric]
    if slo is not None:
        met = [percent(c.within(slo)) + (f" with {c.name}" if c.name else "") for c in curves]
        return f"The {seconds(slo)} target for the {name} is met by {', '.join(met)}" + ("" if curves[0].name else " of the requests")
    if len(curves) > 1:
        medians = [f"{seconds(percentile(c.values, 50))} with {c.name}" for c in curves]
        return f"Median {name}: {', '.join(medians)}"
    half, most = percentile(curves[0].values, 50), percentile(curves[0].values, 90)
    return f"Half of the requests have a {name} of at most {seconds(half)}, 90% of at most {seconds(most)}"


def _domain(curves: Sequence[_Curve], slo: float | None, unit: Unit) -> list[float]:
    """All samples and the target, with a margin; never empty."""
    ends = [v for c in curves for v in (c.values[0], c.values[-1])] + ([slo] if slo else [])
    margin = max(1.1, (max(ends) / min(ends)) ** 0.06)
    return [min(ends) * unit.per_second / margin, max(ends) * unit.per_second * margin]


# ---------------------------------------------------------------------------------------- layers
def _line(curve: _Curve, metric: Metric, unit: Unit, colour: str, place: tuple[int, int], domain: list[float]) -> list[Any]:
    import altair as alt

    x = alt.X("x:Q", title=f"{NAMES[metric]} ({unit.name}, log)", axis=alt.Axis(format="~r", values=log_ticks(*domain)),
              scale=alt.Scale(type="log", domain=domain, nice=False))  # fmt: skip
    y = alt.Y("y:Q", title="share of requests served", scale=alt.Scale(domain=[0, 1]),
              axis=alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 0.9, 1], grid=True))  # fmt: skip
    median = {"x": percentile(curve.values, 50) * unit.per_second, "y": min(0.5, len(curve.values) / curve.total)}
    words = f"{curve.name}: median {seconds(percentile(curve.values, 50))}" if curve.name else "median"
    told = [alt.Tooltip("x:Q", title=unit.name, format=".4~g"), alt.Tooltip("y:Q", title="served", format=".1%")]
    line = alt.Chart(data(_stairs(curve, unit, domain))).mark_line(interpolate="step-after", strokeWidth=2.4, color=colour)
    dot = alt.Chart(data([median])).mark_point(filled=True, size=90, opacity=1, color=colour).encode(x=x, y=y, tooltip=told)
    text = alt.Chart(data([{**median, "label": words}])).mark_text(align="left" if place[1] == 1 else "right", dx=12 if place[1] == 1 else 0, dy=10, color=colour, fontWeight="bold")
    where = {"x": x, "y": y} if place[1] == 1 else {"x": alt.value({"expr": "width - 12"}), "y": alt.value(272 - 20 * (place[1] - 1 - place[0]))}
    return [line.encode(x=x, y=y, tooltip=told), dot, text.encode(**where, text="label:N")]


def _stairs(curve: _Curve, unit: Unit, domain: list[float]) -> list[dict[str, float]]:
    """The curve's corners, from zero at the left edge to its last value at the right one."""
    n = len(curve.values)
    keep = range(0, n, max(1, -(-n // _MAX_STEPS)))
    points = [{"x": curve.values[i] * unit.per_second, "y": (i + 1) / curve.total} for i in (*keep, n - 1)]
    return [{"x": domain[0], "y": 0.0}, *points, {"x": domain[1], "y": n / curve.total}]


def _target(slo: float, unit: Unit, c: Roles) -> list[Any]:
    import altair as alt

    at = data([{"x": slo * unit.per_second, "y": 0.03, "label": f"target {seconds(slo)}"}])
    rule = alt.Chart(at).mark_rule(strokeDash=[4, 4], color=c.mute).encode(x="x:Q")
    return [rule, alt.Chart(at).mark_text(style="note", align="left", dx=5).encode(x="x:Q", y="y:Q", text="label:N")]
