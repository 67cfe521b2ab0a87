"""Where a step is queued: a CUDA stream, or the calling thread. One interface, so that one executor serves both.

A `Mark` is a moment on a device: it can be waited for, and two of them have a distance. `HostLine` does
everything at once and in order, which makes the executor's logic testable without a GPU.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


def answers(device: torch.device | str) -> bool:
    """Whether a device still computes: after a fault of its own, CUDA answers every call of a process with that fault."""
    if torch.device(device).type == "cpu":
        return True
    try:
        return int((torch.ones(1, dtype=torch.int32, device=device) + 1).item()) == 2
    except torch.OutOfMemoryError:
        return True
    except Exception:
        return False


class Mark(Protocol):
    """A moment in the order of a device's work."""

    def wait(self) -> None:
        """Return when everything queued before it is done. Raises what the device raised."""

    def seconds_after(self, earlier: Any) -> float:
        """The distance of two marks that were both waited for."""


class DeviceLine(Protocol):
    """The main queue of a device and a second one for copies."""

    device: torch.device

    def answers(self) -> bool:
        """Whether the device still computes, asked after something failed."""

    def mark(self) -> Mark: ...

    def mark_copies(self) -> Mark: ...

    def after(self, mark: Mark) -> None:
        """What the main queue does from now on happens after `mark`."""

    def copies_after(self, mark: Mark) -> None:
        """The same for the copying queue."""

    def copying(self) -> AbstractContextManager[Any]:
        """Copies made inside go to the copying queue."""

    def host_empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device can read and write by itself."""

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """`work` as something that can be repeated: it reads and writes the same tensors each time."""


class HostMark:
    """A moment of the host's clock; everything before it is done."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        return

    def seconds_after(self, earlier: HostMark) -> float:
        return self._at - earlier._at


class HostLine:
    """The calling thread as a device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def answers(self) -> bool:
        return True

    def mark(self) -> Mark:
        return HostMark()

    mark_copies = mark

    def after(self, mark: Mark) -> None:
        return

    copies_after = after

    def copying(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def host_empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype)

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work


class CudaMark:
    """A CUDA event with a time."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_after(self, earlier: CudaMark) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaLine:
    """The current stream of a CUDA device, and a stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._main = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)
        self._aside = torch.cuda.Stream(device)  # where graphs are recorded, all on one: libraries keep a workspace per queue
        self._pool: Any = None

    def answers(self) -> bool:
        return answers(self.device)

    def mark(self) -> Mark:
        return CudaMark(self._main)

    def mark_copies(self) -> Mark:
        return CudaMark(self._copies)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self._main.wait_event(mark.event)

    def copies_after(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        self._copies.wait_event(mark.event)

    def copying(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._copies)

    def host_empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Two runs to warm up (kernels compile, libraries take their workspaces), then one is recorded. All
        graphs share a pool of memory, since no two of them run at once. Other threads may use the device meanwhile."""
        self._aside.wait_stream(self._main)
        try:
            with torch.cuda.stream(self._aside):
                for _ in range(2):
                    work()
        finally:  # what runs in place of a graph must not run beside half of it
            self._main.wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"):
            work()
        self._pool = self._pool or graph.pool()
        return graph.replay
