"""Softmax around one maximum for all scores, instead of the largest of each row: when it holds, and how it is chosen.

    softmax(x) = e^(x - phi) / sum e^(x - phi)    for any phi

With phi fixed, tiles of KV need no running maximum and are never rescaled. What may go wrong is the range of e^(x - phi),
and the sum tells of it: log(sum) = lse - phi, where lse is the row's log-sum-exp. So a row is safe while that lies in a band
that the number format gives; others are computed once more around their own maximum.
Source: FlashDecoding++, arXiv 2311.01282, section 3, which bounds every score instead of the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class UnifiedMax(NamedTuple):
    """One maximum for all scores (natural logarithms, after scaling). Sums in [e^low, e^high] are kept."""

    phi: float
    low: float
    high: float


class Calibrated(NamedTuple):
    """A maximum chosen from observed rows, and the share of them that it needs not compute twice."""

    scheme: UnifiedMax
    coverage: float


# log(sum) that a format bears. float16 products overflow at 65504 = e^11.09, and what lies under 6e-5 loses digits;
# bfloat16 and float32 have the range of float32.
BANDS = {"float16": (2.0, 11.0), "bfloat16": (-40.0, 60.0), "float32": (-40.0, 60.0)}


def calibrate(lse: np.ndarray, dtype: str) -> Calibrated:
    """The maximum whose band holds most of `lse` (log-sum-exps of rows; those without keys, -inf, do not count), with as
    much room on either side as there is. Raises ValueError without a finite one."""
    low, high = BANDS[dtype]
    found = np.sort(lse[np.isfinite(lse)].astype(np.float64).ravel())
    if not len(found):
        raise ValueError("no row has a finite log-sum-exp")
    ends = np.searchsorted(found, found + (high - low), side="right")
    first = int(np.argmax(ends - np.arange(len(found))))
    last = int(ends[first]) - 1
    middle = (found[first] + found[last]) / 2
    return Calibrated(UnifiedMax(float(middle - (low + high) / 2), low, high), (last - first + 1) / len(found))
