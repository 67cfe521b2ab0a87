"""CPU and GPU in parallel, simulated: one load under four placements. Rates and latencies come from whole runs at log level 1,
the iterations from a run at level 4 that stops early. What the page's sliders offer is recorded, so that they answer at once;
a record that is older than what it opens with is not believed, and the page simulates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.papers.apex import NAMES as NAMES
from llmlab.papers.apex import closed_loop, loop_config, loop_load
from llmlab.running import Feed
from llmlab.ui.chart import WIDTH, count, data, percent, seconds, title
from llmlab.ui.theme import roles

REQUESTS, CLIENTS = 300, 224
SPEEDS, BUDGETS = (2, 5, 8, 10, 20, 40), (608, 864, 1728, 3456, 6912)  # the longest request has 595 tokens
SETTING = (f"Simulated: Llama-2-7B fp16 on a T4, seed 1; {CLIENTS} clients ask {REQUESTS} questions of 373 tokens in the mean, "
           "answers have 45")  # fmt: skip
LIVED = {"GPU": "on the GPU", "both": "moved", "CPU": "on the host"}
LANES = {"device": "GPU", "cpu": "CPU", "d2h": "link to host", "h2d": "link to GPU"}
LINEAR, ATTENTION, WHOLE, COPY = KINDS = ("linear layers", "attention", "linear layers and attention", "copies")
KEPT = 30_000  # events in the memory of a run that is stopped: some twenty steps
LAYERS = 32
STRETCHES = {"two iterations": None, "their first 40 ms": 40.0, "their first 10 ms": 10.0}


class Machine(msgspec.Struct, frozen=True):
    """`speed`: attention on the CPU, % of the GPU's; `kv_tokens`: KV tokens that fit into the GPU's memory."""

    speed: int = 8
    kv_tokens: int = 864

    @property
    def name(self) -> str:
        return f"{self.speed}% {self.kv_tokens}"


class Served(msgspec.Struct, frozen=True):
    """What a placement made of the load: output tokens/s between 30 % and 70 % of all tokens, mean seconds to the first token,
    sorted seconds per further token by where a request lived."""

    rate: float
    ttft: float
    tpot: dict[str, tuple[float, ...]]


class Bar(msgspec.Struct, frozen=True):
    """Work without a pause; milliseconds since the first iteration began."""

    lane: str
    kind: str
    start: float
    end: float


class Glimpse(msgspec.Struct, frozen=True):
    """Two decode iterations in a row, near the middle of the load: how long they took (ms), the tokens that their work is worth (a
    row that passes one of 32 layers has done a 33rd of a token's way), the mode that was chosen, rows on the GPU and on the host
    in the last, what was busy when."""

    length: float
    worth: float
    mode: str
    near: int
    away: int
    bars: tuple[Bar, ...]

    def busy(self, lane: str) -> float:
        """The share of the time in which a resource worked."""
        return sum(bar.end - bar.start for bar in self.bars if bar.lane == lane) / self.length


class Record(msgspec.Struct, frozen=True):
    """A machine under all placements."""

    served: dict[str, Served]
    glimpses: dict[str, Glimpse]

    @property
    def mark(self) -> str:
        """What another simulator would hardly say, too."""
        return " ".join(f"{name} {one.rate:.5g} {self.glimpses[name].length:.5g}" for name, one in self.served.items())


class Atlas(msgspec.Struct, frozen=True):
    """The records of all machines that the sliders offer, by `Machine.name`; `mark` is that of the default one."""

    mark: str
    machines: dict[str, Record]


# ---------------------------------------------------------------------------------------- running
@lru_cache(maxsize=256)
def served(of: Machine, placement: str) -> Served:
    """The load under one placement. Raises LabError."""
    loop = closed_loop(placement, of.speed, kv_tokens=of.kv_tokens, num_requests=REQUESTS, clients=CLIENTS)
    return Served(loop.rate, loop.run.metrics.ttft.mean or 0.0, loop.tpot)


def compared(of: Machine, each: Callable[[str], object]) -> dict[str, Served]:
    """All placements; `each` hears of every one that is done."""
    found = {}
    for name in NAMES:
        found[name] = served(of, name)
        each(name)
    return found


@lru_cache(maxsize=64)
def glimpse(of: Machine, placement: str) -> Glimpse:
    """Two iterations without prompts, the first that come when a fifth of the questions are answered: by then all clients are
    there. Raises LabError."""
    config = loop_config(placement, of.speed, kv_tokens=of.kv_tokens, log_level=4, log_capacity=KEPT)
    with Engine(config) as engine:
        feed, answered = Feed(engine, loop_load(REQUESTS, CLIENTS).source(engine.model.vocab_size)), 0
        while feed.pour():
            for output in engine.step():
                feed.take(output)
                answered += output.finished
            if answered >= REQUESTS // 5 and (pair := _two_decodes(tuple(engine.log)[-KEPT // 4 :])):
                return _seen(pair, list(engine.log))
        raise AssertionError("a load of these lengths has two decode steps in a row")


def _two_decodes(events: Sequence[ev.Event]) -> tuple[ev.StepPlanned, ev.StepPlanned] | None:
    """The last two finished steps, if they only decode."""
    done = {event.step for event in events if isinstance(event, ev.StepFinished)}
    steps = [event for event in events if isinstance(event, ev.StepPlanned) and event.step in done][-2:]
    if len(steps) < 2 or any(item.num_tokens > 1 for step in steps for item in step.items):
        return None
    return steps[0], steps[1]


def _seen(pair: tuple[ev.StepPlanned, ev.StepPlanned], events: Sequence[ev.Event]) -> Glimpse:
    first, last = pair
    spans = [e for e in events if isinstance(e, ev.Span) and e.end > e.start]
    own = [s for s in spans if s.resource == "device" and s.step in (first.step, last.step)]
    zero, end = min(s.start for s in own), max(s.end for s in own)
    modes = [e.chosen for e in events if isinstance(e, ev.Decision) and e.seam == "placement" and e.step == last.step]
    bars = [Bar(LANES[s.resource], _kind(s), 1e3 * (max(s.start, zero) - zero), 1e3 * (min(s.end, end) - zero))
            for s in spans if s.resource in LANES and s.start < end and s.end > zero]  # fmt: skip
    away = sum(item.home == "cpu" for item in last.items)
    worth = sum(1.0 if item.layers is None else 1 / (LAYERS + 1) for step in pair for item in step.items)
    return Glimpse(1e3 * (end - zero), worth, modes[-1] if modes else "", len(last.items) - away, away, tuple(merged(bars)))


def _kind(span: ev.Span) -> str:
    if span.resource in ("h2d", "d2h"):
        return COPY
    return WHOLE if span.op == "step" else ATTENTION if span.op.startswith("attention") else LINEAR


def merged(bars: Iterable[Bar]) -> list[Bar]:
    """The same work in fewer bars: what follows without a gap on its lane and is of its kind becomes one; microseconds."""
    last: dict[str, Bar] = {}
    done = []
    for bar in sorted(bars, key=lambda b: b.start):
        before = last.get(bar.lane)
        if before is not None and before.kind == bar.kind and bar.start - before.end < 1e-3:
            last[bar.lane] = msgspec.structs.replace(before, end=max(before.end, bar.end))
            continue
        done += [before] if before is not None else []
        last[bar.lane] = bar
    return [Bar(b.lane, b.kind, round(b.start, 4), round(b.end, 4)) for b in [*done, *last.values()]]


# --------------------------------------------------------------------------------------- recording
def recorded(of: Machine) -> Record:
    """A machine under all placements, from nothing."""
    return Record(compared(of, lambda name: None), {name: glimpse(of, name) for name in NAMES})


def write(path: Path) -> None:
    """Record the default machine."""
    path.write_bytes(msgspec.json.encode(recorded(Machine())))


def read(path: Path) -> Record:
    """What `write` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Record)


