"""Weights on the host for real: experts that come to the device when the placement policy says so, or are computed on the
CPU beside it; and dense layers that pass through a window.

    host memory or disk (every expert) --copying thread--> [ slot | slot | ... ] on the device
            \\------------------------- CPU worker: the expert's tokens, on the host's weights

The same kernels, packed the same way, run on either side, and a token's experts are summed in the order of their numbers:
whatever the policy does, the result is the same to the last bit (`defer` excepted, which changes the model). On a machine
without a GPU device and host are two regions of one memory: copies, threads and exactness are real, speed proves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import msgspec
import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.dispatch import Kernels, LinearImpl
from llmlab.memory.weight_store import Fetch, WeightStore
from llmlab.models.transformer import Layer, MoEMLP, Transformer
from llmlab.scheduling.expert_calls import ExpertCalls, told
from llmlab.scheduling.seamcalls import Seam
from llmlab.seams import ExpertId, ExpertUse, Key, RoutingView, UnitView, WeightPlacement
from llmlab.types import ConfigError, ExpertDispatch, StepResult, WeightMove

SAMPLES = (1, 16)  # tokens at which an expert's arithmetic is timed


class Packed(NamedTuple):
    """One gated MLP, ready to run."""

    gate_up: LinearImpl
    down: LinearImpl
    kernels: Kernels

    def __call__(self, x: Tensor, act: str) -> Tensor:
        """[n, d] -> [n, d]"""
        return self.down(self.kernels.gated_mlp(x, self.gate_up, act))


class HostExperts:
    """All experts in host memory, [E, 2F, d] and [E, d, F] a layer; pinned where a GPU will read them.

    Those that were computed on the CPU once stay packed for it, which takes their memory a second time.
    """

    def __init__(self, device_kernels: Kernels, cpu_kernels: Kernels, device: torch.device | str) -> None:
        self._weights: list[tuple[Tensor, Tensor]] = []
        self._device, self._device_kernels, self._cpu_kernels = torch.device(device), device_kernels, cpu_kernels
        self._packed: dict[ExpertId, Packed] = {}
        stream: Any = torch.cuda.Stream
        self._copies: Any = stream(self._device) if self._device.type == "cuda" else None

    def add_layer(self, gate_up: Tensor, down: Tensor) -> int:
        """Take over a layer's weights; its number."""
        pin = self._device.type == "cuda"
        kept = [w.detach().to("cpu") for w in (gate_up, down)]
        self._weights.append((kept[0].pin_memory(), kept[1].pin_memory()) if pin else (kept[0], kept[1]))
        return len(self._weights) - 1

    @property
    def num_experts(self) -> int:
        return int(self._weights[0][0].shape[0])

    @property
    def num_layers(self) -> int:
        return len(self._weights)

    def num_bytes(self, unit: ExpertId) -> int:
        return sum(w[unit.expert].nbytes for w in self._weights[unit.layer])

    def to_device(self, unit: ExpertId) -> Packed:
        """A copy on the device, packed for its kernels."""
        gate_up, down = self._copied([w[unit.expert] for w in self._weights[unit.layer]])
        return Packed(self._device_kernels.linear(gate_up), self._device_kernels.linear(down), self._device_kernels)

    def _copied(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Copies that are there, made beside the device's main queue. Their memory belongs to the queue of copies, so it is
        told who else reads it: else the next copy might be written over weights that are still multiplied with."""
        if self._copies is None:
            return [w.to(self._device, copy=True) for w in weights]
        with torch.cuda.stream(self._copies):
            copied = [w.to(self._device, non_blocking=True) for w in weights]
            self._copies.synchronize()
        for w in copied:
            w.record_stream(torch.cuda.default_stream(self._device))
        return copied

    def on_cpu(self, unit: ExpertId) -> Packed:
        """The host's own weights, packed for the CPU's kernels."""
        found = self._packed.get(unit)
        if found is None:
            gate_up, down = (w[unit.expert] for w in self._weights[unit.layer])
            found = self._packed[unit] = Packed(self._cpu_kernels.linear(gate_up), self._cpu_kernels.linear(down), self._cpu_kernels)
        return found


class CopyingThread:
    """A `Mover`: copies in the order in which they were asked for, beside everything else."""

    def __init__(self, source: Callable[[ExpertId], Any], num_bytes: Callable[[ExpertId], int]) -> None:
        self.moves: list[WeightMove] = []
        self._source, self._num_bytes = source, num_bytes
        self._thread = ThreadPoolExecutor(1, "llmlab-copies")

    def fetch(self, fetch: Fetch, after: Future[Any] | None) -> Future[Any]:
        return self._thread.submit(self._copy, fetch, after)

    def _copy(self, fetch: Fetch, after: Future[Any] | None) -> Any:
        if after is not None:
            after.result()
        began, unit = time.perf_counter(), fetch.unit
        found = self._source(unit)
        self.moves.append(WeightMove(unit.layer, unit.expert, fetch.reason, self._num_bytes(unit), time.perf_counter() - began,
                                     fetch.evicted, fetch.unused))  # fmt: skip
        return found

    def take_moves(self) -> tuple[WeightMove, ...]:
        taken, self.moves = tuple(self.moves), []
        return taken

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class TimedCosts:
    """`seams.ExpertCosts` measured here, once, on the first expert: a copy, and the arithmetic at two sizes on each side."""

    def __init__(self, host: HostExperts, hidden_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        unit, x = ExpertId(0, 0), torch.randn(max(SAMPLES), hidden_size).to(dtype)
        self.fetch = _fastest(lambda: host.to_device(unit))
        there, here = host.to_device(unit), host.on_cpu(unit)
        on_device = x.to(device)
        self._device = [_fastest(lambda n=n: there(on_device[:n], "silu")) for n in SAMPLES]  # type: ignore[misc]
        self._cpu = [_fastest(lambda n=n: here(x[:n], "silu").to(device)) for n in SAMPLES]  # type: ignore[misc]

    def device(self, num_tokens: int) -> float:
        return _line(self._device, num_tokens)

    def cpu(self, num_tokens: int) -> float:
        return _line(self._cpu, num_tokens)


def _fastest(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _line(seconds: Sequence[float], num_tokens: int) -> float:
    """The line through both samples, never below the first."""
    slope = max(0.0, (seconds[1] - seconds[0]) / (SAMPLES[1] - SAMPLES[0]))
    return seconds[0] + slope * max(0, num_tokens - SAMPLES[0])


class Deferred(NamedTuple):
    """Results of a layer's experts that are added one layer later: of which tokens, with which gate weights."""

    token: Tensor
    weight: Tensor
    result: Future[Tensor]


class ExpertOffload:
    """The experts of a whole model under a placement policy. One thread runs layers; copies and CPU work have their own.

    Build it before the model, let the model's kernels hand their experts over (`kernels`), then `start`.
    """

    def __init__(self, device_kernels: Kernels, cpu_kernels: Kernels, device: torch.device | str) -> None:
        self.host = HostExperts(device_kernels, cpu_kernels, device)
        self.copies = CopyingThread(self.host.to_device, self.host.num_bytes)
        self.kernels = cast(Kernels, OffloadKernels(device_kernels, self))
        self._worker = ThreadPoolExecutor(1, "llmlab-cpu-experts")
        self._device = torch.device(device)
        self._dispatches: list[ExpertDispatch] = []
        self._deferred: list[Deferred] = []

    def start(self, model: Transformer, seam: Seam[WeightPlacement], num_slots: int,
              popularity: Sequence[Sequence[float]] | None = None) -> None:  # fmt: skip
        """Load what the policy wants there at first. `num_slots`: experts that fit on the device.
        `popularity[layer][expert]`: all alike if nobody measured it. Raises ConfigError if the model has no experts."""
        host = self.host
        if not host.num_layers:
            raise ConfigError("weights", seam.policy_name, "this model has no experts to place", "Leave it at 'resident'.")
        self.store: WeightStore[Future[Packed]] = WeightStore(num_slots, self.copies)
        costs = TimedCosts(host, model.shape.hidden_size, model.dtype, self._device)
        self._routers = [layer.mlp.router for layer in model.layers if isinstance(layer.mlp, MoEMLP)]
        self._calls = ExpertCalls(seam, costs, host.num_layers, host.num_experts, self.store)
        self._calls.load(popularity or [[1.0] * host.num_experts] * host.num_layers)
        self.copies.take_moves()

    def close(self) -> None:
        self.copies.close()
        self._worker.shutdown(cancel_futures=True)

    def told(self, result: StepResult) -> StepResult:
        """The result, with where its experts were computed and what was copied since the last one."""
        taken, self._dispatches = tuple(self._dispatches), []
        return msgspec.structs.replace(result, experts=taken, weight_moves=self.copies.take_moves())

    # ---------------------------------------------------------------------------------- one layer
    def run(self, layer: int, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str) -> Tensor:
        """`reference.moe` of a layer's experts, x [T, d] -> [T, d], wherever they are."""
        weights, experts = reference.route(router_logits, top_k, renormalize)
        if layer == 0:  # a step that failed in the middle must not hold on to anything
            self._deferred = []
            self.store.unpin()
        view = self._calls.look(layer, _uses(weights, experts), self._guess(layer, x, top_k))
        chosen = self._calls.place(view)
        token_of = {use.expert: torch.where(experts == use.expert) for use in view.uses}
        on_cpu = {e: self._submit(layer, e, x[token_of[e][0]], act) for e in token_of if chosen[e] in ("cpu", "defer")}
        here = self._on_device(view, [e for e in token_of if e not in on_cpu], chosen, x, token_of, act)
        y = self._settle(x)
        for expert, (token, choice) in token_of.items():
            weight = weights[token, choice, None]
            if chosen[expert] == "defer":
                self._deferred.append(Deferred(token, weight, on_cpu[expert]))
            else:
                out = here[expert] if expert in here else on_cpu[expert].result().to(x.device)
                y.index_add_(0, token, out.float() * weight)
        self._dispatches.append(told(layer, chosen))
        return y.to(x.dtype)

    def _guess(self, layer: int, x: Tensor, top_k: int) -> tuple[ExpertUse, ...]:
        if layer + 1 >= len(self._routers):
            return ()
        return _uses(*reference.route(self._routers[layer + 1](x), top_k, True))

    def _submit(self, layer: int, expert: int, x: Tensor, act: str) -> Future[Tensor]:
        return self._worker.submit(self._compute_on_cpu, ExpertId(layer, expert), x.to("cpu"), act)

    def _compute_on_cpu(self, unit: ExpertId, x: Tensor, act: str) -> Tensor:
        with torch.inference_mode():
            return self.host.on_cpu(unit)(x, act)

    def _on_device(self, view: RoutingView, wanted: Sequence[int], chosen: Mapping[int, str], x: Tensor,
                   token_of: Mapping[int, tuple[Tensor, ...]], act: str) -> dict[int, Tensor]:  # fmt: skip
        """Ask for all that is missing, as far as there is room; compute what is there meanwhile; then what arrives."""
        units = {expert: ExpertId(view.layer, expert) for expert in wanted}
        there = [expert for expert in wanted if units[expert] in self.store]
        for expert in there:
            self.store.pin(units[expert])
        out: dict[int, Tensor] = {}
        waiting: list[int] = []
        for expert in [expert for expert in wanted if expert not in there]:
            while self._calls.bring(units[expert], "demand", view) is None:
                done = there.pop() if there else waiting.pop(0)  # all slots are in use: finish one of them
                out[done] = self._finish(units[done], x[token_of[done][0]], act, chosen[done] == "stream")
            self.store.pin(units[expert])
            waiting.append(expert)
        for unit in self._calls.prefetch(view):
            self._calls.bring(unit, "prefetch", view)
        for expert in [*there, *waiting]:
            out[expert] = self._finish(units[expert], x[token_of[expert][0]], act, chosen[expert] == "stream")
        return out

    def _finish(self, unit: ExpertId, x: Tensor, act: str, passing: bool) -> Tensor:
        """Compute with a pinned unit, and let go of it. A copy that failed is made up for on the CPU."""
        try:
            out = self.store.slot(unit).ticket.result()(x, act)
        except (RuntimeError, OSError, MemoryError):
            passing, out = True, self._compute_on_cpu(unit, x.to("cpu"), act).to(x.device)
        self.store.release(unit)
        if passing:
            self.store.drop(unit)
        return out

    def _settle(self, x: Tensor) -> Tensor:
        """A layer's sum, beginning with what the layer before put off."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for late in self._deferred:
            y.index_add_(0, late.token, late.result.result().to(x.device).float() * late.weight)
        self._deferred = []
        return y


def _uses(weights: Tensor, experts: Tensor) -> tuple[ExpertUse, ...]:
    found = []
    for expert in sorted(set(experts.flatten().tolist())):
        mine = experts == expert
        found.append(ExpertUse(expert, int(mine.sum()), float(weights[mine].sum())))
    return tuple(found)


class OffloadedExperts:
    """`kernels.dispatch.ExpertsImpl` of one layer of an offloaded model."""

    def __init__(self, offload: ExpertOffload, layer: int) -> None:
        self._offload, self._layer = offload, layer

    def __call__(self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu") -> Tensor:
        return self._offload.run(self._layer, x, router_logits, top_k, renormalize, act)


class OffloadKernels:
    """A kernel set whose experts stay on the host; all else is that of `base`."""

    def __init__(self, base: Kernels, offload: ExpertOffload) -> None:
        self._base, self._offload = base, offload

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def experts(self, w_gate_up: Tensor, w_down: Tensor) -> OffloadedExperts:
        return OffloadedExperts(self._offload, self._offload.host.add_layer(w_gate_up, w_down))


class LayerWindow(Sequence[Layer]):
    """A model's layers, of which only `size` are in memory: the one in use and those that come next.

    `load(index)` makes a layer from disk or host memory; a thread calls it ahead of time. Layers are asked for in turn, and
    after the last comes the first.
    """

    def __init__(self, num_layers: int, size: int, load: Callable[[int], Layer]) -> None:
        self._num_layers, self._size = num_layers, min(size, num_layers)
        self.copies = CopyingThread(lambda unit: load(unit.layer), lambda unit: 0)
        self.store: WeightStore[Future[Layer]] = WeightStore(self._size, self.copies)
        self._current: ExpertId | None = None

    def __len__(self) -> int:
        return self._num_layers

    def __iter__(self) -> Iterator[Layer]:
        return (self[index] for index in range(self._num_layers))

    def __getitem__(self, index: Any) -> Any:
        unit = ExpertId(range(self._num_layers)[index], 0)
        if unit != self._current:
            if self._current is not None:
                self.store.release(self._current)
            self.store.bring(unit, "demand", self._score(unit.layer))
            self.store.pin(unit)
            self._current = unit
            for ahead in range(1, self._size):
                self.store.bring(ExpertId((unit.layer + ahead) % self._num_layers, 0), "prefetch", self._score(unit.layer))
        return self.store.slot(unit).ticket.result()

    def _score(self, current: int) -> Callable[[UnitView, ExpertId], Key]:
        """The layer that comes round last leaves."""
        return lambda view, incoming: -((view.unit.layer - current) % self._num_layers)
