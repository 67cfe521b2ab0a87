"""LLM-42: determinism by verified speculation (SOSP 2026, arXiv 2601.17768), on a CPU.

Claims repeated: plain decoding in 16 bits answers otherwise now and then when requests are batched otherwise; verified
requests never do; only those pay who ask; and what they pay depends on the shape N x W of a pass (requests x tokens of a
window): large passes are cheap per token, long windows lose more when a token flips. The model is a Llama of four layers with random weights, whose bf16 products by torch
have other bits for one row than for several; its answers are drawn at temperature 1, so that margins are small.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llmlab.decoding.verified import Verified
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.execution.fixed import invariant
from llmlab.papers import Finding, Progress, Report, Table
from llmlab.runs import Run
from llmlab.types import SamplingParams

SHAPE: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 512,
    "head_dim": 64, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
SHARES = (0.0, 0.1, 0.5, 1.0)
ALL_FIXED = -1.0
PUBLISHED = ("1", ".71-.97", ".56-.94", ".46-.90")  # H100, 8B, over six data sets (the paper's figure 10a)
FORMATS = ("bfloat16", "float16")
GROUPS, WINDOWS = (1, 2, 4, 8), (4, 8, 16, 32)  # N and W
REQUESTS = 16
# H100, 8B (the paper's figure 13a): throughput over the best cell, by N and W.
PUBLISHED_GRID: Mapping[tuple[int, int], float] = {
    (32, 16): 1.0, (32, 32): 0.95, (16, 16): 0.88, (16, 32): 0.99, (16, 64): 0.92, (8, 16): 0.67, (8, 32): 0.83, (8, 64): 0.96,
    (8, 128): 0.84, (1, 16): 0.16, (1, 32): 0.27, (1, 64): 0.40, (1, 128): 0.52, (1, 256): 0.57, (1, 512): 0.54, (1, 1024): 0.39,
}  # fmt: skip


class Rides(NamedTuple):
    """Of prompts answered in many random batchings: the share that got more than one answer, the candidates that did not
    hold, and the tokens of all answers."""

    several: float
    flips: int
    tokens: int


class Cell(NamedTuple):
    """Of one shape of a pass, when all requests are verified: output tokens a second; KV tokens that were rolled back for each
    token of the answers."""

    rate: float
    recomputed: float


class Sizes(NamedTuple):
    """How much is run."""

    rides: int
    prompts: int
    tokens: int
    rounds: int
    groups: tuple[int, ...]
    windows: tuple[int, ...]
    grid_tokens: int


FULL = Sizes(50, 4, 24, 4, GROUPS, WINDOWS, 64)
QUICK = Sizes(6, 3, 12, 2, (1, 4), (4, 16), 16)


def run(quick: bool, progress: Progress) -> Report:
    """`quick`: fewer batchings, shapes and shorter answers."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        flips: dict[tuple[str, bool], Rides] = {}
        for number, (dtype, deterministic) in enumerate((f, d) for f in FORMATS for d in (True, False)):
            progress(0.1 * number, f"{sizes.rides} random batchings in {dtype}, {'verified' if deterministic else 'plain'}")
            flips[dtype, deterministic] = flipped(folder, sizes, deterministic, dtype)
        progress(0.4, "throughput by share")
        rates, rolled = throughputs(folder, sizes.tokens, sizes.rounds)
        cells = grid(folder, sizes, lambda share, what: progress(0.5 + 0.5 * share, what))
    return Report(
        "llm42", "Determinism by verified speculation", f"Llama with random weights, {SHAPE['num_hidden_layers']} layers of "
        f"{SHAPE['hidden_size']}, 16 bits, torch's products and compiled attention on this CPU, one thread; windows of 16 tokens, passes "
        f"of 64; {sizes.prompts} prompts in {sizes.rides} random batchings; {REQUESTS} requests of {sizes.tokens} tokens for the throughput, of "
        f"{sizes.grid_tokens} for the grid.",
        (*_findings(flips, rates, sizes), *_grid_findings(cells)), (*_tables(rates, rolled), _flip_table(flips), _grid_table(cells)),
        {"grid_of_passes": lambda: grid_chart(cells)},
    )  # fmt: skip


def flipped(folder: str, sizes: Sizes, deterministic: bool, dtype: str = FORMATS[0]) -> Rides:
    """What random batchings do to answers. Measured."""
    answers: list[set[tuple[int, ...]]] = [set() for _ in range(sizes.prompts)]
    flips = 0
    for ride in range(sizes.rides):
        dice = random.Random(ride)
        with _engine(folder, max_num_seqs=dice.choice([1, 2, 5, 16]), max_num_batched_tokens=dice.choice([7, 33, 512]),
                     decoding="verified", dtype=dtype) as engine:  # fmt: skip
            names, order = {}, dice.sample(range(sizes.prompts), sizes.prompts)
            while order or engine.has_unfinished_requests():
                if order and dice.random() < 0.3:
                    number = order.pop()
                    names[engine.add_request(_prompt(number), _params(sizes.tokens, number, deterministic))] = number
                for output in engine.step():
                    if output.finished:
                        answers[names[output.request_id]].add(tuple(output.outputs[0].token_ids))
            flips += len(engine.log.filter(ev.RolledBack))
    several = sum(len(found) > 1 for found in answers) / sizes.prompts
    return Rides(several, flips, sizes.rides * sizes.prompts * sizes.tokens)


