"""Paged attention for ragged batches on the CPU.

A thread takes units of the plan (a tile of queries, a range of KV, one KV head). It gathers CHUNK
positions from the scattered blocks into dense tiles, the keys transposed, and then both products of
attention are the same register tiles that the linear layers use. Softmax runs online within a SEGMENT;
segments merge by their log-sum-exp in order. Nothing in a query's arithmetic depends on the batch, on
how its prompt was cut into chunks, or on the number of threads.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab.kernels.attention_plan import (
    CHUNK,
    GATHER_ROWS,
    PARTIAL,
    ROW,
    SEGMENT,
    START,
    STOP,
    TOKEN,
    TOKENS,
    AttnPlan,
    tile_tokens,
)
from llmlab.kernels.layout import AttentionMetadata, AttentionState
from llmlab.kernels.linear import share
from llmlab.kernels.norm_rope import regular
from llmlab.kernels.pool import Call, Pool, Region, barrier, record, thread_num
from llmlab.kernels.vector import (
    BF16,
    F16,
    F32,
    LANES,
    PANEL,
    compiled,
    copy,
    exp,
    get,
    get_int,
    get_long,
    highest,
    prefetch,
    product,
    put,
    put_long,
    scattered_product,
    spliced,
    tanh,
    transpose,
    width,
)
from llmlab.types import MAX_NODES, LabError

highest_score = highest(CHUNK)
LOWEST = np.float32(-1e30)  # the maximum of no scores: finite, so that differences stay numbers


class Tiles(NamedTuple):
    """Addresses of a thread's working memory, for a tile of M rows (query tokens x heads of a group)."""

    queries: int  # [M, dim], already scaled
    keys: int  # [CHUNK / PANEL][dim][PANEL]
    values: int  # [CHUNK, wide], if dim is not whole panels; wide = dim rounded up to PANEL
    scores: int  # [M, CHUNK]
    out: int  # [M, wide]: the running sum of the segment
    total: int  # [M, wide]: the merged segments
    stats: int  # [3, M]: maximum and sum of the segment, lse of the merged segments
    lines: int  # [2][2, CHUNK] int64: where keys and values of the current and of the next chunk lie


