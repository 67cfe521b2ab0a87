"""Linear layers with int8 or int4 weights on the CPU: narrow panels are read, floats are multiplied.

Panels as in `linear`, of codes: PANEL outputs wide, one scale and zero per output and group of inputs. For
few rows the codes become weights in registers; for many rows a part of a panel is widened into the cache and
multiplied there as any other. The same multiply-adds in the same order in both: a row's bits do not depend
on how many rows there are.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch import Tensor

from llmlab.kernels.linear import DEPTH, ROWS, add_rows, address, dense, share, write_rows
from llmlab.kernels.pool import Pool, Region, record, thread_num
from llmlab.kernels.quantized import QuantizedTensor
from llmlab.kernels.vector import (
    F32,
    FLOAT,
    I32,
    I64,
    LANES,
    PANEL,
    SHAPE,
    VECTOR,
    _at,
    _load,
    _prefetch,
    _splat,
    _store,
    compiled,
    intrinsic,
    product,
    put,
    spliced,
)

FEW = 16  # rows up to which codes are widened in registers, four rows at a time; beyond, once for all rows
BYTES = ir.VectorType(ir.IntType(8), LANES)
WORDS = ir.VectorType(I32, LANES)
AHEAD = 1024  # bytes between what is read and what is asked for


def _codes(b: Any, address: Any, j: int, bits: int, part: int) -> Any:
    """Vector j of a line of codes as floats; of 4 bits, those of the low (part 0) or the high half."""
    loaded = b.load(_at(b, address, j * LANES, BYTES))
    loaded.align = 1
    if bits == 8:
        return b.sitofp(b.sext(loaded, WORDS), VECTOR)
    wide = b.zext(loaded, WORDS)
    four, low = ir.Constant(WORDS, [4] * LANES), ir.Constant(WORDS, [15] * LANES)
    return b.sitofp(b.lshr(wide, four) if part else b.and_(wide, low), VECTOR)


def _zeros(b: Any, address: Any, j: int, bits: int) -> Any:
    loaded = b.load(_at(b, address, j * LANES, BYTES))
    loaded.align = 1
    return b.sitofp(b.sext(loaded, WORDS) if bits == 8 else b.zext(loaded, WORDS), VECTOR)


def _affine(b: Any, scales: Any, zeros: Any, bits: int) -> tuple[list[Any], list[Any]]:
    """(scale, -zero * scale) of a group: a weight is one multiply-add away from its code."""
    scale = [_load(b, scales, j * LANES, types.float32) for j in range(SHAPE.vectors)]
    return scale, [b.fneg(b.fmul(_zeros(b, zeros, j, bits), s)) for j, s in enumerate(scale)]


def _fma(b: Any) -> Any:
    return cgutils.get_or_insert_function(b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32")


def _loop(b: Any, count: Any, start: list[Any], body: Any) -> list[Any]:
    """`body(i, values) -> values` for i in 0 .. count - 1, the values kept in registers."""
    before, loop, after = b.block, b.append_basic_block("i"), b.append_basic_block("end")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(I64)
    values = [b.phi(VECTOR) for _ in start]
    new = body(i, values)
    step = b.add(i, I64(1))
    for phi, first, last in zip([i, *values], [I64(0), *start], [step, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, b.block)
    b.cbranch(b.icmp_signed("<", step, count), loop, after)
    b.position_at_end(after)
    return new


def _group_product(rows: int, bits: int) -> Any:
    """y[rows, PANEL] += x[rows, :] @ weights of one group, `lines` lines of codes; x_stride in floats."""
    size, vectors, parts = types.int64, SHAPE.vectors, 8 // bits

    @intrinsic
    def group_product(context, x, x_stride, w, scales, zeros, y, lines):
        def codegen(target, b, signature, args):
            x, x_stride, w, scales, zeros, y, lines = args
            fma, (scale, shift) = _fma(b), _affine(b, scales, zeros, bits)
            x_rows = [b.add(x, b.mul(x_stride, I64(4 * r))) for r in range(rows)]
            cells = [(r, j) for r in range(rows) for j in range(vectors)]
            sums = [_load(b, y, r * PANEL + j * LANES, types.float32) for r, j in cells]
            for part in range(parts):
                skipped = b.mul(lines, I64(4 * part))

                def step(i, values, part=part, skipped=skipped):
                    line = b.add(w, b.mul(i, I64(PANEL)))
                    if part == 0:
                        _prefetch(b, b.add(line, I64(AHEAD)))
                    at = b.add(skipped, b.mul(i, I64(4)))
                    inputs = [_splat(b, b.load(_at(b, b.add(row, at), 0, FLOAT))) for row in x_rows]
                    weights = [b.call(fma, [_codes(b, line, j, bits, part), scale[j], shift[j]]) for j in range(vectors)]
                    return [b.call(fma, [inputs[r], weights[j], v]) for (r, j), v in zip(cells, values, strict=True)]

                sums = _loop(b, lines, sums, step)
            for (r, j), value in zip(cells, sums, strict=True):
                _store(b, value, y, r * PANEL + j * LANES)
            return target.get_dummy_value()

        return types.void(*[size] * 7), codegen

    return group_product


def _group_widen(bits: int) -> Any:
    """out = the weights of one group, a line of PANEL floats for each input."""

    @intrinsic
    def group_widen(context, w, scales, zeros, out, lines):
        def codegen(target, b, signature, args):
            w, scales, zeros, out, lines = args
            fma, (scale, shift) = _fma(b), _affine(b, scales, zeros, bits)
            for part in range(8 // bits):
                start = b.add(out, b.mul(lines, I64(4 * PANEL * part)))

                def step(i, values, part=part, start=start):
                    line, to = b.add(w, b.mul(i, I64(PANEL))), b.add(start, b.mul(i, I64(4 * PANEL)))
                    for j in range(SHAPE.vectors):
                        _store(b, b.call(fma, [_codes(b, line, j, bits, part), scale[j], shift[j]]), to, j * LANES)
                    return []

                _loop(b, lines, [], step)
            return target.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return group_widen


_p1_8, _p2_8, _p4_8 = (_group_product(rows, 8) for rows in (1, 2, 4))
_p1_4, _p2_4, _p4_4 = (_group_product(rows, 4) for rows in (1, 2, 4))
_widen_8, _widen_4 = _group_widen(8), _group_widen(4)


@compiled()
def group_rows_8(x, x_stride, rows, w, scales, zeros, y, lines):
    while rows >= 4:
        _p4_8(x, x_stride, w, scales, zeros, y, lines)
        x, y, rows = x + 16 * x_stride, y + 16 * PANEL, rows - 4
    if rows >= 2:
        _p2_8(x, x_stride, w, scales, zeros, y, lines)
        x, y, rows = x + 8 * x_stride, y + 8 * PANEL, rows - 2
    if rows >= 1:
        _p1_8(x, x_stride, w, scales, zeros, y, lines)


@compiled()
def group_rows_4(x, x_stride, rows, w, scales, zeros, y, lines):
    while rows >= 4:
        _p4_4(x, x_stride, w, scales, zeros, y, lines)
        x, y, rows = x + 16 * x_stride, y + 16 * PANEL, rows - 4
    if rows >= 2:
        _p2_4(x, x_stride, w, scales, zeros, y, lines)
        x, y, rows = x + 8 * x_stride, y + 8 * PANEL, rows - 2
    if rows >= 1:
        _p1_4(x, x_stride, w, scales, zeros, y, lines)


@spliced
def few_rows(a, x, rows, panel, tile, group_rows, per_byte):
    """The panel's outputs for up to FEW rows, group by group as they are read."""
    groups, lines = a.k // a.group, a.group // per_byte
    w, at = a.w + panel * groups * lines * PANEL, panel * groups * PANEL
    for g in range(groups):
        group_rows(x + 4 * g * a.group, a.k, rows, w + g * lines * PANEL, a.scales + 4 * (at + g * PANEL),
                   a.zeros + at + g * PANEL, tile, lines)  # fmt: skip