def write_atlas(path: Path, each: Callable[[str], object]) -> None:
    """Record all machines that the sliders offer, on all cores: minutes of computing. `each` hears of every one that is done."""
    machines = [Machine(speed, tokens) for tokens in BUDGETS for speed in SPEEDS]
    found = {}
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for of, record in zip(machines, pool.map(recorded, machines)):
            found[of.name] = record
            each(of.name)
    atlas = Atlas(found[Machine().name].mark, {name: _rounded(record) for name, record in found.items()})
    path.write_bytes(zstandard.compress(msgspec.msgpack.encode(atlas), 19))


def _rounded(record: Record) -> Record:
    """As exact as anybody could see it, and much smaller."""
    served = {name: Served(one.rate, one.ttft, {where: tuple(float(f"{t:.4g}") for t in values) for where, values in one.tpot.items()})
              for name, one in record.served.items()}  # fmt: skip
    return Record(served, {name: msgspec.structs.replace(one, bars=tuple(Bar(b.lane, b.kind, round(b.start, 3), round(b.end, 3)) for b in one.bars))
                           for name, one in record.glimpses.items()})  # fmt: skip


def read_atlas(path: Path) -> Atlas:
    """What `write_atlas` wrote."""
    return msgspec.msgpack.decode(zstandard.decompress(path.read_bytes()), type=Atlas)


