"""Memory planner: what weights and activations take, and how many tokens of cache fit into the rest."""

from __future__ import annotations

from dataclasses import dataclass

from roofline.errors import RooflineError
from roofline.hardware import GIB, Hardware
from roofline.hardware import get as get_hardware
from roofline.ops import AttentionRates, Slice
from roofline.precision import Precision
from roofline.shapes import Shape
from roofline.shapes import get as get_shape


class DoesNotFit(RooflineError):
    """The weights and the working space leave no room for a single token. ``missing`` is in bytes per device."""

    def __init__(self, message: str, missing: float, remedies: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing
        self.remedies = remedies


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on each device of the group, and what fits. ``usable`` is the share the engine may take."""

    shape: str
    hardware: str
    precision: str
    tp: int
    capacity: float
    usable: float
    weights: float
    activations: float
    kv_per_token: float

    @property
    def free(self) -> float:
        """Bytes left for the cache."""
        return self.usable - self.weights - self.activations

    @property
    def tokens(self) -> int:
        """Tokens whose cache fits."""
        return int(self.free // self.kv_per_token)

    def blocks(self, block_size: int = 16) -> int:
        """Return how many whole cache blocks of ``block_size`` tokens fit."""
        if block_size < 1:
            raise RooflineError(f"block_size must be at least 1, got {block_size}")
        return self.tokens // block_size

    def sequences(self, context: int) -> int:
        """Return how many sequences of ``context`` tokens fit at once."""
        if context < 1:
            raise RooflineError(f"context must be at least 1, got {context}")
        return self.tokens // context


def weight_bytes(shape: Shape, precision: Precision, tp: int = 1) -> float:
    """Return the weight bytes on one of ``tp`` devices: layers are cut into ``tp`` parts, norms are held whole.

    Embedding and head stay at 16 bits where the layers are narrower, as quantisation leaves them.
    """
    edge = shape.embedding_params()
    return ((shape.num_params() - edge) * precision.weight_bytes + edge * precision.edge.weight_bytes) / tp


def activation_bytes(shape: Shape, precision: Precision, tokens: int, logits: int, tp: int = 1) -> float:
    """Return the peak of live activations in a step of ``tokens`` tokens, of which ``logits`` are scored.

    Residual stream, the normalised input and the widest pair of neighbours (projection in and out, or gate-up and
    its product) are live together; the scores in 32 bits replace them at the end, so the larger of the two counts.
    """
    part = Slice.of(shape, tp)
    qkv = part.heads * shape.head_dim * 2 + 2 * part.kv_heads * shape.head_dim
    dense = (3 if shape.gated else 2) * part.width
    experts = shape.top_k * 3 * part.moe_width + shape.num_shared_experts * 3 * part.moe_width
    layer = tokens * (2 * shape.hidden_size + max(qkv, dense, experts)) * precision.act_bytes
    scores = logits * (part.vocab * 4 + shape.hidden_size * precision.act_bytes)
    return max(layer, tokens * shape.hidden_size * precision.act_bytes + scores)


def plan(
    shape: Shape | str,
    hardware: Hardware | str,
    dtype: str | Precision | None = None,
    *,
    tp: int = 1,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    utilization: float = 0.9,
) -> MemoryPlan:
    """Plan the memory of each of ``tp`` devices.

    ``utilization`` is the share of the device that may be used (the rest is the driver's, the library's and
    fragmentation's). Raises :class:`DoesNotFit`, which says how much is missing and what would make it fit.
    """
    shape, device = get_shape(shape), get_hardware(hardware)
    if not 0 < utilization <= 1:
        raise RooflineError(f"utilization must lie in (0, 1], got {utilization!r}")
    for name, value in (("max_num_batched_tokens", max_num_batched_tokens), ("max_num_seqs", max_num_seqs)):
        if value < 1:
            raise RooflineError(f"{name} must be at least 1, got {value}")
    precision = Precision.parse(dtype or device.default_dtype)
    logits = min(max_num_seqs, max_num_batched_tokens)
    found = MemoryPlan(
        shape.name, device.name, precision.name, tp, device.memory_bytes, utilization * device.memory_bytes,
        weight_bytes(shape, precision, tp), activation_bytes(shape, precision, max_num_batched_tokens, logits, tp),
        shape.num_layers * AttentionRates.of(shape, precision, tp).bytes_per_kv,
    )  # fmt: skip
    if found.tokens < 1:
        raise _does_not_fit(found, shape, precision, max_num_batched_tokens, logits)
    return found


def _does_not_fit(found: MemoryPlan, shape: Shape, precision: Precision, tokens: int, logits: int) -> DoesNotFit:
    missing = found.kv_per_token - found.free
    remedies = _remedies(found, shape, precision, tokens, logits)
    advice = "; ".join(remedies) if remedies else "no single lens is enough: take a larger device or a smaller model"
    message = (
        f"{found.shape} does not fit on {found.tp} x {found.hardware}: weights {found.weights / GIB:.1f} GiB + "
        f"activations {found.activations / GIB:.1f} GiB of {found.usable / GIB:.1f} GiB usable, "
        f"{missing / GIB:.2f} GiB missing per device; would fit: {advice}"
    )
    return DoesNotFit(message, missing, remedies)


def _remedies(found: MemoryPlan, shape: Shape, precision: Precision, tokens: int, logits: int) -> tuple[str, ...]:
    """Return the single changes that leave room for at least one step's tokens of cache, the mildest of each kind."""

    def fits(p: Precision, tp: int) -> bool:
        held = weight_bytes(shape, p, tp) + activation_bytes(shape, p, tokens, logits, tp)
        return held + tokens * shape.num_layers * AttentionRates.of(shape, p, tp).bytes_per_kv <= found.usable

    remedies = []
    for bits in (8, 4):
        narrow = Precision.of_bits(bits, precision.act_bits, precision.kv_bits, precision.attention_format)
        if bits < precision.weight_bits and fits(narrow, found.tp):
            remedies.append(f"{bits}-bit weights (WeightQuant({bits}))")
            break
    for tp in (2, 4, 8, 16):
        if found.tp < tp <= shape.num_heads and fits(precision, tp):
            remedies.append(f"tensor parallelism over {tp} devices (TensorParallel({tp}))")
            break
    return tuple(remedies)
