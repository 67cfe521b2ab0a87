"""Every compiled kernel against the reference; and that a row's bits do not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels_util import Built, Case, build, cases, expected
from torch import Tensor

from llmlab.kernels.attention_plan import SEGMENT, plan_attention
from llmlab.kernels.dispatch import Kernels, TorchKernels, make_kernels, set_num_threads
from llmlab.kernels.layout import MASKS, AttentionMetadata, AttentionState
from llmlab.kernels.numba_attention import quick_plan
from llmlab.kernels.pool import Pool
from llmlab.kernels.vector import PANEL
from llmlab.types import LabError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(scope="module")
def numba() -> Kernels:
    return make_kernels("numba")


@pytest.fixture(scope="module")
def torch_set() -> Kernels:
    return TorchKernels()


@pytest.fixture(autouse=True, params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    set_num_threads(request.param)
    yield request.param
    set_num_threads(before)


def close(have: Tensor, want: Tensor) -> None:
    """Same dtype and shape; equal up to rounding, measured against the largest value."""
    assert (have.dtype, have.shape) == (want.dtype, want.shape)
    limit = TOLERANCE[want.dtype] * max(1.0, float(want.abs().max())) if want.numel() else 0.0
    torch.testing.assert_close(have.float(), want.float(), atol=limit, rtol=0.0)


# -------------------------------------------------------------------------------------- attention
def check(built: Built, numba: Kernels) -> AttentionState:
    state = numba.paged_attention(*built.arguments())
    out, lse = expected(built)
    np.testing.assert_allclose(state.out.numpy(), out, atol=4e-6)
    np.testing.assert_allclose(state.lse.numpy(), lse, atol=4e-6, rtol=1e-6)
    return state


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases())
def test_attention(numba: Kernels, case: Case) -> None:
    """Ragged rows over scattered blocks whose unused slots hold NaN."""
    check(build(case), numba)


LONG = Case(rows=((1, 1300), (3, 511), (70, 600), (1, 0)), heads=2, group=2, dim=32, block_size=16)


@pytest.mark.parametrize("window", [None, 100, 600])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_attention_over_several_segments(numba: Kernels, window: int | None, mask: str) -> None:
    check(build(replace(LONG, window=window, mask=mask)), numba)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80])
def test_attention_over_a_narrow_cache(numba: Kernels, dtype: torch.dtype, dim: int) -> None:
    """Keys and values are widened exactly: only the queries' products are rounded, in float32."""
    check(build(Case(rows=((1, 90), (20, 30)), dim=dim, window=50), dtype), numba)


def test_head_sizes_that_no_vector_divides_go_to_the_reference(numba: Kernels) -> None:
    check(build(Case(rows=((1, 20), (5, 0)), dim=24)), numba)


def test_attention_with_more_queries_than_keys(numba: Kernels) -> None:
    """A prefix shared by a chunk longer than itself."""
    case = Case(rows=((5, 0),), mask="full")
    built = build(case)
    meta = AttentionMetadata.build([5], [3], built.tables, case.block_size, mask="full")
    state = numba.paged_attention(built.q, built.k_cache, built.v_cache, meta, case.scale)
    want = TorchKernels().paged_attention(built.q, built.k_cache, built.v_cache, meta, case.scale)
    close(state.out, want.out)
    close(state.lse, want.lse)


def test_rows_without_queries_and_strided_queries(numba: Kernels) -> None:
    built = build(Case(rows=((0, 9), (2, 5), (0, 0), (1, 70))))
    wide = torch.full((3, 7, 32), float("nan"))
    wide[:, 2:6] = built.q
    check(replace(built, q=wide[:, 2:6]), numba)


