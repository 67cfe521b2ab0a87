"""int8 and int4 weights on the lab models: perplexity, accuracy and bytes; and linear layers on this CPU.

    python benchmarks/quant.py [--models lab-xs lab-s] [--n 100] [--threads 1] [--parts models linear]

Perplexity is over the tokens that teachers' completions of held-out problems teach, accuracy that of greedy answers to held-out problems, with a
95 % interval and the exchange beside it: how many problems the wide model alone, and the narrow one alone, answers. The last
line is one JSON object with everything printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numba
import torch

import llmlab
from llmlab import SamplingParams, tasks
from llmlab.kernels.dispatch import make_kernels, set_num_threads
from llmlab.kernels.quantized import parse_quantization, quantize_tensor
from llmlab.training.cards import wilson

FORMS = (None, "int8", "int4", "int4-g32", "int4-g64-sym")
CELLS = (("arith", 1, "slow", 64), ("arith", 2, "slow", 144), ("chat", 1, None, 200), ("doc", 1, None, 8))
LAYERS = {"qkv": (1024, 512), "output": (512, 512), "gate_up": (2816, 512), "down": (512, 1408)}
COPIES = 24  # of each layer: together more than the caches hold, in 4 bits too
BATCHES = (1, 2, 4, 8, 16, 32, 128)


def problems(cell: tuple[str, int, str | None, int], n: int) -> list[Any]:
    """Held-out problems of a cell; always the same ones."""
    suite, k, style, _ = cell
    rng = random.Random(f"quant-{suite}-{k}-{style}")
    return [tasks.suite(suite).problem(rng, k=k, style=style, split="test") for _ in range(n)]


def learned(llm: Any, demonstration: Any) -> tuple[list[int], list[bool]]:
    """A teacher's text as tokens, and which of them the model was to learn (not the prompt, no slips)."""
    tokenizer, text = llm.engine.tokenizer, demonstration.prompt
    ids = tokenizer.encode(text)
    mask = [False] * len(ids)
    for segment in demonstration.segments:
        text += segment.text
        ids = tokenizer.encode(text)
        mask = [*mask[: len(ids)], *[segment.learn] * (len(ids) - len(mask))]
    return ids, mask


def perplexity(llm: Any, n: int) -> float:
    """exp of the mean negative log-probability of the tokens that teachers' completions teach, given what precedes them."""
    total, count, longest = 0.0, 0, llm.engine.limits.max_model_len - 1
    for cell in CELLS:
        rng = random.Random("teacher")
        texts = [learned(llm, tasks.suite(cell[0]).demonstrate(problem, rng)) for problem in problems(cell, n)]
        outputs = llm.generate([ids[:longest] for ids, _ in texts], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
        for output, (_, mask) in zip(outputs, texts):
            scores = [score.logprob for score, taught in zip(output.prompt_logprobs, mask[1:]) if taught]  # entry i: token i + 1
            total, count = total - sum(scores), count + len(scores)
    return math.exp(total / count)


def accuracies(llm: Any, n: int) -> dict[str, list[bool]]:
    """Which problems of each cell a greedy answer solves."""
    found = {}
    for cell in CELLS:
        asked = problems(cell, n)
        outputs = llm.generate([p.prompt for p in asked], SamplingParams(max_tokens=cell[3], temperature=0.0))
        found[f"{cell[0]}-{cell[1]}"] = [bool(tasks.verify(p, o.outputs[0].text)) for p, o in zip(asked, outputs)]
    return found


def measure_models(names: list[str], n: int) -> list[dict[str, Any]]:
    """One row for each model and form."""
    rows: list[dict[str, Any]] = []
    for name in names:
        wide: dict[str, list[bool]] = {}
        for form in FORMS:
            llm = llmlab.LLM(name, quantization=form, max_num_seqs=32, log_level=0)
            solved = accuracies(llm, n)
            wide = wide or solved
            report = llm.engine.executor._loaded.quantization
            parameters = llm.engine.executor._loaded.shape.num_parameters()
            row = {"model": name, "weights": form or "f32", "MB": (report.bytes_after if report else parameters * 4) / 1e6,
                   "perplexity": perplexity(llm, max(10, n // 4))}  # fmt: skip
            for cell, right in solved.items():
                low, high = wilson(sum(right), len(right))
                lost = sum(a and not b for a, b in zip(wide[cell], right))
                won = sum(b and not a for a, b in zip(wide[cell], right))
                row[cell] = f"{sum(right) / len(right):.0%} ({low:.0%}-{high:.0%}) -{lost} +{won}"
            rows.append(row)
            print_row(row, first=len(rows) == 1)
            llm.engine.close()
    return rows


def race(contenders: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """Best seconds of each, in turns."""
    best = dict.fromkeys(contenders, float("inf"))
    spent = 0.0
    for call in contenders.values():
        call()
    while spent < seconds * len(contenders):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            best[name], spent = min(best[name], taken), spent + taken
    return best


def measure_linear() -> list[dict[str, Any]]:
    """All linear layers of COPIES layers of a 28M Llama in order, f32, bf16, int8 and int4 in turns."""
    kernels = make_kernels("numba")
    torch.manual_seed(0)
    weights = [torch.randn(*size) * 0.02 for _ in range(COPIES) for size in LAYERS.values()]
    forms: dict[str, list[Any]] = {"f32": [kernels.linear(w) for w in weights], "bf16": [kernels.linear(w.bfloat16()) for w in weights]}
    narrow = {form: [quantize_tensor(w, parse_quantization(form)) for w in weights] for form in ("int8", "int4")}
    forms |= {form: [kernels.linear(q) for q in tensors] for form, tensors in narrow.items()}
    size = {"f32": 4.0, "bf16": 2.0} | {form: sum(q.nbytes for q in t) / sum(w.numel() for w in weights) for form, t in narrow.items()}
    total = sum(w.numel() for w in weights)
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        inputs = {w.shape[1]: torch.randn(batch, w.shape[1]) for w in weights}

        def call(layers: list[Any], inputs: dict[int, torch.Tensor] = inputs) -> Callable[[], object]:
            return lambda: [layer(inputs[layer.in_features]) for layer in layers]

        best = race({name: call(layers) for name, layers in forms.items()})
        row: dict[str, Any] = {"batch": batch}
        for name, seconds in best.items():
            row |= {f"{name} ms": seconds * 1e3, f"{name} GB/s": total * size[name] / seconds / 1e9}
        row |= {f"{name} x f32": best["f32"] / best[name] for name in ("int8", "int4")}
        rows.append(row)
        print_row(row, first=batch == BATCHES[0])
    return rows


def print_row(row: dict[str, Any], first: bool) -> None:
    if first:
        print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
    print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lab-xs", "lab-s"])
    parser.add_argument("--n", type=int, default=100, help="problems of each cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=["models", "linear"], default=["models", "linear"])
    options = parser.parse_args()
    set_num_threads(options.threads)
    found: dict[str, Any] = {
        "host": platform.processor() or platform.machine(), "threads": options.threads, "python": platform.python_version(),
        "torch": torch.__version__, "numba": numba.__version__, "load": os.getloadavg()[0], "n": options.n,
    }  # fmt: skip
    if "models" in options.parts:
        print("\n### Perplexity and accuracy (-a +b: problems that only the wide, only the narrow weights solve)\n")
        found["models"] = measure_models(options.models, options.n)
    if "linear" in options.parts:
        print(f"\n### Linear layers of {COPIES} layers of a 28M Llama, {options.threads} threads; load of the host {found['load']:.1f}\n")
        found["linear"] = measure_linear()
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
