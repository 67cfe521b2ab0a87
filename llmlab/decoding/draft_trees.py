"""The forms of draft trees (seam E): which nodes there are, and what is left if not all of them can be filled.

    "2x2x1"    two first tokens, two behind each of them, one behind each of those: 2 + 4 + 4 nodes

Nodes stand in the order of their ranks: the chain of first choices, then what takes one second choice, and so on. So a tree
that is cut to k nodes, for want of budget or of room, loses the least likely ones and ends as the chain that it grew around.
Token trees: SpecInfer (arXiv 2305.09781, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from llmlab.seams import Proposal


@lru_cache(maxsize=64)
def tree_plan(branches: tuple[int, ...]) -> tuple[int, ...]:
    """The parent of each node of a tree with `branches[d]` children of each node at depth d; -1 for the text's end."""
    nodes = [ranks for depth in range(1, len(branches) + 1) for ranks in product(*map(range, branches[:depth]))]
    nodes.sort(key=lambda ranks: (sum(ranks), len(ranks), ranks))
    place = {ranks: i for i, ranks in enumerate(nodes)}
    return tuple([place.get(ranks[:-1], -1) for ranks in nodes])


def chain_plan(length: int) -> tuple[int, ...]:
    """The parents of a chain."""
    return tuple(range(-1, length - 1))


def plan_of(branches: tuple[int, ...], k: int) -> tuple[int, ...]:
    """The parents of at most `k` drafts: of a tree, or of a chain if there are no branches."""
    return tree_plan(branches)[:k] if branches else chain_plan(k)


@lru_cache(maxsize=256)
def fed_by_level(plan: tuple[int, ...]) -> tuple[int, ...]:
    """How many tokens a draft model computes in each of its passes: the text's last one, then the nodes that others follow."""
    depths: list[int] = []
    for parent in plan:
        depths.append(1 + (depths[parent] if parent >= 0 else 0))
    inner = [0, *(depths[node] for node in sorted(set(plan)) if node >= 0)]
    return tuple([inner.count(depth) for depth in range(max(inner) + 1)]) if plan else ()


def is_chain(plan: Sequence[int]) -> bool:
    return tuple(plan) == chain_plan(len(plan))


def planted(plan: Sequence[int], tokens: Sequence[int | None], odds: Sequence[Any] = ()) -> Proposal:
    """The nodes of `plan` that have a token, and whose ancestors have one."""
    place = {-1: -1}
    for node, token in enumerate(tokens):
        if token is not None and plan[node] in place:
            place[node] = len(place) - 1
    kept = [node for node in place if node >= 0]
    drawn = tuple([odds[node] for node in kept]) if any(q is not None for q in odds) else ()
    return Proposal(tuple([int(tokens[node] or 0) for node in kept]), tuple([place[plan[node]] for node in kept]), drawn)
