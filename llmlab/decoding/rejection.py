"""Rejection sampling of drafts: what comes out is distributed as the target alone would have it.

Chain (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318): a draft x that was drawn from q is
accepted with probability min(1, p(x) / q(x)); at the first rejection a token is drawn from max(0, p - q), normalised.

Tree (SpecInfer, arXiv 2305.09781, algorithm 2): the children of a node are tried one after the other; each that is rejected
takes its share out of p. Drafts that are themselves not random (n-grams, greedy models) have q = 1 at the draft.

The engine verifies by another rule, which is lossless, too (`decoding.speculative`): it draws the target's token with the
random number of its position and compares. That keeps each answer what it is without drafts, and accepts a draft with the
probability p(x); sampling with rejection accepts sum(min(p, q)) of drafts that were drawn from q, which is more where the
draft model is unsure. Pure and vectorised over rows [n]; float64 probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmlab.types import LabError


class Accepted(NamedTuple):
    """Per row: how many drafts of a chain hold, and the token behind them."""

    counts: np.ndarray
    tokens: np.ndarray


def accept_chain(p: np.ndarray, q: np.ndarray, drafts: np.ndarray, dice: np.random.Generator) -> Accepted:
    """`p [n, k + 1, V]` the target's probabilities behind the text and behind each draft, `q [n, k, V]` those that
    `drafts [n, k]` were drawn from. Raises LabError for shapes that do not fit."""
    (n, k), vocab = drafts.shape, p.shape[-1]
    if p.shape != (n, k + 1, vocab) or q.shape != (n, k, vocab):
        raise LabError("p", p.shape, f"does not fit {n} rows of {k} drafts and q of {q.shape}", "Give [n, k + 1, V] and [n, k, V].")
    rows = np.arange(n)[:, None]
    ratio = p[rows, np.arange(k), drafts] / np.maximum(q[rows, np.arange(k), drafts], np.finfo(float).tiny)
    held = np.cumprod(dice.random((n, k)) < ratio, axis=1)
    counts = held.sum(1)
    behind = p[np.arange(n), counts]
    lost = counts < k
    behind[lost] = residual(behind[lost], q[lost, counts[lost]])
    return Accepted(counts, draw(behind, dice))


class Walk(NamedTuple):
    """Per row: the node that was reached (-1: the root) and the token behind it."""

    nodes: np.ndarray
    tokens: np.ndarray


def accept_tree(p: np.ndarray, q: np.ndarray, drafts: np.ndarray, parents: Sequence[int], dice: np.random.Generator) -> Walk:
    """`p [n, m + 1, V]` the target's probabilities behind the text (0) and behind each of m nodes; `q [n, m, V]` what each
    of `drafts [n, m]` was drawn from, siblings independently of each other. Nodes come after their `parents`."""
    n, m = drafts.shape
    nodes, tokens = np.full(n, -1), np.full(n, -1)
    alive = np.ones(n, dtype=bool)
    for parent in range(-1, m):
        here = alive & (nodes == parent)
        left = p[:, parent + 1].copy()
        for child in [i for i in range(m) if parents[i] == parent]:
            token, of = drafts[:, child], np.arange(n)
            chance = left[of, token] / np.maximum(q[of, child, token], np.finfo(float).tiny)
            held = here & (dice.random(n) < chance)
            nodes[held] = child
            here &= ~held
            left[here] = residual(left[here], q[here, child])
        tokens[here] = draw(left[here], dice)
        alive &= ~here
    return Walk(nodes, tokens)


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(0, p - q), normalised, [n, V]; p where nothing is left, which has probability 0."""
    rest = np.maximum(p - q, 0.0)
    total = rest.sum(-1, keepdims=True)
    return np.where(total > 0, rest / np.maximum(total, np.finfo(float).tiny), p)


def draw(p: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """One token [n] from each row of probabilities [n, V]."""
    upto = p.cumsum(-1)
    found: np.ndarray = (upto <= dice.random((len(p), 1)) * upto[:, -1:]).sum(-1).clip(max=p.shape[-1] - 1)
    return found
