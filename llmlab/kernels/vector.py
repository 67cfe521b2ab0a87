"""The few pieces that numba cannot express, as LLVM vector instructions.

`product` is the heart of the linear layers and of attention: a tile of outputs stays in vector
registers while it runs down the inner dimension. Each output is one chain of fused multiply-adds in
the order of k, whatever the number of rows: that is what makes the kernels independent of the batch.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # whose own types do not know what it makes
FLOAT, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def compiled(*relaxed: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a part of a kernel; `relaxed` names the liberties with rounding (LLVM's fast-math flags).

    Without "reassoc" sums keep their order. Division by zero is no exception, and there is no wrapper
    for Python: the parts are called by each other, and by `Region`.
    """
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "fastmath": set(relaxed) or False}
    decorate: Callable[[Callable[..., Any]], Any] = numba.njit(error_model="numpy", **options)  # type: ignore
    return decorate


# Pasted into its caller before anything is compiled: for what stands high in a kernel, since numba
# optimises all that a function calls again together with it.
spliced: Callable[[Callable[..., Any]], Any] = numba.njit(inline="always", error_model="numpy")


@dataclass(frozen=True)
class Shape:
    """Register tile of a machine: `rows` x `vectors` accumulators of `lanes` floats each."""

    lanes: int
    vectors: int
    rows: int


def host_shape() -> Shape:
    """The tile that fills the vector registers of this machine without spilling.

    AVX-512 and NEON have 32 registers (24 accumulators, 4 weights, 1 input), AVX2 has 16 (12, 2, 1).
    """
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return Shape(lanes=16, vectors=4, rows=6)
    if features.get("avx2") or features.get("avx"):
        return Shape(lanes=8, vectors=2, rows=6)
    return Shape(lanes=4, vectors=4, rows=6)


SHAPE = host_shape()
LANES = SHAPE.lanes
PANEL = SHAPE.lanes * SHAPE.vectors
VECTOR = ir.VectorType(FLOAT, LANES)


def _at(b: Any, address: Any, offset: int, kind: ir.Type) -> Any:
    return b.inttoptr(b.add(address, I64(offset)) if offset else address, kind.as_pointer())


def _load(b: Any, address: Any, offset: int, storage: types.Type) -> Any:
    """One vector of floats from memory that holds float32, bfloat16 (as uint16) or float16 (as int16)."""
    if storage == types.float32:
        loaded = b.load(_at(b, address, offset * 4, VECTOR))
        loaded.align = 4
        return loaded
    halves = ir.VectorType(I16 if storage == types.uint16 else ir.HalfType(), LANES)
    loaded = b.load(_at(b, address, offset * 2, halves))
    loaded.align = 2
    if storage == types.int16:
        return b.fpext(loaded, VECTOR)
    words = ir.VectorType(I32, LANES)
    return b.bitcast(b.shl(b.zext(loaded, words), ir.Constant(words, [16] * LANES)), VECTOR)


def _store(b: Any, value: Any, address: Any, offset: int) -> None:
    b.store(value, _at(b, address, offset * 4, VECTOR)).align = 4


def _splat(b: Any, scalar: Any) -> Any:
    undefined, first = ir.Constant(VECTOR, ir.Undefined), ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return b.shuffle_vector(b.insert_element(undefined, scalar, I32(0)), undefined, first)


def _prefetch(b: Any, address: Any) -> None:
    """Ask for the cache line of an address; any address is allowed."""
    byte = ir.IntType(8).as_pointer()
    prefetch = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0"
    )
    b.call(prefetch, [b.inttoptr(address, byte), I32(0), I32(3), I32(1)])


def _product(rows: int, scattered: bool) -> Any:
    """y[rows, PANEL] += x[rows, k] @ w[k, PANEL]; strides of x and y in elements.

    `w` is the address of dense weights, and the cache lines from `ahead` on are asked for meanwhile, one
    in each step. Or, scattered, `w` and `ahead` hold k addresses of rows, to which `offset` is added: the
    row of `w` is read and that of `ahead` asked for.
    """
    vectors, size = SHAPE.vectors, types.int64

    @intrinsic
    def product(context, x, x_stride, w, y, y_stride, k, ahead, offset, storage):
        width = 4 if storage == types.float32 else 2

        def codegen(target, b, signature, args):
            x, x_stride, w, y, y_stride, k, ahead, offset, _ = args
            fma = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32"
            )
            x_rows = [b.add(x, b.mul(x_stride, I64(4 * r))) for r in range(rows)]
            y_rows = [b.add(y, b.mul(y_stride, I64(4 * r))) for r in range(rows)]
            cells = [(r, j) for r in range(rows) for j in range(vectors)]
            start = [_load(b, y_rows[r], j * LANES, types.float32) for r, j in cells]
            before, loop, after = b.block, b.append_basic_block("k"), b.append_basic_block("end")
            b.branch(loop)
            b.position_at_end(loop)
            i = b.phi(I64)
            sums = [b.phi(VECTOR) for _ in cells]
            if scattered:
                row_at = b.load(_at(b, b.add(w, b.mul(i, I64(8))), 0, I64))
                weights_at = b.add(row_at, offset)
                next_at = b.add(b.load(_at(b, b.add(ahead, b.mul(i, I64(8))), 0, I64)), offset)
                for line in range(0, width * PANEL, 64):
                    _prefetch(b, b.add(next_at, I64(line)))
            else:
                weights_at = b.add(w, b.mul(i, I64(width * PANEL)))
                _prefetch(b, b.add(ahead, b.mul(i, I64(64))))
            weights = [_load(b, weights_at, j * LANES, storage) for j in range(vectors)]
            step = b.mul(i, I64(4))
            inputs = [_splat(b, b.load(_at(b, b.add(row, step), 0, FLOAT))) for row in x_rows]
            new = [b.call(fma, [inputs[r], weights[j], s]) for (r, j), s in zip(cells, sums, strict=True)]
            after_i = b.add(i, I64(1))
            for phi, first, last in zip([i, *sums], [I64(0), *start], [after_i, *new], strict=True):
                phi.add_incoming(first, before)
                phi.add_incoming(last, loop)
            b.cbranch(b.icmp_signed("<", after_i, k), loop, after)
            b.position_at_end(after)
            for (r, j), value in zip(cells, new, strict=True):
                _store(b, value, y_rows[r], j * LANES)
            return target.get_dummy_value()

        return types.void(size, size, size, size, size, size, size, size, storage), codegen

    return product


