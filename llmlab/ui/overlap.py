"""Pictures of CPU and GPU in parallel: two iterations side by side, the map of gains, and the boundary of eq. 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmlab.types import ResourceSpan
from llmlab.ui.chart import WIDTH, data, title
from llmlab.ui.theme import roles

LANES = ("GPU linear", "GPU attention", "CPU attention", "link to host", "link to GPU")


class Piece(Protocol):
    """A system with or without a part of the mechanism, and what it yields."""

    @property
    def name(self) -> str: ...

    @property
    def without(self) -> str: ...

    @property
    def rate(self) -> float: ...


class Steps(Protocol):
    """Spans of the last two steps of a steady state, and what it yields."""

    @property
    def spans(self) -> tuple[ResourceSpan, ...]: ...

    @property
    def rate(self) -> float: ...


def _lane(span: ResourceSpan) -> str:
    if span.resource == "device":
        return LANES[1] if span.op.startswith("attention") else LANES[0]
    return {"cpu": LANES[2], "d2h": LANES[3], "h2d": LANES[4]}[span.resource]


def two_gantts(systems: Mapping[str, Steps], milliseconds: float = 14.0) -> Any:
    """The beginning of one of the last iterations of each system (ms), one below the other on the same scale, so that the gaps
    can be compared. A row's attention on the CPU has one layer's time under the pipeline, a whole iteration's under overlap."""
    import altair as alt

    c = roles()
    charts = []
    for name, found in systems.items():
        zero = min(span.start for span in found.spans if span.resource == "device")
        rows = [{"lane": _lane(s), "start": (s.start - zero) * 1e3, "end": min((s.end - zero) * 1e3, milliseconds), "op": s.op}
                for s in found.spans if zero <= s.start < zero + milliseconds / 1e3 and s.end > s.start]  # fmt: skip
        note = f"{found.rate:.0f} tokens/s in the steady state. Simulated"
        charts.append(alt.Chart(data(rows)).mark_bar(height=20, stroke=c.paper, strokeWidth=0.6).encode(
            x=alt.X("start:Q", title="ms", scale=alt.Scale(domain=[0, milliseconds])), x2="end:Q",
            y=alt.Y("lane:N", sort=list(LANES), title=None, scale=alt.Scale(domain=list(LANES))),
            color=alt.Color("lane:N", legend=None, scale=alt.Scale(
                domain=list(LANES), range=[c.decode, c.prefill, c.waiting, c.transfer, c.transfer])),
            tooltip=["op:N", "start:Q", "end:Q"],
        ).properties(width=WIDTH, height=150, title=title(f"{name}: the first layers of an iteration", note)))  # fmt: skip
    return alt.vconcat(*charts)


