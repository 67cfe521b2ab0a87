"""What comes out of verification is distributed as the target has it: 200,000 draws, chi-square."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from chi_square import chi_square_p

from llmlab import rng
from llmlab.decoding.rejection import Walk, accept_tree, draw_siblings, pick, residual

N, VOCAB, DEPTH = 200_000, 5, 3
DICE = np.random.default_rng(7)


def draw(p: np.ndarray) -> np.ndarray:
    return pick(p, DICE.random(len(p)))


def accepted(p: np.ndarray, q: np.ndarray, drafts: np.ndarray, parents: Sequence[int]) -> Walk:
    """`p [n, m + 1, V]`, `q [n, m, V]`: behind the text and behind each node, and what each draft was drawn from."""
    return accept_tree(lambda node: p[:, node + 1], lambda node: q[:, node], drafts, parents, lambda depth, number: DICE.random(len(p)))


def tables(seed: int, depth: int = DEPTH, sharp: float = 1.5) -> list[np.ndarray]:
    """Probabilities of the next token given the path so far: [V] * d + [V], one table for each depth."""
    dice = np.random.default_rng(seed)
    found = [np.exp(sharp * dice.normal(size=(VOCAB,) * (d + 1))) for d in range(depth + 1)]
    found[1][0, :2] = 0.0  # a token that may not follow
    return [table / table.sum(-1, keepdims=True) for table in found]


def filtered(table: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """As temperature and top_p change a distribution."""
    p = table ** (1 / temperature)
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, -1)
    ranked = np.take_along_axis(p, order, -1)
    keep = ranked.cumsum(-1) - ranked < top_p
    cut = np.zeros_like(p)
    np.put_along_axis(cut, order, np.where(keep, ranked, 0.0), -1)
    return cut / cut.sum(-1, keepdims=True)


def first_two(target: list[np.ndarray]) -> np.ndarray:
    """The joint distribution of the first two tokens, [V * V]."""
    return (target[0][:, None] * target[1]).ravel()


def sampled_chain(target: list[np.ndarray], draft: list[np.ndarray], k: int) -> np.ndarray:
    """The first two tokens of rounds of k drafts, topped up from the target."""
    path: list[np.ndarray] = []
    for d in range(k):
        path.append(draw(draft[d][tuple(path)] if d else np.tile(draft[0], (N, 1))))
    p = np.stack([np.tile(target[0], (N, 1)), *(target[d][tuple(path[:d])] for d in range(1, k + 1))], 1)
    q = np.stack([np.tile(draft[0], (N, 1)), *(draft[d][tuple(path[:d])] for d in range(1, k))], 1)
    got = accepted(p, q, np.stack(path, 1), range(-1, k - 1))
    first = np.where(got.nodes >= 0, path[0], got.tokens)
    second = np.where(got.nodes >= 1, path[1 % k], got.tokens)
    short = got.nodes < 0
    second[short] = draw(target[1][first[short]])
    return np.bincount(first * VOCAB + second, minlength=VOCAB**2)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.7, 0.9)])
@pytest.mark.parametrize("k", [2, 3])
def test_chains_are_lossless(k: int, temperature: float, top_p: float) -> None:
    target = [filtered(table, temperature, top_p) for table in tables(1)]
    counts = sampled_chain(target, [filtered(table, temperature, top_p) for table in tables(2)], k)
    assert counts.sum() == N and chi_square_p(counts, first_two(target)) > 0.001


def test_the_test_sees_a_wrong_rule() -> None:
    """Whoever draws the token behind a rejection from p instead of the rest is found out."""
    target, draft = tables(1), tables(2)
    x = draw(np.tile(draft[0], (N, 1)))
    held = DICE.random(N) < target[0][x] / draft[0][x]
    wrong = np.where(held, x, draw(np.tile(target[0], (N, 1))))
    assert chi_square_p(np.bincount(wrong, minlength=VOCAB), target[0]) < 1e-6


def test_trees_are_lossless() -> None:
    """Three children of the root, drawn from two draft models, and two children of the first of them."""
    target, one, two = tables(1), tables(2), tables(3)
    parents = (-1, -1, -1, 0, 0)
    roots = [draw(np.tile(table[0], (N, 1))) for table in (one, two, one)]
    leaves = [draw(one[1][roots[0]]) for _ in range(2)]
    drafts = np.stack([*roots, *leaves], 1)
    q = np.stack([*(np.tile(t[0], (N, 1)) for t in (one, two, one)), one[1][roots[0]], one[1][roots[0]]], 1)
    p = np.stack([np.tile(target[0], (N, 1)), *(target[1][r] for r in roots), *(target[2][roots[0], leaf] for leaf in leaves)], 1)
    got = accepted(p, q, drafts, parents)
    depth = np.where(got.nodes < 0, 0, np.where(got.nodes < 3, 1, 2))
    first = np.where(depth == 0, got.tokens, drafts[np.arange(N), np.where(depth == 2, 0, np.maximum(got.nodes, 0))])
    second = np.where(depth == 2, drafts[np.arange(N), np.maximum(got.nodes, 0)], got.tokens)
    second[depth == 0] = draw(target[1][first[depth == 0]])
    counts = np.bincount(first * VOCAB + second, minlength=VOCAB**2)
    assert chi_square_p(counts, first_two(target)) > 0.001
    assert (depth > 0).mean() > 1 - 0.5 * np.abs(target[0] - one[0]).sum()  # more branches hold more often than one


@pytest.mark.parametrize("certain", [True, False])
def test_the_engines_rule_is_lossless_for_any_drafts(certain: bool) -> None:
    """The target's token is drawn with the number of its position and compared: drafts cannot change it. Drafts drawn with
    the same number hold more often than others."""
    target, draft = tables(1)[0], tables(2)[0]
    u = np.array([rng.uniform(3, f"r{i}", 9) for i in range(N)])
    token = (target.cumsum() <= u[:, None]).sum(1)
    assert chi_square_p(np.bincount(token, minlength=VOCAB), target) > 0.001
    drafts = np.full(N, draft.argmax()) if certain else (draft.cumsum() <= u[:, None]).sum(1)
    expected = target[draft.argmax()] if certain else 0.0
    assert abs((drafts == token).mean() - expected) < 0.005 if certain else (drafts == token).mean() > (target * draft).sum()


def test_a_draft_that_is_certain_holds_with_its_probability() -> None:
    target = tables(1)[0]
    x = int(target.argmax())
    q = np.zeros((N, 1, VOCAB))
    q[:, 0, x] = 1.0
    for behind in (lambda node: q[:, node], lambda node: None):
        got = accept_tree(lambda node: np.tile(target, (N, 1)), behind, np.full((N, 1), x), [-1], lambda depth, number: DICE.random(N))
        assert abs((got.nodes == 0).mean() - target[x]) < 0.005
        assert not (got.tokens[got.nodes < 0] == x).any()


def test_siblings_that_differ_are_lossless_and_hold_more_often() -> None:
    """Three drawn without replacement, the second from what the first left; in a vocabulary where two are impossible."""
    target, one = tables(1)[0], tables(2)[0]
    one[:2] = [0.0, 1.0 - one[2:].sum()]
    n = 20_000
    p, q, drafts = np.tile(target, (n, 1)), np.zeros((n, 3, VOCAB)), np.zeros((n, 3), int)
    for i in range(n):
        for j, (token, odds) in enumerate(draw_siblings(one, 3, lambda number: DICE.random())):
            drafts[i, j], q[i, j] = token, odds
    assert all(len(set(row)) == 3 for row in drafts.tolist())
    got = accepted(np.repeat(p[:, None], 4, 1), q, drafts, (-1, -1, -1))
    first = np.where(got.nodes >= 0, drafts[np.arange(n), got.nodes.clip(0)], got.tokens)
    assert chi_square_p(np.bincount(first, minlength=VOCAB), target) > 0.001
    assert (got.nodes >= 0).mean() > np.minimum(target, one).sum() + 0.05


def test_fewer_siblings_come_where_there_are_no_more_tokens() -> None:
    drawn = draw_siblings(np.array([0.0, 1.0, 0.0]), 3, lambda number: 0.5)
    assert [d.token for d in drawn] == [1] and drawn[0].odds.tolist() == [0.0, 1.0, 0.0]


def test_what_is_left() -> None:
    assert residual(np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]])).tolist() == [[0.5, 0.5]]
    assert residual(np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])).tolist() == [[1.0, 0.0]]
    assert pick(np.array([[0.0, 1.0, 0.0]] * 2), np.array([0.0, np.nextafter(1.0, 0.0)])).tolist() == [1, 1]
