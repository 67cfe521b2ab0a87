"""How many threads the CPU kernels should use: never more than there are free cores.

Threads of one OpenMP team wait for each other by spinning, so a team that is larger than the number of free cores is
not a little slower but many times: beside busy processes, two threads took over twenty times as long as one.
"""

from __future__ import annotations

import os
import statistics
import time
from typing import NamedTuple

import torch

_PROBE_FLOATS = 1 << 22  # 16 MB: one pass takes about a millisecond
_ROUNDS = 7
_WORTH = 1.15  # a team must beat one thread by this factor to be used


class ThreadChoice(NamedTuple):
    """The number of threads, and why."""

    num_threads: int
    why: str


def available_cores() -> int:
    """Cores that this process may use; OMP_NUM_THREADS bounds them, as everywhere."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def choose_threads(wanted: int | None = None) -> ThreadChoice:
    """`wanted` if it is given; else the whole team, if a quick measurement shows that it pays right now, or one.

    Leaves torch set to the chosen number.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return ThreadChoice(wanted, "as asked")
    team = available_cores()
    if team == 1:
        torch.set_num_threads(1)
        return ThreadChoice(1, "one core is available, or OMP_NUM_THREADS=1")
    data = torch.ones(_PROBE_FLOATS)
    together, alone = _median_seconds(data, team), _median_seconds(data, 1)
    gain = alone / together
    if gain >= _WORTH:
        torch.set_num_threads(team)
        return ThreadChoice(team, f"{team} threads read memory {gain:.1f} times as fast as one")
    torch.set_num_threads(1)
    return ThreadChoice(1, f"{team} threads are only {gain:.1f} times as fast as one: the other cores are busy")


def _median_seconds(data: torch.Tensor, num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
