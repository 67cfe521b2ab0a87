"""The day with a GPU: steps in turn, each with its own time, what is left the next time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu_day", ROOT / "benchmarks" / "gpu_day.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_step_that_fails_or_hangs_leaves_the_others_alone_and_comes_last_the_next_time(script: Any, tmp_path: Path) -> None:
    def step(name: str, code: str, seconds: float = 60.0) -> Any:
        return script.Step(name, ("-c", code), seconds)

    flag = tmp_path / "mended"
    fails = f"import pathlib, sys; print('tried'); sys.exit(0 if pathlib.Path({str(flag)!r}).exists() else 1)"
    steps = [step("hangs", "print('begun', flush=True); import time; time.sleep(600)", 1.0), step("fails", fails), step("goes", "print('well')")]
    done = script.day(steps, tmp_path, 5.0)
    assert {name: found.how for name, found in done.items()} == {"hangs": "too long", "fails": "failed", "goes": "ok"}
    assert json.loads((tmp_path / "day.json").read_text()).keys() == done.keys()
    log = (tmp_path / "day.log").read_text()
    assert "begun" in log and "tried" in log and "well" in log
    flag.touch()
    new = step("new", "print('first')")
    assert [s.name for s in script.in_turn([*steps, new], script.read(tmp_path / "day.json"))] == ["new", "hangs", "fails"]
    again = script.day([steps[1], new], tmp_path, 5.0)
    assert again["fails"].how == again["new"].how == again["goes"].how == "ok"
    assert script.day([step("late", "")], tmp_path, 0.0).keys() == again.keys(), "nothing is begun without time"


def test_all_steps_name_what_exists_and_fit_half_an_hour_twice(script: Any, tmp_path: Path) -> None:
    for rehearse in (True, False):
        steps = script.steps(tmp_path, rehearse)
        assert len({s.name for s in steps}) == len(steps) and sum(s.seconds for s in steps) < 2 * 1800
        files = [word for s in steps for word in s.command if word.endswith(".py")]
        assert files and all((ROOT / file).exists() for file in files)
    assert [s.name for s in steps][:3] == ["kernels", "engine", "decode"]
