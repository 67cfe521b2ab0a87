"""Who attends to what: one step's attention cut into items and dealt to the threads, before it runs.

Pure and deterministic: the same lengths give the same plan. Made once per step, used by every layer.
Source: the inspector of FlashInfer (arXiv 2501.01005, section 3.3), with one difference: a row is cut
at fixed positions (every SEGMENT), and its segments are always merged in order, whether one thread has
them all or several share them. So the plan moves work, never a bit of the result.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 64  # KV positions gathered and scored at a time
SEGMENT = 512  # KV positions that make one partial state: a multiple of CHUNK
QUERY_ROWS = 64  # rows (query tokens x heads of a group) of a tile, if a group is not larger
GATHER_ROWS = 16  # what gathering a KV position costs, in rows of arithmetic on it (measured)

# Columns of an item: the row, its first query token (of the step) and their number, the KV range, and
# where its partial states go (in tokens), -1 if it writes the output itself.
ROW, TOKEN, TOKENS, START, STOP, PARTIAL = range(6)


@dataclass(frozen=True, eq=False)
class AttnPlan:
    """Items of one step, and which thread runs which.

    - `items [N, 6] int64`: columns ROW .. PARTIAL. Unit `i * heads + h` is item i for KV head h.
    - `starts [threads + 1] int64`: thread t runs the units `starts[t] : starts[t+1]`.
    - `merges [G, 4] int64`: (first token, tokens, first partial, parts) of each divided item.
    - `num_partials`: partial states to keep, in query tokens.
    - `load [threads] float64`: cost dealt to each thread, in rows x positions.
    """

    items: np.ndarray
    starts: np.ndarray
    merges: np.ndarray
    num_partials: int
    load: np.ndarray

    @functools.cached_property
    def threads(self) -> int:
        return len(self.starts) - 1

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int]:
        """Where items, starts and merges lie, and the number of merges: for the kernel."""
        return self.items.ctypes.data, self.starts.ctypes.data, self.merges.ctypes.data, len(self.merges)

    @property
    def imbalance(self) -> float:
        """Largest load over the mean load: 1 is a perfect deal."""
        mean = float(self.load.mean())
        return float(self.load.max()) / mean if mean else 1.0


def tile_tokens(group: int) -> int:
    """Query tokens of a tile: as many as fill QUERY_ROWS with the heads that share a KV head."""
    return max(1, QUERY_ROWS // group)


def cut_tiles(cu, lens, tile, window, causal):
    """All query tiles as undivided items, each with the KV range that its queries see between them."""
    count = 0
    for row in range(lens.size):
        count += (cu[row + 1] - cu[row] + tile - 1) // tile
    tiles = np.empty((count, 6), np.int64)
    at = 0
    for row in range(lens.size):
        before = lens[row] - (cu[row + 1] - cu[row])
        for token in range(cu[row], cu[row + 1], tile):
            tokens = min(tile, cu[row + 1] - token)
            first = before + token - cu[row]
            stop = first + tokens if causal else lens[row]
            start = max(0, first - window + 1) if window > 0 else 0
            tiles[at, 0], tiles[at, 1], tiles[at, 2] = row, token, tokens
            tiles[at, 3], tiles[at, 4], tiles[at, 5] = start, stop, -1
            at += 1
    return tiles


def divide(tiles, group, heads, threads):
    """Cut tiles too heavy to balance at every SEGMENT; returns (items, merges, number of partials)."""
    cost = (tiles[:, 4] - tiles[:, 3]) * (tiles[:, 2] * group + GATHER_ROWS)
    limit = cost.sum() * heads // (8 * threads)
    parts = (tiles[:, 4] - 1) // SEGMENT - tiles[:, 3] // SEGMENT + 1
    parts = np.where((cost > limit) & (threads > 1), parts, 1)
    items = np.empty((parts.sum(), 6), np.int64)
    merges = np.empty(((parts > 1).sum(), 4), np.int64)
    at, group_at, partials = 0, 0, 0
    for i in range(len(tiles)):
        if parts[i] > 1:
            merges[group_at, 0], merges[group_at, 1] = tiles[i, 1], tiles[i, 2]
            merges[group_at, 2], merges[group_at, 3] = partials, parts[i]
            group_at += 1
        start = tiles[i, 3]
        for _ in range(parts[i]):
            items[at] = tiles[i]
            if parts[i] > 1:
                stop = min(tiles[i, 4], (start // SEGMENT + 1) * SEGMENT)
                items[at, 3], items[at, 4], items[at, 5] = start, stop, partials
                start, partials = stop, partials + tiles[i, 2]
            at += 1
    return items, merges, partials


def deal(items, group, heads, threads):
    """Contiguous units for each thread, cut where the running cost passes each thread's share."""
    cost = (items[:, 4] - items[:, 3]) * (items[:, 2] * group + GATHER_ROWS)
    total = cost.sum() * heads
    starts, load = np.zeros(threads + 1, np.int64), np.zeros(threads)
    thread, done = 0, 0
    for i in range(len(items)):
        for head in range(heads):
            middle = (2 * done + cost[i]) * threads
            while thread < threads - 1 and middle > 2 * total * (thread + 1):
                thread += 1
                starts[thread] = i * heads + head
            load[thread] += cost[i]
            done += cost[i]
    starts[thread + 1 :] = len(items) * heads
    return starts, load


def plan_attention(
    cu_seqlens_q: np.ndarray,
    seq_lens: np.ndarray,
    *,
    heads: int,
    group: int,
    threads: int,
    window: int | None = None,
    causal: bool = True,
) -> AttnPlan:
    """The plan of one step: `heads` KV heads, each shared by `group` query heads, on `threads` threads.

    cu_seqlens_q [R+1], seq_lens [R] int32 as in `AttentionMetadata`.
    """
    cut, split, give = _compiled()
    tiles = cut(cu_seqlens_q, seq_lens, tile_tokens(group), window or 0, causal)
    items, merges, partials = split(tiles, group, heads, threads)
    starts, load = give(items, group, heads, threads)
    return AttnPlan(items, starts, merges, int(partials), load)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], ...]:
    """The three steps in machine code where numba is installed: a plan then costs microseconds."""
    try:
        import numba
    except ImportError:
        return cut_tiles, divide, deal
    return tuple(numba.njit(cache=True, error_model="numpy")(step) for step in (cut_tiles, divide, deal))
