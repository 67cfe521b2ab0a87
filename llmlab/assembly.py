"""Putting an engine together from its configuration: model, executor, memory, policies, log."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from llmlab.clock import Clock, RealClock, VirtualClock
from llmlab.config import DRAFT_FIELDS, EngineConfig
from llmlab.decoding.autoregressive import TokenStop
from llmlab.decoding.draft_lengths import DRAFT_POLICIES
from llmlab.decoding.drafts import DraftSetup
from llmlab.decoding.methods import DECODING_METHODS
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog, Sink
from llmlab.events.metrics import LiveMetrics
from llmlab.events.tracefile import TraceWriter
from llmlab.execution.base import Executor
from llmlab.execution.cost import (
    DEFAULT_HOST,
    RooflineCost,
    WithDrafts,
    find_profile,
    host_share,
    is_profile,
    machine_here,
    wall_cost,
    warn_if_foreign,
)
from llmlab.execution.drafting import Drafter
from llmlab.execution.expert_timeline import RooflineExperts
from llmlab.execution.pool_plan import (
    GRAPH_BYTES,
    Memory,
    budget_bytes,
    kv_blocks,
    no_room,
    no_room_for_kv,
    out_of_memory,
)
from llmlab.execution.sim_executor import PseudoTokens, SimDrafting, SimExecutor, TokenSource
from llmlab.execution.sim_offload import ExpertSimExecutor, host_of, routing_for
from llmlab.execution.tensor_parallel import SIZES, check_group, divides, group_kv_bytes, group_weight_bytes
from llmlab.kernels.capability import OLDEST, Capability, check_dtype, chosen_line, default_dtype
from llmlab.kernels.quant_spec import parse_quantization
from llmlab.memory.eviction import EVICTIONS, LRU
from llmlab.memory.kv_manager import KVManager
from llmlab.memory.tiers import TIERINGS
from llmlab.registry import Registry
from llmlab.scheduling.admission import ADMISSIONS
from llmlab.scheduling.composers import COMPOSERS
from llmlab.scheduling.core import Drafting, Policies
from llmlab.scheduling.ordering import ORDERINGS
from llmlab.scheduling.placement import PLACEMENTS
from llmlab.scheduling.preemption import VICTIMS
from llmlab.scheduling.scheduler import Scheduler
from llmlab.scheduling.seamcalls import Seam, checked_key, unchecked
from llmlab.scheduling.weights import WEIGHT_PLACEMENTS
from llmlab.seams import BlockView, CostModel, Eviction, Limits
from llmlab.speculating import (
    Simulated,
    draft_cost_of,
    outlook_of,
    real_speculation,
    simulated_speculation,
    source_name,
)
from llmlab.types import ConfigError
from llmlab.workloads.routing import load_routing
from roofline import hardware as hw
from roofline import shapes
from roofline.errors import RooflineError
from roofline.memory import activation_bytes, weight_bytes
from roofline.precision import Precision

if TYPE_CHECKING:
    from llmlab.execution.device_line import DeviceLine
    from llmlab.execution.offload import ExpertOffload
    from llmlab.execution.stream_executor import Anew
    from llmlab.execution.torch_executor import KVCache
    from llmlab.models.loader import LoadedModel

REGISTRIES: dict[str, Registry[Any]] = {
    "ordering": ORDERINGS, "admission": ADMISSIONS, "composer": COMPOSERS, "victim": VICTIMS,
    "placement": PLACEMENTS, "eviction": EVICTIONS, "tiering": TIERINGS, "decoding": DECODING_METHODS,
    "weights": WEIGHT_PLACEMENTS, "draft_policy": DRAFT_POLICIES,
}  # fmt: skip
# The KV pool of a real engine, if nobody says how large: enough for the lab models, harmless for large ones.
DEFAULT_KV_BYTES = 512 << 20

KEPT_REQUESTS = 10_000  # that have ended, whose metrics stay one by one; older ones are added up


class ModelFacts(NamedTuple):
    """What the core must know of a model."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    shape: shapes.Shape