_product_1, _product_2, _product_3, _product_4, _product_5, _product_6 = (_product(rows, False) for rows in range(1, 7))
_scattered_1, _scattered_2, _scattered_4, _scattered_6 = (_product(rows, True) for rows in (1, 2, 4, 6))

# A value whose numba type names the storage of the weights or of the KV cache.
F32, BF16, F16 = np.float32(0), np.uint16(0), np.int16(0)


@compiled()
def product(x, x_stride, w, y, y_stride, rows, k, ahead, storage):
    """y[rows, PANEL] += x[rows, k] @ w[k, PANEL] for addresses x, y (float32) and w (`storage`); k > 0."""
    while rows >= 9:
        _product_6(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
        x, y, rows, ahead = x + 24 * x_stride, y + 24 * y_stride, rows - 6, ahead + 64 * k
    if rows >= 7:  # and not six and one, or two: so few read weights faster than memory brings them
        _product_4(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
        x, y, rows, ahead = x + 16 * x_stride, y + 16 * y_stride, rows - 4, ahead + 64 * k
    if rows == 6:
        _product_6(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
    elif rows == 5:
        _product_5(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
    elif rows == 4:
        _product_4(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
    elif rows == 3:
        _product_3(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
    elif rows == 2:
        _product_2(x, x_stride, w, y, y_stride, k, ahead, 0, storage)
    elif rows == 1:
        _product_1(x, x_stride, w, y, y_stride, k, ahead, 0, storage)


@compiled()
def scattered_product(x, x_stride, w, ahead, offset, y, y_stride, rows, k, storage):
    """`product` with row i of the weights `offset` bytes behind the i-th of the addresses at w.

    Those at `ahead` are asked for at the same pace: memory is read on while the arithmetic runs. (All
    requests at once would fill the queue of outstanding misses, and every load behind them would wait.)
    """
    while rows >= 6:
        _scattered_6(x, x_stride, w, y, y_stride, k, ahead, offset, storage)
        x, y, rows = x + 24 * x_stride, y + 24 * y_stride, rows - 6
    if rows >= 4:
        _scattered_4(x, x_stride, w, y, y_stride, k, ahead, offset, storage)
        x, y, rows = x + 16 * x_stride, y + 16 * y_stride, rows - 4
    if rows >= 2:
        _scattered_2(x, x_stride, w, y, y_stride, k, ahead, offset, storage)
        x, y, rows = x + 8 * x_stride, y + 8 * y_stride, rows - 2
    if rows >= 1:
        _scattered_1(x, x_stride, w, y, y_stride, k, ahead, offset, storage)


@intrinsic
def invoke(context, function, argument):
    """Call the function at an address with one pointer."""

    def codegen(target, b, signature, args):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [b.inttoptr(args[1], byte)])
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def prefetch(context, address):
    def codegen(target, b, signature, args):
        _prefetch(b, args[0])
        return target.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def copy(context, source, target, storage):
    """LANES elements as they are."""
    kind = ir.VectorType(FLOAT if storage == types.float32 else I16, LANES)

    def codegen(target_, b, signature, args):
        loaded = b.load(_at(b, args[0], 0, kind))
        loaded.align = 2
        b.store(loaded, _at(b, args[1], 0, kind)).align = 2
        return target_.get_dummy_value()

    return types.void(types.int64, types.int64, storage), codegen


@intrinsic
def transpose(context, rows, offset, target, storage):
    """A square of elements, turned and widened: target[d, i] = element offset + d of row i.

    The addresses of the LANES rows lie at `rows`; the rows of the float32 target are PANEL apart.
    """
    width = 4 if storage == types.float32 else 2

    def codegen(target_, b, signature, args):
        rows, offset, out, _ = args
        skip = b.mul(offset, I64(width))
        tile = []
        for i in range(LANES):
            row = b.load(_at(b, rows, 8 * i, I64))
            tile.append(_load(b, b.add(row, skip), 0, storage))
        for i, column in enumerate(_transposed(b, tile)):
            _store(b, column, out, i * PANEL)
        return target_.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, storage), codegen


def _transposed(b: Any, tile: list[Any]) -> list[Any]:
    """The columns of a square of vectors, by swapping ever larger off-diagonal squares."""
    tile, lanes = list(tile), range(LANES)
    step = 1
    while step < LANES:
        low = [lane if not lane & step else LANES + lane - step for lane in lanes]
        high = [lane + step if not lane & step else LANES + lane for lane in lanes]
        masks = [ir.Constant(ir.VectorType(I32, LANES), mask) for mask in (low, high)]
        for i in lanes:
            if not i & step:
                pair = tile[i], tile[i + step]
                tile[i], tile[i + step] = (b.shuffle_vector(*pair, mask) for mask in masks)
        step *= 2
    return tile


def highest(size: int) -> Any:
    """A function of an address: the largest of `size` floats there, a multiple of LANES.

    (A loop for a maximum does not vectorise.)
    """

    def larger(b: Any, one: Any, other: Any) -> Any:
        return b.select(b.fcmp_ordered(">", one, other), one, other)

    @intrinsic
    def largest(context, address):
        def codegen(target, b, signature, args):
            vectors = [_load(b, args[0], i, types.float32) for i in range(0, size, LANES)]
            while len(vectors) > 1:
                vectors = [*vectors[2:], larger(b, *vectors[:2])]
            best, step = vectors[0], LANES // 2
            while step:
                mask = ir.Constant(ir.VectorType(I32, LANES), [(i + step) % LANES for i in range(LANES)])
                best, step = larger(b, best, b.shuffle_vector(best, best, mask)), step // 2
            return b.extract_element(best, I32(0))

        return types.float32(types.int64), codegen

    return largest


@intrinsic
def width(context, storage):
    """Bytes of one element of a storage, known at compile time."""
    size = 4 if storage == types.float32 else 2

    def codegen(target, b, signature, args):
        return I64(size)

    return types.int64(storage), codegen


def _accessors(element: types.Type, kind: ir.Type) -> tuple[Any, Any]:
    """`get(address, i)` and `put(address, i, value)` for an array of elements at an address."""

    @intrinsic
    def get(context, address, i):
        def codegen(target, b, signature, args):
            return b.load(b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]]))

        return element(types.int64, types.int64), codegen

    @intrinsic
    def put(context, address, i, value):
        def codegen(target, b, signature, args):
            b.store(args[2], b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]]))
            return target.get_dummy_value()

        return types.void(types.int64, types.int64, element), codegen

    return get, put


