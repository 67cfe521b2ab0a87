"""Every Triton kernel on a GPU against float64 and the reference; outputs and unused memory are poisoned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels_util import Built, Case, build, expected

from llmlab.kernels import reference
from llmlab.kernels.dispatch import Kernels, device_capability, make_kernels
from llmlab.kernels.layout import AttentionMetadata
from llmlab.kernels.quantized import QuantSpec, quantize_tensor
from llmlab.kernels.softmax_schemes import UnifiedMax, calibrate

pytest.importorskip("triton")

from llmlab.kernels.triton_kernels import TritonKernels, TritonLinear

CASES = {
    "decoding": Case(rows=((1, 9000), (1, 3), (1, 0), (1, 700)), dim=128, block_size=16, heads=8, group=4),
    "blocks of 32": Case(rows=((1, 700), (1, 31)), dim=64, block_size=32, group=4),
    "odd group, odd head": Case(rows=((1, 900), (40, 0)), dim=80, block_size=16, group=3),
    "chunks and prompts": Case(rows=((200, 300), (1, 400), (500, 0)), dim=128, block_size=16, group=4),
    "window": Case(rows=((1, 1000), (300, 500)), dim=64, block_size=16, window=100),
    "cap": Case(rows=((1, 400), (200, 0)), dim=96, block_size=16, softcap=20.0),
    "full": Case(rows=((200, 100), (1, 300)), dim=32, block_size=16, mask="full"),
}
LIMIT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param is torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bfloat16 units")
    return request.param


@pytest.fixture
def kernels(dtype: torch.dtype) -> Kernels:
    return make_kernels("triton", "cuda", dtype)


def on_gpu(built: Built, dtype: torch.dtype) -> Built:
    meta = built.meta
    moved = AttentionMetadata(meta.cu_seqlens_q.cuda(), meta.seq_lens.cuda(), meta.block_tables.cuda(), meta.slot_mapping.cuda(),
                              meta.max_seqlen_q, meta.mask)  # fmt: skip
    return replace(built, q=built.q.to(dtype).cuda(), k_cache=built.k_cache.cuda(), v_cache=built.v_cache.cuda(), meta=moved)


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, kernels: Kernels, dtype: torch.dtype) -> None:
    built = build(CASES[name], dtype)
    built = replace(built, q=built.q.to(dtype).float())
    out, _ = expected(built)
    torch.empty(1 << 22, device="cuda").fill_(float("nan"))  # what freshly allocated outputs hold
    state = kernels.paged_attention(*on_gpu(built, dtype).arguments())
    np.testing.assert_allclose(state.out.float().cpu().numpy(), out, atol=LIMIT[dtype] * max(1.0, np.abs(out).max()))
    again = kernels.paged_attention(*on_gpu(built, dtype).arguments())
    assert torch.equal(state.out, again.out), "two runs differ"


@pytest.mark.parametrize("suits", [True, False], ids=["calibrated", "computed again"])
@pytest.mark.parametrize("name", ["decoding", "blocks of 32", "window", "cap"])
def test_attention_around_one_maximum(name: str, suits: bool, dtype: torch.dtype) -> None:
    built = build(CASES[name], dtype)
    built = replace(built, q=built.q.to(dtype).float())
    out, lse = expected(built)
    scheme = calibrate(lse, str(dtype).removeprefix("torch.")).scheme if suits else UnifiedMax(300.0, 2.0, 11.0)
    kernels = TritonKernels(device_capability("cuda"), dtype, scheme)
    state = kernels.paged_attention(*on_gpu(built, dtype).arguments())
    np.testing.assert_allclose(state.out.float().cpu().numpy(), out, atol=LIMIT[dtype] * max(1.0, np.abs(out).max()))
    if kernels.capability.tensor_cores:
        assert kernels.repaired is not None and (suits or int(kernels.repaired.sum()) > 0)


@pytest.mark.parametrize("kernel", ["rows", "flat"])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_products_of_few_rows(dtype: torch.dtype, kernel: str, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(1000, 1100, device="cuda") / 33).to(dtype), torch.randn(1000, device="cuda").to(dtype)
    x = torch.randn(rows, 1100, device="cuda").to(dtype)
    have = TritonLinear(weight, bias).by(kernel, x)
    want = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(have.double(), want, atol=4 * LIMIT[dtype], rtol=LIMIT[dtype])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(128, 128), (80, 40), (64, 0)])
def test_norm_rope_and_store(kernels: Kernels, dtype: torch.dtype, dim: int, rotary: int, normed: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(64, 8 + 2 * 2, dim, device="cuda").to(dtype).split([8, 2, 2], 1)
    angles = torch.randn(64, rotary // 2, device="cuda")
    norms = {n: torch.randn(dim, device="cuda") for n in ("q_norm", "k_norm")} if normed else {}
    slots = torch.randperm(128, device="cuda")[:64]
    slots[3] = -1
    have, want = ([torch.full((8, 2, 16, dim), float("nan"), dtype=dtype, device="cuda") for _ in range(2)] for _ in range(2))
    turned = reference.rope_store(q.clone(), k.clone(), v, angles.cos(), angles.sin(), *want, slots, **norms)
    got = kernels.rope_store(q, k, v, angles.cos(), angles.sin(), *have, slots, **norms)
    for a, b in zip((got, *have), (turned, *want), strict=True):
        torch.testing.assert_close(a, b, atol=LIMIT[dtype], rtol=LIMIT[dtype], equal_nan=True)


def test_rows(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(33, 4096, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(4096, device="cuda")
    close = {"atol": LIMIT[dtype], "rtol": LIMIT[dtype]}
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), **close)
    for a, b in zip(kernels.add_rms_norm(x, residual, weight, 1e-5), reference.add_rms_norm(x, residual, weight, 1e-5), strict=True):
        torch.testing.assert_close(a, b, **close)
    for act in reference.ACTIVATIONS:
        torch.testing.assert_close(kernels.gated_act(x, act), reference.gated_act(x, act), **close)


@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, 64, False), QuantSpec(4, 32, True)], ids=lambda s: s.name)
def test_narrow_linear(kernels: Kernels, dtype: torch.dtype, spec: QuantSpec, rows: int) -> None:
    torch.manual_seed(0)
    narrow = quantize_tensor((torch.randn(1000, 1024) / 32).to(dtype).cuda(), spec)
    x = torch.randn(rows, 1024, device="cuda").to(dtype)
    want = x.double() @ narrow.dequantize().double().T
    torch.testing.assert_close(kernels.linear(narrow)(x).double(), want, atol=4 * LIMIT[dtype], rtol=LIMIT[dtype])


def test_experts(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, logits = torch.randn(300, 256, device="cuda").to(dtype), torch.randn(300, 16, device="cuda").to(dtype)
    gate_up, down = (torch.randn(16, *size, device="cuda").to(dtype) / 16 for size in ((512, 256), (256, 256)))
    want = reference.moe(x.double(), logits, gate_up.double(), down.double(), 4, True)
    torch.testing.assert_close(kernels.experts(gate_up, down)(x, logits, 4, True).double(), want, atol=4 * LIMIT[dtype], rtol=LIMIT[dtype])


def test_choices_of_tokens() -> None:
    kernels = make_kernels("triton", "cuda", torch.float16)
    torch.manual_seed(0)
    logits = torch.randn(64, 128_256, device="cuda") * 3
    assert torch.equal(kernels.argmax(logits), logits.argmax(-1))
    columns = torch.rand(64, device="cuda") + 0.5, torch.zeros(64, device="cuda"), torch.randint(0, 50, (64,), device="cuda")
    rest = torch.rand(64, device="cuda", dtype=torch.float64), torch.rand(64, device="cuda", dtype=torch.float64)
    same = kernels.draw(logits, *columns, *rest) == reference.draw(logits, *columns, *rest)
    assert same.float().mean() > 0.98  # exp may round apart, where a draw falls on an edge
