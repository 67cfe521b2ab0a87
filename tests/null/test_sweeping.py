"""Sweeps: every combination one row, in any number of processes, and never twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import llmlab
from llmlab import sweeping
from llmlab.seams import EngineView, Offers, RequestView
from llmlab.sweeping import sweep
from llmlab.types import ConfigError, LabError, TraceError, WorkItem
from llmlab.workloads.source import OpenSource
from llmlab.workloads.workload import Workload

SIM: dict[str, Any] = {"model": "lab-xs", "executor": "sim", "hardware": "t4", "num_blocks": 64, "block_size": 4}
LOAD = Workload.poisson(50_000.0, 20, prompt=(3, 20), output=(1, 20), seed=1)


class Weighted:
    """An ordering with a parameter."""

    name = "weighted"
    refresh = "arrival"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def key(self, request: RequestView, now: float) -> float:
        return self.weight * request.num_prompt_tokens


class Deadly:
    """A composer that takes its process with it."""

    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        os._exit(3)


class NoTorch:
    """A load that cannot be served where torch is loaded."""

    def __len__(self) -> int:
        return 1

    def source(self, vocab_size: int) -> OpenSource:
        assert "torch" not in sys.modules
        return Workload.batch(1).source(vocab_size)


def untimed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "wall_seconds"} for row in rows]


GRID = {"ordering": ["fcfs", "sjf_oracle", Weighted(-1.0)], "max_num_seqs": [2, 8]}


def test_a_row_holds_the_settings_and_the_metrics_of_the_run() -> None:
    rows = sweep(GRID, LOAD, backend="inline", **SIM)
    assert [(r["ordering"], r["max_num_seqs"]) for r in rows] == [
        (name, seats) for name in ("fcfs", "sjf_oracle", "weighted(weight=-1.0)") for seats in (2, 8)
    ]
    for row, ordering in zip(rows[::2], GRID["ordering"]):
        run = llmlab.run(llmlab.EngineConfig(**SIM, ordering=ordering, max_num_seqs=2), LOAD)
        assert {name: row[name] for name, _ in run.metrics.rows()} == dict(run.metrics.rows())
        assert row["error"] == "" and row["wall_seconds"] > 0 and row["workload"] == repr(LOAD)
    assert len({row["key"] for row in rows}) == 6 == len({row["mean_ttft"] for row in rows})


def test_processes_give_the_same_rows_as_this_one() -> None:
    loads = {
        "steady": LOAD,
        "clients": Workload.batch(10, prompt=(3, 20), output=(1, 9)).closed_loop(3),
        "torchless": NoTorch(),
    }
    grid = {**GRID, "workload": loads}
    rows = sweep(grid, workers=2, **SIM)
    here = untimed(sweep({**grid, "workload": {**loads, "torchless": Workload.batch(1)}}, backend="inline", **SIM))
    for row, same in zip(untimed(rows), here, strict=True):
        assert row["error"] == ""
        assert {**row, "key": 0} == {**same, "key": 0}


def test_workloads_of_a_seed() -> None:
    def burst(seed: int) -> Workload:
        return Workload.gamma(30_000.0, 2.0, 8, prompt=(3, 9), output=(1, 9), seed=seed)

    grid = {"workload": [burst, lambda seed: LOAD], "workload_seed": [1, 2]}
    rows = sweep(grid, backend="inline", **SIM)
    assert [(r["workload"], r["workload_seed"]) for r in rows] == [
        ("burst", 1),
        ("burst", 2),
        ("drawn", 1),
        ("drawn", 2),
    ]
    assert rows[0]["mean_e2e"] != rows[1]["mean_e2e"] and rows[2]["key"] == rows[3]["key"]
    two = sweep({"workload": [lambda seed: LOAD, lambda seed: burst(seed)]}, backend="inline", **SIM)
    assert len({r["workload"] for r in two}) == 2 and two[0]["num_requests"] == 20 and two[1]["num_requests"] == 8


def test_a_point_that_fails_is_a_row_with_its_error() -> None:
    grid = {"max_num_seqs": [2, 0], "hardware": ["t4", "t5"], "num_blocks": [64, 2]}
    rows = sweep(grid, LOAD, backend="inline", model="lab-xs", executor="sim")
    errors = {(r["max_num_seqs"], r["hardware"], r["num_blocks"]): r["error"] for r in rows}
    assert errors[2, "t4", 64] == "" and rows[0]["num_finished"] == 20
    assert "max_num_seqs=0" in errors[0, "t4", 64] and "t5" in errors[2, "t5", 64]
    assert sum(error != "" for error in errors.values()) == 6


def test_a_process_that_dies_costs_its_own_row_only() -> None:
    rows = sweep({"composer": ["chunked", Deadly(), "prefill_first"], "max_num_seqs": [2, 3]}, LOAD, workers=2, **SIM)
    assert [bool(row["error"]) for row in rows] == [False, False, True, True, False, False]
    assert rows[2]["composer"] == "Deadly" and "process died" in rows[2]["error"]
    assert rows[0]["num_finished"] == 20


# ---------------------------------------------------------------------------------------- resuming
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was really run."""
    ran: list[Any] = []
    real = sweeping.run_point

    def run_point(fields: Any, load: Any) -> Any:
        ran.append(fields)
        return real(fields, load)

    monkeypatch.setattr(sweeping, "run_point", run_point)
    return ran