def gain_map(cells: Sequence[tuple[float, int, float, str]]) -> Any:
    """(CPU speed %, KV tokens, gain of apex over the best other, its mode) as a map."""
    import altair as alt

    c = roles()
    rows = [{"speed": f"{s:g} %", "kv": f"{kv:,}", "gain": g, "text": f"{g:.2f}", "mode": m} for s, kv, g, m in cells]
    speeds, budgets = ([f"{s:g} %" for s in sorted({x[0] for x in cells})], [f"{b:,}" for b in sorted({x[1] for x in cells}, reverse=True)])
    base = alt.Chart(data(rows)).encode(
        x=alt.X("speed:N", sort=speeds, title="attention on the CPU, share of the GPU's speed", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("kv:N", sort=budgets, title="KV tokens in GPU memory"),
    )
    best, least = max(cells, key=lambda x: x[2]), min(cells, key=lambda x: x[2])
    finding = (f"Overlap gains most ({best[2]:.2f}x the best of the others) at {best[1]:,} KV tokens and a CPU of {best[0]:g} %, "
               f"least ({least[2]:.2f}x) at {least[1]:,} and {least[0]:g} %")  # fmt: skip
    heat = base.mark_rect(color=c.transfer, stroke=c.paper).encode(opacity=alt.Opacity("gain:Q", legend=None, scale=alt.Scale(range=[0.08, 0.6])))
    text = base.mark_text(fontSize=13, color=c.ink).encode(text="text:N")
    return (heat + text).properties(width=WIDTH - 120, height=44 * len(budgets),
                                    title=title(finding, "Output tokens/s of apex over the best of gpu_only, fastdecode and neo. Steady state, decodes only. Simulated: Llama-2-7B on a T4"))  # fmt: skip


def boundary(points: Sequence[tuple[float, float]]) -> Any:
    """The curve of eq. 6 over T_ga/T_gl, and where the simulated pipeline begins to beat the GPU alone."""
    import altair as alt

    c = roles()
    low, high = (min(x for x, _ in points) / 1.6, max(x for x, _ in points) * 1.6)
    xs = [low * (high / low) ** (i / 80) for i in range(81)]
    curve = [{"x": x, "y": 2 / x + 3 + x} for x in xs]
    off = max(abs(y / (2 / x + 3 + x) - 1) for x, y in points)
    x = alt.X("x:Q", title="T_ga / T_gl: attention over linears, one layer on the GPU", scale=alt.Scale(type="log", nice=False))
    y = alt.Y("y:Q", title="N_G / N_C: attention speed, GPU over CPU", scale=alt.Scale(zero=True))
    line = alt.Chart(data(curve)).mark_line(color=c.mute).encode(x=x, y=y)
    dots = alt.Chart(data([{"x": a, "y": b} for a, b in points])).mark_point(size=90, filled=True, color=c.decode).encode(x=x, y=y)
    return (line + dots).properties(width=WIDTH, height=300, title=title(
        f"The simulated boundary lies on eq. 6 within {off:.0%}", "Line: 2 T_gl/T_ga + 3 + T_ga/T_gl; below it the pipeline wins",
        "Dots: simulated, Llama-2-7B on a T4"))  # fmt: skip


def ablation(pieces: Sequence[Piece]) -> Any:
    """Tokens/s of each system as a bar, what it lacks beside it; the last one is whole."""
    import altair as alt

    c = roles()
    whole = pieces[-1]
    rows = [{"name": p.name, "rate": p.rate, "text": f"{p.rate:.0f}: {p.without}", "whole": p is whole} for p in pieces]
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("name:N", sort=[p.name for p in pieces], title=None, axis=alt.Axis(grid=False, labelLimit=200)),
        x=alt.X("rate:Q", title="output tokens per second", scale=alt.Scale(domain=[0, 1.9 * max(p.rate for p in pieces)]),
                axis=alt.Axis(values=[50 * i for i in range(int(max(p.rate for p in pieces) / 50) + 1)])),
    )  # fmt: skip
    bars = base.mark_bar(size=18).encode(color=alt.condition("datum.whole", alt.value(c.decode), alt.value(c.waiting)))
    words = base.mark_text(align="left", dx=5, color=c.ink).encode(text="text:N")
    dearest = min(pieces[1:-1], key=lambda p: p.rate)
    return (bars + words).properties(width=WIDTH - 120, height=34 * len(rows), title=title(
        f"What overlap is made of: with everything {whole.rate:.0f} tokens/s; the dearest part to go without leaves {dearest.rate:.0f}",
        "Steady state, decodes only. Simulated: Llama-2-7B on a T4, 864 KV tokens, a CPU at 8 % of its attention"))  # fmt: skip


def by_output(points: Sequence[tuple[float, str, float]]) -> Any:
    """(tokens out, placement, tokens/s): a line a placement."""
    import altair as alt

    c = roles()
    names = list(dict.fromkeys(name for _, name, _ in points))
    rows = [{"out": out, "name": name, "rate": rate} for out, name, rate in points]
    rate = {(out, name): value for out, name, value in points}
    ends = sorted({out for out, _, _ in points})
    x = alt.X("out:Q", title="tokens out (in the mean)", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(values=ends, format="d"))
    color = alt.Color("name:N", title=None, scale=alt.Scale(domain=names, range=[c.waiting, c.prefill, c.decode][: len(names)]),
                      legend=alt.Legend(orient="right"))  # fmt: skip
    base = alt.Chart(data(rows)).encode(x=x, y=alt.Y("rate:Q", title="output tokens per second"), color=color)
    gain = [rate[out, "apex"] / rate[out, "neo"] for out in ends]
    return (base.mark_line(strokeWidth=2) + base.mark_point(filled=True, size=70)).properties(width=WIDTH, height=300, title=title(
        f"Overlap yields {gain[0]:.2f} times the pipeline's tokens at {ends[0]:.0f} tokens out, {gain[-1]:.2f} times at {ends[-1]:.0f}",
        "Closed loop. Simulated: Llama-3.1-8B on an A10, 26,400 KV tokens, 1,000 in, a CPU at 8 % of its attention"))  # fmt: skip
