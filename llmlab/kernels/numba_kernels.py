"""The fast kernel set for CPUs: packed linear layers, paged attention and row kernels, all on one team.

What a compiled kernel does not cover (odd head sizes, other dtypes) goes to the reference, call by call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.attention_plan import AttnPlan, plan_attention
from llmlab.kernels.chain import Chain
from llmlab.kernels.dispatch import (
    BaseKernels,
    ChainEnds,
    Common,
    ExpertsImpl,
    GreedyChain,
    LayerParts,
    LayerProgram,
    LinearImpl,
)
from llmlab.kernels.layout import AttentionMetadata, AttentionState, KernelChoice
from llmlab.kernels.linear import PLAIN, PackedLinear, dense, gate_rows
from llmlab.kernels.moe import PackedExperts
from llmlab.kernels.norm_rope import heads_dense, norm_rows, regular, rope_store_call
from llmlab.kernels.numba_attention import attention_call, check_blocks, quick_plan, supports
from llmlab.kernels.pool import Pool, openmp
from llmlab.kernels.program import Program
from llmlab.kernels.quant_linear import NarrowLinear
from llmlab.kernels.quantized import QuantizedTensor
from llmlab.kernels.vector import LANES, SHAPE
from llmlab.types import LabError


class NumbaKernels(BaseKernels):
    """See `dispatch.Kernels`. One thread of Python at a time; others may run, as the GIL is released."""

    name = "numba"

    def __init__(self, pool: Pool | None = None) -> None:
        self.pool = Pool() if pool is None else pool
        self._checked: tuple[Tensor, int] | None = None

    def linear(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> LinearImpl:
        if isinstance(weight, QuantizedTensor):
            return NarrowLinear(weight, bias, self.pool)
        return PackedLinear(weight, bias, self.pool)

    def experts(self, w_gate_up: Tensor | QuantizedTensor, w_down: Tensor | QuantizedTensor) -> ExpertsImpl:
        return PackedExperts(w_gate_up, w_down, self.pool)

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, lin: LinearImpl, weight_offset: float = 0.0
    ) -> Tensor:
        if not isinstance(lin, PackedLinear):
            return super().norm_linear(x, norm_weight, eps, lin, weight_offset)
        return lin.run(x, PLAIN, None, norm_weight, eps, weight_offset)

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        if not isinstance(lin, PackedLinear):
            return super().linear_add(x, lin, residual)
        return lin.run(x, PLAIN, residual)

    def gated_mlp(
        self,
        x: Tensor,
        lin_gate_up: LinearImpl,
        act: str = "silu",
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> Tensor:
        if not isinstance(lin_gate_up, PackedLinear):
            return super().gated_mlp(x, lin_gate_up, act, norm_weight, eps, weight_offset)
        return lin_gate_up.gated(x, act, norm_weight, eps, weight_offset)

    def plan(self, meta: AttentionMetadata, heads: int, group: int, window: int | None) -> AttnPlan:
        """The plan of the current step, made at its first use and shared by all layers."""
        threads = self.pool.num_threads
        key = ("attention", heads, group, window, threads)
        plan: AttnPlan | None = meta.derived.get(key)
        if plan is None:
            plan = quick_plan(self.pool, meta, heads, group, threads, window) or plan_attention(
                meta.cu_seqlens_q.numpy(),
                meta.seq_lens.numpy(),
                heads=heads,
                group=group,
                threads=threads,
                window=window,
                causal=meta.mask == "causal",
            )
            meta.derived[key] = plan
        return plan

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> AttentionState:
        (tokens, hq, dim), heads = q.shape, k_cache.shape[1]
        if hq % heads or k_cache.shape[3] != dim:
            raise LabError("q", tuple(q.shape), f"does not fit a KV cache of {tuple(k_cache.shape)}")
        if not supports(k_cache, v_cache) or (meta.tree is not None and sliding_window is not None):
            return reference.paged_attention(q, k_cache, v_cache, meta, scale, sliding_window, softcap)
        check_blocks(self.pool, meta, k_cache.shape[0], k_cache.shape[2])
        plan, x = self.plan(meta, heads, hq // heads, sliding_window), heads_dense(q)
        state = AttentionState(x.new_empty(tokens, hq, dim), x.new_empty(tokens, hq))
        self.pool.run(
            attention_call(self.pool, plan, state, x, k_cache, v_cache, meta, scale, sliding_window, softcap)
        )
        return state if x is q else AttentionState(state.out.to(q.dtype), state.lse)

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        none = k.new_empty(len(k), 0)
        self.rope_store(k[:, :0], k, v, none, none, k_cache, v_cache, slot_mapping)

    def rope_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> Tensor:
        if not regular(k_cache, v_cache):
            return reference.rope_store(
                *(q, k, v, cos, sin, k_cache, v_cache, slot_mapping),
                q_norm=q_norm,
                k_norm=k_norm,
                eps=eps,
                weight_offset=weight_offset,
            )
        self._check_slots(slot_mapping, k_cache.shape[0] * k_cache.shape[2])
        x, k, v, cos, sin = heads_dense(q), heads_dense(k), heads_dense(v), dense(cos), dense(sin)
        q_norm = None if q_norm is None else dense(q_norm)
        k_norm = None if k_norm is None else dense(k_norm)
        caches = k_cache, v_cache, slot_mapping
        self.pool.run(
            rope_store_call(self.pool, x, k, v, cos, sin, *caches, q_norm, k_norm, eps, weight_offset)
        )
        return x if x is q else x.to(q.dtype)

    def _check_slots(self, slots: Tensor, num_slots: int) -> None:
        """Refuse slots outside the cache; looked at once for all layers of a step."""
        if self._checked is not None and self._checked[0] is slots and self._checked[1] == num_slots:
            return
        if len(slots) and not -1 <= int(slots.min()) <= int(slots.max()) < num_slots:
            raise LabError("slot_mapping", slots.tolist(), f"names a slot outside a cache of {num_slots}")
        self._checked = slots, num_slots

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        out, _ = norm_rows(self.pool, dense(x), None, dense(weight), eps, weight_offset)
        return out.to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, total = norm_rows(self.pool, dense(x), dense(residual), dense(weight), eps, weight_offset)
        return out.to(x.dtype), total.to(x.dtype)

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor:
        return gate_rows(self.pool, gate_up, act).to(gate_up.dtype)

    def program(self, layers: Sequence[LayerParts], common: Common) -> LayerProgram | None:
        if common.head_dim % LANES or not all(map(_plain, layers)) or len(_dtypes(layers)) > 1:
            return None
        return Program(self.pool, self.plan, layers, common)

    def chain(self, layers: Sequence[LayerParts], common: Common, ends: ChainEnds) -> GreedyChain | None:
        program = self.program(layers, common)
        rounded = ends.scale != 1.0 and ends.embedding.dtype is not torch.float32  # embeddings that are scaled in narrow numbers
        if not isinstance(program, Program) or not isinstance(ends.head, PackedLinear) or rounded:
            return None
        return Chain(self.pool, program, ends)

    def describe(self) -> list[KernelChoice]:
        team = f"{openmp().library}, {self.pool.num_threads} threads"
        tile = f"{SHAPE.rows} x {SHAPE.vectors} vectors of {SHAPE.lanes} floats"
        return [
            KernelChoice(*row) for row in (("threads", team, _WHY_TEAM), ("tile", tile, _WHY_TILE), *_CHOICES)
        ]


def _plain(layer: LayerParts) -> bool:
    """Whether a program can hold the layer: packed weights, and gates that fill whole panels."""
    packed = all(
        isinstance(lin, PackedLinear) for lin in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )
    return packed and isinstance(layer.gate_up, PackedLinear) and layer.gate_up.gates_fuse


def _dtypes(layers: Sequence[LayerParts]) -> dict[torch.dtype, None]:
    """The dtypes of the packed weights."""
    linears = (lin for x in layers for lin in (x.qkv, x.output, x.gate_up, x.down))
    return dict.fromkeys(lin.panels.dtype for lin in linears if isinstance(lin, PackedLinear))


_WHY_TEAM = "two pools on the same cores fight: an idle one keeps spinning"
_WHY_TILE = "fills the vector registers of this CPU; found by llvmlite's host features"
_CHOICES = (
    (
        "linear",
        "numba, panels",
        "reads the weights once at the speed of memory for 1 row, beats torch at any",
    ),
    (
        "gated_mlp",
        "numba, in the linear",
        "norm before and activation behind the product cost no pass of their own",
    ),
    (
        "paged_attention",
        "numba, gathered tiles",
        "reads scattered blocks faster than torch reads contiguous KV",
    ),
    (
        "rope_store",
        "numba, one pass",
        "norm, rotation and KV write in one call instead of a dozen torch operators",
    ),
    (
        "program",
        "numba, one entry",
        "plain layers run as one call: a step enters Python once, not for every operation",
    ),
    (
        "chain",
        "numba, one entry",
        "all drafts of plain layers run as one call: Python is entered once, not for every token",
    ),
    ("rms_norm", "numba", "one call instead of five torch operators"),
    ("experts", "numba linears, torch routing", "each expert's tokens form one batch"),
    ("merge_states", "torch", "rare; not on the path of a token"),
    ("copy_blocks", "torch", "one gather and one scatter already run at the speed of memory"),
)
