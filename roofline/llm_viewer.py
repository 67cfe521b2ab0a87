"""The published formulas of LLM-Viewer (arXiv 2402.16363, code of July 2024), number for number.

For comparison and teaching: the formulas are kept with their known slips (``docs/roofline.md`` lists them). The tool
knows uniform batches only: B sequences of S tokens, either all in prefill or all in decode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from roofline.errors import RooflineError
from roofline.hardware import Hardware
from roofline.ops import Op
from roofline.precision import Precision
from roofline.rows import Rows
from roofline.shapes import Shape


@dataclass(frozen=True, slots=True)
class Uniform:
    """The tool's view of a batch: ``batch`` sequences of ``context`` tokens in one stage."""

    batch: int
    context: int
    decode: bool

    @classmethod
    def of(cls, rows: Rows) -> Uniform:
        """Recognise a uniform batch; anything else raises, for the tool has no formula for it."""
        contexts = set(rows.kv)
        if rows.layers is None and rows.pairs is None and len(contexts) == 1:
            context = rows.kv[0]
            if all(q == 1 for q in rows.query):
                return cls(len(rows), context, decode=True)
            if all(q == context for q in rows.query):
                return cls(len(rows), context, decode=False)
        raise RooflineError(
            "mode 'llm_viewer' knows batches of equal rows only, all prefill (query = kv) or all decode (query = 1); "
            "use mode 'corrected' for a ragged batch"
        )


def _op(
    name: str, kind: str, flops: float, weight: float = 0, read: float = 0, write: float = 0, kv_in: float = 0,
    kv_out: float = 0,
) -> Op:  # fmt: skip
    return Op(name, kind, float(flops), weight, read, write, kv_in, kv_out)


def _linears(shape: Shape, tokens: int, p: Precision) -> list[Op]:
    d, f = shape.hidden_size, shape.intermediate_size
    kv = d * shape.num_kv_heads // shape.num_heads  # the tool takes the head width to be d / heads
    sizes = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "out_proj": (d, d), "gate_proj": (d, f),
             "up_proj": (d, f), "down_proj": (f, d)}  # fmt: skip
    return [_linear(name, ic, oc, tokens, p) for name, (ic, oc) in sizes.items()]


def _linear(name: str, ic: int, oc: int, tokens: int, p: Precision) -> Op:
    to_cache = name in ("k_proj", "v_proj")
    stored = oc * tokens
    out, kv_out = (0, stored * p.kv_bytes) if to_cache else (stored * p.act_bytes, 0)
    read, weight = ic * tokens * p.act_bytes, ic * oc * p.weight_bytes
    return _op(name, "linear", 2 * ic * oc * tokens, weight, read, out, 0, kv_out)


def _attention(shape: Shape, u: Uniform, p: Precision) -> list[Op]:
    b, s, heads, kv_heads = u.batch, u.context, shape.num_heads, shape.num_kv_heads
    h = shape.hidden_size // heads
    q = 1 if u.decode else s
    cache = s * h * kv_heads * b * p.kv_bytes
    scores = q * s * heads * b * p.act_bytes
    # In prefill the tool loads the query with the key heads' count.
    query = h * heads * b * p.act_bytes if u.decode else s * h * kv_heads * b * p.act_bytes
    flops = 2 * q * s * h * heads * b
    return [
        _op("qk_matmul", "attention", flops, 0, query, scores, cache),
        _op("sv_matmul", "attention", flops, 0, scores, q * h * heads * b * p.act_bytes, cache),
        _op("softmax", "attention", 5 * b * heads * s * q, 0, scores, scores),
    ]


def _fused_attention(shape: Shape, u: Uniform, p: Precision, onchip: float) -> list[Op]:
    b, s, heads = u.batch, u.context, shape.num_heads
    h = shape.hidden_size // heads
    q = 1 if u.decode else s
    block = min(ceil(onchip / (p.kv_bytes * h)), h)
    passes = ceil(q / block)
    flops = (4 * q * s * h + 5 * q * s) * heads * b
    # The tool writes S scores per query where the kernel writes one head width, and loads a cache of H heads.
    written = 2 * q * s * b * heads * p.act_bytes
    read, cache = q * h * b * heads * p.act_bytes, passes * s * h * b * heads * p.kv_bytes * 2
    return [_op("fused_attention", "attention", flops, 0, read, written, cache)]


def _pointwise(shape: Shape, tokens: int, p: Precision) -> list[Op]:
    size = tokens * shape.hidden_size
    width = size * p.act_bytes
    norm = [_op(name, "elementwise", 7 * size, 0, width, width) for name in ("attn_norm", "mlp_norm")]
    add = [_op(name, "elementwise", size, 0, width, width) for name in ("attn_add", "mlp_add")]
    return [*norm, *add, _op("mlp_act", "elementwise", 2 * size, 0, 2 * width, width)]


