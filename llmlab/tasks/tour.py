"""The mixed problems that a first tour of the lab serves."""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmlab.tasks.base import Problem
from llmlab.tasks.doc import NUM_FAMILIES, Doc
from llmlab.tasks.registry import suite


@dataclass(frozen=True, slots=True)
class _Kind:
    suite: str
    k: int
    style: str | None
    weight: float


_KINDS = (_Kind("arith", 1, "slow", 0.25), _Kind("arith", 2, "slow", 0.25), _Kind("arith", 1, None, 0.05),
          _Kind("arith", 2, "think", 0.15), _Kind("chat", 1, None, 0.15), _Kind("doc", 1, "family", 0.15))


def tour_problems(seed: int, n: int) -> list[Problem]:
    """``n`` held-out problems: sums of products, chat of all lengths, records that share a long beginning.

    The difficulty is set so that ``lab-s`` gets most, not all, of them right.
    """
    rng = random.Random(f"tour-{seed}")
    family = f"family:{rng.randrange(NUM_FAMILIES)}"
    weights = [kind.weight for kind in _KINDS]
    return [_draw(kind, family, rng) for kind in rng.choices(_KINDS, weights, k=n)]


def _draw(kind: _Kind, family: str, rng: random.Random) -> Problem:
    if kind.suite == "doc":
        return Doc(max_tokens=512).problem(rng, k=kind.k, style=family, split="test")
    return suite(kind.suite).problem(rng, k=kind.k, style=kind.style, split="test")
