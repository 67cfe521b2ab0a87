"""The one switch: which kernels run. A model calls the methods of `Kernels` and knows no more.

`BaseKernels` states the fused operations by the plain ones, so a kernel set starts as the torch
reference and replaces what it makes faster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.layout import AttentionMetadata, AttentionState, KernelChoice


class LinearImpl(Protocol):
    """A linear layer, packed once at load for the kernels of its set."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias` for dense x [T, in_features]; returns [T, out_features]."""


class Kernels(Protocol):
    """The operations of a transformer, over ragged token batches [T, ...].

    Shapes and meaning are those of the functions of the same name in `llmlab.kernels.reference`,
    where each is defined. Outputs are fresh tensors unless stated.
    """

    name: str

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearImpl: ...

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, lin: LinearImpl, weight_offset: float = 0.0
    ) -> Tensor:
        """`lin(rms_norm(x))`."""

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        """`residual + lin(x)`; may write into residual, which the caller gives up."""

    def gated_mlp(
        self,
        x: Tensor,
        lin_gate_up: LinearImpl,
        act: str = "silu",
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> Tensor:
        """`gated_act(lin_gate_up(x), act)`, of `rms_norm(x)` if norm_weight is given; [T, F]."""

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> AttentionState: ...

    def merge_states(self, a: AttentionState, b: AttentionState) -> AttentionState: ...

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None: ...

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
    ) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]: ...

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor: ...

    def copy_blocks(self, src: Tensor, dst: Tensor, pairs: Tensor) -> None: ...

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        top_k: int,
        renormalize: bool,
        act: str = "silu",
    ) -> Tensor: ...

    def describe(self) -> list[KernelChoice]:
        """Which implementation runs each operation, and why."""


class TorchLinear:
    """`torch.nn.functional.linear` on the weight as it is, any device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.weight, self.bias)


class BaseKernels:
    """Every operation by the torch reference, the fused ones composed from the plain ones."""

    name = "torch"

    paged_attention = staticmethod(reference.paged_attention)
    merge_states = staticmethod(reference.merge_states)
    store_kv = staticmethod(reference.store_kv)
    rope_store = staticmethod(reference.rope_store)
    rms_norm = staticmethod(reference.rms_norm)
    add_rms_norm = staticmethod(reference.add_rms_norm)
    gated_act = staticmethod(reference.gated_act)
    copy_blocks = staticmethod(reference.copy_blocks)
    moe = staticmethod(reference.moe)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearImpl:
        return TorchLinear(weight, bias)

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, lin: LinearImpl, weight_offset: float = 0.0
    ) -> Tensor:
        return lin(self.rms_norm(x, norm_weight, eps, weight_offset))

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        return residual + lin(x)

    def gated_mlp(
        self,
        x: Tensor,
        lin_gate_up: LinearImpl,
        act: str = "silu",
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> Tensor:
        if norm_weight is not None:
            x = self.rms_norm(x, norm_weight, eps, weight_offset)
        return self.gated_act(lin_gate_up(x), act)

    def describe(self) -> list[KernelChoice]:
        return [KernelChoice("all", "torch", "the reference: any device and dtype, no compilation")]


class TorchKernels(BaseKernels):
    """The reference as a kernel set."""


def set_num_threads(num_threads: int) -> None:
    """Use `num_threads` threads in torch's operators (and, once loaded, in the numba kernels)."""
    if num_threads < 1:
        raise ValueError(f"num_threads: {num_threads} must be at least 1")
    torch.set_num_threads(num_threads)


def make_kernels(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_threads: int | None = None,
) -> Kernels:
    """The kernel set `name` ("auto", "torch") for a device and dtype; "auto" obeys LLMLAB_KERNELS."""
    if name == "auto":
        name = os.environ.get("LLMLAB_KERNELS", "auto")
    if num_threads is not None:
        set_num_threads(num_threads)
    sets: Mapping[str, type[BaseKernels]] = {"torch": TorchKernels, "auto": TorchKernels}
    if name not in sets:
        raise ValueError(f"kernels: {name!r} is unknown; choose one of {', '.join(sorted(sets))}")
    return sets[name]()
