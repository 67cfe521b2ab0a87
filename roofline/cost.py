"""Time and energy of a step: ``CostModel(shape, hardware).step(rows)``, fast enough to be asked at every step.

Per op: time = launch + max(operations / achieved peak, bytes / achieved bandwidth) + link bytes / link bandwidth.
The sum over a step has a closed form, since everything but attention depends on the number of tokens alone (those
sums are remembered per number of tokens) and attention on three sums over rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, log2

from roofline.errors import RooflineError, non_negative
from roofline.hardware import Hardware, Link
from roofline.hardware import get as get_hardware
from roofline.ops import AttentionRates, Op, block_ops, edge_ops, step_ops
from roofline.power import PowerModel
from roofline.precision import Precision
from roofline.rows import Rows, entering, leaving, segments
from roofline.shapes import Shape
from roofline.shapes import get as get_shape

# Output tiles that matrix libraries choose from: rows x columns of one multiprocessor's share.
TILES = ((256, 128), (128, 256), (128, 128), (64, 256), (64, 128), (128, 64), (64, 64), (32, 128), (32, 64), (16, 64))
MODES = ("corrected", "llm_viewer", "llm_viewer_flash")
REMEMBERED = 65536  # sums kept; only measured expert counts, which are any number, could pass this
CACHE_SHARE = 0.75  # of the last-level cache: beyond it a cyclic read of the weights misses (measured)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Which fraction of the data sheet a kernel reaches. ``roofline.fit`` fits these to measurements.

    ``tile_side``: the side of a (square) output tile at which a multiprocessor reaches half of its rate: small
    tiles read more operands per operation. 0 switches tiles and waves off, as does ``Hardware.units == 1``.
    ``launch``: seconds per kernel; ``linear_start``: further seconds per
    matrix product, whose pipeline must fill and drain; ``step``: seconds per step outside of kernels.
    """

    linear_compute: float = 0.9
    linear_memory: float = 0.8
    attention_compute: float = 0.6
    attention_memory: float = 0.75
    elementwise_memory: float = 0.7
    link: float = 0.8
    tile_side: float = 16.0
    launch: float = 2e-6
    linear_start: float = 0.0
    step: float = 0.0

    def __post_init__(self) -> None:
        for name in ("linear_compute", "linear_memory", "attention_compute", "attention_memory",
                     "elementwise_memory", "link"):  # fmt: skip
            if not 0 < getattr(self, name) <= 1:
                raise RooflineError(f"efficiency {name} must lie in (0, 1], got {getattr(self, name)!r}")
        for name in ("tile_side", "launch", "linear_start", "step"):
            non_negative(f"efficiency {name}", getattr(self, name))

    @classmethod
    def ideal(cls) -> Efficiency:
        """Return the data sheet itself: every fraction 1, no launch, no tiles."""
        return cls(1, 1, 1, 1, 1, 1, 0.0, 0.0, 0.0, 0.0)

    @classmethod
    def default(cls, hardware: Hardware) -> Efficiency:
        """Return round numbers that suit the kind of device: unfitted, to be replaced by measurement."""
        return cls() if hardware.kind == "gpu" else cls(tile_side=0.0)


@dataclass(frozen=True, slots=True)
class OpEnergy:
    """Dynamic joules of one op by cause."""

    compute: float
    memory: float
    link: float

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.compute + self.memory + self.link


@dataclass(frozen=True, slots=True)
class OpCost:
    """One op's time by cause: only the longer of compute and memory counts, so ``seconds`` is not their sum."""

    op: Op
    seconds: float
    compute: float
    memory: float
    launch: float
    link: float
    joules: float

    @property
    def bound(self) -> str:
        """What most of the time goes to: compute, memory, launch or link."""
        return _bound(self.compute if self.compute > self.memory else 0.0,
                      self.memory if self.memory >= self.compute else 0.0, self.launch, self.link)  # fmt: skip


