"""Draft and verify (seam E): drafts ride behind the last committed token, and one pass tells which of them hold.

    committed ... t | d0 d1 d2 d3      the item: t and its drafts, all in one span
                    | a  b  c  x  y    what the model says behind t, d0, d1, d2, d3
    d0 = a, d1 = b, d2 != c            so a b c are committed, and the KV behind b is cut off

The tokens are those of plain decoding: each is sampled from the same logits with the same random number (keyed by
request and position), and a draft holds if it is that token. For drafts that are themselves not random this accepts as
often as rejection sampling does: with the target's probability of the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from llmlab.decoding.autoregressive import Autoregressive
from llmlab.seams import RequestView
from llmlab.types import Commit, ItemResult, Request, Span, WorkItem


class Speculative(Autoregressive):
    """Verify what was proposed; without proposals, plain decoding."""

    name = "speculative"
    steady = False  # drafts come and go

    def work(self, request: RequestView) -> WorkItem | None:
        if not request.drafts:
            return None if request.num_pending else Autoregressive.work(self, request)
        if request.num_pending:
            return None
        room = request.request.max_total_tokens - request.num_tokens
        if request.num_new_tokens <= 0 or room <= 0:
            return None
        span = Span(request.num_computed_tokens, request.num_tokens + len(request.drafts))
        mask = "tree" if request.parents else "causal"
        whole = WorkItem(request.id, span, mask=mask, drafts=request.drafts, parents=request.parents)  # type: ignore[arg-type]
        return within(whole, room - 1)

    def accept(self, request: Request, proposed: Sequence[int], item: WorkItem, result: ItemResult) -> Commit:
        if not item.drafts:
            return Commit(result.token_ids, None, result.drafts, result.parents) if result.drafts else Commit(result.token_ids)
        kept = item.tokens[1] - len(item.drafts) + len(accepted_path(item, result.token_ids))
        return Commit(result.token_ids, kept, result.drafts, result.parents)


def within(item: WorkItem, levels: int) -> WorkItem:
    """The item without drafts that lie deeper than `levels` behind the last committed token."""
    if not item.parents:
        return item.shortened(item.num_committed + min(len(item.drafts), levels))
    deep = depths(item)
    if max(deep) <= levels:
        return item
    keep = [i for i, depth in enumerate(deep) if depth <= levels]
    place = {-1: -1, **{old: new for new, old in enumerate(keep)}}
    stop = item.tokens[1] - len(item.drafts) + len(keep)
    return msgspec.structs.replace(
        item, tokens=Span(item.tokens[0], stop), drafts=tuple([item.drafts[i] for i in keep]),
        parents=tuple([place[item.parents[i]] for i in keep]), mask="tree" if keep else "causal",
    )  # fmt: skip


def parents_of(item: WorkItem) -> tuple[int, ...]:
    """The parent of each draft; those of a chain follow one another."""
    return item.parents or tuple(range(-1, len(item.drafts) - 1))


def branches(item: WorkItem) -> bool:
    """Whether its drafts are a tree and not just a chain."""
    return item.mask == "tree" and item.parents != tuple(range(-1, len(item.parents) - 1))


def depths(item: WorkItem) -> list[int]:
    """How far each draft lies behind the last committed token, from 1 on."""
    found: list[int] = []
    for parent in parents_of(item):
        found.append(1 if parent < 0 else 1 + found[parent])
    return found


def lineages(parents: Sequence[int]) -> list[int]:
    """For each node of a tree a number whose bit j is set for its ancestors j and for itself."""
    found: list[int] = []
    for i, parent in enumerate(parents):
        found.append((found[parent] if parent >= 0 else 0) | 1 << i)
    return found


def accepted_path(item: WorkItem, token_ids: Sequence[int]) -> list[int]:
    """Indices of the drafts that hold, from the root on, given the tokens that the item yielded."""
    if not item.parents:
        wrong = (i for i, (draft, token) in enumerate(zip(item.drafts, token_ids)) if draft != token)
        return list(range(next(wrong, min(len(item.drafts), len(token_ids)))))
    path: list[int] = []
    parents = parents_of(item)
    for token in token_ids:
        at = path[-1] if path else -1
        child = next((i for i, parent in enumerate(parents) if parent == at and item.drafts[i] == token), None)
        if child is None:
            break
        path.append(child)
    return path


class Tried(NamedTuple):
    """What a verification tells of its drafts: `first_choices` that were tried (those behind a failure tell nothing), how many
    `held`; and of `siblings`, tried where those before them failed, how many held."""

    first_choices: int
    held: int
    siblings: int = 0
    siblings_held: int = 0


def tried(item: WorkItem, path: Sequence[int]) -> Tried:
    """What became of the drafts of an item, of which those in `path` hold."""
    if not item.parents:
        return Tried(min(len(item.drafts), len(path) + 1), len(path))
    first = held = siblings = siblings_held = 0
    for at, node in zip((-1, *path), (*path, -1)):
        children = [i for i, parent in enumerate(item.parents) if parent == at]
        if not children:
            break
        rank = children.index(node) if node in children else len(children)
        first, held = first + 1, held + (rank == 0)
        siblings, siblings_held = siblings + min(rank, len(children) - 1), siblings_held + (0 < rank < len(children))
    return Tried(first, held, siblings, siblings_held)


def paths(drafts: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
    """The drafts from the root to each draft, itself included. Without `parents` they are a chain."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(drafts, parents or range(-1, len(drafts) - 1)):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found
