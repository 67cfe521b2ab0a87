"""Ragged attention cases, and what they must yield, computed densely in float64 without any block table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from llmlab.kernels.layout import AttentionMetadata


@dataclass(frozen=True)
class Case:
    """A step: rows of (query tokens, tokens before them) over scattered blocks."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 2
    group: int = 2
    dim: int = 32
    block_size: int = 8
    window: int | None = None
    softcap: float | None = None
    mask: str = "causal"
    seed: int = 0

    @property
    def scale(self) -> float:
        return 0.5 * self.dim**-0.5


@dataclass(frozen=True, eq=False)
class Built:
    """The tensors of a case. `keys[r]`, `values[r]`: [kv_len, Hkv, D], as they lie in the cache.

    All slots that no query may read hold NaN: unused ones, and those that a sliding window has left.
    """

    case: Case
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMetadata
    tables: list[list[int]]
    keys: list[Tensor]
    values: list[Tensor]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata, float, int | None, float | None]:
        case = self.case
        return self.q, self.k_cache, self.v_cache, self.meta, case.scale, case.window, case.softcap


def build(case: Case, dtype: torch.dtype = torch.float32) -> Built:
    """`dtype` is that of the cache; the queries are float32."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    lens = [new + before for new, before in case.rows]
    needed = [-(-length // case.block_size) for length in lens]
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    shape = (sum(needed) + 3, case.heads, case.block_size, case.dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    keys = [normal(length, case.heads, case.dim) for length in lens]
    values = [normal(length, case.heads, case.dim) for length in lens]
    for table, row_keys, row_values, (_, before) in zip(tables, keys, values, case.rows, strict=True):
        oldest = 0 if case.window is None else max(0, before - case.window + 1)
        for position in range(oldest, len(row_keys)):
            block, offset = table[position // case.block_size], position % case.block_size
            k_cache[block, :, offset], v_cache[block, :, offset] = row_keys[position], row_values[position]
    q = normal(sum(new for new, _ in case.rows), case.heads * case.group, case.dim).float()
    meta = AttentionMetadata.build(
        [new for new, _ in case.rows], lens, tables, case.block_size, mask=case.mask
    )
    return Built(case, q, k_cache, v_cache, meta, tables, keys, values)


def expected(built: Built) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64, one query and one head at a time."""
    case, q = built.case, built.q.double().numpy()
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    token = 0
    for (new, before), keys, values in zip(case.rows, built.keys, built.values, strict=True):
        for i in range(new):
            own = before + i
            last = own if case.mask == "causal" else len(keys) - 1
            first = 0 if case.window is None else max(0, own - case.window + 1)
            seen = slice(first, last + 1)
            for head in range(q.shape[1]):
                k, v = (t[seen, head // case.group].double().numpy() for t in (keys, values))
                scores = k @ q[token, head] * case.scale
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                top = scores.max()
                weights = np.exp(scores - top)
                lse[token, head] = top + np.log(weights.sum())
                out[token, head] = weights @ v / weights.sum()
            token += 1
    return out, lse


def cases(longest: int = 150) -> st.SearchStrategy[Case]:
    """Decoding rows, chunks and whole prompts mixed; GQA ratios; blocks of 1, 8, 16; windows; soft caps."""
    row = st.one_of(
        st.tuples(st.just(1), st.integers(0, longest)),
        st.tuples(st.integers(1, 40), st.integers(0, longest)),
        st.tuples(st.integers(1, 90), st.just(0)),
    )
    return st.builds(
        Case,
        rows=st.lists(row, min_size=1, max_size=5).map(tuple),
        heads=st.sampled_from([1, 2, 4]),
        group=st.sampled_from([1, 2, 3, 8]),
        dim=st.sampled_from([16, 32, 64, 80]),
        block_size=st.sampled_from([1, 8, 16]),
        window=st.sampled_from([None, None, 1, 7, 70]),
        softcap=st.sampled_from([None, None, 4.0]),
        mask=st.sampled_from(["causal", "causal", "full"]),
        seed=st.integers(0, 2**16),
    )
