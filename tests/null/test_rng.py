"""The counter-based random numbers: pinned values, independence of everything but the key, plain statistics."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab import rng
from llmlab.types import LabError

KEYS = {"seed": st.integers(), "request": st.text(), "position": st.integers(0, 10**9), "draw": st.integers(0, 100)}


def numbers(n: int, seed: int = 0, request: str = "r", draw: int = 0) -> np.ndarray:
    return np.array([rng.uniform(seed, request, position, draw) for position in range(n)])


def chi_square(counts: np.ndarray, expected: np.ndarray | float) -> float:
    return float((((counts - expected) ** 2) / expected).sum())


def test_values_are_pinned() -> None:
    """Traces recorded elsewhere replay only if these never change."""
    assert rng.bits(0, "r0", 0) == 0x7A5D34CB51BCCB59
    assert [rng.integer(1, "r17", p, 1000) for p in range(5)] == [869, 502, 410, 371, 322]
    assert rng.uniform(-1, "é", 3, 2) == 0.6679807313464702


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = "from llmlab import rng; print([rng.bits(s, r, p) for s in (0, -7) for r in ('a', 'ü') for p in (0, 9)])"
    env = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([rng.bits(s, r, p) for s in (0, -7) for r in ("a", "ü") for p in (0, 9)])


@given(**KEYS, n=st.integers(1, 2**40))
def test_ranges_and_agreement(seed: int, request: str, position: int, draw: int, n: int) -> None:
    u = rng.uniform(seed, request, position, draw)
    assert 0.0 <= u < 1.0
    assert abs(rng.integer(seed, request, position, n, draw) - u * n) <= 1.0 + n * 2.0**-50


@given(st.lists(st.tuples(*KEYS.values()), min_size=2, max_size=50, unique=True))
def test_distinct_keys_give_distinct_bits(keys: list[tuple[int, str, int, int]]) -> None:
    """Also for keys whose texts could run into each other: ("1", 2) and ("12", ...)."""
    assert len({rng.bits(*key) for key in keys}) == len(keys)


def test_adjacent_fields_do_not_run_together() -> None:
    keys = [(1, "2", 3, 0), (1, " 2", 3, 0), (12, "", 3, 0), (1, "3 2", 0, 0), (1, "", 3, 2), (3, "2", 1, 0)]
    assert len({rng.bits(*key) for key in keys}) == len(keys)


def test_integer_needs_something_to_choose_from() -> None:
    with pytest.raises(LabError, match=r"^n=0: must be at least 1\. There"):
        rng.integer(0, "r", 0, 0)


def test_any_text_may_name_a_request() -> None:
    assert 0 <= rng.uniform(0, "\ud800 lone surrogate", 0) < 1


@pytest.mark.parametrize("vary", ["position", "request", "seed", "draw"])
def test_uniform_in_every_coordinate(vary: str) -> None:
    n, bins = 20_000, 100
    key = {"seed": 3, "request": "r", "position": 5, "draw": 0}
    u = np.array([rng.uniform(**{**key, vary: f"r{i}" if vary == "request" else i}) for i in range(n)])
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / n)
    assert chi_square(np.bincount((u * bins).astype(int), minlength=bins), n / bins) < 148.2  # 0.999 of 99 degrees
    for lag in (1, 2, 7, 64):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4 / np.sqrt(n)


def test_streams_of_neighbours_are_uncorrelated() -> None:
    n = 20_000
    base = numbers(n)
    for other in (numbers(n, seed=1), numbers(n, request="s"), numbers(n, draw=1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(n)


def test_every_bit_is_fair() -> None:
    words = np.array([rng.bits(0, "r", p) for p in range(20_000)], dtype=np.uint64)
    ones = (words[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(0)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / np.sqrt(len(words))


def test_integers_are_uniform() -> None:
    counts = np.bincount([rng.integer(9, "r", p, 10) for p in range(20_000)], minlength=10)
    assert len(counts) == 10 and chi_square(counts, 2_000) < 27.88  # 0.999 of 9 degrees
