"""Charts in altair: roofline with one dot per op, time per op, memory with its wall, energy, lenses, fit.

Every title is a finding computed from the data; every subtitle names hardware, model, load and that the numbers are
modelled (or measured). Altair is imported on first use. Call :func:`enable_theme` once per process before showing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roofline.cost import OpCost, StepCost
from roofline.energy import split
from roofline.errors import RooflineError
from roofline.hardware import GIB, Hardware

if TYPE_CHECKING:
    from roofline.cost import Efficiency
    from roofline.fit import Measurement
    from roofline.lenses import Comparison
    from roofline.memory import MemoryPlan

INK, MUTE, GRID, PAPER, NIGHT = "#1F2933", "#6B7280", "#E5E7EB", "#FFFFFF", "#111827"
PREFILL, DECODE, MIXED = "#E69F00", "#0072B2", "#6B7280"
BLUE, GREEN, VERMILLION, SKY = "#0072B2", "#009E73", "#D55E00", "#56B4E9"
CEILINGS = (BLUE, VERMILLION, GREEN, "#8C5A7B")
# Groups of a step's time, dark to light in the order of a layer; the link keeps the colour of transfers.
GROUPS = ("attention projections", "attention", "feed-forward", "embedding and head", "norms and activations",
          "between devices", "launch")  # fmt: skip
GROUP_COLOURS = ("#2F5F8F", "#8C5A7B", "#7F9DB9", "#B7A78B", "#D8CDB8", SKY, "#C9CED6")
SMALLEST = 1e-3  # share of a step's time below which an op gets no mark: it would be smaller than a pixel
HEIGHT = 430
AREAS = (18, 2400)  # square pixels of a mark with no share and with all of the step's time
MEMORY_PARTS = ("weights", "activations", "KV cache", "beyond the wall")
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


def _altair() -> Any:
    """Import altair when the first chart is drawn: half a second that no cost model should pay."""
    import altair

    return altair


def theme_config(dark: bool = False) -> dict[str, Any]:
    """Return the Vega-Lite configuration of this package's charts."""
    ink, mute, grid, paper = ("#E5E7EB", "#9CA3AF", "#374151", NIGHT) if dark else (INK, MUTE, GRID, PAPER)
    axis = {"domain": False, "ticks": False, "labelColor": mute, "titleColor": mute, "gridColor": grid,
            "titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 12, "labelPadding": 6}  # fmt: skip
    return {
        "background": paper,
        "font": FONT,
        "view": {"stroke": None},
        "title": {"anchor": "start", "color": ink, "fontSize": 18, "fontWeight": "bold", "subtitleColor": mute,
                  "subtitleFontSize": 12, "subtitleFontWeight": "normal", "offset": 14, "subtitlePadding": 6},
        "axis": axis,
        "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleX": 0, "titleY": -10},
        "legend": {"orient": "top", "symbolType": "square", "title": None, "labelColor": ink, "labelFontSize": 12,
                   "labelLimit": 240, "offset": 4, "symbolBaseFillColor": mute},
        "text": {"color": ink, "fontSize": 12, "font": FONT},
        "axisBand": {"labelColor": ink, "labelFontSize": 13, "labelLimit": 320, "grid": False},
        "style": {"halo": {"stroke": paper, "strokeWidth": 3}, "rim": {"stroke": paper, "strokeWidth": 1},
                  "wall": {"color": ink, "fill": ink}, "quiet": {"color": mute, "fill": mute}, "bold": {"color": ink}, "roof": {"color": ink, "strokeWidth": 2.5},
                  "otherRoof": {"color": mute, "strokeWidth": 2, "opacity": 0.6}},
    }  # fmt: skip


def enable_theme(dark: bool = False) -> None:
    """Register this package's theme with altair and make it the current one."""
    alt = _altair()
    name = "roofline_dark" if dark else "roofline_light"
    alt.theme.register(name, enable=True)(lambda: alt.theme.ThemeConfig(config=theme_config(dark)))


