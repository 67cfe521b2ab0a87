"""Profiles: tables, files, the cost model that reads them, calibration, and their way into an engine."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmlab
from llmlab.execution.cost import RooflineCost, find_profile, machine_here, rows_of, shipped_profiles, wall_cost
from llmlab.replaying import replay_decisions
from llmlab.types import ConfigError, Span, WorkItem
from roofline import CostModel, Efficiency, RooflineError, Rows, shapes
from roofline.ops import linear
from roofline.precision import Precision
from roofline.profile import (
    AttentionTable,
    Curve,
    Machine,
    Observation,
    Product,
    Profile,
    ProfileCost,
    Share,
    calibrated,
    read,
    same_sizes,
    write,
)

LAB_S = shapes.get("lab-s")
QUERIES, CONTEXTS = (1, 4, 16, 64, 256), (0, 16, 64, 256, 1024)
TRUTH = Efficiency(linear_compute=0.6, linear_memory=0.5, attention_compute=0.4, attention_memory=0.5, tile_side=0.0,
                   launch=3e-6)  # fmt: skip


def modelled(shape: shapes.Shape = LAB_S) -> Profile:
    """The profile of a machine that behaves exactly as a roofline with known efficiencies."""
    model = CostModel(shape, "cpu-2core", "fp32", efficiency=TRUTH)
    precision = Precision.parse("fp32")

    def tokens(n: int) -> float:
        return model.step(Rows([n], [n], logits=0)).seconds - row(n, n)

    def row(query: int, kv: int) -> float:
        return (
            shape.num_layers * model.op_cost(model._attention.op(query, kv, Rows([query], [kv]).total_pairs())).seconds
        )

    def product(depth: int, columns: int) -> Product:
        by_rows = {n: model.op_cost(linear("x", n, columns, depth, precision)).seconds for n in (1, 8, 64, 512)}
        return Product(depth, columns, curve(by_rows))

    def curve(points: dict[int, float]) -> Curve:
        return Curve(tuple(float(x) for x in points), tuple(float(f"{s:.5g}") for s in points.values()))

    table = AttentionTable(QUERIES, tuple(curve({q + c: row(q, q + c) for c in CONTEXTS}) for q in QUERIES))
    return Profile(
        machine=Machine("bench", "Some CPU", 2, 2, "cpu"), kernels="numba", dtype="fp32", date="2026-01-01T00:00Z",
        software={"torch": "2.13"}, memory_bytes=2.0**34, base="cpu-2core", shape=shape, block_size=16, launch=3e-6,
        prepare=Share(5e-05, 2e-06, 1e-07, 1e-08), tokens=curve({n: tokens(n) for n in (1, 4, 16, 64, 256, 512)}),
        attention=table, emit=curve({n: 1e-5 + 2e-6 * n for n in (1, 8, 64)}),
        products=(product(128, 512), product(1024, 4096), product(2048, 8192)),
        copies={name: curve({2**k: 1e-5 + 2**k / 1e10 for k in (14, 18, 22)}) for name in ("h2d", "d2h", "d2d")},
        engine=Share(1e-4, 5e-6),
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile() -> Profile:
    return modelled()


@pytest.fixture
def path(profile: Profile, tmp_path: Path) -> Path:
    return write(profile, tmp_path / "bench.json")


# ------------------------------------------------------------------------------------------ tables
@given(st.floats(1, 512), st.floats(0.2, 2.5))
def test_between_points_a_curve_is_a_power_law(x: float, exponent: float) -> None:
    xs = (1.0, 2.0, 16.0, 100.0, 512.0)
    assert Curve(xs, tuple(x**exponent for x in xs)).at(x) == pytest.approx(x**exponent)


def test_outside_its_points_a_curve_has_a_floor_and_a_rate() -> None:
    curve = Curve((2.0, 8.0), (3.0, 5.0))
    assert (curve.at(0), curve.at(1), curve.at(2), curve.at(8), curve.at(16)) == (0.0, 3.0, 3.0, 5.0, 10.0)


@pytest.mark.parametrize(("x", "seconds"), [
    ((), ()), ((1.0, 2.0), (1.0,)), ((2.0, 1.0), (1.0, 1.0)), ((1.0,), (0.0,)), ((1.0,), (float("nan"),)),
])  # fmt: skip
def test_a_curve_must_ascend_and_be_positive(x: tuple[float, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(RooflineError, match=r"x|seconds"):
        Curve(x, seconds)


def test_attention_meets_its_points_and_cuts_long_queries(profile: Profile) -> None:
    table = profile.attention
    for query, curve in zip(table.query, table.curves):
        for kv, seconds in zip(curve.x, curve.seconds):
            assert table.at(query, int(kv)) == pytest.approx(seconds)
    assert table.at(600, 700) == pytest.approx(table.at(256, 356) + table.at(256, 612) + table.at(88, 700))
    assert table.at(1, 100) < table.at(2, 100) < table.at(5, 100)


# ------------------------------------------------------------------------------------------- files
def test_a_profile_survives_its_file(profile: Profile, path: Path) -> None:
    assert read(path) == profile
    with_host = replace(profile, cpu_attention=profile.attention, notes="beside a GPU")
    assert read(write(with_host, path)) == with_host


def _set(data: Any, where: str, value: Any) -> None:
    *keys, last = [int(key) if key.isdigit() else key for key in where.split("/")]
    for key in keys:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(("where", "value", "said"), [
    ("schema", 1, "schema is 1"), ("date", 3, "date: must be a text"), ("memory_bytes", "much", "memory_bytes: must be float"),
    ("memory_bytes", -1, "memory_bytes must be"), ("block_size", 1.5, "block_size: must be int"),
    ("dtype", "fp17", "unknown dtype 'fp17'"), ("tokens/seconds/2", "x", r"tokens.seconds\[2\]: must be float"),
    ("tokens/x/1", 0.5, "tokens: x must ascend"), ("emit/seconds/0", 0, "emit: seconds must be"),
    ("attention/query/0", 2, "attention: query must begin with 1"), ("attention/curves/1/x", [], r"curves\[1\]: x and seconds"),
    ("attention/curves", {}, "attention: must be a list"), ("products", [], "at least 2 matrices"),
    ("products/0/depth", -4, r"products\[0\]: depth must be"), ("copies", {}, "copies lacks h2d, d2h, d2d"),
    ("prepare/row", -1, "prepare: row must be"), ("shape/num_heads", 3, "shape: lab-s: num_heads 3"),
    ("machine/color", "red", "machine: has unknown color"), ("colour", 1, "has unknown colour"),
    ("software", [1], "software: must be an object"), ("tokens", 5, "tokens: must be an object"),
])  # fmt: skip
def test_a_bad_file_is_refused_with_its_name_and_the_field(path: Path, where: str, value: Any, said: str) -> None:
    data = json.loads(path.read_text())
    _set(data, where, value)
    path.write_text(json.dumps(data))
    with pytest.raises(RooflineError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_missing_field_a_missing_file_and_no_json_are_named(path: Path, tmp_path: Path) -> None:
    data = json.loads(path.read_text())
    del data["attention"]["curves"]
    path.write_text(json.dumps(data))
    with pytest.raises(RooflineError, match="attention: lacks curves"):
        read(path)
    path.write_text("{")
    with pytest.raises(RooflineError, match="no JSON"):
        read(path)
    path.write_text("[]")
    with pytest.raises(RooflineError, match="schema is None"):
        read(path)
    with pytest.raises(RooflineError, match="No such file"):
        read(tmp_path / "none.json")


def test_shipped_profiles_can_be_read() -> None:
    for name in shipped_profiles():
        assert ProfileCost(find_profile(name)).step(Rows.decode(4, 128)).seconds > 0


# -------------------------------------------------------------------------------------- cost model
def test_a_step_is_the_sum_of_its_parts(profile: Profile) -> None:
    rows, cost = Rows([1, 1, 64], [80, 272, 64], logits=2), ProfileCost(profile)
    parts = cost.parts(rows)
    assert parts["prepare"] == pytest.approx(profile.prepare.at(3, 66, 416))
    assert parts["tokens"] == profile.tokens.at(66)
    assert parts["attention"] == pytest.approx(sum(profile.attention.at(q, kv) for q, kv in zip(rows.query, rows.kv)))
    assert parts["emit"] == profile.emit.at(2)
    step, base = cost.step(rows), CostModel(LAB_S, profile.hardware(), "fp32").step(rows)
    assert step.seconds == pytest.approx(sum(parts.values()))
    assert (step.flops, step.bytes_hbm) == (base.flops, base.bytes_hbm)
    assert cost.step(Rows([], [])).seconds == 0.0


def test_layer_spans_add_up_to_the_whole_model(profile: Profile) -> None:
    cost, layers = ProfileCost(profile), LAB_S.num_layers
    whole = cost.parts(Rows([64], [128]))
    halves = [cost.parts(Rows([64], [128], layers=[span])) for span in ((0, 2), (2, layers))]
    for part in ("tokens", "attention"):
        assert sum(half[part] for half in halves) == pytest.approx(whole[part])
    assert halves[0]["emit"] == 0.0 and halves[1]["emit"] == whole["emit"]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2000)), min_size=1, max_size=8))
def test_more_work_never_costs_less(rows: list[tuple[int, int]]) -> None:
    cost = ProfileCost(modelled_once())
    query, kv = [q for q, _ in rows], [q + c for q, c in rows]
    longer = cost.step(Rows([*query[:-1], query[-1] + 1], [*kv[:-1], kv[-1] + 1])).seconds
    assert cost.step(Rows(query, kv)).seconds < longer
    assert cost.step(Rows(query, kv)).seconds < cost.step(Rows([*query, 1], [*kv, 1])).seconds


_ONCE: list[Profile] = []


def modelled_once() -> Profile:
    if not _ONCE:
        _ONCE.append(modelled())
    return _ONCE[0]


def test_another_name_is_the_same_shape_and_another_shape_is_carried_over(profile: Profile) -> None:
    rows = Rows([1, 1, 32], [64, 256, 32])
    own = ProfileCost(profile).step(rows).seconds
    assert ProfileCost(profile, replace(LAB_S, name="mine")).step(rows).seconds == own
    deeper = ProfileCost(profile, replace(LAB_S, num_layers=12)).parts(rows)
    parts = ProfileCost(profile).parts(rows)
    assert deeper["tokens"] == pytest.approx(2 * parts["tokens"], rel=0.01)
    assert deeper["attention"] == pytest.approx(2 * parts["attention"])


@pytest.mark.parametrize("name", ["lab-m", "lab-l", "qwen3-30b-a3b"])
def test_carried_over_times_are_near_those_of_the_machine_they_were_made_from(profile: Profile, name: str) -> None:
    shape = shapes.get(name)
    truth = CostModel(
        shape, replace(CostModel(shape, "cpu-2core").hardware, cache_bandwidth=None), "fp32", efficiency=TRUTH
    )
    cost = ProfileCost(profile, shape)
    for tokens in (1, 16, 256):
        rows = Rows([tokens], [tokens], logits=0)
        parts = cost.parts(rows)
        assert 1 / 3 < (parts["tokens"] + parts["attention"]) / truth.step(rows).seconds < 3


def test_roofline_fit_finds_the_efficiencies_behind_a_profile(profile: Profile) -> None:
    assert len(profile.measurements()) == 3 * 4 + len(QUERIES) * len(CONTEXTS)
    found = profile.fitted()
    assert found.median_error < 0.1
    rate = CostModel(LAB_S, "cpu-2core").hardware.peak["fp32"] * TRUTH.linear_compute
    achieved = profile.hardware().peak["fp32"] * found.efficiency.linear_compute
    assert achieved == pytest.approx(rate, rel=0.1)


# ------------------------------------------------------------------------------------- calibration
def served(profile: Profile, factors: dict[str, float], seed: int, count: int = 400) -> list[Observation]:
    """Steps of a machine whose parts take `factors` of the profile's, with noise and a few interruptions."""
    rng, cost, found = np.random.default_rng(seed), ProfileCost(profile), []
    for i in range(count):
        rows = int(rng.integers(1, 24))
        query = [1] * rows if rng.random() < 0.7 else [*[1] * (rows - 1), int(rng.integers(16, 256))]
        batch = Rows(query, [q + int(c) for q, c in zip(query, rng.integers(0, 700, rows))], logits=rows)
        seconds = sum(factors.get(name, 1.0) * s for name, s in cost.parts(batch).items()) * rng.lognormal(0, 0.02)
        engine = (2e-4 + 1e-5 * rows) * rng.lognormal(0, 0.05)
        found.append(Observation(batch, seconds * (8.0 if i % 40 == 7 else 1.0), None if i % 5 == 0 else engine))
    return found


