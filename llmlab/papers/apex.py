"""CPU and GPU in parallel: APEX's asynchronous overlap beside NEO's pipeline, FastDecode and the GPU alone.

Three kinds of numbers, all simulated. *Steady state*: a fixed set of decodes, the real placement policies and the real
timelines, step after step; cheap, so that whole maps can be drawn, and comparable with formulas by hand. *Closed loop*:
whole requests through the whole engine, prompts and memory pressure included, APEX with chunks as it wishes them, each other
placement with the step rule that suits it best. *Boundary*: the pipeline forced, and the CPU speed found at which it equals the GPU alone. CPU speed is attention
on the CPU over attention on the GPU ("8%").
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from msgspec.structs import replace

import llmlab
from llmlab.config import EngineConfig
from llmlab.events import catalog as ev
from llmlab.execution.cost import RooflineCost
from llmlab.execution.opgraph import Pending
from llmlab.execution.overlap import Overlap
from llmlab.execution.timelines import Timelines
from llmlab.papers import Finding, Progress, Report, Table
from llmlab.runs import Run
from llmlab.scheduling.placement import PLACEMENTS
from llmlab.scheduling.placement_modes import Overlapped, Pipelined, Weigher
from llmlab.scheduling.placement_times import Times
from llmlab.seams import EngineView, Limits, Placed, PoolView, Rehome, RequestView
from llmlab.types import Cost, Request, ResourceSpan, SamplingParams, Span, Status, WorkItem
from llmlab.workloads.source import Load
from roofline import shapes

NAMES = ("gpu_only", "fastdecode", "neo", "apex")
BLOCK = 16
KV_T4 = 864  # KV tokens on the T4 (NEO's configuration, which APEX takes over)
OSC = {"prompt": (210, 536), "output": (31, 59)}  # means 373 and 45: OpenAI summaries in NEO's file
OSC_KV = 395  # tokens that a decode of these sees in the middle of its life
SPEEDS = (2, 5, 8, 10, 20, 40)  # % of the GPU's attention
BUDGETS = (432, 864, 1728, 3456, 6912)  # KV tokens on the GPU
A10 = {"hardware": "a10", "model": "llama-3.1-8b", "kv_tokens": 26_400, "host_tokens": 900_000, "prompt": (900, 1100),
       "clients": 260}  # fmt: skip
OUTPUTS = {(45, 55): 420, (180, 220): 420, (450, 550): 340, (900, 1100): 300}  # tokens out on the A10, and how many requests
A10_SPEED = 8.0
FEW = {"clients": 112, "num_requests": 450}  # on the T4: too few for overlap where the CPU is fast
# APEX over NEO on the A10, as the authors have it, for outputs up to so many tokens.
PUBLISHED = ((200, "about +5 %"), (500, "+17 to +31 %"), (1 << 30, "up to +37 %"))


# ------------------------------------------------------------------------------------ steady state
class Fleet(NamedTuple):
    """A fixed set of decodes: `near` with their KV on the device, `away` on the host, `kv` tokens each."""

    model: str
    hardware: str
    speed: float  # % of the device's attention
    near: int
    away: int
    kv: int


class Steady(NamedTuple):
    """What a placement makes of a fleet: output tokens per second, how often each mode was chosen, spans of the last steps."""

    rate: float
    modes: dict[str, int]
    spans: tuple[ResourceSpan, ...]
    num_layers: int


@lru_cache(maxsize=64)
def _cost(model: str, hardware: str, speed: float) -> RooflineCost:
    return RooflineCost(shapes.get(model), hardware, BLOCK, None, f"{speed}%")


class _Request(NamedTuple):
    """One decode of a fleet: everything but its cursor stays as it is."""

    view: RequestView
    item: WorkItem


def _requests(fleet: Fleet) -> list[_Request]:
    found = []
    for number in range(fleet.near + fleet.away):
        home = "device" if number < fleet.near else "cpu"
        request = Request(f"r{number}", number, (0,), SamplingParams(), max_total_tokens=1 << 20)
        view = RequestView(f"r{number}", number, float(number), 0, Status.RUNNING, 1, fleet.kv, fleet.kv - 1, 0,
                           -(-fleet.kv // BLOCK), 0, request, home)  # type: ignore[arg-type]  # fmt: skip
        found.append(_Request(view, WorkItem(f"r{number}", Span(fleet.kv - 1, fleet.kv), home=home)))  # type: ignore[arg-type]
    return found


def _nothing(option: str, items: Sequence[WorkItem]) -> Cost:
    return Cost(0.0)


def staggered(number: int) -> int:
    """The layer at which host row `number` begins: they are spread over all, as they would be after a while."""
    return number


def together(number: int) -> int:
    """All host rows pass the same layer at the same time."""
    return 0


def steady(placement: Any, fleet: Fleet, passes: int = 2, begin: Callable[[int], int] = staggered) -> Steady:
    """Steps of `fleet` under a placement, as many as a row needs that passes one layer a step to make `passes` tokens; the first
    of them is not counted. No memory is short and nobody moves, so that only the choice of modes and the timelines speak."""
    costs = _cost(fleet.model, fleet.hardware, fleet.speed).layers()
    requests = _requests(fleet)
    cursors: dict[str, int] = {}
    for number in range(fleet.near + fleet.away):
        cursors[f"r{number}"] = 0 if number < fleet.near else begin(number) % (costs.num_layers + 1)
    overlap = Overlap(costs, 0.0, Timelines(), Pending())
    steps = passes * (costs.num_layers + 1)
    clock, tokens, began, kept = 0.0, 0, 0.0, 0
    modes: dict[str, int] = {}
    spans: list[ResourceSpan] = []
    for step in range(steps):
        placed = _place(placement, fleet, requests, cursors, costs, step, clock)
        clock = overlap.place(placed.items, (), clock)
        overlap._timelines.free["device"] = clock
        modes[placed.mode] = modes.get(placed.mode, 0) + 1
        spans = [*(spans if step == steps - 1 else []), *overlap.spans]
        for item in placed.items:
            cursors[item.request] = item.layers[1] if item.halfway and item.layers is not None else 0
        tokens += sum(item.emit == "sample" for item in placed.items)
        if step == costs.num_layers:
            began, kept = clock, tokens
    return Steady((tokens - kept) / (clock - began), modes, tuple(spans), costs.num_layers)


def _place(placement: Any, fleet: Fleet, requests: Sequence[_Request], cursors: dict[str, int], costs: Any, step: int,
           clock: float) -> Placed:  # fmt: skip
    running = tuple(replace(r.view, cursor=cursors[r.view.id]) if cursors[r.view.id] else r.view for r in requests)
    pool = PoolView(1 << 20, 0, 0, 1 << 20, 1 << 19, BLOCK)
    view = EngineView(clock, step, (), 0, running, pool, Limits(4096, 1 << 20, 1 << 20), _nothing, True, costs)
    answer = placement.place(view, [r.item for r in requests])
    return answer if isinstance(answer, Placed) else Placed(tuple(answer), mode="as it is")


class Alone(Pipelined):
    """The device alone: host rows wait for ever."""

    name = "alone"

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        return Placed(near, moves, "gpu_only")


class Forced(Pipelined):
    """The pipeline, whatever it promises."""

    name = "forced"

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        return Placed((*near, *weigher.in_lanes(weigher.lanes())), moves, "asym_pipeline")


class Waiting(Pipelined):
    """One batch, and the device waits for the CPU in every layer: overlap without the late wait."""

    name = "waiting"

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        return Placed((*near, *(replace(item, device="cpu") for item in weigher.work.away)), moves, "waits in every layer")


class ByRows(Pipelined):
    """NEO with a rate that counts every row of the linears, tokens of prompts too, as its code does; `neo` counts what comes out."""

    name = "neo by rows"

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        lanes = weigher.lanes()
        alone, pipeline = weigher.device_alone(), weigher.asymmetric(lanes)
        if lanes.chosen and (weigher.tokens + len(lanes.chosen)) * alone.seconds > weigher.tokens * pipeline.seconds:
            return Placed((*near, *weigher.in_lanes(lanes)), moves, pipeline.name)
        return Placed(near, moves, alone.name)


class OverlapOnly(Overlapped):
    """Overlap whenever there is a CPU row: no choice of mode."""

    name = "overlap_only"

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        return Placed((*near, *weigher.layer_by_layer(weigher.overlapping())), moves, "async_overlap")


def policy(name: str) -> Any:
    return Alone() if name == "gpu_only" else PLACEMENTS.resolve(name)


def fleet_of(speed: float, budget: int, kv: int = OSC_KV, model: str = "llama-2-7b", hardware: str = "t4") -> Fleet:
    """As many rows on the device as fit, and as many on the host as the CPU can serve in one pass of the device, and a third
    more."""
    near = max(1, budget // kv)
    times = Times(_cost(model, hardware, speed).layers())
    rows = [WorkItem("", Span(kv - 1, kv))] * near
    layer = times.linears(near) + times.attention(rows)
    served = times.costs.num_layers * layer / (times.row(rows[0]) + 1e-12)
    return Fleet(model, hardware, speed, near, min(1500, int(1.33 * served) + 8), kv)


# ---------------------------------------------------------------------------------------- by hand
class ByHand(NamedTuple):
    """Tokens per second of one layer's formulas, times 1 / L: GPU alone G, pipeline rows / (2 T_gl + T_ga) + C, overlap G + C."""

    gpu_only: float
    asym_pipeline: float
    async_overlap: float