def save(chart: Any, path: str | Path, dark: bool = False, scale: float = 1.6) -> None:
    """Write a chart as PNG, SVG or HTML (by the name's ending) in this package's theme."""
    enable_theme(dark)
    chart.save(str(path), scale_factor=scale)


def _title(finding: str, detail: str) -> Any:
    alt = _altair()
    return alt.TitleParams(finding, subtitle=detail)


def _phase(step: StepCost) -> str:
    query = step.rows.query
    return "decode" if all(q == 1 for q in query) else "prefill" if all(q > 1 for q in query) else "mixed"


def _load(step: StepCost) -> str:
    model = step.model
    group = f"{model.tp} x {model.hardware.name}" if model.tp > 1 else model.hardware.name
    return f"{model.shape.name}, {model.precision.name}, {group}"


def _loads(steps: Mapping[str, StepCost]) -> str:
    """Return the models, widths and devices of several steps, each named once."""
    return " / ".join(dict.fromkeys(_load(step) for step in steps.values()))


def _merged(step: StepCost) -> list[OpCost]:
    """Return one cost per op name, counts summed: layers with and without experts share their names."""
    found: dict[str, OpCost] = {}
    for cost in step.per_op():
        same = found.get(cost.op.name)
        if same is None or same.op.flops != cost.op.flops:
            key = cost.op.name if same is None else f"{cost.op.name} ({cost.op.first_layer}+)"
            found[key] = cost
        else:
            op = replace(same.op, count=same.op.count + cost.op.count)
            found[cost.op.name] = replace(same, op=op)
    return list(found.values())


def roofline(steps: Mapping[str, StepCost], others: Sequence[Hardware] = ()) -> Any:
    """Return the log-log roofline of a device with one dot per op; a dot's area is its share of the step's time.

    ``steps``: labelled steps of one cost model. ``others``: further devices whose ceilings are drawn for comparison.
    """
    alt = _altair()
    if not steps:
        raise RooflineError("a roofline needs at least one step")
    first = next(iter(steps.values()))
    device, dtype = first.model.hardware, first.model.precision.linear_format
    dots = [row for label, step in steps.items() for row in _dots(label, step) if row["share"] >= SMALLEST]
    dots.sort(key=lambda row: -float(row["share"]))  # small marks over large ones
    x = [row["intensity"] for row in dots]
    low, high = min(0.5, *x) / 1.5, max(4 * device.ridge(dtype), *x) * 1.5
    floor = min(row["tflops"] for row in dots) / 2.5
    lines, ends = _ceilings([device, *others], dtype, low, high)
    top = max(row["tflops"] for row in lines) * 1.6
    xs = alt.X("intensity:Q", title="arithmetic intensity (operations per byte)", axis=alt.Axis(**_log_axis([low, high])),
               scale=alt.Scale(type="log", domain=[low, high], nice=False))  # fmt: skip
    ys = alt.Y("tflops:Q", title="attained TFLOP/s", axis=alt.Axis(**_log_axis([floor, top])),
               scale=alt.Scale(type="log", domain=[floor, top], nice=False))  # fmt: skip
    return (
        alt.layer(*_ridge(device, dtype, floor, xs, ys), *_roofs(lines, ends, device.name, xs, ys), *_dot_marks(dots, top / floor, xs, ys))
        .properties(width=760, height=HEIGHT, title=_roofline_title(steps, device))
        .resolve_scale(color="independent", shape="independent")
    )


