"""Speculative decoding: how much it gains by batch, acceptance and draft length, and where it stops paying.

The acceptance of each position is recorded from the lab's own pair (lab-s with lab-xs, really run), and then charged to
shapes of production size on simulated devices: Llama-3.1-8B with Llama-3.2-1B. Sources: Leviathan et al., arXiv 2211.17192
(equation 1, the gain of one stream), and CoSine, arXiv 2503.10325, for the question of who waits for whom.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from llmlab import tasks
from llmlab.config import EngineConfig
from llmlab.decoding.draft_lengths import expected_tokens
from llmlab.events.metrics import acceptance_by_position
from llmlab.execution.cost import DraftCost, RooflineCost, draft_outlook
from llmlab.llm import LLM
from llmlab.papers import Finding, Progress, Report, Table
from llmlab.running import run as run_load
from llmlab.seams import DraftOutlook
from llmlab.speculating import Simulated
from llmlab.types import SamplingParams, Span, WorkItem
from llmlab.workloads.workload import Workload
from roofline import shapes

PAIR, LARGE = ("lab-s", "lab-xs"), ("llama-3.1-8b", "llama-3.2-1b")
PROMPT, OUTPUT = 256, 64  # tokens of the simulated requests
LENGTHS = (1, 2, 4, 6)
Device = tuple[str, str | None]  # its name, and the weights that fit into it
DEVICES: tuple[Device, ...] = (("a10", None), ("t4", "int8"))


def run(quick: bool, progress: Progress) -> Report:
    """`quick`: one device and fewer batches."""
    progress(0.0, "recording acceptance from lab-s with lab-xs")
    held, same = recorded_acceptance(4 if quick else 16)
    devices = DEVICES[:1] if quick else DEVICES
    batches = (1, 16, 128) if quick else (1, 4, 16, 64, 128, 256)
    gains: dict[tuple[str, int, str], float] = {}
    for number, (device, batch) in enumerate((d, b) for d in devices for b in batches):
        progress(0.1 + 0.9 * number / (len(devices) * len(batches)), f"{device[0]}, batch {batch}")
        plain = throughput(device, batch, None)
        for name, fields in contenders(held).items():
            gains[device[0], batch, name] = throughput(device, batch, fields) / plain
    return Report(
        "speculation", "Speculative decoding: gain by batch, acceptance and draft length",
        f"Acceptance measured: {PAIR[0]} with {PAIR[1]}, greedy, held-out arithmetic. Gains simulated: {LARGE[0]} with {LARGE[1]}, "
        f"{PROMPT} tokens in, {OUTPUT} out, all requests at once; on t4 with int8 weights.",
        findings(held, same, gains, devices, batches), tables(held, gains, devices, batches),
        {"acceptance_by_position": lambda: acceptance_chart(held), "speed_up_surface": lambda: surface_chart(held, gains, batches)},
    )  # fmt: skip


def recorded_acceptance(problems: int) -> tuple[list[float], bool]:
    """How often the i-th draft of the lab pair holds, and whether the answers are those of plain decoding. Measured."""
    dice = random.Random(0)
    prompts = [tasks.suite("arith").problem(dice, k=3, split="test").prompt for _ in range(problems)]
    params = SamplingParams(max_tokens=64, temperature=0.0)
    with LLM(PAIR[0]) as plain, LLM(PAIR[0], speculation=PAIR[1], num_speculative_tokens=6) as drafting:
        wanted = [out.outputs[0].token_ids for out in plain.generate(prompts, params)]
        found = [out.outputs[0].token_ids for out in drafting.generate(prompts, params)]
        return acceptance_by_position(drafting.log), wanted == found


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


# ---------------------------------------------------------------------------------------- what was found
def findings(held: Sequence[float], same: bool, gains: Mapping[tuple[str, int, str], float], devices: Sequence[Device],
             batches: Sequence[int]) -> tuple[Finding, ...]:  # fmt: skip
    found = [Finding("drafts change no answer", "all answers equal those of plain decoding" if same else "answers differ", "measured", same)]
    for device, _ in devices:
        one = max(gains[device, 1, name] for name in contenders(held))
        found.append(Finding(f"{device}: one stream gains", f"{one:.2f} times plain decoding at the best length", "simulated", one > 1.5))
        fixed = [gains[device, b, "k=6"] for b in batches]
        crossing = next((b for b, g in zip(batches, fixed) if g < 1), None)
        said = f"six drafts lose from batch {crossing} on" if crossing else f"six drafts still gain {fixed[-1]:.2f} at batch {batches[-1]}"
        found.append(Finding(f"{device}: a fixed length stops paying where the step is bound by arithmetic", said, "simulated",
                             fixed[-1] < 0.6 * fixed[0]))  # fmt: skip
        worst = min(gains[device, b, "goodput"] for b in batches)
        found.append(Finding(f"{device}: the length by goodput is never worse than 0.97 of plain", f"{worst:.2f} at its worst", "simulated",
                             worst >= 0.97))  # fmt: skip
    return tuple(found)


def tables(held: Sequence[float], gains: Mapping[tuple[str, int, str], float], devices: Sequence[Device],
           batches: Sequence[int]) -> tuple[Table, ...]:  # fmt: skip
    names = tuple(contenders(held))
    first = Table("Acceptance by position", ("draft", *(str(i + 1) for i in range(len(held)))),
                  (("holds, given those before it", *(f"{a:.2f}" for a in held)),), "measured, lab-s with lab-xs")  # fmt: skip
    return (first, *(Table(f"Throughput over plain decoding, {device}", ("batch", *names),
                           tuple((str(b), *(f"{gains[device, b, name]:.2f}" for name in names)) for b in batches), "simulated")
                     for device, _ in devices))  # fmt: skip


def predicted_gain(outlook: DraftOutlook, batch: int, acceptance: float, k: int) -> float:
    """By the roofline alone, without prompts: tokens a second of rounds of k drafts over plain steps."""
    items = [WorkItem(f"r{i}", Span(PROMPT, PROMPT + 1)) for i in range(batch)]
    return expected_tokens(acceptance, k) * outlook.seconds(items, 0) / outlook.seconds(items, k)


def outlook_on(device: str) -> DraftOutlook:
    large, small = (RooflineCost(shapes.get(name), device, 16) for name in LARGE)
    return draft_outlook(large, DraftCost(small), max(LENGTHS))


# ------------------------------------------------------------------------------------------- pictures
def acceptance_chart(held: Sequence[float]) -> Any:
    """Bars: how often each position of a proposal held."""
    import altair as alt

    from llmlab.ui.chart import data, title
    from llmlab.ui.theme import roles

    rows = [{"position": i + 1, "held": a, "label": f"{a:.0%}"} for i, a in enumerate(held)]
    base = alt.Chart(data(rows)).encode(x=alt.X("position:O", title="position in the proposal", axis=alt.Axis(labelAngle=0)))
    bars = base.mark_bar(color=roles().cached, size=46).encode(
        y=alt.Y("held:Q", title="holds, given those before it", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")))
    text = base.mark_text(dy=-8).encode(y="held:Q", text="label:N")
    heading = title("How often the drafts of a small model hold", "lab-s with lab-xs, greedy, held-out arithmetic (measured)")
    return alt.layer(bars, text).properties(title=heading, width=520, height=260)


def surface_chart(held: Sequence[float], gains: Mapping[tuple[str, int, str], float], batches: Sequence[int]) -> Any:
    """Predicted gain over batch and acceptance, one panel a length, on the A10; simulated runs as points on it."""
    import altair as alt

    from llmlab.ui.chart import data, title

    outlook, mean = outlook_on(DEVICES[0][0]), sum(held) / len(held)
    rows: list[dict[str, Any]] = [
        {"batch": b, "acceptance": a / 10, "k": f"k = {k}", "gain": predicted_gain(outlook, b, a / 10, k)}
        for k in LENGTHS for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) for a in range(1, 10)
    ]
    points = [{"batch": b, "acceptance": round(mean, 1), "k": f"k = {k}", "gain": gains["a10", b, f"k={k}"],
               "label": f"{gains['a10', b, f'k={k}']:.1f}"} for k in LENGTHS for b in batches]  # fmt: skip
    scale = alt.Scale(scheme="redblue", domain=[0.2, 1.0, 3.0], domainMid=1.0, clamp=True)
    x = alt.X("batch:O", title="batch", axis=alt.Axis(labelAngle=0))
    y = alt.Y("acceptance:O", title="acceptance of one draft", sort="descending", axis=alt.Axis(format=".1f"))
    color = alt.Color("gain:Q", scale=scale, legend=alt.Legend(title="times plain"))
    panels = []
    for k in LENGTHS:
        tiles = alt.Chart(data([r for r in rows if r["k"] == f"k = {k}"])).mark_rect().encode(x=x, y=y, color=color)
        mine = [p for p in points if p["k"] == f"k = {k}"]
        rings = alt.Chart(data(mine)).mark_point(size=420, filled=True, stroke="white", strokeWidth=1.5, opacity=1).encode(x=x, y=y, color=color)
        text = alt.Chart(data(mine)).mark_text(fontSize=10, fontWeight="bold", color="black").encode(x=x, y=y, text="label:N")
        panels.append(alt.layer(tiles, rings, text).properties(width=270, height=200, title=f"k = {k}"))
    heading = title("Drafting pays while the step waits for memory", f"{LARGE[0]} with {LARGE[1]} on an A10: tiles by roofline, rings from "
                    "simulated runs with the lab pair's acceptance")  # fmt: skip
    return alt.vconcat(alt.hconcat(*panels[:2]), alt.hconcat(*panels[2:])).properties(title=heading)