def by_hand(fleet: Fleet) -> ByHand:
    times = Times(_cost(fleet.model, fleet.hardware, fleet.speed).layers())
    row = WorkItem("", Span(fleet.kv - 1, fleet.kv))
    linear, attention = times.linears(fleet.near), times.attention([row] * fleet.near)
    layers = times.costs.num_layers
    cpu = 1 / (layers * times.row(row))
    return ByHand(fleet.near / (layers * (linear + attention)), fleet.near / (layers * (2 * linear + attention)) + cpu,
                  fleet.near / (layers * (linear + attention)) + cpu)  # fmt: skip


def by_hand_with_prompts(fleet: Fleet, prompt: int, output: int, chunk: int) -> ByHand:
    """The same for whole requests, prompts in chunks of `chunk` tokens: each token that comes out has `prompt / output` tokens of
    prompt behind it, whose linears take device time from the steps, and each prompt yields one token of its own."""
    times = Times(_cost(fleet.model, fleet.hardware, fleet.speed).layers())
    layers, alone = times.costs.num_layers, by_hand(fleet)
    per_token = layers * (times.linears(chunk + fleet.near) - times.linears(fleet.near)) / chunk
    cpu = alone.async_overlap - alone.gpu_only

    def rate(plain: float, added: float) -> float:  # rate = plain (1 - rate prompts) + added + rate / output
        return (plain + added) / (1 - 1 / output + plain * per_token * prompt / output)

    return ByHand(rate(alone.gpu_only, 0.0), rate(alone.asym_pipeline - cpu, cpu), rate(alone.gpu_only, cpu))


