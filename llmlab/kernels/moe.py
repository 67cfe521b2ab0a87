"""Mixture of experts on packed weights: the tokens of each expert go through it as one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.linear import PackedLinear
from llmlab.kernels.pool import Pool


class PackedExperts:
    """Gated MLPs [E, 2F, d] and [E, d, F], packed at load; see `reference.moe`."""

    def __init__(self, w_gate_up: Tensor, w_down: Tensor, pool: Pool) -> None:
        self._gate_up = [PackedLinear(w, None, pool) for w in w_gate_up]
        self._down = [PackedLinear(w, None, pool) for w in w_down]

    def __call__(
        self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu"
    ) -> Tensor:
        """A token's experts are summed in order of their number: the batch does not change the sum."""
        weights, experts = reference.route(router_logits, top_k, renormalize)
        y = torch.zeros(x.shape, dtype=torch.float32)
        for expert in sorted(set(experts.flatten().tolist())):
            token, choice = torch.where(experts == expert)
            inner = self._gate_up[expert].gated(x[token], act)
            y.index_add_(0, token, self._down[expert](inner).float() * weights[token, choice, None])
        return y.to(x.dtype)
