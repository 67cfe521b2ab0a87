"""Row-wise kernels on the CPU: norm + rotary embedding + KV write in one pass, and the norms alone."""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmlab.kernels.linear import address, norm_row, share
from llmlab.kernels.pool import Call, Pool, Region, record, thread_num
from llmlab.kernels.vector import BF16, F16, F32, compiled, get, get_long, put, put_as, spliced, width
from llmlab.types import LabError


@compiled()
def rotate(x, cos, sin, half):
    """Dimension i turns with dimension i + half, in place."""
    for i in range(half):
        low, high, c, s = get(x, i), get(x, half + i), get(cos, i), get(sin, i)
        put(x, i, low * c - high * s)
        put(x, half + i, high * c + low * s)


@compiled()
def turn_heads(a, x, heads, token, weight):
    """Norm (if weight is given) and rotate the heads of one token, in place."""
    line = token if a.positions == 0 else get_long(a.positions, token)
    cos, sin = a.cos + 4 * line * a.half, a.sin + 4 * line * a.half
    for head in range(heads):
        at = x + 4 * head * a.dim
        if weight != 0:
            norm_row(at, a.dim, weight, np.float32(a.offset), np.float32(a.eps), at)
        rotate(at, cos, sin, a.half)


@spliced
def rope_store(a, storage):
    """One thread's tokens: turn q and k, write k and v to their slot."""
    first, last = share(thread_num(), a.threads, a.tokens)
    for token in range(first, last):
        k, v = a.k + 4 * token * a.k_stride, a.v + 4 * token * a.v_stride
        turn_heads(a, a.q + 4 * token * a.q_stride, a.q_heads, token, a.q_norm)
        turn_heads(a, k, a.heads, token, a.k_norm)
        slot = get_long(a.slots, token)
        if slot >= 0:
            block, line = slot // a.block_size, slot % a.block_size
            for head in range(a.heads):
                at = width(storage) * (block * a.block_stride + head * a.head_stride + line * a.dim)
                for d in range(a.dim):
                    put_as(a.k_cache + at, d, get(k, head * a.dim + d), storage)
                    put_as(a.v_cache + at, d, get(v, head * a.dim + d), storage)


@spliced
def norms(a):
    """One thread's rows: (x + residual to total,) norm to out."""
    first, last = share(thread_num(), a.threads, a.rows)
    for row in range(first, last):
        at, source = 4 * row * a.k, a.x
        if a.residual != 0:
            source = a.total
            for i in range(a.k):
                put(source + at, i, get(a.x + at, i) + get(a.residual + at, i))
        norm_row(source + at, a.k, a.weight, np.float32(a.offset), np.float32(a.eps), a.out + at)


def rope_store_f32(pointer):
    rope_store(record(pointer), F32)


def rope_store_bf16(pointer):
    rope_store(record(pointer), BF16)


def rope_store_f16(pointer):
    rope_store(record(pointer), F16)


def norms_f32(pointer):
    norms(record(pointer))


# `positions` tells which line of cos and sin is whose; 0: line i is token i's.
_ROPE_FIELDS = (
    "q q_stride q_heads k k_stride v v_stride heads tokens dim half cos sin positions q_norm k_norm "
    "k_cache v_cache block_stride head_stride block_size slots"
)
ROPE_REGIONS = {
    dtype: Region(body, _ROPE_FIELDS, floats="eps offset")
    for dtype, body in (
        (torch.float32, rope_store_f32),
        (torch.bfloat16, rope_store_bf16),
        (torch.float16, rope_store_f16),
    )
}
NORM_REGION = Region(norms_f32, "x residual total weight out rows k", floats="eps offset")


def heads_dense(x: Tensor) -> Tensor:
    """x [T, H, D] in float32 with dense heads: itself, as a rule, whatever lies between the tokens."""
    tokens_apart = x.dtype is torch.float32 and x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if tokens_apart else x.float().contiguous()


def regular(k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether compiled kernels can address these caches: dense slots, any stride between blocks and heads."""
    strides, dim = k_cache.stride(), k_cache.shape[3]
    return strides == v_cache.stride() and strides[2:] == (dim, 1) and k_cache.dtype in ROPE_REGIONS


def rope_store_call(
    pool: Pool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Call:
    """`reference.rope_store` on float32 q, k, v, turned in place; caches of any of the three dtypes."""
    (tokens, q_heads, dim), (_, heads, block_size, _), half = q.shape, k_cache.shape, cos.shape[1]
    if slot_mapping.dtype is not torch.int64:
        raise LabError("slot_mapping", slot_mapping.dtype, "is not the dtype of a slot", "give torch.int64")
    if k.shape[1] != heads or len(slot_mapping) != tokens or len(cos) != tokens or 2 * half > dim:
        fitting = f"[{len(slot_mapping)} slots, {heads} KV heads, D] with cos of {tuple(cos.shape)}"
        raise LabError("k", tuple(k.shape), f"does not fit {fitting}")
    return ROPE_REGIONS[k_cache.dtype].call(
        *(pool.threads_for(tokens), q.data_ptr(), q.stride(0), q_heads),
        *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), heads, tokens, dim),
        *(half, cos.data_ptr(), sin.data_ptr(), 0, address(q_norm), address(k_norm)),
        *(k_cache.data_ptr(), v_cache.data_ptr(), k_cache.stride(0), k_cache.stride(1), block_size),
        *(slot_mapping.data_ptr(), eps, weight_offset),
    )


def norm_rows(
    pool: Pool, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` (or, without residual, `rms_norm`) on dense float32 x [T, n]."""
    rows, size = x.shape
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    addresses = (x.data_ptr(), address(residual), total.data_ptr(), weight.data_ptr(), out.data_ptr())
    pool.run(NORM_REGION.call(pool.threads_for(rows), *addresses, rows, size, eps, weight_offset))
    return out, total
