"""The tensors of a transformer: their names and shapes here, and from which checkpoint tensors each is made.

A tensor of ours is one checkpoint tensor, several stacked by rows (q, k and v become `qkv`), or such
stacks of all experts. Checkpoints differ in what they store fused; the `Recipe`s of a tensor list the
ways, and the one whose tensors are there is taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.models.model_shape import ModelShape
from llmlab.types import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}
_SHORT |= {"float": "float32", "half": "float16"}


def to_dtype(name: str | torch.dtype, checkpoint: str = "float32") -> torch.dtype:
    """The torch dtype of "f32", "bf16", "f16", their long names, or "auto" (the checkpoint's)."""
    key = str(name).removeprefix("torch.")
    key = checkpoint if key == "auto" else _SHORT.get(key, key)
    if key not in DTYPES:
        way_out = f"Choose one of auto, {', '.join(DTYPES)} (or f32, bf16, f16)."
        raise ModelError("dtype", name, "unknown or unsupported dtype", way_out)
    return DTYPES[key]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a checkpoint: its name and the shape that the config promises."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make a tensor of ours: stack the parts by rows; with `experts`, in equal runs, one per expert."""

    style: str
    parts: tuple[Part, ...]
    experts: int = 0

    def targets(self, tensor: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Each part with the piece of our tensor (a view) that it fills."""
        run = len(self.parts) // self.experts if self.experts else len(self.parts)
        for e in range(self.experts or 1):
            row, whole = 0, tensor[e] if self.experts else tensor
            for part in self.parts[e * run : (e + 1) * run]:
                yield part, whole.narrow(0, row, part.shape[0])
                row += part.shape[0]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Shape of one of our tensors and the recipes for it, the most usual first."""

    shape: tuple[int, ...]
    recipes: tuple[Recipe, ...]

    def recipe(self, style: str) -> Recipe:
        """The recipe of that style, or the usual one."""
        return next((r for r in self.recipes if r.style == style), self.recipes[0])


def _single(name: str, *shape: int) -> Blueprint:
    return Blueprint(shape, (Recipe("split", (Part(name, shape),)),))


def _stacked(
    prefix: str, suffix: str, columns: tuple[int, ...], rows: dict[str, int], fused: str
) -> Blueprint:
    """Several projections in one matrix: stored one by one (`rows`: name to number of rows) or as `fused`."""
    shape = (sum(rows.values()), *columns)
    parts = tuple(Part(f"{prefix}{name}.{suffix}", (n, *columns)) for name, n in rows.items())
    whole = (Part(f"{prefix}{fused}.{suffix}", shape),)
    return Blueprint(shape, (Recipe("split", parts), Recipe("fused", whole)))


def _attention(shape: ModelShape, at: str) -> dict[str, Blueprint]:
    d, rows = (
        shape.hidden_size,
        {"q_proj": shape.query_size, "k_proj": shape.kv_size, "v_proj": shape.kv_size},
    )
    prefix = at + "self_attn."
    tensors = {"qkv.weight": _stacked(prefix, "weight", (d,), rows, "qkv_proj")}
    if shape.qkv_bias:
        tensors["qkv.bias"] = _stacked(prefix, "bias", (), rows, "qkv_proj")
    tensors["output.weight"] = _single(prefix + "o_proj.weight", d, shape.query_size)
    if shape.output_bias:
        tensors["output.bias"] = _single(prefix + "o_proj.bias", d)
    if shape.qk_norm:
        tensors |= {n: _single(f"{prefix}{n}.weight", shape.head_dim) for n in ("q_norm", "k_norm")}
    return tensors


def _dense_mlp(shape: ModelShape, at: str) -> dict[str, Blueprint]:
    d, ff, prefix = shape.hidden_size, shape.intermediate_size, at + "mlp."
    rows = {"gate_proj": ff, "up_proj": ff}
    tensors = {
        "gate_up.weight": _stacked(prefix, "weight", (d,), rows, "gate_up_proj"),
        "down.weight": _single(prefix + "down_proj.weight", d, ff),
    }
    if shape.mlp_bias:
        tensors["gate_up.bias"] = _stacked(prefix, "bias", (), rows, "gate_up_proj")
        tensors["down.bias"] = _single(prefix + "down_proj.bias", d)
    return tensors


def _expert_recipe(
    style: str, prefix: str, names: tuple[str, ...], experts: int, shape: tuple[int, ...]
) -> Recipe:
    parts = (Part(f"{prefix}experts.{e}.{n}.weight", shape) for e in range(experts) for n in names)
    return Recipe(style, tuple(parts), experts)


def _moe_mlp(shape: ModelShape, at: str) -> dict[str, Blueprint]:
    d, ff, count = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
    old, new = at + "block_sparse_moe.", at + "mlp."  # Mixtral's names, and everybody else's
    gate_up, down = (count, 2 * ff, d), (count, d, ff)
    router = tuple(
        Recipe(style, (Part(at_router + "gate.weight", (count, d)),))
        for style, at_router in (("split", new), ("mixtral", old))
    )
    return {
        "router.weight": Blueprint((count, d), router),
        "experts.gate_up": Blueprint(
            gate_up,
            (
                _expert_recipe("split", new, ("gate_proj", "up_proj"), count, (ff, d)),
                _expert_recipe("mixtral", old, ("w1", "w3"), count, (ff, d)),
                Recipe("stacked", (Part(new + "experts.gate_up_proj", gate_up),)),
            ),
        ),
        "experts.down": Blueprint(
            down,
            (
                _expert_recipe("split", new, ("down_proj",), count, (d, ff)),
                _expert_recipe("mixtral", old, ("w2",), count, (d, ff)),
                Recipe("stacked", (Part(new + "experts.down_proj", down),)),
            ),
        ),
    }


def _norms(shape: ModelShape, at: str) -> dict[str, Blueprint]:
    names = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if shape.post_norms:
        names |= {
            "post_attn_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        }
    return {ours: _single(f"{at}{theirs}.weight", shape.hidden_size) for ours, theirs in names.items()}


def blueprints(shape: ModelShape) -> dict[str, Blueprint]:
    """Every tensor of `Transformer` by name, in the order in which it reads them."""
    d, vocab = shape.hidden_size, shape.vocab_size
    tensors = {
        "embed": _single("model.embed_tokens.weight", vocab, d),
        "final_norm": _single("model.norm.weight", d),
    }
    if not shape.tie_word_embeddings:
        tensors["lm_head"] = _single("lm_head.weight", vocab, d)
    for i in range(shape.num_layers):
        at = f"model.layers.{i}."
        mlp = _moe_mlp(shape, at) if shape.is_moe(i) else _dense_mlp(shape, at)
        layer = _attention(shape, at) | mlp | _norms(shape, at)
        tensors |= {f"layers.{i}.{name}": blueprint for name, blueprint in layer.items()}
    return tensors


def weight_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `Transformer` reads. Linear weights are [out, in]."""
    return {name: blueprint.shape for name, blueprint in blueprints(shape).items()}


class RandomWeights(Mapping[str, Tensor]):
    """Weights drawn anew each time they are read: a function of (seed, name, shape, device kind) alone.

    Matrices and biases are normal with the standard deviation `std`; norms are 1. Drawn in float32 and
    rounded to `dtype`, so that the same seed gives the same model in every dtype.
    """

    def __init__(
        self,
        shape: ModelShape,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        std: float = 0.02,
    ) -> None:
        self._shapes, self._norm = weight_shapes(shape), 1.0 - shape.norm_offset
        self._seed, self._dtype, self._device, self._std = seed, dtype, torch.device(device), std

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm"):
            return torch.full(shape, self._norm, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        tensor = torch.empty(shape, dtype=torch.float32, device=self._device)
        return tensor.normal_(0.0, self._std, generator=generator).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
