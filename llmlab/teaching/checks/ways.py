"""Checks about the device and the host beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmlab import rng

Choose = Callable[[int, int, float, float, float, int], str]


def choose_way(answer: Choose) -> Iterator[str]:
    """`answer(g, h_rows, linear, attention, row, layers)`: the mode with the highest throughput; the first of equals."""
    cases = [(13, 128, 8e-4, 3e-4, 3e-4, 32), (13, 128, 8e-4, 3e-4, 1e-6, 32), (8, 0, 1e-3, 1e-4, 1e-5, 32), (64, 300, 1e-4, 2e-3, 2e-5, 32)]
    for seed in range(40):
        draw = [rng.uniform(seed, "way", i) for i in range(5)]
        cases.append((1 + int(60 * draw[0]), int(300 * draw[1]), 10 ** (-4 + draw[2]), 10 ** (-4 + 2 * draw[4]), 10 ** (-6 + 3 * draw[3]), 32))
    for g, rows, linear, attention, row, layers in cases:
        rate = _rates(g, rows, linear, attention, row, layers)
        got = answer(g, rows, linear, attention, row, layers)
        best = max(rate, key=lambda name: rate[name])
        if got not in rate:
            yield f"It answered {got!r}; the names are {', '.join(rate)}."
            return
        if rate[got] < rate[best] * (1 - 1e-9) or (rate[got] == rate[best] and got != best):
            told = ", ".join(f"{name} {value:.0f}" for name, value in rate.items())
            yield (f"With G={g}, H={rows}, l={linear:.3g}, a={attention:.3g}, r={row:.3g}, L={layers} you chose {got}; the rates are "
                   f"{told} tokens/s.")  # fmt: skip


def _rates(g: int, rows: int, linear: float, attention: float, row: float, layers: int) -> dict[str, float]:
    alone, twice = layers * (linear + attention), layers * (2 * linear + attention)
    return {"gpu_only": g / alone, "asym_pipeline": (g + min(rows, (2 * linear + attention) / row)) / twice,
            "async_overlap": g / alone + min(rows / ((layers + 1) * alone), 1 / (layers * row))}  # fmt: skip
