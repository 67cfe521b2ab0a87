"""What a step looks like to an attention kernel, and what it gives back.

The layout is ragged: the query tokens of all rows lie one behind the other, without padding, and the
keys and values of a row are scattered over blocks that its block table names.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab.kernels.capability import KernelChoice
from llmlab.types import MAX_NODES, LabError

__all__ = ["HOST", "MASKS", "PLAN_FACTS", "AttentionMetadata", "AttentionState", "KernelChoice", "TreeMask", "TreeRow", "pinned", "sent"]

MASKS = ("causal", "full")
HOST = "lengths on the host"
FEW = 128  # query tokens of a step
PLAN_FACTS = "what a log keeps of the step's attention plans"


def pinned(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array as a host tensor, copied to where a GPU reads it by itself. A copy from ordinary memory would make the host wait
    for all that the device has still to do."""
    host = torch.from_numpy(array)
    return host.pin_memory() if torch.device(device).type == "cuda" else host


def sent(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array on a device; the copy to a GPU is queued."""
    return pinned(array, device).to(device, non_blocking=True)


class TreeRow(NamedTuple):
    """Of one row: its last positions, from `fork` on, hold the nodes of a tree, one per position, parents before children.

    `seen`: for each of the row's last query tokens a number whose bit j tells that it sees node j: its ancestors, and itself.
    A row without a tree: `TreeRow()`."""

    fork: int = 0
    seen: Sequence[int] = ()


class TreeMask(NamedTuple):
    """`forks [T]`, `seen [T]`, both int64: of each query token of the step what `TreeRow` says; seen = 0: no node."""

    forks: Tensor
    seen: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """The ragged layout of one step, built once and shared by all layers. R rows, T query tokens.

    - `cu_seqlens_q [R+1] int32`: row r owns the query tokens `cu_seqlens_q[r] : cu_seqlens_q[r+1]`.
    - `seq_lens [R] int32`: length of the row's KV INCLUDING the tokens of this step.
    - `block_tables [R, max_blocks] int32`: block of position p is `block_tables[r, p // block_size]`;
      entries behind the last used block are never read.
    - `slot_mapping [T] int64`: where the KV of each query token is written
      (slot s = block `s // block_size`, offset `s % block_size`); -1 writes nothing.
    - `max_seqlen_q`: the longest row of queries.
    - `mask`: "causal": query i of row r, at position `seq_lens[r] - q_len[r] + i`, sees the KV
      positions up to its own; "full": it sees the whole row (blocks of a diffusion model, or the
      shared prefix of a cascade). A sliding window bounds the past in both.
    - `tree`: rows that hold trees, under "causal" only. A node sees all positions before its row's fork and its own ancestors;
      for a window its position is the fork plus its depth. Position and slot of a node differ: the caller rotates it by depth.

    `derived` is for kernel sets: what they compute once per step and share between the layers. Its entry
    HOST holds (cu_seqlens_q, seq_lens) as numpy arrays, so that planning never waits for a device; PLAN_FACTS
    a list of `GridPlan.facts`, one for each plan that was made.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_seqlen_q: int
    mask: str = "causal"
    tree: TreeMask | None = None
    derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise LabError("mask", self.mask, "is not a mask", f"choose one of {', '.join(MASKS)}")
        if self.tree is not None and self.mask != "causal":
            raise LabError("mask", self.mask, "does not go with a tree", "choose causal")
        ints = {
            "cu_seqlens_q": self.cu_seqlens_q,
            "seq_lens": self.seq_lens,
            "block_tables": self.block_tables,
        }
        for name, tensor in ints.items():
            if tensor.dtype is not torch.int32:
                raise LabError(name, tensor.dtype, "is not the dtype of an index", "give torch.int32")
        rows = self.seq_lens.shape[0]
        for name, have, want in (
            ("cu_seqlens_q", self.cu_seqlens_q.shape[0], rows + 1),
            ("block_tables", self.block_tables.shape[0], rows),
        ):
            if have != want:
                raise LabError(name, have, f"entries do not fit seq_lens of {rows} rows", f"give {want}")

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Where the block tables lie and how wide they are, the rows, their lengths: for compiled kernels."""
        tables = self.block_tables
        lengths = self.seq_lens.data_ptr(), self.cu_seqlens_q.data_ptr()
        return tables.data_ptr(), tables.stride(0), self.num_rows, *lengths

    @property
    def num_rows(self) -> int:
        return int(self.seq_lens.shape[0])

    def host_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(cu_seqlens_q, seq_lens) in host memory; copied from the device if `build` did not make this."""
        if HOST not in self.derived:
            self.derived[HOST] = (self.cu_seqlens_q.cpu().numpy(), self.seq_lens.cpu().numpy())
        lengths: tuple[np.ndarray, np.ndarray] = self.derived[HOST]
        return lengths

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        *,
        mask: str = "causal",
        trees: Sequence[TreeRow] = (),
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """From plain lists, one entry per row; every block table covers `seq_lens[r]` positions.

        The new tokens of a row are its last `query_lens[r]` positions. Under "full" there may be more
        queries than KV (a short prefix, seen by a longer chunk); those before the row get slot -1. `trees`: one per row,
        or none.
        """
        num_q, lens = np.asarray(query_lens, np.int64), np.asarray(seq_lens, np.int64)
        longest = max(query_lens, default=0)
        single = longest == min(query_lens, default=0) == 1 and min(seq_lens) > 0
        if not single and mask == "causal" and (num_q > lens).any():
            row = int(np.argmax(num_q > lens))
            problem = f"is more than seq_lens[{row}] = {lens[row]}"
            raise LabError(f"query_lens[{row}]", int(num_q[row]), problem, "count the new tokens in both")
        tables = rectangular(block_tables, lens, block_size)
        if single or sum(query_lens) <= FEW:
            starts, slots = _few_slots(query_lens, seq_lens, block_tables, block_size)
        else:
            starts, slots = _slots(num_q, lens, tables, block_size)

        meta = cls(
            cu_seqlens_q=sent(starts.astype(np.int32), device),
            seq_lens=sent(lens.astype(np.int32), device),
            block_tables=sent(tables, device),
            slot_mapping=sent(slots, device),
            max_seqlen_q=int(longest),
            mask=mask,
            tree=_tree_mask(trees, query_lens, device) if any(tree.seen for tree in trees) else None,
        )
        meta.derived[HOST] = (starts, lens)
        return meta


def _tree_mask(trees: Sequence[TreeRow], query_lens: Sequence[int], device: torch.device | str) -> TreeMask:
    """Forks and seen nodes of all query tokens."""
    forks, seen = [], []
    for tree, count in zip(trees, query_lens, strict=True):
        if len(tree.seen) > count or max(tree.seen, default=0) >> MAX_NODES:
            raise LabError("trees", len(tree.seen), f"nodes do not fit {count} query tokens and trees of {MAX_NODES} nodes")
        forks += [tree.fork] * count
        seen += [0] * (count - len(tree.seen)) + list(tree.seen)
    both = sent(np.array([forks, seen], np.int64), device)
    return TreeMask(both[0], both[1])


def _slots(num_q: np.ndarray, lens: np.ndarray, tables: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(cu_seqlens_q, slot_mapping) of rows of any length."""
    starts = np.concatenate(([0], np.cumsum(num_q)))
    row_of = np.repeat(np.arange(len(lens)), num_q)
    position = np.arange(starts[-1]) - starts[row_of] + (lens - num_q)[row_of]
    blocks = tables[row_of, np.maximum(position, 0) // block_size].astype(np.int64)
    return starts, np.where(position < 0, -1, blocks * block_size + position % block_size)


def _few_slots(
    num_q: Sequence[int], lens: Sequence[int], tables: Sequence[Sequence[int]], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """`_slots` of rows with one new token each, or of few tokens: plain Python is done before numpy begins."""
    slots = [table[p // size] * size + p % size if p >= 0 else -1 for q, n, table in zip(num_q, lens, tables, strict=True)
             for p in range(n - q, n)]  # fmt: skip
    return np.array([0, *accumulate(num_q)], np.int64), np.array(slots, np.int64)


def rectangular(block_tables: Sequence[Sequence[int]], lens: np.ndarray, block_size: int) -> np.ndarray:
    """Block tables as one int32 matrix, padded with 0 (a block that padding never reads)."""
    sizes = list(map(len, block_tables))
    short = [row for row, (size, length) in enumerate(zip(sizes, lens.tolist())) if size * block_size < length]
    if short:
        row = short[0]
        problem = f"does not cover {lens[row]} positions in blocks of {block_size}"
        raise LabError(f"block_tables[{row}]", list(block_tables[row]), problem)
    width = max(sizes, default=0) or 1
    padded = [(*table, *[0] * (width - size)) if size < width else table for table, size in zip(block_tables, sizes)]
    return np.array(padded, np.int32).reshape(len(sizes), width)


@dataclass(frozen=True, eq=False)
class AttentionState:
    """Attention over a set of keys, in the form that merges with attention over other keys.

    `out [T, Hq, D]` in the dtype of the queries; `lse [T, Hq] float32`, the log of the sum of
    exponentials of the scores (natural log). A query that saw no key has out 0 and lse -inf.
    Source: the attention state of FlashInfer, arXiv 2501.01005, section 2.2.
    """

    out: Tensor
    lse: Tensor
