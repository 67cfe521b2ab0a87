"""How much memory a KV pool may take: pure arithmetic on bytes. Imports no torch.

    capacity = min(device, budget)
    |-- share that the engine may use (MEMORY_SHARE) --------------------------------|  rest
    | held by others | weights | activations of the largest step | reserve |  KV pool  |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from llmlab.types import ConfigError
from roofline import hardware as hw
from roofline.errors import RooflineError

MEMORY_SHARE = 0.9  # vLLM's gpu_memory_utilization
GRAPH_BYTES = 512 << 20  # what captured graphs, their workspaces and the allocator's rounding may take on a GPU
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


class Memory(NamedTuple):
    """Bytes of a device as an engine finds it after its weights are loaded. `held`: by other programs."""

    capacity: float
    held: float
    weights: float
    activations: float
    reserve: float = 0.0


def budget_bytes(text: str | int) -> float:
    """Bytes of a budget: a number, "16GB", "8GiB", or a device of the hardware table ("t4"). Raises ConfigError."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return float(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", str(text).lower())
    if match and match[2] in _UNITS and float(match[1]) > 0:
        return float(match[1]) * _UNITS[match[2]]
    try:
        return hw.get(str(text)).memory_bytes
    except RooflineError as error:
        raise ConfigError("gpu_memory", text, f"is neither a size nor a known device ({error})",
                          "Write bytes, '16GB', '8GiB', or a device such as 't4'.") from None  # fmt: skip


def kv_blocks(memory: Memory, block_bytes: float, budget: float | None = None) -> int:
    """Blocks that fit, possibly 0 or less than nothing: see `no_room`."""
    capacity = memory.capacity if budget is None else min(memory.capacity, budget)
    # a budget stands for a device of its own: nobody else is on it
    held = memory.held if budget is None or budget >= memory.capacity else 0.0
    return int((capacity * MEMORY_SHARE - held - memory.weights - memory.activations - memory.reserve) // block_bytes)


def host_blocks(num_blocks: int, block_bytes: float, free: float) -> int:
    """Blocks of pinned host memory for a pool: as many as it has, but no more than lie in half of what is free. torch takes
    pinned memory in powers of two."""
    room = 2.0 ** math.floor(math.log2(free / 2)) if free >= 2 else 0.0
    return min(num_blocks, int(room // block_bytes))


def no_room(field: str, value: object, memory: Memory, block_bytes: float, budget: float | None, narrow: Mapping[str, float],
            group: int | None = None) -> ConfigError:  # fmt: skip
    """What to tell a user whose model leaves no room for KV: what it needs, what is missing, and what would fit. `narrow`:
    bytes of the weights by quantization, the mildest first; `group`: so many devices would do."""
    capacity = memory.capacity if budget is None else min(memory.capacity, budget)
    needs = memory.weights + memory.activations + memory.reserve + block_bytes
    usable = capacity * MEMORY_SHARE - (memory.held if budget is None else 0.0)
    ways = ["a larger device", "a smaller model"]
    if memory.activations > 0 and memory.weights + memory.reserve + block_bytes < usable:
        ways.insert(0, "fewer tokens in a step (max_num_batched_tokens)")
    fitting = {name: size for name, size in narrow.items() if needs - memory.weights + size <= usable}
    if fitting:
        sizes = " or ".join(_gb(size) for size in fitting.values())
        ways.insert(0, f"quantization={' or '.join(map(repr, fitting))} (weights of {sizes} instead of {_gb(memory.weights)})")
    if group is not None:
        ways.insert(1 if fitting else 0, f"tensor_parallel_size={group}")
    others = memory.activations + memory.reserve
    beside = f", activations and workspace {_gb(others)}" if others else ""
    problem = f"its weights need {_gb(memory.weights)}{beside}: no room for KV in the usable {_gb(usable)} of {_gb(capacity)}, {_gb(needs - usable)} missing for one block"
    return ConfigError(field, value, problem, f"Choose {' or '.join(ways)}.")


def out_of_memory(model: str, dtype: str, needed: float, free: float, int4_bytes: float) -> ConfigError:
    """What to tell a user whose device ran out of memory while the weights were loaded."""
    way = "quantization='int4'" if int4_bytes < free else "a smaller model or a larger device"
    return ConfigError("model", model, f"does not fit: its weights take {_gb(needed)} in {dtype}, {_gb(free)} are free",
                       f"Choose {way}; shorter contexts and fewer sequences do not help here.")  # fmt: skip


def no_room_for_kv(num_blocks: int, block_bytes: float, free: float) -> ConfigError:
    """What to tell a user whose device ran out of memory while the KV pool was made."""
    fitting = int(MEMORY_SHARE * free // block_bytes)
    way = f"at most {fitting} blocks" if fitting else "quantization='int4', a smaller model or a larger device"
    return ConfigError("num_blocks", num_blocks, f"does not fit: KV of {_gb(num_blocks * block_bytes)}, {_gb(free)} are free beside the weights",
                       f"Choose {way}, or leave it out; fewer sequences (max_num_seqs) and shorter contexts (max_model_len) need less.")  # fmt: skip


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
