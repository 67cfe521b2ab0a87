"""Measure the two ceilings of the processor at hand with numpy: ``python -m roofline.measure``.

The matrix product gives the compute ceiling. Matrix-vector products read every weight once, as decoding does, so
they give the bandwidth that a decode step can reach: from main memory with a large matrix, from the last-level
cache with a small one. Set the thread count outside (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates: GFLOP/s of an fp32 product, GB/s read from memory, GB/s read from cache."""

    gemm_gflops: float
    memory_gbps: float
    cache_gbps: float


def best_seconds(run: Callable[[], object], budget: float = 1.5) -> float:
    """Return the shortest of the runs that fit into ``budget`` seconds (at least three)."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < budget:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def gemm_gflops(n: int = 2048) -> float:
    """Return the rate of an ``n x n x n`` fp32 product in GFLOP/s."""
    a, b, out = (np.ones((n, n), np.float32) for _ in range(3))
    return 2 * n**3 / best_seconds(lambda: np.matmul(a, b, out=out)) / 1e9


def gemv_gbps(mebibytes: float) -> float:
    """Return the rate at which a matrix-vector product reads its matrix of that size, in GB/s."""
    columns = 1024
    rows = int(mebibytes * 2**20 / 4 / columns)
    matrix, vector, out = np.ones((rows, columns), np.float32), np.ones(columns, np.float32), np.empty(rows, np.float32)
    return matrix.nbytes / best_seconds(lambda: np.matmul(matrix, vector, out=out)) / 1e9


def measure() -> Ceilings:
    """Measure all three ceilings in about five seconds."""
    return Ceilings(gemm_gflops(), gemv_gbps(256), gemv_gbps(4))


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))
