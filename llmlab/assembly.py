"""Putting an engine together from its configuration: model, executor, memory, policies, log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

from llmlab.backends import (
    Backend,
    ModelFacts,
    card_of,
    default_num_blocks,
    default_num_host_blocks,
    num_slots,
    sim_backend,
    torch_backend,
)
from llmlab.clock import Clock, RealClock, VirtualClock
from llmlab.config import EngineConfig
from llmlab.decoding.draft_sizes import DraftSizes, described
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog, Sink
from llmlab.events.metrics import LiveMetrics
from llmlab.events.tracefile import TraceWriter
from llmlab.execution.base import Executor
from llmlab.executors import Redraft, build_executor, check_offload
from llmlab.kernels.capability import chosen_line
from llmlab.kernels.variants import parse_kernels
from llmlab.plugins import REGISTRIES, build_scheduler, seam_of
from llmlab.scheduling.placement import PLACEMENTS
from llmlab.scheduling.scheduler import Scheduler
from llmlab.seams import Limits
from llmlab.speculating import Simulated
from llmlab.types import ConfigError
from roofline.precision import Precision

KEPT_REQUESTS = 10_000  # that have ended, whose metrics stay one by one; older ones are added up


class Assembly(NamedTuple):
    """The parts of one engine, wired. `redraft`: the drafting side of another configuration, raises ConfigError or
    ModelError."""

    scheduler: Scheduler
    executor: Executor
    clock: Clock
    log: EventLog
    tokenizer: Any
    metrics: LiveMetrics
    model: ModelFacts
    limits: Limits
    redraft: Callable[[EngineConfig], Redraft]


def assemble(config: EngineConfig) -> Assembly:
    """All parts of an engine. Raises ConfigError or ModelError."""
    for seam, registry in REGISTRIES.items():
        registry.resolve(getattr(config, seam))  # names are checked before a model is loaded
    parse_kernels(config.kernels)
    check_offload(config)
    _check_host(config)
    clock: Clock = RealClock() if config.executor == "torch" else VirtualClock()
    backend = torch_backend(config) if config.executor == "torch" else sim_backend(config)
    num_blocks = config.num_blocks or default_num_blocks(config, backend)
    num_host_blocks = config.num_host_blocks
    if num_host_blocks is None:
        num_host_blocks = default_num_host_blocks(config, backend, num_blocks)
    limits = _limits(config, backend.model, num_blocks)
    metrics = LiveMetrics(KEPT_REQUESTS)
    log = _log(config, clock, metrics)
    if backend.offload is not None and backend.loaded is not None:
        backend.offload.start(backend.loaded.model, seam_of(config, log, "weights"), num_slots(config, backend.model.shape))
    executor, redraft = build_executor(config, backend, clock, log, num_blocks, num_host_blocks)
    drafting = redraft(config)
    executor.draft_with(drafting.side)
    drafts = drafting.sizes
    scheduler = build_scheduler(config, backend.cost, limits, log, num_blocks, num_host_blocks, drafts)
    effective = {**config.describe(), "num_blocks": num_blocks, "num_host_blocks": num_host_blocks,
                 "max_model_len": limits.max_model_len}  # fmt: skip
    _announce(log, config, backend, executor, effective, drafts)
    return Assembly(scheduler, executor, clock, log, backend.tokenizer, metrics, backend.model, limits, redraft)


def _announce(log: EventLog, config: EngineConfig, backend: Backend, executor: Executor, effective: dict[str, Any],
              drafts: DraftSizes | None) -> None:  # fmt: skip
    from llmlab import __version__

    model, device = backend.model, backend.hardware
    linear, devices = Precision.parse(backend.precision).linear_format, config.tensor_parallel_size
    log.emit(
        ev.RunStarted, mode=executor.mode, config=effective, code=__version__, seed=config.seed, level=config.log_level,
        hardware={"name": device.name, "bandwidth": devices * device.bandwidth, "peak": devices * device.peak_of(linear),
                  **({"devices": devices} if devices > 1 else {}), "threads_why": backend.threads_why,
                  **_chosen(config, backend, effective["num_blocks"]), **executor.describe()},
        model={"name": model.name, "vocab_size": model.vocab_size, "eos_token_ids": list(model.eos_token_ids),
               "kv_bytes_per_token": backend.bytes_per_token, "precision": backend.precision,
               "shape": asdict(model.shape), **({"draft": described(drafts)} if drafts is not None else {}),
               **({"acceptance": list(config.speculation.acceptance)} if isinstance(config.speculation, Simulated) else {})},
    )  # fmt: skip


def _chosen(config: EngineConfig, backend: Backend, num_blocks: int) -> dict[str, str]:
    """The line that says what a GPU got; nothing for a CPU and for simulations."""
    card = card_of(backend.loaded) if backend.loaded is not None else None
    if card is None or backend.loaded is None:
        return {}
    dtype = str(backend.loaded.dtype).removeprefix("torch.")
    table = backend.loaded.model.kernels.describe()
    return {"chosen": chosen_line(card, table, dtype, config.quantization or "", num_blocks * config.block_size)}


def _log(config: EngineConfig, clock: Clock, metrics: LiveMetrics) -> EventLog:
    sinks: list[Sink] = [metrics]
    if config.trace is not None:
        sinks.append(TraceWriter(config.trace))
    return EventLog(clock, config.log_level, config.log_capacity, sinks=tuple(sinks))


def _limits(config: EngineConfig, model: ModelFacts, num_blocks: int) -> Limits:
    """The longest request is bounded by the model, the configuration and the whole pool."""
    if config.max_model_len is not None and config.max_model_len > model.max_model_len:
        raise ConfigError("max_model_len", config.max_model_len, f"{model.name} was made for {model.max_model_len} tokens",
                          f"Choose at most {model.max_model_len}, or leave it out.")  # fmt: skip
    longest = min(config.max_model_len or model.max_model_len, num_blocks * config.block_size)
    return Limits(config.max_num_seqs, config.max_num_batched_tokens, longest)


def _check_host(config: EngineConfig) -> None:
    """Placements of ours that keep KV on the host need room there; one's own may ask for what it likes, and is told. Raises
    ConfigError."""
    if config.num_host_blocks == 0 and isinstance(config.placement, str) and hasattr(PLACEMENTS.resolve(config.placement), "home"):
        raise ConfigError("num_host_blocks", 0, f"placement={config.placement!r} keeps KV in host memory, and it gets none",
                          "Give it blocks, or choose placement='gpu_only'.")  # fmt: skip
