"""A CUDA device that is not there: shapes, dtypes, devices, streams and copies are real, numbers are not.

    with pretend_gpu(capability_of("h200"), monkeypatch) as gpu:
        engine = Engine(model="llama-3.1-8b", random_weights=True, device="cuda")

Tensors are torch's fake ones, so an operation whose inputs lie on two devices, or that asks the device for a number, fails as
it would there. Triton kernels are noted and not run; every read of the device gives zeros. What is noted, in order: launches,
copies between the tiers (pinned or not, waiting or not), waits, events and recorded graphs.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from llmlab.execution.host_worker import Job
from llmlab.kernels.capability import Capability
from llmlab.kernels.cross_compile import source_of

READS = ("tolist", "item", "__int__", "__bool__", "__float__", "__index__", "numpy")


class Noted(NamedTuple):
    """One thing that the host did: "launch", "copy", "read", "wait", "event", "wait event", "record graph", "replay", ...;
    `stream`: in which queue."""

    what: str
    stream: str
    detail: Any = None


class Copied(NamedTuple):
    """A copy between host and device. `waits`: the host stands still until it is done."""

    up: bool
    waits: bool
    num_bytes: int


class Launch(NamedTuple):
    """A launch of a Triton kernel, as its launcher was called; `recorded`: while a graph was."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    recorded: bool

    @property
    def specialization(self) -> Any:
        """What Triton compiles anew for."""
        return self.function.__name__, source_of(self.function, self.arguments).hash(), tuple(self.options.items())


