"""Products with int8 and int4 weights on a GPU: what is read is narrow, what is multiplied is wide.

Weights: codes [out, in] uint8, or packed [out, in / 2] with the first half of a group in the low four bits
and the second in the high; `w = scale * (code - zero)`, scale float32 and zero uint8 per row and group.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton infers the types of what it compiles)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(codes, n, inside, group, HALF: tl.constexpr, BITS: tl.constexpr, depth):
    """Both halves of a group of rows n as float32 codes, each [N, HALF]."""
    j = tl.arange(0, HALF)
    if BITS == 4:
        packed = tl.load(codes + n[:, None] * (depth // 2) + group * HALF + j[None, :], mask=inside[:, None], other=0)
        return (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
    at = codes + n[:, None] * depth + group * 2 * HALF + j[None, :]
    low = tl.load(at, mask=inside[:, None], other=0)
    return low.to(tl.float32), tl.load(at + HALF, mask=inside[:, None], other=0).to(tl.float32)


@triton.jit
def quant_gemv(x, codes, scales, zeros, bias, y, rows_out, depth, BITS: tl.constexpr, GROUP: tl.constexpr,
               HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """y[ROWS, BLOCK_N] of few rows x [ROWS, depth], as sums in registers."""
    HALF: tl.constexpr = GROUP // 2
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = n < rows_out
    r, j = tl.arange(0, ROWS), tl.arange(0, HALF)
    sums = tl.zeros([ROWS, BLOCK_N, HALF], tl.float32)  # added up across threads once, at the end
    groups = depth // GROUP
    for group in range(groups):
        low, high = _halves(codes, n, inside, group, HALF, BITS, depth)
        scale = tl.load(scales + n * groups + group, mask=inside, other=0.0)[:, None]
        zero = tl.load(zeros + n * groups + group, mask=inside, other=0).to(tl.float32)[:, None]
        low, high = (low - zero) * scale, (high - zero) * scale
        at = x + r[:, None] * depth + group * GROUP + j[None, :]
        a, b = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
        sums += a[:, None, :] * low[None, :, :] + b[:, None, :] * high[None, :, :]
    acc = tl.sum(sums, 2)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * rows_out + n[None, :], acc.to(y.dtype.element_ty), mask=inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def quant_gemm(x, codes, scales, zeros, bias, y, rows, rows_out, depth, BITS: tl.constexpr, GROUP: tl.constexpr,
               HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """y = x @ w.T for many rows: a group is widened to the dtype of x and multiplied on tensor cores."""
    HALF: tl.constexpr = GROUP // 2
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    here, inside = m < rows, n < rows_out
    j = tl.arange(0, HALF)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    groups = depth // GROUP
    for group in range(groups):
        low, high = _halves(codes, n, inside, group, HALF, BITS, depth)
        scale = tl.load(scales + n * groups + group, mask=inside, other=0.0)[:, None]
        zero = tl.load(zeros + n * groups + group, mask=inside, other=0).to(tl.float32)[:, None]
        at = x + m[:, None] * depth + group * GROUP + j[None, :]
        a, b = tl.load(at, mask=here[:, None], other=0.0), tl.load(at + HALF, mask=here[:, None], other=0.0)
        acc += tl.dot(a, tl.trans(((low - zero) * scale).to(a.dtype)), input_precision="ieee")
        acc += tl.dot(b, tl.trans(((high - zero) * scale).to(b.dtype)), input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m[:, None] * rows_out + n[None, :], acc.to(y.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def widen(codes, scales, zeros, w, depth, BITS: tl.constexpr, GROUP: tl.constexpr):
    """One row and group of weights in the dtype of `w`."""
    HALF: tl.constexpr = GROUP // 2
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = row + tl.zeros([1], tl.int64)
    low, high = _halves(codes, n, n >= 0, group, HALF, BITS, depth)
    scale = tl.load(scales + row * (depth // GROUP) + group)
    zero = tl.load(zeros + row * (depth // GROUP) + group).to(tl.float32)
    at = w + (row * depth + group * GROUP) + tl.arange(0, HALF)[None, :]
    tl.store(at, ((low - zero) * scale).to(w.dtype.element_ty))
    tl.store(at + HALF, ((high - zero) * scale).to(w.dtype.element_ty))