def throughputs(folder: str, tokens: int, rounds: int) -> tuple[dict[float, float], dict[float, int]]:
    """Output tokens per second of 16 requests by share (-1: all computed fixed, without a fast path), and tokens rolled
    back. Measured; medians of rounds in turns, but for the first."""
    engines = {share: _engine(folder, decoding=Verified() if share >= 0 else "autoregressive") for share in (*SHARES, ALL_FIXED)}
    found: dict[float, list[float]] = {share: [] for share in engines}
    for _ in range(1 + rounds):
        for share, engine in engines.items():
            found[share].append(_rate(engine, tokens, round(REQUESTS * abs(share))))
    rolled = {share: Run.of(engine.log).metrics.wasted_tokens for share, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    return {share: statistics.median(rates[1:]) for share, rates in found.items()}, rolled


def _rate(engine: Engine, tokens: int, deterministic: int) -> float:
    """Output tokens per second of a batch, the first `deterministic` requests of which are verified."""
    for i in range(REQUESTS):
        engine.add_request(_prompt(i), _params(tokens, i, i < deterministic))
    began, count = time.perf_counter(), 0
    while engine.has_unfinished_requests():
        count += sum(len(o.outputs[0].token_ids) for o in engine.step() if o.finished)
    return count / (time.perf_counter() - began)


def grid(folder: str, sizes: Sizes, progress: Progress) -> dict[tuple[int, int], Cell]:
    """Every shape N x W of a pass under the same load, all of it verified. Measured; medians of rounds, but for the first."""
    found: dict[tuple[int, int], Cell] = {}
    shapes = [(n, w) for n in sizes.groups for w in sizes.windows]
    for number, (n, w) in enumerate(shapes):
        progress(number / len(shapes), f"passes of {n} x {w}")
        with _engine(folder, decoding=Verified(w, n), fixed_rows=n * w) as engine:
            rates = [_rate(engine, sizes.grid_tokens, REQUESTS) for _ in range(3)]
            lost = Run.of(engine.log).metrics.wasted_tokens
        found[n, w] = Cell(statistics.median(rates[1:]), lost / (len(rates) * REQUESTS * sizes.grid_tokens))
    return found


def _engine(folder: str, **fields: Any) -> Engine:
    base: dict[str, Any] = {"model": folder, "dtype": "bfloat16", "kernels": "torch", "random_weights": True, "num_threads": 1,
                            "num_blocks": 256, "check_interval": 0, "enable_prefix_caching": False}  # fmt: skip
    engine = Engine(**{**base, **fields})
    executor: Any = engine.executor
    executor._model = invariant(executor._model)  # both paths attend with the compiled kernel: only products differ
    return engine


def _prompt(number: int) -> list[int]:
    return [random.Random(1000 + 100 * number + i).randrange(3, 500) for i in range(16 + number)]


def _params(tokens: int, seed: int, deterministic: bool) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True, deterministic=deterministic)


def _findings(flips: Mapping[tuple[str, bool], Rides], rates: Mapping[float, float], sizes: Sizes) -> tuple[Finding, ...]:
    plain, all_fixed = rates[0.0], rates[-1.0]
    several = {verified: max(flips[dtype, verified].several for dtype in FORMATS) for verified in (False, True)}
    return (
        Finding("plain decoding in 16 bits depends on the batch", f"{several[False]:.0%} of {sizes.prompts} prompts got more than one answer in "
                f"{sizes.rides} batchings, in the worse format", "measured", several[False] > 0),
        Finding("verified requests get one answer", f"{several[True]:.0%} of them got more than one, in either format", "measured",
                several[True] == 0),
        Finding("10 % deterministic traffic costs little (.71-.97 of plain)", f"{rates[0.1] / plain:.2f} of plain", "measured",
                rates[0.1] / plain > 0.7),
        Finding("the cost grows with the share", " > ".join(f"{rates[s] / plain:.2f}" for s in SHARES), "measured",
                all(rates[a] >= 0.97 * rates[b] for a, b in pairwise(SHARES))),
        Finding("at 10 % it beats shapes fixed for everybody", f"{rates[0.1]:.0f} against {all_fixed:.0f} tokens/s", "measured",
                rates[0.1] > all_fixed),
    )  # fmt: skip