def layer_ops(shape: Shape, rows: Rows, precision: Precision, hardware: Hardware, flash: bool = False) -> list[Op]:
    """Return the ops of one layer; ``flash`` takes the tool's fused attention in place of its three parts."""
    if shape.num_experts or shape.latent or not shape.gated:
        raise RooflineError(f"mode 'llm_viewer' has formulas for gated dense models only, not for {shape.name}")
    batch = Uniform.of(rows)
    tokens = batch.batch * (1 if batch.decode else batch.context)
    if flash:
        attention = _fused_attention(shape, batch, precision, hardware.onchip_bytes)
    else:
        attention = _attention(shape, batch, precision)
    return [*_linears(shape, tokens, precision), *attention, *_pointwise(shape, tokens, precision)]


def head_op(shape: Shape, batch: int, p: Precision) -> Op:
    """Return the vocabulary head as the tool counts it: one operation per weight, one row of activations."""
    d, vocab = shape.hidden_size, shape.vocab_size
    return _op("lm_head", "linear", batch * d * vocab, d * vocab * p.weight_bytes, d * p.act_bytes, vocab * p.act_bytes)


def step_ops(shape: Shape, rows: Rows, precision: Precision, hardware: Hardware, flash: bool = False) -> tuple[Op, ...]:
    """Return every op of a step: each layer's once with its count, then the head."""
    if not rows.query:
        return ()
    layer = layer_ops(shape, rows, precision, hardware, flash)
    repeated = [_repeat(op, shape.num_layers) for op in layer]
    return (*repeated, head_op(shape, len(rows), precision))


def _repeat(op: Op, count: int) -> Op:
    return Op(
        op.name, op.kind, op.flops, op.bytes_weight, op.bytes_in, op.bytes_out, op.bytes_kv_in, op.bytes_kv_out,
        count=count, first_layer=0,
    )  # fmt: skip


def compute_format(precision: Precision) -> str:
    """Return the unit the tool charges: the 8-bit one only if weights, activations and cache are all narrow."""
    narrow = max(precision.weight_bits, precision.act_bits, precision.kv_bits) <= 8
    return "int8" if narrow else "fp16"


@dataclass(frozen=True, slots=True)
class ViewerMemory:
    """Bytes as the tool counts them: embedding and head are left out."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of the three."""
        return self.weights + self.cache + self.activations


def memory(shape: Shape, batch: int, context: int, precision: Precision, hardware: Hardware) -> ViewerMemory:
    """Return the memory of ``batch`` sequences of ``context`` tokens, taken from the prefill op list."""
    layer = layer_ops(shape, Rows.prefill(*[context] * batch), precision, hardware)

    def total(values: Iterable[float]) -> float:
        return float(sum(values))

    return ViewerMemory(
        shape.num_layers * total(op.bytes_weight for op in layer),
        shape.num_layers * total(op.bytes_kv_out for op in layer),
        total(op.bytes_out for op in layer),
    )


def hardware_table() -> dict[str, Hardware]:
    """Return the tool's own device table, some of whose figures differ from the data sheets (H100: 3072 GB/s)."""
    source = "LLM-Viewer hardware table, July 2024"
    rows = (
        ("V100", 900e9, 112e12, 62e12, 20.48e6, 300), ("A6000", 768e9, 154.8e12, 309.7e12, 21.5e6, 300),
        ("A100", 1555e9, 312e12, 624e12, 27.65e6, 400), ("A100_80G", 2039e9, 312e12, 624e12, 27.65e6, 400),
        ("A800", 2039e9, 312e12, 624e12, 27.65e6, 400), ("A40", 696e9, 149.7e12, 299.3e12, 21.5e6, 300),
        ("H100", 3072e9, 989.5e12, 1979e12, 33.8e6, 700), ("H100_PCIe", 2048e9, 756.5e12, 1513e12, 29.2e6, 350),
        ("L40", 864e9, 181e12, 362e12, 36.4e6, 300), ("13900k", 89.6e9, 1.38e12, None, 36e6, 253),
    )  # fmt: skip
    found = {}
    for name, bandwidth, fp16, int8, onchip, tdp in rows:
        peak = {"fp16": fp16} | ({"int8": int8} if int8 else {})
        sources = {"bandwidth": source, "peak": source, "onchip_bytes": source, "tdp": "vendor's data sheet"}
        found[name] = Hardware(name, "gpu", 80e9, bandwidth, peak, 1, onchip, tdp, {}, sources)
    return found