class Crossing(NamedTuple):
    """Where the pipeline equals the GPU alone: T_ga / T_gl, N_G / N_C as simulated and by eq. 6."""

    share: float
    simulated: float
    equation: float


def crossing(near: int, kv: int, model: str = "llama-2-7b", hardware: str = "t4") -> Crossing:
    """By bisection over the CPU's speed."""
    low, high = 0.5, 100.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        fleet = Fleet(model, hardware, round(middle, 4), near, 300, kv)
        ahead = steady(Forced(), fleet).rate > steady(Alone(), fleet._replace(away=0)).rate
        low, high = (low, middle) if ahead else (middle, high)
    times = Times(_cost(model, hardware, round(high, 4)).layers())
    rows = [WorkItem("", Span(kv - 1, kv))] * near
    linear, attention = times.linears(near), times.attention(rows)
    ratio = near * kv / attention * times.per_token
    return Crossing(attention / linear, ratio, 2 * linear / attention + 3 + attention / linear)


# ------------------------------------------------------------------------------------- closed loop
class Loop(NamedTuple):
    """One closed-loop run: output tokens/s between 30 % and 70 % of all tokens, and seconds per token by where a request
    lived throughout."""

    rate: float
    modes: dict[str, int]
    tpot: dict[str, tuple[float, ...]]
    run: Run


