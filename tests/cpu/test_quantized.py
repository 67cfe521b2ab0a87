"""int8 and int4 weights: what the codes mean, and that the compiled kernel computes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.kernels.dispatch import TorchKernels, make_kernels
from llmlab.kernels.numba_kernels import NumbaKernels
from llmlab.kernels.quant_linear import NarrowLinear
from llmlab.kernels.quantized import QuantizedTensor, QuantSpec, parse_quantization, quantize_tensor
from llmlab.types import ConfigError, LabError

SPECS = (QuantSpec(8), QuantSpec(8, 32, False), QuantSpec(4, 64, False), QuantSpec(4, 16, True))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.sampled_from([0.0, 3.0]))
def test_no_weight_is_further_than_half_a_step_from_its_code(spec: QuantSpec, seed: int, shift: float) -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed)) + shift
    narrow = quantize_tensor(weight, spec)
    step = narrow.scales.repeat_interleave(spec.group, -1)
    limit = step * (0.5 if spec.symmetric else 1.0) * 1.001  # a rounded zero moves the range by up to half a step
    assert ((narrow.dequantize() - weight).abs() <= limit).all()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_edges_and_zeros_survive(spec: QuantSpec) -> None:
    weight = torch.zeros(3, 64)
    assert not quantize_tensor(weight, spec).dequantize().any()
    weight[1] = torch.linspace(-1.0, 2.0, 64)
    narrow = quantize_tensor(weight, spec).dequantize()
    assert narrow[1].abs().max() <= 2.0 + 3.0 / 15 and not narrow[0].any()


def test_bytes_are_what_the_name_promises() -> None:
    weight = torch.randn(256, 512)
    for spec in SPECS:
        narrow = quantize_tensor(weight, spec)
        assert narrow.nbytes * 8 == pytest.approx(spec.bits_per_weight * weight.numel())
        assert narrow.shape == (256, 512) and int(narrow.unpacked().max()) < 1 << spec.bits


def test_experts_are_matrices_one_by_one() -> None:
    weight = torch.randn(3, 10, 64)
    narrow = quantize_tensor(weight, SPECS[2])
    for e in range(3):
        assert torch.equal(narrow[e].dequantize(), quantize_tensor(weight[e], SPECS[2]).dequantize())
        assert torch.equal(narrow.dequantize()[e], narrow[e].dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 128), (200, 1408), (1, 64)])
def test_the_compiled_product_is_that_of_the_widened_weights(spec: QuantSpec, outputs: int, inputs: int) -> None:
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    narrow = quantize_tensor(weight, spec)
    packed, wide = NumbaKernels().linear(narrow, bias), narrow.dequantize().double()
    assert isinstance(packed, NarrowLinear)
    for rows in (0, 1, 2, 3, 4, 5, 100):
        x = torch.randn(rows, inputs)
        torch.testing.assert_close(packed(x).double(), x.double() @ wide.T + bias, atol=3e-4, rtol=1e-5)
    x = torch.randn(100, inputs)
    together = packed(x)
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 40)):
        assert torch.equal(packed(x[first:last]), together[first:last]), "a row's bits depend on its neighbours"


def test_the_reference_widens(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, x = quantize_tensor(torch.randn(6, 64), SPECS[0]), torch.randn(3, 64)
    assert torch.equal(TorchKernels().linear(narrow)(x), x @ narrow.dequantize().T)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_quantised_experts(kernels: str) -> None:
    x, logits = torch.randn(9, 32), torch.randn(9, 4)
    gate_up, down = (quantize_tensor(torch.randn(4, *size) / 6, SPECS[3]) for size in ((64, 32), (32, 32)))
    have = make_kernels(kernels).experts(gate_up, down)(x, logits, 2, True)
    want = make_kernels("torch").experts(gate_up.dequantize(), down.dequantize())(x, logits, 2, True)
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


def test_names() -> None:
    assert parse_quantization("int8") == QuantSpec(8, 64, True)
    assert parse_quantization("int4") == QuantSpec(4, 64, False)
    assert parse_quantization("int4-g32-sym") == QuantSpec(4, 32, True)
    for spec in SPECS:
        assert parse_quantization(spec.name) == spec
    for text in ("int5", "fp8", "int4-g24", "int4-g8", "int4-64", ""):
        with pytest.raises(ConfigError, match="quantization"):
            parse_quantization(text)
    with pytest.raises(LabError, match="groups"):
        quantize_tensor(torch.zeros(2, 40), QuantSpec(8))
    assert isinstance(quantize_tensor(torch.zeros(2, 48), QuantSpec(8)), QuantizedTensor)  # in groups of 16