def test_calibration_finds_what_a_run_says(profile: Profile) -> None:
    truth = {"tokens": 1.3, "attention": 1.6, "prepare": 0.9}
    better = calibrated(profile, served(profile, truth, seed=1))
    fresh = [s for i, s in enumerate(served(profile, truth, seed=2)) if i % 40 != 7]
    before, after = (
        float(np.median([abs(ProfileCost(p).step(s.rows).seconds / s.seconds - 1) for s in fresh]))
        for p in (profile, better)
    )
    assert before > 0.15 and after < 0.03
    assert better.engine.step == pytest.approx(2e-4, rel=0.1) and better.engine.row == pytest.approx(1e-5, rel=0.15)
    assert same_sizes(better.shape, profile.shape) and better.machine == profile.machine


def test_calibration_tells_small_steps_from_large_ones_and_knows_who_begins(profile: Profile) -> None:
    """A machine that is three times as fast at one row, as fast as told at 256 tokens, and owes 2e-4 s to every beginning."""
    rng, cost, found = np.random.default_rng(0), ProfileCost(profile), []
    for i in range(600):
        rows = int(rng.integers(1, 24))
        begins = rng.random() < 0.3
        query = [*[1] * (rows - 1), int(rng.integers(16, 256)) if begins else 1]
        seen = [1 + int(c) for c in rng.integers(1, 700, rows - 1)] + [query[-1] if begins else 300]
        batch = Rows(query, seen, logits=rows)
        parts = cost.parts(batch)
        speed = np.interp(np.log(sum(query)), np.log([1, 256]), [1 / 3, 1.0])
        seconds = sum(parts.values()) - (1 - speed) * parts["tokens"] + 2e-4 * begins
        engine = 1e-4 + 1e-5 * rows + 3e-4 * begins
        late = i % 50 == 49  # it had slept, and woke 0.7 ms after the arrival
        found.append(Observation(batch, seconds, None if late else engine, engine + 7e-4 if late else None))
    better = calibrated(profile, found)
    wrong = [abs(ProfileCost(better).step(o.rows).seconds / o.seconds - 1) for o in found]
    assert np.median(wrong) < 0.02 and np.quantile(wrong, 0.9) < 0.06
    assert 0.8e-4 < better.prepare.begin < 2.2e-4  # a part of it the large steps' factor explains as well
    assert (better.engine.step, better.engine.row, better.engine.begin) == pytest.approx((1e-4, 1e-5, 3e-4), rel=0.02)
    assert better.wake == pytest.approx(7e-4, rel=0.02)


