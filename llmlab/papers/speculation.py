"""Speculative decoding: how much it gains by batch, acceptance and draft length, and where it stops paying.

The acceptance of each position is recorded from the lab's own pair, really run on three kinds of problems, and then charged
to shapes of production size on simulated devices: Llama-3.1-8B with Llama-3.2-1B. Beside it the wall clock of this CPU, with
the sources that the lab model has: a small model, trained heads, n-grams, its own first layers; with fixed lengths, and with those that the policies
choose. Sources: Leviathan et al., arXiv 2211.17192 (equation
1, the gain of one stream); EAGLE, arXiv 2401.15077, for drafting from the target's states; and CoSine, arXiv 2503.10325, for the
question of who waits for whom.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from llmlab import tasks
from llmlab.config import EngineConfig
from llmlab.decoding.draft_lengths import expected_tokens
from llmlab.events.metrics import acceptance_by_position
from llmlab.execution.cost import RooflineCost
from llmlab.execution.draft_price import ModelPrice, RoundPrices
from llmlab.kernels.quant_spec import parse_quantization
from llmlab.llm import LLM
from llmlab.models.zoo import model_path
from llmlab.papers import Finding, Progress, Report, Table
from llmlab.running import run as run_load
from llmlab.speculating import Simulated
from llmlab.types import SamplingParams, Span, WorkItem
from llmlab.workloads.workload import Workload
from roofline import shapes

PAIR, LARGE = ("lab-m", "lab-xs"), ("llama-3.1-8b", "llama-3.2-1b")
SUITES = ("arith", "chat", "doc")
PROMPT, OUTPUT = 256, 64  # tokens of the simulated requests
LENGTHS = (1, 2, 4, 6)
Device = tuple[str, str | None]  # its name, and the weights that fit into it
Costs = tuple[RooflineCost, ModelPrice]
DEVICES: tuple[Device, ...] = (("a10", None), ("t4", "int8"))
HERE: Mapping[str, tuple[int, ...]] = {PAIR[1]: (2, 4, 6), "heads": (2, 4), "ngram": (4,), "suffix": (4,), "layer_skip": (2,)}  # on this CPU: lengths by source
CHOOSING = ("goodput", "ewma")  # who chooses lengths up to LONGEST on this CPU
LONGEST = 6
Gains = Mapping[tuple[str, int, str], float]  # device or suite, batch, contender


class Point(NamedTuple):
    """A real run on this CPU: output tokens a second over plain decoding, what the cost model foretells (None: it
    does not know what these drafts cost, nor that they end early), and the mean acceptance over the positions that were drafted."""

    source: str
    batch: int
    k: int
    policy: str
    gain: float
    predicted: float | None
    acceptance: float


def run(quick: bool, progress: Progress) -> Report:
    """`quick`: one device, one kind of problem, fewer batches."""
    suites, devices = (SUITES[:1], DEVICES[:1]) if quick else (SUITES, DEVICES)
    batches = (1, 16, 128) if quick else (1, 4, 16, 64, 128, 256)
    progress(0.0, f"recording acceptance from {PAIR[0]}")
    held = {(source, suite): recorded_acceptance(4 if quick else 16, suite, source) for source in sources() for suite in suites}
    same = all(same for _, same in held.values())
    kept = {key: acceptance for key, (acceptance, _) in held.items()}
    progress(0.1, "real runs on this CPU")
    points = on_this_cpu((1, 16), 1, {PAIR[1]: (4,)}) if quick else on_this_cpu((1, 4, 16), 3, HERE)
    gains, others = simulated(kept, devices, suites, batches, lambda share, what: progress(0.3 + 0.7 * share, what))
    main = kept[PAIR[1], SUITES[0]]
    return Report(
        "speculation", "Speculative decoding: gain by batch, acceptance and draft length",
        f"Acceptance measured: {PAIR[0]} with {', '.join(sources())}, greedy, held-out problems. Gains simulated: {LARGE[0]} with {LARGE[1]}, "
        f"{PROMPT} tokens in, {OUTPUT} out, all requests at once; on t4 with int8 weights. Gains on this CPU measured: f32, one thread.",
        (*findings(main, same, gains, devices, batches), *cpu_findings(points)), (*tables(kept, gains, devices, batches), cpu_table(points)),
        {"acceptance_by_position": lambda: acceptance_chart(kept),
         "speed_up_surface": lambda: surface_chart(kept, {**gains, **others}, suites, batches),
         "speed_up_on_this_cpu": lambda: cpu_surface_chart(points)},
    )  # fmt: skip


def simulated(held: Mapping[tuple[str, str], Sequence[float]], devices: Sequence[Device], suites: Sequence[str], batches: Sequence[int],
              progress: Progress) -> tuple[Gains, Gains]:  # fmt: skip
    """Gains over plain decoding: on each device with the acceptance of the first suite; on the first device with those of the
    others, by suite."""
    cells = [(device, suite, batch) for device in devices for suite in suites for batch in batches if device == devices[0] or suite == suites[0]]
    gains: dict[tuple[str, int, str], float] = {}
    others: dict[tuple[str, int, str], float] = {}
    for number, (device, suite, batch) in enumerate(cells):
        progress(number / len(cells), f"{device[0]}, acceptance of {suite}, batch {batch}")
        plain = throughput(device, batch, None)
        for name, fields in contenders(held[PAIR[1], suite]).items():
            into, key = (gains, device[0]) if suite == suites[0] else (others, suite)
            into[key, batch, name] = throughput(device, batch, fields) / plain
    return gains, others


# ------------------------------------------------------------------------------------------ real runs
def sources() -> tuple[str, ...]:
    """The draft model, and the heads if the target has any."""
    return (PAIR[1], *(["heads"] if (model_path(PAIR[0]) / "heads.safetensors").exists() else []))


def prompts_of(suite: str, count: int, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [tasks.suite(suite).problem(dice, k=3 if suite == "arith" else 1, split="test").prompt for _ in range(count)]


def recorded_acceptance(problems: int, suite: str = "arith", source: str = PAIR[1]) -> tuple[list[float], bool]:
    """How often the i-th draft holds, given those before it, and whether the answers are those of plain decoding. Measured."""
    prompts, params = prompts_of(suite, problems), SamplingParams(max_tokens=64, temperature=0.0)
    with LLM(PAIR[0]) as plain, LLM(PAIR[0], speculation=source, num_speculative_tokens=6) as drafting:
        wanted = [out.outputs[0].token_ids for out in plain.generate(prompts, params)]
        found = [out.outputs[0].token_ids for out in drafting.generate(prompts, params)]
        return acceptance_by_position(drafting.log), wanted == found


def on_this_cpu(batches: Sequence[int], rounds: int, lengths: Mapping[str, Sequence[int]]) -> list[Point]:
    """Every source of the lab model with its `lengths`, and under the policies that choose them, timed in turns with plain
    decoding."""
    kept = {source: found for source, found in lengths.items() if source != "heads" or "heads" in sources()}
    cells = [(source, k, policy) for source, found in kept.items()
             for k, policy in (*((k, "fixed") for k in found), *((LONGEST, policy) for policy in CHOOSING))]  # fmt: skip
    points = []
    for batch in batches:
        with LLM(PAIR[0], **_served(batch)) as plain:
            points += [_point(plain, source, k, policy, batch, rounds) for source, k, policy in cells]
    return points


def _served(batch: int) -> dict[str, Any]:
    return {"num_threads": 1, "check_interval": 0, "enable_prefix_caching": False, "max_num_seqs": batch}


def _point(plain: LLM, source: str, k: int, policy: str, batch: int, rounds: int) -> Point:
    """The first round warms up, and the policies learn. Each round has problems of its own: a source that remembers texts, such
    as `suffix`, must not find the answers of the round before."""
    times: tuple[list[float], list[float]] = ([], [])
    with LLM(PAIR[0], speculation=source, num_speculative_tokens=k, draft_policy=policy, **_served(batch)) as drafting:
        for number in range(1 + rounds):
            prompts = prompts_of("arith", max(4, batch), seed=number)
            for llm, into in zip((plain, drafting), times, strict=True):
                into.append(_seconds(llm, prompts, batch))
        drafts: Any = drafting.engine.scheduler.policies.drafting
        held = acceptance_by_position(drafting.log)[:k]
        gain = statistics.median(p / d for p, d in zip(*(seconds[1:] for seconds in times), strict=True))
    predicted = predicted_gain(drafts.book.prices, batch, held, k, 32) if policy == "fixed" and source != "heads" else None
    return Point(source, batch, k, policy, gain, predicted, _mean(held))


def _seconds(llm: LLM, prompts: Sequence[str], batch: int) -> float:
    """Of the wall clock, to answer all prompts, `batch` at a time."""
    params = SamplingParams(max_tokens=48, temperature=0.0)
    began = time.perf_counter()
    for start in range(0, len(prompts), batch):
        llm.generate(prompts[start : start + batch], params)
    return time.perf_counter() - began


def _mean(acceptance: Sequence[float]) -> float:
    return sum(acceptance) / max(1, len(acceptance))


# ------------------------------------------------------------------------------------- simulated devices
def contenders(held: Sequence[float]) -> Mapping[str, Mapping[str, Any]]:
    source = Simulated(tuple(held), LARGE[1])
    fixed = {f"k={k}": {"speculation": source, "num_speculative_tokens": k} for k in LENGTHS}
    return {**fixed, "goodput": {"speculation": source, "num_speculative_tokens": 6, "draft_policy": "goodput"}}


def throughput(device: Device, batch: int, fields: Mapping[str, Any] | None) -> float:
    """Output tokens per second of `batch` requests that arrive together. Simulated."""
    config = EngineConfig(model=LARGE[0], executor="sim", hardware=device[0], quantization=device[1], max_num_seqs=batch, log_level=2,
                          check_interval=0, max_num_batched_tokens=8192, num_blocks=batch * 24 + 64, **(fields or {}))  # fmt: skip
    load = Workload.batch(2 * batch if batch < 64 else batch, prompt=PROMPT, output=OUTPUT, seed=0)
    return float(run_load(config, load).metrics.output_throughput)


def predicted_gain(prices: RoundPrices, batch: int, acceptance: Sequence[float] | float, k: int, length: int = PROMPT) -> float:
    """By the cost model alone, without prompts: tokens a second of rounds of k drafts over plain steps. `acceptance`: of every
    draft, or by position."""
    return _tokens(acceptance, k) * prices.verifying(batch, 0, length) / _round(prices, batch, k, length)


def _round(prices: RoundPrices, batch: int, k: int, length: int) -> float:
    """Seconds, to verify k drafts of each request and to propose as many."""
    return prices.verifying(batch, k, length) + prices.drafting(batch, k, length)


def predicted_run_gain(costs: Costs, batch: int, acceptance: Sequence[float] | float, k: int) -> float:
    """The same for whole requests: prompts, which the draft model reads, too, and then all tokens of the answers."""
    large, small = costs
    prices, length = RoundPrices(large, small), PROMPT + OUTPUT // 2
    prompts = [WorkItem(f"r{i}", Span(0, PROMPT)) for i in range(batch)]
    read, drafted = large.step(prompts).seconds, small.step(prompts).seconds
    rounds = OUTPUT / _tokens(acceptance, k)
    return (read + OUTPUT * prices.verifying(batch, 0, length)) / (read + drafted + rounds * _round(prices, batch, k, length))


def _tokens(acceptance: Sequence[float] | float, k: int) -> float:
    """Of a verification of k drafts, the model's own included."""
    if isinstance(acceptance, float):
        return expected_tokens(acceptance, k)
    return 1 + sum(math.prod(acceptance[: i + 1]) for i in range(min(k, len(acceptance))))


