"""Rejection sampling of drafts: what comes out is distributed as the target alone would have it.

Chain (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318): a draft x that was drawn from q is
accepted with probability min(1, p(x) / q(x)); at the first rejection a token is drawn from max(0, p - q), normalised.

Tree (SpecInfer, arXiv 2305.09781, algorithm 2): the children of a node are tried one after the other; each that is rejected
takes its share out of p. That holds for any q that a child was drawn from, also for one that depends on the siblings before
it: so siblings are drawn without replacement here, which accepts more than drawing them independently. A draft that was chosen
and not drawn (n-grams, the k most likely tokens of a model) has q = 1 at itself.

The engine's other rule, which is lossless, too (`decoding.speculative`), draws the target's token with the random number of
its position and compares. That keeps each answer what it is without drafts, and accepts a chosen draft with the probability p(x);
one that was drawn with the same number holds as often as the two models rank alike. Sampling with rejection accepts
sum(min(p, q)) of drafts that were drawn from q, however they rank.

Pure and vectorised over rows [n] of one shape; float64 probabilities. The engine calls it with one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Odds = Callable[[int], np.ndarray]
# Numbers [n] in [0, 1) for the token `depth` behind the text. Draw LAST decides which token it is when all drafts are rejected
# or there are none, those behind it decide about the children that are tried. All must be independent of what drew the drafts:
# so none is draw 0, with which plain decoding samples, and drafts that shall agree with it.
Dice = Callable[[int, int], np.ndarray]
LAST = 1
DRAFT = 1 << 20  # draws from here on belong to those who draft


class Walk(NamedTuple):
    """Per row: the node that was reached (-1: the root) and the token behind it."""

    nodes: np.ndarray
    tokens: np.ndarray


def accept_tree(p: Odds, q: Callable[[int], np.ndarray | None], drafts: np.ndarray, parents: Sequence[int], dice: Dice) -> Walk:
    """Which of `drafts [n, m]` hold; nodes come after their `parents`. `p(node) [n, V]`: the target's probabilities behind a
    node (-1: behind the text), asked for nodes that are reached only. `q(node) [n, V]`: what a draft was drawn from given all
    before it, None if it was chosen."""
    n, m = drafts.shape
    nodes, tokens, depths = np.full(n, -1), np.full(n, -1), {-1: 0}
    alive = np.ones(n, dtype=bool)
    for parent in range(-1, m):
        if parent >= 0:
            depths[parent] = depths[parents[parent]] + 1
        here = alive & (nodes == parent)
        if not here.any():
            continue
        left = p(parent).copy()
        for number, child in enumerate([i for i in range(m) if parents[i] == parent], LAST + 1):
            held = here & (dice(depths[parent], number) < _chance(left, q(child), drafts[:, child]))
            nodes[held] = child
            here &= ~held
            _take_out(left, q(child), drafts[:, child], here)
        tokens[here] = pick(left[here], dice(depths[parent], LAST)[here])
        alive &= ~here
    return Walk(nodes, tokens)


def _chance(left: np.ndarray, q: np.ndarray | None, drafts: np.ndarray) -> np.ndarray:
    """With which probability [n] each draft holds; above 1 for certain."""
    rows = np.arange(len(drafts))
    chance: np.ndarray = left[rows, drafts] / (1.0 if q is None else np.maximum(q[rows, drafts], np.finfo(float).tiny))
    return chance


def _take_out(left: np.ndarray, q: np.ndarray | None, drafts: np.ndarray, rows: np.ndarray) -> None:
    """What is left of the target's probabilities in `rows` after a rejection."""
    if not rows.any():
        return
    if q is None:
        certain = np.zeros((int(rows.sum()), left.shape[1]))
        certain[np.arange(len(certain)), drafts[rows]] = 1.0
        left[rows] = residual(left[rows], certain)
    else:
        left[rows] = residual(left[rows], q[rows])


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(0, p - q), normalised, [n, V]; p where nothing is left, which has probability 0."""
    rest = np.maximum(p - q, 0.0)
    total = rest.sum(-1, keepdims=True)
    return np.where(total > 0, rest / np.maximum(total, np.finfo(float).tiny), p)


def pick(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The token [n] in each row of probabilities [n, V] at `u [n]` in [0, 1) of their sum, by id; never one of probability 0."""
    upto = p.cumsum(-1)
    at = np.minimum(u[:, None] * upto[:, -1:], np.nextafter(upto[:, -1:], 0.0))
    found: np.ndarray = (upto <= at).sum(-1).clip(max=p.shape[-1] - 1)
    return found


class Drawn(NamedTuple):
    """A draft and what it was drawn from, [V]."""

    token: int
    odds: np.ndarray


def draw_siblings(q: np.ndarray, count: int, dice: Callable[[int], float]) -> list[Drawn]:
    """At most `count` different tokens drawn one after the other from `q [V]`; `dice(draw)` in [0, 1), draws from DRAFT on."""
    found: list[Drawn] = []
    while len(found) < count and (total := q.sum()) > 0:
        q = q / total
        token = int(pick(q[None], np.array([dice(DRAFT + len(found))]))[0])
        found.append(Drawn(token, q))
        q = q.copy()
        q[token] = 0.0
    return found
