"""Measure the accuracy gates of a lab model and write them into its card.

    python -m llmlab.training.gates datasets/models/lab-s --n 200
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from llmlab import tasks
from llmlab.tasks import Problem
from llmlab.training.cards import Card, Gate, describe, load_card, save_card, wilson
from llmlab.training.net import from_llama, shape_of
from llmlab.training.sample import Sampling, generate


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured: a kind of problem, a way to answer, the budget, and what each model must reach."""

    suite: str
    k: int
    style: str | None
    method: str
    max_tokens: int
    required: dict[str, float]


CELLS = (
    Cell("arith", 1, "fast", "greedy", 32, {}),
    Cell("arith", 1, "slow", "greedy", 64, {"lab-xs": 0.30, "lab-s": 0.85, "lab-m": 0.90, "lab-moe": 0.50}),
    Cell("arith", 1, None, "greedy", 64, {"lab-s": 0.80, "lab-m": 0.85}),
    Cell("arith", 2, "fast", "greedy", 64, {}),
    Cell("arith", 2, "slow", "greedy", 144, {"lab-s": 0.50, "lab-m": 0.70}),
    Cell("arith", 3, "slow", "greedy", 208, {}),
    Cell("arith", 2, "think", "greedy", 360, {}),
    Cell("chat", 1, None, "greedy", 400, {"lab-s": 0.80, "lab-m": 0.80}),
    Cell("doc", 1, None, "greedy", 8, {"lab-s": 0.50, "lab-m": 0.50}),
    Cell("arith", 1, "slow", "sample", 64, {}),
    Cell("arith", 1, "slow", "majority16", 64, {}),
    Cell("arith", 2, "slow", "sample", 144, {}),
    Cell("arith", 2, "slow", "majority16", 144, {}),
)
_SAMPLES = 16


class Answerer:
    """Answers prompts with a shipped directory (float32)."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        weights = load_file(str(directory / "model.safetensors"))
        self.model = from_llama(shape_of(load_card(directory).name), weights)
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.seed = seed

    def answers(self, prompts: Sequence[str], max_tokens: int, temperature: float = 0.0) -> list[str]:
        """One completion per prompt, in order."""
        ids = [self.tokenizer.encode(p).ids for p in prompts]
        made = generate(self.model, ids, Sampling(max_tokens, temperature, self.seed))
        return [self.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in made]


def problems(cell: Cell, n: int, seed: int = 0) -> list[Problem]:
    """``n`` held-out problems of a cell."""
    rng = random.Random(f"gate-{seed}-{cell.suite}-{cell.k}-{cell.style}")
    return [tasks.suite(cell.suite).problem(rng, k=cell.k, style=cell.style, split="test") for _ in range(n)]


def measure(answerer: Answerer, cell: Cell, model: str, n: int) -> Gate:
    """The accuracy of one cell with its interval."""
    asked = problems(cell, n)
    copies = _SAMPLES if cell.method == "majority16" else 1
    temperature = 0.0 if cell.method == "greedy" else 1.0
    prompts = [p.prompt for p in asked for _ in range(copies)]
    texts = answerer.answers(prompts, cell.max_tokens, temperature)
    right = sum(_right(p, texts[i * copies:(i + 1) * copies]) for i, p in enumerate(asked))
    low, high = wilson(right, n)
    return Gate(cell.suite, cell.k, cell.style, cell.method, n, right, round(low, 4), round(high, 4),
                cell.required.get(model))


def _right(problem: Problem, texts: Sequence[str]) -> bool:
    if len(texts) == 1:
        return tasks.verify(problem, texts[0])
    votes = Counter(text.rpartition("#")[2] for text in texts)
    return votes.most_common(1)[0][0] == problem.gold


def working_points(gates: Sequence[Gate]) -> list[str]:
    """The cells where greedy decoding is right in 30 to 70 %: where methods can show a difference."""
    return [g.name for g in gates if g.method == "greedy" and 0.3 <= g.accuracy <= 0.7]


def run(directory: Path, n: int, cells: Sequence[Cell] = CELLS) -> Card:
    """Measure all cells; the card is written after each, so that an interrupted run leaves what it found."""
    card, answerer = load_card(directory), Answerer(directory)
    gates: list[Gate] = []
    for cell in cells:
        gates.append(measure(answerer, cell, card.name, n if cell.method != "majority16" else n // 2))
        card = msgspec.structs.replace(card, gates=gates, working_points=working_points(gates))
        save_card(card, directory)
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the accuracy gates of a lab model.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="greedy cells only, without writing the card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        answerer, name = Answerer(args.directory), load_card(args.directory).name
        for cell in (c for c in CELLS if c.method == "greedy"):
            gate = measure(answerer, cell, name, args.n)
            print(f"{gate.name:24} {gate.accuracy:6.1%} (n={gate.n})", flush=True)
        return
    for row in describe([run(args.directory, args.n)]):
        print("  ".join(row.values()))


if __name__ == "__main__":
    main()
