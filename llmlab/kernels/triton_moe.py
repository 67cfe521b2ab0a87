"""Products of sorted tokens with their experts' weights on a GPU, in one launch for all experts."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton infers the types of what it compiles)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def grouped_linear(x, w, y, order, offsets, first_tiles, rows_out, depth, w_expert, NUM_EXPERTS: tl.constexpr,
                   EXPERTS_PAD: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """y[i] = x[order[i] // TOP_K] @ w[expert of i].T for pairs i sorted by expert; TOP_K = 0: x is sorted already.

    `offsets [E + 1]`: where an expert's pairs begin; `first_tiles [E + 1]`: where its row tiles begin.
    w [E, rows_out, depth]. The grid has a program for every tile that there could be; those beyond the last end at once.
    """
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS_PAD)
    ends = tl.load(first_tiles + 1 + e, mask=e < NUM_EXPERTS, other=0)
    expert = tl.sum(((ends <= tile) & (e < NUM_EXPERTS)).to(tl.int32), 0)
    if expert < NUM_EXPERTS:
        pair = tl.load(offsets + expert) + (tile - tl.load(first_tiles + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = pair < tl.load(offsets + expert + 1)
        source = pair.to(tl.int64)
        if TOP_K > 0:
            source = tl.load(order + pair, mask=inside, other=0).to(tl.int64) // TOP_K
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        weights = w + expert.to(tl.int64) * w_expert
        for start in range(0, depth, BLOCK_K):
            at = start + k
            a = tl.load(x + source[:, None] * depth + at[None, :], mask=inside[:, None] & (at < depth)[None, :], other=0.0)
            b = tl.load(weights + n.to(tl.int64)[:, None] * depth + at[None, :],
                        mask=(n < rows_out)[:, None] & (at < depth)[None, :], other=0.0)  # fmt: skip
            acc += tl.dot(a, tl.trans(b), input_precision="ieee")
        place = y + pair.to(tl.int64)[:, None] * rows_out + n[None, :]
        tl.store(place, acc.to(y.dtype.element_ty), mask=inside[:, None] & (n < rows_out)[None, :])


@triton.jit
def combine_pairs(y, places, weights, out, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum of weights[t, j] * y[places[t, j]], in float32, in the order of j."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        place = tl.load(places + token * TOP_K + j).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + j)
        acc += weight * tl.load(y + place * columns + i, mask=i < columns, other=0.0).to(tl.float32)
    tl.store(out + token * columns + i, acc.to(out.dtype.element_ty), mask=i < columns)
