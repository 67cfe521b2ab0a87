"""The benchmark of CPU and GPU in parallel, rehearsed small on the CPU: it runs through and tells what it should."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from llmlab.kernels.dispatch import why_no_cuda

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_hybrid", ROOT / "benchmarks" / "hybrid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rehearsal_serves_the_load_under_every_placement(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = bench.parsed(["--rehearse"])
    load = bench.Load(10, 8, (60, 100), (8, 12))
    rows = [bench.measured(name, options, load) for name in bench.PLACEMENTS]
    told = bench.told(rows, options)
    assert [row.placement for row in rows] == ["gpu_only", "neo", "apex"] and all(row.rate > 0 for row in rows)
    assert not rows[0].modes and rows[1].modes and rows[2].modes, "the pool is so small that rows go to the host"
    assert told["apex_over_gpu_only"] == pytest.approx(rows[2].rate / rows[0].rate) and told["measured"] is False
    assert all(0 <= row.waited <= 1 and 0 <= row.beside <= 1 for row in rows)
    assert "the numbers mean nothing" in capsys.readouterr().out


@pytest.mark.skipif(why_no_cuda() is None, reason="a GPU is at hand")
def test_without_a_gpu_it_measures_nothing(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["hybrid.py"])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 3 and "nothing measured" in capsys.readouterr().err
