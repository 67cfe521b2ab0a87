"""Choosing tokens on a GPU: argmax, and draws under min_p, top_k and top_p without sorting the vocabulary.

In the order "most likely first, then by id" every filter keeps a prefix, so a filter is a threshold on the
logit, and a threshold is found by bisection over the 32 bits of a float. Probabilities are integer weights,
whose sums are exact in any order (as in `llmlab.decoding.sampler`). One program per row of logits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton infers the types of what it compiles)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def argmax_rows(logits, tokens, vocab, stride, BLOCK: tl.constexpr):
    """The lowest id of the largest logit; -1 where that is not finite, as with any NaN in the row."""
    row = logits + tl.program_id(0).to(tl.int64) * stride
    best, chosen, bad = float("-inf"), 0, 0
    for first in range(0, vocab, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(row + i, mask=i < vocab, other=float("-inf")).to(tl.float32)
        bad = tl.maximum(bad, tl.max((x != x).to(tl.int32), 0))
        top = tl.max(tl.where(x != x, float("-inf"), x), 0)
        where = tl.min(tl.where(x == top, i, vocab), 0)
        chosen = tl.where(top > best, where, chosen)
        best = tl.maximum(best, top)
    finite = (bad == 0) & (best > float("-inf")) & (best < float("inf"))
    tl.store(tokens + tl.program_id(0), tl.where(finite, chosen, -1))


@triton.jit
def _weigh(row, i, vocab, top, temperature, min_p, BITS: tl.constexpr):
    """(key, weight) of tokens i: the key grows with the logit, 0 .. 2**32 - 1; -1 outside the vocabulary."""
    inside = i < vocab
    x = tl.load(row + i, mask=inside, other=float("-inf")).to(tl.float32) + 0.0  # -0.0 becomes 0.0
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    ratio = tl.exp((x - top) / temperature)
    ratio = tl.where(inside & (ratio >= min_p), ratio, 0.0)
    return tl.where(inside, key, -1), (ratio * BITS).to(tl.int64)


@triton.jit
def _mass(row, vocab, top, temperature, min_p, threshold, BITS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Weight (or number) of the tokens whose key is at least `threshold`, int64."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, vocab, BLOCK):
        key, weight = _weigh(row, first + tl.arange(0, BLOCK), vocab, top, temperature, min_p, BITS)
        if COUNT:
            weight = tl.full([BLOCK], 1, tl.int64)
        total += tl.where(key >= threshold, weight, 0)
    return tl.sum(total, 0)


@triton.jit
def _threshold(row, vocab, top, temperature, min_p, enough, BITS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that the tokens from there on have a mass (or number) of `enough` at least."""
    found = tl.zeros([], tl.int64)
    for step in range(32):
        tried = found + (tl.full([], 2147483648, tl.int64) >> step)
        reached = _mass(row, vocab, top, temperature, min_p, tried, BITS, COUNT, BLOCK) >= enough
        found = tl.where(reached, tried, found)
    return found


@triton.jit
def _tied_weight(row, vocab, top, temperature, min_p, threshold, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of one token with that key: equal logits weigh the same."""
    best = tl.zeros([], tl.int64)
    for first in range(0, vocab, BLOCK):
        key, weight = _weigh(row, first + tl.arange(0, BLOCK), vocab, top, temperature, min_p, BITS)
        best = tl.maximum(best, tl.max(tl.where(key == threshold, weight, 0), 0))
    return best


@triton.jit
def _nth_tied(row, vocab, top, temperature, min_p, threshold, nth, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The id of the nth (from 0) token with that key."""
    before, chosen = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in range(0, vocab, BLOCK):
        i = first + tl.arange(0, BLOCK)
        key, _ = _weigh(row, i, vocab, top, temperature, min_p, BITS)
        tied = (key == threshold).to(tl.int64)
        rank = before + tl.cumsum(tied, 0) - 1
        chosen += tl.sum(tl.where((tied == 1) & (rank == nth), i.to(tl.int64), 0), 0)
        before += tl.sum(tied, 0)
    return chosen


@triton.jit
def draw_rows(logits, shapes, limits, top_ks, tokens, vocab, stride, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens by inverse CDF over what min_p, top_k and top_p keep; see `reference.draw`.

    shapes [n, 2] float32: temperature (0: greedy), min_p; limits [n, 2] float64: top_p, and the draw in [0, 1);
    top_ks [n] int32 (<= 0: off). `tokens` holds the argmax of each row before; negative ones are left alone.
    """
    n = tl.program_id(0)
    best = tl.load(tokens + n)
    temperature = tl.load(shapes + n * 2)
    if (best >= 0) & (temperature > 0):
        row = logits + n.to(tl.int64) * stride
        top = tl.load(row + best).to(tl.float32)
        min_p, top_p, top_k = tl.load(shapes + n * 2 + 1), tl.load(limits + n * 2), tl.load(top_ks + n)
        floor = tl.zeros([], tl.int64)
        if top_k > 0:
            floor = _threshold(row, vocab, top, temperature, min_p, tl.minimum(top_k, vocab).to(tl.int64), BITS, True, BLOCK)
        kept = _mass(row, vocab, top, temperature, min_p, floor, BITS, False, BLOCK)
        if top_p < 1.0:
            limit = tl.maximum(tl.ceil(top_p * kept.to(tl.float64)).to(tl.int64), 1)
            edge = _threshold(row, vocab, top, temperature, min_p, limit, BITS, False, BLOCK)
            one = _tied_weight(row, vocab, top, temperature, min_p, edge, BITS, BLOCK)
            above = _mass(row, vocab, top, temperature, min_p, edge + 1, BITS, False, BLOCK)
            kept = above + (limit - above + one - 1) // one * one
        r = tl.minimum((tl.load(limits + n * 2 + 1) * kept.to(tl.float64)).to(tl.int64), kept - 1)
        key = _threshold(row, vocab, top, temperature, min_p, r + 1, BITS, False, BLOCK)
        one = _tied_weight(row, vocab, top, temperature, min_p, key, BITS, BLOCK)
        above = _mass(row, vocab, top, temperature, min_p, key + 1, BITS, False, BLOCK)
        tl.store(tokens + n, _nth_tied(row, vocab, top, temperature, min_p, key, (r - above) // one, BITS, BLOCK))
