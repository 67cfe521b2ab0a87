"""Checks about paged memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llmlab import rng
from llmlab.memory.block_table import slots

Slot = Callable[[Sequence[int], int, int], int]


def slot(answer: Slot) -> Iterator[str]:
    """`answer(table, block_size, position)`: as the engine's own block tables place it."""
    cases = [([7, 2, 9], 4), ([0, 1, 2], 16), ([3], 1), ([5, 4, 3, 2, 1, 0], 8)]
    cases += [([rng.integer(seed, "block", i, 500) for i in range(1 + seed)], 1 + rng.integer(seed, "size", 0, 64)) for seed in range(8)]
    for table, size in cases:
        for position, wanted in enumerate(slots(table, size, 0, len(table) * size)):
            got = answer(list(table), size, position)
            if got != wanted:
                yield f"Token {position} with table {table[:6]} and blocks of {size}: you say {got}, it lies at {wanted}."
                break