def _bound(compute: float, memory: float, launch: float, link: float) -> str:
    most = max(compute, memory, launch, link)
    if most == memory:
        return "memory"
    return "compute" if most == compute else "launch" if most == launch else "link"


@dataclass(slots=True)
class Tally:
    """A running sum of op costs; ``compute`` and ``memory`` hold the time of ops bound by them."""

    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    link_bytes: float = 0.0
    joules: float = 0.0
    compute: float = 0.0
    memory: float = 0.0
    launch: float = 0.0
    link: float = 0.0

    def add(self, cost: OpCost, count: float = 1) -> None:
        """Add ``count`` executions of one op."""
        self.seconds += count * cost.seconds
        self.flops += count * cost.op.flops
        self.bytes += count * cost.op.bytes
        self.link_bytes += count * cost.op.bytes_link
        self.joules += count * cost.joules
        self.launch += count * cost.launch
        self.link += count * cost.link
        if cost.compute > cost.memory:
            self.compute += count * cost.compute
        else:
            self.memory += count * cost.memory

    def add_tally(self, other: Tally, count: float) -> None:
        """Add ``count`` times another sum."""
        self.seconds += count * other.seconds
        self.flops += count * other.flops
        self.bytes += count * other.bytes
        self.link_bytes += count * other.link_bytes
        self.joules += count * other.joules
        self.compute += count * other.compute
        self.memory += count * other.memory
        self.launch += count * other.launch
        self.link += count * other.link


@dataclass(frozen=True, slots=True)
class StepCost:
    """Predicted cost of one step of a group of ``tp`` devices.

    ``seconds`` is wall time. ``flops``, ``bytes_hbm``, ``bytes_link`` and ``joules`` are sums over the group.
    ``bound`` names what most of the time goes to: compute, memory, launch or link.
    """

    seconds: float
    flops: float
    bytes_hbm: float
    bytes_link: float
    joules: float
    bound: str
    model: CostModel = field(repr=False, compare=False)
    rows: Rows = field(repr=False, compare=False)

    def per_op(self) -> tuple[OpCost, ...]:
        """Return the cost of every op (worked out now, not during the step)."""
        return tuple(self.model.op_cost(op) for op in self.model.ops(self.rows))


