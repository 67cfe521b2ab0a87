"""Mixture of experts on packed weights: the tokens of each expert go through it as one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.linear import PackedLinear, gate_rows
from llmlab.kernels.pool import Pool
from llmlab.kernels.quant_linear import NarrowLinear
from llmlab.kernels.quantized import QuantizedTensor


class PackedExperts:
    """Gated MLPs [E, 2F, d] and [E, d, F], packed at load; see `reference.moe`."""

    def __init__(self, w_gate_up: Tensor | QuantizedTensor, w_down: Tensor | QuantizedTensor, pool: Pool) -> None:
        self._gate_up = [_packed(w_gate_up[e], pool) for e in range(w_gate_up.shape[0])]
        self._down = [_packed(w_down[e], pool) for e in range(w_down.shape[0])]
        self._pool = pool

    def __call__(
        self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu"
    ) -> Tensor:
        """A token's experts are summed in order of their number: the batch does not change the sum."""
        weights, experts = reference.route(router_logits, top_k, renormalize)
        y = torch.zeros(x.shape, dtype=torch.float32)
        for expert in sorted(set(experts.flatten().tolist())):
            token, choice = torch.where(experts == expert)
            inner = self._gated(self._gate_up[expert], x[token], act)
            y.index_add_(0, token, self._down[expert](inner).float() * weights[token, choice, None])
        return y.to(x.dtype)

    def _gated(self, gate_up: PackedLinear | NarrowLinear, x: Tensor, act: str) -> Tensor:
        if isinstance(gate_up, PackedLinear):
            return gate_up.gated(x, act)
        return gate_rows(self._pool, gate_up(x), act).to(x.dtype)


def _packed(weight: Tensor | QuantizedTensor, pool: Pool) -> PackedLinear | NarrowLinear:
    return NarrowLinear(weight, None, pool) if isinstance(weight, QuantizedTensor) else PackedLinear(weight, None, pool)