class Redraft(NamedTuple):
    """Another drafting side for an engine that exists: what its executor takes (`Executor.draft_with`), and the sizes of
    the draft model (None: it runs none)."""

    side: Any
    shape: shapes.Shape | None = None


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


class Backend(NamedTuple):
    """A model and the machine that it runs on, before any request."""

    model: ModelFacts
    cost: RooflineCost
    hardware: hw.Hardware
    tokenizer: Any
    loaded: LoadedModel | None
    threads_why: str
    bytes_per_token: float
    precision: str
    offload: ExpertOffload | None = None


def register(seam: str, name: str, factory: Any) -> None:
    """Make a plug-in known by name, for configurations and the command line. Registering again replaces it."""
    if seam not in REGISTRIES:
        from llmlab.types import unknown_name

        raise unknown_name("seam", seam, REGISTRIES)
    REGISTRIES[seam].register(name, factory)


def assemble(config: EngineConfig) -> Assembly:
    """All parts of an engine. Raises ConfigError or ModelError."""
    for seam, registry in REGISTRIES.items():
        registry.resolve(getattr(config, seam))  # names are checked before a model is loaded
    _check_offload(config)
    _check_host(config)
    clock: Clock = RealClock() if config.executor == "torch" else VirtualClock()
    backend = _torch_backend(config) if config.executor == "torch" else _sim_backend(config)
    num_blocks = config.num_blocks or _default_num_blocks(config, backend)
    num_host_blocks = num_blocks if config.num_host_blocks is None else config.num_host_blocks
    limits = _limits(config, backend.model, num_blocks)
    metrics = LiveMetrics(KEPT_REQUESTS)
    log = _log(config, clock, metrics)
    if backend.offload is not None and backend.loaded is not None:
        backend.offload.start(backend.loaded.model, _seam(config, log, "weights"), _num_slots(config, backend.model.shape))
    executor, redraft = _executor(config, backend, clock, log, num_blocks, num_host_blocks)
    drafting = redraft(config)
    executor.draft_with(drafting.side)
    drafts = drafting.shape
    scheduler = build_scheduler(config, backend.cost, limits, log, num_blocks, num_host_blocks, drafts)
    effective = {**config.describe(), "num_blocks": num_blocks, "num_host_blocks": num_host_blocks,
                 "max_model_len": limits.max_model_len}  # fmt: skip
    _announce(log, config, backend, executor, effective, drafts)
    return Assembly(scheduler, executor, clock, log, backend.tokenizer, metrics, backend.model, limits, redraft)


def build_scheduler(config: EngineConfig, cost: CostModel, limits: Limits, log: EventLog, num_blocks: int,
                    num_host_blocks: int, drafts: shapes.Shape | None = None) -> Scheduler:  # fmt: skip
    """A scheduler with its memory and policies; neither model nor executor is needed. `drafts`: sizes of a draft model."""
    memory = KVManager(num_blocks, num_host_blocks, config.block_size, config.enable_prefix_caching, log,
                       eviction_chooser(config, log))  # fmt: skip
    policies = policies_of(config, log, cost, drafts)
    return Scheduler(policies, memory, cost, log, limits, config.view_cap, config.num_alternatives,
                     lambda seam, choice: reseated(config, log, seam, choice, cost))  # fmt: skip


def _announce(log: EventLog, config: EngineConfig, backend: Backend, executor: Executor, effective: dict[str, Any],
              drafts: shapes.Shape | None) -> None:  # fmt: skip
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
               "shape": asdict(model.shape), **({"draft": asdict(drafts)} if drafts is not None else {}),
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


def card_of(loaded: LoadedModel) -> Capability | None:
    """The GPU that a model is on."""
    if loaded.device.type != "cuda":
        return None
    from llmlab.kernels.dispatch import device_capability

    return device_capability(loaded.device, 0)


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


