"""Batch sizes for which a decoding step is captured as a graph: pure arithmetic. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left

STEP = 8  # distance of the larger sizes: at most 7 rows are computed for nothing


def bucket_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, ... up to the first that holds `most` rows."""
    sizes = [1, 2, 4, *range(STEP, most + STEP, STEP)]
    return tuple(sizes[: bisect_left(sizes, most) + 1])


def bucket_for(rows: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest size that holds `rows`; None if there is none."""
    at = bisect_left(sizes, rows)
    return sizes[at] if rows > 0 and at < len(sizes) else None