def _dots(label: str, step: StepCost) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cost in _merged(step):
        if not cost.op.flops or not cost.op.bytes:
            continue
        share = cost.seconds * cost.op.count / step.seconds
        rows.append({
            "op": cost.op.name, "step": label, "phase": _phase(step), "kind": cost.op.kind, "share": share,
            "intensity": cost.op.intensity, "tflops": cost.op.flops / cost.seconds / 1e12,
            "label": f"{cost.op.name} {share:.0%}", "bound": cost.bound,
            "ms": cost.seconds * cost.op.count * 1e3,
        })  # fmt: skip
    return rows


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """Axis with a tick at each power of ten, written out plainly."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return {"values": [10.0**i for i in range(low, high + 1)], "format": "~g", "grid": True}


def _ceilings(
    devices: Sequence[Hardware], dtype: str, low: float, high: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    lines, ends = [], []
    for device in devices:
        unit = dtype if dtype in device.peak else device.default_dtype
        peak, ridge = device.peak_of(unit), device.ridge(unit)
        for x in (low, ridge, high):
            lines.append({"device": device.name, "intensity": x, "tflops": min(peak, x * device.bandwidth) / 1e12})
        text = f"{device.name} {peak / 1e12:.3g} TFLOP/s"
        ends.append({"device": device.name, "intensity": high, "tflops": peak / 1e12, "text": text})
    return lines, ends


def _roofs(
    lines: list[dict[str, Any]], ends: list[dict[str, Any]], device: str, xs: Any, ys: Any
) -> list[Any]:
    """Return the ceilings with their names: the device's own in ink, those it is compared with in grey, so that colours
    stay with the phases of the marks."""
    alt = _altair()
    found = []
    for own, line, text in (("!=", "otherRoof", "quiet"), ("==", "roof", "bold")):
        roof, names = (alt.Chart(alt.Data(values=rows)).transform_filter(f"datum.device {own} '{device}'") for rows in (lines, ends))
        found.append(roof.mark_line(style=line).encode(xs, ys, detail="device:N"))
        found.append(names.mark_text(align="left", dx=8, fontWeight="bold", style=text).encode(xs, ys, text="text:N"))
    return found


def _ridge(device: Hardware, dtype: str, floor: float, xs: Any, ys: Any) -> list[Any]:
    alt = _altair()
    ridge = device.ridge(dtype)
    at = alt.Chart(alt.Data(values=[{"intensity": ridge, "tflops": floor, "text": f"ridge: {ridge:.0f} per byte"}]))
    rule = at.mark_rule(strokeDash=[4, 4], color=MUTE, opacity=0.8).encode(xs)
    return [rule, at.mark_text(align="left", dx=6, dy=-8, style="quiet").encode(xs, ys, text="text:N")]


def _dot_marks(dots: list[dict[str, Any]], span: float, xs: Any, ys: Any) -> list[Any]:
    alt = _altair()
    colour = alt.Scale(domain=["decode", "prefill", "mixed"], range=[DECODE, PREFILL, MIXED])
    phases = [p for p in ("decode", "prefill", "mixed") if any(row["phase"] == p for row in dots)]
    shape = alt.Scale(domain=["linear", "attention", "elementwise"], range=["circle", "square", "triangle-up"])
    base = alt.Chart(alt.Data(values=dots)).encode(xs, ys)
    tips = [alt.Tooltip(f"{name}:N") for name in ("op", "step", "bound")] + [alt.Tooltip("ms:Q", format=".3f")]
    size = alt.Size("share:Q", scale=alt.Scale(domain=[0, 1], range=list(AREAS)), legend=None)
    points = base.mark_point(filled=True, opacity=0.75, style="rim").encode(
        size, alt.Color("phase:N", scale=colour, legend=alt.Legend(values=phases, offset=30, orient="top", title=None)),
        alt.Shape("kind:N", scale=shape, legend=alt.Legend(symbolType="circle", offset=30, orient="top", title=None)), tooltip=tips)  # fmt: skip
    left, right = xs.to_dict()["scale"]["domain"]
    found = _labels(dots, span, left, right)
    texts = []
    for align in ("left", "center", "right"):
        rows = [row for row in found if row["align"] == align]
        named = alt.Chart(alt.Data(values=rows)).encode(xs, ys, text="label:N")
        halo: dict[str, Any] = {"align": align, "baseline": "top", "fontSize": 11}
        texts += [named.mark_text(**halo, style="halo"), named.mark_text(**halo)] if rows else []
    return [points, *texts]


def _labels(
    dots: list[dict[str, Any]], span: float, left: float, right: float, least: float = 0.05
) -> list[dict[str, Any]]:
    """Return one label per step and kind of op that takes a visible share, below the largest of its marks.

    ``span``: highest over lowest value of the y axis, so that pixels can be turned into a factor. Near the ends of
    the x axis (``left``, ``right``) a label grows inwards.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in dots:
        groups.setdefault((row["step"], row["kind"]), []).append(row)
    found: list[dict[str, Any]] = []
    for (step, kind), rows in groups.items():
        share, largest = sum(row["share"] for row in rows), max(rows, key=lambda row: float(row["share"]))
        if share < least:
            continue
        radius = math.sqrt((AREAS[0] + (AREAS[1] - AREAS[0]) * largest["share"]) / math.pi)
        y = largest["tflops"] / span ** ((radius + 6) / HEIGHT)
        for other in found:
            if 0.2 < other["intensity"] / largest["intensity"] < 5 and 0.7 < other["tflops"] / y < 1.4:
                y = min(y, other["tflops"] / span ** (15 / HEIGHT))
        plural = {"linear": "linears", "elementwise": "elementwise ops"}.get(kind, kind)
        place = math.log(largest["intensity"] / left) / math.log(right / left)
        align = "left" if place < 0.2 else "right" if place > 0.8 else "center"
        found.append({**largest, "tflops": y, "align": align, "label": f"{step}: {plural} {share:.0%}"})
    return found


