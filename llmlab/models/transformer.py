"""The ragged transformer, written once for all families: what differs between them lies in `ModelShape`.

Tokens of all rows lie one behind the other, [T, hidden_size]; the rows, their block tables and lengths
are in `AttentionMetadata`. Any span of layers can run alone, so a model can be cut between devices or
steps. The operations are those of `llmlab.kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.kernels.dispatch import (
    ChainEnds,
    Common,
    ExpertsImpl,
    GreedyChain,
    Kernels,
    KVCaches,
    LayerParts,
    LayerProgram,
    LinearImpl,
    Rotations,
)
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.model_shape import ModelShape
from llmlab.models.rope import RopeTable, Rotation


@dataclass(frozen=True, slots=True)
class DenseMLP:
    gate_up: LinearImpl
    down: LinearImpl


@dataclass(frozen=True, slots=True)
class MoEMLP:
    router: LinearImpl
    experts: ExpertsImpl


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer, packed for the kernels, and what the shape says of it."""

    attn_norm: Tensor
    qkv: LinearImpl
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: LinearImpl
    post_attn_norm: Tensor | None
    mlp_norm: Tensor
    mlp: DenseMLP | MoEMLP
    post_mlp_norm: Tensor | None
    window: int | None
    rope: int


Hold = Callable[[int, Callable[[int], Layer]], Sequence[Layer]]


def held_in_memory(num_layers: int, make: Callable[[int], Layer]) -> Sequence[Layer]:
    """All layers, made at once and kept."""
    return [make(index) for index in range(num_layers)]


