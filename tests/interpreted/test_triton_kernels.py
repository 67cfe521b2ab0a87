"""Every GPU kernel against the torch reference, in Triton's interpreter; outputs and unused memory are poisoned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels_util import Built, Case, build, expected
from torch import Tensor

from llmlab.execution.decode_graph import DecodeGraphs, DecodeRow
from llmlab.execution.device_line import HostLine
from llmlab.kernels import reference
from llmlab.kernels.capability import Capability, capability_of
from llmlab.kernels.dataflow import Dataflow
from llmlab.kernels.dispatch import TorchKernels
from llmlab.kernels.layout import AttentionMetadata, AttentionState
from llmlab.kernels.quantized import QuantSpec, quantize_tensor
from llmlab.kernels.softmax_schemes import UnifiedMax, calibrate
from llmlab.kernels.triton_kernels import TritonKernels, TritonLinear, sort_pairs
from llmlab.models.loader import load_model

SMALL = {name: capability_of(name)._replace(units=3) for name in ("t4", "h100")}  # few programs: rows are divided


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["t4", "h100"])
def card(request: pytest.FixtureRequest) -> Capability:
    return SMALL[request.param]


@pytest.fixture
def kernels() -> TritonKernels:
    return TritonKernels(SMALL["h100"])


# -------------------------------------------------------------------------------------- attention
CASES = {
    "decoding": Case(rows=((1, 200), (1, 3), (1, 0)), dim=32, block_size=16),
    "decoding, blocks of 32": Case(rows=((1, 70), (1, 31)), dim=64, block_size=32, group=4),
    "odd group, odd head": Case(rows=((1, 90),), dim=80, block_size=16, group=3, heads=1),
    "chunks and prompts": Case(rows=((20, 30), (1, 40), (50, 0)), dim=32, block_size=16),
    "window": Case(rows=((1, 100), (30, 50)), dim=32, block_size=16, window=20),
    "cap": Case(rows=((1, 40), (20, 0)), dim=32, block_size=16, softcap=4.0),
    "full": Case(rows=((20, 10), (1, 30)), dim=32, block_size=16, mask="full"),
    "head of 96": Case(rows=((1, 20), (18, 4)), dim=96, block_size=16, heads=1),
    "head of 128": Case(rows=((1, 20), (18, 4)), dim=128, block_size=16, heads=1, group=1),
}


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, card: Capability) -> None:
    built = build(CASES[name])
    state = TritonKernels(card).paged_attention(*built.arguments())
    out, lse = expected(built)
    np.testing.assert_allclose(state.out.numpy(), out, atol=5e-6)
    known = ~torch.isnan(state.lse).numpy()  # rows through SDPA have none
    assert known.all() or not card.tensor_cores
    np.testing.assert_allclose(state.lse.numpy()[known], lse[known], atol=5e-6, rtol=1e-6)


def test_a_divided_row_is_merged_and_really_was_divided(kernels: TritonKernels) -> None:
    built = build(CASES["decoding"])
    plans = kernels.plans(built.meta, 2, 2, 32, None)
    assert plans.classes[0].partials >= 2 and int(plans.classes[0].merges[:, 2].max()) >= 2


@pytest.mark.parametrize("name", ["decoding", "chunks and prompts", "window", "cap", "head of 96"])
@pytest.mark.parametrize("unified", [False, True])
def test_attention_in_bfloat16(name: str, unified: bool) -> None:
    """Keys, values and weights of the softmax in bfloat16, sums in float32, as on tensor cores."""
    built = build(CASES[name], torch.bfloat16)
    q, *rest = built.arguments()
    out, lse = expected(built)
    scheme = calibrate(lse, "bfloat16").scheme if unified else None
    state = TritonKernels(SMALL["h100"], torch.bfloat16, scheme).paged_attention(q.to(torch.bfloat16), *rest)
    assert state.out.dtype is torch.bfloat16
    np.testing.assert_allclose(state.out.float().numpy(), out, atol=2.5e-2, rtol=1.5e-2)  # steps of the format: 2 ** -8


def test_products_and_rows_in_bfloat16(kernels: TritonKernels) -> None:
    def near(have: Tensor, want: Tensor, atol: float = 0.03) -> None:
        assert have.dtype is torch.bfloat16
        torch.testing.assert_close(have.float(), want.float(), atol=atol, rtol=0.02)

    weight, x, residual = (torch.randn(size).bfloat16() for size in ((70, 128), (20, 128), (20, 128)))
    for kernel in ("rows", "flat"):
        near(TritonLinear(weight / 12).by(kernel, x[:9]), x[:9].float() @ (weight / 12).float().T)
    for spec in (QuantSpec(8), QuantSpec(4, 32, symmetric=False)):
        narrow = quantize_tensor(weight / 12, spec)
        for rows in (2, 20):
            near(kernels.linear(narrow)(x[:rows]), x[:rows].float() @ narrow.dequantize().float().T)
    gate_up, down = torch.randn(5, 160, 128).bfloat16() / 12, torch.randn(5, 128, 80).bfloat16() / 9
    logits = torch.randn(20, 5)
    want = reference.moe(x.float(), logits, gate_up.float(), down.float(), 2, True)
    near(kernels.experts(gate_up, down)(x, logits.bfloat16().float(), 2, True), want, 0.1)
    norm = torch.randn(128).bfloat16()
    for have, wanted in zip(kernels.add_rms_norm(x, residual, norm, 1e-5), reference.add_rms_norm(x.float(), residual.float(), norm.float(), 1e-5)):
        near(have, wanted)
    near(kernels.gated_act(x, "silu"), reference.gated_act(x.float(), "silu"))


# ------------------------------------------------------------------- one maximum for all scores
def _around_one(card: Capability, built: Built, phi: float | None = None) -> tuple[TritonKernels, AttentionState]:
    """Decoding around one maximum: as calibrated on these rows, or around `phi`."""
    scheme = calibrate(expected(built)[1], "float32").scheme if phi is None else UnifiedMax(phi, -40.0, 60.0)
    kernels = TritonKernels(card, unified=scheme)
    return kernels, kernels.paged_attention(*built.arguments())


@pytest.mark.parametrize("name", ["decoding", "decoding, blocks of 32", "odd group, odd head", "window", "cap"])
def test_decoding_around_one_maximum_is_the_same_attention(name: str, kernels: TritonKernels) -> None:
    built = build(CASES[name])
    kernels, state = _around_one(kernels.capability, built)
    out, lse = expected(built)
    np.testing.assert_allclose(state.out.numpy(), out, atol=5e-6)
    known = ~torch.isnan(state.lse).numpy()
    np.testing.assert_allclose(state.lse.numpy()[known], lse[known], atol=5e-6, rtol=2e-6)
    assert kernels.repaired is not None and int(kernels.repaired.sum()) == 0


@pytest.mark.parametrize("phi", [-200.0, 200.0])
def test_a_maximum_that_does_not_suit_is_noticed_and_every_unit_computed_again(phi: float, kernels: TritonKernels) -> None:
    built = build(CASES["decoding"])
    kernels, state = _around_one(kernels.capability, built, phi)
    np.testing.assert_allclose(state.out.numpy(), expected(built)[0], atol=5e-6)
    plan = kernels.plans(built.meta, 2, 2, 32, None).classes[0]
    assert kernels.repaired is not None and int(kernels.repaired.sum()) == len(plan.queue) > 3


def test_only_the_rows_that_overflow_are_computed_again(kernels: TritonKernels) -> None:
    """Queries 30 times as large leave the band that the others were calibrated on."""
    built = build(CASES["decoding, blocks of 32"])
    scheme = calibrate(expected(built)[1], "float16").scheme
    built.q[0] *= 30
    kernels = TritonKernels(kernels.capability, unified=scheme)
    state = kernels.paged_attention(*built.arguments())
    np.testing.assert_allclose(state.out.numpy(), expected(built)[0], atol=2e-5)
    plan = kernels.plans(built.meta, built.k_cache.shape[1], 4, 64, None).classes[0]
    repaired = int(kernels.repaired.sum()) if kernels.repaired is not None else 0
    rows = plan.items[(plan.queue // built.k_cache.shape[1]).long(), 0]
    assert 0 < repaired <= int((rows == 0).sum()) < len(plan.queue)


def test_without_tensor_cores_the_maximum_runs_along() -> None:
    built = build(CASES["decoding"])
    kernels, state = _around_one(SMALL["t4"], built, 200.0)
    np.testing.assert_allclose(state.out.numpy(), expected(built)[0], atol=5e-6)
    assert kernels.repaired is None


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "t4"), (torch.float16, "h100"), (torch.bfloat16, "h100")])
def test_attention_in_half_precision(dtype: torch.dtype, name: str) -> None:
    built = build(Case(rows=((1, 90), (20, 10)), dim=64, block_size=16), dtype)
    q, *rest = built.arguments()
    state = TritonKernels(SMALL[name], dtype).paged_attention(q.to(dtype), *rest)
    out, _ = expected(built)
    np.testing.assert_allclose(state.out.float().numpy(), out, atol=2e-2 if dtype is torch.bfloat16 else 4e-3)


def test_rows_without_keys_or_queries(kernels: TritonKernels) -> None:
    built = build(Case(rows=((0, 9), (2, 5), (0, 0), (1, 20)), block_size=16))
    state = kernels.paged_attention(*built.arguments())
    np.testing.assert_allclose(state.out.numpy(), expected(built)[0], atol=5e-6)
    meta = AttentionMetadata.build([5], [3], [[0]], 16, mask="full")
    built = build(Case(rows=((5, 0),), block_size=16))
    have = kernels.paged_attention(built.q, built.k_cache.nan_to_num(), built.v_cache.nan_to_num(), meta, 0.3)
    want = reference.paged_attention(built.q, built.k_cache.nan_to_num(), built.v_cache.nan_to_num(), meta, 0.3)
    torch.testing.assert_close(have.out, want.out, atol=5e-6, rtol=0)


# ------------------------------------------------------------------------------------- row kernels
@pytest.mark.parametrize("width", [96, 128])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(kernels: TritonKernels, width: int, offset: float) -> None:
    x, residual, weight = torch.randn(5, width), torch.randn(5, width), torch.randn(width)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset))
    for have, want in zip(kernels.add_rms_norm(x, residual, weight, 1e-5, offset), reference.add_rms_norm(x, residual, weight, 1e-5, offset)):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_gates(kernels: TritonKernels, act: str) -> None:
    gate_up = torch.randn(3, 2 * 1100) * 4
    gate_up[0, 0], gate_up[0, 1] = 200.0, -200.0
    torch.testing.assert_close(kernels.gated_act(gate_up, act), reference.gated_act(gate_up, act), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(32, 32), (80, 40), (96, 96), (32, 0)])
def test_norm_rope_and_store(kernels: TritonKernels, dim: int, rotary: int, normed: bool) -> None:
    qkv = torch.randn(4, 3 + 2 * 2, dim)
    q, k, v = qkv.split([3, 2, 2], 1)
    angles = torch.randn(4, rotary // 2)
    norms = {"q_norm": torch.randn(dim), "k_norm": torch.randn(dim)} if normed else {}
    slots = torch.tensor([17, -1, 40, 3])
    have, want = ([torch.full((4, 2, 16, dim), float("nan")) for _ in range(2)] for _ in range(2))
    turned = reference.rope_store(q, k, v, angles.cos(), angles.sin(), *want, slots, **norms)
    got = kernels.rope_store(q, k, v, angles.cos(), angles.sin(), *have, slots, **norms)
    torch.testing.assert_close(got, turned, atol=2e-6, rtol=2e-6)
    for a, b in zip(have, want):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6, equal_nan=True)


def test_store_alone(kernels: TritonKernels) -> None:
    k, v, slots = torch.randn(3, 2, 32), torch.randn(3, 2, 32), torch.tensor([5, -1, 16])
    have, want = ([torch.zeros(2, 2, 16, 32) for _ in range(2)] for _ in range(2))
    kernels.store_kv(k, v, *have, slots)
    reference.store_kv(k, v, *want, slots)
    assert all(torch.equal(a, b) for a, b in zip(have, want))


def test_copies(kernels: TritonKernels) -> None:
    src, dst = torch.randn(5, 2, 16, 40), torch.zeros(6, 2, 16, 40)
    kernels.copy_blocks(src, dst, torch.tensor([[4, 0], [1, 5]]))
    assert torch.equal(dst[0], src[4]) and torch.equal(dst[5], src[1]) and not dst[1:5].any()
    pool = torch.arange(4.0).repeat_interleave(6).view(4, 2, 3)
    kernels.copy_blocks(pool, pool, torch.tensor([[0, 1], [1, 0], [1, 3]]))
    assert pool[:, 0, 0].tolist() == [1.0, 0.0, 2.0, 1.0]


# ------------------------------------------------------------------------------------ linear layers
@pytest.mark.parametrize("renormalize", [True, False])
def test_experts(kernels: TritonKernels, renormalize: bool) -> None:
    x, logits = torch.randn(37, 48), torch.randn(37, 5)
    logits[:, 3] = -50.0  # an expert without tokens
    gate_up, down = torch.randn(5, 160, 48) / 7, torch.randn(5, 48, 80) / 9
    have = kernels.experts(gate_up, down)(x, logits, 2, renormalize)
    torch.testing.assert_close(have, reference.moe(x, logits, gate_up, down, 2, renormalize), atol=1e-5, rtol=1e-5)


def test_pairs_are_sorted_by_expert_without_a_count() -> None:
    experts = torch.tensor([[2, 0], [2, 1], [0, 2]])
    pairs = sort_pairs(experts, 4, 2)
    assert experts.flatten()[pairs.order].tolist() == [0, 0, 1, 2, 2, 2]
    assert pairs.offsets.tolist() == [0, 2, 3, 6, 6] and pairs.first_tiles.tolist() == [0, 1, 2, 4, 4]
    assert pairs.order[pairs.places.flatten()].tolist() == list(range(6))


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4, 32, symmetric=False)], ids=lambda s: s.name)
def test_quantised_linear(spec: QuantSpec, rows: int, card: Capability) -> None:
    weight, bias, x = torch.randn(70, 128), torch.randn(70), torch.randn(rows, 128)
    narrow = quantize_tensor(weight, spec)
    have = TritonKernels(card).linear(narrow, bias)(x)
    torch.testing.assert_close(have, x @ narrow.dequantize().T + bias, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "rows"), [("rows", 1), ("rows", 3), ("rows", 16), ("flat", 1), ("flat", 9), ("flat", 40)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_few_rows(kernel: str, rows: int, biased: bool) -> None:
    weight, bias, x = torch.randn(70, 300), torch.randn(70) if biased else None, torch.randn(rows, 300)
    have = TritonLinear(weight, bias).by(kernel, x)
    torch.testing.assert_close(have, torch.nn.functional.linear(x, weight, bias), atol=5e-5, rtol=1e-5)


def test_a_layer_takes_the_kernel_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, asked = torch.randn(70, 48), []
    by = TritonLinear.by
    monkeypatch.setattr(TritonLinear, "by", lambda self, kernel, x: asked.append(kernel) or by(self, kernel, x))
    linear = TritonKernels(SMALL["h100"], dataflow={(70, 48): Dataflow(2, 8)}).linear(weight)
    for rows in (1, 4, 8):
        x, residual = torch.randn(rows, 48), torch.randn(rows, 70)
        torch.testing.assert_close(linear(x), x @ weight.T, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(TritonKernels(SMALL["h100"]).linear_add(x, linear, residual), residual + x @ weight.T, atol=5e-5, rtol=1e-5)
    assert asked == ["rows", "rows", "flat", "flat", "library"]  # with the library the residual is part of the product


# ----------------------------------------------------------------------------------------- sampling
def test_argmax(kernels: TritonKernels) -> None:
    logits = torch.randn(5, 1500)
    logits[0, [7, 1200]] = 9.0  # a tie: the lowest id
    logits[1, 1100] = float("nan")
    logits[2, 3] = float("inf")
    logits[3] = float("-inf")
    assert kernels.argmax(logits).tolist() == [7, -1, -1, -1, int(logits[4].argmax())]


CONTROLS = [  # temperature, min_p, top_k, top_p
    (1.0, 0.0, 0, 1.0), (0.7, 0.0, 5, 1.0), (1.3, 0.0, 0, 0.5), (1.0, 0.1, 0, 1.0), (0.9, 0.02, 20, 0.8), (0.0, 0.0, 0, 1.0),
    (1.0, 0.0, 1, 1.0), (2.0, 0.0, 3, 1e-9),
]  # fmt: skip


def _draws(logits: Tensor) -> list[Tensor]:
    columns = [torch.tensor(column) for column in zip(*CONTROLS)]
    temperature, min_p, top_k, top_p = columns
    uniform = torch.rand(len(CONTROLS), dtype=torch.float64)
    return [logits, temperature, min_p, top_k, top_p.double(), uniform]


@pytest.mark.parametrize("seed", range(2))
def test_draws_are_those_of_the_reference(kernels: TritonKernels, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(len(CONTROLS), 200) * 2
    if seed % 2:
        logits = (logits * 2).round() / 2  # many ties, broken by id
    arguments = _draws(logits)
    assert kernels.draw(*arguments).tolist() == reference.draw(*arguments).tolist()


# ------------------------------------------------------------------------------------- a whole model
@pytest.mark.parametrize(("dtype", "cards"), [(torch.float32, ("h100", "t4")), (torch.bfloat16, ("h100",))])
def test_a_model_prefills_and_decodes_in_a_graph_as_with_the_reference(dtype: torch.dtype, cards: tuple[str, ...]) -> None:
    """The plan of the second step lies where that of the first lay, as a recorded graph needs it."""
    prompts, tables = ([5, 6, 7, 8] * 5, [9, 3, 4]), [[0, 3], [1]]
    near = {"atol": 2e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.06, "rtol": 0.03}
    seen = []
    for kernels in (TorchKernels(), *(TritonKernels(SMALL[card], dtype) for card in cards)):
        loaded = load_model("lab-xs", str(dtype).removeprefix("torch."), kernels=kernels, random_weights=True)
        shape, line = loaded.shape, HostLine()
        size = (6, shape.num_kv_heads, 16, shape.head_dim)
        caches = [(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)) for _ in range(shape.num_layers)]
        lens = [len(p) for p in prompts]
        meta = AttentionMetadata.build(lens, lens, tables, 16)
        positions = torch.cat([torch.arange(n) for n in lens])
        last = torch.zeros(4, dtype=torch.int64)
        with torch.inference_mode():
            hidden = loaded.model.forward(loaded.model.embed(torch.tensor([*prompts[0], *prompts[1]])), positions, meta, caches)
            graphs = DecodeGraphs(loaded.model, caches, last, 3, 48, 16, line)
            tokens = [11, 12]
            logits = [loaded.model.logits(hidden)]
            steps = []
            for step in range(2):
                rows = [DecodeRow(tokens[i] if step == 0 else 0, -1 if step == 0 else i + 1, lens[i] + step, tuple(tables[i]),
                                  i + 1, (0.0, 0.0, 0.0, 1.0, 0.0)) for i in range(2)]  # fmt: skip
                steps.append(graphs.run(rows).tolist())  # type: ignore[union-attr]
        assert graphs.recorded == [(2, False)]
        seen.append((logits[0], steps, caches))
    for logits_, steps, caches in seen[1:]:
        torch.testing.assert_close(logits_, seen[0][0], **near)
        assert steps == seen[0][1]
        for pair, want in zip(caches, seen[0][2]):
            torch.testing.assert_close(pair[0], want[0], **near)
