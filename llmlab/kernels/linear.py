"""Linear layers on the CPU: weights packed once in panels, one kernel for every batch size.

A panel holds PANEL output columns, row by row of the inner dimension, so that one token streams the
weights at the speed of memory and many tokens reuse them, six at a time from registers, then from cache. The sum of an
output runs over k in order in either case, so a row's result does not depend on the batch.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmlab.kernels import pages
from llmlab.kernels.pool import Call, Pool, Region, barrier, record, thread_num
from llmlab.kernels.vector import (
    BF16,
    F16,
    F32,
    PANEL,
    compiled,
    exp,
    get,
    product,
    put,
    spliced,
    tanh,
    width,
)
from llmlab.types import LabError

ROWS = 96  # rows of a block: a multiple of the register tile whose outputs stay in the first-level cache
DEPTH = 512  # inner steps of a block: a panel of it stays in the second-level cache

PLAIN, SILU, GELU_TANH = 0, 1, 2
ACTS = {"silu": SILU, "gelu_tanh": GELU_TANH}


@compiled()
def share(thread, threads, size):
    """The bounds of a thread's part of `size` things."""
    return thread * size // threads, (thread + 1) * size // threads


@compiled("contract", "reassoc", "nsz")
def norm_row(x, k, weight, offset, eps, out):
    """out[k] = x[k] / rms(x) * (weight[k] + offset)."""
    squares = np.float32(0.0)
    for i in range(k):
        squares += get(x, i) * get(x, i)
    factor = np.float32(1.0 / np.sqrt(squares / np.float32(k) + eps))
    for i in range(k):
        put(out, i, get(x, i) * factor * (get(weight, i) + offset))


@compiled()
def block_product(x, rows, k, panel, tile, after, storage):
    """tile[rows, PANEL] = x[rows, k] @ panel[k, PANEL], all dense; the weights at `after` are needed next."""
    for i in range(rows * PANEL):
        put(tile, i, np.float32(0.0))
    for start in range(0, k, DEPTH):
        depth, weights = min(DEPTH, k - start), panel + width(storage) * start * PANEL
        ahead = weights + width(storage) * depth * PANEL if start + depth < k else after
        product(x + 4 * start, k, weights, tile, PANEL, rows, depth, ahead, storage)


@compiled("contract")
def gate(act, gates, ups, size):
    """ups *= act(gates), `size` floats each."""
    if act == SILU:
        for i in range(size):
            g = get(gates, i)
            put(ups, i, get(ups, i) * g / (np.float32(1.0) + exp(-g)))
    else:
        for i in range(size):
            g = get(gates, i)
            u = np.float32(0.7978845608) * (g + np.float32(0.044715) * g * g * g)
            put(ups, i, get(ups, i) * np.float32(0.5) * g * (np.float32(1.0) + tanh(u)))


@compiled()
def add_rows(tile, stride, rows, columns, other, other_stride):
    """tile[rows, columns] += other; an other_stride of 0 repeats its one row."""
    for row in range(rows):
        to, source = tile + 4 * row * stride, other + 4 * row * other_stride
        for i in range(columns):
            put(to, i, get(to, i) + get(source, i))


@compiled()
def write_rows(tile, rows, columns, out, stride):
    for row in range(rows):
        source, to = tile + 4 * row * PANEL, out + 4 * row * stride
        for i in range(columns):
            put(to, i, get(source, i))


@spliced
def task(a, x, row, panel, tile, after, storage):
    """One panel of outputs for one block of rows; with an activation, of gates and of ups (whole panels)."""
    rows, columns = min(ROWS, a.rows - row), min(PANEL, a.columns - panel * PANEL)
    halves = 1 if a.act == PLAIN else 2
    for half in range(halves):
        column, result = half * a.columns + panel * PANEL, tile + half * 4 * ROWS * PANEL
        weights, line = a.w + width(storage) * a.k * column, width(storage) * a.k
        ahead = after if half + 1 == halves else weights + line * a.columns
        block_product(x + 4 * row * a.k, rows, a.k, weights, result, ahead, storage)
        if a.bias != 0:
            add_rows(result, PANEL, rows, columns, a.bias + 4 * column, np.int64(0))
    result, at = tile + (halves - 1) * 4 * ROWS * PANEL, 4 * (row * a.columns + panel * PANEL)
    if a.act != PLAIN:
        gate(a.act, tile, result, rows * PANEL)
    if a.residual != 0:
        add_rows(result, PANEL, rows, columns, a.residual + at, a.columns)
    write_rows(result, rows, columns, a.out + at, a.columns)