def _narrow(b: Any, value: Any, storage: types.Type) -> Any:
    """A float as `storage`, rounded to nearest even."""
    if storage == types.float32:
        return value
    if storage == types.int16:
        return b.bitcast(b.fptrunc(value, ir.HalfType()), I16)
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    rounded = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
    nan = b.fcmp_unordered("uno", value, value)
    return b.trunc(b.select(nan, I32(0x7FC0), rounded), I16)


@intrinsic
def put_as(context, address, i, value, storage):
    """`put` into an array of `storage`."""
    kind = FLOAT if storage == types.float32 else I16

    def codegen(target, b, signature, args):
        at = b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]])
        b.store(_narrow(b, args[2], storage), at)
        return target.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, storage), codegen


@intrinsic
def get_as(context, address, i, storage):
    """The i-th element of an array of `storage`, widened."""
    kind = {types.float32: FLOAT, types.uint16: I16, types.int16: ir.HalfType()}[storage]

    def codegen(target, b, signature, args):
        loaded = b.load(b.gep(b.inttoptr(args[0], kind.as_pointer()), [args[1]]))
        if storage == types.float32:
            return loaded
        return b.fpext(loaded, FLOAT) if storage == types.int16 else b.bitcast(b.shl(b.zext(loaded, I32), I32(16)), FLOAT)

    return types.float32(types.int64, types.int64, storage), codegen


# Memory by address: numba compiles this in half the time that its arrays take.
get, put = _accessors(types.float32, FLOAT)
get_int, put_int = _accessors(types.int32, I32)
get_long, put_long = _accessors(types.int64, I64)


@intrinsic
def _from_bits(context, bits):
    def codegen(target, b, signature, args):
        return b.bitcast(args[0], FLOAT)

    return types.float32(types.int32), codegen


@compiled("contract")
def exp(x):
    """e^x in float32, exactly 0 below -87, within 2 units in the last place; loops over it vectorise."""
    n = np.floor(min(x, np.float32(88.0)) * np.float32(1.44269504) + np.float32(0.5))
    n = max(n, np.float32(-126.0))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = (p * r * r + r + np.float32(1.0)) * _from_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return np.float32(0.0) if x < np.float32(-87.0) else value


@compiled("contract")
def tanh(x):
    return np.float32(1.0) - np.float32(2.0) / (exp(np.float32(2.0) * x) + np.float32(1.0))
