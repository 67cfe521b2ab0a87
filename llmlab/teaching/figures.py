"""Charts of the lessons that are no charts of a run: bars, curves with measured points, a strip of tokens.

As everywhere, a title is a finding computed by the caller, and the note says whether it was measured or simulated, where
and with which model.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llmlab.ui.chart import WIDTH, data, log_ticks, title
from llmlab.ui.theme import Roles, roles


class Bar(NamedTuple):
    """One bar; `formula` is drawn as a line across it. `note` is written behind it."""

    label: str
    value: float
    formula: float | None = None
    note: str = ""


class Point(NamedTuple):
    """One point of a curve."""

    x: float
    y: float
    label: str = ""


class Token(NamedTuple):
    """A token as text, and the probability that it had."""

    text: str
    probability: float


def bars(rows: Sequence[Bar], axis: str, finding: str, note: str, form: str = ".1%") -> Any:
    """Horizontal bars in the order given, with their values behind them; a dark stroke is what the formula says."""
    import altair as alt

    c = roles()
    values = [{**r._asdict(), "at": max(r.value, r.formula or 0.0)} for r in rows]
    most = max((max(r.value, r.formula or 0.0) for r in rows), default=1.0) or 1.0
    y = alt.Y("label:N", title=None, sort=None, scale=alt.Scale(domain=[r.label for r in rows], paddingInner=0.3),
              axis=alt.Axis(labelLimit=260, labelFontSize=12.5, grid=False))  # fmt: skip
    x = alt.X("value:Q", title=axis, scale=alt.Scale(domain=[0, most * 1.25], nice=False), axis=alt.Axis(format="%" if "%" in form else form, tickCount=6))
    base = alt.Chart(data(values))
    layers = [base.mark_bar(color=c.decode, cornerRadius=1.5).encode(x=x, y=y)]
    if any(r.formula is not None for r in rows):
        drawn = base.transform_filter("datum.formula != null")
        layers.append(drawn.mark_tick(color=c.ink, thickness=2.5, size=22).encode(x="formula:Q", y=y))
    text = base.transform_calculate(t=f"format(datum.value, '{form}') + (datum.note ? ' · ' + datum.note : '')")
    layers.append(text.mark_text(style="note", align="left", dx=7).encode(x="at:Q", y=y, text="t:N"))
    return alt.layer(*layers).properties(width=WIDTH - 120, height=26 * len(rows), title=title(finding, note))


class Axis(NamedTuple):
    """Name of an axis; logarithmic or not; how its numbers are written."""

    name: str
    log: bool = False
    form: str = "~r"


def curves(measured: Mapping[str, Sequence[Point]], formula: Mapping[str, Sequence[Point]], x: Axis, y: Axis,
           finding: str, note: str) -> Any:  # fmt: skip
    """Points for what was observed, lines for what a formula says; each series is named at its right end."""
    import altair as alt

    c = roles()
    every = [p for points in (*measured.values(), *formula.values()) for p in points]
    xs, ys = _scaled(x, [p.x for p in every]), _scaled(y, [p.y for p in every])
    encode_x = alt.X("x:Q", title=x.name, **xs)
    encode_y = alt.Y("y:Q", title=y.name, **ys)
    layers: list[Any] = []
    colours = _series_colours(list(dict.fromkeys([*measured, *formula])), c)
    for name, points in formula.items():
        line = alt.Chart(data(_rows(points))).mark_line(color=colours[name], strokeWidth=2, strokeDash=[6, 3] if name in measured else [1, 0])
        layers.append(line.encode(encode_x, encode_y))
    for name, points in measured.items():
        chart = alt.Chart(data(_rows(points)))
        joined = name not in formula
        if joined:
            layers.append(chart.mark_line(color=colours[name], strokeWidth=2).encode(encode_x, encode_y))
        layers.append(chart.mark_point(color=colours[name], filled=True, size=70, opacity=1).encode(encode_x, encode_y))
        if any(p.label for p in points):
            layers.append(chart.mark_text(style="note", align="left", dx=8, dy=-8).encode(encode_x, encode_y, text="label:N"))
    layers += _names({**formula, **measured}, colours, encode_x, encode_y)
    return alt.layer(*layers).properties(width=WIDTH - 190, height=300, title=title(finding, note))


def _rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [{"x": p.x, "y": p.y, "label": p.label} for p in points]


def _scaled(axis: Axis, values: Sequence[float]) -> dict[str, Any]:
    import altair as alt

    low, high = min(values), max(values)
    if axis.log:
        low, high = low / 1.15, high * 1.15
        scale = alt.Scale(type="log", domain=[low, high], nice=False)
        return {"scale": scale, "axis": alt.Axis(format=axis.form, values=log_ticks(low, high), grid=True)}
    low = min(0.0, low)
    return {"scale": alt.Scale(domain=[low, high * 1.06 or 1.0], nice=False), "axis": alt.Axis(format=axis.form, tickCount=6, grid=True)}


def _series_colours(names: Sequence[str], c: Roles) -> dict[str, str]:
    order = (c.decode, c.preempted, c.cached, c.mute, c.rejected)
    return {name: order[i % len(order)] for i, name in enumerate(names)}


def _names(series: Mapping[str, Sequence[Point]], colours: Mapping[str, str], x: Any, y: Any) -> list[Any]:
    """The names at the last points; none for a single series without a name."""
    import altair as alt

    layers = []
    for name, points in series.items():
        if name and points:
            last = {"x": points[-1].x, "y": points[-1].y, "name": name}
            mark = alt.Chart(data([last])).mark_text(align="left", dx=11, fontWeight="bold", color=colours[name])
            layers.append(mark.encode(x, y, text="name:N"))
    return layers


CHAR, ROW = 8.6, 30  # pixels of a character of the strip, and of a line of it


def token_strip(tokens: Sequence[Token], finding: str, note: str) -> Any:
    """The tokens in the order of the text, boxed, of a stronger orange where the model was less sure."""
    import altair as alt

    c = roles()
    boxes, left, row = [], 0.0, 0
    for token in tokens:
        text = token.text.replace(" ", "␣").replace("\n", "⏎")
        width = CHAR * len(text) + 9
        if left + width > WIDTH:
            left, row = 0.0, row + 1
        boxes.append({"x": left, "x2": left + width - 2, "y": row * ROW, "y2": (row + 1) * ROW - 5, "p": token.probability,
                      "text": text, "mx": left + width / 2 - 1, "my": row * ROW + (ROW - 5) / 2})  # fmt: skip
        left += width
    base = alt.Chart(data(boxes))
    axis: dict[str, Any] = {"axis": None, "scale": alt.Scale(domain=[0, WIDTH], nice=False)}
    axis_y: dict[str, Any] = {"axis": None, "scale": alt.Scale(domain=[(row + 1) * ROW, 0], nice=False)}
    # The doubt is opacity, not a blend of two colours: only so can a picture be given the colours of the other theme.
    doubt = alt.FillOpacity("p:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[1, 0]))
    area = base.mark_rect(fill=c.preempted, stroke=c.grid, strokeWidth=1, cornerRadius=2).encode(
        x=alt.X("x:Q", **axis), x2="x2:Q", y=alt.Y("y:Q", **axis_y), y2="y2:Q", fillOpacity=doubt)  # fmt: skip
    words = base.mark_text(font="monospace", fontSize=13).encode(x=alt.X("mx:Q", **axis), y=alt.Y("my:Q", **axis_y), text="text:N")
    return alt.layer(area, words).properties(width=WIDTH, height=(row + 1) * ROW, title=title(finding, note, "The stronger the orange, the less probable the chosen token was"))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(html.escape(str(r[n])) for n in names) + " |" for r in rows)])
