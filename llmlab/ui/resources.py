"""Which resource was busy when: device, CPU and both directions of the link, from Span events (log level 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.events import catalog as ev
from llmlab.ui.chart import WIDTH, Unit, data, percent, seconds, sentence, setting, title, unit_for
from llmlab.ui.theme import Roles, roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

LANES = {"device": "device", "cpu": "CPU", "h2d": "link, to device", "d2h": "link, to host", "disk": "disk", "net": "network"}
ALWAYS = ("device", "cpu", "h2d", "d2h")
MAX_SECONDS_SHARE = 1 / WIDTH  # a gap of less than a pixel is none
MAX_BARS = 900  # more are cut to the busiest stretch
_ROW = 46


class Work(NamedTuple):
    """One resource busy without a pause. `kind`: prefill, decode or transfer; `ops`: what it did, in order."""

    resource: str
    start: float
    end: float
    kind: str
    ops: tuple[str, ...]
    request: str | None

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Window(NamedTuple):
    """The stretch of time that is drawn (seconds)."""

    start: float
    end: float

    def cut(self, work: Work) -> Work:
        return work._replace(start=max(self.start, work.start), end=min(self.end, work.end))


def work_of(run: Run) -> list[Work]:
    """One entry a Span event, in order of their starts; empty below log level 4."""
    mixed = {e.step: any(i.num_tokens > 1 for i in e.items) for e in run.log_events if isinstance(e, ev.StepPlanned)}
    links = ("h2d", "d2h", "disk", "net")
    found = [
        Work(e.resource, e.start, e.end,
             "transfer" if e.resource in links else "prefill" if mixed.get(e.step) and e.resource == "device" else "decode",
             (e.op,), e.request)
        for e in run.log_events if isinstance(e, ev.Span)
    ]  # fmt: skip
    return sorted(found, key=lambda w: (w.start, w.end))


def merge_work(work: Iterable[Work], apart: float) -> list[Work]:
    """The same busy time with fewer bars: neighbours of one resource and kind that are nearer than `apart` become one."""
    last: dict[str, int] = {}
    merged: list[Work] = []
    for one in work:
        at = last.get(one.resource)
        before = merged[at] if at is not None else None
        if at is None or before is None or before.kind != one.kind or one.start - before.end >= apart:
            last[one.resource] = len(merged)
            merged.append(one)
            continue
        request = one.request if one.request == before.request else None
        merged[at] = before._replace(end=max(before.end, one.end), ops=(*before.ops, *one.ops), request=request)
    return merged


def resource_gantt(run: Run, start: float | None = None, end: float | None = None) -> Any:
    """Four resources on one time axis: who works, who waits, and what of the copies hides behind the device's work.
    Orange: steps with prefill; blue: decode only; sky: transfers; thin grey: idle, with its cause on pointing. Shown is
    `start` to `end` (seconds), and the title speaks of that; by default the busiest stretch around transfers and CPU work, under
    what holds for the whole run. Needs log level 4."""
    work = work_of(run)
    if not work:
        why = ("Spans are recorded from log_level=4 on." if run.started.level < 4 else "This executor reported no spans.")
        return sentence("Who works when: nothing was recorded", why, setting(run))
    whole = Window(work[0].start, max(w.end for w in work))
    window = Window(whole.start if start is None else start, whole.end if end is None else end)
    if start is None and end is None:
        window = _interesting(work, whole)
    seen = [window.cut(w) for w in work if w.end > window.start and w.start < window.end]
    told, over = (work, whole) if start is None and end is None else (seen, window)
    bars = merge_work(seen, MAX_SECONDS_SHARE * (window.end - window.start))
    lanes = [name for name in LANES if name in ALWAYS or any(w.resource == name for w in work)]
    unit, c = unit_for(window.end - window.start), roles()
    import altair as alt

    layers = [_idle(run, window, lanes, unit, c), _bars(bars, lanes, unit, c), *_words(bars, window, lanes, unit, c)]
    shown = "" if window == whole else f"Shown are {seconds(window.start)} to {seconds(window.end)} of {seconds(whole.end)}"
    shares = ", ".join(f"{LANES[name]} {percent(busy(told, name) / (over.end - over.start))}" for name in lanes if busy(told, name))
    return alt.layer(*layers).properties(
        width=WIDTH, height=_ROW * len(lanes), title=title(finding(told, over), setting(run), f"Busy over {'the run' if over == whole else 'that time'}: {shares}", shown)
    )


def busy(work: Sequence[Work], resource: str) -> float:
    """Seconds in which the resource did something."""
    return sum(b - a for a, b in _union(w for w in work if w.resource == resource))


def hidden(work: Sequence[Work], resources: Sequence[str]) -> float:
    """Seconds in which one of `resources` worked while the device did, too: what its overlap earned."""
    device = _union(w for w in work if w.resource == "device")
    others = _union(w for w in work if w.resource in resources)
    total, i = 0.0, 0
    for a, b in others:
        while i < len(device) and device[i][1] <= a:
            i += 1
        k = i
        while k < len(device) and device[k][0] < b:
            total += min(b, device[k][1]) - max(a, device[k][0])
            k += 1
    return total


def _union(work: Iterable[Work]) -> list[tuple[float, float]]:
    """Disjoint intervals of busy time, in order."""
    out: list[tuple[float, float]] = []
    for w in work:
        if out and w.start <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], w.end)
        else:
            out.append((w.start, w.end))
    return out


def finding(work: Sequence[Work], whole: Window) -> str:
    """The sentence above the chart, computed from all of the run."""
    device = busy(work, "device") / (whole.end - whole.start)
    rest = [name for name in LANES if name != "device" and busy(work, name)]
    if not rest:
        return f"Who works when: the device is busy {percent(device)} of the time, everything else idles"
    other = sum(b - a for a, b in _union(w for w in work if w.resource != "device"))
    share = hidden(work, rest) / other
    names = " and ".join(["CPU"] * ("cpu" in rest) + ["link"] * any(n in rest for n in ("h2d", "d2h")) + [n for n in rest if n in ("disk", "net")])
    return f"Who works when: {percent(share)} of what the {names} {'do' if ' and ' in names else 'does'} hides behind the device, which is busy {percent(device)} of the time"


def _interesting(work: Sequence[Work], whole: Window) -> Window:
    """All of a short run; otherwise a stretch of it around the longest piece of work beside the device."""
    if len(merge_work(work, MAX_SECONDS_SHARE * (whole.end - whole.start))) <= 12 and len(work) <= 60:
        return whole
    beside = [w for w in work if w.resource == "cpu"] or [w for w in work if w.resource != "device"]
    centre = max(beside, key=lambda w: w.seconds) if beside else work[len(work) // 2]
    pieces = merge_work([w for w in work if w.resource == "device"], 1e-3 * centre.seconds)
    length = max(4 * centre.seconds, 8 * sorted(w.seconds for w in pieces)[len(pieces) // 2])
    start = max(whole.start, (centre.start + centre.end) / 2 - length / 2)
    return Window(start, min(whole.end, start + length))


# ---------------------------------------------------------------------------------------- layers
def _y(lanes: Sequence[str]) -> Any:
    import altair as alt

    return alt.Y("lane:N", title=None, axis=alt.Axis(grid=False, labelFontSize=12.5, labelLimit=160),
                 scale=alt.Scale(domain=[LANES[name] for name in lanes], paddingInner=0.35, paddingOuter=0.2))  # fmt: skip


def _x(window: Window | None, unit: Unit) -> Any:
    import altair as alt

    u = unit.per_second
    scale = alt.Scale(domain=[window.start * u, window.end * u], nice=False, zero=False) if window else alt.Scale(zero=False, nice=False)
    return alt.X("t0:Q", title=f"time ({unit.name})", scale=scale, axis=alt.Axis(tickCount=8, format="~r"))


def _idle(run: Run, window: Window, lanes: Sequence[str], unit: Unit, c: Roles) -> Any:
    """Gaps with their causes, thin and grey."""
    import altair as alt

    rows: list[Mapping[str, Any]] = []
    for event in run.log_events:
        if not isinstance(event, (ev.Idle, ev.JoinWait)):
            continue
        resource = event.resource if isinstance(event, ev.Idle) else "device"
        if resource in lanes and event.end > window.start and event.start < window.end:
            why = event.why if isinstance(event, ev.Idle) else f"waits for {event.op} of the host"
            rows.append({"lane": LANES[resource], "t0": max(event.start, window.start) * unit.per_second,
                         "t1": min(event.end, window.end) * unit.per_second, "why": why or "idle",
                         "lasts": seconds(event.end - event.start)})  # fmt: skip
    told = [alt.Tooltip("lane:N", title="idle"), alt.Tooltip("why:N", title="why"), alt.Tooltip("lasts:N", title="for")]
    return alt.Chart(data(rows)).mark_bar(size=3, color=c.waiting).encode(x=_x(window, unit), x2="t1:Q", y=_y(lanes), tooltip=told)


def _bars(bars: Sequence[Work], lanes: Sequence[str], unit: Unit, c: Roles) -> Any:
    import altair as alt

    rows = [{"lane": LANES[w.resource], "t0": w.start * unit.per_second, "t1": w.end * unit.per_second, "kind": w.kind,
             "ops": ops_words(w.ops), "lasts": seconds(w.seconds), "request": w.request or "several"} for w in bars]  # fmt: skip
    colours = {"prefill": c.prefill, "decode": c.decode, "transfer": c.transfer}
    told = [alt.Tooltip(f, title=t) for f, t in (("lane:N", "resource"), ("ops:N", "does"), ("request:N", "for request"), ("lasts:N", "for"))]
    present = [k for k in colours if any(w.kind == k for w in bars)] or ["decode"]
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=present, range=[colours[k] for k in present]))
    return alt.Chart(data(rows)).mark_bar(size=_ROW * 0.52, cornerRadius=1.5).encode(
        x=_x(None, unit), x2="t1:Q", y=_y(lanes), color=colour, tooltip=told)  # fmt: skip


def _words(bars: Sequence[Work], window: Window, lanes: Sequence[str], unit: Unit, c: Roles) -> list[Any]:
    """Names in bars that are wide enough, "idle" in lanes without any."""
    import altair as alt

    pixels = WIDTH / (window.end - window.start)
    wide = [{"lane": LANES[w.resource], "t0": (w.start + w.end) / 2 * unit.per_second, "label": ops_words(w.ops), "kind": w.kind}
            for w in bars if w.seconds * pixels > 7 * len(ops_words(w.ops)) + 6]  # fmt: skip
    empty = [{"lane": LANES[name], "t0": window.start * unit.per_second, "label": "idle"}
             for name in lanes if not any(w.resource == name for w in bars)]  # fmt: skip
    base = {"x": alt.X("t0:Q"), "y": _y(lanes), "text": "label:N"}
    ink = alt.condition(alt.datum.kind == "decode", alt.value(c.paper), alt.value(c.owner_ink))
    return [alt.Chart(data(wide)).mark_text(fontSize=11).encode(**base, color=ink),
            alt.Chart(data(empty)).mark_text(style="note", align="left", dx=8).encode(**base)]  # fmt: skip


def ops_words(ops: Sequence[str]) -> str:
    """Names of ops in a row, short: "layer 0 ... layer 31", "8 x swap_out"."""
    if len(set(ops)) == 1:
        return ops[0] if len(ops) == 1 else f"{len(ops)} x {ops[0]}"
    return f"{ops[0]}, {ops[1]}" if len(ops) == 2 else f"{ops[0]} ... {ops[-1]}"
