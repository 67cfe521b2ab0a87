"""Checks about the device and the host beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmlab import rng

Choose = Callable[[int, int, float, float, int], str]


def choose_way(answer: Choose) -> Iterator[str]:
    """`answer(g, h_rows, t, h, layers)`: the way with the highest throughput; the first of equals."""
    cases = [(13, 64, 0.035, 0.008, 32), (13, 64, 0.035, 0.0002, 32), (8, 0, 0.03, 0.001, 32), (8, 100, 0.02, 0.1, 32), (13, 1, 0.035, 0.02, 32)]
    for seed in range(40):
        draw = [rng.uniform(seed, "way", i) for i in range(4)]
        cases.append((1 + int(30 * draw[0]), int(200 * draw[1]), 0.02, 10 ** (-4 + 4 * draw[2]), 8 + int(60 * draw[3])))
    for g, rows, t, h, layers in cases:
        rate = _rates(g, rows, t, h, layers)
        got = answer(g, rows, t, h, layers)
        best = max(rate, key=lambda name: rate[name])
        if got not in rate:
            yield f"It answered {got!r}; the names are {', '.join(rate)}."
            return
        if rate[got] < rate[best] * (1 - 1e-9) or (rate[got] == rate[best] and got != best):
            told = ", ".join(f"{name} {value:.0f}" for name, value in rate.items())
            yield f"With G={g}, H={rows}, t={t:g}, h={h:.3g}, L={layers} you chose {got}; the rates are {told} tokens/s."


def _rates(g: int, rows: int, t: float, h: float, layers: int) -> dict[str, float]:
    if not rows:
        return dict.fromkeys(("device only", "wait", "later"), g / t)
    step = max(t, layers * h / (layers + 1))
    return {"device only": g / t, "wait": (g + rows) / (t + layers * h), "later": g / step + rows / ((layers + 1) * step)}
