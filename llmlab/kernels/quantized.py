"""Weights in 8 or 4 bits, by groups of inputs: the layout, and the plain torch definition of its meaning.

    w[o, i] = scale[o, i // group] * (code[o, i] - zero[o, i // group])

Symmetric quantisation has the same zero everywhere (128 or 8) and keeps none. Codes of 4 bits lie two in
a byte: the first half of a group in the low bits, the second half in the high ones.
Source: round to nearest by group, as in LLM.int8() (arXiv 2208.07339) and GPTQ's baseline (arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.quant_spec import QuantSpec, parse_quantization
from llmlab.types import LabError

__all__ = ["QuantSpec", "QuantizedTensor", "WidenedExperts", "WidenedLinear", "parse_quantization", "quantize_tensor"]

@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix [out, in], or one for each expert, [E, out, in].

    `codes` uint8 [.., out, in], or [.., out, in / 2] if `bits` is 4. `scales` float32 and `zeros` uint8
    [.., out, in / group]; zeros is None if symmetric. `dtype`: what it widens to.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (8 // self.bits))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)

    def __getitem__(self, expert: int) -> QuantizedTensor:
        zeros = None if self.zeros is None else self.zeros[expert]
        return QuantizedTensor(self.codes[expert], self.scales[expert], zeros, self.bits, self.group, self.dtype)

    def unpacked(self) -> Tensor:
        """The codes, one in a byte, [.., out, in] uint8."""
        if self.bits == 8:
            return self.codes
        halves = self.codes.unflatten(-1, (-1, self.group // 2))
        return torch.cat((halves & 15, halves >> 4), -1).flatten(-2)

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, [.., out, in] in `dtype`: the definition."""
        codes = self.unpacked().unflatten(-1, (-1, self.group)).float()
        zeros = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros.float().unsqueeze(-1)
        return ((codes - zeros) * self.scales.unsqueeze(-1)).flatten(-2).to(self.dtype)


def quantize_tensor(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Round to nearest by group. weight [.., out, in]; raises LabError where `spec` does not fit."""
    group, top = spec.group_for(weight.shape[-1]), (1 << spec.bits) - 1
    if not spec.fits(weight.shape[-1]):
        raise LabError("weight", tuple(weight.shape), f"cannot be cut into groups of {spec.group}")
    grouped = weight.float().unflatten(-1, (-1, group))
    if spec.symmetric:
        half = 1 << (spec.bits - 1)
        scales = grouped.abs().amax(-1) / (half - 1)
        zeros = torch.full_like(scales, half)
    else:
        low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
        scales = (high - low) / top
        zeros = torch.round(-low / scales.clamp(min=1e-30))
    codes = torch.round(grouped / scales.clamp(min=1e-30).unsqueeze(-1) + zeros.unsqueeze(-1)).clamp(0, top).to(torch.uint8)
    if spec.bits == 4:
        codes = codes[..., : group // 2] | codes[..., group // 2 :] << 4
    kept = None if spec.symmetric else zeros.to(torch.uint8)
    return QuantizedTensor(codes.flatten(-2), scales, kept, spec.bits, group, weight.dtype)


class WidenedLinear:
    """The reference of a quantised linear layer: widen the whole matrix, then multiply."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.weight.dequantize().to(x.dtype), self.bias)


class WidenedExperts:
    """`reference.moe` with the matrices of the experts that are asked for widened one by one."""

    def __init__(self, w_gate_up: QuantizedTensor, w_down: QuantizedTensor) -> None:
        self.w_gate_up, self.w_down = _Widening(w_gate_up), _Widening(w_down)

    def __call__(self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu") -> Tensor:
        return reference.moe(x, router_logits, self.w_gate_up, self.w_down, top_k, renormalize, act)  # type: ignore[arg-type]


class _Widening:
    """Experts by number, each widened when it is read."""

    def __init__(self, weights: QuantizedTensor) -> None:
        self._weights = weights

    def __getitem__(self, expert: int) -> Tensor:
        return self._weights[expert].dequantize()