def policies_of(config: EngineConfig, log: EventLog, cost: CostModel, drafts: shapes.Shape | None) -> Policies:
    """The guarded seams that a configuration asks for."""
    def seam(name: str) -> Seam[Any]:
        return _seam(config, log, name)

    drafting = _drafting(config, log, cost, drafts)
    return Policies(seam("ordering"), seam("admission"), seam("composer"), seam("victim"), seam("placement"),
                    seam("tiering"), seam("decoding"), TokenStop(), drafting)  # fmt: skip


def _drafting(config: EngineConfig, log: EventLog, cost: CostModel, drafts: shapes.Shape | None) -> Drafting | None:
    """Who decides on the number of drafts, if there are any."""
    if config.speculation is None:
        return None
    own = draft_cost_of(cost, drafts, config)
    plans = cost if own is None else WithDrafts(cost, own)
    return Drafting(_seam(config, log, "draft_policy"), outlook_of(cost, own, config), source_name(config.speculation), plans)


def _seam(config: EngineConfig, log: EventLog, name: str) -> Seam[Any]:
    """The guarded seam of one field; the default of EngineConfig decides where a plug-in fails. With drafts, the default
    of decoding is to verify them."""
    registry, default = REGISTRIES[name], getattr(EngineConfig(), name)
    choice = getattr(config, name)
    if name == "decoding" and config.speculation is not None:
        choice, default = "speculative" if choice == default else choice, "speculative"
    return Seam(name, registry.resolve(choice), registry.resolve(default), log, config.policy_timeout)


def reseated(config: EngineConfig, log: EventLog, seam: str, choice: Any, cost: CostModel) -> Any:
    """What a scheduler gets when a seam of its is to have another policy while it runs; `seam` may be "drafting", too."""
    if seam == "drafting":
        return _redrafted(config, log, cost, choice)
    changed = msgspec.structs.replace(config, **{seam: choice})
    return eviction_chooser(changed, log) if seam == "eviction" else _seam(changed, log, seam)


def _redrafted(config: EngineConfig, log: EventLog, cost: CostModel, changes: Mapping[str, Any]) -> Drafting | None:
    """Another drafting side: all of DRAFT_FIELDS, and as "draft" the sizes of the draft model, if there is one."""
    changed = msgspec.structs.replace(config, **{name: changes[name] for name in DRAFT_FIELDS if name in changes})
    return _drafting(changed, log, cost, shapes.Shape(**changes["draft"]) if "draft" in changes else None)


def eviction_chooser(config: EngineConfig, log: EventLog) -> Any:
    """Index of the block to evict among the given views; logged with its alternatives at level 3. None is what the pool
    does by itself, which is LRU: below level 3, where nobody reads the scores, nobody computes them."""
    if log.level < 3 and type(EVICTIONS.resolve(config.eviction)) is LRU:
        return None
    seam: Seam[Eviction] = Seam("eviction", EVICTIONS.resolve(config.eviction), EVICTIONS.resolve("lru"), log,
                                config.policy_timeout)  # fmt: skip

    def choose(blocks: Sequence[BlockView]) -> int:
        scores = seam.ask(lambda p: [checked_key(p.score(b)) for b in blocks], unchecked)
        best = min(range(len(blocks)), key=lambda i: (scores[i], i))
        if log.level >= 3:
            log.emit(ev.Decision, seam="eviction", policy=seam.policy_name, chosen=f"block {blocks[best].block_id}",
                     num_candidates=len(blocks), reason=f"smallest score {scores[best][0]:g}",
                     alternatives=tuple(ev.Alternative(f"block {b.block_id}", scores[i][0])
                                        for i, b in enumerate(blocks) if i != best)[: config.num_alternatives])  # fmt: skip
        return best

    return choose


