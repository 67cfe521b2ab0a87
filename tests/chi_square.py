"""Whether counts agree with a distribution."""

from __future__ import annotations

from math import erfc, sqrt

import numpy as np

LEAST = 5.0  # expected count of a cell; smaller ones are put together


def chi_square_p(counts: np.ndarray, wanted: np.ndarray) -> float:
    """P-value of `counts` under the probabilities `wanted`, by Wilson and Hilferty's approximation; cells that cannot occur must
    be empty."""
    assert counts[wanted == 0].sum() == 0
    expected = wanted * counts.sum()
    small = (expected < LEAST) & (wanted > 0)
    cells = [(counts[~small & (wanted > 0)], expected[~small & (wanted > 0)])]
    if small.any():
        cells.append((counts[small].sum(keepdims=True), expected[small].sum(keepdims=True)))
    found, hoped = (np.concatenate(part) for part in zip(*cells))
    statistic, free = float(((found - hoped) ** 2 / hoped).sum()), len(hoped) - 1
    z = ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / np.sqrt(2 / (9 * free))
    return 0.5 * erfc(float(z) / sqrt(2))