def test_finished_points_are_not_run_again(tmp_path: Path, counted: list[Any]) -> None:
    file = tmp_path / "rows.jsonl"
    first = sweep(GRID, LOAD, results=file, backend="inline", **SIM)
    assert len(counted) == 6 == len(file.read_text().splitlines())
    assert sweep(GRID, LOAD, results=file, backend="inline", **SIM) == first and len(counted) == 6
    more = sweep({**GRID, "max_num_seqs": [8, 16]}, LOAD, results=file, backend="inline", **SIM)
    assert len(counted) == 9 and [r for r in more if r["max_num_seqs"] == 8] == [
        r for r in first if r["max_num_seqs"] == 8
    ]
    # a default that is written out is the same point; another workload, parameter or field is not
    sweep(GRID, LOAD, results=file, backend="inline", **SIM, seed=0, composer="chunked")
    assert len(counted) == 9
    changes: list[tuple[dict[str, Any], Workload, dict[str, Any]]] = [
        ({"max_num_seqs": [2]}, LOAD.at_rate(9.0), {}), ({"max_num_seqs": [2]}, LOAD, {"seed": 1}),
        ({"max_num_seqs": [2], "ordering": [Weighted(-2.0)]}, LOAD, {}),
    ]  # fmt: skip
    for number, (grid, load, fields) in enumerate(changes):
        sweep(grid, load, results=file, backend="inline", **SIM, **fields)
        assert len(counted) == 10 + number
    sweep({"max_num_seqs": [2], "ordering": [Weighted(-1.0)]}, LOAD, results=file, backend="inline", **SIM)
    assert len(counted) == 12


def test_failed_points_are_tried_again(tmp_path: Path, counted: list[Any]) -> None:
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        rows = sweep({"max_num_seqs": [0, 2]}, LOAD, results=file, backend="inline", **SIM)
        assert [bool(row["error"]) for row in rows] == [True, False]
    assert len(counted) == 3


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path, counted: list[Any],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    file = tmp_path / "rows.jsonl"
    real = sweeping.run_point

    def until_four(fields: Any, load: Any) -> Any:
        if len(counted) == 4:
            raise KeyboardInterrupt
        return real(fields, load)

    monkeypatch.setattr(sweeping, "run_point", until_four)
    with pytest.raises(KeyboardInterrupt):
        sweep(GRID, LOAD, results=file, backend="inline", **SIM)
    with file.open("ab") as half:
        half.write(b'{"ordering": "fc')  # as a power cut leaves it
    monkeypatch.setattr(sweeping, "run_point", real)
    rows = sweep(GRID, LOAD, results=file, backend="inline", **SIM)
    assert len(counted) == 6 and [json.loads(line)["error"] for line in file.read_text().splitlines()] == [""] * 6
    assert untimed(rows) == untimed(sweep(GRID, LOAD, backend="inline", **SIM))


