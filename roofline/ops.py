"""The op list: what a ragged batch makes one device of a (tensor-parallel) group compute and move.

``block_ops`` needs only the number of tokens, ``AttentionRates`` only sums over rows, ``edge_ops`` only the tokens that
enter and leave. ``step_ops`` puts them together for any batch; the cost model adds the same three up in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from roofline.errors import RooflineError
from roofline.precision import Precision
from roofline.rows import Rows, entering, leaving, segments
from roofline.shapes import Shape

NORM_FLOPS = 8  # per element: add the residual, square, sum, scale by the root and by the weight
ROPE_FLOPS = 3  # per element: two products and one sum
SILU_FLOPS = 5  # per element: exp, add, divide, and two products (gate and up)
SOFTMAX_FLOPS = 5  # per score: maximum, subtract, exp, sum, divide


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel. All amounts are for one execution on one device; ``count`` says how often a step runs it.

    ``rows x columns x depth`` (and ``groups`` of them) is the shape of a matrix product, 0 for other kinds.
    ``dtype`` is the format in which it multiplies. ``bytes_link`` crosses the link between devices.
    """

    name: str
    kind: str
    flops: float
    bytes_weight: float = 0.0
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    bytes_kv_in: float = 0.0
    bytes_kv_out: float = 0.0
    bytes_link: float = 0.0
    dtype: str = "fp32"
    rows: float = 0
    columns: float = 0
    depth: float = 0
    groups: float = 1
    count: int = 1
    first_layer: int = -1

    @property
    def bytes(self) -> float:
        """Bytes moved to and from main memory by one execution."""
        return self.bytes_weight + self.bytes_in + self.bytes_out + self.bytes_kv_in + self.bytes_kv_out

    @property
    def intensity(self) -> float:
        """Operations per byte of main memory."""
        return self.flops / self.bytes if self.bytes else 0.0


def linear(name: str, rows: float, columns: float, depth: float, precision: Precision, groups: float = 1) -> Op:
    """Return ``groups`` products of a ``rows x depth`` activation with a ``depth x columns`` weight."""
    act = precision.act_bytes * groups * rows
    weights = precision.weight_bytes * groups * columns * depth
    return Op(
        name, "linear", 2.0 * groups * rows * columns * depth, bytes_weight=weights, bytes_in=act * depth,
        bytes_out=act * columns, dtype=precision.linear_format, rows=rows, columns=columns, depth=depth, groups=groups,
    )  # fmt: skip


def elementwise(name: str, flops: float, read: float, write: float, precision: Precision, kv: float = 0.0) -> Op:
    """Return a pass over ``read`` and ``write`` activation elements that also stores ``kv`` cache elements."""
    act = precision.act_bytes
    return Op(
        name, "elementwise", flops, bytes_in=read * act, bytes_out=write * act, bytes_kv_out=kv * precision.kv_bytes
    )


def all_reduce(name: str, elements: float, precision: Precision, tp: int) -> Op:
    """Return a ring all-reduce: each device sends 2 (p - 1) / p of the data (Patarasuk and Yuan, 2009)."""
    return Op(name, "collective", 0.0, bytes_link=2 * (tp - 1) / tp * elements * precision.act_bytes)