def _roofline_title(steps: Mapping[str, StepCost], device: Hardware) -> Any:
    parts = []
    for label, step in steps.items():
        model = step.model
        used = step.flops / step.seconds / model.tp / device.peak_of(model.precision.linear_format)
        parts.append(f"{label} {used:.1%}" if used < 0.1 else f"{label} {used:.0%}")
    finding = f"Share of the {device.name}'s arithmetic in use: {', '.join(parts)}"
    detail = f"Roofline, {_loads(steps)}. One mark per op, area = share of its step's time (modelled)"
    return _title(finding, detail)


_GROUP_OF = {
    "qkv_proj": 0, "o_proj": 0, "q_proj": 0, "kv_a_proj": 0, "absorb_k": 0, "absorb_v": 0, "k_proj": 0, "v_proj": 0,
    "out_proj": 0, "attention": 1, "qk_matmul": 1, "sv_matmul": 1, "softmax": 1, "fused_attention": 1,
    "embedding": 3, "final_norm": 3, "lm_head": 3, "sampling": 3, "attn_norm": 4, "mlp_norm": 4, "rope_kv_write": 4,
    "act": 4, "mlp_act": 4, "attn_add": 4, "mlp_add": 4, "expert_act": 4, "shared_act": 4, "combine": 4,
}  # fmt: skip


def _grouped_ms(step: StepCost) -> dict[str, float]:
    """Return milliseconds of a step by group; a kernel's launch counts as launch."""
    found = dict.fromkeys(GROUPS, 0.0)
    for cost in step.per_op():
        group = GROUPS[5] if cost.op.kind == "collective" else GROUPS[_GROUP_OF.get(cost.op.name, 2)]
        found[group] += (cost.seconds - cost.launch) * cost.op.count * 1e3
        found["launch"] += cost.launch * cost.op.count * 1e3
    found["launch"] += step.model.efficiency.step * 1e3
    return found