def costs_on(device: str, weights: str | None = None) -> Costs:
    """What steps of the two models cost, the large one's first."""
    precision = None if weights is None else parse_quantization(weights).precision(16)
    large, small = (RooflineCost(shapes.get(name), device, 16, precision) for name in LARGE)
    return large, ModelPrice(small)


def prices_on(device: str, weights: str | None = None) -> RoundPrices:
    return RoundPrices(*costs_on(device, weights))


def crossing(batches: Sequence[int], gain: Callable[[int], float]) -> float | None:
    """The batch from which on drafts lose, between two of `batches` by the logarithm; None if they gain at all."""
    for before, after in pairwise(batches):
        high, low = gain(before), gain(after)
        if high >= 1 > low:
            return float(before * (after / before) ** ((high - 1) / (high - low)))
    return None


# ---------------------------------------------------------------------------------------- what was found
def findings(held: Sequence[float], same: bool, gains: Gains, devices: Sequence[Device], batches: Sequence[int]) -> tuple[Finding, ...]:
    found = [Finding("drafts change no answer", "all answers equal those of plain decoding" if same else "answers differ", "measured", same)]
    for device, _ in devices:
        one = max(gains[device, 1, name] for name in contenders(held))
        found.append(Finding(f"{device}: one stream gains", f"{one:.2f} times plain decoding at the best length", "simulated", one > 1.5))
        fixed = [gains[device, b, "k=6"] for b in batches]
        lost = next((b for b, g in zip(batches, fixed) if g < 1), None)
        said = f"six drafts lose from batch {lost} on" if lost else f"six drafts still gain {fixed[-1]:.2f} at batch {batches[-1]}"
        found.append(Finding(f"{device}: a fixed length stops paying where the step is bound by arithmetic", said, "simulated",
                             fixed[-1] < 0.6 * fixed[0]))  # fmt: skip
        worst = min(gains[device, b, "goodput"] for b in batches)
        found.append(Finding(f"{device}: the length by goodput is never worse than 0.97 of plain", f"{worst:.3f} at its worst", "simulated",
                             worst >= 0.97))  # fmt: skip
    return (*found, *(_crossing_finding(held, gains, device, batches) for device in devices))


