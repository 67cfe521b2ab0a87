"""The executor of a configuration, with its drafting side, and its successor where a device is lost."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.backends import Backend, free_host_bytes, host_cpu, load, num_slots
from llmlab.clock import Clock
from llmlab.config import EngineConfig
from llmlab.decoding.draft_sizes import DraftSizes
from llmlab.decoding.drafts import DraftSetup
from llmlab.events.log import EventLog
from llmlab.execution.base import Executor
from llmlab.execution.cost import DEFAULT_HOST, RooflineCost, wall_cost
from llmlab.execution.drafting import Drafter
from llmlab.execution.expert_timeline import RooflineExperts
from llmlab.execution.pool_plan import no_room_for_kv
from llmlab.execution.sim_executor import PseudoTokens, SimDrafting, SimExecutor, TokenSource
from llmlab.execution.sim_offload import ExpertSimExecutor, host_of, routing_for
from llmlab.plugins import seam_of
from llmlab.speculating import price_of, real_speculation, simulated_speculation, source_name
from llmlab.types import ConfigError
from llmlab.workloads.routing import load_routing
from roofline import hardware as hw

if TYPE_CHECKING:
    from llmlab.execution.device_line import DeviceLine
    from llmlab.execution.stream_executor import Anew
    from llmlab.execution.torch_executor import KVCache
    from llmlab.models.loader import LoadedModel

class Redraft(NamedTuple):
    """Another drafting side for an engine that exists: what its executor takes (`Executor.draft_with`), and the sizes that
    the price of its drafts depends on."""

    side: Any
    sizes: DraftSizes | None = None


def build_executor(config: EngineConfig, backend: Backend, clock: Clock, log: EventLog, num_blocks: int, num_host_blocks: int
              ) -> tuple[Executor, Callable[[EngineConfig], Redraft]]:  # fmt: skip
    """An executor that drafts nothing yet, and what makes a drafting side for it."""
    setup = DraftSetup(backend.model.vocab_size, num_blocks, config.block_size, config.seed, backend.loaded)
    if backend.loaded is None:
        tokens = PseudoTokens(setup.vocab_size, config.seed)
        cost = wall_cost(backend.cost, config.overlap_depth)
        described = {"device": backend.hardware.name}
        if config.weights != "resident":
            return expert_simulation(config, backend.cost, cost, tokens, clock, log), partial(_sim_drafting, backend, setup, tokens)
        return SimExecutor(cost, tokens, clock, described, config.block_size,
                           detailed=config.log_level >= 4), partial(_sim_drafting, backend, setup, tokens)  # fmt: skip
    import torch

    from llmlab.execution.torch_executor import TorchExecutor

    line = device_line(backend.loaded) if _all_on_device(config, backend) else None
    try:
        cache = _kv_cache(config, backend.loaded, num_blocks, num_host_blocks, line)
    except (torch.OutOfMemoryError, MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise no_room_for_kv(num_blocks, backend.bytes_per_token * config.block_size, _free_bytes(backend.loaded)) from None
    setup = setup._replace(kv_layers=cache.layers)
    if line is not None:
        from llmlab.execution.stream_executor import StreamExecutor

        length = min(config.max_model_len or backend.model.max_model_len, num_blocks * config.block_size)
        return StreamExecutor(backend.loaded, cache, config.block_size, config.seed, line, config.max_num_seqs, length,
                              config.fixed_rows, lambda: anew(config, backend, num_blocks, num_host_blocks)), _never_drafting  # fmt: skip
    return TorchExecutor(backend.loaded, cache, config.block_size, config.seed, asynchronous=config.overlap_depth > 0,
                         offload=backend.offload, fixed_rows=config.fixed_rows), partial(_real_drafting, setup)  # fmt: skip


def _sim_drafting(backend: Backend, setup: DraftSetup, tokens: PseudoTokens, config: EngineConfig) -> Redraft:
    check_offload(config)
    speculation = simulated_speculation(config, _formed(setup, config), tokens)
    if speculation is None:
        return Redraft(None)
    price = price_of(backend.cost, speculation.sizes, config)
    return Redraft(SimDrafting(Drafter(speculation.source, setup.vocab_size), price), speculation.sizes)


def _real_drafting(setup: DraftSetup, config: EngineConfig) -> Redraft:
    check_offload(config)
    speculation = real_speculation(config, _formed(setup, config), config.kernels)
    if speculation is None:
        return Redraft(None)
    return Redraft(Drafter(speculation.source, setup.vocab_size, config.acceptance), speculation.sizes)


def _formed(setup: DraftSetup, config: EngineConfig) -> DraftSetup:
    """The setup with what the configuration says of the drafts' form."""
    return setup._replace(tree=config.branches, drawn=config.acceptance == "rejection")