class AtOnce:
    """A pool of threads that works in the caller's."""

    def __init__(self, *options: Any) -> None:
        pass

    def submit(self, work: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def shutdown(self, **options: Any) -> None:
        pass


class InTurn:
    """A host worker without a thread: fake tensors are for one. `finished`, `alive`, ... as in `HostWorker`."""

    alive, error = True, None

    def __init__(self) -> None:
        self.finished: deque[Job] = deque()

    def submit(self, task: Any) -> Job:
        job = Job(task)
        job.result = task.on_host()
        self.finished.append(job)
        job.done.set()
        return job

    def wait(self, job: Job) -> Any:
        return job.result

    def close(self) -> None:
        pass


class Stream:
    """A queue; two of them are the same if their names are."""

    def __init__(self, gpu: PretendGpu, name: str) -> None:
        self._gpu, self.name = gpu, name

    def wait_event(self, event: Event) -> None:
        self._gpu.note("wait event", event.at, stream=self.name)

    def wait_stream(self, other: Stream) -> None:
        self._gpu.note("wait stream", other.name, stream=self.name)

    def record_event(self, event: Any = None) -> Event:
        event = event or Event(self._gpu)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._gpu.note("wait", "stream", stream=self.name)


class Event:
    """A mark. `at`: its place among what was noted."""

    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu, self.at = gpu, -1

    def record(self, stream: Stream) -> None:
        self.at = len(self._gpu.noted)
        self._gpu.note("event", stream=stream.name)

    def synchronize(self) -> None:
        assert self.at >= 0, "waits for an event that nobody recorded"
        self._gpu.note("wait", "event")

    def elapsed_time(self, later: Event) -> float:
        assert 0 <= self.at <= later.at, "events out of order"
        return float(later.at - self.at)


class Graph:
    """What happened while it was recorded."""

    def __init__(self, gpu: PretendGpu) -> None:
        self._gpu, self.work = gpu, 0

    def replay(self) -> None:
        self._gpu.note("replay")

    def pool(self) -> tuple[int, int]:
        return (1, 0)


class PretendGpu(TorchFunctionMode):
    """See the module. `free`, `total`, `reserved`: bytes that the device says it has, and that torch holds without need."""

    def __init__(self, capability: Capability) -> None:
        super().__init__()
        self.capability, self.noted = capability, list[Noted]()
        self.free = self.total = int(capability.memory_bytes)
        self.reserved = 0  # that torch holds and nobody uses
        self._local = threading.local()
        self._pinned: set[int] = set()
        self.main, self._count = Stream(self, "main"), 0
        self.capturing = False

    # -------------------------------------------------------------------------------------- notes
    @property
    def current(self) -> Stream:
        return getattr(self._local, "stream", self.main)

    def note(self, what: str, detail: Any = None, stream: str = "") -> None:
        self.noted.append(Noted(what, stream or self.current.name, detail))

    def all(self, what: str, since: int = 0) -> list[Noted]:
        return [noted for noted in self.noted[since:] if noted.what == what]

    def launches_of(self, name: str) -> list[Noted]:
        return [noted for noted in self.all("launch") if noted.detail.function.__name__ == name]

    def launches(self, since: int = 0) -> list[Launch]:
        return [noted.detail for noted in self.all("launch", since)]

    # ------------------------------------------------------------------------------- torch.cuda
    def new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self._count += 1
        self.note("new stream", f"side {self._count}")
        return Stream(self, f"side {self._count}")

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextlib.contextmanager
    def record(self, graph: Graph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global") -> Iterator[None]:
        self.note("record graph", capture_error_mode)
        self.capturing = True
        try:
            with self.on(stream or Stream(self, "recording")):
                yield
        finally:
            self.capturing = False
            self.note("recorded")

    # ---------------------------------------------------------------------------------- functions
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and name in READS:
            return self._read(first, name)
        if name == "pin_memory" or kwargs.pop("pin_memory", False):
            made = torch.empty_like(first) if name == "pin_memory" and first is not None else function(*args, **kwargs)
            self._pinned.add(id(made.untyped_storage()))
            self._keep = [*getattr(self, "_keep", []), made]
            return made
        if first is not None and name in ("to", "cpu", "cuda"):
            return self._moved(function, name, first, args, kwargs)
        if first is not None and name == "copy_" and "cuda" in (first.device.type, args[1].device.type):
            if first.device.type != args[1].device.type:
                self._crossing(args[1], first, kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            assert torch.broadcast_shapes(args[1].shape, first.shape) == first.shape
            return first
        masks = [p for p in (args[1] if isinstance(args[1], tuple) else (args[1],)) if isinstance(p, Tensor) and p.dtype == torch.bool] \
            if name in ("__getitem__", "__setitem__") else []
        if any(p.device.type == "cuda" for p in masks):
            self._asks(name)  # how many there are
        if first is not None and ((name == "where" and len(args) == 1) or name == "nonzero"):
            if first.device.type == "cuda":
                self._asks(name)
            found = tuple(torch.zeros(1, dtype=torch.int64, device=first.device) for _ in range(first.dim()))
            return found if name == "where" else torch.stack(found, 1)
        if first is not None and name == "__getitem__" and first.device.type == "cuda":
            viewed, places = basic(first, args[1])
            if places:
                self.note("gather")
            return torch.ops.aten.index.Tensor(viewed, places) if places else viewed
        if first is not None and name == "__setitem__" and (first.device.type == "cuda" or isinstance(args[2], Tensor)):
            return self._set(*args)
        if name in ("__invert__", "bitwise_not") and first is not None:
            return torch.ops.aten.bitwise_not(first)
        if name == "tensor" and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            made = function(*args, **{**kwargs, "device": "cpu"})
            self._crossing(made, None, False)
            return torch.empty(made.shape, dtype=made.dtype, device="cuda")
        return function(*args, **kwargs)

    def _set(self, tensor: Tensor, index: Any, value: Any) -> None:
        viewed, places = basic(tensor, index)
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
        assert value.device == tensor.device, f"values on the {value.device} are written to the {tensor.device}"
        if places:
            viewed = torch.ops.aten.index.Tensor(viewed, places)
        assert torch.broadcast_shapes(value.shape, viewed.shape) == viewed.shape

    def _read(self, tensor: Tensor, name: str) -> Any:
        if tensor.device.type == "cuda":
            assert name != "numpy", "numpy of a tensor on the device"
            self._asks(name)
        zeros = np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.").replace("bfloat16", "float32"))
        if name == "numpy":
            return zeros
        return zeros.tolist() if name == "tolist" else getattr(zeros.item(), name)() if name.startswith("__") else zeros.item()

    def _asks(self, name: str) -> None:
        assert not self.capturing, f"{name}: the host asks the device while a graph is recorded"
        self.note("read", name)

    def _moved(self, function: Any, name: str, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        like = next((a for a in args[1:] if isinstance(a, Tensor)), None)
        named = kwargs.get("device") or next((a for a in args[1:] if isinstance(a, (str, torch.device))), None)
        target = torch.device({"cpu": "cpu", "cuda": "cuda"}.get(name) or (like.device if like is not None else named) or tensor.device)
        dtype = kwargs.get("dtype") or next((a for a in args[1:] if isinstance(a, torch.dtype)), like.dtype if like is not None else tensor.dtype)
        if target.type == tensor.device.type:
            return tensor if dtype == tensor.dtype and not kwargs.get("copy") else torch.empty_like(tensor, dtype=dtype)
        made = torch.empty(tensor.shape, dtype=dtype, device=target)
        self._crossing(tensor, made, kwargs.get("non_blocking", False))
        return made

    def _crossing(self, source: Tensor, target: Tensor | None, non_blocking: bool) -> None:
        """A copy over the link: it waits unless it may run on and the host's memory is pinned."""
        up = source.device.type == "cpu"
        host = source if up else target
        pinned = host is not None and id(host.untyped_storage()) in self._pinned
        waits = not (non_blocking and pinned)
        assert not (self.capturing and waits), "a copy that waits while a graph is recorded"
        self.note("copy", Copied(up, waits, source.nbytes))


def basic(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Indexing in two steps, as torch does it behind a guard that needs a real device: a view, and what is left for tensors."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [p for p in parts if not isinstance(p, Tensor)]:
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        missing = tensor.dim() - sum(p is not None and p is not Ellipsis for p in parts)
        parts[at : at + 1] = [slice(None)] * missing
    places: list[Tensor | None] = []
    for part in parts:
        if isinstance(part, (list, np.ndarray)):
            part = torch.zeros(len(part), dtype=torch.int64, device=tensor.device)
        if isinstance(part, Tensor):
            mask = part.dtype == torch.bool
            places += [torch.zeros(1, dtype=torch.int64, device=part.device)] * part.dim() if mask else [part]
        elif part is None:
            tensor, places = tensor.unsqueeze(len(places)), [*places, None]
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, len(places), part.start, part.stop, part.step or 1)
            places.append(None)
        else:
            tensor = tensor.select(len(places), int(part))
    return tensor, places if any(p is not None for p in places) else []


@contextlib.contextmanager
def pretend_gpu(capability: Capability, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    """While it lasts, torch and llmlab see one CUDA device of this capability."""
    from triton.runtime.jit import JITFunction

    from llmlab.execution import device_line, hybrid, offload
    from llmlab.kernels.dispatch import TorchKernels
    from llmlab.models.weights import RandomWeights, weight_shapes

    gpu = PretendGpu(capability)
    major, minor = divmod(capability.sm, 10)
    properties = SimpleNamespace(name=capability.name, major=major, minor=minor, multi_processor_count=capability.units,
                                 total_memory=gpu.total)  # fmt: skip

    def launch(self: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        arguments = dict(zip(self.arg_names, values, strict=False)) | named
        for name, value in arguments.items():
            assert not isinstance(value, Tensor) or value.device.type == "cuda", f"{self.__name__}: {name} lies on the {value.device}"
        assert all(isinstance(n, int) and n > 0 for n in grid), f"{self.__name__}: a grid of {grid}"
        gpu.note("launch", Launch(self, arguments, options, gpu.capturing))

    def weights(self: Any, name: str) -> Tensor:
        return torch.empty(weight_shapes_of[name], dtype=self._dtype, device=self._device)

    weight_shapes_of: dict[str, tuple[int, ...]] = {}
    made = RandomWeights.__init__

    def remember(self: Any, shape: Any, *rest: Any, **named: Any) -> None:
        weight_shapes_of.update(weight_shapes(shape))
        made(self, shape, *rest, **named)

    monkeypatch.setattr(RandomWeights, "__init__", remember)
    monkeypatch.setattr(RandomWeights, "__getitem__", weights)
    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: gpu.note("record stream", stream.name))
    monkeypatch.setattr(hybrid, "HostWorker", lambda context: InTurn())
    monkeypatch.setattr(device_line, "answers", lambda device: True)
    monkeypatch.setattr(offload, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(hybrid, "host_kernels", lambda *both: TorchKernels())
    monkeypatch.setenv("LLMLAB_KERNELS", "torch")  # of what computes on the host: the compiled kernels look at addresses
    faked = {
        "is_available": lambda: True, "current_stream": lambda device=None: gpu.current, "Stream": gpu.new_stream,
        "default_stream": lambda device=None: gpu.main,
        "Event": lambda enable_timing=False: Event(gpu), "CUDAGraph": lambda: Graph(gpu), "graph": gpu.record, "stream": gpu.on,
        "mem_get_info": lambda device=None: (gpu.free, gpu.total), "memory_reserved": lambda device=None: gpu.reserved,
        "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: capability.name,
        "synchronize": lambda device=None: gpu.note("wait", "device"), "empty_cache": lambda: setattr(gpu, "reserved", 0),
    }  # fmt: skip
    for name, value in faked.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *device: None)  # a torch that is built for CUDA looks for a driver
    with FakeTensorMode(allow_non_fake_inputs=True), gpu:
        yield gpu