def distinct_experts(shape: Shape, tokens: int) -> float:
    """Return the expected number of experts that ``tokens`` touch if each picks its ``top_k`` uniformly."""
    total = shape.num_experts
    return total * (1 - (1 - shape.top_k / total) ** tokens)


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a layer that one of ``tp`` devices holds; heads that do not divide are rounded up."""

    heads: int
    kv_heads: int
    width: int
    moe_width: int
    vocab: int

    @classmethod
    def of(cls, shape: Shape, tp: int) -> Slice:
        """Return the slice for ``tp`` devices; more devices than query heads raise."""
        if not 1 <= tp <= shape.num_heads:
            raise RooflineError(f"tp must lie in 1..{shape.num_heads} (the query heads of {shape.name}), got {tp}")
        parts = (shape.num_heads, shape.num_kv_heads, shape.intermediate_size, shape.moe_intermediate_size)
        heads, kv, width, moe = (ceil(part / tp) for part in parts)
        return cls(heads, kv, width, moe, ceil(shape.vocab_size / tp))


def block_ops(
    shape: Shape, tokens: int, precision: Precision, tp: int = 1, moe: bool = False, experts: float | None = None
) -> list[Op]:
    """Return the ops of one layer apart from attention itself: they depend on the number of tokens alone."""
    part, d = Slice.of(shape, tp), shape.hidden_size
    norm = elementwise("attn_norm", NORM_FLOPS * tokens * d, 2 * tokens * d, 2 * tokens * d, precision)
    projections = _latent_projections if shape.latent else _projections
    found = [norm, *projections(shape, part, tokens, precision)]
    found += [all_reduce("attn_all_reduce", tokens * d, precision, tp)] if tp > 1 else []
    found.append(replace(norm, name="mlp_norm"))
    if moe:
        found += _expert_mlp(shape, part, tokens, precision, experts)
    else:
        found += _mlp(shape, part.width, tokens, precision, "")
    return found + ([all_reduce("mlp_all_reduce", tokens * d, precision, tp)] if tp > 1 else [])


def _projections(shape: Shape, part: Slice, tokens: int, precision: Precision) -> list[Op]:
    q, kv, d = part.heads * shape.head_dim, 2 * part.kv_heads * shape.head_dim, shape.hidden_size
    turned = q + kv // 2
    flops = (0 if shape.positions else ROPE_FLOPS) + (NORM_FLOPS if shape.qk_norm else 0)
    return [
        linear("qkv_proj", tokens, q + kv, d, precision),
        elementwise("rope_kv_write", flops * tokens * turned, tokens * (q + kv), tokens * q, precision, tokens * kv),
        linear("o_proj", tokens, d, q, precision),
    ]


def _latent_projections(shape: Shape, part: Slice, tokens: int, precision: Precision) -> list[Op]:
    """Multi-head latent attention: queries are taken into the latent space, results out of it, head by head."""
    d, h, rank, rope = shape.hidden_size, shape.head_dim, shape.kv_lora_rank, shape.rope_head_dim
    q, kv = part.heads * (h + rope), shape.kv_elements
    turned = tokens * rope * (part.heads + 1)
    return [
        linear("q_proj", tokens, q, d, precision),
        linear("kv_a_proj", tokens, kv, d, precision),
        elementwise("rope_kv_write", ROPE_FLOPS * turned + NORM_FLOPS * tokens * rank, tokens * (q + kv), tokens * q,
                    precision, tokens * kv),
        linear("absorb_k", tokens, rank, h, precision, groups=part.heads),
        linear("absorb_v", tokens, h, rank, precision, groups=part.heads),
        linear("o_proj", tokens, d, part.heads * h, precision),
    ]  # fmt: skip


def _mlp(shape: Shape, width: int, tokens: float, precision: Precision, prefix: str, groups: float = 1) -> list[Op]:
    """A feed-forward block of ``groups`` equal parts, each over ``tokens`` rows."""
    inner, d, each = (2 if shape.gated else 1) * width, shape.hidden_size, tokens * groups
    up = "gate_up_proj" if shape.gated else "up_proj"
    flops = (SILU_FLOPS if shape.gated else 1) * each * width
    return [
        linear(prefix + up, tokens, inner, d, precision, groups),
        elementwise(prefix + "act", flops, each * inner, each * width, precision),
        linear(prefix + "down_proj", tokens, d, width, precision, groups),
    ]


def _expert_mlp(shape: Shape, part: Slice, tokens: int, precision: Precision, experts: float | None) -> list[Op]:
    touched = min(distinct_experts(shape, tokens) if experts is None else experts, shape.num_experts)
    touched = max(touched, 1.0)
    d, sent = shape.hidden_size, tokens * shape.top_k
    found = [linear("router", tokens, shape.num_experts, d, precision)]
    found += _mlp(shape, part.moe_width, sent / touched, precision, "expert_", touched)
    if shape.num_shared_experts:
        found += _mlp(shape, shape.num_shared_experts * part.moe_width, tokens, precision, "shared_")
    return [*found, elementwise("combine", 2.0 * sent * d, sent * d, tokens * d, precision)]


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """Attention of one layer per unit of its sums: a closed form that the op list and the cost model share."""

    flops_per_pair: float
    bytes_per_token_in: float
    bytes_per_token_out: float
    bytes_per_kv: float
    dtype: str

    @classmethod
    def of(cls, shape: Shape, precision: Precision, tp: int = 1) -> AttentionRates:
        """Return the rates for one of ``tp`` devices; a latent cache is held whole by each."""
        part = Slice.of(shape, tp)
        if shape.latent:
            score, value, kv = shape.kv_elements, shape.kv_lora_rank, shape.kv_elements
        else:
            score = value = shape.head_dim
            kv = 2 * part.kv_heads * shape.head_dim
        per_pair = part.heads * (2 * score + 2 * value + SOFTMAX_FLOPS)
        act = part.heads * precision.act_bytes
        return cls(per_pair, score * act, value * act, kv * precision.kv_bytes, precision.attention_format)

    def op(self, tokens: float, kv: float, pairs: float) -> Op:
        """Return the fused attention kernel of a batch with these sums: every row's cache is read once."""
        return Op(
            "attention", "attention", pairs * self.flops_per_pair, bytes_in=tokens * self.bytes_per_token_in,
            bytes_out=tokens * self.bytes_per_token_out, bytes_kv_in=kv * self.bytes_per_kv, dtype=self.dtype,
        )  # fmt: skip


