"""LLM-42: determinism by verified speculation (SOSP 2026, arXiv 2601.17768), on a CPU.

Claims repeated: plain decoding in bf16 answers otherwise now and then when requests are batched otherwise; verified requests
never do; and only those pay who ask. The model is a Llama of four layers with random weights, whose bf16 products by torch
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
from typing import Any

from llmlab.decoding.verified import Verified
from llmlab.engine import Engine
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


def run(quick: bool, progress: Progress) -> Report:
    """`quick`: fewer batchings and shorter answers."""
    rides, prompts, tokens = (6, 3, 12) if quick else (50, 4, 24)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        flips = {True: 0.0, False: 0.0}
        for deterministic in flips:
            progress(0.3 * deterministic, f"{rides} random batchings, {'verified' if deterministic else 'plain'}")
            flips[deterministic] = flipped(folder, rides, prompts, tokens, deterministic)
        progress(0.6, "throughput by share")
        rates, rolled = throughputs(folder, tokens, 2 if quick else 4)
    return Report("llm42", "Determinism by verified speculation", f"Llama with random weights, {SHAPE['num_hidden_layers']} layers of "
                  f"{SHAPE['hidden_size']}, bf16, torch's products and compiled attention on this CPU, one thread; windows of 16 tokens, passes of 64; {prompts} "
                  f"prompts in {rides} random batchings; 16 requests of {tokens} tokens for the throughput.",
                  _findings(flips, rates, prompts, rides), _tables(rates, rolled))  # fmt: skip


def flipped(folder: str, rides: int, prompts: int, tokens: int, deterministic: bool) -> float:
    """Share of prompts that got more than one answer over all batchings. Measured."""
    answers: list[set[tuple[int, ...]]] = [set() for _ in range(prompts)]
    for ride in range(rides):
        dice = random.Random(ride)
        with _engine(folder, max_num_seqs=dice.choice([1, 2, 5, 16]), max_num_batched_tokens=dice.choice([7, 33, 512]),
                     decoding="verified") as engine:  # fmt: skip
            names, order = {}, dice.sample(range(prompts), prompts)
            while order or engine.has_unfinished_requests():
                if order and dice.random() < 0.3:
                    number = order.pop()
                    names[engine.add_request(_prompt(number), _params(tokens, number, deterministic))] = number
                for output in engine.step():
                    if output.finished:
                        answers[names[output.request_id]].add(tuple(output.outputs[0].token_ids))
    return sum(len(found) > 1 for found in answers) / prompts


def throughputs(folder: str, tokens: int, rounds: int) -> tuple[dict[float, float], dict[float, int]]:
    """Output tokens per second of 16 requests by share (-1: all computed fixed, without a fast path), and tokens rolled
    back. Measured; medians of rounds in turns, but for the first."""
    engines = {share: _engine(folder, decoding=Verified() if share >= 0 else "autoregressive") for share in (*SHARES, ALL_FIXED)}
    found: dict[float, list[float]] = {share: [] for share in engines}
    for _ in range(1 + rounds):
        for share, engine in engines.items():
            for i in range(16):
                engine.add_request(_prompt(i), _params(tokens, i, i < round(16 * abs(share))))
            began, count = time.perf_counter(), 0
            while engine.has_unfinished_requests():
                count += sum(len(o.outputs[0].token_ids) for o in engine.step() if o.finished)
            found[share].append(count / (time.perf_counter() - began))
    rolled = {share: Run.of(engine.log).metrics.wasted_tokens for share, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    return {share: statistics.median(rates[1:]) for share, rates in found.items()}, rolled


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


def _findings(flips: Mapping[bool, float], rates: Mapping[float, float], prompts: int, rides: int) -> tuple[Finding, ...]:
    plain, all_fixed = rates[0.0], rates[-1.0]
    return (
        Finding("plain decoding in bf16 depends on the batch", f"{flips[False]:.0%} of {prompts} prompts got more than one answer in {rides} "
                "batchings", "measured", flips[False] > 0),
        Finding("verified requests get one answer", f"{flips[True]:.0%} of them got more than one", "measured", flips[True] == 0),
        Finding("10 % deterministic traffic costs little (.71-.97 of plain)", f"{rates[0.1] / plain:.2f} of plain", "measured",
                rates[0.1] / plain > 0.7),
        Finding("the cost grows with the share", " > ".join(f"{rates[s] / plain:.2f}" for s in SHARES), "measured",
                all(rates[a] >= 0.97 * rates[b] for a, b in pairwise(SHARES))),
        Finding("at 10 % it beats shapes fixed for everybody", f"{rates[0.1]:.0f} against {all_fixed:.0f} tokens/s", "measured",
                rates[0.1] > all_fixed),
    )  # fmt: skip


def _tables(rates: Mapping[float, float], rolled: Mapping[float, int]) -> tuple[Table, ...]:
    rows = [(f"{s:.0%}", f"{rates[s]:.0f}", f"{rates[s] / rates[0.0]:.2f}", paper, str(rolled[s])) for s, paper in zip(SHARES, PUBLISHED)]
    rows.append(("all fixed, no fast path", f"{rates[-1.0]:.0f}", f"{rates[-1.0] / rates[0.0]:.2f}", ".51-.96", "0"))
    return (Table("Throughput by share of deterministic requests", ("share", "tokens/s", "of plain", "published, H100 8B", "KV tokens rolled back"),
                  tuple(rows), "measured here; the published column is another machine and model"),)  # fmt: skip
