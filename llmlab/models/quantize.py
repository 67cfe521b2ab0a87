"""Weight-only quantisation while a model is loaded: one tensor at a time, so the peak of memory stays at one.

The matrices of the layers become narrow; embedding, head, routers, norms and biases keep their dtype, as
do matrices whose inputs no group of a useful size divides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmlab.kernels.quant_spec import QuantSpec
from llmlab.kernels.quantized import quantize_tensor

NARROW = ("qkv.weight", "output.weight", "gate_up.weight", "down.weight", "experts.gate_up", "experts.down")


@dataclass
class QuantReport:
    """What became of the weights: bytes and tensors before and after, and the names that stayed wide."""

    spec: QuantSpec
    bytes_before: int = 0
    bytes_after: int = 0
    num_narrow: int = 0
    kept: list[str] = field(default_factory=list)


class QuantizedWeights(Mapping[str, Any]):
    """The weights of a checkpoint, its matrices as `QuantizedTensor`s. Reading a tensor quantises it anew."""

    def __init__(self, weights: Mapping[str, Tensor], spec: QuantSpec) -> None:
        self._weights, self.report = weights, QuantReport(spec)

    def __getitem__(self, name: str) -> Any:
        tensor, report = self._weights[name], self.report
        report.bytes_before += tensor.nbytes
        if name.endswith(NARROW) and report.spec.fits(tensor.shape[-1]):
            narrow = quantize_tensor(tensor, report.spec)
            report.num_narrow += 1
            report.bytes_after += narrow.nbytes
            return narrow
        if name.endswith(NARROW):
            report.kept.append(name)
        report.bytes_after += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
