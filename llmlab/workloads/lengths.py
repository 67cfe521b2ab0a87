"""Length models: how many tokens a prompt or an output has."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llmlab.types import ConfigError

Lengths = int | tuple[int, int] | str | Callable[[np.random.Generator, int], np.ndarray]
_FORMS = 'Write an int, (low, high), "lognormal:MEDIAN,SIGMA", "uniform:LOW,HIGH" or "zipf:MAX,EXPONENT".'


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
    return np.maximum(1, np.rint(values)).astype(np.int64)


def _uniform(low: float, high: float, rng: np.random.Generator, count: int, field: str) -> np.ndarray:
    if not 1 <= low <= high:
        raise ConfigError(field, (low, high), "needs 1 <= low <= high", _FORMS)
    return rng.integers(int(low), int(high), count, endpoint=True)


def _from_text(text: str, rng: np.random.Generator, count: int, field: str) -> np.ndarray:
    name, _, numbers = text.partition(":")
    try:
        a, b = (float(x) for x in numbers.split(","))
    except ValueError:
        raise ConfigError(field, text, "is not a length model", _FORMS) from None
    if not (math.isfinite(a) and math.isfinite(b)):
        raise ConfigError(field, text, "needs finite numbers", _FORMS)
    if name == "uniform":
        return _uniform(a, b, rng, count, field)
    if name == "lognormal" and a >= 1 and b >= 0:
        return rng.lognormal(math.log(a), b, count)
    if name == "zipf" and a >= 1 and b > 0:
        weights = np.arange(1, int(a) + 1, dtype=np.float64) ** -b
        return 1 + rng.choice(int(a), count, p=weights / weights.sum())
    raise ConfigError(field, text, "is not a length model", _FORMS)