@dataclass(frozen=True, slots=True)
class AroundAttention:
    """Seconds of one layer's ops before its attention (norm, q/k/v, rotation, cache write) and after it (output
    projection, norm, feed-forward)."""

    before: float
    after: float


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of one layer by part, as placement policies compare them."""

    linear: float
    attention: float


@dataclass(frozen=True, slots=True)
class AttentionPower:
    """What the attention kernel achieves on one device, and the dynamic watts that the device allows."""

    flops_per_second: float
    bytes_per_second: float
    joules_per_flop: float
    watts: float


class CostModel:
    """Roofline of one model on one kind of device (``tp`` of them side by side).

    ``dtype`` is a format or a width code (``"fp16"``, ``"w4a16"``, ``"w8a8kv8"``); None takes the device's own.
    ``mode`` is ``"corrected"``, or ``"llm_viewer"`` / ``"llm_viewer_flash"``, which repeat that tool's published
    formulas without and with its fused attention (uniform batches only, see :mod:`roofline.llm_viewer`). The device
    must have every format's unit, else this raises.
    """

    def __init__(
        self, shape: Shape | str, hardware: Hardware | str, dtype: str | Precision | None = None, *,
        mode: str = "corrected", efficiency: Efficiency | None = None, tp: int = 1, power: PowerModel | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise RooflineError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.shape = get_shape(shape)
        self.hardware = get_hardware(hardware)
        self.precision = Precision.parse(dtype or self.hardware.default_dtype)
        self.mode = mode
        self.tp = tp
        self.efficiency = efficiency or (
            Efficiency.default(self.hardware) if mode == "corrected" else Efficiency.ideal()
        )
        self.power = power or PowerModel()
        self.bandwidth = self._bandwidth()
        self._attention = AttentionRates.of(self.shape, self.precision, tp)
        self._set_rates()
        self._blocks: dict[tuple[int, bool, float | None], Tally] = {}
        self._edges: dict[tuple[int, int], Tally] = {}
        self._bases: dict[tuple[int, int, float | None], Tally] = {}
        self._around: dict[tuple[int, bool, float | None], AroundAttention] = {}
        self._attention_power = self._power_of_attention()

    def _bandwidth(self) -> float:
        """Main memory's bandwidth, or the cache's where it was measured and holds this device's weights."""
        device = self.hardware
        weights = self.shape.num_params() * self.precision.weight_bytes / self.tp
        if self.mode == "corrected" and device.cache_bandwidth and weights <= CACHE_SHARE * device.onchip_bytes:
            return device.cache_bandwidth
        return device.bandwidth

    def _set_rates(self) -> None:
        device, eff, power = self.hardware, self.efficiency, self.power
        memory = {"linear": eff.linear_memory, "attention": eff.attention_memory}
        kinds = ("linear", "attention", "elementwise", "collective")
        self._memory = {kind: self.bandwidth * memory.get(kind, eff.elementwise_memory) for kind in kinds}
        self._peer = device.link("peer") if self.tp > 1 else Link(float(2**63))
        self.static_watts = power.static_watts(device)
        self._per_byte = power.joules_per_byte(device, device.bandwidth * eff.linear_memory)
        self._launch = {kind: eff.launch + (eff.linear_start if kind == "linear" else 0.0) for kind in kinds}
        self._compute: dict[tuple[str, str], float] = {}
        self._compute_rate("linear", self.precision.linear_format)  # a format without a unit raises here
        self._compute_rate("attention", self.precision.attention_format)

    def _compute_rate(self, kind: str, dtype: str) -> float:
        """Return the achieved operations per second of one kind of op in one format."""
        rate = self._compute.get((kind, dtype))
        if rate is None:
            rate = self._compute[kind, dtype] = self._new_rate(kind, dtype)
        return rate

    def _new_rate(self, kind: str, dtype: str) -> float:
        device, eff = self.hardware, self.efficiency
        if self.mode != "corrected":
            from roofline.llm_viewer import compute_format

            return device.peak_of(compute_format(self.precision))  # the tool charges every op to one unit
        share = {"linear": eff.linear_compute, "attention": eff.attention_compute}
        return device.peak_of(dtype) * share.get(kind, 1.0)

    def _power_of_attention(self) -> AttentionPower:
        rate = self._compute_rate("attention", self._attention.dtype)
        per_flop = self.power.joules_per_flop(self.hardware, rate)
        return AttentionPower(rate, self._memory["attention"], per_flop, self.hardware.tdp - self.static_watts)

    def op_cost(self, op: Op) -> OpCost:
        """Return one op's time and energy on one device."""
        kind = op.kind
        compute = op.flops / self._compute_rate(kind, op.dtype)
        if kind == "linear" and self.hardware.units > 1 and self.efficiency.tile_side:
            compute *= self._tile_penalty(op)
        memory = op.bytes / self._memory[kind]
        link = self._link_seconds(op.bytes_link) if op.bytes_link else 0.0
        launch = self._launch[kind]
        seconds = launch + max(compute, memory) + link
        joules = self.op_energy(op, seconds).total + self.static_watts * seconds
        return OpCost(op, seconds, compute, memory, launch, link, joules)

    def op_energy(self, op: Op, seconds: float) -> OpEnergy:
        """Return the dynamic joules of one op that takes ``seconds``: a device throttles at its TDP."""
        per_flop = self.power.joules_per_flop(self.hardware, self._compute_rate(op.kind, op.dtype))
        compute, memory = op.flops * per_flop, op.bytes * self._per_byte
        allowed = (self.hardware.tdp - self.static_watts) * seconds
        if compute + memory > allowed:
            share = allowed / (compute + memory)
            compute, memory = compute * share, memory * share
        return OpEnergy(compute, memory, op.bytes_link * self.power.joules_per_link_byte)

    def _link_seconds(self, num_bytes: float) -> float:
        """Return the faster of a ring (little data, many hops) and a tree (few hops), as libraries choose."""
        p, link = self.tp, self._peer
        rate = link.bandwidth * self.efficiency.link
        ring = 2 * (p - 1) * link.latency + num_bytes / rate
        tree = 2 * ceil(log2(p)) * link.latency + num_bytes * p / (p - 1) / rate
        return min(ring, tree)

    def _tile_penalty(self, op: Op) -> float:
        """Return how much longer a product takes because tiles are dealt to multiprocessors in whole waves."""
        units, side = self.hardware.units, self.efficiency.tile_side
        useful = op.groups * op.rows * op.columns
        best = float("inf")
        for height, width in TILES:
            tiles = op.groups * ceil(op.rows / height) * ceil(op.columns / width)
            area = ceil(tiles / units) * units * height * width
            best = min(best, area * (1 + side * (height + width) / (2 * height * width)))
        return best / useful

    def ops(self, rows: Rows) -> tuple[Op, ...]:
        """Return the op list of a step over ``rows`` on one device of the group."""
        if self.mode != "corrected":
            from roofline.llm_viewer import step_ops as viewer_ops

            found: tuple[Op, ...] = viewer_ops(
                self.shape, rows, self.precision, self.hardware, flash=self.mode == "llm_viewer_flash"
            )
            return found
        return step_ops(self.shape, rows, self.precision, self.tp)

    def step(self, rows: Rows) -> StepCost:
        """Return the cost of one step. 32 rows take some 5 us once their number of tokens was seen before."""
        if self.mode != "corrected":
            total = Tally()
            for op in self.ops(rows):
                total.add(self.op_cost(op), op.count)
            return self._result(total, rows)
        if rows.layers is None:
            logits = len(rows.query) if rows.logits is None else rows.logits
            total = self._whole(sum(rows.query), sum(rows.kv), rows.total_pairs(), logits, rows.experts)
            return self._result(total, rows)
        total = Tally()
        for part in segments(rows, self.shape.num_layers):
            self._add_segment(total, part.start, part.stop, part.rows)
        total.add_tally(self._edge(entering(rows), 0), 1)
        total.add_tally(self._edge(0, leaving(rows, self.shape.num_layers)), 1)
        return self._result(total, rows)

    def seconds(self, tokens: int, kv: int, pairs: float, logits: int) -> float:
        """Return ``step(rows).seconds`` from the sums over rows that it depends on: new tokens, tokens seen, query-key
        pairs, scored tokens. Mode ``corrected``, every layer, uniform routing."""
        return self._whole(tokens, kv, pairs, logits, None).seconds + (self.efficiency.step if tokens else 0.0)

    def _whole(self, tokens: int, kv: int, pairs: float, logits: int, experts: float | None) -> Tally:
        """The sum over a step whose rows pass all layers."""
        key = (tokens, logits, experts)
        base = self._bases.get(key)
        if base is None:
            if len(self._bases) >= REMEMBERED:
                self._bases.clear()
            base = self._bases[key] = self._without_attention(*key)
        return self._with_attention(base, tokens, kv, pairs) if tokens else base

    def _without_attention(self, tokens: int, logits: int, experts: float | None) -> Tally:
        total, layers = Tally(), self.shape.num_layers
        moe = self.shape.moe_layers(0, layers)
        if tokens and moe < layers:
            total.add_tally(self._block(tokens, False, None), layers - moe)
        if tokens and moe:
            total.add_tally(self._block(tokens, True, experts), moe)
        total.add_tally(self._edge(tokens, 0), 1)
        total.add_tally(self._edge(0, logits), 1)
        return total

    def _with_attention(self, base: Tally, tokens: int, kv: int, pairs: float) -> Tally:
        """`base` and the attention of all layers: `op_cost` of `AttentionRates.op`, written out because every simulated
        step comes by here."""
        rates, layers, power = self._attention, self.shape.num_layers, self._attention_power
        flops = pairs * rates.flops_per_pair
        moved = tokens * (rates.bytes_per_token_in + rates.bytes_per_token_out) + kv * rates.bytes_per_kv
        compute, memory = flops / power.flops_per_second, moved / power.bytes_per_second
        launch = self._launch["attention"]
        seconds = launch + (compute if compute > memory else memory)
        dynamic = min(flops * power.joules_per_flop + moved * self._per_byte, power.watts * seconds)
        by_compute = compute > memory
        return Tally(
            base.seconds + layers * seconds, base.flops + layers * flops, base.bytes + layers * moved, base.link_bytes,
            base.joules + layers * (dynamic + self.static_watts * seconds),
            base.compute + (layers * compute if by_compute else 0.0), base.memory + (0.0 if by_compute else layers * memory),
            base.launch + layers * launch, base.link,
        )  # fmt: skip

    def pause(self, rows: Rows) -> float:
        """Return the seconds of a step outside of its kernels."""
        return self.efficiency.step if rows.query else 0.0

    def _result(self, total: Tally, rows: Rows) -> StepCost:
        pause = self.pause(rows)
        bound = _bound(total.compute, total.memory, total.launch + pause, total.link)
        joules = total.joules + pause * self.static_watts
        n = self.tp
        return StepCost(
            total.seconds + pause, n * total.flops, n * total.bytes, n * total.link_bytes, n * joules, bound, self, rows
        )

    def _add_segment(self, total: Tally, start: int, stop: int, rows: Rows) -> None:
        count = stop - start
        tokens = sum(rows.query)
        moe = self.shape.moe_layers(start, stop)
        if moe < count:
            total.add_tally(self._block(tokens, False, None), count - moe)
        if moe:
            total.add_tally(self._block(tokens, True, rows.experts), moe)
        total.add(self.op_cost(self._attention.op(tokens, sum(rows.kv), rows.total_pairs())), count)

    def _block(self, tokens: int, moe: bool, experts: float | None) -> Tally:
        """Return one layer without its attention, remembered per number of tokens."""
        key = (tokens, moe, experts)
        found = self._blocks.get(key)
        if found is None:
            if len(self._blocks) >= REMEMBERED:
                self._blocks.clear()
            found = self._sum(block_ops(self.shape, tokens, self.precision, self.tp, moe, experts))
            self._blocks[key] = found
        return found

    def _edge(self, entering: int, leaving: int) -> Tally:
        key = (entering, leaving)
        found = self._edges.get(key)
        if found is None:
            found = self._sum(edge_ops(self.shape, entering, leaving, self.precision, self.tp))
            self._edges[key] = found
        return found

    def _sum(self, found: Iterable[Op]) -> Tally:
        total = Tally()
        for op in found:
            total.add(self.op_cost(op), op.count)
        return total

    def layer_seconds(self, rows: Rows, layer: int | None = None) -> LayerSeconds:
        """Return the seconds of one layer (the last one by default): linears with their norms, and attention."""
        if self.mode != "corrected":
            raise RooflineError(f"layer_seconds needs mode 'corrected', this model runs in {self.mode!r}")
        layer = self.shape.num_layers - 1 if layer is None else layer
        attention = self.op_cost(self._attention.op(rows.tokens, sum(rows.kv), rows.total_pairs())).seconds
        moe = self.shape.is_moe(layer)
        return LayerSeconds(self._block(rows.tokens, moe, rows.experts if moe else None).seconds, attention)

    def around_attention(self, tokens: int, layer: int, experts: float | None = None) -> AroundAttention:
        """Return the seconds of one layer's ops on both sides of its attention, for ``tokens`` new tokens."""
        key = (tokens, self.shape.is_moe(layer), experts)
        found = self._around.get(key)
        if found is None:
            if len(self._around) >= REMEMBERED:
                self._around.clear()
            ops = block_ops(self.shape, tokens, self.precision, self.tp, key[1], experts)
            at = next(i for i, op in enumerate(ops) if op.name in ("o_proj", "absorb_v"))
            found = self._around[key] = AroundAttention(self._sum(ops[:at]).seconds, self._sum(ops[at:]).seconds)
        return found

    def attention_seconds(self, rows: Rows) -> float:
        """Return the seconds of one layer's attention over ``rows`` (0 for none)."""
        if not rows.query:
            return 0.0
        return self.op_cost(self._attention.op(rows.tokens, sum(rows.kv), rows.total_pairs())).seconds

    def edge_seconds(self, entering: int, leaving: int) -> float:
        """Return the seconds of the embedding of ``entering`` tokens and of the scores of ``leaving`` ones."""
        return self._edge(entering, 0).seconds + self._edge(0, leaving).seconds

    def collective_seconds(self, tokens: int) -> float:
        """Return the seconds in which a layer's parts are added up over the devices of the group (0 for one device)."""
        if self.tp == 1 or not tokens:
            return 0.0
        ops = block_ops(self.shape, tokens, self.precision, self.tp)
        return sum(self.op_cost(op).seconds for op in ops if op.kind == "collective")

    def layer_weight_bytes(self, layer: int) -> float:
        """Return the bytes of one layer's weights on one device of the group, all its experts included."""
        experts = float(self.shape.num_experts) if self.shape.is_moe(layer) else None
        ops = block_ops(self.shape, 1, self.precision, self.tp, self.shape.is_moe(layer), experts)
        return sum(op.bytes_weight * op.count for op in ops)

    def transfer_seconds(self, num_bytes: float, link: str = "host") -> float:
        """Return the seconds to move ``num_bytes`` over one of the device's links (``host``, ``peer``, ``net``)."""
        return transfer_seconds(num_bytes, self.hardware.link(link))

    def copy_seconds(self, num_bytes: float) -> float:
        """Return the seconds of a copy within the device's memory: read and written."""
        return self.efficiency.launch + 2 * num_bytes / self._memory["elementwise"]

    def kv_bytes(self, tokens: int) -> float:
        """Return the cache bytes of ``tokens`` tokens over all layers, on all devices of the group together."""
        return tokens * self.shape.num_layers * self.shape.kv_elements * self.precision.kv_bytes


def transfer_seconds(num_bytes: float, link: Link) -> float:
    """Return the seconds that moving ``num_bytes`` over ``link`` takes."""
    return link.seconds(num_bytes)


def turning_rows(
    columns: float, depth: float, precision: Precision, hardware: Hardware, efficiency: Efficiency | None = None
) -> float:
    """Return the rows from which a ``depth x columns`` linear is bound by compute (infinity if it never is).

    Follows from 2 m n k / P = ((k + n) m b_a + k n b_w) / B. For large matrices it tends to
    :func:`turning_rows_limit`. Without ``efficiency`` the data sheet's rates are taken.
    """
    eff = efficiency or Efficiency.ideal()
    ridge = hardware.ridge(precision.linear_format) * eff.linear_compute / eff.linear_memory
    room = 2 * columns * depth - ridge * (columns + depth) * precision.act_bytes
    return ridge * columns * depth * precision.weight_bytes / room if room > 0 else float("inf")


def turning_rows_limit(precision: Precision, hardware: Hardware) -> float:
    """Return the rows at which reading the weights alone takes as long as multiplying: ridge x weight bytes / 2."""
    return hardware.ridge(precision.linear_format) * precision.weight_bytes / 2