# ----------------------------------------------------------------------------------------- backends
def _torch_backend(config: EngineConfig) -> Backend:
    if config.tensor_parallel_size > 1:
        raise ConfigError("tensor_parallel_size", config.tensor_parallel_size, "the torch executor runs on one device",
                          "Use executor='sim', or leave it out.")  # fmt: skip
    import torch

    from llmlab.execution.threads import choose_threads
    from llmlab.kernels.dispatch import make_kernels

    device = _device(config, torch)
    threads = choose_threads(config.num_threads)
    dtype = _dtype_for(config, device)
    kernels = make_kernels(config.kernels, device, _torch_dtype(torch, dtype), threads.num_threads)
    offload = _offload(config, kernels, device)
    loaded = _load(config, dtype, device, offload.kernels if offload else kernels)
    shape = roofline_shape(loaded)
    machine = _machine_of(config, device, torch)
    precision = _precision(loaded, machine, config)
    if is_profile(machine.name):
        here = machine_here(torch.get_num_threads(), "cpu" if device == "cpu" else torch.cuda.get_device_name())
        warn_if_foreign(find_profile(machine.name), shape, here)
    facts = ModelFacts(loaded.name, shape.vocab_size, loaded.max_model_len, loaded.eos_token_ids, shape)
    tokenizer = loaded.tokenizer if hasattr(loaded.tokenizer, "vocab_size") else None
    cost = RooflineCost(shape, machine.name, config.block_size, precision, _host(config), config.attention_plan)
    return Backend(facts, cost, machine, tokenizer, loaded, threads.why, shape.kv_bytes_per_token(precision), precision, offload)


def _offload(config: EngineConfig, kernels: Any, device: str) -> ExpertOffload | None:
    """Who keeps a mixture's experts, if they are not to be on the device all together."""
    if config.weights == "resident":
        return None
    if config.quantization is not None:
        raise ConfigError("quantization", config.quantization, "narrow experts cannot be offloaded yet", "Choose weights='resident'.")
    from llmlab.execution.offload import ExpertOffload
    from llmlab.kernels.dispatch import make_kernels

    return ExpertOffload(kernels, make_kernels(config.kernels if device == "cpu" else "auto"), device)


def _hold(config: EngineConfig) -> Any:
    """Who keeps a model's layers: everybody's memory, or a window that slides over them."""
    from llmlab.execution.offload import LayerWindow
    from llmlab.models.transformer import held_in_memory

    if config.layer_window is None:
        return held_in_memory
    size = config.layer_window
    return lambda num_layers, make: LayerWindow(num_layers, size, make)


def _load(config: EngineConfig, dtype: str, device: str, kernels: Any) -> LoadedModel:
    """The model on its device; a device that is too small is answered with what would fit."""
    import torch

    from llmlab.models.loader import load_model, shape_of

    try:
        return load_model(config.model, dtype, device, kernels, config.random_weights, config.seed, config.max_model_len,
                          _hold(config), config.quantization)  # fmt: skip
    except torch.OutOfMemoryError:
        count, width = shape_of(config.model).num_parameters(), 4 if dtype == "float32" else 2
        free = float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) if device == "cuda" else 0.0
        raise out_of_memory(config.model, dtype, float(count * width), free, count * 0.6) from None


def _dtype_for(config: EngineConfig, device: str) -> str:
    """What "auto" means: float32 on a CPU, float16 on Turing, bfloat16 from Ampere on. Raises ConfigError."""
    if device == "cpu":
        return "float32" if config.dtype == "auto" else config.dtype
    from llmlab.kernels.dispatch import device_capability

    capability = device_capability(device, 0 if config.kernels == "torch" else OLDEST)
    dtype = default_dtype(capability) if config.dtype == "auto" else config.dtype
    check_dtype(capability, dtype)
    return dtype


def _machine_of(config: EngineConfig, device: str, torch: Any) -> hw.Hardware:
    """What costs are predicted for: what was asked for, else the device at hand if the table knows it, else an A10."""
    if config.hardware is not None or device == "cpu":
        return _hardware(config.hardware or "cpu-2core")
    try:
        return hw.get(torch.cuda.get_device_name())
    except RooflineError:
        return hw.get("a10")