class Rule(NamedTuple):
    """How steps are filled: a composer and the most tokens of a step (rows on the host count, whether they pass or not)."""

    composer: str = "chunked"
    tokens: int = 512

    def __str__(self) -> str:
        return f"{self.composer}, {self.tokens}"


CHUNKED, LONG, SPREAD = Rule(), Rule(tokens=1024), Rule("spread")
FAR = ("gpu_only", "neo", ByRows.name, "apex")  # on the A10, and with few clients
# What each placement is tried with. Apex is judged by chunks as it wishes them, every other one by what suits it best.
RULES = {"gpu_only": (CHUNKED, LONG, SPREAD), "fastdecode": (CHUNKED,), "neo": (CHUNKED, LONG, SPREAD), ByRows.name: (CHUNKED, LONG), "apex": (CHUNKED, LONG, SPREAD),
         "overlap_only": (SPREAD,)}  # fmt: skip


def loop_config(placement: Any, speed: float, *, hardware: str = "t4", model: str = "llama-2-7b", kv_tokens: int = KV_T4,
                host_tokens: int = 128_000, log_level: int = 1, log_capacity: int = 4_000_000, rule: Rule = CHUNKED) -> EngineConfig:  # fmt: skip
    """The engine of a closed loop. The GPU alone gets chunked prefill and the cheaper of swapping and recomputing: the honest
    baseline."""
    return EngineConfig(
        model=model, executor="sim", hardware=hardware, host=f"{speed:g}%", block_size=BLOCK, num_blocks=kv_tokens // BLOCK,
        num_host_blocks=host_tokens // BLOCK, max_num_seqs=384, max_num_batched_tokens=rule.tokens, composer=rule.composer,
        placement=placement, tiering="cheapest", enable_prefix_caching=False, log_level=log_level, check_interval=0,
        log_capacity=log_capacity,
    )  # fmt: skip


def loop_load(num_requests: int = 450, clients: int = 224, prompt: Any = OSC["prompt"], output: Any = OSC["output"]) -> Load:
    """Clients that ask again as soon as they are answered."""
    return llmlab.Workload.poisson(rate=1e6, n=num_requests, prompt=prompt, output=output, seed=1).closed_loop(clients)


def closed_loop(placement: Any, speed: float, *, hardware: str = "t4", model: str = "llama-2-7b", kv_tokens: int = KV_T4,
                host_tokens: int = 128_000, num_requests: int = 450, clients: int = 224, prompt: Any = OSC["prompt"],
                output: Any = OSC["output"], log_level: int = 1, rule: Rule = CHUNKED) -> Loop:  # fmt: skip
    """`loop_load` through the engine of `loop_config`."""
    config = loop_config(placement, speed, hardware=hardware, model=model, kv_tokens=kv_tokens, host_tokens=host_tokens,
                         log_level=log_level, rule=rule)  # fmt: skip
    run = llmlab.run(config, loop_load(num_requests, clients, prompt, output))
    modes: dict[str, int] = {}
    for decision in run.events("Decision"):
        if decision.seam == "placement":
            modes[decision.chosen] = modes.get(decision.chosen, 0) + 1
    return Loop(window_rate(run), modes, _latencies(run), run)


def window_rate(run: Run, low: float = 0.3, high: float = 0.7) -> float:
    """Output tokens per second between the instants at which `low` and `high` of all were there."""
    times: list[float] = []
    for event in run.log_events:
        if isinstance(event, ev.TokensReleased):
            times += event.times or [event.t] * len(event.token_ids)
    times.sort()
    first, last = int(low * len(times)), int(high * len(times))
    return (last - first) / (times[last] - times[first])


def _latencies(run: Run) -> dict[str, tuple[float, ...]]:
    homes: dict[str, set[str]] = {}
    for event in run.log_events:
        if isinstance(event, (ev.RequestAdmitted, ev.RequestRehomed, ev.RequestResumed)):
            homes.setdefault(event.request or "", set()).add("GPU" if event.home == "device" else "CPU")
    found: dict[str, list[float]] = {}
    for name, metrics in run.requests.items():
        if metrics.tpot is not None:
            lived = homes.get(name, set())
            found.setdefault(lived.pop() if len(lived) == 1 else "both", []).append(metrics.tpot)
    return {where: tuple(sorted(values)) for where, values in sorted(found.items())}


