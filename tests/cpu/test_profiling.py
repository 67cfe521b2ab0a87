"""Measuring a real, tiny model on this CPU. What is tested is the shape of the answer, never how long something took."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import llmlab
from llmlab.backends import roofline_shape
from llmlab.execution import profiling
from llmlab.execution.cost import rows_of
from llmlab.models.checkpoint import save_random_model
from llmlab.models.loader import load_model
from llmlab.models.shapes import from_hf_config
from roofline import RooflineError
from roofline.profile import Profile, ProfileCost, calibrated, read

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 96, "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(from_hf_config(CONFIG), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True, scope="module")
def _quickly() -> Any:
    """Fewer points and repeats: enough to run every line."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    small = {"POINT_SECONDS": 0.003, "MIN_REPEATS": 3, "TOKENS": (1, 4, 64), "QUERIES": (1, 8, 64), "CONTEXTS": (0, 64, 4096), "DECODE_CONTEXTS": (0, 64, 4096),
             "EMITS": (1, 8), "PRODUCT_ROWS": (1, 16, 64), "PRODUCTS": ((64, 64), (64, 256), (256, 512)),
             "MOVED_BLOCKS": (1, 8)}  # fmt: skip
    for name, value in small.items():
        patch.setattr(profiling, name, value)
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def seen() -> list[tuple[int, int, str]]:
    return []


@pytest.fixture(scope="module")
def profile(model: Path, seen: list[tuple[int, int, str]]) -> Profile:
    loaded = load_model(model)
    return profiling.measure(loaded, roofline_shape(loaded), progress=lambda *said: seen.append(said))


def test_a_profile_says_where_and_of_what_it_is(profile: Profile) -> None:
    assert (profile.shape.name, profile.shape.num_layers, profile.dtype) == ("tiny", 2, "fp32")
    assert profile.machine.threads == torch.get_num_threads() and profile.machine.device == "cpu"
    assert profile.software["torch"] == torch.__version__ and profile.date.endswith("Z")
    assert profile.memory_bytes > 1e8 and profile.engine.step == 0.0


def test_its_tables_have_the_points_that_the_model_allows(profile: Profile) -> None:
    assert profile.attention.query == (1, 8, 64)
    assert [curve.x for curve in profile.attention.curves] == [(1, 65, 256), (8, 72, 256), (64, 128, 256)]
    assert profile.tokens.x == (1, 4, 64) and profile.emit.x == (1, 8)
    assert len(profile.products) == 3 and set(profile.copies) == {"h2d", "d2h", "d2d"}
    block = 2 * 2 * 2 * 12 * 16 * 4  # layers x (keys, values) x KV heads x head width x tokens x bytes
    assert profile.copies["h2d"].x == (block, 8 * block)
    assert profile.cpu_attention is None and profile.launch > 0
    assert profile.prepare.at(8, 8, 64) > 0


def test_progress_counts_up_to_the_end(profile: Profile, seen: list[tuple[int, int, str]]) -> None:
    done = [count for count, _, _ in seen]
    assert done == list(range(len(seen))) and {total for _, total, _ in seen} == {profiling.num_points("cpu")}
    assert len(seen) <= profiling.num_points("cpu") and all(what for _, _, what in seen)


def test_a_measured_step_runs_the_very_same_work_again(model: Path) -> None:
    loaded = load_model(model)
    watch = profiling.Stopwatch(loaded.device, 1, lambda *_: None)
    bench = profiling.Bench(loaded, roofline_shape(loaded), 16, 64, watch)
    parts: list[dict[str, float]] = []
    call = bench.caller([profiling.Lens(1, 40), profiling.Lens(8, 8)], 2, parts)
    with torch.inference_mode():
        for _ in range(3):
            call()
    assert [set(part) for part in parts] == [{"prepare", "forward", "sample"}] * 3
    with pytest.raises(RooflineError, match="failed"), torch.inference_mode():
        bench.caller([profiling.Lens(8, 4)], 1)()  # more new tokens than tokens


def serve(model: Path, **fields: Any) -> Any:
    config = llmlab.EngineConfig(model=str(model), num_blocks=64, enable_prefix_caching=False, **fields)
    return llmlab.run(config, llmlab.Workload.batch(12, prompt=(8, 40), output=(8, 24), seed=5))


def test_observations_are_the_steps_of_a_run(model: Path, profile: Profile) -> None:
    run = serve(model)
    found = profiling.observations(run.log_events)
    plans = [e for e in run.events("StepPlanned") if e.items]
    assert [o.rows for o in found] == [rows_of(plan.items) for plan in plans]
    assert [o.seconds for o in found] == [e.measured.execute for e in run.events("StepFinished")]
    assert found[0].engine is None  # the engine had nothing to do before
    ends = [e.t for e in run.events("StepFinished")]
    engine = [o.engine for o in found[1:] if o.engine is not None]
    assert len(engine) == len(found) - 1 and min(engine) > 0
    assert math.isclose(sum(engine) + sum(o.seconds for o in found[1:]), ends[-1] - ends[0], rel_tol=1e-6)
    assert profile.engine.at(8, 8, 8) == 0.0 and calibrated(profile, found).engine.at(8, 8, 8) > 0


def test_the_command_writes_a_profile_that_engines_take(model: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "tiny.json", []
    profile = profiling.profile_command(
        "cpu", str(model), out, lambda *now: said.append(now), llmlab.run, roofline_shape, num_threads=1, max_tokens=64
    )
    assert said[-1] == (profiling.num_points("cpu"), profiling.num_points("cpu"), "done")
    assert profile.machine.threads == 1 and profile.engine.at(8, 8, 8) > 0
    again = read(out)
    assert again.shape == profile.shape and again.tokens.seconds == pytest.approx(profile.tokens.seconds, rel=1e-4)
    run = serve(model, hardware=str(out), num_threads=1)
    predicted = run.steps[0].predicted.seconds
    assert predicted == ProfileCost(again).step(rows_of(run.events("StepPlanned")[0].items)).seconds
    sim = llmlab.run(
        llmlab.EngineConfig(model="tiny", executor="sim", hardware=str(out), num_blocks=64),
        llmlab.Workload.batch(4, prompt=(8, 40), output=(8, 24), seed=5),
    )
    assert sim.metrics.num_finished == 4