def test_a_file_that_holds_something_else(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"key": "a", "error": ""}\nhello\n')
    with pytest.raises(TraceError, match=r"rows\.jsonl line 2.*hello"):
        sweep(GRID, LOAD, results=file, backend="inline", **SIM)
    assert file.read_text().endswith("hello\n")
    with pytest.raises(ConfigError, match=r"results.*cannot be written"):
        sweep({"max_num_seqs": [2]}, LOAD, results=tmp_path / "no" / "where.jsonl", backend="inline", **SIM)


SCRIPT = """
import sys, llmlab

class Mine:
    refresh = "arrival"
    def key(self, request, now):
        return -request.number

grid = {"ordering": ["fcfs", Mine()], "workload_seed": [1, 2]}
rows = llmlab.sweep(grid, lambda seed: llmlab.Workload.poisson(50_000.0, 20, prompt=(3, 20), output=(1, 9), seed=seed),
                    model="lab-xs", executor="sim", hardware="t4", max_num_seqs=2, results=sys.argv[1], workers=1)
print(sum(row["wall_seconds"] for row in rows), *(row["error"] for row in rows))
"""


def test_a_script_needs_no_guard_and_resumes_in_another_process(tmp_path: Path) -> None:
    """Also: plug-ins and functions that only the script knows travel to the processes."""
    script, file = tmp_path / "mine.py", tmp_path / "rows.jsonl"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = [
        subprocess.run(
            [sys.executable, str(script), str(file)], check=True, timeout=100, env=env, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert said[0].stdout == said[1].stdout and said[0].stderr == ""  # the very same rows; no bar where no terminal is
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4 and all(row["error"] == "" for row in rows)
    assert len({row["mean_ttft"] for row in rows}) == 4


# ---------------------------------------------------------------------------------------------- ray
def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray is not installed.*pip install"):
        sweep({"max_num_seqs": [2]}, LOAD, backend="ray", **SIM)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (an optional extra)")
def test_ray_gives_the_same_rows() -> None:
    grid = {"ordering": ["fcfs", "sjf_oracle"], "max_num_seqs": [2, 0]}
    here = untimed(sweep(grid, LOAD, backend="inline", **SIM))
    assert untimed(sweep(grid, LOAD, backend="ray", workers=2, **SIM)) == here


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(("grid", "load", "more", "message"), [
    ({"orderings": ["fcfs"]}, LOAD, {}, "Did you mean 'ordering'"),
    ({}, LOAD, {"max_num_seq": 3}, "Did you mean 'max_num_seqs'"),
    ({"ordering": "fcfs"}, LOAD, {}, "must be a list of values"),
    ({"ordering": []}, LOAD, {}, "must be a list of values"),
    ({"workload": []}, None, {}, "must be a list of values"),
    ({"ordering": ["fcfs"]}, None, {}, "is no workload"),
    ({"workload": [3]}, None, {}, "is no workload"),
    ({"workload_seed": [1, 2]}, LOAD, {}, "no function of a seed"),
    ({}, LOAD, {"workload_seed": [1]}, "unknown name"),
    ({"seed": [1]}, LOAD, {"trace": "x.jsonl"}, "write the same file"),
    ({"seed": [1]}, LOAD, {"backend": "dask"}, "Known: inline, processes, ray"),
    ({"seed": [1]}, LOAD, {"workers": 0}, "workers=0"),
])  # fmt: skip
def test_bad_input(grid: dict[str, Any], load: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError, match=message):
        sweep(grid, load, **{**SIM, "backend": "inline", **more})


def test_what_cannot_travel_says_so() -> None:
    class Holds:
        refresh = "arrival"

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def key(self, request: RequestView, now: float) -> float:
            return request.arrival

    with pytest.raises(ConfigError, match="cannot be sent to another process"):
        sweep({"ordering": [Holds()]}, LOAD, **SIM)
    assert sweep({"ordering": [Holds()]}, LOAD, backend="inline", **SIM)[0]["error"] == ""


def test_measured_points_run_one_at_a_time_by_default() -> None:
    points = sweeping._points({"seed": [1, 2]}, LOAD, {"model": "lab-xs"})
    assert sweeping._default_workers(points) == 1
    assert sweeping._default_workers(sweeping._points({"seed": [1, 2]}, LOAD, SIM)) == (
        os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    )
