"""CPU and GPU in parallel, the experiment in its short form: the mechanism, the formulas by hand and the boundary."""

from __future__ import annotations

import itertools

import pytest

from llmlab.papers import Report, experiment, silent
from llmlab.papers.apex import Alone, Fleet, Forced, by_hand, cell, closed_loop, crossing, fleet_of, policy, steady
from llmlab.replaying import replay_decisions


@pytest.fixture(scope="module")
def report() -> Report:
    return experiment("apex").run(True, silent)


def test_the_short_form_holds(report: Report) -> None:
    assert [f.claim for f in report.findings if f.holds is False] == []
    assert all(f.kind == "simulated" for f in report.findings)
    for table in report.tables:
        assert table.rows and table.note and all(len(row) == len(table.columns) for row in table.rows)


def test_steady_states_agree_with_the_formulas() -> None:
    fleet = fleet_of(8, 864)
    hand = by_hand(fleet)
    assert steady(Alone(), fleet._replace(away=0)).rate == pytest.approx(hand.gpu_only, rel=0.1)
    assert steady(policy("apex"), fleet).rate == pytest.approx(hand.async_overlap, rel=0.1)
    wide = Fleet("llama-2-7b", "t4", 12.0, 64, 300, 250)  # rows enough that no lane is half empty
    assert steady(Forced(), wide).rate == pytest.approx(by_hand(wide).asym_pipeline, rel=0.1)


def test_the_boundary_lies_on_equation_six() -> None:
    found = crossing(64, 500)
    assert found.simulated == pytest.approx(found.equation, rel=0.1)


@pytest.mark.parametrize(("speed", "budget"), [(2, 864), (10, 1728), (40, 6912)])
def test_overlap_is_never_much_worse_than_the_best_of_the_others(speed: float, budget: int) -> None:
    found = cell(speed, budget)
    assert found.rates["apex"] >= 0.98 * found.best_other


def test_under_overlap_the_gpu_never_waits_and_the_cpu_rows_share_its_linears() -> None:
    fleet = fleet_of(8, 864)
    overlap, pipeline = steady(policy("apex"), fleet), steady(Forced(), fleet)
    device = sorted((s.start, s.end) for s in overlap.spans if s.resource == "device" and s.end > s.start)
    gaps = sum(max(0.0, b[0] - a[1]) for a, b in itertools.pairwise(device))
    assert gaps <= 0.02 * (device[-1][1] - device[0][0])
    linears = {name: sum(s.end - s.start for s in found.spans if s.op.startswith("linear")) for name, found in
               (("overlap", overlap), ("pipeline", pipeline))}  # fmt: skip
    assert linears["pipeline"] > 1.8 * linears["overlap"]  # the split pays for the weights twice


def test_whole_requests_through_the_whole_engine() -> None:
    """Few clients, so not the published gain: but more than the GPU alone, with every request answered."""
    small = {"num_requests": 24, "clients": 16}
    alone, overlap = (closed_loop(name, 10.0, **small) for name in ("gpu_only", "apex"))  # type: ignore[arg-type]
    assert overlap.run.metrics.num_finished == alone.run.metrics.num_finished == 24
    assert overlap.rate > 1.2 * alone.rate and overlap.tpot


@pytest.mark.parametrize("placement", ["neo", "apex"])
def test_runs_that_overlap_replay_and_fork_into_themselves(placement: str) -> None:
    run = closed_loop(placement, 8.0, num_requests=12, clients=8, output=(5, 9), log_level=2).run
    assert replay_decisions(run).differences == [] and run.verify() == []
    assert run.fork(at=run.steps[len(run.steps) // 2].step).log_events[1:] == run.log_events[1:]