def _crossing_finding(held: Sequence[float], gains: Gains, device: Device, batches: Sequence[int]) -> Finding:
    """Where six drafts stop paying: by simulated runs, and by the roofline, of whole requests and of rounds alone."""
    costs, prices, doublings = costs_on(*device), prices_on(*device), [2**i for i in range(11)]
    found = {"in simulated runs": crossing(batches, lambda b: gains[device[0], b, "k=6"]),
             "by the roofline with prompts": crossing(doublings, lambda b: predicted_run_gain(costs, b, held, 6)),
             "by that of rounds alone": crossing(doublings, lambda b: predicted_gain(prices, b, held, 6))}  # fmt: skip
    ran, foretold, _ = found.values()
    said = ", ".join(f"batch {at:.0f} {how}" if at else f"nowhere {how}" for how, at in found.items())
    holds = None if ran is None or foretold is None else 0.5 <= ran / foretold <= 2
    return Finding(f"{device[0]}: six drafts cross 1.0 where the roofline says", said, "simulated", holds)


def cpu_findings(points: Sequence[Point]) -> tuple[Finding, ...]:
    best = max([p for p in points if p.batch == 1], key=lambda p: p.gain)
    found = [Finding("this CPU: one stream gains 1.5 times with the better source", f"{best.gain:.2f} times with {best.source}, k={best.k}, {best.policy}",
                     "measured", best.gain >= 1.5)]  # fmt: skip
    most = max(p.batch for p in points)
    for policy in CHOOSING:
        worst = min([p for p in points if p.batch == most and p.policy == policy], key=lambda p: p.gain)
        found.append(Finding(f"this CPU: at batch {most} the length by {policy} is never worse than 0.97 of plain", f"{worst.gain:.2f} at its worst, with {worst.source}",
                             "measured", worst.gain >= 0.97))  # fmt: skip
    return tuple(found)


