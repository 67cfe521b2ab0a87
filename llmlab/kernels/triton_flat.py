"""Products of few rows with wide weights on a GPU: `y = x @ w.T + bias`.

`row_linear` reads each weight once and sums in registers. `flat_linear` pads the rows to 16, the smallest product of
Triton on tensor cores, walks the depth inside a program and loads the next tile while it multiplies this one (two stages).
Source: FlashDecoding++, arXiv 2311.01282, section 4, which pads to 8.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton infers the types of what it compiles)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_linear(x, w, bias, y, rows_out, depth, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
               BLOCK_K: tl.constexpr):  # fmt: skip
    """y[ROWS, BLOCK_N] of x [ROWS, depth]."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    r, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    inside = n < rows_out
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, depth, BLOCK_K):
        here = first + k < depth
        a = tl.load(x + r[:, None] * depth + (first + k)[None, :], mask=here[None, :], other=0.0).to(tl.float32)
        b = tl.load(w + n[:, None] * depth + (first + k)[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        sums += a[:, None, :] * b.to(tl.float32)[None, :, :]
    acc = tl.sum(sums, 2)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * rows_out + n[None, :], acc.to(y.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def flat_linear(x, w, bias, y, rows, rows_out, depth, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """y[BLOCK_M, BLOCK_N] of x [rows, depth], rows <= BLOCK_M."""
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    there, inside = m < rows, n < rows_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        here = first + k < depth
        a = tl.load(x + m[:, None] * depth + (first + k)[None, :], mask=there[:, None] & here[None, :], other=0.0)
        b = tl.load(w + n[:, None] * depth + (first + k)[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        acc += tl.dot(a, tl.trans(b), input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * rows_out + n[None, :], acc.to(y.dtype.element_ty), mask=there[:, None] & inside[None, :])
