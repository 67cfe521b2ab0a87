"""Who attends to what: one step's attention cut into items and dealt to the threads, before it runs.

Pure and deterministic: the same lengths give the same plan. Made once per step, used by every layer.
Source: the inspector of FlashInfer (arXiv 2501.01005, section 3.3), with one difference: a row is cut
at fixed positions (every SEGMENT), and its segments are always merged in order, whether one thread has
them all or several share them. So the plan moves work, never a bit of the result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

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


# ------------------------------------------------------------------------------------ plans of a GPU's grid
ROUND = 16  # a KV range is cut at multiples of this many positions: a block of the cache, or half of one
BALANCED = 1.1  # makespan over mean load that is good enough
QUERY_COST, KV_COST = 2, 1  # of a query token and of a KV position, per KV head


@dataclass(frozen=True, eq=False)
class GridPlan:
    """Items of one step, and which program of a persistent grid runs which, in which order.

    - `items [N, 6] int32`: columns ROW .. PARTIAL. Unit `i * heads + h` is item i for KV head h.
    - `queue [U] int32`: units in the order of execution; program p runs `queue[starts[p] : starts[p+1]]`.
    - `merges [T, 3] int32`: per query token of the step (first partial, distance to the next, parts);
      0 parts: its item wrote the output itself.
    - `num_partials`: partial states to keep, in query tokens. `limit`: longest KV range of an item.
    - `load [programs] float64`: cost dealt to each program.
    """

    items: np.ndarray
    queue: np.ndarray
    starts: np.ndarray
    merges: np.ndarray
    num_partials: int
    limit: int
    load: np.ndarray

    @property
    def imbalance(self) -> float:
        """Largest load over the mean load: 1 is a perfect deal."""
        mean = float(self.load.mean())
        return float(self.load.max()) / mean if mean else 1.0

    @property
    def num_divided(self) -> int:
        """Query tokens whose KV was divided."""
        return int((self.merges[:, 2] > 0).sum())

    def facts(self) -> dict[str, float]:
        """What a log keeps of it."""
        return {
            "items": len(self.items), "programs": len(self.load), "limit": self.limit, "divided": self.num_divided,
            "partials": self.num_partials, "imbalance": round(self.imbalance, 4),
        }  # fmt: skip


def unit_cost(items: np.ndarray) -> np.ndarray:
    """Of one KV head: `QUERY_COST` per query token and `KV_COST` per position read."""
    return QUERY_COST * items[:, TOKENS] + KV_COST * np.maximum(0, items[:, STOP] - items[:, START])


def divide_evenly(tiles: np.ndarray, limit: int) -> np.ndarray:
    """Tile i in as few equal parts as the limit allows, each cut at a multiple of ROUND."""
    base = tiles[:, START] // ROUND * ROUND
    length = np.maximum(1, tiles[:, STOP] - base)
    parts = -(-length // limit)
    size = -(-length // (parts * ROUND)) * ROUND
    parts = -(-length // size)
    items, nth = np.repeat(tiles, parts, axis=0), _nth(parts)
    first = np.repeat(base, parts) + nth * np.repeat(size, parts)
    items[:, START] = np.maximum(items[:, START], first)
    items[:, STOP] = np.minimum(items[:, STOP], first + np.repeat(size, parts))
    cut = np.repeat(parts, parts) > 1
    kept = items[cut, TOKENS]
    items[cut, PARTIAL] = np.cumsum(kept) - kept
    return items


def merge_table(items: np.ndarray, num_tokens: int) -> np.ndarray:
    """`GridPlan.merges` of divided items: the parts of a tile lie one behind the other."""
    merges = np.zeros((num_tokens, 3), np.int32)
    cut = items[items[:, PARTIAL] >= 0]
    for offset in range(int(cut[:, TOKENS].max(initial=0))):
        some = cut[cut[:, TOKENS] > offset]
        token = some[:, TOKEN] + offset
        first, where, parts = np.unique(token, return_index=True, return_counts=True)
        merges[first, 0] = some[where, PARTIAL] + offset
        merges[first, 1] = some[where, TOKENS]
        merges[first, 2] = parts
    return merges


def deal_in_rounds(cost: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Longest first to the least loaded, a round of one unit per program at a time: (queue, starts, load).

    A round keeps what a heap gives (no program is ahead by more than one unit) and is a few numpy calls.
    """
    order = np.argsort(-cost, kind="stable")
    load, owner = np.zeros(programs), np.empty(len(cost), np.int64)
    for first in range(0, len(order), programs):
        units = order[first : first + programs]
        free = np.argsort(load, kind="stable")[: len(units)]
        owner[first : first + programs] = free
        load[free] += cost[units]
    queue = order[np.argsort(owner, kind="stable")]
    starts = np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=programs))))
    return queue, starts, load