def test_an_engine_that_slept_notices_an_arrival_late(profile: Profile, path: Path, tmp_path: Path) -> None:
    sleepy = str(write(replace(profile, wake=0.25), tmp_path / "sleepy.json"))
    workload = llmlab.Workload((0.5, 0.5, 4.0), (20, 20, 20), (3, 3, 3))
    fields = {"model": "lab-s", "executor": "sim", "num_blocks": 64, "max_num_seqs": 1}
    awake, slept = (llmlab.run(llmlab.EngineConfig(**fields, hardware=name), workload) for name in (str(path), sleepy))
    later = [b.ttft - a.ttft for a, b in zip(awake.requests.values(), slept.requests.values())]
    assert later == pytest.approx([0.25, 0.25, 0.25])  # the second waits behind the first, which was late; the third on its own
    leaps = [llmlab.run(llmlab.EngineConfig(**fields, hardware=sleepy, log_level=level), workload) for level in (1, 2)]
    assert [m.e2e for m in leaps[0].requests.values()] == pytest.approx([m.e2e for m in leaps[1].requests.values()], abs=1e-9)
    assert slept.fork(at=3).metrics.e2e.mean == pytest.approx(slept.metrics.e2e.mean, abs=1e-9)


def test_calibration_needs_steps(profile: Profile) -> None:
    with pytest.raises(RooflineError, match="at least 20 steps, got 3"):
        calibrated(profile, served(profile, {}, 0, count=3))