def time_stack(steps: Mapping[str, StepCost], normalize: bool = True) -> Any:
    """Return stacked bars of the time of each step by group of ops, labelled with the whole step's time.

    ``normalize`` draws shares of each step (so that steps of very different length compare), else milliseconds.
    """
    alt = _altair()
    rows: list[dict[str, Any]] = []
    for label, step in steps.items():
        start = 0.0
        for group, ms in _grouped_ms(step).items():
            width = ms / (step.seconds * 1e3) if normalize else ms
            rows.append({"step": label, "group": group, "ms": ms, "start": start, "stop": start + width,
                         "share": ms / step.seconds / 1e3})  # fmt: skip
            start += width
    used = [group for group in GROUPS if any(r["group"] == group and r["share"] > 0.004 for r in rows)]
    colours = [GROUP_COLOURS[GROUPS.index(group)] for group in used]
    ends: list[dict[str, Any]] = [{"step": label, "stop": 1.0 if normalize else step.seconds * 1e3, "text": _milliseconds(step.seconds)}
            for label, step in steps.items()]  # fmt: skip
    y = alt.Y("step:N", sort=list(steps), title=None)
    most = max(row["stop"] for row in ends)
    axis = alt.Axis(format="%" if normalize else ",~f", tickCount=6)
    unit = "share of the step's time" if normalize else "milliseconds"
    x = alt.X("start:Q", title=unit, axis=axis, scale=alt.Scale(domain=[0, most * 1.001], nice=False))
    bars = alt.Chart(alt.Data(values=[r for r in rows if r["group"] in used])).mark_bar(height={"band": 0.62}).encode(
        x, alt.X2("stop:Q"), y, alt.Color("group:N", sort=used, scale=alt.Scale(domain=used, range=colours),
                                          legend=alt.Legend(columns=4)))  # fmt: skip
    inside = alt.Chart(alt.Data(values=[r for r in rows if r["share"] >= 0.06])).transform_calculate(
        middle="(datum.start + datum.stop) / 2").mark_text(fontSize=11).encode(
        alt.X("middle:Q"), y, text=alt.Text("share:Q", format=".0%"),
        color=alt.condition(alt.FieldOneOfPredicate("group", list(GROUPS[:2])), alt.value("#FFFFFF"), alt.value(INK)))  # fmt: skip
    total = alt.Chart(alt.Data(values=ends)).mark_text(align="left", dx=8, fontWeight="bold").encode(
        alt.X("stop:Q"), y, text="text:N")  # fmt: skip
    return alt.layer(bars, inside, total).properties(width=640, height=46 * len(steps) + 10, title=_stack_title(steps))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _stack_title(steps: Mapping[str, StepCost]) -> Any:
    shares = {
        label: {group: ms / step.seconds / 1e3 for group, ms in _grouped_ms(step).items()}
        for label, step in steps.items()
    }

    def spread(group: str) -> float:
        values = [share[group] for share in shares.values()]
        return max(values) - (min(values) if len(values) > 1 else 0.0)

    group = max(GROUPS, key=spread)
    most, least = (pick(shares, key=lambda label: shares[label][group]) for pick in (max, min))
    finding = f"{group.capitalize()}: {shares[most][group]:.0%} of the time of {most}"
    if len(steps) > 1:
        finding += f", {shares[least][group]:.0%} of {least}"
    return _title(finding, f"Time by group of ops: {_loads(steps)} (modelled)")