def tile_floats(rows: int, dim: int) -> int:
    """Floats of working memory of one thread."""
    wide = -(-dim // PANEL) * PANEL
    return rows * dim + CHUNK * (dim + wide) + rows * (CHUNK + 2 * wide + 3) + 8 * CHUNK + 16


@compiled()
def lay_out(at, rows, dim, wide):
    keys = at + 32 * CHUNK
    values = keys + 4 * CHUNK * dim
    scores = values + 4 * CHUNK * wide
    queries = scores + 4 * rows * CHUNK
    out = queries + 4 * rows * dim
    total = out + 4 * rows * wide
    return Tiles(queries, keys, values, scores, out, total, total + 4 * rows * wide, at)


@compiled()
def find_lines(a, row, head, chunk, start, stop, lines, storage):
    """The addresses of the positions of a chunk from `start` to `stop`, of one KV head; returns their number.

    Those before repeat the first of them, those behind (up to a multiple of LANES) the last: nothing
    outside start..stop is touched, be it freed by a sliding window or never written.
    """
    line, i, count = width(storage) * a.dim, max(start - chunk, 0), min(CHUNK, stop - chunk)
    first = i
    while i < count:
        index, slot = (chunk + i) // a.block_size, (chunk + i) % a.block_size
        block = np.int64(get_int(a.block_tables, row * a.table_width + index))
        at = width(storage) * (block * a.block_stride + head * a.head_stride) + slot * line
        end = min(count, i + a.block_size - slot)
        while i < end:
            put_long(lines, i, a.k_cache + at)
            put_long(lines, CHUNK + i, a.v_cache + at)
            at, i = at + line, i + 1
    for i in range(first):
        put_long(lines, i, get_long(lines, first))
        put_long(lines, CHUNK + i, get_long(lines, CHUNK + first))
    for i in range(count, (count + LANES - 1) // LANES * LANES):
        put_long(lines, i, get_long(lines, count - 1))
        put_long(lines, CHUNK + i, get_long(lines, CHUNK + count - 1))
    return count


@compiled()
def gather(a, tiles, wide, count, lines, ahead, ahead_count, storage):
    """The keys of a chunk, transposed, to `tiles.keys`; the chunk `ahead` is asked for meanwhile."""
    for i in range(0, count, LANES):
        target = tiles.keys + 4 * (i // PANEL * a.dim * PANEL + i % PANEL)
        for d in range(0, a.dim, LANES):
            for position in range(i, i + LANES):
                prefetch(get_long(ahead, position) + width(storage) * d)
            transpose(lines + 8 * i, d, target + 4 * d * PANEL, storage)
    for position in range(count, ahead_count):
        for d in range(0, a.dim, LANES):
            prefetch(get_long(ahead, position) + width(storage) * d)
            prefetch(get_long(ahead, CHUNK + position) + width(storage) * d)
    if a.dim < wide:  # the product reads whole panels: give it rows of that width
        for i in range(count):
            target = tiles.values + width(storage) * i * wide
            for d in range(0, a.dim, LANES):
                copy(get_long(lines, CHUNK + i) + width(storage) * d, target + width(storage) * d, storage)
            put_long(lines, CHUNK + i, target)


@compiled()
def score(a, tiles, rows, count):
    """scores[rows, CHUNK] = queries @ keys for the first `count` positions (whole panels)."""
    for i in range(rows * CHUNK):
        put(tiles.scores, i, np.float32(0.0))
    for i in range(0, count, PANEL):
        keys = tiles.keys + 4 * i * a.dim
        product(tiles.queries, a.dim, keys, tiles.scores + 4 * i, CHUNK, rows, a.dim, keys, F32)


@compiled("contract", "reassoc", "nnan", "nsz")
def soften(scores, low, high, fork, nodes, softcap, top):
    """Scores low..high (others are unseen) to exp(score - new maximum); returns (new maximum, sum). `nodes`: bit j tells
    whether position fork + j is seen, too, if it is not 0."""
    if softcap > 0:
        for i in range(CHUNK):
            put(scores, i, softcap * tanh(get(scores, i) / softcap))
    if low > 0 or high < CHUNK:
        for i in range(CHUNK):
            put(scores, i, get(scores, i) if low <= i and i < high else -np.float32(np.inf))
    if nodes != 0:
        for i in range(max(fork, 0), CHUNK):
            if nodes >> min(i - fork, MAX_NODES) & 1 == 0:
                put(scores, i, -np.float32(np.inf))
    top, total = max(top, highest_score(scores)), np.float32(0.0)
    for i in range(CHUNK):
        weight = exp(get(scores, i) - top)
        put(scores, i, weight)
        total += weight
    return top, total


@compiled()
def soften_rows(a, tiles, token, rows, wide, own, length, first):
    """The online softmax step of every row of a tile; row 0 belongs to the query `token` at position `own`."""
    for m in range(rows):
        position, fork, nodes = own + m // a.group, np.int64(0), np.int64(0)
        if a.seen != 0:
            nodes = get_long(a.seen, token + m // a.group)
            fork = get_long(a.forks, token + m // a.group) - first
        high = (position + 1 if a.causal else length) - first
        low = position - a.window + 1 - first if a.window > 0 else 0
        before = get(tiles.stats, m)
        top, total = soften(tiles.scores + 4 * m * CHUNK, low, high, fork, nodes, np.float32(a.softcap), before)
        keep = exp(before - top)
        put(tiles.stats, m, top)
        put(tiles.stats, rows + m, get(tiles.stats, rows + m) * keep + total)
        if keep != np.float32(1.0):
            out = tiles.out + 4 * m * wide
            for d in range(wide):
                put(out, d, get(out, d) * keep)


@compiled()
def merge_row(total, lse, part, part_lse, size):
    """total[size], lse := the state merged with (part, part_lse); returns the new lse."""
    if part_lse == -np.float32(np.inf):
        return lse
    top = max(lse, part_lse)
    keep, add = exp(lse - top), exp(part_lse - top)
    both = keep + add
    keep, add = keep / both, add / both
    for d in range(size):
        put(total, d, get(total, d) * keep + get(part, d) * add)
    return top + np.float32(np.log(both))


@compiled()
def close_segment(tiles, rows, wide):
    """Normalise the segment, merge it into the total, start an empty one."""
    for m in range(rows):
        out, weight, lse = tiles.out + 4 * m * wide, get(tiles.stats, rows + m), -np.float32(np.inf)
        if weight > 0:
            lse = get(tiles.stats, m) + np.float32(np.log(weight))
            for d in range(wide):
                put(out, d, get(out, d) / weight)
        merged = merge_row(tiles.total + 4 * m * wide, get(tiles.stats, 2 * rows + m), out, lse, wide)
        put(tiles.stats, m, LOWEST)
        put(tiles.stats, rows + m, np.float32(0.0))
        put(tiles.stats, 2 * rows + m, merged)
        for d in range(wide):
            put(out, d, np.float32(0.0))


@compiled()
def open_tile(a, tiles, token, rows, head, wide):
    """Scaled queries of a tile, and an empty state."""
    for m in range(rows):
        query = a.q + 4 * ((token + m // a.group) * a.q_stride + (head * a.group + m % a.group) * a.dim)
        for d in range(a.dim):
            put(tiles.queries, m * a.dim + d, get(query, d) * np.float32(a.scale))
        put(tiles.stats, m, LOWEST)
        put(tiles.stats, rows + m, np.float32(0.0))
        put(tiles.stats, 2 * rows + m, -np.float32(np.inf))
    for i in range(rows * wide):
        put(tiles.out, i, np.float32(0.0))
        put(tiles.total, i, np.float32(0.0))


@compiled()
def close_tile(a, tiles, token, rows, head, wide, out, lse):
    """Write the states of a tile to out [., Hq, dim] and lse [., Hq]."""
    for m in range(rows):
        at = ((token + m // a.group) * a.heads + head) * a.group + m % a.group
        for d in range(a.dim):
            put(out, at * a.dim + d, get(tiles.total, m * wide + d))
        put(lse, at, get(tiles.stats, 2 * rows + m))


@compiled()
def announce(a, unit, lines, storage):
    """`find_lines` of the first chunk of a unit."""
    item = a.items + 48 * (unit // a.heads)
    start, stop = get_long(item, START), get_long(item, STOP)
    chunk = start // CHUNK * CHUNK
    return find_lines(a, get_long(item, ROW), unit % a.heads, chunk, start, stop, lines, storage)


@spliced
def attend(a, tiles, unit, last, parity, wide, storage):
    """One unit, a tile of queries over a range of KV for one KV head; returns the next parity.

    The parity tells which half of `tiles.lines` holds the current chunk; the other half is filled with
    what comes next, be it of the next unit, so that memory is always being read ahead.
    """
    item, head = a.items + 48 * (unit // a.heads), unit % a.heads
    row, token, tokens = get_long(item, ROW), get_long(item, TOKEN), get_long(item, TOKENS)
    start, stop, partial = get_long(item, START), get_long(item, STOP), get_long(item, PARTIAL)
    rows, length = tokens * a.group, np.int64(get_int(a.seq_lens, row))
    own = length - np.int64(get_int(a.cu_seqlens_q, row + 1)) + token
    open_tile(a, tiles, token, rows, head, wide)
    begin = start // CHUNK * CHUNK
    skip, count = start - begin, min(CHUNK, stop - begin)
    for chunk in range(begin, stop, CHUNK):
        lines, ahead = tiles.lines + 16 * CHUNK * parity, tiles.lines + 16 * CHUNK * (1 - parity)
        after, ahead_count = chunk + CHUNK, 0
        if after < stop:
            ahead_count = find_lines(a, row, head, after, start, stop, ahead, storage)
        elif unit + 1 < last:
            ahead_count = announce(a, unit + 1, ahead, storage)
        gather(a, tiles, wide, count, lines, ahead, ahead_count, storage)
        score(a, tiles, rows, count)
        soften_rows(a, tiles, token, rows, wide, own, length, chunk)
        for d in range(0, wide, PANEL):
            weights, values, out = tiles.scores + 4 * skip, lines + 8 * (CHUNK + skip), tiles.out + 4 * d
            at = width(storage) * d
            next_values = ahead + 8 * (CHUNK + skip)
            scattered_product(weights, CHUNK, values, next_values, at, out, wide, rows, count - skip, storage)
        if after % SEGMENT == 0 or after >= stop:
            close_segment(tiles, rows, wide)
        skip, count, parity = 0, min(CHUNK, stop - after), 1 - parity
    if partial < 0:
        close_tile(a, tiles, token, rows, head, wide, a.out, a.lse)
    else:
        close_tile(a, tiles, partial, rows, head, wide, a.partial_out, a.partial_lse)
    return parity


@compiled()
def merge_parts(a, merge, thread):
    """A thread's share of a divided item: partial states in order, to the output."""
    hq, token, tokens = a.heads * a.group, get_long(merge, 0), get_long(merge, 1)
    partial, parts = get_long(merge, 2), get_long(merge, 3)
    first, last = share(thread, a.threads, tokens * hq)
    for i in range(first, last):
        total, lse = a.out + 4 * (token * hq + i) * a.dim, -np.float32(np.inf)
        for d in range(a.dim):
            put(total, d, np.float32(0.0))
        for part in range(parts):
            at = (partial + part * tokens) * hq + i
            lse = merge_row(total, lse, a.partial_out + 4 * at * a.dim, get(a.partial_lse, at), a.dim)
        put(a.lse, token * hq + i, lse)


@spliced
def attention(a, storage):
    """One thread's part: its units; then, if items were divided, a barrier and its share of the merges."""
    thread, wide = thread_num(), (a.dim + PANEL - 1) // PANEL * PANEL
    tiles = lay_out(a.scratch + 4 * thread * a.scratch_floats, a.tile_rows, a.dim, wide)
    first, last, parity = get_long(a.starts, thread), get_long(a.starts, thread + 1), np.int64(0)
    if first < last:
        announce(a, first, tiles.lines, storage)
    for unit in range(first, last):
        parity = attend(a, tiles, unit, last, parity, wide, storage)
    if a.num_merges > 0:
        barrier()
        for group in range(a.num_merges):
            merge_parts(a, a.merges + 32 * group, thread)


def attention_f32(pointer):
    attention(record(pointer), F32)


def attention_bf16(pointer):
    attention(record(pointer), BF16)


def attention_f16(pointer):
    attention(record(pointer), F16)


_FIELDS = (
    "q q_stride k_cache v_cache block_stride head_stride block_size heads group dim "
    "block_tables table_width rows seq_lens cu_seqlens_q items starts merges num_merges "
    "out lse partial_out partial_lse scratch scratch_floats tile_rows window causal forks seen"
)
REGIONS = {
    dtype: Region(body, _FIELDS, floats="scale softcap")
    for dtype, body in (
        (torch.float32, attention_f32),
        (torch.bfloat16, attention_bf16),
        (torch.float16, attention_f16),
    )
}


@compiled()
def cut_tile(a, row, token, items, n):
    """Write the query tile at `token` as item n; returns its tokens and its KV range."""
    last, length = np.int64(get_int(a.cu_seqlens_q, row + 1)), np.int64(get_int(a.seq_lens, row))
    tokens, item = min(a.tile, last - token), items + 48 * n
    own = length - (last - token)
    start = max(0, own - a.window + 1) if a.window > 0 else np.int64(0)
    stop = own + tokens if a.causal else length
    put_long(item, ROW, row)
    put_long(item, TOKEN, token)
    put_long(item, TOKENS, tokens)
    put_long(item, START, start)
    put_long(item, STOP, stop)
    put_long(item, PARTIAL, -1)
    return tokens, start, stop


def undivided_plan(pointer):
    """`attention_plan.plan_attention` as long as no tile is divided; `result` becomes the number of items, or -1.

    Runs in one thread. The sums are of whole numbers, so they are those of the definition.
    """
    a = record(pointer)
    n, total, worst = 0, np.int64(0), np.int64(0)
    for row in range(a.rows):
        for token in range(get_int(a.cu_seqlens_q, row), get_int(a.cu_seqlens_q, row + 1), a.tile):
            tokens, start, stop = cut_tile(a, row, token, a.items, n)
            cost = (stop - start) * (tokens * a.group + GATHER_ROWS)
            worst = max(worst, cost if (stop - 1) // SEGMENT > start // SEGMENT else np.int64(0))
            total, n = total + cost, n + 1
    if a.threads > 1 and worst * 8 * a.threads > total * a.heads:
        put_long(a.result, 0, -1)
        return
    put_long(a.result, 0, n)
    put_long(a.starts, 0, 0)
    share, thread, done, dealt = np.float64(total * a.heads) / a.threads, 1, np.int64(0), np.int64(0)
    for unit in range(n * a.heads):
        item = a.items + 48 * (unit // a.heads)
        cost = (get_long(item, STOP) - get_long(item, START)) * (get_long(item, TOKENS) * a.group + GATHER_ROWS)
        done += cost
        while thread < a.threads and done - 0.5 * cost >= share * thread:
            put_long(a.starts, thread, unit)
            put_long(a.load, thread - 1, done - cost - dealt)
            thread, dealt = thread + 1, done - cost
    while thread <= a.threads:
        put_long(a.starts, thread, n * a.heads)
        put_long(a.load, thread - 1, done - dealt)
        thread, dealt = thread + 1, done


PLAN_REGION = Region(
    undivided_plan,
    "cu_seqlens_q seq_lens rows heads group window causal tile items starts load result",
)


def stray_block(pointer):
    """`found` becomes 1 + the first row one of whose blocks in use is none of the cache's, 0 if there is none;
    -1 if a slot lies outside. Runs in one thread."""
    a = record(pointer)
    for row in range(a.rows):
        for i in range((get_int(a.seq_lens, row) + a.block_size - 1) // a.block_size):
            block = get_int(a.block_tables, row * a.table_width + i)
            if block < 0 or block >= a.num_blocks:
                put_long(a.found, 0, row + 1)
                return
    put_long(a.found, 0, 0)
    for token in range(a.tokens):
        slot = get_long(a.slots, token)
        if slot < -1 or slot >= a.num_blocks * a.block_size:
            put_long(a.found, 0, -1)


CHECK_REGION = Region(
    stray_block, "block_tables table_width rows seq_lens block_size num_blocks slots tokens found"
)


def check_blocks(pool: Pool, meta: AttentionMetadata, num_blocks: int, block_size: int) -> None:
    """Refuse block tables and slots that point outside a cache of `num_blocks`; once per step, compiled kernels trust them."""
    key = "checked", num_blocks, block_size
    if key in meta.derived:
        return
    table, width, rows, lens, _ = meta.addresses
    if rows and -(-int(meta.host_lengths()[1].max()) // block_size) > meta.block_tables.shape[1]:
        raise LabError("block_tables", tuple(meta.block_tables.shape), "are narrower than the longest row", "cover seq_lens")
    found, slots = np.zeros(1, np.int64), meta.slot_mapping
    address, _, arguments = CHECK_REGION.call(
        *(1, table, width, rows, lens, block_size, num_blocks, slots.data_ptr(), len(slots), found.ctypes.data)
    )
    pool.run((address, 1, arguments))
    if found[0] > 0:
        row = int(found[0]) - 1
        raise LabError(f"block_tables[{row}]", meta.block_tables[row].tolist(), f"names a block outside a cache of {num_blocks}")
    if found[0] < 0:
        raise LabError("slot_mapping", slots.tolist(), f"names a slot outside a cache of {num_blocks} blocks of {block_size}")
    meta.derived[key] = True


def quick_plan(
    pool: Pool, meta: AttentionMetadata, heads: int, group: int, threads: int, window: int | None
) -> AttnPlan | None:
    """The plan of a step in one call, or None if a long row must be divided between threads."""
    cu, lens, tile = meta.cu_seqlens_q, meta.seq_lens, tile_tokens(group)
    most = meta.num_rows + meta.slot_mapping.shape[0] // tile
    items, starts, load = np.empty((most, 6), np.int64), np.empty(threads + 1, np.int64), np.empty(threads + 1, np.int64)
    causal = int(meta.mask == "causal")
    address, _, arguments = PLAN_REGION.call(
        *(threads, cu.data_ptr(), lens.data_ptr(), meta.num_rows, heads, group, window or 0, causal, tile),
        *(items.ctypes.data, starts.ctypes.data, load.ctypes.data, load.ctypes.data + 8 * threads),
    )
    pool.run((address, 1, arguments))
    count = int(load[-1])
    return None if count < 0 else AttnPlan(items[:count], starts, NO_MERGES, 0, load[:-1].astype(np.float64))


NO_MERGES = np.empty((0, 4), np.int64)


def supports(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the compiled kernel covers caches like these; the reference covers the others."""
    return regular(k_cache, v_cache) and k_cache.shape[3] % LANES == 0


def tree_addresses(meta: AttentionMetadata) -> tuple[int, int]:
    """Where the forks and the seen nodes of a step lie; 0 without trees."""
    return (0, 0) if meta.tree is None else (meta.tree.forks.data_ptr(), meta.tree.seen.data_ptr())


def attention_call(
    pool: Pool,
    plan: AttnPlan,
    state: AttentionState,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Call:
    """`reference.paged_attention` into `state`, for float32 q [T, Hq, D] with dense heads.

    `plan` is that of `meta` and `sliding_window`.
    """
    (_, hq, dim), (_, heads, block_size, _), threads = q.shape, k_cache.shape, plan.threads
    group = hq // heads
    tile_rows = tile_tokens(group) * group
    each, partials = tile_floats(tile_rows, dim), plan.num_partials
    scratch = pool.scratch(threads * each + partials * hq * (dim + 1))
    partial_out = scratch + 4 * threads * each
    return REGIONS[k_cache.dtype].call(
        *(threads, q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr()),
        *(k_cache.stride(0), k_cache.stride(1), block_size, heads, group, dim),
        *meta.addresses,
        *plan.addresses,
        *(state.out.data_ptr(), state.lse.data_ptr(), partial_out, partial_out + 4 * partials * hq * dim),
        *(scratch, each, tile_rows, sliding_window or 0, meta.mask == "causal", *tree_addresses(meta), scale, softcap or 0.0),
    )