# ----------------------------------------------------------------------------------------- telling
def finding(of: Machine, found: Mapping[str, Served]) -> str:
    """The best beside the GPU alone and beside the next one, in one sentence."""
    first, second = sorted(found, key=lambda name: -found[name].rate)[:2]
    rates = {name: one.rate for name, one in found.items()}
    where = f"With {of.kv_tokens:,} KV tokens on the GPU and a CPU that attends at {of.speed}% of its speed"
    if first == "gpu_only":
        return (f"{where}, the GPU alone is the fastest with {rates[first]:.0f} tokens a second: the best that uses the CPU, {second}, "
                f"makes {percent(1 - rates[second] / rates[first])} fewer (simulated)")  # fmt: skip
    ahead = rates[first] / rates[second] - 1
    beside = "" if second == "gpu_only" else f", {percent(ahead)} more than {second}" if ahead >= 0.005 else f", as many as {second}"
    return (f"{where}, {first} makes {rates[first]:.0f} tokens a second: {rates[first] / rates['gpu_only']:.1f} times those of the GPU "
            f"alone{beside} (simulated)")  # fmt: skip


def rates_chart(of: Machine, found: Mapping[str, Served], chosen: Sequence[str]) -> Any:
    """Output tokens a second by placement; the two that are compared below stand out."""
    import altair as alt

    c = roles()
    rows: list[dict[str, Any]] = [{"placement": name, "x": one.rate, "label": f"{one.rate:.1f}", "now": name in chosen} for name, one in found.items()]
    y = alt.Y("placement:N", sort=list(found), title=None, axis=alt.Axis(labelFontSize=13, grid=False))
    x = alt.X("x:Q", title="output tokens per second", axis=alt.Axis(tickCount=8),
              scale=alt.Scale(domain=[0, 1.08 * max(row["x"] for row in rows)], nice=False))  # fmt: skip
    faint = alt.condition("datum.now", alt.value(1.0), alt.value(0.4))
    bars = alt.Chart(data(rows)).mark_bar(color=c.decode, cornerRadiusEnd=3).encode(x=x, y=y, opacity=faint)
    text = alt.Chart(data(rows)).mark_text(align="left", dx=6).encode(x=x, y=y, text="label:N")
    between = "Tokens per second between 30% and 70% of all tokens; the two that are compared below stand out"
    return alt.layer(bars, text).properties(width=WIDTH, height=36 * len(rows), title=title(finding(of, found), SETTING, between))


def glimpse_finding(placement: str, seen: Glimpse) -> str:
    """Two iterations in one sentence."""
    return f"{placement}: {seconds(seen.length / 2e3)} an iteration, worth {seen.worth / seen.length * 1e3:.0f} tokens/s"