def _never_drafting(config: EngineConfig) -> Redraft:
    """Steps that are queued on a device read their tokens there, before anybody could draft behind them."""
    if config.speculation is not None:
        raise ConfigError("speculation", source_name(config.speculation), "this engine's steps are queued on the device, and it "
                          "was started without drafts", "Start an engine with speculation=... and switch it there.")  # fmt: skip
    return Redraft(None)


def check_offload(config: EngineConfig) -> None:
    """What goes with experts on the host, and what does not yet. Raises ConfigError."""
    if config.weights == "resident":
        return
    for field, alone in (("placement", "device_only"), ("speculation", None)):
        if getattr(config, field) not in (alone, "gpu_only"):
            raise ConfigError(field, getattr(config, field), f"does not go with weights={config.describe()['weights']!r} yet",
                              f"Leave {field} at {alone!r}, or weights at 'resident'.")  # fmt: skip


def _all_on_device(config: EngineConfig, backend: Backend) -> bool:
    """Whether nothing of a step needs the host: no drafts to judge, no tokens to take back, no experts or attention on
    the CPU. Steps that do are synchronous."""
    usual = config.speculation is None and config.decoding == "autoregressive" and config.placement == "device_only"
    return usual and backend.offload is None


def _kv_cache(config: EngineConfig, loaded: LoadedModel, num_blocks: int, num_host_blocks: int, line: DeviceLine | None) -> KVCache:
    from llmlab.execution.torch_executor import KVCache

    if line is None:
        return KVCache(loaded, num_blocks, num_host_blocks, config.block_size)
    from llmlab.execution.stream_executor import StreamCache

    return StreamCache(loaded, num_blocks, num_host_blocks, config.block_size, line)


def device_line(loaded: LoadedModel) -> DeviceLine | None:
    """The queue of a model's device, if it has one of its own."""
    if loaded.device.type != "cuda":
        return None
    from llmlab.execution.device_line import CudaLine

    return CudaLine(loaded.device)


def _free_bytes(loaded: LoadedModel) -> float:
    """Memory that nobody holds, where a model lies."""
    import torch

    if loaded.device.type == "cuda":
        return float(torch.cuda.mem_get_info(loaded.device)[0])
    return free_host_bytes()


def anew(config: EngineConfig, backend: Backend, num_blocks: int, num_host_blocks: int) -> Anew | None:
    """A lost device's model and KV once more: there, if it answers again, or on the CPU, if that was asked for."""
    import torch

    from llmlab.execution.device_line import HostLine, answers
    from llmlab.execution.stream_executor import Anew, StreamCache
    from llmlab.kernels.dispatch import make_kernels

    assert backend.loaded is not None
    own = str(backend.loaded.device)
    place = next((name for name in (own, *(("cpu",) if config.on_device_loss == "cpu" else ())) if answers(name)), None)
    if place is None:
        return None
    dtype = str(backend.loaded.dtype).removeprefix("torch.")
    try:
        kernels = make_kernels(config.kernels if place == own else "auto", place, getattr(torch, dtype))
        loaded = load(config, dtype, place, kernels)
        line = device_line(loaded) or HostLine(place)
        return Anew(loaded, StreamCache(loaded, num_blocks, num_host_blocks, config.block_size, line), line)
    except Exception as error:  # no memory, or the device went again: the requests learn of the loss itself
        logging.getLogger("llmlab").warning("%s was lost and could not be replaced by %s: %s", own, place, error)
        return None


def expert_simulation(config: EngineConfig, plain: RooflineCost, cost: Any, tokens: TokenSource, clock: Clock, log: EventLog
                      ) -> ExpertSimExecutor:  # fmt: skip
    """The simulated executor of a mixture that does not fit; `plain` knows shape and device, `cost` prices whole steps."""
    from roofline.cost import CostModel as Roofline

    model = Roofline(plain.shape, plain.hardware, plain.dtype)
    trace = routing_for(load_routing(config.routing), model)
    host = host_cpu(config) or hw.get(DEFAULT_HOST)
    if isinstance(host, str):
        raise ConfigError("host", host, "is a speed of attention; experts need to know the CPU", "Name it, such as 'xeon-6130-2s'.")
    price = RooflineExperts(model, host_of(host))
    described = {"device": plain.hardware.name, "routing": trace.model}
    return ExpertSimExecutor(cost, tokens, clock, described, config.block_size, price=price, trace=trace,
                             seam=seam_of(config, log, "weights"), num_slots=num_slots(config, plain.shape))  # fmt: skip