def _grid_plan(items: np.ndarray, heads: int, programs: int, num_tokens: int, limit: int) -> GridPlan:
    queue, starts, load = deal_in_rounds(np.repeat(unit_cost(items), heads), programs)
    cut = items[:, PARTIAL] >= 0
    return GridPlan(
        items.astype(np.int32), queue.astype(np.int32), starts.astype(np.int32), merge_table(items, num_tokens),
        int(items[cut, TOKENS].sum()), limit, load,
    )  # fmt: skip


def plan_grid(
    cu_seqlens_q: np.ndarray,
    seq_lens: np.ndarray,
    *,
    heads: int,
    programs: int,
    tile: int,
    window: int | None = None,
    causal: bool = True,
    rows: np.ndarray | None = None,
    chunk: int | None = None,
) -> GridPlan:
    """The plan of one step for `programs` persistent programs; `tile` query tokens are attended to together.

    cu_seqlens_q [R+1], seq_lens [R]. `rows`: bool [R], the rows to plan (all by default). `chunk`: cut at
    this many positions, whatever the batch holds, so that a row's sums do not depend on its neighbours;
    by default the KV of the step is divided by the programs, and finer (a half, a quarter) if the whole
    rows left would keep one program busy while others wait.
    Source: FlashInfer, arXiv 2501.01005, algorithm 1.
    """
    cu, lens = cu_seqlens_q.astype(np.int64), seq_lens.astype(np.int64)
    tiles = cut_tiles(cu, lens, tile, window or 0, causal)
    if rows is not None:
        tiles = tiles[rows[tiles[:, ROW]]]
    tokens, read = int(cu[-1]), int(np.maximum(0, tiles[:, STOP] - tiles[:, START]).sum()) * heads
    if chunk is not None:
        return _grid_plan(divide_evenly(tiles, chunk), heads, programs, tokens, chunk)
    best: GridPlan | None = None
    for finer in (1, 2, 4):
        limit = max(ROUND, -(-read // (programs * finer * ROUND)) * ROUND)
        plan = _grid_plan(divide_evenly(tiles, limit), heads, programs, tokens, limit)
        if best is None or plan.load.max() < best.load.max():
            best = plan
        if best.imbalance <= BALANCED or limit == ROUND:
            break
    assert best is not None
    return best


def plan_per_row(
    cu_seqlens_q: np.ndarray, seq_lens: np.ndarray, *, heads: int, programs: int, tile: int, window: int | None = None
) -> GridPlan:  # fmt: skip
    """What kernels without a plan do: a tile and a head is one unit, dealt in order. The baseline."""
    cu, lens = cu_seqlens_q.astype(np.int64), seq_lens.astype(np.int64)
    items = cut_tiles(cu, lens, tile, window or 0, True)
    cost = np.repeat(unit_cost(items), heads)
    owner = np.arange(len(cost)) % programs
    load = np.bincount(owner, weights=cost, minlength=programs)
    queue = np.argsort(owner, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=programs))))
    return GridPlan(items.astype(np.int32), queue.astype(np.int32), starts.astype(np.int32),
                    merge_table(items, int(cu[-1])), 0, int(lens.max(initial=0)), load)  # fmt: skip


class PlanCapacity(NamedTuple):
    """The largest plan that a number of decoding rows can have: items, queued units, partial states."""

    items: int
    units: int
    partials: int


def plan_capacity(rows: int, heads: int, programs: int) -> PlanCapacity:
    """Room for any `plan_grid` of `rows` rows of one query token: what a captured graph sets aside.

    A row has at most one part more than its length over the limit, one for its uneven beginning, and the
    limit is never smaller than a quarter of a program's share.
    """
    items = 2 * rows + -(-4 * programs // heads)
    return PlanCapacity(items, items * heads, items)