class Transformer:
    """A decoder over ragged batches and paged KV.

    `weights`: the tensors of `llmlab.models.weights.weight_shapes(shape)`, all of one dtype on one
    device; each is read once, so a lazy mapping keeps the peak of memory at one tensor.
    `hold(num_layers, make)`: who keeps the layers; by default all are made at once.
    `max_model_len`: positions that the rotary tables cover.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Mapping[str, Tensor],
        kernels: Kernels,
        max_model_len: int | None = None,
        hold: Hold = held_in_memory,
    ) -> None:
        self.shape, self.kernels = shape, kernels
        self.max_model_len = max_model_len or shape.max_position
        self._embedding = weights["embed"]
        self.dtype, self.device = self._embedding.dtype, self._embedding.device
        self._embedding_scale = float(torch.tensor(shape.embedding_scale, dtype=self.dtype))
        self._final_norm = self._norm(weights["final_norm"])
        self._lm_head = kernels.linear(self._embedding if shape.tie_word_embeddings else weights["lm_head"])
        self._ropes = [RopeTable(rope, self.max_model_len, self.device) for rope in shape.ropes]
        self._heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        self.layers = hold(shape.num_layers, lambda index: self._layer(index, weights))

    def _norm(self, weight: Tensor) -> Tensor:
        """Fold the offset into the weight, in float32: w - 1 has more bits than w has in bfloat16."""
        offset = self.shape.norm_offset
        return weight.float() + offset if offset else weight

    def _layer(self, index: int, weights: Mapping[str, Tensor]) -> Layer:
        shape, prefix = self.shape, f"layers.{index}."

        def norm(name: str, present: bool = True) -> Tensor | None:
            return self._norm(weights[prefix + name]) if present else None

        def linear(name: str, bias: bool) -> LinearImpl:
            name = prefix + name
            return self.kernels.linear(weights[name + ".weight"], weights[name + ".bias"] if bias else None)

        def mlp() -> DenseMLP | MoEMLP:
            if shape.is_moe(index):
                tensors = (weights[prefix + "experts.gate_up"], weights[prefix + "experts.down"])
                return MoEMLP(linear("router", False), self.kernels.experts(*tensors))
            return DenseMLP(linear("gate_up", shape.mlp_bias), linear("down", shape.mlp_bias))

        return Layer(
            attn_norm=self._norm(weights[prefix + "attn_norm"]),
            qkv=linear("qkv", shape.qkv_bias),
            q_norm=norm("q_norm", shape.qk_norm),
            k_norm=norm("k_norm", shape.qk_norm),
            output=linear("output", shape.output_bias),
            post_attn_norm=norm("post_attn_norm", shape.post_norms),
            mlp_norm=self._norm(weights[prefix + "mlp_norm"]),
            mlp=mlp(),
            post_mlp_norm=norm("post_mlp_norm", shape.post_norms),
            window=shape.layer_windows[index] or None,
            rope=shape.layer_ropes[index],
        )

    @functools.cached_property
    def _plain(self) -> tuple[list[LayerParts], Common] | None:
        """All layers and what they share, if they are plain."""
        shape = self.shape
        if not isinstance(self.layers, list) or shape.post_norms or any(map(shape.is_moe, range(shape.num_layers))):
            return None
        parts = [
            LayerParts(
                *(layer.attn_norm, layer.qkv, layer.q_norm, layer.k_norm, layer.output, layer.mlp_norm),
                *(layer.mlp.gate_up, layer.mlp.down, layer.window, layer.rope),
            )
            for layer in self.layers
            if isinstance(layer.mlp, DenseMLP)
        ]
        rotations = tuple(Rotations(rope.cos, rope.sin) for rope in self._ropes)
        common = Common(
            *(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rms_norm_eps, shape.activation),
            *(shape.query_scale, shape.attn_softcap, rotations),
        )
        return parts, common

    @functools.cached_property
    def _program(self) -> LayerProgram | None:
        """All layers as one call, if they are plain and the kernels can."""
        return None if self._plain is None else self.kernels.program(*self._plain)

    @functools.cached_property
    def _chain(self) -> GreedyChain | None:
        """Many tokens as one call, if the layers are plain and the kernels can."""
        if self._plain is None or self.shape.final_softcap is not None:
            return None
        ends = ChainEnds(self._embedding, self._embedding_scale, self._final_norm, self._lm_head, self.shape.rms_norm_eps)
        return self.kernels.chain(*self._plain, ends)

    def chain(self, kv_caches: KVCaches) -> GreedyChain | None:
        """What continues texts greedily in one call, on these caches; None: go token by token, with the same results."""
        chain = self._chain
        return chain if chain is not None and chain.fits(kv_caches) else None

    def embed(self, input_ids: Tensor) -> Tensor:
        """`input_ids [T]` (int32 or int64) to the hidden states before layer 0, [T, hidden_size]."""
        hidden = F.embedding(input_ids, self._embedding)
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        meta: AttentionMetadata,
        kv_caches: KVCaches,
        layers: range | None = None,
    ) -> Tensor:
        """Run `layers` (all by default) and return the hidden states behind them, [T, hidden_size], in the
        dtype of `hidden` or in float32.

        `hidden [T, hidden_size]` is used up: it may be overwritten. `positions [T]` int. `kv_caches[i]`:
        k and v of layer i, each [num_blocks, num_kv_heads, block_size, head_dim], written at
        `meta.slot_mapping` before they are read.
        """
        span = range(self.shape.num_layers) if layers is None else layers
        program = self._program
        windowed = meta.tree is not None and any(self.shape.layer_windows)  # attended to by depth, not by slot
        if program is not None and span.step == 1 and not windowed and program.fits(kv_caches):
            return program.run(hidden, positions, meta, span)
        rotations = [rope.at(positions) for rope in self._ropes]
        for i in span:
            layer = self.layers[i]
            k_cache, v_cache = kv_caches[i]
            hidden = self._attention(layer, hidden, rotations[layer.rope], meta, k_cache, v_cache)
            hidden = self._mlp(layer, hidden)
        return hidden

    def _attention(
        self,
        layer: Layer,
        hidden: Tensor,
        rotation: Rotation,
        meta: AttentionMetadata,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        heads = self.project(layer, hidden)
        q = self.rotate(layer, heads, rotation, k_cache, v_cache, meta.slot_mapping)
        out = self.attend(layer, self.kernels, q, k_cache, v_cache, meta)
        return self._join(out.reshape(len(out), -1), layer.output, layer.post_attn_norm, hidden)

    # ------------------------------------------------------------------ a layer in parts, for who runs them apart
    def rotations(self, positions: Tensor) -> list[Rotation]:
        """By `Layer.rope`, for `positions [T]`."""
        return [rope.at(positions) for rope in self._ropes]

    def project(self, layer: Layer, hidden: Tensor) -> Tensor:
        """Queries, keys and values of `hidden [T, hidden_size]` before rotation, [T, heads, head_dim]."""
        qkv = self.kernels.norm_linear(hidden, layer.attn_norm, self.shape.rms_norm_eps, layer.qkv)
        return qkv.view(hidden.shape[0], -1, self.shape.head_dim)

    def rotate(
        self, layer: Layer, heads: Tensor, rotation: Rotation, k_cache: Tensor, v_cache: Tensor, slots: Tensor
    ) -> Tensor:
        """Rotated queries of `heads` (given up), whose keys and values go into the cache at `slots [T]`."""
        q, k, v = torch.split(heads, self._heads, 1)
        return self.kernels.rope_store(
            q,
            k,
            v,
            rotation.cos,
            rotation.sin,
            k_cache,
            v_cache,
            slots,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self.shape.rms_norm_eps,
        )

    def attend(
        self,
        layer: Layer,
        kernels: Kernels,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
    ) -> Tensor:
        """Attention of rotated queries over a cache, by any kernels: [T, num_heads, head_dim]."""
        shape = self.shape
        return kernels.paged_attention(
            q, k_cache, v_cache, meta, shape.query_scale, layer.window, shape.attn_softcap
        ).out

    def after_attention(self, layer: Layer, out: Tensor, hidden: Tensor) -> Tensor:
        """The rest of a layer: `out [T, num_heads, head_dim]` joins the residual stream, and the feed-forward part. Both
        are given up."""
        joined = self._join(out.reshape(len(out), -1), layer.output, layer.post_attn_norm, hidden)
        return self._mlp(layer, joined)

    def _mlp(self, layer: Layer, hidden: Tensor) -> Tensor:
        shape, kernels, mlp = self.shape, self.kernels, layer.mlp
        if isinstance(mlp, DenseMLP):
            inner = kernels.gated_mlp(
                hidden, mlp.gate_up, shape.activation, layer.mlp_norm, shape.rms_norm_eps
            )
            return self._join(inner, mlp.down, layer.post_mlp_norm, hidden)
        x = kernels.rms_norm(hidden, layer.mlp_norm, shape.rms_norm_eps)
        return hidden + mlp.experts(x, mlp.router(x), shape.top_k, shape.renormalize, shape.activation)

    def _join(self, x: Tensor, linear: LinearImpl, post_norm: Tensor | None, hidden: Tensor) -> Tensor:
        """Add a sublayer's output to the residual stream."""
        if post_norm is None:
            return self.kernels.linear_add(x, linear, hidden)
        return hidden + self.kernels.rms_norm(linear(x), post_norm, self.shape.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [n, vocab_size] float32, for hidden states behind the last layer [n, d]."""
        scores = self.kernels.norm_linear(
            hidden, self._final_norm, self.shape.rms_norm_eps, self._lm_head
        ).float()
        cap = self.shape.final_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)
