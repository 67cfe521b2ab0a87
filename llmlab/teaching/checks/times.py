"""Checks about latencies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llmlab import rng
from llmlab.events.metrics import RequestMetrics

Latencies = Callable[[float, Sequence[float]], tuple[float, float | None]]


def latencies(answer: Latencies) -> Iterator[str]:
    """`answer(arrival, times)`: (ttft, tpot), as the engine's own metrics define them."""
    cases = [(0.0, [0.5, 0.6, 0.7]), (10.0, [10.5, 10.6, 10.7, 11.0]), (2.0, [2.25])]
    for seed in range(6):
        arrival = rng.uniform(seed, "arrival", 0) * 100
        gaps = [rng.uniform(seed, "gap", i) + 0.01 for i in range(2 + seed * 5)]
        cases.append((arrival, [arrival + sum(gaps[: i + 1]) for i in range(len(gaps))]))
    for arrival, times in cases:
        metrics = RequestMetrics("r0", arrival, 1, first_token=times[0], last_token=times[-1], num_output_tokens=len(times))
        ttft, tpot = answer(arrival, list(times))
        case = f"a request of {arrival:.4g} s with tokens at {', '.join(f'{t:.4g}' for t in times[:4])} s"
        if metrics.ttft is None or abs(ttft - metrics.ttft) > 1e-6:
            yield f"TTFT of {case}: you say {ttft:.4g}, it is {metrics.ttft:.4g} s (counted from the arrival)."
        if (tpot is None) != (metrics.tpot is None) or (tpot is not None and abs(tpot - (metrics.tpot or 0)) > 1e-6):
            yield f"TPOT of {case}: you say {_said(tpot)}, it is {_said(metrics.tpot)} ({len(times)} tokens have {len(times) - 1} gaps)."


def _said(value: float | None) -> str:
    return "None" if value is None else f"{value:.4g} s"