@pytest.mark.parametrize("layout", ["one pool for keys and values", "slots first"])
def test_caches_that_are_views(numba: Kernels, layout: str) -> None:
    """Any stride between blocks and heads is addressed; other layouts go to the reference."""
    built = build(Case(rows=((1, 90), (20, 30))))
    if layout == "slots first":
        k_cache, v_cache = (
            c.transpose(1, 2).contiguous().transpose(1, 2) for c in (built.k_cache, built.v_cache)
        )
    else:
        pool = torch.stack((built.k_cache, built.v_cache), 1)
        k_cache, v_cache = pool[:, 0], pool[:, 1]
    built = replace(built, k_cache=k_cache, v_cache=v_cache)
    check(built, numba)
    k, v = torch.randn(2, 2, 32), torch.randn(2, 2, 32)
    slots = torch.tensor([11, 3])
    numba.store_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache[1, :, 3], k[0]) and torch.equal(v_cache[0, :, 3], v[1])


def split_attention(built: Built, blocks: list[int], kernels: Kernels) -> AttentionState:
    """One row's attention in parts: full over leading blocks, causal over the rest, merged."""
    case, (new, before) = built.case, built.case.rows[0]
    states, first = [], 0
    for last in [*blocks, -1]:
        table = built.tables[0][first:] if last < 0 else built.tables[0][first:last]
        length = new + before - first * case.block_size if last < 0 else (last - first) * case.block_size
        mask = "causal" if last < 0 else "full"
        meta = AttentionMetadata.build([new], [length], [table], case.block_size, mask=mask)
        states.append(kernels.paged_attention(built.q, built.k_cache, built.v_cache, meta, case.scale))
        first = last
    merged = states[0]
    for state in states[1:]:
        merged = kernels.merge_states(merged, state)
    return merged


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**16), data=st.data())
def test_parts_of_the_cache_merge_to_the_whole(numba: Kernels, seed: int, data: st.DataObject) -> None:
    built = build(Case(rows=((4, 700),), block_size=16, seed=seed))
    cuts = data.draw(st.lists(st.integers(1, 42), min_size=1, max_size=3, unique=True).map(sorted))
    merged = split_attention(built, cuts, numba)
    out, lse = expected(built)
    np.testing.assert_allclose(merged.out.numpy(), out, atol=4e-6)
    np.testing.assert_allclose(merged.lse.numpy(), lse, atol=4e-6)