def _grid_findings(cells: Mapping[tuple[int, int], Cell]) -> tuple[Finding, ...]:
    best = max(cells, key=lambda shape: cells[shape].rate)
    smallest = min(cells, key=lambda shape: (shape[0] * shape[1], shape))
    share = cells[smallest].rate / cells[best].rate
    windows = [w for _, w in cells]
    short, long = (statistics.mean(c.recomputed for (_, w), c in cells.items() if w == pick) for pick in (min(windows), max(windows)))
    lost = f"KV tokens rolled back per token: {long:.1%} at the longest, {short:.1%} at the shortest"
    return (
        Finding("small passes are dear: every token pays for launching one (H100: 1 x 16 makes .16 of the best)",
                f"{smallest[0]} x {smallest[1]} makes {share:.2f} of {best[0]} x {best[1]}, the best", "measured", share < 0.9),
        Finding("long windows lose more when a token flips", lost if long or short else "no token flipped: all requests decoded together, so "
                "what long windows lose here is what is left of their last one", "measured", long >= short if long or short else None),
    )  # fmt: skip


def _flip_table(flips: Mapping[tuple[str, bool], Rides]) -> Table:
    rows = tuple((dtype, f"{flips[dtype, False].several:.0%}", f"{flips[dtype, True].several:.0%}", str(flips[dtype, True].flips),
                  f"{1000 * flips[dtype, True].flips / flips[dtype, True].tokens:.2f}") for dtype in FORMATS)  # fmt: skip
    return Table("Flips by format", ("format", "prompts with several answers, plain", "verified", "candidates that did not hold", "per 1,000 tokens"),
                 rows, "measured here, at temperature 1 and random weights: margins are smaller than a trained model's")  # fmt: skip


def _grid_table(cells: Mapping[tuple[int, int], Cell]) -> Table:
    groups, windows = sorted({n for n, _ in cells}), sorted({w for _, w in cells})
    best = max(cell.rate for cell in cells.values())
    rows = tuple((str(n), *(f"{cells[n, w].rate / best:.2f} ({cells[n, w].recomputed:.1%})" for w in windows),
                  ", ".join(f"W={w} {share:.2f}" for (m, w), share in PUBLISHED_GRID.items() if m == n) or "-") for n in groups)  # fmt: skip
    return Table("Throughput over the best shape, and KV tokens rolled back per token", ("N", *(f"W={w}" for w in windows), "published, H100 8B"),
                 rows, "measured here; the published column is another machine and model")  # fmt: skip


def grid_chart(cells: Mapping[tuple[int, int], Cell]) -> Any:
    """Tiles by N and W: throughput over the best shape, and below it what was rolled back."""
    import altair as alt

    from llmlab.ui.chart import data, title
    from llmlab.ui.theme import roles

    best = max(cells, key=lambda shape: cells[shape].rate)
    top = cells[best].rate
    rows = [{"N": n, "W": w, "of best": c.rate / top, "told": f"{c.rate / top:.2f}", "lost": f"{c.recomputed:.1%} rolled back"} for (n, w), c in cells.items()]  # fmt: skip
    base = alt.Chart(data(rows)).encode(
        x=alt.X("W:O", title="tokens of a window, W", axis=alt.Axis(labelAngle=0)), y=alt.Y("N:O", title="requests of a pass, N", sort="descending"))
    low = min(c.rate / top for c in cells.values())
    fill = alt.Color("of best:Q", scale=alt.Scale(range=["#F4F1EC", roles().cached], domain=[max(0.0, low - 0.1), 1.0]), legend=None)
    tiles = base.mark_rect(stroke=roles().paper, strokeWidth=2).encode(color=fill)
    share = base.mark_text(dy=-7, fontSize=15, fontWeight="bold").encode(text="told:N", color=alt.value(roles().owner_ink))
    lost = base.mark_text(dy=11, fontSize=11).encode(text="lost:N", color=alt.value(roles().owner_ink))
    heading = title(f"Passes of {best[0]} x {best[1]} verify cheapest here", f"Output tokens a second over the best shape, {REQUESTS} requests, all verified, bf16 on "
                    "this CPU, one thread (measured)", width=640)  # fmt: skip
    sizes = {"width": 110 * len({w for _, w in cells}), "height": 62 * len({n for n, _ in cells})}
    return alt.layer(tiles, share, lost).properties(title=heading, **sizes)


def _tables(rates: Mapping[float, float], rolled: Mapping[float, int]) -> tuple[Table, ...]:
    rows = [(f"{s:.0%}", f"{rates[s]:.0f}", f"{rates[s] / rates[0.0]:.2f}", paper, str(rolled[s])) for s, paper in zip(SHARES, PUBLISHED)]
    rows.append(("all fixed, no fast path", f"{rates[-1.0]:.0f}", f"{rates[-1.0] / rates[0.0]:.2f}", ".51-.96", "0"))
    return (Table("Throughput by share of deterministic requests", ("share", "tokens/s", "of plain", "published, H100 8B", "KV tokens rolled back"),
                  tuple(rows), "measured here; the published column is another machine and model"),)  # fmt: skip
