"""Paged attention for ragged batches on a GPU: a persistent grid that runs the queue of a `GridPlan`.

A program takes its units (a tile of query tokens, a range of KV, one KV head) one after the other. The
query heads that share a KV head lie in the rows of one tile, so each key is read once for all of them.
Softmax runs online; a divided row leaves partial states, which `merge_partials` joins in their order.
Where products have no tensor cores behind them (sm_75), they are sums in registers.
With UNIFIED, scores are taken around one maximum for all rows; a unit whose sums leave their band is computed again, online,
by the same program (see `softmax_schemes`).
Sources: FlashInfer, arXiv 2501.01005; FlashAttention-2, arXiv 2307.08691 (the online softmax); FlashDecoding++, arXiv 2311.01282.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton infers the types of what it compiles)
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(q, k, TENSOR_CORES: tl.constexpr):
    """q [M, D] @ k [N, D].T in float32."""
    if TENSOR_CORES:
        return tl.dot(q, tl.trans(k), input_precision="ieee")
    return tl.sum(q[:, None, :].to(tl.float32) * k[None, :, :].to(tl.float32), 2)


@triton.jit
def _values(p, v, TENSOR_CORES: tl.constexpr):
    """p [M, N] @ v [N, D] in float32."""
    if TENSOR_CORES:
        return tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return tl.sum(p[:, :, None] * v[None, :, :].to(tl.float32), 1)


@triton.jit
def _tanh(x):
    """Exact at both ends: no infinity is divided by another."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _range(q, own, start, stop, table, head, k_cache, v_cache, k_block, k_head, v_block, v_head, scale, softcap, phi,
           WINDOW: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TENSOR_CORES: tl.constexpr, UNIFIED: tl.constexpr):  # fmt: skip
    """Attention of a tile over KV positions [start, stop): (sum of values, highest score or phi, sum of weights), base 2."""
    d = tl.arange(0, D_PAD)
    n = tl.arange(0, BLOCK_N)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if UNIFIED:
        highest = tl.zeros([BLOCK_M], tl.float32) + phi
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for first in range(start // BLOCK_SIZE * BLOCK_SIZE, stop, BLOCK_N):
        at = first + n
        valid = (at >= start) & (at < stop)
        block = tl.load(table + at // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        line = (at % BLOCK_SIZE) * D
        here = valid[:, None] & (d < D)[None, :]
        k = tl.load(k_cache + (block * k_block + head * k_head + line)[:, None] + d[None, :], mask=here, other=0.0)
        v = tl.load(v_cache + (block * v_block + head * v_head + line)[:, None] + d[None, :], mask=here, other=0.0)
        s = _scores(q, k.to(q.dtype), TENSOR_CORES) * scale
        if SOFTCAP:
            s = softcap * _tanh(s / softcap)
        s = tl.where(valid[None, :], s * LOG2_E, float("-inf"))
        if CAUSAL:
            s = tl.where(at[None, :] <= own[:, None], s, float("-inf"))
        if WINDOW > 0:
            s = tl.where(at[None, :] > own[:, None] - WINDOW, s, float("-inf"))
        if UNIFIED:
            p = tl.exp2(s - phi)
            total += tl.sum(p, 1)
            acc += _values(p, v, TENSOR_CORES)
        else:
            new = tl.maximum(highest, tl.max(s, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - shift[:, None])
            fade = tl.exp2(highest - shift)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None] + _values(p, v, TENSOR_CORES)
            highest = new
    return acc, highest, total


@triton.jit(do_not_specialize=["table_row"])  # the width of the block tables: it grows with the longest row
def attend(q, k_cache, v_cache, tables, lens, cu, items, queue, starts, out, lse, part_out, part_lse, repaired,
           q_token, q_head, k_block, k_head, v_block, v_head, table_row, scale, softcap, phi, least, most,
           HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
           WINDOW: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TENSOR_CORES: tl.constexpr, UNIFIED: tl.constexpr):  # fmt: skip
    """One program's queue. Row m of a tile is query token m // GROUP, query head m % GROUP of its KV head.

    UNIFIED: scores around `phi` (base 2) as long as every row's sum lies in [least, most]; `repaired` [programs] counts the
    units where it did not."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    program = tl.program_id(0)
    repairs = 0
    for place in range(tl.load(starts + program), tl.load(starts + program + 1)):
        unit = tl.load(queue + place)
        head = unit % HEADS
        item = items + unit // HEADS * 6
        row, token, tokens = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        start, stop, partial = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        t = m // GROUP
        heads = head * GROUP + m % GROUP
        real = (t < tokens) & (m < TILE * GROUP)
        inside = real[:, None] & (d < D)[None, :]
        own = tl.load(lens + row) - tl.load(cu + row + 1) + token + t
        at = (token + t).to(tl.int64)
        x = tl.load(q + (at * q_token + heads * q_head)[:, None] + d[None, :], mask=inside, other=0.0)
        if TENSOR_CORES:
            x = x.to(k_cache.dtype.element_ty)
        acc, highest, total = _range(
            x, own, start, stop, tables + row * table_row, head, k_cache, v_cache, k_block, k_head, v_block, v_head,
            scale, softcap, phi, WINDOW, CAUSAL, SOFTCAP, D, D_PAD, BLOCK_SIZE, BLOCK_M, BLOCK_N, TENSOR_CORES, UNIFIED)  # fmt: skip
        if UNIFIED:
            safe = (total >= least) & (total <= most)  # not a number is not safe
            if tl.sum((real & (safe == 0)).to(tl.int32)) > 0:
                acc, highest, total = _range(
                    x, own, start, stop, tables + row * table_row, head, k_cache, v_cache, k_block, k_head, v_block, v_head,
                    scale, softcap, phi, WINDOW, CAUSAL, SOFTCAP, D, D_PAD, BLOCK_SIZE, BLOCK_M, BLOCK_N, TENSOR_CORES, False)  # fmt: skip
                repairs += 1
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        state = tl.where(total == 0.0, float("-inf"), (highest + tl.log2(total)) / LOG2_E)
        if partial < 0:
            place_out = at * (HEADS * GROUP) + heads
            tl.store(out + place_out[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside)
            tl.store(lse + place_out, state, mask=real)
        else:
            place_out = (partial + t).to(tl.int64) * (HEADS * GROUP) + heads
            tl.store(part_out + place_out[:, None] * D + d[None, :], acc, mask=inside)
            tl.store(part_lse + place_out, state, mask=real)
    if UNIFIED:
        tl.store(repaired + program, repairs)


@triton.jit
def merge_partials(part_out, part_lse, merges, out, lse, HEADS_Q: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Join the partial states of one query token and head, in order; tokens without any keep what they have."""
    token, head = tl.program_id(0), tl.program_id(1)
    parts = tl.load(merges + token * 3 + 2)
    if parts > 0:
        d = tl.arange(0, D_PAD)
        first, step = tl.load(merges + token * 3), tl.load(merges + token * 3 + 1)
        highest, total = float("-inf"), 0.0
        acc = tl.zeros([D_PAD], tl.float32)
        for part in range(parts):
            place = (first + part * step).to(tl.int64) * HEADS_Q + head
            score = tl.load(part_lse + place)
            new = tl.maximum(highest, score)
            shift = tl.where(new == float("-inf"), 0.0, new)
            fade, weight = tl.exp(highest - shift), tl.exp(score - shift)
            acc = acc * fade + weight * tl.load(part_out + place * D + d, mask=d < D, other=0.0)
            total = total * fade + weight
            highest = new
        acc = acc / tl.where(total == 0.0, 1.0, total)
        place_out = token.to(tl.int64) * HEADS_Q + head
        tl.store(out + place_out * D + d, acc.to(out.dtype.element_ty), mask=d < D)
        tl.store(lse + place_out, tl.where(total == 0.0, float("-inf"), highest + tl.log(total)))
