"""Percentiles of a stream in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

WIDTH = 1.001  # ratio of a bucket's edges: a percentile is off by at most 0.05 %


class Quantiles:
    """Counts values in logarithmic buckets; number, mean and maximum are exact. Values of 0 have a bucket of their own."""

    def __init__(self) -> None:
        self.n, self.total, self.largest = 0, 0.0, -math.inf
        self._buckets: dict[int, int] = {}
        self._zeros = 0

    def extend(self, values: Iterable[float]) -> None:
        """Take in values of at least 0."""
        data = np.fromiter(values, np.float64)
        if not data.size:
            return
        self.n += int(data.size)
        self.total += float(data.sum())
        self.largest = max(self.largest, float(data.max()))
        positive = data[data > 0]
        self._zeros += int(data.size - positive.size)
        indices, counts = np.unique(np.floor(np.log(positive) / math.log(WIDTH)).astype(np.int64), return_counts=True)
        for index, count in zip(indices.tolist(), counts.tolist()):
            self._buckets[index] = self._buckets.get(index, 0) + count

    def copy(self) -> Quantiles:
        other = Quantiles()
        other.n, other.total, other.largest, other._zeros = self.n, self.total, self.largest, self._zeros
        other._buckets = dict(self._buckets)
        return other

    @property
    def mean(self) -> float:
        return self.total / self.n

    def percentile(self, q: float) -> float:
        """Nearest rank, q in (0, 100]; the middle of its bucket, never above the largest value."""
        rank = max(1, math.ceil(self.n * q / 100)) - self._zeros
        if rank <= 0:
            return 0.0
        for index in sorted(self._buckets):
            rank -= self._buckets[index]
            if rank <= 0:
                return min(self.largest, math.exp((index + 0.5) * math.log(WIDTH)))
        return self.largest