@spliced
def linear(a, storage):
    """One thread's part: its share of the norms, a barrier, its share of (panel, block of rows)."""
    thread, x = thread_num(), a.x
    if a.norm_weight != 0:
        first, last = share(thread, a.threads, a.rows)
        for row in range(first, last):
            at = 4 * row * a.k
            offset, eps = np.float32(a.offset), np.float32(a.eps)
            norm_row(x + at, a.k, a.norm_weight, offset, eps, a.normed + at)
        x = a.normed
        barrier()
    tile = a.tiles + thread * 8 * ROWS * PANEL
    blocks = (a.rows + ROWS - 1) // ROWS
    first, last = share(thread, a.threads, (a.columns + PANEL - 1) // PANEL * blocks)
    for number in range(first, last):
        after = a.w + width(storage) * a.k * PANEL * ((number + 1) // blocks)
        if number + 1 == last and a.next_w != 0:
            after = a.next_w + thread * a.next_panels // a.threads * a.next_size
        task(a, x, number % blocks * ROWS, number // blocks, tile, after, storage)


@compiled()
def gates(a):
    """One thread's rows of gate_up [rows, 2 x columns]: act(gate) * up to out."""
    first, last = share(thread_num(), a.threads, a.rows)
    for row in range(first, last):
        source, out = a.gate_up + 8 * row * a.columns, a.out + 4 * row * a.columns
        for i in range(a.columns):
            put(out, i, get(source, a.columns + i))
        gate(a.act, source, out, a.columns)


def linear_f32(pointer):
    linear(record(pointer), F32)


def linear_bf16(pointer):
    linear(record(pointer), BF16)


def linear_f16(pointer):
    linear(record(pointer), F16)


def gates_f32(pointer):
    gates(record(pointer))


GATE_REGION = Region(gates_f32, "gate_up out rows columns act")
# `next_*`: where the weights of the linear layer behind this one lie, in panels and bytes of each, to be asked for
# by a thread that is done; 0 if unknown.
_FIELDS = "x rows k w columns bias residual out act norm_weight normed tiles next_w next_panels next_size"
REGIONS = {
    dtype: Region(body, _FIELDS, floats="eps offset")
    for dtype, body in (
        (torch.float32, linear_f32),
        (torch.bfloat16, linear_bf16),
        (torch.float16, linear_f16),
    )
}


def pack_panels(weight: Tensor) -> Tensor:
    """weight [out, in] as [ceil(out / PANEL), in, PANEL], the last panel filled with zeros."""
    rows, depth = weight.shape
    panels = -(-rows // PANEL)
    padded = weight.new_zeros(panels * PANEL, depth)
    padded[:rows] = weight
    packed = pages.zeros((panels, depth, PANEL), weight.dtype)
    return packed.copy_(padded.view(panels, PANEL, depth).transpose(1, 2))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def act_code(act: str) -> int:
    if act not in ACTS:
        raise LabError("act", act, "is not an activation", f"choose one of {', '.join(ACTS)}")
    return ACTS[act]


def dense(x: Tensor) -> Tensor:
    """x as contiguous float32: itself, as a rule."""
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()


def gate_rows(pool: Pool, gate_up: Tensor, act: str) -> Tensor:
    """`reference.gated_act` on float32 gate_up [T, 2F]."""
    gate_up, rows, columns = dense(gate_up), gate_up.shape[0], gate_up.shape[1] // 2
    out, threads = gate_up.new_empty(rows, columns), pool.threads_for(rows)
    pool.run(GATE_REGION.call(threads, gate_up.data_ptr(), out.data_ptr(), rows, columns, act_code(act)))
    return out


class PackedLinear:
    """A linear layer packed for `Region` kernels; weights stay in float32, bfloat16 or float16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pool: Pool) -> None:
        self.out_features, self.in_features = weight.shape
        self.panels = pack_panels(weight.detach())
        self.bias = None if bias is None else dense(bias.detach())
        self._pool, self._region = pool, REGIONS[weight.dtype]
        self._weight, self._shift = self.panels.data_ptr(), address(self.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)

    @property
    def gates_fuse(self) -> bool:
        """Whether the two halves of the outputs, gates and ups, each fill whole panels."""
        return self.out_features % (2 * PANEL) == 0

    def gated(
        self,
        x: Tensor,
        act: str,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
        weight_offset: float = 0.0,
    ) -> Tensor:
        """`gated_act(self(norm(x)))`, in one region if `gates_fuse`; [T, out / 2]."""
        if self.gates_fuse:
            return self.run(x, act_code(act), None, norm_weight, eps, weight_offset)
        return gate_rows(self._pool, self.run(x, PLAIN, None, norm_weight, eps, weight_offset), act).to(
            x.dtype
        )

    def run(
        self,
        x: Tensor,
        act: int = PLAIN,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
        weight_offset: float = 0.0,
    ) -> Tensor:
        """norm, product, bias, then activation or residual, in one region: [T, in] -> [T, out], dtype of x."""
        dtype, x = x.dtype, dense(x)
        norm_weight = None if norm_weight is None else dense(norm_weight)
        residual = None if residual is None else dense(residual)
        out = x.new_empty(x.shape[0], self.out_features if act == PLAIN else self.out_features // 2)
        self._pool.run(self.call(x, out, act, residual, norm_weight, eps, weight_offset))
        return out if dtype is torch.float32 else out.to(dtype)

    def call(
        self,
        x: Tensor,
        out: Tensor,
        act: int = PLAIN,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
        weight_offset: float = 0.0,
    ) -> Call:
        """`run` as a call yet to be run; all tensors dense float32."""
        (rows, depth), (_, columns), threads = x.shape, out.shape, self._pool.num_threads
        if depth != self.in_features:
            raise LabError("x", tuple(x.shape), f"does not fit a layer of {self.in_features} inputs")
        if residual is not None and residual.shape != out.shape:
            raise LabError("residual", tuple(residual.shape), f"does not fit outputs of {tuple(out.shape)}")
        tiles = self._pool.scratch(threads * 2 * ROWS * PANEL + rows * depth)
        normed = tiles + 8 * threads * ROWS * PANEL
        return self._region.call(
            *(threads, x.data_ptr(), rows, depth, self._weight, columns, self._shift, address(residual)),
            *(out.data_ptr(), act, address(norm_weight), normed, tiles, 0, 0, 0, eps, weight_offset),
        )
