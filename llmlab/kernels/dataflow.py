"""Which kernel multiplies few rows: by the number of rows, at bounds that were measured for each shape of weights.

    rows < flat_from      "rows"     sums in registers, one pass over the weights
    rows < library_from   "flat"     tensor cores, rows padded to the smallest product (16 in Triton)
    otherwise             "library"  cuBLAS

Source: FlashDecoding++, arXiv 2311.01282, section 5. Nothing is assumed: where nobody measured, the library multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_ROWS = {"rows": 16, "flat": 64}  # beyond, these kernels are not tried


class Dataflow(NamedTuple):
    """The bounds of one shape of weights."""

    flat_from: int = 0
    library_from: int = 0

    def pick(self, rows: int) -> str:
        """The kernel for a batch of `rows`."""
        if rows < self.flat_from:
            return "rows"
        return "flat" if rows < self.library_from else "library"


LIBRARY = Dataflow()
DataflowTable = Mapping[tuple[int, int], Dataflow]  # by [out, in] of the weights


def inflections(seconds: Mapping[str, Mapping[int, float]]) -> Dataflow:
    """The bounds that follow from measured seconds, by kernel and rows: the first batch where the next kernel wins. A kernel
    that was not measured at some size is not used there."""
    sizes = sorted({rows for times in seconds.values() for rows in times})
    none = float("inf")

    def of(kernel: str, rows: int) -> float:
        return seconds.get(kernel, {}).get(rows, none)

    flat_from = next((m for m in sizes if min(of("flat", m), of("library", m)) <= of("rows", m)), sizes[-1] + 1)
    library_from = next((m for m in sizes if m >= flat_from and of("library", m) <= of("flat", m)), sizes[-1] + 1)
    return Dataflow(flat_from, library_from)


def measured(run: Callable[[str, int], Callable[[], object]], timed: Callable[[Callable[[], object]], float],
             kernels: Sequence[str] = ("rows", "flat", "library"), batches: Sequence[int] = BATCHES) -> dict[str, dict[int, float]]:  # fmt: skip
    """Seconds of each kernel at each batch it is made for. `run(kernel, rows)` prepares a call, `timed` measures it."""
    return {kernel: {rows: timed(run(kernel, rows)) for rows in batches if rows <= MOST_ROWS.get(kernel, rows)} for kernel in kernels}
