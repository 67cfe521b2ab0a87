"""A model on its machine, real or simulated: what is loaded, what it costs, and how many KV blocks there is room for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.config import EngineConfig
from llmlab.execution.cost import RooflineCost, find_profile, host_share, is_profile, machine_here, warn_if_foreign
from llmlab.execution.pool_plan import GRAPH_BYTES, Memory, budget_bytes, host_blocks, kv_blocks, no_room, out_of_memory
from llmlab.execution.tensor_parallel import SIZES, check_group, divides, group_kv_bytes, group_weight_bytes
from llmlab.kernels.capability import OLDEST, Capability, check_dtype, default_dtype
from llmlab.kernels.quant_spec import parse_quantization
from llmlab.types import ConfigError, ModelError
from roofline import hardware as hw
from roofline import shapes
from roofline.errors import RooflineError
from roofline.memory import activation_bytes, weight_bytes
from roofline.precision import Precision

if TYPE_CHECKING:
    from llmlab.execution.offload import ExpertOffload
    from llmlab.models.loader import LoadedModel

# The KV pool of a real engine, if nobody says how large: enough for the lab models, harmless for large ones.
DEFAULT_KV_BYTES = 512 << 20


class ModelFacts(NamedTuple):
    """What the core must know of a model."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    shape: shapes.Shape


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


def torch_backend(config: EngineConfig) -> Backend:
    if config.tensor_parallel_size > 1:
        raise ConfigError("tensor_parallel_size", config.tensor_parallel_size, "the torch executor runs on one device",
                          "Use executor='sim', or leave it out.")  # fmt: skip
    import torch

    from llmlab.execution.threads import choose_threads
    from llmlab.kernels.dispatch import make_kernels

    device = _device(config, torch)
    threads = choose_threads(config.num_threads)
    dtype = dtype_for(config, device)
    kernels = make_kernels(config.kernels, device, _torch_dtype(torch, dtype), threads.num_threads)
    offload = _offload(config, kernels, device)
    loaded = load(config, dtype, device, offload.kernels if offload else kernels)
    shape = roofline_shape(loaded)
    machine = _machine_of(config, device, torch)
    precision = _precision(loaded, machine, config)
    if is_profile(machine.name):
        here = machine_here(torch.get_num_threads(), "cpu" if device == "cpu" else torch.cuda.get_device_name())
        warn_if_foreign(find_profile(machine.name), shape, here)
    facts = ModelFacts(loaded.name, shape.vocab_size, loaded.max_model_len, loaded.eos_token_ids, shape)
    tokenizer = loaded.tokenizer if hasattr(loaded.tokenizer, "vocab_size") else None
    cost = RooflineCost(shape, machine.name, config.block_size, precision, host_cpu(config), config.attention_plan)
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


def load(config: EngineConfig, dtype: str, device: str, kernels: Any) -> LoadedModel:
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


def dtype_for(config: EngineConfig, device: str) -> str:
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


def card_of(loaded: LoadedModel) -> Capability | None:
    """The GPU that a model is on."""
    if loaded.device.type != "cuda":
        return None
    from llmlab.kernels.dispatch import device_capability

    return device_capability(loaded.device, 0)


def sim_backend(config: EngineConfig) -> Backend:
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
    cost = RooflineCost(shape, machine.name, config.block_size, dtype, host_cpu(config), config.attention_plan, devices)
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


def host_cpu(config: EngineConfig) -> hw.Hardware | str | None:
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