def tables(held: Mapping[tuple[str, str], Sequence[float]], gains: Gains, devices: Sequence[Device], batches: Sequence[int]) -> tuple[Table, ...]:
    names = tuple(contenders((1.0,)))
    first = Table("Acceptance by position: holds, given those before it", ("drafts of", "problems", *(str(i + 1) for i in range(6))),
                  tuple((source, suite, *(f"{a:.2f}" for a in found), *["-"] * (6 - len(found))) for (source, suite), found in held.items()),
                  f"measured, for {PAIR[0]}")  # fmt: skip
    return (first, *(Table(f"Throughput over plain decoding, {device}", ("batch", *names),
                           tuple((str(b), *(f"{gains[device, b, name]:.2f}" for name in names)) for b in batches), "simulated")
                     for device, _ in devices))  # fmt: skip


def cpu_table(points: Sequence[Point]) -> Table:
    rows = tuple((p.source, str(p.batch), str(p.k) if p.policy == "fixed" else f"{p.policy}, up to {p.k}", f"{p.acceptance:.2f}", f"{p.gain:.2f}", "-" if p.predicted is None else f"{p.predicted:.2f}") for p in points)
    return Table(f"Throughput over plain decoding, {PAIR[0]} on this CPU", ("drafts of", "batch", "k", "acceptance", "of plain", "foretold"), rows,
                 "measured, one thread, arithmetic, prompts included; foretold: the cost model of the engine")  # fmt: skip