def memory_bar(plans: Sequence[MemoryPlan], tokens: int) -> Any:
    """Return one bar per plan: weights, activations and the cache of ``tokens`` tokens against the memory wall.

    Bytes are of one device of each plan's group. The thin mark is the share an engine may take, the thick one the
    device's size; what sticks out beyond the wall does not fit.
    """
    alt = _altair()
    if tokens < 0:
        raise RooflineError(f"tokens must be at least 0, got {tokens}")
    labels = {id(plan): f"{plan.shape}, {plan.precision}, {plan.tp} x {plan.hardware}" for plan in plans}
    rows, walls, notes = _memory_rows(plans, tokens, labels)
    y = alt.Y("plan:N", sort=list(labels.values()), title=None)
    most = max(note["at"] for note in notes)
    x = alt.X("start:Q", title="GiB on each device", axis=alt.Axis(tickCount=8), scale=alt.Scale(domain=[0, most * 1.02], nice=False))
    colour = alt.Scale(domain=list(MEMORY_PARTS), range=["#2F5F8F", "#7F9DB9", GREEN, VERMILLION])
    bars = alt.Chart(alt.Data(values=rows)).mark_bar(height={"band": 0.55}).encode(
        x, alt.X2("stop:Q"), y, alt.Color("part:N", scale=colour, sort=list(MEMORY_PARTS)))  # fmt: skip
    wall = alt.Chart(alt.Data(values=walls))
    tick = {"orient": "vertical", "bandSize": 1}
    usable = wall.mark_tick(**tick, thickness=2, style="wall", height={"band": 0.86}).encode(alt.X("usable:Q"), y)
    full = wall.mark_tick(**tick, thickness=3, style="wall", height={"band": 0.86}).encode(alt.X("capacity:Q"), y)
    note = alt.Chart(alt.Data(values=notes)).encode(alt.X("at:Q"), y, text="text:N")
    fits = note.transform_filter("!datum.over").mark_text(align="left", dx=10)
    over = note.transform_filter("datum.over").mark_text(align="left", dx=10, color=VERMILLION, fontWeight="bold")
    return alt.layer(bars, usable, full, fits, over).properties(
        width=620, height=52 * len(plans) + 10, title=_memory_title(plans, tokens)
    )