# ------------------------------------------------------------------------------- linear and rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 11, 97])
@pytest.mark.parametrize(("depth", "columns"), [(48, 100), (600, 2 * PANEL), (33, 7)])
def test_linear(
    numba: Kernels, torch_set: Kernels, dtype: torch.dtype, rows: int, depth: int, columns: int
) -> None:
    x, residual = torch.randn(rows, depth).to(dtype), torch.randn(rows, columns).to(dtype)
    weight, bias, gain = (torch.randn(*s).to(dtype) for s in ((columns, depth), (columns,), (depth,)))
    weight /= depth**0.5
    for shift in (None, bias):
        fast, slow = (
            numba.linear(weight, shift),
            torch_set.linear(weight.float(), None if shift is None else shift.float()),
        )
        close(fast(x), slow(x.float()).to(dtype))
        close(
            numba.norm_linear(x, gain, 1e-5, fast, 0.5),
            torch_set.norm_linear(x.float(), gain, 1e-5, slow, 0.5).to(dtype),
        )
        close(
            numba.linear_add(x, fast, residual.clone()),
            torch_set.linear_add(x.float(), slow, residual.float()).to(dtype),
        )


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [PANEL, 40])
@pytest.mark.parametrize("normed", [True, False])
def test_gated_mlp(numba: Kernels, torch_set: Kernels, act: str, inner: int, normed: bool) -> None:
    """Fused where the halves are whole panels, composed where they are not."""
    weight, bias = torch.randn(2 * inner, 48) / 7, torch.randn(2 * inner)
    gain = torch.randn(48) if normed else None
    for rows in (1, 7):
        x = torch.randn(rows, 48)
        have = numba.gated_mlp(x, numba.linear(weight, bias), act, gain, 1e-5, 1.0)
        close(have, torch_set.gated_mlp(x, torch_set.linear(weight, bias), act, gain, 1e-5, 1.0))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_activations_far_out(numba: Kernels, act: str) -> None:
    """The exponential of our own, over all magnitudes at which an activation is neither 0 nor x."""
    gate = torch.cat((torch.linspace(-100, 100, 4001), torch.tensor([0.0, -1e30, 1e30, 1e-20])))
    have = numba.gated_act(torch.cat((gate, torch.ones_like(gate)))[None], act)
    want = TorchKernels().gated_act(torch.cat((gate, torch.ones_like(gate))).double()[None], act)
    torch.testing.assert_close(have.double(), want.double(), atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_norms(numba: Kernels, torch_set: Kernels, dtype: torch.dtype, rows: int) -> None:
    x, residual, weight = torch.randn(rows, 72).to(dtype), torch.randn(rows, 72).to(dtype), torch.randn(72)
    close(numba.rms_norm(x, weight, 1e-5, 1.0), torch_set.rms_norm(x, weight, 1e-5, 1.0))
    for have, want in zip(
        numba.add_rms_norm(x, residual, weight, 1e-5),
        torch_set.add_rms_norm(x, residual, weight, 1e-5),
        strict=True,
    ):
        close(have, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", [0, 24, 32])
@pytest.mark.parametrize("norm", [True, False])
def test_rope_store(numba: Kernels, torch_set: Kernels, dtype: torch.dtype, rotary: int, norm: bool) -> None:
    """q, k, v as views of one tensor; partial rotation; a skipped slot; caches of the dtype of the model."""
    for tokens in (1, 9):
        qkv = torch.randn(tokens, 4 + 2 + 2, 32).to(dtype)
        cos, sin = torch.randn(tokens, rotary // 2), torch.randn(tokens, rotary // 2)
        slots = torch.randperm(48)[:tokens]
        slots[0] = -1 if tokens > 1 else slots[0]
        norms = {"q_norm": torch.randn(32), "k_norm": torch.randn(32), "weight_offset": 1.0} if norm else {}
        results = []
        for kernels in (numba, torch_set):
            k_cache, v_cache = torch.zeros(6, 2, 8, 32, dtype=dtype), torch.zeros(6, 2, 8, 32, dtype=dtype)
            q, k, v = torch.split(qkv.clone(), [4, 2, 2], 1)
            q = kernels.rope_store(q, k, v, cos, sin, k_cache, v_cache, slots, **norms)
            results.append((q, k_cache, v_cache))
        for have, want in zip(*results, strict=True):
            close(have, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv(numba: Kernels, torch_set: Kernels, dtype: torch.dtype) -> None:
    """Float32 into any cache, rounded to nearest even; infinities and NaN survive."""
    k, v = torch.randn(6, 2, 16) * 1e3, torch.randn(6, 2, 16)
    v[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    caches = [torch.zeros(2, 3, 2, 8, 16, dtype=dtype) for _ in range(2)]
    for kernels, cache in zip((numba, torch_set), caches, strict=True):
        kernels.store_kv(k, v, cache[0], cache[1], torch.tensor([5, 17, -1, 0, 8, 23]))
    assert torch.equal(caches[0].nan_to_num(7.0), caches[1].nan_to_num(7.0))


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts(numba: Kernels, torch_set: Kernels, renormalize: bool) -> None:
    gate_up, down = torch.randn(5, 2 * PANEL, 48) / 7, torch.randn(5, 48, PANEL) / 8
    x, logits = torch.randn(13, 48), torch.randn(13, 5)
    want = torch_set.experts(gate_up, down)(x, logits, 2, renormalize)
    close(numba.experts(gate_up, down)(x, logits, 2, renormalize), want)
    close(numba.moe(x, logits, gate_up, down, 2, renormalize), want)


@pytest.mark.parametrize("block", [-1, 3, 2**30])
def test_blocks_outside_the_cache_are_refused(numba: Kernels, block: int) -> None:
    """Compiled kernels follow a block table wherever it leads, so it is looked at once per step."""
    q, cache = torch.randn(2, 4, 16), torch.zeros(3, 2, 4, 16)
    fine = AttentionMetadata.build([1, 1], [3, 7], [[2], [0, 1]], 4)
    numba.paged_attention(q, cache, cache, fine, 1.0)
    for tables in ([[block], [0, 1]], [[2], [0, block]]):
        with pytest.raises(LabError, match=r"block_tables|slot_mapping"):
            numba.paged_attention(q, cache, cache, AttentionMetadata.build([1, 1], [3, 7], tables, 4), 1.0)
        if block > 0:
            slots = AttentionMetadata.build([1, 1], [3, 7], tables, 4).slot_mapping
            with pytest.raises(LabError, match="slot_mapping"):
                numba.store_kv(torch.zeros(2, 2, 16), torch.zeros(2, 2, 16), cache, cache, slots)
    numba.paged_attention(q, cache, cache, AttentionMetadata.build([1, 1], [3, 7], [[2], [0, 1, block]], 4), 1.0)  # never read


def test_misfits_are_refused(numba: Kernels) -> None:
    """Compiled kernels read memory by address: a wrong shape must not get that far."""
    with pytest.raises(ValueError, match="inputs"):
        numba.linear(torch.randn(8, 16))(torch.randn(2, 17))
    k = torch.randn(2, 2, 16)
    cache = torch.zeros(2, 2, 8, 16)
    for slots in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="slot"):
            numba.store_kv(k, k, cache, cache, slots)
    with pytest.raises(ValueError, match="act"):
        numba.gated_act(torch.zeros(1, 4), "relu")


# ------------------------------------------------------------------------- batch-invariant numerics
def same(have: Tensor, want: Tensor) -> None:
    assert torch.equal(have, want), "not the same bits"


@pytest.mark.parametrize("rows", [2, 3, 5, 7, 13, 64, 97, 130])
def test_a_row_of_a_linear_layer_does_not_depend_on_the_batch(
    numba: Kernels, threads: int, rows: int
) -> None:
    x, residual, gain = torch.randn(rows, 600), torch.randn(rows, 2 * PANEL), torch.randn(600)
    linear = numba.linear(torch.randn(2 * PANEL, 600), torch.randn(2 * PANEL))

    def outputs(first: int, last: int) -> list[Tensor]:
        part = x[first:last]
        return [
            linear(part),
            numba.norm_linear(part, gain, 1e-5, linear),
            numba.linear_add(part, linear, residual[first:last].clone()),
            numba.gated_mlp(part, linear, "silu", gain, 1e-5),
        ]

    whole = outputs(0, rows)
    for row in (0, rows // 2, rows - 1):
        for have, want in zip(outputs(row, row + 1), whole, strict=True):
            same(have[0], want[row])
    set_num_threads(3 - threads)
    for have, want in zip(outputs(0, rows), whole, strict=True):
        same(have, want)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_of_a_row_does_not_depend_on_the_batch_or_the_threads(
    numba: Kernels, threads: int, window: int | None
) -> None:
    built = build(replace(LONG, window=window))
    whole, token = numba.paged_attention(*built.arguments()), 0
    for row, (new, before) in enumerate(built.case.rows):
        meta = AttentionMetadata.build([new], [new + before], [built.tables[row]], built.case.block_size)
        alone = numba.paged_attention(
            built.q[token : token + new], *built.arguments()[1:3], meta, *built.arguments()[4:]
        )
        same(alone.out, whole.out[token : token + new])
        same(alone.lse, whole.lse[token : token + new])
        token += new
    set_num_threads(3 - threads)
    same(numba.paged_attention(*built.arguments()).out, whole.out)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("window", [None, 30])
def test_a_prompt_in_chunks_yields_the_bits_of_the_whole(
    numba: Kernels, chunk: int, window: int | None
) -> None:
    """So a prefix found in the cache, or a preempted and recomputed request, changes no token."""
    built = build(Case(rows=((600, 0),), heads=1, window=window, block_size=16))
    whole, meta = numba.paged_attention(*built.arguments()), built.meta
    for first in (0, 130, 511, 513, 600 - chunk):
        last = first + chunk
        meta = AttentionMetadata.build([chunk], [last], built.tables, 16)
        part = numba.paged_attention(
            built.q[first:last], *built.arguments()[1:3], meta, *built.arguments()[4:]
        )
        same(part.out, whole.out[first:last])
        same(part.lse, whole.lse[first:last])


def test_a_token_of_a_mixture_does_not_depend_on_the_batch(numba: Kernels) -> None:
    experts = numba.experts(torch.randn(4, 2 * PANEL, 48), torch.randn(4, 48, PANEL))
    x, logits = torch.randn(20, 48), torch.randn(20, 4)
    whole = experts(x, logits, 2, True)
    for row in (0, 7, 19):
        same(experts(x[row : row + 1], logits[row : row + 1], 2, True)[0], whole[row])


# ------------------------------------------------------------------------------------------- plan
@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3000)), min_size=1, max_size=12),
    heads=st.sampled_from([1, 4, 8]),
    group=st.sampled_from([1, 4, 80]),
    workers=st.sampled_from([1, 2, 3, 16]),
    window=st.sampled_from([None, 50, 900]),
    causal=st.booleans(),
)
def test_the_plan_covers_every_query_once_and_deals_all_units(
    rows: list[tuple[int, int]], heads: int, group: int, workers: int, window: int | None, causal: bool
) -> None:
    new, lens = (
        np.array([n for n, _ in rows], np.int32),
        np.array([n + before for n, before in rows], np.int32),
    )
    cu = np.concatenate(([0], np.cumsum(new))).astype(np.int32)
    plan = plan_attention(cu, lens, heads=heads, group=group, threads=workers, window=window, causal=causal)
    covered = [np.zeros(length, np.int64) for length in lens]
    for row, token, tokens, start, stop, partial in plan.items.tolist():
        own = lens[row] - new[row] + token - cu[row]
        assert 0 <= start < stop <= lens[row] and cu[row] <= token and token + tokens <= cu[row + 1]
        covered[row][start:stop] += tokens
        assert partial < 0 or start // SEGMENT == (stop - 1) // SEGMENT
        assert stop <= (own + tokens if causal else lens[row])
        assert window is None or start >= own - window + 1
    for row, length in enumerate(lens):
        for position in range(0, length, 97):
            own = np.arange(length - new[row], length)
            seen = (position <= own) if causal else np.ones(len(own), bool)
            seen &= position > own - (window or length + 1)
            assert covered[row][position] >= seen.sum()
            assert covered[row][position] <= new[row]
    assert (
        plan.starts[0] == 0
        and plan.starts[-1] == len(plan.items) * heads
        and (np.diff(plan.starts) >= 0).all()
    )
    meta = AttentionMetadata.build(new.tolist(), lens.tolist(), [[0] * n for n in lens], 1, mask=MASKS[not causal])
    quick = quick_plan(Pool(), meta, heads, group, workers, window)
    assert (quick is None) == (len(plan.merges) > 0)
    for name in ("items", "starts", "load") if quick is not None else ():
        assert (getattr(quick, name) == getattr(plan, name)).all(), name
    divided = sum(parts for _, _, _, parts in plan.merges.tolist())
    assert divided == (plan.items[:, 5] >= 0).sum()
    assert plan.num_partials == plan.items[plan.items[:, 5] >= 0, 2].sum()


def test_a_long_row_among_short_ones_is_shared() -> None:
    lens = np.array([16000] + [40] * 7, np.int32)
    cu = np.arange(9, dtype=np.int32)
    plan = plan_attention(cu, lens, heads=1, group=8, threads=2)
    assert len(plan.merges) == 1 and plan.imbalance < 1.1


def test_the_plan_is_made_once_for_all_layers(numba: Kernels) -> None:
    built = build(LONG)
    assert numba.plan(built.meta, 2, 2, None) is numba.plan(built.meta, 2, 2, None)  # type: ignore[attr-defined]
    assert numba.plan(built.meta, 2, 2, 100) is not numba.plan(built.meta, 2, 2, None)  # type: ignore[attr-defined]
