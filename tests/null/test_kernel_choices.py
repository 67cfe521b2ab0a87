"""One maximum for all scores, and kernels by the number of rows: what is chosen from what was observed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.kernels.dataflow import LIBRARY, Dataflow, inflections, measured
from llmlab.kernels.softmax_schemes import BANDS, calibrate


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=60), st.sampled_from(sorted(BANDS)))
def test_the_calibrated_maximum_covers_as_many_rows_as_any(lse: list[float], dtype: str) -> None:
    scheme, coverage = calibrate(np.array([*lse, -math.inf]), dtype)
    low, high = BANDS[dtype]
    inside = sum(low - 1e-9 <= x - scheme.phi <= high + 1e-9 for x in lse)
    assert inside >= round(coverage * len(lse))
    assert coverage * len(lse) == pytest.approx(max(sum(first <= x <= first + high - low for x in lse) for first in lse), abs=1e-6)


def test_rows_without_keys_say_nothing_about_scores() -> None:
    with pytest.raises(ValueError, match="finite"):
        calibrate(np.array([-math.inf]), "float16")


def test_bounds_are_where_the_next_kernel_wins() -> None:
    times = {"rows": {1: 1.0, 2: 2.0, 4: 4.0}, "flat": {1: 3.0, 2: 2.0, 4: 2.0, 8: 2.0, 16: 9.0}, "library": dict.fromkeys((1, 2, 4, 8, 16, 32), 5.0)}
    bounds = inflections(times)
    assert bounds == Dataflow(2, 16)
    assert [bounds.pick(m) for m in (1, 2, 8, 16, 500)] == ["rows", "flat", "flat", "library", "library"]
    assert LIBRARY.pick(1) == "library"


@given(st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.floats(1, 9), min_size=1), st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.floats(1, 9)))
def test_a_kernel_that_was_not_measured_is_never_picked(library: dict[int, float], rows: dict[int, float]) -> None:
    bounds = inflections({"library": library, "rows": rows})
    for m in sorted({*library, *rows}):
        assert bounds.pick(m) != "flat" or m not in library
        assert bounds.pick(m) != "rows" or m in rows or m not in library


def test_every_kernel_is_measured_at_the_sizes_it_is_made_for() -> None:
    asked: list[tuple[str, int]] = []
    seconds = measured(lambda kernel, rows: lambda: asked.append((kernel, rows)), lambda work: work() or 1.0)  # type: ignore[func-returns-value]
    assert max(seconds["rows"]) == 16 and max(seconds["flat"]) == max(seconds["library"]) == 64
    assert len(asked) == sum(map(len, seconds.values()))