def edge_ops(shape: Shape, entering: int, leaving: int, precision: Precision, tp: int = 1) -> list[Op]:
    """Return embedding (for the tokens that enter) and last norm, head and sampling (for those that leave)."""
    part, d, found = Slice.of(shape, tp), shape.hidden_size, []
    precision = precision.edge
    if entering:
        tables = (2 if shape.positions else 1) * entering * d * precision.weight_bytes
        found.append(
            Op("embedding", "elementwise", 0.0, bytes_weight=tables, bytes_out=entering * d * precision.act_bytes)
        )
    if leaving:
        n, scores = leaving, 4.0 * leaving * part.vocab
        found.append(elementwise("final_norm", NORM_FLOPS * n * d, 2 * n * d, n * d, precision))
        head = linear("lm_head", n, part.vocab, d, precision)
        found.append(replace(head, bytes_out=scores))  # scores are kept in 32 bits for sampling
        found.append(Op("sampling", "elementwise", SOFTMAX_FLOPS * n * part.vocab, bytes_in=scores))
    return found


def step_ops(shape: Shape, rows: Rows, precision: Precision | str = "fp16", tp: int = 1) -> tuple[Op, ...]:
    """Return every op of a step over ``rows`` on one of ``tp`` devices, in order of execution.

    Layers that do the same work appear once with ``count``. Rows with different layer spans cut the model into
    segments, each with its own ops.
    """
    precision = Precision.parse(precision)
    found = edge_ops(shape, entering(rows), 0, precision, tp)
    rates = AttentionRates.of(shape, precision, tp)
    for part in segments(rows, shape.num_layers):
        batch = part.rows
        attention = rates.op(batch.tokens, sum(batch.kv), batch.total_pairs())
        moe = shape.moe_layers(part.start, part.stop)
        dense = part.stop - part.start - moe
        for count, kind, first in ((dense, False, part.start), (moe, True, part.stop - moe)):
            if count:
                layer = block_ops(shape, batch.tokens, precision, tp, kind, rows.experts)
                at = next(i for i, op in enumerate(layer) if op.name in ("o_proj", "absorb_v"))
                layer.insert(at, attention)
                found += [replace(op, count=count, first_layer=first) for op in layer]
    return (*found, *edge_ops(shape, 0, leaving(rows, shape.num_layers), precision, tp))
