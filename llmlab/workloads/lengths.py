"""Length models: how many tokens a prompt or an output has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from llmlab.types import ConfigError

Lengths = int | tuple[int, int] | str | Callable[[np.random.Generator, int], np.ndarray]
_FORMS = ('Write an int, (low, high), "lognormal:MEDIAN,SIGMA", "uniform:LOW,HIGH", "zipf:MAX,EXPONENT" or '
          '"empirical:TWIN/prompt" (or /output), TWIN being a shipped name or a file.')  # fmt: skip
# Dense where distributions bend: the tails get their own levels.
LEVELS = (0.0, 0.001, 0.002, 0.005, *(i / 100 for i in range(1, 100)), 0.995, 0.998, 0.999, 1.0)


class Quantiles(msgspec.Struct, frozen=True):
    """An empirical distribution as a table: `values[i]` is the quantile at `levels[i]`; linear in between.

    A length model: call it with a generator and a count. Raises ConfigError for a table that is none.
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a <= b for row in (self.levels, self.values) for a, b in pairwise(row))
        if len(self.levels) != len(self.values) or len(self.levels) < 2 or not ascending:
            raise ConfigError(
                "quantiles", self.levels[:5], "needs as many levels as values, at least two, both ascending"
            )
        if (self.levels[0], self.levels[-1]) != (0.0, 1.0) or not math.isfinite(self.values[-1] - self.values[0]):
            raise ConfigError("quantiles", self.levels[:5], "needs finite values and levels from 0 to 1")

    @classmethod
    def of(cls, data: Sequence[float] | np.ndarray, levels: Sequence[float] = LEVELS) -> Quantiles:
        """The quantiles of observed numbers."""
        return cls(tuple(levels), tuple(round(float(v), 3) for v in np.quantile(np.asarray(data), levels)))

    def at(self, levels: np.ndarray) -> np.ndarray:
        """The values [n] float64 at `levels` [n] in [0, 1]."""
        found: np.ndarray = np.interp(levels, self.levels, self.values)
        return found

    def __call__(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return self.at(rng.random(count))


def draw(lengths: Lengths, rng: np.random.Generator, count: int, field: str = "lengths") -> np.ndarray:
    """`count` lengths [count] int64, each at least 1. Raises ConfigError for a form it cannot read."""
    if callable(lengths):
        values = np.asarray(lengths(rng, count))
    elif isinstance(lengths, str):
        values = _from_text(lengths, rng, count, field)
    elif isinstance(lengths, tuple) and len(lengths) == 2:
        values = _uniform(*lengths, rng, count, field)
    elif isinstance(lengths, int) and not isinstance(lengths, bool):
        values = _uniform(lengths, lengths, rng, count, field)
    else:
        raise ConfigError(field, lengths, "is not a length model", _FORMS)
    return whole(values, count, field)


def whole(values: np.ndarray, count: int, field: str) -> np.ndarray:
    """`values` as lengths [count] int64 of at least 1. Raises ConfigError if they are no `count` finite numbers."""
    if values.shape != (count,) or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ConfigError(field, values[:5] if values.ndim else values, f"a length model must give {count} finite numbers",
                          "It is called with a numpy generator and the count.")  # fmt: skip
    rounded: np.ndarray = np.maximum(1, np.rint(values)).astype(np.int64)
    return rounded


def _uniform(low: float, high: float, rng: np.random.Generator, count: int, field: str) -> np.ndarray:
    try:
        if 1 <= low <= high < 2**62:
            return rng.integers(int(low), int(high), count, endpoint=True)
    except TypeError:  # not numbers at all: the same answer
        pass
    raise ConfigError(field, (low, high), "needs 1 <= low <= high", _FORMS)


def _from_text(text: str, rng: np.random.Generator, count: int, field: str) -> np.ndarray:
    name, _, rest = text.partition(":")
    if name == "empirical":
        from llmlab.workloads.twins import quantiles_of

        return quantiles_of(rest)(rng, count)
    a, b = two_numbers(text, rest, field, _FORMS)
    if name == "uniform":
        return _uniform(a, b, rng, count, field)
    if name == "lognormal" and a >= 1 and b >= 0:
        return rng.lognormal(math.log(a), b, count)
    if name == "zipf" and a >= 1 and b > 0:
        return 1 + zipf_ranks(int(a), b, rng, count)
    raise ConfigError(field, text, "is not a length model", _FORMS)


def two_numbers(text: str, numbers: str, field: str, way_out: str) -> tuple[float, float]:
    """The two finite numbers of a model's text form. Raises ConfigError."""
    try:
        a, b = (float(x) for x in numbers.split(","))
    except ValueError:
        raise ConfigError(field, text, "cannot be read", way_out) from None
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ConfigError(field, text, "needs finite numbers", way_out)
    return a, b


def zipf_ranks(n: int, exponent: float, rng: np.random.Generator, count: int) -> np.ndarray:
    """`count` numbers in [0, n), rank k with a probability proportional to (k + 1) ** -exponent."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return rng.choice(n, count, p=weights / weights.sum())
