"""Who owns the KV memory: a map of blocks over time, or their number where the log keeps no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.ui.blocks import BlockRect, Usage, block_rects, merge_rects, share_of_time, usage
from llmlab.ui.chart import WIDTH, Unit, count, data, percent, seconds, sentence, setting, title, unit_for
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

MAX_RECTS = 4000
FULL = 0.95  # of the pool: from here on the next request that grows is likely to need a victim


class Frame(NamedTuple):
    """The part of the run that the map shows."""

    start: float
    end: float
    unit: Unit
    num_blocks: int


def kv_block_map(run: Run, max_rects: int = MAX_RECTS) -> Any:
    """Who owns which block when: a rectangle per block, owner and interval, coloured by owner; above it how full the
    pool is. Pale green: free, but findable (prefix cache). Needs log level 3; below it, the number of blocks in use; at
    level 0 a sentence. More than `max_rects` rectangles are cut to the stretch around the fullest moment."""
    points = usage(run)
    if not points:
        why = ("Log level 0 keeps no steps. Run with log_level=1 for the number of blocks in use, log_level=3 for their owners."
               if run.started.level < 1 else "No request ever held a block in this run.")  # fmt: skip
        return sentence("Who owns the KV memory: nothing was recorded", why, setting(run))
    num_blocks = int(run.started.config.get("num_blocks") or max(p.blocks for p in points))
    frame = Frame(points[0].t, max(points[-1].t, points[0].t + 1e-9), unit_for(points[-1].t - points[0].t), num_blocks)
    finding = _finding(points, num_blocks)
    if run.started.level < 3:
        note = "Which request owns which block is recorded from log_level=3 on"
        return _usage(points, frame, roles(), 150, True).properties(title=title(finding, setting(run), note))
    return _map(run, points, frame, finding, max_rects)


def _finding(points: Sequence[Usage], num_blocks: int) -> str:
    most = max(p.blocks for p in points)
    if most < FULL * num_blocks:
        return f"Who owns the KV memory: at most {most} of {num_blocks} blocks are in use ({percent(most / num_blocks)})"
    share = share_of_time(list(points), FULL * num_blocks)
    return f"Who owns the KV memory: the pool is over {FULL:.0%} full for {percent(share)} of the time"


def _map(run: Run, points: Sequence[Usage], frame: Frame, finding: str, max_rects: int) -> Any:
    import altair as alt

    every = merge_rects(block_rects(run))
    frame, rects = _window(every, points, frame, max_rects)
    c, size = roles(), int(run.started.config.get("block_size", 0))
    height = min(360, max(120, frame.num_blocks * 12))
    layers = [*_rects(run, rects, frame, c), *_preemptions(run, frame, c), *_names(rects, frame, c, height)]
    below = alt.layer(*layers).properties(width=WIDTH, height=height)
    notes = [setting(run), f"A row is a block of {count(size, 'token')}, its colour the request that owns it",
             "Pale green: free, but its tokens can still be found. Dashed: a preemption"]  # fmt: skip
    if len(rects) < len(every):
        notes.append(f"Shown are {seconds(frame.start)} to {seconds(frame.end)}, around the fullest moment")
    strip = _usage([p for p in points if frame.start <= p.t <= frame.end], frame, c, 60, False)
    return alt.vconcat(strip, below, spacing=8).resolve_scale(x="shared", color="independent").properties(
        title=title(finding, *notes))  # fmt: skip


def _window(rects: Sequence[BlockRect], points: Sequence[Usage], frame: Frame, most: int) -> tuple[Frame, list[BlockRect]]:
    """Halve the stretch around the fullest moment until few enough rectangles are in it."""
    fullest = max(points, key=lambda p: p.blocks).t
    shown = list(rects)
    while len(shown) > most:
        half = (frame.end - frame.start) / 4
        start = min(max(frame.start, fullest - half), frame.end - 2 * half)
        frame = frame._replace(start=start, end=start + 2 * half)
        shown = [r for r in shown if r.end > frame.start and r.start < frame.end]
    return frame, [r._replace(start=max(r.start, frame.start), end=min(r.end, frame.end)) for r in shown]


# ---------------------------------------------------------------------------------------- layers
def _x(frame: Frame, labels: bool) -> Any:
    import altair as alt

    u = frame.unit.per_second
    scale = alt.Scale(domain=[frame.start * u, frame.end * u], nice=False, zero=False)
    axis = alt.Axis(tickCount=10, format="~r", grid=False) if labels else alt.Axis(labels=False, grid=False, title=None)
    return alt.X("t0:Q", title=f"time ({frame.unit.name})" if labels else None, scale=scale, axis=axis)


def _usage(points: Sequence[Usage], frame: Frame, c: Roles, height: int, alone: bool) -> Any:
    """How full the pool is."""
    import altair as alt

    rows = [{"t0": p.t * frame.unit.per_second, "share": p.blocks / frame.num_blocks, "blocks": p.blocks} for p in points]
    name = f"share of {frame.num_blocks} blocks in use" if alone else "in use"
    y = alt.Y("share:Q", title=name, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%", values=[0, 0.5, 1]))
    told = [alt.Tooltip("t0:Q", title=f"time ({frame.unit.name})", format=".4~g"), alt.Tooltip("blocks:Q", title="blocks in use")]
    area = alt.Chart(data(rows)).mark_area(interpolate="step-after", color=c.mute, opacity=0.3,
                                           line={"color": c.mute, "strokeWidth": 1.2})  # fmt: skip
    return area.encode(x=_x(frame, alone), y=y, tooltip=told).properties(width=WIDTH, height=height)


def _rects(run: Run, rects: Sequence[BlockRect], frame: Frame, c: Roles) -> list[Any]:
    import altair as alt

    order = {name: i for i, name in enumerate(run.requests)}
    y = alt.Y("b0:Q", title="KV block", scale=alt.Scale(domain=[0, frame.num_blocks], nice=False),
              axis=alt.Axis(grid=False, tickCount=5, tickMinStep=1))  # fmt: skip
    x = {"x": _x(frame, True), "x2": "t1:Q", "y": y, "y2": "b1:Q"}
    told = [alt.Tooltip("owner:N", title="owner"), alt.Tooltip("lasts:N", title="for"), alt.Tooltip("blocks:N", title="blocks")]
    owned = [_row(r, frame) | {"hue": order.get(r.owners[0], 0) % len(c.owners)} for r in rects if r.owners]
    idle = [_row(r, frame) for r in rects if not r.owners]
    hue = alt.Color("hue:N", legend=None, scale=alt.Scale(domain=list(range(len(c.owners))), range=list(c.owners)))
    return [
        alt.Chart(data(idle)).mark_rect(color=c.cached, opacity=0.16).encode(**x, tooltip=told),
        alt.Chart(data(owned)).mark_rect(stroke=c.paper, strokeWidth=0.4).encode(**x, color=hue, tooltip=told),
    ]


def _row(r: BlockRect, frame: Frame) -> dict[str, Any]:
    u = frame.unit.per_second
    owner = " and ".join(r.owners) if r.owners else "nobody: free, but cached"
    blocks = f"{r.first}" if r.stop == r.first + 1 else f"{r.first} to {r.stop - 1}"
    return {"t0": r.start * u, "t1": r.end * u, "b0": r.first, "b1": r.stop, "owner": owner,
            "lasts": seconds(r.end - r.start), "blocks": blocks}  # fmt: skip


def _preemptions(run: Run, frame: Frame, c: Roles) -> list[Any]:
    """A dashed line with a cross on top for each preemption."""
    import altair as alt

    rows = [{"t0": e.t * frame.unit.per_second, "who": e.request, "for": e.beneficiary or "nobody: the device lost its memory"}
            for e in run.events("RequestPreempted") if frame.start <= e.t <= frame.end]  # fmt: skip
    if not rows:
        return []
    x = alt.X("t0:Q")
    told = [alt.Tooltip("who:N", title="preempted"), alt.Tooltip("for:N", title="for")]
    rule = alt.Chart(data(rows)).mark_rule(strokeDash=[3, 3], color=c.ink, opacity=0.6).encode(x=x, tooltip=told)
    cross = alt.Chart(data(rows)).mark_text(text="×", fontSize=15, fontWeight="bold", color=c.preempted, baseline="bottom")
    return [rule, cross.encode(x=x, y=alt.value(2), tooltip=told)]


# ---------------------------------------------------------------------------------------- labels
class _Spot(NamedTuple):
    """A place for a name: the largest rectangle of blocks and time that one request owns alone."""

    area: float
    t: float
    block: float


def _names(rects: Sequence[BlockRect], frame: Frame, c: Roles, height: int) -> list[Any]:
    """The name of each request in the middle of its largest area, where there is room for it."""
    import altair as alt

    own: dict[str, list[BlockRect]] = {}
    for r in rects:
        if len(r.owners) == 1:
            own.setdefault(r.owners[0], []).append(r)
    spots = [(name, _spot(name, pieces, frame, height)) for name, pieces in own.items()]
    rows = [{"t0": s.t * frame.unit.per_second, "b0": s.block, "name": name} for name, s in spots if s is not None]
    text = alt.Chart(data(rows)).mark_text(fontWeight="bold", fontSize=11.5, color=c.owner_ink)
    return [text.encode(x="t0:Q", y="b0:Q", text="name:N")] if rows else []


def _spot(name: str, pieces: Sequence[BlockRect], frame: Frame, height: int) -> _Spot | None:
    """Try each piece's interval: grow over neighbouring pieces that last at least as long; keep the largest area."""
    px_t, px_b = WIDTH / (frame.end - frame.start), height / frame.num_blocks
    best: _Spot | None = None
    for piece in sorted(pieces, key=lambda r: -r.block_seconds)[:24]:
        first, stop = piece.first, piece.stop
        cover = sorted((r for r in pieces if r.start <= piece.start and r.end >= piece.end), key=lambda r: r.first)
        for r in cover:
            stop = max(stop, r.stop) if r.first <= stop <= r.stop else stop
        for r in reversed(cover):
            first = min(first, r.first) if r.first <= first <= r.stop else first
        wide, tall = (piece.end - piece.start) * px_t, (stop - first) * px_b
        if wide >= 8 * len(name) + 4 and tall >= 11 and (best is None or wide * tall > best.area):
            best = _Spot(wide * tall, (piece.start + piece.end) / 2, (first + stop) / 2)
    return best
