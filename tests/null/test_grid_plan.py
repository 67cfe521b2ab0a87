"""Plans of a GPU's grid: complete, balanced, deterministic; and the table of what runs where."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llmlab import EngineConfig
from llmlab.cli.app import app
from llmlab.execution.cost import RooflineCost
from llmlab.kernels.attention_plan import (
    PARTIAL,
    ROUND,
    ROW,
    START,
    STOP,
    TOKEN,
    TOKENS,
    GridPlan,
    plan_grid,
    plan_per_row,
)
from llmlab.kernels.capability import (
    SM_OF,
    capability_of,
    check_dtype,
    decode_tile,
    default_dtype,
    kernel_table,
    of_compute,
    prefill_tile,
)
from llmlab.types import ConfigError, Span, WorkItem
from roofline import hardware, shapes

ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 900)), min_size=1, max_size=12)


def step(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    new, before = np.array(rows).T
    return np.concatenate(([0], np.cumsum(new))), new + before


@settings(max_examples=120, deadline=None)
@given(ROWS, st.sampled_from([1, 2, 8]), st.sampled_from([1, 7, 132]), st.sampled_from([1, 4, 16]), st.sampled_from([None, 100]))
def test_every_pair_is_attended_to_once(rows, heads, programs, tile, window) -> None:
    cu, lens = step(rows)
    plan = plan_grid(cu, lens, heads=heads, programs=programs, tile=tile, window=window)
    assert sorted(plan.queue.tolist()) == list(range(len(plan.items) * heads))  # every unit runs once
    seen: dict[int, list[tuple[int, int]]] = {}
    for item in plan.items.astype(int).tolist():
        for t in range(item[TOKENS]):
            seen.setdefault(item[TOKEN] + t, []).append((item[START], item[STOP]))
    assert len(seen) == cu[-1]
    for row in range(len(lens)):
        for token in range(int(cu[row]), int(cu[row + 1])):
            own = int(lens[row] - (cu[row + 1] - token))
            pieces = sorted(seen[token])
            first = 0 if window is None else max(0, own - window + 1)
            assert pieces[0][0] <= first and pieces[-1][1] >= own + 1
            assert all(a[1] == b[0] for a, b in pairwise(pieces))
            assert len(pieces) == max(1, plan.merges[token, 2])


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([2, 50]))
def test_partial_states_have_places_of_their_own(rows, programs) -> None:
    cu, lens = step(rows)
    plan = plan_grid(cu, lens, heads=2, programs=programs, tile=4)
    places = [p for item in plan.items.tolist() if item[PARTIAL] >= 0 for p in range(item[PARTIAL], item[PARTIAL] + item[TOKENS])]
    assert sorted(places) == list(range(plan.num_partials))
    merged = [int(first + i * step_) for first, step_, parts in plan.merges for i in range(parts)]
    assert sorted(merged) == places
    for item in plan.items.tolist():
        if item[PARTIAL] >= 0:
            assert item[START] % ROUND == 0 or item[START] == 0


LENGTHS = {
    "constant": np.full(16, 1024),
    "uniform": np.random.default_rng(0).integers(512, 1024, 16),
    "zipf": np.minimum(65_536, (256 * np.random.default_rng(1).zipf(1.6, 16))),
    "one long": np.array([100_000, *[300] * 15]),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("programs", [132, 216, 264])
def test_decoding_is_balanced_whatever_the_lengths(name: str, programs: int) -> None:
    lens = LENGTHS[name]
    plan = plan_grid(np.arange(17), lens, heads=8, programs=programs, tile=1)
    assert plan.imbalance <= 1.15
    assert plan.load.sum() >= int(lens.sum()) * 8


def test_one_item_per_row_is_not_balanced_where_lengths_differ_and_is_where_they_do_not() -> None:
    def makespan(plan: GridPlan) -> float:
        return float(plan.load.max())

    def both(lens: np.ndarray) -> tuple[float, float]:
        arguments = {"heads": 8, "programs": 128, "tile": 1}
        return makespan(plan_grid(np.arange(17), lens, **arguments)), makespan(plan_per_row(np.arange(17), lens, **arguments))

    planned, naive = both(LENGTHS["one long"])
    assert naive > 4 * planned
    planned, naive = both(LENGTHS["constant"])
    assert naive <= 1.01 * planned


def test_the_same_lengths_give_the_same_plan_and_a_fixed_chunk_ignores_the_neighbours() -> None:
    cu, lens = step([(1, 700), (5, 30)])
    one, two = (plan_grid(cu, lens, heads=4, programs=60, tile=4) for _ in range(2))
    assert all(np.array_equal(getattr(one, n), getattr(two, n)) for n in ("items", "queue", "starts", "merges", "load"))

    def cuts(rows: list[tuple[int, int]]) -> list[list[int]]:
        plan = plan_grid(*step(rows), heads=4, programs=60, tile=4, chunk=256)
        return [item[START : STOP + 1] for item in plan.items.tolist() if item[ROW] == 0]

    assert cuts([(1, 700)]) == cuts([(1, 700), (1, 9000), (3, 3)])


def test_a_step_without_rows_of_a_class_is_an_empty_plan() -> None:
    plan = plan_grid(np.array([0, 1]), np.array([9]), heads=2, programs=4, tile=1, rows=np.array([False]))
    assert len(plan.items) == 0 and plan.starts.tolist() == [0] * 5 and plan.imbalance == 1.0


# ------------------------------------------------------------------------------------------ the table
def test_every_gpu_of_the_hardware_table_has_a_capability() -> None:
    gpus = {name for name, device in hardware.table().items() if device.kind == "gpu"}
    assert set(SM_OF) == gpus
    for name in gpus:
        assert capability_of(name).units == hardware.get(name).units


def test_what_a_t4_an_a10_and_an_h100_get() -> None:
    t4, a10, h100 = (capability_of(name) for name in ("t4", "a10", "h100"))
    assert [c.shared_kib for c in (t4, a10, h100)] == [64, 99, 227]
    assert [default_dtype(c) for c in (t4, a10, h100)] == ["float16", "bfloat16", "bfloat16"]
    table = {c.op: c for c in kernel_table(t4, "float16")}
    assert table["attention, prefill"].implementation.startswith("torch SDPA")
    assert "sm_75" in table["attention, prefill"].why and "no bfloat16" in table["dtype"].why
    assert {c.op: c for c in kernel_table(h100, "bfloat16")}["attention, prefill"].implementation.startswith("triton")
    with pytest.raises(ConfigError, match="bfloat16"):
        check_dtype(t4, "bfloat16")
    with pytest.raises(ConfigError, match=r"7\.0"):
        of_compute("V100", 70, 80, 1e9)
    with pytest.raises(ConfigError, match="nearest"):
        capability_of("t5")


@pytest.mark.parametrize("card", ["t4", "a10", "h100"])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_tiles_hold_whole_groups(card: str, group: int) -> None:
    capability = capability_of(card)
    for tile in (decode_tile(capability, 128, group), prefill_tile(capability, 128, group)):
        assert tile.tokens(group) * group <= tile.block_m


# --------------------------------------------------------------------------------- what a simulator charges
def test_the_plan_of_a_step_changes_what_it_costs() -> None:
    """One long row among short ones: a perfect deal, the kernels' plan, and no plan at all."""

    def seconds(plan: str, lens: list[int]) -> float:
        cost = RooflineCost(shapes.get("llama-3.1-8b"), "h100", 16, attention_plan=plan)
        items = [WorkItem(f"r{i}", Span(n - 1, n)) for i, n in enumerate(lens)]
        plain = cost.seconds(lens, [], len(lens))
        assert plain == pytest.approx(cost.step(items).seconds, rel=1e-9)  # the simulator leaps at the same price
        return plain

    long, even = [100_000, *[300] * 15], [1000] * 33
    ideal, planned, naive = (seconds(plan, long) for plan in ("ideal", "balanced", "per_row"))
    assert ideal < planned < 1.2 * ideal and naive > 2 * planned
    ideal, planned, naive = (seconds(plan, even) for plan in ("ideal", "balanced", "per_row"))
    assert ideal <= planned <= naive < 1.2 * ideal


def test_only_a_gpu_has_a_grid() -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        RooflineCost(shapes.get("llama-2-7b"), "cpu-2core", 16, attention_plan="balanced")
    with pytest.raises(ConfigError, match="attention_plan"):
        EngineConfig(attention_plan="best")  # type: ignore[arg-type]


def test_the_command_prints_the_table_of_a_card_that_is_not_here() -> None:
    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["kernels", *words])

    shown = call("--device", "Tesla T4", "--json")
    assert shown.exit_code == 0
    rows = {row["op"]: row for row in json.loads(shown.output)}
    assert rows["dtype"]["implementation"] == "float16" and "SDPA" in rows["attention, prefill"]["implementation"]
    assert all(row["why"] for row in rows.values())
    assert call("--device", "a10").exit_code == call("--device", "h100", "--dtype", "float16").exit_code == 0
    for words in (("--device", "t5"), ("--device", "t4", "--dtype", "bfloat16"), ("--device", "t4", "--kernels", "cutlass")):
        assert isinstance(call(*words).exception, (ConfigError, SystemExit))