def gantt(placement: str, seen: Glimpse, until: float) -> Any:
    """Who works when in two iterations, up to `until` (ms): give both placements the same. A lane's name says what share of the
    whole time it was busy."""
    import altair as alt

    c = roles()
    colours = {LINEAR: c.decode, ATTENTION: c.prefill, WHOLE: c.decode, COPY: c.transfer}
    lanes = {lane: f"{lane} {percent(seen.busy(lane))}" for lane in LANES.values()}
    shown = [msgspec.structs.replace(bar, end=min(bar.end, until)) for bar in seen.bars if bar.start < until]
    rows = [{"lane": lanes[b.lane], "kind": b.kind, "t0": b.start, "t1": b.end, "lasts": seconds((b.end - b.start) / 1e3)} for b in shown]
    present = [kind for kind in KINDS if any(bar.kind == kind for bar in seen.bars)]
    bars = alt.Chart(data(rows)).mark_bar(height=24).encode(
        x=alt.X("t0:Q", title="ms", scale=alt.Scale(domain=[0, until], nice=False), axis=alt.Axis(tickCount=6)), x2="t1:Q",
        y=alt.Y("lane:N", title=None, scale=alt.Scale(domain=list(lanes.values())), axis=alt.Axis(grid=False, minExtent=138, labelFontSize=12)),
        color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=present, range=[colours[kind] for kind in present])),
        tooltip=[alt.Tooltip("lane:N", title="resource"), alt.Tooltip("kind:N", title="does"), alt.Tooltip("lasts:N", title="for")],
    )  # fmt: skip
    rows_of = f"{count(seen.near, 'row')} on the GPU and {seen.away} on the host"
    way = "; a host row passes one layer in each" if seen.mode == "async_overlap" else ""
    notes = (f"Simulated: two iterations with {rows_of}{way}", f"Mode: {seen.mode}" if seen.mode else "",
             "Shares: how busy over both")  # fmt: skip
    return bars.properties(width=WIDTH // 2, height=160, title=title(glimpse_finding(placement, seen), *notes))


def latency_finding(found: Mapping[str, Served], chosen: Sequence[str]) -> str:
    """What living on the host costs a request, in one sentence."""
    told = []
    for name in dict.fromkeys(chosen):
        middle = {where: values[len(values) // 2] for where, values in found[name].tpot.items()}
        if "GPU" in middle and "CPU" in middle:
            told.append(f"under {name} a token takes {seconds(middle['GPU'])} on the GPU and {seconds(middle['CPU'])} on the host")
        else:
            told.append(f"under {name} it takes {' or '.join(f'{seconds(t)} ({LIVED[where]})' for where, t in middle.items())}")
    return f"Latency, the median request: {'; '.join(told)} (simulated)"


def latency_chart(found: Mapping[str, Served], chosen: Sequence[str]) -> Any:
    """Seconds per token by where a request lived from its first token to its last: a dot at the median, a bar from P5 to P95."""
    import altair as alt

    c = roles()
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(chosen):
        for where, values in sorted(found[name].tpot.items(), key=lambda one: list(LIVED).index(one[0])):
            low, middle, high = (values[min(len(values) - 1, int(q * len(values)))] for q in (0.05, 0.5, 0.95))
            rows.append({"row": f"{name}, {LIVED[where]}", "low": low, "x": middle, "high": high, "where": LIVED[where],
                         "label": f"{seconds(middle)}, {len(values)} requests"})  # fmt: skip
    y = alt.Y("row:N", sort=[row["row"] for row in rows], title=None, axis=alt.Axis(grid=False, labelFontSize=13, labelLimit=200))
    colour = alt.Color("where:N", legend=None, scale=alt.Scale(domain=list(LIVED.values()), range=[c.decode, c.transfer, c.prefill]))
    axis = alt.Axis(values=[0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], format="~g")
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    x = alt.X("low:Q", title="seconds per token (logarithmic)", axis=axis, scale=alt.Scale(type="log", domain=[low / 1.2, high * 3.2], nice=False))
    bars = alt.Chart(data(rows)).mark_bar(height=12, opacity=0.45, cornerRadius=4).encode(x=x, x2="high:Q", y=y, color=colour)
    dots = alt.Chart(data(rows)).mark_point(filled=True, size=110, opacity=1).encode(x="x:Q", y=y, color=colour)
    text = alt.Chart(data(rows)).mark_text(align="left", dx=8).encode(x="high:Q", y=y, text="label:N")
    waits = ", ".join(f"{name} {seconds(found[name].ttft)}" for name in dict.fromkeys(chosen))
    return alt.layer(bars, dots, text).properties(width=WIDTH, height=36 * len(rows), title=title(
        latency_finding(found, chosen), "Time per token after the first; a dot is the median request, its bar goes from P5 to P95",
        f"Before that, the mean time to the first token: {waits}"))  # fmt: skip
