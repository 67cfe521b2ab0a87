"""The GPU kernels without a GPU: interpreted in a process of their own, and compiled for cards that are not there."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.kernels.capability import capability_of, decode_tile, prefill_tile

ROOT = Path(__file__).resolve().parent.parent.parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)")


@needs_triton
def test_every_kernel_computes_what_the_reference_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/interpreted"],
                          cwd=ROOT, env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.parametrize("card", ["t4", "a10", "h100"])
def test_every_kernel_compiles_and_fits(card: str) -> None:
    from llmlab.kernels.cross_compile import compiled

    capability = capability_of(card)
    built = compiled(capability)
    assert {b.kernel for b in built} >= {
        "attend", "merge_partials", "norm_rows", "gate_rows", "rope_store", "copy_pool_blocks", "grouped_linear", "combine_pairs",
        "argmax_rows", "draw_rows", "quant_gemv", "quant_gemm" if capability.tensor_cores else "widen", "row_linear",
    }  # fmt: skip
    assert ("flat_linear" in {b.kernel for b in built}) == capability.tensor_cores
    assert all(b.tensor_cores for b in built if b.kernel == "flat_linear")
    assert {b.sizes["UNIFIED"] for b in built if b.kernel == "attend"} == {False, capability.tensor_cores}
    assert max(b.shared for b in built) <= capability.shared_kib * 1024
    assert [b for b in built if b.spilled] == []
    assert any(b.tensor_cores for b in built if b.kernel == "attend") == capability.tensor_cores


@needs_triton
@pytest.mark.parametrize(("card", "head_dim"), [("a10", 128), ("h100", 80)])
def test_attention_in_float32_compiles_and_hardly_spills(card: str, head_dim: int) -> None:
    """Nobody serves in it, but the tests that compare tokens on a GPU do, and larger tiles take minutes to compile."""
    import torch

    from llmlab.kernels.cross_compile import compiled, launch_attention

    capability = capability_of(card)
    built = compiled(capability, head_dim, 4, 16, launch_attention, torch.float32)
    assert max(b.shared for b in built) <= capability.shared_kib * 1024
    assert [b for b in built if b.spilled > 512] == []


@needs_triton
@pytest.mark.parametrize(("card", "head_dim", "group", "block_size"), [
    ("t4", 64, 8, 16), ("t4", 96, 1, 32), ("a10", 80, 1, 32), ("a10", 32, 8, 16), ("h100", 96, 2, 32), ("h100", 64, 16, 16)])  # fmt: skip
def test_attention_compiles_and_fits_for_many_heads(card: str, head_dim: int, group: int, block_size: int) -> None:
    from llmlab.kernels.cross_compile import compiled, launch_attention

    capability = capability_of(card)
    built = compiled(capability, head_dim, group, block_size, launch_attention)
    assert max(b.shared for b in built) <= capability.shared_kib * 1024
    assert [b for b in built if b.spilled] == []
    decode = decode_tile(capability, head_dim, group)
    for b in (b for b in built if b.kernel == "attend"):
        tile = decode if b.sizes["BLOCK_M"] == decode.block_m else prefill_tile(capability, head_dim, group)
        assert tile.programs * -(-b.registers // 8) * 8 * 32 * tile.warps <= 65_536, "not all programs are resident"
        assert tile.programs * b.shared <= capability.shared_kib * 1024


def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 3 and "No GPU to measure" in done.stderr and done.stdout == ""


def test_the_gpu_benchmark_runs_through_on_a_cpu_and_calls_it_a_rehearsal() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--rehearse", "--parts", "machine", "dataflow", "decode", "prefill", "ttft", "placement"],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not [row for part in found.values() if isinstance(part, list) for row in part if "failed" in row]
    assert len(found["dataflow"]) == 4 and found["rehearsal"] and [row["batch"] for row in found["decode"]] == [1, 2] and "REHEARSAL" in done.stdout


def test_a_row_that_does_not_fit_says_so_and_the_next_one_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from rich.progress import Progress

    from llmlab.execution.device_line import HostLine

    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)

    def too_large() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB\nSee the documentation")

    options = argparse.Namespace(json=tmp_path / "found.json")
    bench = script.Bench(options, HostLine(), torch.float32, {}, Progress(disable=True))
    bench.run("prefill", [script.Case({"prompts": "1 x 8"}, lambda: {"tokens/s": 1.0})])
    bench.run("decode", [script.Case({"batch": 256}, too_large), script.Case({"batch": 1}, lambda: {"tokens/s": 2.0})])
    kept = json.loads(options.json.read_text())["decode"]
    assert kept == [{"batch": 256, "failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 40 GiB"}, {"batch": 1, "tokens/s": 2.0}]
    assert "| 256 | OutOfMemoryError" in capsys.readouterr().out
    # gone on with: what was measured stays, what failed is tried again; and nothing is begun when the time is over
    bench.run("decode", [script.Case({"batch": 256}, lambda: {"tokens/s": 3.0}), script.Case({"batch": 1}, too_large)])
    assert json.loads(options.json.read_text())["decode"] == [{"batch": 1, "tokens/s": 2.0}, {"batch": 256, "tokens/s": 3.0}]
    late = script.Bench(options, HostLine(), torch.float32, {}, Progress(disable=True), 0.0)
    late.run("decode", [script.Case({"batch": 8}, too_large)])
    assert late.found["decode"] == [] and "left out" in capsys.readouterr().out
