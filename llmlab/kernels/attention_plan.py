"""Who attends to what: one step's attention cut into items and dealt to the threads, before it runs.

Pure and deterministic: the same lengths give the same plan. Made once per step, used by every layer.
Source: the inspector of FlashInfer (arXiv 2501.01005, section 3.3), with one difference: a row is cut
at fixed positions (every SEGMENT), and its segments are always merged in order, whether one thread has
them all or several share them. So the plan moves work, never a bit of the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

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


def _nth(counts: np.ndarray) -> np.ndarray:
    """0 .. counts[i]-1 for each i, one behind the other."""
    first: np.ndarray = np.repeat(np.cumsum(counts) - counts, counts)
    return np.arange(len(first)) - first


def cut_tiles(cu: np.ndarray, lens: np.ndarray, tile: int, window: int, causal: bool) -> np.ndarray:
    """All query tiles as undivided items, each with the KV range that its queries see between them."""
    counts = -(-np.diff(cu) // tile)
    row = np.repeat(np.arange(len(lens)), counts)
    token = cu[row] + _nth(counts) * tile
    tokens = np.minimum(tile, cu[row + 1] - token)
    first = lens[row] - (cu[row + 1] - token)
    start = np.maximum(0, first - window + 1) if window > 0 else np.zeros_like(first)
    stop = first + tokens if causal else lens[row]
    return np.stack((row, token, tokens, start, stop, np.full_like(row, -1)), 1)


def item_cost(items: np.ndarray, group: int) -> np.ndarray:
    """Of one KV head, in rows x positions."""
    positions: np.ndarray = items[:, STOP] - items[:, START]
    return positions * (items[:, TOKENS] * group + GATHER_ROWS)


def divide(tiles: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut tile i at every SEGMENT if parts[i] > 1; returns the items and the merges."""
    items = np.repeat(tiles, parts, axis=0)
    cut = np.repeat(parts, parts) > 1
    segment = items[:, START] // SEGMENT + _nth(parts)
    items[cut, START] = np.maximum(items[:, START], segment * SEGMENT)[cut]
    items[cut, STOP] = np.minimum(items[:, STOP], (segment + 1) * SEGMENT)[cut]
    kept = items[cut, TOKENS]
    items[cut, PARTIAL] = np.cumsum(kept) - kept
    first = (np.cumsum(parts) - parts)[parts > 1]
    whole = tiles[parts > 1]
    return items, np.stack((whole[:, TOKEN], whole[:, TOKENS], items[first, PARTIAL], parts[parts > 1]), 1)


def deal(cost: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Contiguous units for each thread, cut where the running cost passes the thread's share."""
    done = np.concatenate(([0.0], np.cumsum(cost)))
    shares = done[-1] / threads * np.arange(1, threads)
    starts = np.concatenate(([0], np.searchsorted(done[1:] - cost / 2, shares), [len(cost)]))
    return starts, np.diff(done[starts])


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

    cu_seqlens_q [R+1], seq_lens [R] int32 as in `AttentionMetadata`. A tile is divided if one thread
    alone would hold the others up with it.
    """
    cu, lens = cu_seqlens_q.astype(np.int64), seq_lens.astype(np.int64)
    items = cut_tiles(cu, lens, tile_tokens(group), window or 0, causal)
    cost, merges = item_cost(items, group), np.empty((0, 4), np.int64)
    if threads > 1:
        parts = (items[:, STOP] - 1) // SEGMENT - items[:, START] // SEGMENT + 1
        parts[cost * 8 * threads <= cost.sum() * heads] = 1
        if parts.max(initial=1) > 1:
            items, merges = divide(items, parts)
            cost = item_cost(items, group)
    starts, load = deal(np.repeat(cost, heads), threads)
    return AttnPlan(items, starts, merges, int((merges[:, 1] * merges[:, 3]).sum()), load)