@spliced
def many_rows(a, x, rows, panel, tile, wide, group_widen, per_byte):
    """The panel's outputs for a block of rows: DEPTH inputs are widened at a time."""
    groups, lines = a.k // a.group, a.group // per_byte
    w, at = a.w + panel * groups * lines * PANEL, panel * groups * PANEL
    for start in range(0, a.k, DEPTH):
        depth = min(DEPTH, a.k - start)
        for g in range(start // a.group, (start + depth) // a.group):
            group_widen(w + g * lines * PANEL, a.scales + 4 * (at + g * PANEL), a.zeros + at + g * PANEL,
                        wide + 4 * (g * a.group - start) * PANEL, lines)  # fmt: skip
        product(x + 4 * start, a.k, wide, tile, PANEL, rows, depth, wide, F32)


@spliced
def quant_linear(a, group_rows, group_widen, per_byte):
    """One thread's part: its share of (panel, block of rows)."""
    thread = thread_num()
    tile = a.tiles + thread * 4 * (ROWS + DEPTH) * PANEL
    wide, blocks = tile + 4 * ROWS * PANEL, (a.rows + ROWS - 1) // ROWS
    first, last = share(thread, a.threads, (a.columns + PANEL - 1) // PANEL * blocks)
    for number in range(first, last):
        row, panel = number % blocks * ROWS, number // blocks
        rows, columns = min(ROWS, a.rows - row), min(PANEL, a.columns - panel * PANEL)
        for i in range(rows * PANEL):
            put(tile, i, np.float32(0.0))
        if a.rows <= FEW:
            few_rows(a, a.x, rows, panel, tile, group_rows, per_byte)
        else:
            many_rows(a, a.x + 4 * row * a.k, rows, panel, tile, wide, group_widen, per_byte)
        if a.bias != 0:
            add_rows(tile, PANEL, rows, columns, a.bias + 4 * panel * PANEL, np.int64(0))
        write_rows(tile, rows, columns, a.out + 4 * (row * a.columns + panel * PANEL), a.columns)


def linear_int8(pointer):
    quant_linear(record(pointer), group_rows_8, _widen_8, 1)


def linear_int4(pointer):
    quant_linear(record(pointer), group_rows_4, _widen_4, 2)


_FIELDS = "x rows k w scales zeros columns bias out group tiles"
REGIONS = {8: Region(linear_int8, _FIELDS), 4: Region(linear_int4, _FIELDS)}


def _panels(columns: Tensor) -> Tensor:
    """[out, n] as [ceil(out / PANEL), n, PANEL], the last panel filled with zeros."""
    count, width = columns.shape
    padded = columns.new_zeros(-(-count // PANEL) * PANEL, width)
    padded[:count] = columns
    return padded.view(-1, PANEL, width).transpose(1, 2).contiguous()


class NarrowLinear:
    """A quantised linear layer packed for the CPU; see `quantized.QuantizedTensor`."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, pool: Pool) -> None:
        self.out_features, self.in_features = weight.shape
        half = 1 << (weight.bits - 1)
        zeros = torch.full_like(weight.scales, half, dtype=torch.uint8) if weight.zeros is None else weight.zeros
        codes = weight.codes
        if weight.bits == 8:  # signed bytes widen in one instruction
            codes, zeros = (t.to(torch.int16).sub(half).to(torch.int8) for t in (codes, zeros))
        self._codes, self._zeros, self._scales = _panels(codes), _panels(zeros), _panels(weight.scales.float())
        self.bias = None if bias is None else dense(bias.detach())
        self._pool, self._region, self._group = pool, REGIONS[weight.bits], weight.group

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._zeros.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, dense(x)
        rows, threads = len(x), self._pool.num_threads
        out = x.new_empty(rows, self.out_features)
        scratch = self._pool.scratch(threads * (ROWS + DEPTH) * PANEL)
        if rows:
            self._pool.run(self._region.call(
                threads, x.data_ptr(), rows, self.in_features, self._codes.data_ptr(), self._scales.data_ptr(),
                self._zeros.data_ptr(), self.out_features, address(self.bias), out.data_ptr(), self._group,
                scratch))  # fmt: skip
        return out if dtype is torch.float32 else out.to(dtype)
