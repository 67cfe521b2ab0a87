"""When requests come: arrival processes and pauses. Seconds; every function draws from the generator that it is given.

poisson   gamma(cv=1)            gaps without memory
gamma     cv > 1 bursts, cv < 1 more even, cv = 0 a metronome
ramp      a Poisson process whose rate changes in steps
drifting  a gamma process whose rate wanders slowly, as traffic does over an hour
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from llmlab.types import ConfigError
from llmlab.workloads.lengths import two_numbers

Pauses = float | tuple[float, float] | str | Callable[[np.random.Generator, int], np.ndarray]
_PAUSES = 'Write seconds, (low, high), "exponential:MEAN", "uniform:LOW,HIGH" or "lognormal:MEDIAN,SIGMA".'


def checked_rate(rate: float, field: str = "rate") -> float:
    """`rate` if it is a positive number of requests per second; else ConfigError."""
    if not is_number(rate) or not 0 < rate < math.inf:
        raise ConfigError(field, rate, "must be a positive number of requests per second")
    return float(rate)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def gamma(rate: float, cv: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` arrivals with independent gamma gaps: mean 1 / rate, standard deviation cv / rate."""
    if not is_number(cv) or not 0 <= cv < math.inf:
        raise ConfigError(
            "cv", cv, "must be a number of at least 0", "1 is Poisson, larger comes in bursts, 0 is even."
        )
    return np.cumsum(unit_gaps(cv, n, rng)) / checked_rate(rate)


def unit_gaps(cv: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` gaps of mean 1 and coefficient of variation `cv`."""
    return rng.gamma(cv**-2, cv**2, n) if cv else np.ones(n)


def ramp(rates: Sequence[tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
    """Poisson arrivals under a rate that changes in steps: `rates` are (duration in s, requests per second)."""
    steps = _checked_steps(rates)
    times = np.cumsum([0.0, *(duration for duration, _ in steps)])
    expected = np.cumsum([0.0, *(duration * rate for duration, rate in steps)])
    count = rng.poisson(expected[-1])
    return _when(np.sort(rng.random(count)) * expected[-1], times, expected)


def _checked_steps(rates: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    way_out = "Write rates=[(60, 2.0), (60, 8.0)]: a minute at 2 requests per second, then one at 8."
    if not isinstance(rates, (tuple, list)):
        raise ConfigError("rates", rates, "must be a list of (duration, rate)", way_out)
    steps = [tuple(step) if isinstance(step, (tuple, list)) else () for step in rates]
    for step in steps:
        if len(step) != 2 or not all(is_number(x) and 0 <= x < math.inf for x in step) or step[0] == 0:
            raise ConfigError(
                "rates", step, "must be a (duration, rate): seconds above 0, requests per second", way_out
            )
    if not any(rate for _, rate in steps):
        raise ConfigError("rates", list(rates)[:5], "brings no request", way_out)
    return steps


def drifting(rate: float, cv: float, sigma: float, seconds: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Gamma arrivals under a rate that wanders: its logarithm is an Ornstein-Uhlenbeck process with standard deviation
    `sigma` that forgets within `seconds`. Scaled so that the mean rate of these `n` arrivals is `rate`."""
    gaps = np.cumsum(unit_gaps(cv, n, rng))
    step = min(seconds / 10, n / checked_rate(rate) / 10)
    count = min(100_000, math.ceil(n / rate / step)) + 1
    level = np.exp(sigma * _wander(math.exp(-step / seconds), count, rng))
    expected = np.concatenate([[0.0], np.cumsum(level)]) * gaps[-1] / level.sum()
    return _when(gaps, np.linspace(0.0, n / rate, count + 1), expected)


def _wander(memory: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A stationary first-order autoregression of unit variance."""
    noise = rng.standard_normal(count)
    noise[1:] *= math.sqrt(1 - memory**2)
    path = np.empty(count)
    value = 0.0
    for index, shock in enumerate(noise.tolist()):
        value = memory * value + shock
        path[index] = value
    return path


def _when(levels: np.ndarray, times: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The times at which the expected number of arrivals reaches `levels`; both tables ascend. Where the expectation
    stands still (rate 0) nobody arrives: the table's last time at that level is meant."""
    right = np.clip(np.searchsorted(expected, levels, side="right"), 1, len(expected) - 1)
    left = right - 1
    span = expected[right] - expected[left]
    share = np.divide(levels - expected[left], span, out=np.ones_like(levels), where=span > 0)
    when: np.ndarray = times[left] + np.clip(share, 0.0, 1.0) * (times[right] - times[left])
    return when


def pauses(think: Pauses, rng: np.random.Generator, count: int, field: str = "think") -> np.ndarray:
    """`count` pauses [count] float64 in seconds. Raises ConfigError for a form it cannot read."""
    if callable(think):
        values = np.asarray(think(rng, count), dtype=np.float64)
    elif isinstance(think, str):
        values = _from_text(think, rng, count, field)
    elif is_number(think):
        values = np.full(count, float(think))  # type: ignore[arg-type]
    elif isinstance(think, tuple) and len(think) == 2 and all(map(is_number, think)):
        values = rng.uniform(min(think), max(think), count)
    else:
        raise ConfigError(field, think, "is no model of pauses", _PAUSES)
    if values.shape != (count,) or not np.isfinite(values).all() or (values < 0).any():
        raise ConfigError(field, think, "must give finite times of at least 0 s", _PAUSES)
    return values


def _from_text(text: str, rng: np.random.Generator, count: int, field: str) -> np.ndarray:
    name, _, rest = text.partition(":")
    if name == "exponential":
        mean, _ = two_numbers(text, f"{rest},0", field, _PAUSES)
        return rng.exponential(abs(mean), count) * math.copysign(1.0, mean)
    a, b = two_numbers(text, rest, field, _PAUSES)
    if name == "uniform":
        return rng.uniform(min(a, b), max(a, b), count)
    if name == "lognormal" and a > 0 and b >= 0:
        return rng.lognormal(math.log(a), b, count)
    raise ConfigError(field, text, "is no model of pauses", _PAUSES)