# ------------------------------------------------------------------------------------------- pictures
def acceptance_chart(held: Mapping[tuple[str, str], Sequence[float]]) -> Any:
    """Bars: how often each position of a proposal held, a panel for each kind of problem."""
    import altair as alt

    from llmlab.ui.chart import data, title
    from llmlab.ui.theme import roles

    colours = dict(zip(sources(), (roles().cached, roles().transfer)))
    rows = [{"position": i + 1, "held": a, "drafts of": source, "suite": suite, "label": f"{a:.0%}"}
            for (source, suite), found in held.items() for i, a in enumerate(found)]  # fmt: skip
    panels = []
    for suite in dict.fromkeys(suite for _, suite in held):
        base = alt.Chart(data([r for r in rows if r["suite"] == suite])).encode(
            x=alt.X("position:O", title="position in the proposal", axis=alt.Axis(labelAngle=0)), xOffset=alt.XOffset("drafts of:N", sort=[*colours]))
        bars = base.mark_bar().encode(
            y=alt.Y("held:Q", title="holds, given those before it", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
            color=alt.Color("drafts of:N", scale=alt.Scale(domain=[*colours], range=[*colours.values()]), legend=alt.Legend(title="drafts of", orient="right")))
        text = base.mark_text(dy=-7, fontSize=9).encode(y="held:Q", text="label:N")
        panels.append(alt.layer(bars, text).properties(width=330, height=200, title=suite))
    heading = title("How often drafts hold, by position", f"{PAIR[0]}, greedy, held-out problems (measured)", "Heads end a proposal before an unlikely token",
                    width=340 * len(panels))
    return alt.hconcat(*panels).properties(title=heading)


def surface_chart(held: Mapping[tuple[str, str], Sequence[float]], gains: Gains, suites: Sequence[str], batches: Sequence[int]) -> Any:
    """Predicted gain over batch and acceptance, one panel a length, on the A10; simulated runs as points on it, one row of
    them for each kind of problem."""
    costs = costs_on(*DEVICES[0])
    tiles = [_tile(b, a / 10, k, predicted_run_gain(costs, b, a / 10, k)) for k in LENGTHS for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) for a in range(1, 11)]
    points = [_tile(b, _mean(held[PAIR[1], suite][:k]), k, gains[DEVICES[0][0] if suite == suites[0] else suite, b, f"k={k}"])
              for suite in reversed(suites) for k in LENGTHS for b in batches]  # fmt: skip
    points = list({(p["batch"], p["acceptance"], p["k"]): p for p in points}.values())  # where two fall together, the first suite's
    return _surface(tiles, points, LENGTHS, "Drafting pays while the step waits for memory",
                    f"{LARGE[0]} with {LARGE[1]} on an A10, {PROMPT} tokens in, {OUTPUT} out: tiles by roofline, rings from simulated runs with the acceptance of the lab pair on "
                    f"{', '.join(suites)} (measured)")  # fmt: skip


def cpu_surface_chart(points: Sequence[Point]) -> Any:
    """The same for this CPU with its real runs, drafts of the small model."""
    mine = [p for p in points if p.source == PAIR[1] and p.policy == "fixed"]
    lengths = sorted({p.k for p in mine})
    with LLM(PAIR[0], speculation=PAIR[1], num_speculative_tokens=max(lengths), num_threads=1) as llm:
        drafts: Any = llm.engine.scheduler.policies.drafting
        tiles = [_tile(b, a / 10, k, predicted_gain(drafts.book.prices, b, a / 10, k, 32)) for k in lengths for b in (1, 2, 4, 8, 16, 32) for a in range(1, 11)]
    return _surface(tiles, [_tile(p.batch, p.acceptance, p.k, p.gain) for p in mine], lengths, "On a CPU drafting pays for few streams",
                    f"{PAIR[0]} with {PAIR[1]}, one thread: tiles by the engine's cost model, rings measured")  # fmt: skip


def _tile(batch: int, acceptance: float, k: int, gain: float) -> dict[str, Any]:
    return {"batch": batch, "acceptance": round(max(0.1, acceptance), 1), "k": k, "gain": gain, "label": f"{gain:.1f}" if gain >= 1.05 else f"{gain:.2f}"}


def _surface(tiles: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]], lengths: Sequence[int], finding: str, notes: str) -> Any:
    """Tiles under points, a panel for each length, two in a row."""
    import altair as alt

    from llmlab.ui.chart import data, title

    scale = alt.Scale(scheme="redblue", domain=[0.2, 1.0, 3.0], domainMid=1.0, clamp=True)
    x = alt.X("batch:O", title="batch", axis=alt.Axis(labelAngle=0))
    y = alt.Y("acceptance:O", title="acceptance of one draft", sort="descending", axis=alt.Axis(format=".1f"))
    color = alt.Color("gain:Q", scale=scale, legend=alt.Legend(title="times plain"))
    panels = []
    for k in lengths:
        ground = alt.Chart(data([tile for tile in tiles if tile["k"] == k])).mark_rect().encode(x=x, y=y, color=color)
        mine = [point for point in points if point["k"] == k]
        rings = alt.Chart(data(mine)).mark_point(size=420, filled=True, stroke="white", strokeWidth=1.5, opacity=1).encode(x=x, y=y, color=color)
        text = alt.Chart(data(mine)).mark_text(fontSize=10, fontWeight="bold", color="black").encode(x=x, y=y, text="label:N")
        panels.append(alt.layer(ground, rings, text).properties(width=290, height=220, title=f"k = {k}"))
    rows = [alt.hconcat(*panels[i : i + 2]) for i in range(0, len(panels), 2)]
    return alt.vconcat(*rows).properties(title=title(finding, notes, width=640))