# -------------------------------------------------------------------------------------- experiment
class Cell(NamedTuple):
    """One point of the map."""

    speed: float
    budget: int
    rates: dict[str, float]
    hand: ByHand
    modes: dict[str, int]

    @property
    def best_other(self) -> float:
        return max(rate for name, rate in self.rates.items() if name != "apex")


def cell(speed: float, budget: int) -> Cell:
    fleet = fleet_of(speed, budget)
    found = {name: steady(policy(name), fleet if name != "gpu_only" else fleet._replace(away=0)) for name in NAMES}
    return Cell(speed, budget, {name: s.rate for name, s in found.items()}, by_hand(fleet), found["apex"].modes)


class Tried(NamedTuple):
    """One closed loop: which placement, under which rule, with a CPU at `speed` %, tokens out (the A10), and what it gave."""

    name: str
    rule: Rule
    speed: float
    output: tuple[int, int] | None
    loop: Loop

    @property
    def counts(self) -> bool:
        """Whether its placement may be judged by it."""
        return self.name != "apex" or self.rule != SPREAD

    @property
    def system(self) -> str:
        """NEO is one system, however it counts."""
        return "neo" if self.name == ByRows.name else self.name


class Trials(NamedTuple):
    """All closed loops: Llama-2-7B on the T4, with many clients and with `few`, Llama-3.1-8B on the A10."""

    t4: tuple[Tried, ...] = ()
    few: tuple[Tried, ...] = ()
    a10: tuple[Tried, ...] = ()

    def best(self, name: str, speed: float) -> Tried:
        """On the T4, the placement under the rule that it is judged by."""
        return _best(self.t4, name, speed)

    def far(self, output: tuple[int, int]) -> dict[str, Tried]:
        """On the A10: each placement under the rule that it is judged by."""
        tried = [t for t in self.a10 if t.output == output]
        return {name: _best(tried, name, A10_SPEED) for name in dict.fromkeys(t.system for t in tried)}

    def by_hand(self) -> float:
        """How much more than with the chunks it wishes apex makes where prompts are spread by hand, at most."""
        pairs = [(a.loop.rate, b.loop.rate) for group in (self.t4, self.few, self.a10) for a in group for b in group
                 if a.name == b.name == "apex" and a.rule == CHUNKED and b.rule == SPREAD and (a.speed, a.output) == (b.speed, b.output)]  # fmt: skip
        return max((spread / wished for wished, spread in pairs), default=0.0)


def _best(tried: Sequence[Tried], name: str, speed: float) -> Tried:
    return max((t for t in tried if t.system == name and t.speed == speed and t.counts), key=lambda t: t.loop.rate)


def trials(quick: bool, progress: Progress) -> Trials:
    """Everything in whole requests; `quick`: nothing."""
    if quick:
        return Trials()
    near = _on_t4(tuple(RULES), lambda done, said: progress(0.1 + 0.25 * done, f"T4, closed loop: {said}"))
    few = _on_t4(FAR, lambda done, said: progress(0.35 + 0.1 * done, f"T4, {FEW['clients']} clients: {said}"), **FEW)
    far = [(name, rule, output) for output in OUTPUTS for name in FAR for rule in (CHUNKED, SPREAD)]
    other: list[Tried] = []
    for i, (name, rule, output) in enumerate(far):
        progress(0.45 + 0.55 * i / len(far), f"A10, closed loop: {name}, {rule}, {output[0]} to {output[1]} tokens out")
        loop = closed_loop(_placement(name), A10_SPEED, rule=rule, output=output, num_requests=OUTPUTS[output], **A10)  # type: ignore[arg-type]
        other.append(Tried(name, rule, A10_SPEED, output, _lean(loop)))
    return Trials(tuple(near), tuple(few), tuple(other))