# ------------------------------------------------------------------------------- into the engine
def items() -> list[WorkItem]:
    return [WorkItem("a", Span(0, 64), emit="none"), WorkItem("b", Span(99, 100)), WorkItem("c", Span(3, 4))]


def test_the_core_reads_a_profile_where_it_reads_hardware(profile: Profile, path: Path) -> None:
    cost = RooflineCost(LAB_S, str(path), 16, "fp32")
    rows = rows_of(items())
    assert (rows.query, rows.kv, rows.logits) == ([64, 1, 1], [64, 100, 4], 2)
    assert cost.step(items()).seconds == ProfileCost(profile).step(rows).seconds
    assert cost.block_bytes() == 16 * LAB_S.kv_bytes_per_token("fp32")
    assert cost.swap(5).seconds == profile.copies["d2h"].at(5 * cost.block_bytes())
    assert cost.engine_seconds(items()) == pytest.approx(1e-4 + 3 * 5e-6)
    assert wall_cost(cost, 0).step(items()).seconds == pytest.approx(
        cost.step(items()).seconds + cost.engine_seconds(items())
    )
    assert wall_cost(cost, 1) is cost
    computed = RooflineCost(LAB_S, "cpu-2core", 16)
    assert wall_cost(computed, 0) is computed and computed.engine_seconds(items()) == 0.0


