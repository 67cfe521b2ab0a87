"""Technique lenses: what quantisation, grouped heads, fusion, batching, speculation, sharding or pruning change.

A :class:`Case` is a step of a model on a device; its op list follows from its fields. A lens turns one case into
another, so lenses compose; ``compare`` sets before and after side by side, in time, bytes, joules and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from roofline.cost import CostModel, Efficiency, OpCost, StepCost, Tally
from roofline.errors import RooflineError, positive
from roofline.hardware import Hardware
from roofline.hardware import get as get_hardware
from roofline.memory import weight_bytes
from roofline.ops import SOFTMAX_FLOPS, AttentionRates, Op, Slice, step_ops
from roofline.precision import Precision
from roofline.rows import Rows
from roofline.shapes import Shape
from roofline.shapes import get as get_shape


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model's part of a step: ``steps`` times one token for each row."""

    shape: Shape
    precision: Precision
    steps: int


@dataclass(frozen=True, slots=True)
class Case:
    """One step: a model, its widths, a device group and a batch, with the techniques that are switched on.

    ``tokens``: useful tokens of the step. ``fused``: attention keeps its scores on chip. ``kept_bytes`` and
    ``kept_flops``: what pruning leaves of the layers' matrices and of their operations.
    """

    shape: Shape
    hardware: Hardware
    rows: Rows
    precision: Precision
    tokens: float
    tp: int = 1
    efficiency: Efficiency | None = None
    fused: bool = True
    kept_bytes: float = 1.0
    kept_flops: float = 1.0
    draft: Draft | None = None

    @classmethod
    def of(
        cls, shape: Shape | str, hardware: Hardware | str, rows: Rows, dtype: str | Precision | None = None,
        *, tp: int = 1, efficiency: Efficiency | None = None, tokens: float | None = None,
    ) -> Case:  # fmt: skip
        """Build a case from names; ``tokens`` is one per row unless given (a prompt's useful tokens are all)."""
        device = get_hardware(hardware)
        precision = Precision.parse(dtype or device.default_dtype)
        made = float(len(rows) if tokens is None else tokens)
        positive("tokens", made)
        return cls(get_shape(shape), device, rows, precision, made, tp, efficiency)

    def model(self) -> CostModel:
        """Return the cost model that prices this case's ops."""
        return CostModel(self.shape, self.hardware, self.precision, tp=self.tp, efficiency=self.efficiency)

    def ops(self) -> tuple[Op, ...]:
        """Return the op list of one device of the group, without the draft's."""
        found = step_ops(self.shape, self.rows, self.precision, self.tp)
        if not self.fused:
            found = tuple(part for op in found for part in self._unfused(op))
        return tuple(self._pruned(op) for op in found)

    def _unfused(self, op: Op) -> tuple[Op, ...]:
        """Split attention into score, softmax and value kernels, whose scores travel through main memory."""
        if op.kind != "attention":
            return (op,)
        rates = AttentionRates.of(self.shape, self.precision, self.tp)
        heads = Slice.of(self.shape, self.tp).heads
        scores = op.flops / rates.flops_per_pair * heads  # pairs x heads
        softmax = SOFTMAX_FLOPS * scores
        product, size = (op.flops - softmax) / 2, scores * self.precision.act_bytes
        cache = op.bytes_kv_in / 2
        return (
            replace(op, name="attention_scores", flops=product, bytes_out=size, bytes_kv_in=cache),
            replace(
                op, name="softmax", kind="elementwise", flops=softmax, bytes_in=size, bytes_out=size, bytes_kv_in=0
            ),
            replace(op, name="attention_values", flops=product, bytes_in=size, bytes_kv_in=cache),
        )

    def _pruned(self, op: Op) -> Op:
        if op.kind != "linear" or op.first_layer < 0 or (self.kept_bytes == self.kept_flops == 1):
            return op
        columns = op.columns * self.kept_flops  # structured pruning narrows a product; 2:4 runs at twice the rate
        return replace(
            op, flops=op.flops * self.kept_flops, bytes_weight=op.bytes_weight * self.kept_bytes, columns=columns
        )

    def weights(self) -> float:
        """Return the weight bytes of the whole group, draft included."""
        edge = self.shape.embedding_params() * self.precision.edge.weight_bytes
        whole = edge + (weight_bytes(self.shape, self.precision) - edge) * self.kept_bytes
        extra = weight_bytes(self.draft.shape, self.draft.precision) if self.draft else 0.0
        return whole + extra

    def kv_per_token(self) -> float:
        """Return the cache bytes of one token, draft included."""
        size = self.shape.num_layers * self.shape.kv_elements * self.precision.kv_bytes
        if self.draft:
            size += self.draft.shape.num_layers * self.draft.shape.kv_elements * self.draft.precision.kv_bytes
        return size

    def _draft_steps(self) -> list[StepCost]:
        """Price the draft's steps, each one token further than the one before."""
        if self.draft is None:
            return []
        n, draft = self.draft.steps, self.draft
        model = CostModel(draft.shape, self.hardware, draft.precision, efficiency=self.efficiency)
        return [model.step(Rows([1] * len(self.rows), [kv - n + i for kv in self.rows.kv])) for i in range(n)]

    def outcome(self) -> Outcome:
        """Price the case."""
        total, model = Tally(), self.model()
        costs = tuple(model.op_cost(op) for op in self.ops())
        for cost in costs:
            total.add(cost, cost.op.count)
        seconds = total.seconds + model.efficiency.step
        flops, moved, joules = (self.tp * value for value in (total.flops, total.bytes, total.joules))
        for one in self._draft_steps():
            seconds, flops = seconds + one.seconds, flops + one.flops
            moved, joules = moved + one.bytes_hbm, joules + one.joules
        return Outcome(seconds, flops, moved, joules, self.weights(), self.kv_per_token(), self.tokens, costs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case costs: sums over the device group, useful tokens, and the priced ops of one device."""

    seconds: float
    flops: float
    bytes: float
    joules: float
    weights: float
    kv_per_token: float
    tokens: float
    costs: tuple[OpCost, ...] = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens per second."""
        return self.tokens / self.seconds

    @property
    def joules_per_token(self) -> float:
        """Joules per useful token."""
        return self.joules / self.tokens


class Lens(Protocol):
    """A technique. ``before`` is the case without it (mostly the given one), ``after`` the case with it."""

    @property
    def name(self) -> str:
        """What the technique is called in tables and charts."""

    def before(self, case: Case) -> Case:
        """Return the case to compare with."""

    def after(self, case: Case) -> Case:
        """Return the case with the technique."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Before and after of one lens."""

    name: str
    before: Outcome
    after: Outcome

    @property
    def speedup(self) -> float:
        """Gain in useful tokens per second."""
        return self.after.tokens_per_second / self.before.tokens_per_second

    @property
    def energy_gain(self) -> float:
        """Gain in useful tokens per joule."""
        return self.before.joules_per_token / self.after.joules_per_token

    @property
    def memory_gain(self) -> float:
        """Weights before over weights after."""
        return self.before.weights / self.after.weights


def compare(lens: Lens, case: Case) -> Comparison:
    """Price a case before and after a technique."""
    return Comparison(lens.name, lens.before(case).outcome(), lens.after(case).outcome())


def compose(case: Case, lenses: Sequence[Lens]) -> Case:
    """Apply several techniques in order."""
    for lens in lenses:
        case = lens.after(case)
    return case


class _FromCase:
    """Lenses whose ``before`` is the given case."""

    __slots__ = ()

    def before(self, case: Case) -> Case:
        """Return the case as it is."""
        return case


@dataclass(frozen=True, slots=True)
class WeightQuant(_FromCase):
    """Store weights in ``bits``, with one 16-bit scale per ``group`` of them (0: none); products stay as they are
    unless activations are narrow too. Unpacking is taken to hide behind the reading."""

    bits: float = 4
    group: int = 128

    @property
    def name(self) -> str:
        """Label."""
        return f"{self.bits:g}-bit weights"

    def after(self, case: Case) -> Case:
        """Narrow the weights."""
        p = case.precision
        stored = Precision.of_bits(self.bits, p.act_bits, p.kv_bits, p.attention_format)
        scaled = self.bits + (16 / self.group if self.group else 0)
        return replace(case, precision=replace(stored, weight_bits=scaled))


@dataclass(frozen=True, slots=True)
class ActivationQuant(_FromCase):
    """Store activations in ``bits``; with weights as narrow, products run on the narrow unit."""

    bits: float = 8

    @property
    def name(self) -> str:
        """Label."""
        return f"{self.bits:g}-bit activations"

    def after(self, case: Case) -> Case:
        """Narrow the activations."""
        p = case.precision
        # Weights of 4.125 or 8.125 stored bits multiply in the 8-bit unit: the scale is applied afterwards.
        unit = Precision.of_bits(min(p.weight_bits, 16) // 1, self.bits, p.kv_bits, p.attention_format)
        return replace(case, precision=replace(unit, weight_bits=p.weight_bits))


@dataclass(frozen=True, slots=True)
class KVQuant(_FromCase):
    """Store the cache in ``bits``; attention widens what it reads."""

    bits: float = 8

    @property
    def name(self) -> str:
        """Label."""
        return f"{self.bits:g}-bit KV cache"

    def after(self, case: Case) -> Case:
        """Narrow the cache."""
        return replace(case, precision=replace(case.precision, kv_bits=self.bits))


@dataclass(frozen=True, slots=True)
class GroupedHeads(_FromCase):
    """Share each key and value head among several query heads (GQA; 1 = multi-query)."""

    kv_heads: int

    @property
    def name(self) -> str:
        """Label."""
        return f"GQA, {self.kv_heads} KV heads"

    def after(self, case: Case) -> Case:
        """Give the model ``kv_heads`` key and value heads (its quality is not the lens's business)."""
        return replace(case, shape=replace(case.shape, num_kv_heads=self.kv_heads))


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """Keep attention's scores on chip (FlashAttention), against three kernels that write and read them."""

    name: str = "fused attention"

    def before(self, case: Case) -> Case:
        """Return the case with separate score, softmax and value kernels."""
        return replace(case, fused=False)

    def after(self, case: Case) -> Case:
        """Return the case with one kernel."""
        return replace(case, fused=True)


@dataclass(frozen=True, slots=True)
class Batching(_FromCase):
    """Run ``factor`` times as many rows of the same kind in one step."""

    factor: int

    @property
    def name(self) -> str:
        """Label."""
        return f"batch x{self.factor}"

    def after(self, case: Case) -> Case:
        """Repeat the rows."""
        if self.factor < 1:
            raise RooflineError(f"Batching: factor must be at least 1, got {self.factor}")
        r, n = case.rows, self.factor
        if r.layers is not None or r.pairs is not None:
            raise RooflineError("Batching repeats plain rows; this batch has layer spans or masks of its own")
        logits = None if r.logits is None else r.logits * n
        return replace(case, rows=Rows([*r.query] * n, [*r.kv] * n, logits=logits), tokens=case.tokens * n)


def expected_tokens(k: int, acceptance: float) -> float:
    """Return the mean tokens of one verification: ``(1 - a^(k+1)) / (1 - a)`` (Leviathan et al., 2023)."""
    if not 0 <= acceptance <= 1 or k < 1:
        raise RooflineError(f"speculation needs k >= 1 and acceptance in [0, 1], got {k} and {acceptance}")
    return float(k + 1) if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


@dataclass(frozen=True, slots=True)
class Speculation(_FromCase):
    """Let a draft model propose ``k`` tokens per row, each accepted with probability ``acceptance``."""

    draft: Shape | str
    k: int = 4
    acceptance: float = 0.7

    @property
    def name(self) -> str:
        """Label."""
        return f"speculation k={self.k}, accepted {self.acceptance:.0%}"

    def after(self, case: Case) -> Case:
        """Turn each decode row into a verification of ``k + 1`` tokens and add the draft's steps."""
        if any(q != 1 for q in case.rows.query):
            raise RooflineError("Speculation needs a decode batch: every query must be 1")
        gain = expected_tokens(self.k, self.acceptance)
        width = self.k + 1
        rows = Rows([width] * len(case.rows), [kv + self.k for kv in case.rows.kv], logits=width * len(case.rows))
        draft = Draft(get_shape(self.draft), case.precision, self.k)
        return replace(case, rows=rows, tokens=case.tokens * gain, draft=draft)


@dataclass(frozen=True, slots=True)
class TensorParallel(_FromCase):
    """Cut every layer over ``devices`` devices, with two all-reduces per layer."""

    devices: int

    @property
    def name(self) -> str:
        """Label."""
        return f"tensor parallel x{self.devices}"

    def after(self, case: Case) -> Case:
        """Spread the case."""
        return replace(case, tp=self.devices)


# What a pattern leaves of the stored bytes per kept weight (indices) and of the operations per kept weight.
_PATTERNS = ("structured", "2:4", "unstructured")


@dataclass(frozen=True, slots=True)
class Pruning(_FromCase):
    """Keep a fraction of each layer's weights.

    ``"structured"`` drops whole columns: bytes and operations shrink alike. ``"2:4"`` keeps two of four: half the
    operations where the unit supports it, and 2 index bits per kept weight. ``"unstructured"`` stores kept weights
    with a bitmap and saves no operations.
    """

    keep: float = 0.5
    pattern: str = "structured"

    @property
    def name(self) -> str:
        """Label."""
        return f"{self.pattern} pruning, {self.keep:.0%} kept"

    def after(self, case: Case) -> Case:
        """Prune the layers' matrices."""
        if self.pattern not in _PATTERNS or not 0 < self.keep <= 1:
            raise RooflineError(f"Pruning needs keep in (0, 1] and a pattern of {_PATTERNS}, got {self}")
        if self.pattern == "2:4" and self.keep != 0.5:
            raise RooflineError(f"the 2:4 pattern keeps 0.5, got keep={self.keep}")
        index = {"structured": 0.0, "2:4": 2 * self.keep, "unstructured": 1.0}[self.pattern]
        stored = self.keep + index / case.precision.weight_bits
        flops = 1.0 if self.pattern == "unstructured" else self.keep
        return replace(case, kept_bytes=case.kept_bytes * stored, kept_flops=case.kept_flops * flops)


@dataclass(frozen=True, slots=True)
class LayerSkip(_FromCase):
    """Leave after ``layers`` layers (early exit)."""

    layers: int

    @property
    def name(self) -> str:
        """Label."""
        return f"exit after {self.layers} layers"

    def after(self, case: Case) -> Case:
        """Shorten the model."""
        if not 1 <= self.layers <= case.shape.num_layers:
            raise RooflineError(f"LayerSkip: layers must lie in 1..{case.shape.num_layers}, got {self.layers}")
        return replace(case, shape=replace(case.shape, num_layers=self.layers))


def standard(case: Case) -> list[Lens]:
    """Return one lens of each kind that suits the case, in the order of the survey."""
    found: list[Lens] = [WeightQuant(8), WeightQuant(4), KVQuant(8), FusedAttention(), Batching(8)]
    if case.shape.num_kv_heads > 4 and not case.shape.latent:
        found.append(GroupedHeads(case.shape.num_kv_heads // 4))
    if all(q == 1 for q in case.rows.query) and case.shape.hidden_size > 512:
        found += [Speculation(_draft_of(case.shape), 4, a) for a in (0.8, 0.4)]
    if case.shape.num_heads >= 2 and case.shape.num_heads % 2 == 0:
        found.append(TensorParallel(2))
    return [*found, Pruning(0.5)]


def _draft_of(shape: Shape) -> Shape:
    """A model of the same vocabulary with a quarter of the width and of the layers: about a fiftieth of the work."""
    return replace(
        shape, name=f"{shape.name} / 4", hidden_size=shape.hidden_size // 4, num_layers=max(1, shape.num_layers // 4),
        num_heads=max(1, shape.num_heads // 4), num_kv_heads=max(1, shape.num_kv_heads // 4),
        intermediate_size=max(1, shape.intermediate_size // 4), moe_intermediate_size=shape.moe_intermediate_size // 4,
    )  # fmt: skip
