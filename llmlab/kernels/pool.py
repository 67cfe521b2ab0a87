"""One pool of threads for everything: the OpenMP team that torch already runs.

Two runtimes with a pool each fight over the cores, since an idle OpenMP thread keeps spinning for a
while. So the compiled kernels bring no pool of their own: they enter the team of torch's OpenMP
library through `GOMP_parallel`, found among the dependencies of libtorch itself. Entering costs about
a microsecond while the team is awake, and a kernel may use the team's barrier between its phases.
The GIL is released meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from numba import types

from llmlab.kernels.vector import compiled, get_long, invoke

# Resolved when machine code is loaded, by the names that `openmp` registers.
thread_num: Any = types.ExternalFunction("llmlab_thread_num", types.int32())
barrier: Any = types.ExternalFunction("llmlab_barrier", types.void())


@compiled()
def record(pointer):  # type: ignore[no-untyped-def]
    """The arguments of a region: the one record at its pointer."""
    return numba.carray(pointer, 1)[0]  # type: ignore[attr-defined]


ALONE = 4  # token rows that one thread finishes sooner than two can meet


@dataclass(frozen=True)
class OpenMP:
    """How to enter the team: `parallel(function, argument, num_threads, 0)`; None: one thread only."""

    parallel: Callable[[int, bytes, int, int], None] | None
    library: str


def _torch_library() -> Path:
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    stem = "torch_cpu" if sys.platform == "win32" else "libtorch_cpu"
    return Path(torch.__file__).parent / "lib" / f"{stem}.{suffix}"


def _alone() -> int:
    return 0


@functools.cache
def openmp() -> OpenMP:
    """Torch's OpenMP runtime, its symbols made known to compiled code. Once per process."""
    try:
        library = ctypes.CDLL(str(_torch_library()))
        enter, number, wait = library.GOMP_parallel, library.omp_get_thread_num, library.GOMP_barrier
    except (OSError, AttributeError):
        stub = numba.cfunc(types.int32())(_alone)
        for symbol in ("llmlab_thread_num", "llmlab_barrier"):
            llvm.add_symbol(symbol, stub.address)
        return OpenMP(None, "none found: one thread")
    for symbol, function in (("llmlab_thread_num", number), ("llmlab_barrier", wait)):
        llvm.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)
    enter.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    enter.restype = None
    return OpenMP(enter, "torch's OpenMP")


def parts_of(module: str) -> dict[str, Path]:
    """The files of our kernels that a module of theirs is made of, its own among them, by the modules' names."""
    home, found, ahead = __name__.rpartition(".")[0] + ".", dict[str, Path](), {module}
    while ahead:
        name = ahead.pop()
        if name not in found and name.startswith(home):
            found[name] = Path(str(sys.modules[name].__file__))
            ahead |= {str(getattr(value, "__module__", "")) for value in vars(sys.modules[name]).values()}
    return found


@functools.cache
def fingerprint(module: str) -> str:
    """Of the sources of a module's kernels with all their parts. numba's cache asks for the file of the kernel alone and would
    go on with machine code of parts that have changed since."""
    parts = parts_of(module)
    return hashlib.sha1(b"".join(parts[name].read_bytes() for name in sorted(parts))).hexdigest()[:16]


# A region with its arguments, ready to run: (address, threads, record). Threads: all of the team, or the
# first alone. A plain tuple: this is made some fifty times for one token of a small model.
Call = tuple[int, int, bytes]


class Region:
    """A kernel that all threads enter with the same record of arguments; compiled at its first use.

    `body(pointer)` reads them through `record(pointer)`. Its fields are `threads` and then
    those given: integers (sizes, addresses) and, behind them, floats. The machine code is kept in
    numba's cache: beside the sources, or in the user's cache directory where that is read-only. It is found
    there by its signature, so the record that kernels are compiled for ends with a field that nobody reads,
    named by the sources.
    """

    def __init__(self, body: Callable[[Any], None], integers: str, floats: str = "") -> None:
        self._body = body
        whole, real = ("threads " + integers).split(), floats.split()
        self._record = np.dtype([(n, np.int64) for n in whole] + [(n, np.float64) for n in real])
        self._pack = struct.Struct("q" * len(whole) + "d" * len(real)).pack

    def call(self, threads: int, *values: float) -> Call:
        """Arguments in the order of the fields. The tensors behind the addresses must outlive the run."""
        return self.address, threads, self._pack(threads, *values)

    def records(self, count: int) -> np.ndarray:
        """Room for the arguments of `count` calls, as a structured array whose columns are the fields."""
        return np.zeros(count, self._record)

    @functools.cached_property
    def address(self) -> int:
        openmp()
        place: int = self._compiled.address
        return place

    @functools.cached_property
    def _compiled(self) -> Any:
        sources = np.dtype([*self._record.descr, (f"of_{fingerprint(self._body.__module__)}", np.int64)])
        record: Any = numba.from_dtype(sources)
        signature = types.void(types.CPointer(record))  # type: ignore[no-untyped-call]
        try:
            return numba.cfunc(signature, cache=True)(self._body)
        except RuntimeError as error:  # no place to write a cache
            if "locator" not in str(error):
                raise
            return numba.cfunc(signature)(self._body)


def sequence(pointer):  # type: ignore[no-untyped-def]
    """One thread's part of several regions in a row: `calls` holds pairs of (address, record)."""
    a = record(pointer)
    for i in range(a.count):
        if i > 0:
            barrier()
        invoke(get_long(a.calls, 2 * i), get_long(a.calls, 2 * i + 1))


SEQUENCE = Region(sequence, "count calls")


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffer = torch.empty(0)


class Pool:
    """Runs regions on torch's threads: as many as `torch.set_num_threads` says, always all of them
    (resizing the team is slow), so that one number governs torch's operators and these kernels. `alone`: on the calling
    thread only, as suits a thread beside the one that has the team.
    """

    def __init__(self, alone: bool = False) -> None:
        self._enter = None if alone else openmp().parallel
        self._scratch = _Scratch()
        self._alone: dict[int, Callable[[bytes], None]] = {}

    @property
    def num_threads(self) -> int:
        return 1 if self._enter is None else torch.get_num_threads()

    def threads_for(self, rows: int) -> int:
        """All threads, or one if the token rows are too few to be worth the others."""
        return 1 if rows <= ALONE else self.num_threads

    def scratch(self, size: int) -> int:
        """The address of `size` floats that last until this Python thread asks again."""
        if self._scratch.buffer.numel() < size:
            self._scratch.buffer = torch.empty(2 * size, dtype=torch.float32, device="cpu")
        return self._scratch.buffer.data_ptr()

    def run(self, call: Call) -> None:
        """Returns when all its threads are done."""
        address, threads, record = call
        if threads > 1 and self._enter is not None:
            self._enter(address, record, threads, 0)
            return
        alone = self._alone.get(address)
        if alone is None:
            alone = self._alone[address] = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(address)
        alone(record)
