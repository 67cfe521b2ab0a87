"""Row-wise kernels on a GPU: norms, gates, norm + rotary embedding + KV write, copies of blocks."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton infers the types of what it compiles)
from __future__ import annotations

import triton
import triton.language as tl

from llmlab.kernels.triton_attention import _tanh


@triton.jit
def norm_rows(x, residual, weight, out, total, eps, offset, K: tl.constexpr, K_PAD: tl.constexpr, ADD: tl.constexpr):
    """One row: (x + residual to total,) its norm to out; dense rows of K."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K_PAD)
    value = tl.load(x + row * K + i, mask=i < K, other=0.0)
    if ADD:
        other = tl.load(residual + row * K + i, mask=i < K, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(value.dtype)  # rounded once, as a sum of the format is
        tl.store(total + row * K + i, value, mask=i < K)
    wide = value.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    scaled = wide * factor * (tl.load(weight + i, mask=i < K, other=0.0).to(tl.float32) + offset)
    tl.store(out + row * K + i, scaled.to(out.dtype.element_ty), mask=i < K)


@triton.jit
def gate_rows(gate_up, out, columns, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """act(gate) * up of one row and BLOCK columns; gate_up [T, 2 x columns], dense."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_up + row * 2 * columns + i, mask=i < columns, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * columns + i, mask=i < columns, other=0.0).to(tl.float32)
    if GELU:
        act = 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))
    else:
        act = g * tl.sigmoid(g)
    tl.store(out + row * columns + i, (act * up).to(out.dtype.element_ty), mask=i < columns)


@triton.jit
def _turned(x, cos, sin, norm, inside, factor, offset, D: tl.constexpr, HALF: tl.constexpr, D_PAD: tl.constexpr,
            NORM: tl.constexpr):  # fmt: skip
    """Heads `x` [H] (addresses) of one token: normed if asked for, dimensions i and i + HALF turned; [H, D_PAD]."""
    d = tl.arange(0, D_PAD)
    mask = inside[:, None] & (d < D)[None, :]
    other = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    own = tl.load(x[:, None] + d[None, :], mask=mask, other=0.0)
    value, pair = own.to(tl.float32), tl.load(x[:, None] + other[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        rms = tl.rsqrt(tl.sum(value * value, 1) / D + factor)[:, None]
        weight = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32) + offset
        weight_pair = tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32) + offset
        # as the reference: the norm is rounded before it turns
        value = (value * rms * weight[None, :]).to(own.dtype).to(tl.float32)
        pair = (pair * rms * weight_pair[None, :]).to(own.dtype).to(tl.float32)
    if HALF > 0:
        turning = d < 2 * HALF
        angle = tl.where(d < HALF, d, d - HALF)
        c = tl.load(cos + angle, mask=turning, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turning, other=0.0).to(tl.float32)
        value = value * c[None, :] + pair * tl.where(d < HALF, -s, s)[None, :]
    return value, mask


@triton.jit
def rope_store(q, k, v, turned, cos, sin, q_norm, k_norm, k_cache, v_cache, slots, eps, offset, q_token, k_token, v_token,
               k_block, k_head, v_block, v_head, HQ: tl.constexpr, HKV: tl.constexpr, HQ_PAD: tl.constexpr,
               HKV_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, HALF: tl.constexpr,
               BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One token: norm and turn its q (to `turned`, dense) and k, write k and v to their slot (-1: nowhere)."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_PAD)
    cos += token * HALF
    sin += token * HALF
    if HQ > 0:
        h = tl.arange(0, HQ_PAD)
        value, mask = _turned(q + token * q_token + h * D, cos, sin, q_norm, h < HQ, eps, offset, D, HALF, D_PAD, NORM)
        place = turned + token * HQ * D + (h * D)[:, None] + d[None, :]
        tl.store(place, value.to(turned.dtype.element_ty), mask=mask)
    slot = tl.load(slots + token)
    if slot >= 0:
        g = tl.arange(0, HKV_PAD)
        key, here = _turned(k + token * k_token + g * D, cos, sin, k_norm, g < HKV, eps, offset, D, HALF, D_PAD, NORM)
        block, line = slot // BLOCK_SIZE, (slot % BLOCK_SIZE) * D
        # the reference rounds to the dtype of k before it writes
        kept = key.to(k.dtype.element_ty).to(k_cache.dtype.element_ty)
        tl.store(k_cache + (block * k_block + g * k_head + line)[:, None] + d[None, :], kept, mask=here)
        copied = tl.load(v + token * v_token + (g * D)[:, None] + d[None, :], mask=here, other=0.0)
        tl.store(v_cache + (block * v_block + g * v_head + line)[:, None] + d[None, :],
                 copied.to(v_cache.dtype.element_ty), mask=here)  # fmt: skip


@triton.jit
def copy_pool_blocks(src, dst, pairs, src_block, dst_block, size, BLOCK: tl.constexpr):
    """dst[pairs[i, 1]] = src[pairs[i, 0]], `size` elements each; no destination is a source."""
    pair = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source, target = tl.load(pairs + pair * 2).to(tl.int64), tl.load(pairs + pair * 2 + 1).to(tl.int64)
    value = tl.load(src + source * src_block + i, mask=i < size)
    tl.store(dst + target * dst_block + i, value.to(dst.dtype.element_ty), mask=i < size)
