"""The fast kernel set for CPUs: packed linear layers, paged attention and row kernels, all on one team.

What a compiled kernel does not cover (odd head sizes, other dtypes) goes to the reference, call by call.
"""

from __future__ import annotations

from torch import Tensor

from llmlab.kernels import norm_rope, numba_attention, reference
from llmlab.kernels.attention_plan import AttnPlan, plan_attention
from llmlab.kernels.dispatch import BaseKernels, ExpertsImpl, LinearImpl
from llmlab.kernels.layout import AttentionMetadata, AttentionState, KernelChoice
from llmlab.kernels.linear import PackedLinear, dense, gate_rows
from llmlab.kernels.moe import PackedExperts
from llmlab.kernels.norm_rope import heads_dense
from llmlab.kernels.pool import Pool


class NumbaKernels(BaseKernels):
    """See `dispatch.Kernels`. One thread of Python at a time; others may run, as the GIL is released."""

    name = "numba"

    def __init__(self) -> None:
        self.pool = Pool()
        self._planned: AttentionMetadata | None = None
        self._plans: dict[tuple[int, int, int | None, int], AttnPlan] = {}

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearImpl:
        return PackedLinear(weight, bias, self.pool)

    def experts(self, w_gate_up: Tensor, w_down: Tensor) -> ExpertsImpl:
        return PackedExperts(w_gate_up, w_down, self.pool)

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, lin: LinearImpl, weight_offset: float = 0.0
    ) -> Tensor:
        if not isinstance(lin, PackedLinear):
            return super().norm_linear(x, norm_weight, eps, lin, weight_offset)
        return lin.run(x, norm_weight=norm_weight, eps=eps, weight_offset=weight_offset)

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        if not isinstance(lin, PackedLinear):
            return super().linear_add(x, lin, residual)
        return lin.run(x, residual=residual)

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
        if meta is not self._planned:
            self._planned, self._plans = meta, {}
        threads = self.pool.num_threads
        key = (heads, group, window, threads)
        if key not in self._plans:
            self._plans[key] = plan_attention(
                meta.cu_seqlens_q.numpy(),
                meta.seq_lens.numpy(),
                heads=heads,
                group=group,
                threads=threads,
                window=window,
                causal=meta.mask == "causal",
            )
        return self._plans[key]

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
        heads, dim = k_cache.shape[1], k_cache.shape[3]
        if not numba_attention.supports(dim, k_cache):
            return reference.paged_attention(q, k_cache, v_cache, meta, scale, sliding_window, softcap)
        plan, dtype = self.plan(meta, heads, q.shape[1] // heads, sliding_window), q.dtype
        state = numba_attention.paged_attention(
            self.pool, plan, heads_dense(q), k_cache, v_cache, meta, scale, sliding_window, softcap
        )
        return state if dtype == state.out.dtype else AttentionState(state.out.to(dtype), state.lse)

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
        dtype = q.dtype
        q, k, v = (heads_dense(t) for t in (q, k, v))
        q_norm, k_norm = (None if t is None else dense(t) for t in (q_norm, k_norm))
        norm_rope.turn_and_store(
            *(self.pool, q, k, v, dense(cos), dense(sin), k_cache, v_cache, slot_mapping),
            *(q_norm, k_norm, eps, weight_offset),
        )
        return q.to(dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        out, _ = norm_rope.norm_rows(self.pool, dense(x), None, dense(weight), eps, weight_offset)
        return out.to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, total = norm_rope.norm_rows(
            self.pool, dense(x), dense(residual), dense(weight), eps, weight_offset
        )
        return out.to(x.dtype), total.to(x.dtype)

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor:
        return gate_rows(self.pool, gate_up, act).to(gate_up.dtype)

    def describe(self) -> list[KernelChoice]:
        return []