def _precision(loaded: LoadedModel, machine: hw.Hardware, config: EngineConfig) -> str:
    """The cost model's name for the widths of a loaded model."""
    plain = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(loaded.dtype).removeprefix("torch.")]
    plain = plain if plain in machine.peak else machine.default_dtype
    return _narrowed(config, plain, machine.name)


def _narrowed(config: EngineConfig, plain: str, machine: str) -> str:
    """The width code of quantised weights beside activations of the plain format. Raises ConfigError."""
    if config.quantization is None:
        return plain
    spec = parse_quantization(config.quantization)
    if is_profile(machine):
        raise ConfigError("quantization", config.quantization, f"the profile {machine} was measured with wide weights",
                          "Name a device of the table as hardware.")  # fmt: skip
    return spec.precision(32 if plain == "fp32" else 16)


def _device(config: EngineConfig, torch: Any) -> str:
    if config.device == "cuda":
        from llmlab.kernels.dispatch import why_no_cuda

        reason = why_no_cuda()
        if reason is not None:
            raise ConfigError("device", "cuda", f"torch sees no CUDA device here: {reason}", "Use device='cpu' or executor='sim'.")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _torch_dtype(torch: Any, name: str) -> Any:
    return torch.float16 if name == "auto" else getattr(torch, name)


def roofline_shape(loaded: LoadedModel) -> shapes.Shape:
    """The sizes of a loaded model, as the cost models take them."""
    shape = loaded.shape
    return shapes.Shape(
        loaded.name, shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim,
        shape.intermediate_size, shape.vocab_size, tied=shape.tie_word_embeddings, qk_norm=shape.qk_norm,
        num_experts=shape.num_experts, top_k=shape.top_k, moe_intermediate_size=shape.moe_intermediate_size,
    )  # fmt: skip