def _memory_rows(
    plans: Sequence[MemoryPlan], tokens: int, labels: Mapping[int, str]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the pieces of the bars, the walls, and the notes behind them."""
    rows, walls, notes = [], [], []
    for plan in plans:
        name, edge = labels[id(plan)], 0.0
        sizes = (plan.weights, plan.activations, tokens * plan.kv_per_token)
        for part, size in zip(MEMORY_PARTS, sizes, strict=False):
            for piece, a, b in _cut(part, edge, edge + size, plan.usable):
                rows.append({"plan": name, "part": piece, "start": a / GIB, "stop": b / GIB})
            edge += size
        walls.append({"plan": name, "usable": plan.usable / GIB, "capacity": plan.capacity / GIB})
        fits = (
            f"{plan.tokens:,} tokens fit" if edge <= plan.usable else f"{(edge - plan.usable) / GIB:.1f} GiB too much"
        )
        notes.append({"plan": name, "at": max(edge, plan.capacity) / GIB, "text": fits, "over": edge > plan.usable})
    return rows, walls, notes


def _cut(part: str, start: float, stop: float, wall: float) -> list[tuple[str, float, float]]:
    """Split a piece of the bar at the wall."""
    inside = [(part, start, min(stop, wall))] if start < wall and stop > start else []
    return inside + ([("beyond the wall", max(start, wall), stop)] if stop > wall else [])


def _memory_title(plans: Sequence[MemoryPlan], tokens: int) -> Any:
    fitting = [p for p in plans if p.tokens >= tokens]
    finding = f"{tokens:,} tokens of cache fit in {len(fitting)} of {len(plans)} cases"
    if len(plans) == 1:
        finding = f"{plans[0].tokens:,} tokens of cache fit, {tokens:,} are asked for"
    return _title(
        finding, "Thick mark: the device's memory. Thin mark: the wall, what an engine may take of it (planned)"
    )


def energy_waterfall(step: StepCost, tokens: float | None = None) -> Any:
    """Return joules per useful token as a waterfall: compute, memory, link and static add up to the whole."""
    alt = _altair()
    made = float(len(step.rows) if tokens is None else tokens)
    parts = split(step)
    named = {"compute": parts.compute, "memory": parts.memory, "link": parts.link, "static": parts.static}
    rows, edge = [], 0.0
    for name, joules in named.items():
        if joules >= 0.005 * parts.total:
            rows.append(_bar(name, edge, edge + joules / made, joules / parts.total))
        edge += joules / made
    rows.append(_bar("total", 0.0, edge, 1.0))
    order = [row["part"] for row in rows]
    x = alt.X("part:N", sort=order, title=None,
              axis=alt.Axis(labelAngle=0))  # fmt: skip
    scale = alt.Scale(domain=[0, edge * 1.12], nice=False)
    colour = alt.Scale(domain=["compute", "memory", "link", "static", "total"],
                       range=["#4C78A8", "#2F5F8F", SKY, "#C9CED6", "#6B7280"])  # fmt: skip
    base = alt.Chart(alt.Data(values=rows))
    y = alt.Y("start:Q", title="joules per useful token", scale=scale, axis=alt.Axis(tickCount=6))
    bars = base.mark_bar(width={"band": 0.66}).encode(
        x, y, alt.Y2("stop:Q"), alt.Color("part:N", scale=colour, legend=None)
    )
    above = base.mark_text(baseline="bottom", dy=-5).encode(x, alt.Y("stop:Q"), text="text:N")
    links = [{"part": a["part"], "next": b["part"], "stop": a["stop"]} for a, b in pairwise(rows)]
    steps = (
        alt.Chart(alt.Data(values=links))
        .mark_rule(color=MUTE, strokeDash=[2, 2])
        .encode(x, alt.X2("next:N"), alt.Y("stop:Q"))
    )
    biggest = max(named, key=lambda name: named[name])
    watts = step.joules / step.seconds / step.model.tp
    finding = f"{edge:.3g} J per token, {named[biggest] / parts.total:.0%} of it {biggest}"
    detail = f"{_load(step)}, {_phase(step)} of {len(step.rows)} rows, {watts:.0f} W of {step.model.hardware.tdp:g} W (modelled)"
    return alt.layer(steps, bars, above).properties(width=110 * len(rows), height=320, title=_title(finding, detail))


def _bar(part: str, start: float, stop: float, share: float) -> dict[str, Any]:
    text = f"{stop - start:.3g} J" if share == 1 else f"{stop - start:.3g} J, {share:.0%}"
    return {"part": part, "start": start, "stop": stop, "text": text}


def lens_gains(comparisons: Sequence[Comparison], detail: str) -> Any:
    """Return, per technique, the gain in tokens per second (circle) and in tokens per joule (diamond)."""
    alt = _altair()
    if not comparisons:
        raise RooflineError("a chart of gains needs at least one comparison")
    kinds = ("tokens per second", "tokens per joule")
    ranked = sorted(comparisons, key=lambda c: -c.speedup)
    rows: list[dict[str, Any]] = [{"lens": c.name, "kind": kind, "gain": gain} for c in ranked
            for kind, gain in zip(kinds, (c.speedup, c.energy_gain), strict=True)]  # fmt: skip
    spans: list[dict[str, Any]] = [{"lens": c.name, "low": min(c.speedup, c.energy_gain), "high": max(c.speedup, c.energy_gain),
              "text": f"x{c.speedup:.2f} speed, x{c.energy_gain:.2f} energy"} for c in ranked]  # fmt: skip
    low, most = min(0.8, *(s["low"] for s in spans)) * 0.95, max(s["high"] for s in spans)
    high = most * (most / low) ** 0.5  # a third of the logarithmic axis is room for the words, on narrow pages too
    ticks = [t for t in (0.25, 0.5, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6, 8, 16, 32) if low <= t <= high]
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    x = alt.X("gain:Q", title="gain (log scale)", scale=scale, axis=alt.Axis(values=ticks, format="~g"))
    y = alt.Y("lens:N", sort=[c.name for c in ranked], title=None)
    one = alt.Chart(alt.Data(values=[{"gain": 1}])).mark_rule(color=MUTE, strokeDash=[4, 4]).encode(x)
    bar = alt.Chart(alt.Data(values=spans)).mark_rule(strokeWidth=3, color="#C9CED6").encode(
        alt.X("low:Q", scale=scale), alt.X2("high:Q"), y)  # fmt: skip
    dots = alt.Chart(alt.Data(values=rows)).mark_point(filled=True, size=110, opacity=1).encode(
        x, y, alt.Color("kind:N", scale=alt.Scale(domain=list(kinds), range=["#2F5F8F", "#B08D57"]), sort=list(kinds)),
        alt.Shape("kind:N", scale=alt.Scale(domain=list(kinds), range=["circle", "diamond"]), sort=list(kinds)))  # fmt: skip
    text = alt.Chart(alt.Data(values=spans)).mark_text(align="left", dx=12, fontSize=11, style="quiet").encode(
        alt.X("high:Q", scale=scale), y, text="text:N")  # fmt: skip
    best = ranked[0]
    finding = f"{best.name[0].upper()}{best.name[1:]} gains most here: x{best.speedup:.2f} tokens per second"
    return alt.layer(one, bar, dots, text).properties(
        width=560, height=34 * len(ranked) + 10, title=_title(finding, detail)
    )


def fit_quality(measured: Sequence[Measurement], hardware: Hardware, eff: Efficiency, detail: str) -> Any:
    """Return measured (dots) against predicted (lines) kernel times by number of tokens, one colour per matrix."""
    import numpy as np

    alt = _altair()
    from roofline.fit import Predictor, errors

    predicted = Predictor([m.op for m in measured], hardware).seconds(eff)
    rows: list[dict[str, Any]] = [
        {"op": m.op.name, "matrix": f"{m.op.name} {m.op.depth:g} x {m.op.columns:g}", "tokens": float(m.op.rows),
         "measured": m.seconds * 1e3, "predicted": float(p) * 1e3}
        for m, p in sorted(zip(measured, predicted, strict=True), key=lambda pair: pair[0].op.rows)
    ]  # fmt: skip
    ops = list(dict.fromkeys(row["op"] for row in rows))
    colour = alt.Scale(domain=ops, range=list(CEILINGS[: len(ops)]))
    times = [row["measured"] for row in rows]
    axis = alt.Axis(values=[1, 8, 64, 256, 1024, 4096], format="~g", grid=False)
    x = alt.X("tokens:Q", title="tokens in the step", scale=alt.Scale(type="log", nice=False), axis=axis)
    scale = alt.Scale(type="log", domain=[min(times) / 1.3, max(times) * 1.3], nice=False)
    y_axis = alt.Axis(**_log_axis(times))
    base = alt.Chart(alt.Data(values=rows)).encode(x, alt.Color("op:N", scale=colour, legend=None))
    dots = base.mark_point(filled=True, size=14, opacity=0.35).encode(
        alt.Y("measured:Q", scale=scale, axis=y_axis, title="milliseconds")
    )
    line = base.mark_line(strokeWidth=2).encode(alt.Y("predicted:Q", scale=scale), detail="matrix:N")
    last = _apart(list({row["matrix"]: row for row in rows}.values()))
    names = alt.Chart(alt.Data(values=last)).mark_text(align="left", dx=6, fontWeight="bold").encode(
        x, alt.Y("predicted:Q", scale=scale), text="matrix:N", color=alt.Color("op:N", scale=colour, legend=None))  # fmt: skip
    median = float(np.median(errors(measured, hardware, eff)))
    return alt.layer(dots, line, names).properties(
        width=640, height=380, title=_title(f"Half of the kernels are predicted within {median:.1%}", detail)
    )


def _apart(rows: list[dict[str, Any]], gap: float = 1.2) -> list[dict[str, Any]]:
    """Return label positions at least a factor ``gap`` apart, moved down from the top."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -float(row["predicted"])):
        y = min(row["predicted"], found[-1]["predicted"] / gap) if found else row["predicted"]
        found.append({**row, "predicted": y})
    return found
