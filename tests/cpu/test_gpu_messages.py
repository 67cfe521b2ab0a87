"""What somebody reads whose GPU is too old, too small, or not there; and the line that says what a card got. The faults are
put where torch would raise them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_util import write_model

from llmlab import LLM, assembly, backends, executors
from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.execution.device_line import HostLine
from llmlab.execution.torch_executor import KVCache
from llmlab.kernels.capability import capability_of, chosen_line, kernel_table
from llmlab.kernels.dispatch import why_no_cuda
from llmlab.models import loader
from llmlab.types import ConfigError

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver by downloading a new version"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CUDA device as torch would describe it; tests change its properties."""
    found = SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40, total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (14 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    return found


# --------------------------------------------------------------------------------- what was chosen
def test_a_t4_gets_float16_and_a_line_that_says_why(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    t4 = capability_of("t4")
    monkeypatch.setattr(assembly, "card_of", lambda loaded: t4)
    monkeypatch.setattr(executors, "device_line", lambda loaded: HostLine())
    llm = LLM(str(directory), device="cpu", dtype="float16", num_blocks=64)
    told = capsys.readouterr().err
    assert "t4 (sm_75, 16 GiB): float16 (the card has no bfloat16 units)" in told and "KV for 1,024 tokens" in told
    assert next(iter(llm.log)).hardware["chosen"] in told


@pytest.mark.parametrize(("name", "dtype", "says"), [
    ("t4", "float16", ["sums in registers", "prefill by torch SDPA, row by row (sm_75: a Triton product would run on ordinary cores"]),
    ("a10", "bfloat16", ["sm_86", "the range of float32 in half the bytes", "prefill by triton, tile 64 x 32, 2 stages"]),
    ("h200", "float16", ["sm_90", "asked for", "3 stages"]),
])  # fmt: skip
def test_the_line_of_each_kind_of_card(name: str, dtype: str, says: list[str]) -> None:
    card = capability_of(name)
    line = chosen_line(card, kernel_table(card, dtype), dtype, "int4", 1000)
    assert all(part in line for part in [*says, "weights in int4", "1,000 tokens"]) and "\n" not in line


def test_an_engine_on_the_cpu_says_nothing(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLM(str(directory), device="cpu")
    assert "sm_" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- faults
def test_no_driver_and_an_old_driver_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    for said in (TOO_OLD, "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"):
        monkeypatch.setattr(torch.cuda, "init", lambda said=said: (_ for _ in ()).throw(RuntimeError(said)))
        assert why_no_cuda() == said.splitlines()[0].rstrip(".")
        with pytest.raises(ConfigError, match=r"device='cuda'.*driver.*Use device='cpu'"):
            Engine(model="lab-s", device="cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "built without CUDA" in str(why_no_cuda())


def test_a_card_without_bfloat16(card: Any) -> None:
    assert backends.dtype_for(EngineConfig(), "cuda") == "float16"
    with pytest.raises(ConfigError, match=r"dtype='bfloat16': Tesla T4 .*no bfloat16 units. Use dtype='float16'"):
        Engine(model="lab-s", device="cuda", dtype="bfloat16")


def test_a_card_older_than_the_kernels_can_still_run_torchs(card: Any) -> None:
    card.name, card.minor = "Tesla V100", 0
    with pytest.raises(ConfigError, match=r"compute capability 7.0; the kernels need 7.5.*kernels='torch'"):
        Engine(model="lab-s", device="cuda")
    card.major, card.minor = 6, 1
    assert backends.dtype_for(EngineConfig(kernels="torch"), "cuda") == "float16"


def test_a_card_that_cannot_be_asked(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: (_ for _ in ()).throw(RuntimeError(TOO_OLD)))
    with pytest.raises(ConfigError, match=r"cannot be asked what it can do: The NVIDIA driver .*too old .found version 11040.\. Mend") as told:
        Engine(model="lab-s", device="cuda")
    assert "downloading" not in str(told.value)


def _out_of_memory(*given: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_weights_that_do_not_fit_while_they_are_loaded(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "load_model", _out_of_memory)
    with pytest.raises(ConfigError, match=r"weights take 16.06 GB in float16, 15.03 GB are free. Choose quantization='int4'"):
        Engine(model="llama-3.1-8b", random_weights=True, device="cuda")


def test_kv_that_does_not_fit_beside_the_weights(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "__init__", _out_of_memory)
    with pytest.raises(ConfigError, match=r"num_blocks=64: does not fit.*max_num_seqs.*max_model_len"):
        Engine(model=str(directory), device="cpu", num_blocks=64)


def test_kv_that_no_machine_holds() -> None:
    with pytest.raises(ConfigError, match=r"num_blocks=1000000000: does not fit: KV of .* GB.*Choose at most"):
        Engine(model="lab-xs", random_weights=True, device="cpu", num_blocks=10**9)


def test_a_step_that_runs_out_of_memory_says_what_would_help(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab.execution.torch_executor import TorchExecutor

    engine = Engine(model=str(directory), device="cpu", num_blocks=64)
    monkeypatch.setattr(TorchExecutor, "_forward", _out_of_memory)
    name = engine.add_request([1, 2, 3])
    outputs = [output for output in engine.step() if output.request_id == name]
    assert "out of memory" in str(outputs[0].outputs[0].error) and "max_num_batched_tokens" in str(outputs[0].outputs[0].error)


def test_run_and_tour_say_what_a_card_got(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from llmlab import tour
    from llmlab.cli.app import app
    from llmlab.engine import Engine

    assert Engine(model="lab-xs", random_weights=True, device="cpu", kernels="torch").chosen == ""
    monkeypatch.setattr(Engine, "chosen", "t4 (sm_75, 16 GiB): float16 [why]")
    done = CliRunner().invoke(app, ["run", "1+1?", "--model", "lab-xs", "--device", "cpu", "--kernels", "torch", "--max-tokens", "2"])
    assert done.exit_code == 0 and "t4 (sm_75, 16 GiB): float16 [why]" in done.stderr and "t4" not in done.stdout
    engine = Engine(model="lab-xs", random_weights=True, device="cpu", kernels="torch")
    assert tour._kernels_line(engine).startswith("t4 (sm_75")
