"""The torch reference against dense float64 arithmetic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_util import Case, build, cases, expected

from llmlab.kernels import reference
from llmlab.kernels.layout import AttentionMetadata, AttentionState
from llmlab.types import LabError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@settings(max_examples=30)
@given(cases(longest=60))
def test_attention_is_dense_attention(case: Case) -> None:
    built = build(case)
    state = reference.paged_attention(*built.arguments())
    out, lse = expected(built)
    np.testing.assert_allclose(state.out.numpy(), out, atol=2e-6)
    np.testing.assert_allclose(state.lse.numpy(), lse, atol=2e-6, rtol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 2**16))
def test_merging_states_is_attention_over_the_union_in_any_order(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 4, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    cuts = [0, *sorted(torch.randint(0, 31, (2,)).tolist()), 30]

    def over(first: int, last: int) -> AttentionState:
        seen = torch.ones(3, last - first, dtype=torch.bool)
        return reference.attend(q, k[first:last], v[first:last], seen, 0.3, None)

    a, b, c = (over(first, last) for first, last in pairwise(cuts))
    merge, whole = reference.merge_states, over(0, 30)
    for state in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        torch.testing.assert_close(state.out, whole.out, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state.lse, whole.lse, atol=1e-6, rtol=1e-5)


def test_nothing_seen_is_neutral() -> None:
    state = AttentionState(torch.randn(2, 3, 4), torch.randn(2, 3))
    nothing = AttentionState(torch.zeros(2, 3, 4), torch.full((2, 3), float("-inf")))
    for merged in (reference.merge_states(state, nothing), reference.merge_states(nothing, state)):
        torch.testing.assert_close(merged.out, state.out)
        torch.testing.assert_close(merged.lse, state.lse)
    both = reference.merge_states(nothing, nothing)
    assert both.out.abs().max() == 0 and both.lse.isinf().all()


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(offset: float) -> None:
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    total = (x + residual).double()
    want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    normed, stream = reference.add_rms_norm(x, residual, weight, 1e-5, offset)
    torch.testing.assert_close(normed.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(stream, x + residual)
    torch.testing.assert_close(reference.rms_norm(stream, weight, 1e-5, offset), normed)


@pytest.mark.parametrize("rotary", [0, 6, 16])
def test_rope_turns_pairs_and_leaves_the_rest(rotary: int) -> None:
    """A pair (i, i + half) is a complex number that is multiplied by cos + i sin."""
    x, angle = torch.randn(4, 2, 16, dtype=torch.float64), torch.randn(4, rotary // 2, dtype=torch.float64)
    turned = reference.rotate_half(x, angle.cos(), angle.sin()).double()
    half = rotary // 2
    pairs = (
        torch.complex(x[..., :half], x[..., half:rotary])
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    torch.testing.assert_close(turned[..., :half], pairs.real, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(turned[..., half:rotary], pairs.imag, atol=1e-6, rtol=1e-5)
    assert torch.equal(turned[..., rotary:], x[..., rotary:])


def test_store_writes_its_slots_and_no_other() -> None:
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    k_cache, v_cache = torch.zeros(5, 2, 8, 4), torch.zeros(5, 2, 8, 4)
    reference.store_kv(k, v, k_cache, v_cache, torch.tensor([17, -1, 8]))
    assert torch.equal(k_cache[2, :, 1], k[0]) and torch.equal(v_cache[1, :, 0], v[2])
    assert int(k_cache.count_nonzero()) == int(v_cache.count_nonzero()) == 2 * 2 * 4


def test_copied_blocks_are_all_read_before_the_first_is_written() -> None:
    pool = torch.arange(4.0).repeat_interleave(6).view(4, 2, 3)
    reference.copy_blocks(pool, pool, torch.tensor([[0, 1], [1, 0], [1, 3]]))
    assert pool[:, 0, 0].tolist() == [1.0, 0.0, 2.0, 1.0]


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_mixture_is_the_weighted_sum_of_its_experts(renormalize: bool) -> None:
    x, logits = torch.randn(6, 8), torch.randn(6, 5)
    gate_up, down = torch.randn(5, 12, 8), torch.randn(5, 8, 6)
    y = reference.moe(x, logits, gate_up, down, 2, renormalize)
    for token in range(6):
        weights = torch.softmax(logits[token].double(), -1)
        best = weights.argsort(descending=True)[:2]
        kept = weights[best] / (weights[best].sum() if renormalize else 1.0)
        want = torch.zeros(8, dtype=torch.float64)
        for weight, expert in zip(kept, best, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            want += weight * (down[expert].double() @ (gate * gate.sigmoid() * up))
        torch.testing.assert_close(y[token].double(), want, atol=1e-4, rtol=1e-4)


def test_layout_of_plain_lists() -> None:
    meta = AttentionMetadata.build([1, 3], [9, 3], [[4, 2], [7]], 8)
    assert meta.cu_seqlens_q.tolist() == [0, 1, 4]
    assert meta.slot_mapping.tolist() == [2 * 8, 7 * 8, 7 * 8 + 1, 7 * 8 + 2]
    assert (meta.max_seqlen_q, meta.num_rows) == (3, 2)
    prefix = AttentionMetadata.build([3], [2], [[1]], 8, mask="full")
    assert prefix.slot_mapping.tolist() == [-1, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (([4], [3], [[0]], 8), r"query_lens\[0\]"),
        (([1], [9], [[0]], 8), r"block_tables\[0\]"),
    ],
)
def test_impossible_layouts_are_named(arguments: tuple, field: str) -> None:
    with pytest.raises(LabError, match=field):
        AttentionMetadata.build(*arguments)
    with pytest.raises(LabError, match="mask"):
        AttentionMetadata.build([1], [1], [[0]], 8, mask="tree")
    with pytest.raises(LabError, match="seq_lens"):
        wide = torch.zeros(1, dtype=torch.int64)
        AttentionMetadata(torch.zeros(2, dtype=torch.int32), wide, wide.int()[:, None], wide, 1)
    with pytest.raises(LabError, match="act"):
        reference.gated_act(torch.zeros(1, 2), "relu")
