"""Several simulated devices that share every layer: which numbers of them a model divides into, and what each must hold.

Heads and the columns of linears are dealt to the devices, KV goes with its heads; where there are fewer KV heads than
devices, several hold the same one, and a latent cache is held by all. After attention and after the feed-forward block
the parts are added up over the link between the devices (`roofline.ops.all_reduce`).
"""

from __future__ import annotations

from llmlab.config import EngineConfig
from llmlab.types import ConfigError
from roofline.errors import RooflineError
from roofline.hardware import Hardware
from roofline.memory import weight_bytes
from roofline.ops import AttentionRates
from roofline.precision import Precision
from roofline.shapes import Shape

SIZES = (2, 4, 8, 16)  # groups that are proposed
_FIELD = "tensor_parallel_size"


def divides(shape: Shape, devices: int) -> bool:
    """Whether all devices get the same: as many heads, and KV heads or shares in one, and the same width."""
    kv = 1 if shape.latent else shape.num_kv_heads
    same_kv = kv % devices == 0 or devices % kv == 0
    return same_kv and all(part % devices == 0 for part in (shape.num_heads, shape.intermediate_size, shape.moe_intermediate_size))


def check_group(config: EngineConfig, shape: Shape, machine: Hardware, measured: bool) -> None:
    """Raises ConfigError for a group that the simulator cannot price. `measured`: the machine is a profile's."""
    devices = config.tensor_parallel_size
    if devices == 1:
        return
    if measured:
        raise ConfigError(_FIELD, devices, f"the profile {machine.name} was measured on one device", "Name a device of the table as hardware.")
    if not divides(shape, devices):
        fitting = [n for n in range(2, shape.num_heads + 1) if divides(shape, n) and n <= SIZES[-1]]
        way = f"Choose {', '.join(map(str, fitting))}, or leave it out." if fitting else "Leave it out."
        kv = "a latent cache" if shape.latent else f"{shape.num_kv_heads} KV heads"
        raise ConfigError(_FIELD, devices, f"{shape.name} has {shape.num_heads} heads, {kv} and a width of "
                          f"{shape.intermediate_size}, which do not go into {devices} equal parts", way)  # fmt: skip
    try:
        machine.link("peer")
    except RooflineError:
        raise ConfigError(_FIELD, devices, f"the table knows no link from one {machine.name} to another",
                          "Choose a GPU, or leave it out.") from None  # fmt: skip
    for field, alone in (("placement", ("device_only", "gpu_only")), ("weights", ("resident",))):
        if getattr(config, field) not in alone:
            raise ConfigError(field, config.describe()[field], f"does not go with {_FIELD}={devices} yet: nothing of a group's work is "
                              "placed beside it", f"Leave {field} at {alone[0]!r}, or {_FIELD} at 1.")  # fmt: skip


def group_weight_bytes(shape: Shape, precision: Precision, devices: int) -> float:
    """Bytes of the weights on all devices together."""
    return devices * weight_bytes(shape, precision, devices)


def group_kv_bytes(shape: Shape, precision: Precision, devices: int) -> float:
    """Bytes of one token's KV on all devices together, copies included."""
    return devices * shape.num_layers * AttentionRates.of(shape, precision, devices).bytes_per_kv
