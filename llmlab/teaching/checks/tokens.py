"""Checks about choosing tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llmlab import rng

Nucleus = Callable[[Sequence[float], float], Sequence[int]]


def nucleus(answer: Nucleus) -> Iterator[str]:
    """`answer(probs, p)`: the ids of the smallest set of most likely tokens whose probabilities add up to at least p."""
    cases = [([0.5, 0.3, 0.2], 0.6), ([0.1, 0.2, 0.7], 0.7), ([0.25, 0.25, 0.25, 0.25], 0.5), ([0.2, 0.8], 1.0),
             ([0.9, 0.1], 1e-9)]  # fmt: skip
    for seed in range(20):
        weights = [1 + rng.integer(seed, "nucleus", i, 1 << 10) for i in range(4 + seed)]
        cases.append(([w / sum(weights) for w in weights], (1 + rng.integer(seed, "p", 0, 98)) / 100))
    for probs, p in cases:
        got, wanted = answer(list(probs), p), _nucleus(probs, p)
        if got is None:
            yield "It returned None: return the list of ids."
            return
        if sorted(got) != sorted(wanted):
            yield f"For p={p:g} and probabilities {_short(probs)} it kept ids {sorted(got)}, not {sorted(wanted)}."


def _nucleus(probs: Sequence[float], p: float) -> list[int]:
    kept, total = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        kept.append(token)
        total += probs[token]
        if total >= p - 1e-12:
            break
    return kept


def _short(probs: Sequence[float]) -> str:
    return "[" + ", ".join(f"{p:.3g}" for p in probs[:5]) + (", ...]" if len(probs) > 5 else "]")
