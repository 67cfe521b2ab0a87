"""Synthetic twins: a trace's shape in a hundred numbers, and requests drawn from them.

    prompt, output      marginal quantiles
    rank_correlation    between the two (a Gaussian copula joins the marginals)
    gap_cv              burstiness from request to request
    drift_*             how the rate wanders over minutes: standard deviation of its logarithm, and memory

A twin holds no row of the trace. What it leaves out (which lengths follow which, the exact hour) it leaves to chance;
docs/workloads.md shows how near it comes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import llmlab
from llmlab.types import ConfigError, TraceError, unknown_name
from llmlab.workloads import arrivals as times
from llmlab.workloads.lengths import Quantiles, whole
from llmlab.workloads.workload import Workload

WINDOWS = (10.0, 30.0, 60.0, 120.0, 300.0)  # seconds over which a trace's arrivals are counted


class Twin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The figures of a trace. Rates in requests per second, lengths in tokens, `drift_seconds` in seconds."""

    name: str
    source: str
    num_requests: int
    rate: float
    gap_cv: float
    drift_sigma: float
    drift_seconds: float
    rank_correlation: float
    prompt: Quantiles
    output: Quantiles

    @classmethod
    def of(cls, workload: Workload, name: str, source: str) -> Twin:
        """The figures of a workload, such as one read from a trace. Needs at least 100 requests over some time."""
        if len(workload) < 100 or workload.arrivals[-1] <= workload.arrivals[0]:
            raise ConfigError(
                "workload", len(workload), "is too little to fit", "Give 100 requests or more, over some time."
            )
        when = np.array(workload.arrivals)
        rate = (len(when) - 1) / (when[-1] - when[0])
        drift = _fitted_drift(when)
        gaps = np.diff(when)
        # a wandering rate r spreads the gaps, too: 1 + cv^2 grows by E[r] E[1/r] = exp(sigma^2)
        own = (1 + gaps.var() / gaps.mean() ** 2) / math.exp(drift[0] ** 2) - 1
        correlation = rank_correlation(np.array(workload.prompt_lens), np.array(workload.output_lens))
        return cls(name, source, len(when), round(float(rate), 4), round(math.sqrt(max(0.0, own)), 4), *drift,
                   round(correlation, 4), Quantiles.of(workload.prompt_lens), Quantiles.of(workload.output_lens))  # fmt: skip

    @classmethod
    def load(cls, name: str | Path) -> Twin:
        """A shipped twin by name, or the file that `save` wrote. Raises ConfigError or TraceError."""
        shipped, path = shipped_twins(), Path(name)
        if str(name) in shipped:
            path = shipped[str(name)]
        elif path.suffix != ".json":
            raise unknown_name("twin", str(name), shipped)
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise TraceError("twin", str(path), f"cannot be read ({error.strerror})") from None
        except msgspec.DecodeError as error:
            raise TraceError("twin", str(path), f"is no twin ({error})", "Write it with Twin.save.") from None

    def save(self, path: str | Path) -> Path:
        """Write the figures as JSON, a line for each."""
        lines = (f'"{name}": {msgspec.json.encode(getattr(self, name)).decode()}' for name in self.__struct_fields__)
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return Path(path)

    def draw(self, n: int, rate: float | None = None, seed: int = 0, **more: Any) -> Workload:
        """`n` requests like those of the trace, `rate` a second on average (None: the trace's own rate)."""
        rate = times.checked_rate(self.rate if rate is None else rate)
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ConfigError("n", n, "must be a positive number of requests")
        rng = np.random.default_rng((seed, 0))
        arrivals = times.drifting(rate, self.gap_cv, self.drift_sigma, self.drift_seconds, n, rng)
        prompt, output = (
            whole(q.at(u), n, "lengths") for q, u in zip((self.prompt, self.output), self._levels(n, rng))
        )
        return Workload(tuple(arrivals.tolist()), tuple(prompt.tolist()), tuple(output.tolist()), seed,
                        **{"about": f"like {self.name}", **more})  # fmt: skip

    def _levels(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Two columns of numbers in [0, 1], each uniform, with the fitted rank correlation between them."""
        linear = 2 * math.sin(math.pi * self.rank_correlation / 6)
        first, second = rng.standard_normal((2, n))
        return normal_cdf(first), normal_cdf(linear * first + math.sqrt(1 - linear**2) * second)


def shipped_twins() -> dict[str, Path]:
    """The twins that come with llmlab, by name: from an installed package or a source checkout."""
    package = Path(llmlab.__path__[0])
    roots = (package / "_data" / "workloads", package.parent / "datasets" / "workloads")
    return {path.stem: path for root in reversed(roots) for path in sorted(root.glob("*.json"))}


def quantiles_of(text: str) -> Quantiles:
    """The table that "TWIN/prompt" or "TWIN/output" names. Raises ConfigError or TraceError."""
    name, _, column = text.rpartition("/")
    if column not in ("prompt", "output"):
        raise ConfigError(
            "empirical", text, "must end with /prompt or /output", "Write empirical:azure-conv-2023/prompt."
        )
    table: Quantiles = getattr(Twin.load(name), column)
    return table


# ----------------------------------------------------------------------------------------- statistics
def normal_cdf(z: np.ndarray) -> np.ndarray:
    """The standard normal distribution function, [n] float64."""
    return 0.5 * (1 + np.fromiter(map(math.erf, (z / math.sqrt(2)).tolist()), np.float64, len(z)))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]) if a.min() < a.max() and b.min() < b.max() else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def dispersion(arrivals: np.ndarray, window: float) -> float:
    """Index of dispersion: variance over mean of the number of arrivals in windows of `window` seconds; 1 for Poisson."""
    counts = np.bincount(((arrivals - arrivals[0]) // window).astype(np.int64))[:-1]
    return float(counts.var() / counts.mean()) if len(counts) > 1 else math.nan


def _fitted_drift(arrivals: np.ndarray) -> tuple[float, float]:
    """(sigma, seconds) of the rate's wandering: the pair whose dispersion over all windows is nearest to the trace's.

    For a rate with Var(log r) = sigma^2, so Var(r) = mean^2 (exp(sigma^2) - 1), and memory tau, over a window w:
    dispersion(w) = c + 2 mean (exp(sigma^2) - 1) tau (1 - tau / w (1 - exp(-w / tau))).
    """
    span = arrivals[-1] - arrivals[0]
    windows = np.array([w for w in WINDOWS if span / w >= 10])
    if len(windows) < 2:
        return 0.0, 60.0
    seen = np.array([dispersion(arrivals, w) for w in windows])
    rate = (len(arrivals) - 1) / span
    best = (math.inf, 0.0, 60.0)
    for seconds in np.geomspace(10.0, span, 60).tolist():
        shape = 2 * rate * seconds * (1 - seconds / windows * -np.expm1(-windows / seconds))
        slope = max(0.0, float(((seen - 1) * shape / seen**2).sum() / (shape**2 / seen**2).sum()))
        error = float((((1 + slope * shape) / seen - 1) ** 2).sum())
        best = min(best, (error, math.sqrt(math.log1p(slope)), seconds))
    return round(best[1], 4), round(best[2], 1)
