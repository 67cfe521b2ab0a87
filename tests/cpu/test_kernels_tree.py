"""Attention of trees: a node sees the text and its own ancestors, as if they alone stood behind the text."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab.decoding.speculative import lineages
from llmlab.kernels.dispatch import Kernels, make_kernels
from llmlab.kernels.layout import AttentionMetadata, TreeRow
from llmlab.types import MAX_NODES, LabError

HEADS, GROUP, DIM = 2, 4, 32


class Grown(NamedTuple):
    """A row: tokens of the text in the cache, tokens of the text that are new, and the parents of the nodes behind them."""

    past: int
    new: int
    parents: tuple[int, ...]


@st.composite
def grown(draw: st.DrawFn) -> Grown:
    parents = tuple(draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(0, 20))))
    return Grown(draw(st.integers(0, 150)), draw(st.integers(1, 5)), parents)


@pytest.fixture(scope="module", params=["torch", "numba"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return make_kernels(request.param)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(grown(), min_size=1, max_size=3), size=st.sampled_from([1, 8, 16]), seed=st.integers(0, 999),
       window=st.sampled_from([None, None, 1, 4, 70]), softcap=st.sampled_from([None, 4.0]))  # fmt: skip
def test_a_node_sees_the_text_and_its_ancestors(
    kernels: Kernels, rows: list[Grown], size: int, seed: int, window: int | None, softcap: float | None
) -> None:
    check(kernels, rows, size, seed, window, softcap)


def test_a_tree_behind_several_segments(kernels: Kernels) -> None:
    """The nodes lie on both sides of a segment's border, and in more than one tile of queries."""
    parents = tuple((i - 1) // 2 for i in range(MAX_NODES))
    check(kernels, [Grown(1000, 1, parents), Grown(3, 1, (-1, -1, 0))], 16, 5, None, None)


def check(kernels: Kernels, rows: list[Grown], size: int, seed: int, window: int | None, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [row.past + row.new + len(row.parents) for row in rows]
    counts = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(counts), generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    k_cache, v_cache = (torch.randn(sum(counts), HEADS, size, DIM, generator=generator) for _ in range(2))
    queries = [row.new + len(row.parents) for row in rows]
    q = torch.randn(sum(queries), HEADS * GROUP, DIM, generator=generator)
    trees = [TreeRow(row.past + row.new, lineages(row.parents)) for row in rows]
    meta = AttentionMetadata.build(queries, lengths, tables, size, trees=trees)
    found = kernels.paged_attention(q, k_cache, v_cache, meta, 0.2, window, softcap)
    at = 0
    for row, table in zip(rows, tables):
        slots = torch.tensor([table[p // size] * size + p % size for p in range(row.past + row.new + len(row.parents))])
        for i in range(row.new + len(row.parents)):
            text = list(range(min(row.past + i + 1, row.past + row.new)))
            node = i - row.new
            lineage = lineages(row.parents)[node] if node >= 0 else 0
            seen = slots[text + [row.past + row.new + j for j in range(len(row.parents)) if lineage >> j & 1]]
            want = alone(q[at], k_cache, v_cache, seen, size, window, softcap)
            torch.testing.assert_close(found.out[at : at + 1], want.out, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(found.lse[at : at + 1], want.lse, atol=2e-5, rtol=1e-5)
            at += 1


def alone(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, size: int, window: int | None,
          softcap: float | None):  # type: ignore[no-untyped-def]  # fmt: skip
    """The last query of a plain row whose KV is what lies in `slots`, one behind the other."""
    k, v = (cache[slots // size, :, slots % size].transpose(0, 1)[None].contiguous() for cache in (k_cache, v_cache))
    meta = AttentionMetadata.build([1], [len(slots)], [[0]], len(slots))
    return make_kernels("torch").paged_attention(q[None], k, v, meta, 0.2, window, softcap)


def test_trees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LabError, match="nodes do not fit 1 query tokens"):
        AttentionMetadata.build([1], [4], [[0]], 8, trees=[TreeRow(2, [1, 3])])
    with pytest.raises(LabError, match="trees of 63 nodes"):
        AttentionMetadata.build([1], [4], [[0]], 8, trees=[TreeRow(3, [1 << MAX_NODES])])
    with pytest.raises(LabError, match="does not go with a tree"):
        AttentionMetadata.build([1], [4], [[0]], 8, trees=[TreeRow(3, [1])], mask="full")
