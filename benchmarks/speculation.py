"""Speculative decoding on this CPU: one stream and a batch, llmlab's sources beside transformers' assisted generation.

    python benchmarks/speculation.py --model lab-s --draft lab-xs
    python benchmarks/speculation.py --model lab-m --draft lab-xs --json out.json --only llmlab

The same prompts (arithmetic chains, and documents that are to be read out), greedy, one thread. Every number is measured:
median over `--repeats` of output tokens per second, the prompt's time included. Answers must be those of plain decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {}, "n-gram, k=4": {"speculation": "ngram"}, "n-gram, ewma": {"speculation": "ngram", "draft_policy": "ewma"}, "n-gram, goodput": {"speculation": "ngram", "draft_policy": "goodput"},
    "draft, k=3": {"speculation": "DRAFT", "num_speculative_tokens": 3}, "draft, k=6": {"speculation": "DRAFT", "num_speculative_tokens": 6},
    "draft, k=4": {"speculation": "DRAFT", "num_speculative_tokens": 4}, "draft, k=8": {"speculation": "DRAFT", "num_speculative_tokens": 8},
    "draft, ewma": {"speculation": "DRAFT", "num_speculative_tokens": 10, "draft_policy": "ewma"},
    "draft, k=10": {"speculation": "DRAFT", "num_speculative_tokens": 10},
    "draft, goodput": {"speculation": "DRAFT", "num_speculative_tokens": 10, "draft_policy": "goodput"},
    "heads, k=1": {"speculation": "heads", "num_speculative_tokens": 1}, "heads, k=2": {"speculation": "heads", "num_speculative_tokens": 2},
    "heads, k=4": {"speculation": "heads", "num_speculative_tokens": 4}, "heads, k=8": {"speculation": "heads", "num_speculative_tokens": 8},
    "heads, ewma": {"speculation": "heads", "num_speculative_tokens": 6, "draft_policy": "ewma"},
    "heads, goodput": {"speculation": "heads", "num_speculative_tokens": 6, "draft_policy": "goodput"},
}  # fmt: skip


def prompts_of(suite: str, count: int, seed: int = 0) -> list[str]:
    """Held-out problems of the lab's own tasks."""
    from llmlab import tasks

    dice = random.Random(seed)
    return [tasks.suite(suite).problem(dice, k=3 if suite == "arith" else 1, split="test").prompt for _ in range(count)]


def can_run(name: str, model: str) -> bool:
    """Whether the model has what this configuration drafts with."""
    from llmlab.models.zoo import resolve

    directory = resolve(model).directory
    return "heads" not in name or (directory is not None and (directory / "heads.safetensors").exists())


def llmlab_run(model: str, fields: dict[str, Any], prompts: Sequence[str], suite: str, batch: int, max_tokens: int) -> dict[str, Any]:
    """An engine that has served before, as many other prompts at once: caches are warm, prices computed, sources known."""
    import llmlab

    params = llmlab.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    with llmlab.LLM(model, num_threads=1, check_interval=0, enable_prefix_caching=False, max_num_seqs=batch, **fields) as llm:
        llm.generate(prompts_of(suite, max(4, batch), seed=1), params)
        began = time.perf_counter()
        if batch == 1:
            outs = [llm.generate(prompt, params)[0] for prompt in prompts]
        else:
            outs = llm.generate(list(prompts), params)
        seconds = time.perf_counter() - began
        metrics = llm.run.metrics
    tokens = [out.outputs[0].token_ids for out in outs]
    return {"tokens_per_second": sum(map(len, tokens)) / seconds, "answers": tokens, "acceptance": metrics.acceptance_rate,
            "tokens_per_verification": metrics.tokens_per_verification}  # fmt: skip


def transformers_run(model: str, draft: str | None, prompts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    """Greedy `generate`, one prompt at a time, as its assisted generation asks for."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmlab.models.loader import load_model
    from llmlab.models.zoo import resolve

    torch.set_num_threads(1)
    folder = resolve(model).directory
    tokenizer = load_model(model, "f32").tokenizer
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    extra: dict[str, Any] = {}
    if draft == "prompt lookup":
        extra = {"prompt_lookup_num_tokens": 4}
    elif draft is not None:
        extra = {"assistant_model": AutoModelForCausalLM.from_pretrained(resolve(draft).directory, dtype=torch.float32)}
    answers, seconds = [], 0.0
    for index, prompt in enumerate([prompts[0], *prompts]):
        ids = torch.tensor([tokenizer.encode(prompt)])
        began = time.perf_counter()
        out = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, **extra)
        seconds += (time.perf_counter() - began) if index else 0.0  # the first one warms up
        answers.append(out[0, ids.shape[1] :].tolist())
    return {"tokens_per_second": sum(map(len, answers[1:])) / seconds, "answers": answers[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lab-s")
    parser.add_argument("--draft", default="lab-xs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--configs", default=",".join(CONFIGS).replace(", ", "; "))
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--suite", choices=("arith", "chat", "doc"), default="arith")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    for batch in map(int, args.batches.split(",")):
        prompts = prompts_of(args.suite, max(3 * batch, args.prompts))  # a batch that stays full for a while
        names = [name for name in CONFIGS if name.replace(", ", "; ") in args.configs.split(",") and can_run(name, args.model)]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                fields = {k: args.draft if v == "DRAFT" else v for k, v in CONFIGS[name].items()}
                found[name].append(llmlab_run(args.model, fields, prompts, args.suite, batch, args.max_tokens))
        if args.transformers and batch == 1:
            for name, draft in (("transformers", None), ("transformers, assisted", args.draft), ("transformers, prompt lookup", "prompt lookup")):
                found[name] = [transformers_run(args.model, draft, prompts, args.max_tokens)]
        plain = statistics.median(r["tokens_per_second"] for r in found["plain"]) if "plain" in found else 1.0
        for name, runs in found.items():
            rate = statistics.median(r["tokens_per_second"] for r in runs)
            same = "plain" not in found or runs[0]["answers"] == found["plain"][0]["answers"]
            report[f"{name} @ {batch}"] = {"tokens_per_second": rate, "speed_up": rate / plain, "same_answers": same,
                                           "acceptance": runs[0].get("acceptance"), "per_verification": runs[0].get("tokens_per_verification")}  # fmt: skip
            print(f"batch {batch:2d}  {name:28s} {rate:8.1f} tok/s  {rate / plain:5.2f}x  acceptance {runs[0].get('acceptance') or 0:.2f}  "
                  f"{runs[0].get('tokens_per_verification') or 0:.2f} tokens a verification  same answers: {same}", flush=True)  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
