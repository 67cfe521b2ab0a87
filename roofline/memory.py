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
    """Weights, working space and the cache asked for are larger than the device. ``missing`` is in bytes per device,
    ``plan`` what it would have taken, for :func:`roofline.charts.memory_bar`."""

    def __init__(self, message: str, missing: float, remedies: tuple[str, ...], plan: MemoryPlan) -> None:
        super().__init__(message)
        self.missing = missing
        self.remedies = remedies
        self.plan = plan


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
        """Tokens whose cache fits; 0 where not even the weights do."""
        return max(0, int(self.free // self.kv_per_token))

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


def room_for(
    shape: Shape | str,
    hardware: Hardware | str,
    dtype: str | Precision | None = None,
    *,
    sequences: int,
    context: int,
    tp: int = 1,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    utilization: float = 0.9,
) -> MemoryPlan:
    """Plan as :func:`plan` does, and require that the cache of ``sequences`` of ``context`` tokens each fits.

    Raises :class:`DoesNotFit` with what is missing for that, and what would make it fit.
    """
    for name, value in (("sequences", sequences), ("context", context)):
        if value < 1:
            raise RooflineError(f"{name} must be at least 1, got {value}")
    found = plan(shape, hardware, dtype, tp=tp, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs,
                 utilization=utilization)  # fmt: skip
    if found.tokens < sequences * context:
        shape, precision = get_shape(shape), Precision.parse(dtype or get_hardware(hardware).default_dtype)
        logits = min(max_num_seqs, max_num_batched_tokens)
        load = _Load(shape, precision, max_num_batched_tokens, logits, sequences * context, found.usable)
        raise _cache_does_not_fit(found, load, sequences, context)
    return found


@dataclass(frozen=True, slots=True)
class _Load:
    """What has to fit into ``usable`` bytes of each device: weights, a step of ``tokens`` tokens, a cache of ``kv_tokens``."""

    shape: Shape
    precision: Precision
    tokens: int
    logits: int
    kv_tokens: int
    usable: float

    def fits(self, precision: Precision, tp: int) -> bool:
        held = weight_bytes(self.shape, precision, tp)
        held += activation_bytes(self.shape, precision, self.tokens, self.logits, tp)
        cache = self.kv_tokens * self.shape.num_layers * AttentionRates.of(self.shape, precision, tp).bytes_per_kv
        return held + cache <= self.usable


def _does_not_fit(found: MemoryPlan, shape: Shape, precision: Precision, tokens: int, logits: int) -> DoesNotFit:
    """Of the model itself: what is missing for one token, and what leaves room for at least one step's tokens."""
    missing = found.kv_per_token - found.free
    remedies = _remedies(_Load(shape, precision, tokens, logits, tokens, found.usable), found.tp)
    parts = f"weights {found.weights / GIB:.1f} GiB + activations {found.activations / GIB:.1f} GiB"
    return _error(found, found.shape, parts, missing, remedies)


def _cache_does_not_fit(found: MemoryPlan, load: _Load, sequences: int, context: int) -> DoesNotFit:
    """Of a cache: what is missing, and which changes hold it, the smaller loads first."""
    cache = load.kv_tokens * found.kv_per_token
    least = [f"contexts of {found.tokens // sequences:,} tokens"] if found.tokens >= sequences else []
    least += [f"{found.sequences(context):,} at once"] if sequences > 1 and found.sequences(context) else []
    held = found.weights + found.activations
    parts = f"cache {cache / GIB:.1f} GiB + weights and activations {held / GIB:.1f} GiB"
    what = f"{found.shape} with {sequences:,} x {context:,} tokens"
    return _error(found, what, parts, cache - found.free, (*least, *_remedies(load, found.tp)))


def _error(found: MemoryPlan, what: str, parts: str, missing: float, remedies: tuple[str, ...]) -> DoesNotFit:
    advice = "; ".join(remedies) if remedies else "no single lens is enough: take a larger device or a smaller model"
    message = (
        f"{what} does not fit on {found.tp} x {found.hardware}: {parts} of {found.usable / GIB:.1f} GiB usable, "
        f"{missing / GIB:.2f} GiB missing per device; would fit: {advice}"
    )
    return DoesNotFit(message, missing, remedies, found)


def _remedies(load: _Load, tp: int) -> tuple[str, ...]:
    """Return the single changes that make the load fit, the mildest of each kind; two at once where that spares devices."""
    p = load.precision

    def with_bits(weight: float, kv: float) -> Precision:
        return Precision.of_bits(weight, p.act_bits, kv, p.attention_format)

    def devices(precision: Precision) -> int | None:
        return next((n for n in (2, 4, 8, 16) if tp < n <= load.shape.num_heads and load.fits(precision, n)), None)

    weights = [bits for bits in (8, 4) if bits < p.weight_bits and load.fits(with_bits(bits, p.kv_bits), tp)]
    cache = [bits for bits in (8, 4) if bits < p.kv_bits and load.fits(with_bits(p.weight_bits, bits), tp)]
    remedies = [f"{bits}-bit cache (KVQuant({bits}))" for bits in cache[:1]]
    remedies += [f"{bits}-bit weights (WeightQuant({bits}))" for bits in weights[:1]]
    plain, narrow = devices(p), devices(with_bits(4, p.kv_bits)) if p.weight_bits > 4 and not weights else None
    if narrow is not None and (plain is None or narrow < plain):
        remedies.append(f"4-bit weights over {narrow} devices (WeightQuant(4), TensorParallel({narrow}))")
    if plain is not None:
        remedies.append(f"tensor parallelism over {plain} devices (TensorParallel({plain}))")
    return tuple(remedies)