def _on_t4(names: Sequence[str], progress: Progress, **load: int) -> list[Tried]:
    """Each placement under each of its rules. The GPU alone asks nothing of the CPU, so its speed does not matter."""
    todo = [(name, rule, speed) for speed in (5.0, 8.0, 10.0) for name in names for rule in RULES[name]]
    found: list[Tried] = []
    alone: dict[Rule, Loop] = {}
    for i, (name, rule, speed) in enumerate(todo):
        progress(i / len(todo), f"{name}, {rule}, CPU at {speed:g} %")
        loop = alone.get(rule) if name == "gpu_only" else None
        if loop is None:
            loop = _lean(closed_loop(_placement(name), speed, rule=rule, **load))  # type: ignore[arg-type]
        if name == "gpu_only":
            alone[rule] = loop
        found.append(Tried(name, rule, speed, None, loop))
    return found


def _placement(name: str) -> Any:
    return OverlapOnly() if name == OverlapOnly.name else ByRows() if name == ByRows.name else name


def _lean(loop: Loop) -> Loop:
    """Without the log, which would hold on to every event of every run."""
    return loop._replace(run=None)  # type: ignore[arg-type]


def run(quick: bool, progress: Progress) -> Report:
    speeds, budgets = (SPEEDS[::2], BUDGETS[1::3]) if quick else (SPEEDS, BUDGETS)
    cells = []
    for i, speed in enumerate(speeds):
        progress(0.07 * i / len(speeds), f"map: CPU at {speed} %")
        cells += [cell(speed, budget) for budget in budgets]
    progress(0.07, "boundary of eq. 6")
    crossings = [crossing(near, kv) for near, kv in ((64, 250), (64, 1000), (64, 500), (32, 1000))[: 2 if quick else 4]]
    progress(0.09, "what each part is worth")
    parts = ablation()
    tried = trials(quick, progress)
    return Report(
        "apex", "CPU and GPU in parallel: asynchronous overlap (APEX) beside NEO, FastDecode and the GPU alone",
        f"simulated: Llama-2-7B fp16 on a T4, {KV_T4} KV tokens in its memory unless said otherwise, lengths of OSC (373 in, 45 out); "
        "seed 1", tuple(findings(cells, crossings, tried)), tuple(tables(cells, crossings, parts, tried)),
        figures(cells, crossings, parts, tried),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- ablation
class Part(NamedTuple):
    """A system with or without a part of the mechanism: tokens/s in the steady state."""

    name: str
    without: str
    rate: float


def ablation(speed: float = 8.0, budget: int = KV_T4) -> list[Part]:
    """Overlap taken apart, decodes only. The authors' CPU kernel is not here, so its bar is missing."""
    fleet = fleet_of(speed, budget)
    return [
        Part("GPU alone", "host rows wait for ever", steady(Alone(), fleet._replace(away=0)).rate),
        Part("waits in every layer", "no late wait: one batch, joined in the layer itself", steady(Waiting(), fleet).rate),
        Part("batch cut in two", "no unified batch: the pipeline, always", steady(Forced(), fleet).rate),
        Part("NEO", "no overlap: the pipeline or the GPU alone", steady(policy("neo"), fleet).rate),
        Part("no cohorts", "all host rows at the same layer", steady(policy("apex"), fleet, begin=together).rate),
        Part("no choice of mode", "always overlap", steady(OverlapOnly(), fleet).rate),
        Part("APEX", "all of it", steady(policy("apex"), fleet).rate),
    ]


def findings(cells: Sequence[Cell], crossings: Sequence[Crossing], tried: Trials) -> list[Finding]:
    found = _loop_findings(tried)
    worst = min(c.rates["apex"] / c.best_other for c in cells)
    found.append(Finding("chooses a mode by predicted times, so it should never be the worse choice",
                         f"in {len(cells)} cells of the map at least {worst:.3f} times the best of the others",
                         "simulated", worst >= 0.98))  # fmt: skip
    away = max(abs(c.rates["gpu_only"] / c.hand.gpu_only - 1) for c in cells)
    over = [c for c in cells if set(c.modes) == {"async_overlap"}]
    apart = max((abs(c.rates["apex"] / c.hand.async_overlap - 1) for c in over), default=0.0)
    found.append(Finding("steady state by hand: GPU alone G, overlap G + C",
                         f"G within {away:.1%}; G + C within {apart:.1%} in the {len(over)} cells that overlap throughout",
                         "simulated", away <= 0.1 and apart <= 0.1))  # fmt: skip
    off = max(abs(c.simulated / c.equation - 1) for c in crossings)
    found.append(Finding("eq. 6: the pipeline beats the GPU alone while N_G/N_C < 2 T_gl/T_ga + 3 + T_ga/T_gl",
                         f"simulated boundary within {off:.1%} at {len(crossings)} points", "simulated", off <= 0.1))  # fmt: skip
    return found


def _loop_findings(tried: Trials) -> list[Finding]:
    found = []
    for speed in dict.fromkeys(t.speed for t in tried.t4):
        rate = {name: tried.best(name, speed).loop.rate for name in NAMES}
        gains = rate["apex"] / rate["neo"], rate["apex"] / rate["gpu_only"]
        hand = by_hand_with_prompts(Fleet("llama-2-7b", "t4", speed, 2, 0, OSC_KV), 373, 45, 144)
        found.append(Finding("T4, closed loop: up to +72 % over NEO (+49 % in an earlier version), +84..96 % over vLLM",
                             f"CPU at {speed:g} %: {gains[0] - 1:+.0%} over NEO (by the formulas "
                             f"{hand.async_overlap / hand.asym_pipeline - 1:+.0%}), {gains[1] - 1:+.0%} over the GPU alone",
                             "simulated", gains[0] >= 1.12 and gains[1] >= 1.5))  # fmt: skip
    if tried.few:
        found += [_few_finding(tried.few), Finding(
            "chunks of prompts suit the mode without anybody's choosing",
            f"prompts spread by hand give at most {tried.by_hand():.3f} times what the chunks give that the placement wishes",
            "simulated", tried.by_hand() <= 1.02)]  # fmt: skip
    for output in OUTPUTS if tried.a10 else ():
        rate, middle = {name: t.loop.rate for name, t in tried.far(output).items()}, sum(output) // 2
        published = next(said for most, said in PUBLISHED if middle <= most)
        least = 0.98 if middle <= 200 else 1.15
        found.append(Finding(f"A10, outputs of {middle}: {published} over NEO; +11..89 % over vLLM over all loads",
                             f"CPU at {A10_SPEED:g} %: {rate['apex'] / rate['neo'] - 1:+.1%} over NEO, "
                             f"{rate['apex'] / rate['gpu_only'] - 1:+.1%} over the GPU alone", "simulated",
                             rate["apex"] / rate["neo"] >= least and rate["apex"] >= 0.98 * rate["gpu_only"]))  # fmt: skip
    return found


def _few_finding(few: Sequence[Tried]) -> Finding:
    ratios = {speed: _best(few, "apex", speed).loop.rate / max(_best(few, name, speed).loop.rate for name in ("gpu_only", "neo"))
              for speed in dict.fromkeys(t.speed for t in few)}  # fmt: skip
    said = ", ".join(f"{ratio:.2f} at {speed:g} %" for speed, ratio in ratios.items())
    return Finding(f"few clients ({FEW['clients']} on the T4): overlap lacks rows where the CPU is fast, and never should apex be the worse choice",
                   f"times the best of the others, by the CPU's speed: {said}", "simulated", min(ratios.values()) >= 0.98)  # fmt: skip


def tables(cells: Sequence[Cell], crossings: Sequence[Crossing], parts: Sequence[Part], tried: Trials) -> list[Table]:
    rows = tuple((f"{c.speed} %", f"{c.budget:,}", *(f"{c.rates[name]:.0f}" for name in NAMES),
                  f"{c.rates['apex'] / c.rates['neo']:.2f}", f"{c.rates['apex'] / c.best_other:.3f}",
                  max(c.modes, key=lambda m: c.modes[m])) for c in cells)  # fmt: skip
    bound = tuple((f"{c.share:.2f}", f"{c.simulated:.2f}", f"{c.equation:.2f}", f"{c.simulated / c.equation - 1:+.1%}") for c in crossings)
    pieces = tuple((part.name, part.without, f"{part.rate:.1f}", f"{part.rate / parts[-1].rate:.2f}") for part in parts)
    return [
        Table("Steady state: output tokens/s by CPU speed and KV tokens on the GPU",
              ("CPU", "KV", *NAMES, "apex/neo", "apex/best other", "mode"), rows, "simulated; decodes only"),
        Table(f"What each part is worth, CPU at 8 %, {KV_T4} KV tokens", ("system", "what differs", "tokens/s", "of APEX"), pieces,
              "simulated; decodes only, where overlap is the best mode throughout: the choice of mode pays with prompts, see the closed loop"),
        *_loop_tables(tried),
        Table("Where the pipeline begins to beat the GPU alone", ("T_ga/T_gl", "N_G/N_C simulated", "eq. 6", "apart"), bound, "simulated"),
    ]  # fmt: skip


def _loop_tables(tried: Trials) -> list[Table]:
    if not tried.t4:
        return []
    near, few = (tuple((f"{t.speed:g} %", t.name, str(t.rule), f"{t.loop.rate:.1f}",
                        f"{t.loop.rate / _best(group, 'gpu_only', t.speed).loop.rate:.2f}",
                        *(_quantiles(t.loop.tpot.get(where, ())) for where in ("GPU", "both", "CPU"))) for t in group)
                 for group in (tried.t4, tried.few))  # fmt: skip
    columns = ("CPU", "placement", "steps", "tokens/s", "over GPU alone", "GPU rows", "moved", "CPU rows")
    far = tuple(_far_row(output, tried.far(output)) for output in OUTPUTS)
    return [
        Table("T4, closed loop: output tokens/s, and milliseconds per token (P50, P95) by where requests lived",
              columns, near, "simulated; steps: composer and most tokens of one"),
        Table(f"T4, closed loop with {FEW['clients']} clients", columns, few, "simulated; the same"),
        Table(f"A10, Llama-3.1-8B, {A10['kv_tokens']:,} KV tokens, 900 to 1,100 in, CPU at {A10_SPEED:g} %, closed loop: output tokens/s",
              ("tokens out", "gpu_only", "neo", "apex", "apex/neo", "apex/best other", "the authors', over neo"), far,
              "simulated; apex as it wishes, the others with the better of two ways to fill steps: c chunks of 512, s spread"),
    ]  # fmt: skip


def _far_row(output: tuple[int, int], best: dict[str, Tried]) -> tuple[str, ...]:
    rate = {name: t.loop.rate for name, t in best.items()}
    published = next(said for most, said in PUBLISHED if sum(output) // 2 <= most)
    return (f"{output[0]}-{output[1]}", *(f"{rate[name]:.1f} {best[name].rule.composer[0]}" for name in ("gpu_only", "neo", "apex")),
            f"{rate['apex'] / rate['neo']:.2f}", f"{rate['apex'] / max(rate['neo'], rate['gpu_only']):.3f}", published)  # fmt: skip


def _quantiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "-"
    cuts = statistics.quantiles(values, n=20)
    return f"{cuts[9] * 1e3:.0f}, {cuts[18] * 1e3:.0f}"


def figures(cells: Sequence[Cell], crossings: Sequence[Crossing], parts: Sequence[Part], tried: Trials) -> dict[str, Any]:
    from llmlab.ui import overlap

    def gantt() -> Any:
        fleet = fleet_of(8, KV_T4)
        return overlap.two_gantts({"NEO": steady(policy("neo"), fleet), "APEX": steady(policy("apex"), fleet)})

    points = [(c.share, c.simulated) for c in crossings]
    gains = [(c.speed, c.budget, c.rates["apex"] / c.best_other, max(c.modes, key=lambda m: c.modes[m])) for c in cells]
    drawn = {"iterations": gantt, "map": partial(overlap.gain_map, gains), "boundary": partial(overlap.boundary, points),
             "ablation": partial(overlap.ablation, parts)}  # fmt: skip
    if tried.a10:
        lines = [(sum(output) / 2, name, t.loop.rate) for output in OUTPUTS for name, t in tried.far(output).items()]
        drawn["outputs"] = partial(overlap.by_output, lines)
    return drawn