def _sim_backend(config: EngineConfig) -> Backend:
    machine = _hardware(config.hardware or "t4")
    shape = _simulated_shape(config.model, machine.name)
    own = next(iter(machine.peak)) if is_profile(machine.name) else machine.default_dtype
    dtype = {"auto": own, "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[config.dtype]
    if is_profile(machine.name) and dtype != own:
        raise ConfigError("dtype", config.dtype, f"the profile {machine.name} was measured in {own}",
                          "Leave dtype out, or measure a profile in that format.")  # fmt: skip
    dtype = _narrowed(config, dtype, machine.name)
    check_group(config, shape, machine, is_profile(machine.name))
    devices = config.tensor_parallel_size
    cost = RooflineCost(shape, machine.name, config.block_size, dtype, _host(config), config.attention_plan, devices)
    facts = ModelFacts(shape.name, shape.vocab_size, config.max_model_len or 1 << 20, (shape.vocab_size - 1,), shape)
    kv_bytes = group_kv_bytes(shape, Precision.parse(dtype), devices)
    return Backend(facts, cost, machine, None, None, "", kv_bytes, dtype)


def _simulated_shape(model: str, hardware: str) -> shapes.Shape:
    """A known shape, or the one that a profile was measured with."""
    profile = find_profile(hardware) if is_profile(hardware) else None
    try:
        shape = profile.shape if profile is not None and profile.shape.name == model else shapes.get(model)
    except RooflineError as error:
        raise ConfigError("model", model, str(error), "Name a known shape for the simulator.") from None
    if profile is not None:
        here = machine_here(profile.machine.threads, profile.machine.device if profile.machine.device == "cpu" else "none")
        warn_if_foreign(profile, shape, here)
    return shape


def _hardware(name: str) -> hw.Hardware:
    """An entry of the table, or the machine of a profile, which goes by the name that found it."""
    try:
        return find_profile(name).hardware(name) if is_profile(name) else hw.get(name)
    except RooflineError as error:
        raise ConfigError("hardware", name, str(error), f"Known: {', '.join(hw.names())}.") from None


def _host(config: EngineConfig) -> hw.Hardware | str | None:
    """The CPU beside the device, as it was named, or its speed at attention as a share of the device's."""
    if config.host is None:
        return None
    if config.host.endswith("%"):
        try:
            host_share(config.host)
            return config.host
        except ValueError as error:
            raise ConfigError("host", config.host, str(error), "Write '8%', or name a CPU such as 'xeon-6130-2s'.") from None
    try:
        found = hw.get(config.host)
    except RooflineError as error:
        raise ConfigError("host", config.host, str(error), f"Known: {', '.join(hw.names())}.") from None
    if found.kind != "cpu":
        raise ConfigError("host", config.host, "is no CPU", "Name the CPU beside the device, such as 'xeon-6130-2s'.")
    return found


def _default_num_blocks(config: EngineConfig, backend: Backend) -> int:
    """Blocks that memory has room for; on a CPU without a budget a fixed share, as memory is not the device's own."""
    per_block = backend.bytes_per_token * config.block_size
    budget = None if config.gpu_memory is None else config.tensor_parallel_size * budget_bytes(config.gpu_memory)
    on_gpu = backend.loaded is not None and backend.loaded.device.type == "cuda"
    if backend.loaded is not None and budget is None and not on_gpu:
        most = config.max_num_seqs * -(-backend.model.max_model_len // config.block_size)
        return max(1, min(most, int(DEFAULT_KV_BYTES // per_block)))
    memory = _memory(config, backend)
    blocks = kv_blocks(memory, per_block, budget)
    if blocks < 1:
        narrow = {name: weight_bytes(backend.model.shape, Precision.parse(parse_quantization(name).precision(16))) for name in ("int8", "int4")}
        asked = ("model", config.model) if budget is None else ("gpu_memory", config.gpu_memory)
        raise no_room(*asked, memory, per_block, budget, narrow, _larger_group(config, backend))
    if backend.loaded is not None:
        blocks = min(blocks, config.max_num_seqs * -(-backend.model.max_model_len // config.block_size))
    return blocks


def _larger_group(config: EngineConfig, backend: Backend) -> int | None:
    """The smallest number of such devices on which a simulated model has room for KV."""
    shape, precision = backend.model.shape, Precision.parse(backend.precision)
    each = backend.hardware.memory_bytes if config.gpu_memory is None else min(backend.hardware.memory_bytes, budget_bytes(config.gpu_memory))
    for devices in (n for n in SIZES if n > config.tensor_parallel_size and divides(shape, n)):
        memory = Memory(devices * each, 0.0, group_weight_bytes(shape, precision, devices), 0.0)
        alone = backend.loaded is not None or is_profile(backend.hardware.name) or "peer" not in backend.hardware.links
        if not alone and kv_blocks(memory, group_kv_bytes(shape, precision, devices) * config.block_size) > 0:
            return devices
    return None


def _memory(config: EngineConfig, backend: Backend) -> Memory:
    """Bytes of the device that weights and KV live on. Only a GPU is asked; the others are taken from the table."""
    shape, precision = backend.model.shape, Precision.parse(backend.precision)
    weights = weight_bytes(shape, precision)
    if config.weights != "resident" and shape.num_experts:
        away = shape.moe_layers() * shape.num_experts - _num_slots(config, shape)
        weights -= max(0, away) * 3 * shape.hidden_size * shape.moe_intermediate_size * precision.weight_bytes
    if backend.loaded is None:
        devices = config.tensor_parallel_size
        whole = weights if devices == 1 else group_weight_bytes(shape, precision, devices)
        return Memory(devices * backend.hardware.memory_bytes, 0.0, whole, 0.0)
    active = activation_bytes(shape, precision, config.max_num_batched_tokens, config.max_num_seqs)
    if backend.loaded.device.type != "cuda":
        return Memory(backend.hardware.memory_bytes, 0.0, weights, active)
    import torch

    free, total = torch.cuda.mem_get_info(backend.loaded.device)
    ours = float(torch.cuda.memory_reserved(backend.loaded.device))
    return Memory(float(total), max(0.0, total - free - ours), ours, active, GRAPH_BYTES)


def _executor(config: EngineConfig, backend: Backend, clock: Clock, log: EventLog, num_blocks: int, num_host_blocks: int
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
                              config.fixed_rows, lambda: _anew(config, backend, num_blocks, num_host_blocks)), _never_drafting  # fmt: skip
    return TorchExecutor(backend.loaded, cache, config.block_size, config.seed, asynchronous=config.overlap_depth > 0,
                         offload=backend.offload, fixed_rows=config.fixed_rows), partial(_real_drafting, setup)  # fmt: skip


def _sim_drafting(backend: Backend, setup: DraftSetup, tokens: PseudoTokens, config: EngineConfig) -> Redraft:
    _check_offload(config)
    speculation = simulated_speculation(config, _formed(setup, config), tokens)
    if speculation is None:
        return Redraft(None)
    cost = draft_cost_of(backend.cost, speculation.shape, config)
    return Redraft(SimDrafting(Drafter(speculation.source, setup.vocab_size), cost), speculation.shape)


def _real_drafting(setup: DraftSetup, config: EngineConfig) -> Redraft:
    _check_offload(config)
    speculation = real_speculation(config, _formed(setup, config), config.kernels)
    if speculation is None:
        return Redraft(None)
    return Redraft(Drafter(speculation.source, setup.vocab_size, config.acceptance), speculation.shape)


def _formed(setup: DraftSetup, config: EngineConfig) -> DraftSetup:
    """The setup with what the configuration says of the drafts' form."""
    return setup._replace(tree=config.branches, drawn=config.acceptance == "rejection")


def _never_drafting(config: EngineConfig) -> Redraft:
    """Steps that are queued on a device read their tokens there, before anybody could draft behind them."""
    if config.speculation is not None:
        raise ConfigError("speculation", source_name(config.speculation), "this engine's steps are queued on the device, and it "
                          "was started without drafts", "Start an engine with speculation=... and switch it there.")  # fmt: skip
    return Redraft(None)


def _free_bytes(loaded: LoadedModel) -> float:
    """Memory that nobody holds, where a model lies."""
    import torch

    if loaded.device.type == "cuda":
        return float(torch.cuda.mem_get_info(loaded.device)[0])
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _anew(config: EngineConfig, backend: Backend, num_blocks: int, num_host_blocks: int) -> Anew | None:
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
        loaded = _load(config, dtype, place, kernels)
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
    host = _host(config) or hw.get(DEFAULT_HOST)
    if isinstance(host, str):
        raise ConfigError("host", host, "is a speed of attention; experts need to know the CPU", "Name it, such as 'xeon-6130-2s'.")
    price = RooflineExperts(model, host_of(host))
    return ExpertSimExecutor(cost, tokens, clock, {"device": plain.hardware.name, "routing": trace.model}, config.block_size,
                             price=price, trace=trace, seam=weights_seam(config, log), num_slots=_num_slots(config, plain.shape))  # fmt: skip


def weights_seam(config: EngineConfig, log: EventLog) -> Seam[Any]:
    """Who places the experts of a mixture."""
    return _seam(config, log, "weights")


def _num_slots(config: EngineConfig, shape: shapes.Shape) -> int:
    """Experts that fit on the device: as many as was said, or a quarter of them."""
    return config.num_expert_slots or max(1, shape.moe_layers() * shape.num_experts // 4)


def _check_host(config: EngineConfig) -> None:
    """Placements of ours that keep KV on the host need room there; one's own may ask for what it likes, and is told. Raises
    ConfigError."""
    if config.num_host_blocks == 0 and isinstance(config.placement, str) and hasattr(PLACEMENTS.resolve(config.placement), "home"):
        raise ConfigError("num_host_blocks", 0, f"placement={config.placement!r} keeps KV in host memory, and it gets none",
                          "Give it blocks, or choose placement='gpu_only'.")  # fmt: skip


def _check_offload(config: EngineConfig) -> None:
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