def simulate(path: Path | str, **fields: Any) -> Any:
    config = {"model": "lab-s", "executor": "sim", "hardware": str(path), "num_blocks": 64, "max_num_seqs": 4, **fields}
    workload = llmlab.Workload.poisson(rate=200.0, n=12, prompt=(8, 60), output=(4, 20), seed=3)
    return llmlab.run(llmlab.EngineConfig(**config), workload)


def test_simulated_steps_take_what_the_profile_says(path: Path) -> None:
    run = simulate(path)
    cost = RooflineCost(LAB_S, str(path), 16, "fp32")
    assert len(run.steps) > 20 and run.started.hardware["name"] == str(path)
    plans = {e.seq: e for e in run.events("StepPlanned")}
    for done in run.events("StepFinished"):
        plan = plans[done.plan]
        expected = cost.step(plan.items).seconds
        assert plan.predicted.seconds == expected
        assert done.measured.execute == pytest.approx(expected + cost.engine_seconds(plan.items))
    assert replay_decisions(run).differences == []
    assert run.fork(at=5, ordering="ljf").metrics.num_finished == 12


def test_a_profile_brings_the_shape_that_it_was_measured_with(tmp_path: Path) -> None:
    odd = write(modelled(replace(LAB_S, name="my-model", num_layers=4)), tmp_path / "odd.json")
    run = simulate(odd, model="my-model")
    assert run.started.model["shape"]["num_layers"] == 4


def test_a_profile_of_another_machine_or_model_warns_with_both_names(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llmlab"):
        simulate(path, model="lab-m")
    machine, model = [record.getMessage() for record in caplog.records if record.name == "llmlab"][:2]
    assert "another machine" in machine and "Some CPU" in machine and machine_here(2).host in machine
    assert "another model" in model and "lab-s" in model and "lab-m" in model


def test_a_profile_of_this_machine_does_not_warn(
    profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write(replace(profile, machine=machine_here(2)), tmp_path / "own.json")
    with caplog.at_level(logging.WARNING, "llmlab"):
        simulate(own)
    assert caplog.records == []


def test_bad_profiles_are_answered_with_the_way_out(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hardware='nowhere.json'.*no such profile.*llmlab profile"):
        simulate("nowhere.json")
    with pytest.raises(ConfigError, match=r"dtype='bfloat16': the profile .* was measured in fp32"):
        simulate(path, dtype="bfloat16")
    with pytest.raises(ConfigError, match="model='my-model'"):
        simulate(path, model="my-model")
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": 2}')
    with pytest.raises(ConfigError, match=r"broken.json: lacks machine"):
        simulate(broken)