def default_num_blocks(config: EngineConfig, backend: Backend) -> int:
    """Blocks that memory has room for; on a CPU without a budget a fixed share, as memory is not the device's own."""
    per_block = backend.bytes_per_token * config.block_size
    budget = None if config.gpu_memory is None else config.tensor_parallel_size * budget_bytes(config.gpu_memory)
    on_gpu = backend.loaded is not None and backend.loaded.device.type == "cuda"
    if backend.loaded is not None and budget is None and not on_gpu:
        most = config.max_num_seqs * -(-backend.model.max_model_len // config.block_size)
        return max(1, min(most, int(DEFAULT_KV_BYTES // per_block)))
    memory = _memory(config, backend)
    if backend.loaded is not None and on_gpu:
        per_block += _draft_bytes(config, backend.loaded).per_token * config.block_size
    blocks = kv_blocks(memory, per_block, budget)
    if blocks < 1:
        narrow = {name: weight_bytes(backend.model.shape, Precision.parse(parse_quantization(name).precision(16)))
                  for name in ("int8", "int4")}  # fmt: skip
        asked = ("model", config.model) if budget is None else ("gpu_memory", config.gpu_memory)
        raise no_room(*asked, memory, per_block, budget, narrow, _larger_group(config, backend))
    if backend.loaded is not None:
        blocks = min(blocks, config.max_num_seqs * -(-backend.model.max_model_len // config.block_size))
    return blocks


def _larger_group(config: EngineConfig, backend: Backend) -> int | None:
    """The smallest number of such devices on which a simulated model has room for KV."""
    shape, precision = backend.model.shape, Precision.parse(backend.precision)
    own = backend.hardware.memory_bytes
    each = own if config.gpu_memory is None else min(own, budget_bytes(config.gpu_memory))
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
        away = shape.moe_layers() * shape.num_experts - num_slots(config, shape)
        weights -= max(0, away) * _expert_bytes(shape, precision)
    if backend.loaded is None:
        devices = config.tensor_parallel_size
        whole = weights if devices == 1 else group_weight_bytes(shape, precision, devices)
        return Memory(devices * backend.hardware.memory_bytes, 0.0, whole, 0.0)
    active = activation_bytes(shape, precision, config.max_num_batched_tokens, config.max_num_seqs)
    if backend.loaded.device.type != "cuda":
        return Memory(backend.hardware.memory_bytes, 0.0, weights, active)
    import torch

    torch.cuda.empty_cache()  # what loading left over is nobody's
    free, total = torch.cuda.mem_get_info(backend.loaded.device)
    ours = float(torch.cuda.memory_reserved(backend.loaded.device))
    coming = 0.0 if backend.offload is None else num_slots(config, shape) * _expert_bytes(shape, precision)
    coming += _draft_bytes(config, backend.loaded).weights
    return Memory(float(total), max(0.0, total - free - ours), ours + coming, active, GRAPH_BYTES)


class DraftBytes(NamedTuple):
    """What a draft model takes beside the target: its weights, and KV of each token."""

    weights: float = 0.0
    per_token: float = 0.0


def _draft_bytes(config: EngineConfig, loaded: LoadedModel) -> DraftBytes:
    """Of the draft model that is still to be loaded, in the target's format; nothing for sources that run none."""
    from llmlab.decoding.drafts import DRAFT_SOURCES
    from llmlab.models.loader import shape_of

    name = config.speculation
    if not isinstance(name, str) or name in DRAFT_SOURCES.names():
        return DraftBytes()
    try:
        shape, width = shape_of(name), loaded.dtype.itemsize
    except ModelError:  # who loads it says so
        return DraftBytes()
    return DraftBytes(shape.num_parameters() * width, 2 * shape.num_layers * shape.kv_size * width)


def _expert_bytes(shape: shapes.Shape, precision: Precision) -> float:
    return 3 * shape.hidden_size * shape.moe_intermediate_size * precision.weight_bytes


def default_num_host_blocks(config: EngineConfig, backend: Backend, num_blocks: int) -> int:
    """Blocks of the host tier: as many as the pool has, of pinned memory beside a GPU no more than the host can spare."""
    if backend.loaded is None or backend.loaded.device.type != "cuda":
        return num_blocks
    return host_blocks(num_blocks, backend.bytes_per_token * config.block_size, free_host_bytes())


def free_host_bytes() -> float:
    """Memory of the host that nobody holds, in bytes; 0 where the system does not tell."""
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def num_slots(config: EngineConfig, shape: shapes.Shape) -> int:
    """Experts that fit on the device: as many as was said, or a quarter of them."""
    return config.num_expert_slots or max(1, shape.moe_layers() * shape.num_experts // 4)
