"""Forks and comparisons: the same history up to a step, then what could have been."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.events import catalog as ev
from llmlab.replaying import replay_decisions
from llmlab.scheduling.preemption import LastCome, MostBlocks
from llmlab.seams import EngineView, RequestView
from llmlab.types import ConfigError, LabError, RequestError, SamplingParams, TraceError
from llmlab.workloads.workload import Workload

TIGHT: dict[str, Any] = {
    "model": "lab-xs", "executor": "sim", "hardware": "t4", "num_blocks": 30, "block_size": 4, "log_level": 3,
    "max_num_batched_tokens": 32, "max_num_seqs": 8, "admission": "optimistic",
}  # fmt: skip


class NewestFirst:
    """A policy that no registry knows."""

    name = "newest_first"
    refresh = "arrival"

    def key(self, request: RequestView, now: float) -> float:
        return -request.arrival


class Oldest:
    """A victim policy that no registry knows."""

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> float:
        return candidate.arrival


class Renamed(LastCome):
    """Decides as another does."""

    name = "renamed"


def parent(seed: int, **fields: Any) -> llmlab.Run:
    """A crowded run with everything that a history can hold: preemptions, prefix hits, `n > 1`, aborts before, while and
    after running, and a refusal."""
    dice = random.Random(seed)
    engine = llmlab.Engine(**{**TIGHT, **fields})
    load = Workload.poisson(3000.0, 24, prompt=(3, 30), output=(1, 30), shared_prefix=8, families=2, seed=seed)
    names = []
    for index, request in enumerate(load.requests(engine.model.vocab_size)):
        n = 3 if index % 8 == 5 else 1
        sampling = SamplingParams(max_tokens=request.sampling.max_tokens, ignore_eos=True, n=n)
        names.append(engine.add_request(list(request.prompt_token_ids), sampling, arrival=request.arrival))
    engine.abort(names[20])  # before it arrives
    turn, doomed = 0, {dice.randrange(5, 150): dice.choice(names) for _ in range(4)}
    while engine.has_unfinished_requests():
        engine.step()
        turn += 1
        if turn in doomed:
            engine.abort(doomed[turn])
        if turn == 60:
            with pytest.raises(RequestError):
                engine.add_request([1] * 500)
    return llmlab.Run(tuple(engine.log))


def history(run: llmlab.Run) -> list[ev.Event]:
    """All events but the first, which says that a fork is a fork."""
    return list(run.log_events[1:])


def last_step(run: llmlab.Run) -> int:
    return max(e.step for e in run.events("StepFinished"))


def upto(run: llmlab.Run, step: int) -> list[ev.Event]:
    """The events up to the end of `step`."""
    end = next(i for i, e in enumerate(run.log_events) if isinstance(e, ev.StepFinished) and e.step == step)
    return list(run.log_events[1 : end + 1])


@given(seed=st.integers(0, 2**20), overlap_depth=st.integers(0, 2), tiering=st.sampled_from(["recompute", "swap"]),
       caching=st.booleans(), where=st.floats(0, 1))  # fmt: skip
@settings(max_examples=25)
def test_a_fork_under_the_same_policies_equals_its_parent(seed: int, overlap_depth: int, tiering: str, caching: bool,
                                                          where: float) -> None:  # fmt: skip
    """Event for event: times, causes, tokens, block ids and state hashes."""
    run = parent(seed, overlap_depth=overlap_depth, tiering=tiering, enable_prefix_caching=caching)
    fork = run.fork(at=round(where * last_step(run)))
    assert history(fork) == history(run)
    assert fork.verify() == []


def test_the_parents_hold_what_they_promise() -> None:
    """Else the test above would prove little."""
    runs = [parent(seed, overlap_depth=seed % 3, tiering=("recompute", "swap")[seed % 2]) for seed in range(6)]
    for kind in ("RequestPreempted", "FinishRequested", "RequestRefused", "BlockEvicted", "RequestWaiting"):
        assert all(run.events(kind) for run in runs), kind
    assert any(run.events("RequestResumed") for run in runs) and any(run.events("BlockReplaced") for run in runs)
    assert all(run.metrics.prefix_hit_rate > 0.05 for run in runs)


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_every_step_can_be_forked(overlap_depth: int) -> None:
    run = parent(7, overlap_depth=overlap_depth)
    for step in range(0, last_step(run) + 1, 7):
        assert history(run.fork(at=step)) == history(run), step


@pytest.mark.parametrize("changes", [{"victim": "most_blocks"}, {"ordering": "sjf_oracle", "composer": "prefill_first"},
                                     {"tiering": "swap"}, {"admission": "worst_case"}, {"eviction": "lfu"},
                                     {"ordering": NewestFirst(), "victim": Oldest()}], ids=str)  # fmt: skip
@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_fork_keeps_the_past_and_changes_the_future(changes: dict[str, Any], overlap_depth: int) -> None:
    run = parent(3, overlap_depth=overlap_depth)
    at = 25
    fork = run.fork(at, **changes)
    past = upto(run, at)
    assert history(fork)[: len(past)] == past
    assert history(fork) != history(run)
    assert fork.verify() == [] and fork.mode == "simulated"
    assert fork.started.config["forked_at"] == at
    done = {e.request: e.num_output_tokens for e in run.events("RequestFinished") if e.reason == "length"}
    for event in fork.events("RequestFinished"):
        if event.request in done and event.reason == "length":
            assert event.num_output_tokens == done[event.request]
    assert {e.request for e in fork.events("RequestFinished")} == {e.request for e in run.events("RequestFinished")}
    assert len(fork.events("RequestRefused")) == 1


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_fork_under_a_measured_profile_takes_the_engines_time_too(overlap_depth: int) -> None:
    run = parent(3, model="lab-s", hardware="epyc-1-thread.lab-s.json", overlap_depth=overlap_depth)
    middle = run.steps[len(run.steps) // 2].step
    assert run.fork(middle).log_events[1:] == run.log_events[1:]


def test_a_fork_that_never_runs_dry_of_steps_in_flight() -> None:
    """The executor is busy until the step in flight at the fork is done: nothing may overtake it."""
    run = parent(4, overlap_depth=2)
    for at in (0, 1, 40):
        ends = [e.t for e in run.fork(at, victim="most_blocks").events("StepFinished")]
        assert ends == sorted(ends) and len(set(ends)) == len(ends)


def test_a_fork_gives_each_request_the_tokens_that_it_got() -> None:
    run = parent(5)
    fork = run.fork(10, ordering="sjf_oracle", composer="decode_first")

    def tokens(of: llmlab.Run) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for event in of.events("TokensReleased"):
            found[event.request] = found.get(event.request, ()) + event.token_ids
        return found

    aborted = {e.request for e in run.events("FinishRequested")}
    kept = {name: ids for name, ids in tokens(run).items() if name not in aborted}
    assert len(kept) > 20 and kept == {name: ids for name, ids in tokens(fork).items() if name not in aborted}


def test_an_abort_happens_again_at_its_time() -> None:
    run = parent(6)
    fork = run.fork(5, ordering=NewestFirst())
    for event in run.events("FinishRequested"):
        again = fork.events("FinishRequested", request=event.request)
        ended = fork.events("RequestFinished", request=event.request)[0]
        assert (again and again[0].t >= event.t) or ended.reason == "length"
    assert fork.events("FinishRequested")


def test_an_abort_falls_between_the_same_two_steps() -> None:
    """Overlapped, a turn may submit a step without any time passing: an abort after it must not come before it."""
    engine = llmlab.Engine(**TIGHT, overlap_depth=1)
    engine.add_request([1] * 9, SamplingParams(max_tokens=4, ignore_eos=True))
    late = engine.add_request([2] * 9, SamplingParams(max_tokens=4, ignore_eos=True), arrival=1.0)
    while late not in engine.scheduler.running:
        engine.step()
    engine.abort(late)
    while engine.has_unfinished_requests():
        engine.step()
    run = llmlab.Run(tuple(engine.log))
    (end,) = run.events("FinishRequested")
    assert end.t == 1.0 == run.events("StepPlanned", step=end.step)[0].t
    assert history(run.fork(2)) == history(run)


def test_stop_strings_end_a_fork_where_they_ended_its_parent() -> None:
    """A simulated engine reads no text, so the engine's output side is played by hand: the finish comes after the third
    token, wherever that token falls."""
    engine = llmlab.Engine(**TIGHT)
    names = [engine.add_request([i] * 9, SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(6)]
    while engine.has_unfinished_requests():
        engine.step()
        seq = engine.scheduler.sequences.get(names[4])
        if seq is not None and seq.num_output_tokens == 3:
            engine._end(names[4], "stop", "!")
    run = llmlab.Run(tuple(engine.log))
    assert history(run.fork(1)) == history(run)
    fork = run.fork(1, ordering=NewestFirst(), composer="prefill_first")
    ended = fork.events("RequestFinished", request=names[4])[0]
    assert (ended.reason, ended.num_output_tokens, ended.detail) == ("stop", 3, "!")


CHILD = """
import sys, llmlab
from test_forking import Oldest
run = llmlab.Run.load(sys.argv[1])
run.fork(30).save(sys.argv[2])
run.fork(30, victim=Oldest(), tiering="swap").save(sys.argv[3])
assert "torch" not in sys.modules
"""


def test_a_saved_run_is_forked_by_another_process(tmp_path: Path) -> None:
    run = parent(8, overlap_depth=1)
    files = [str(tmp_path / name) for name in ("run.jsonl.zst", "same.jsonl", "other.jsonl.gz")]
    run.save(files[0])
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]), "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", CHILD, *files], check=True, timeout=60, env=env)
    assert history(llmlab.Run.load(files[1])) == history(run)
    assert llmlab.Run.load(files[2]).log_events == run.fork(30, victim=Oldest(), tiering="swap").log_events


# ----------------------------------------------------------------------------- what cannot be forked
def test_a_run_under_a_policy_of_ones_own_needs_that_policy() -> None:
    run = parent(9, ordering=NewestFirst(), victim=Oldest())
    with pytest.raises(ConfigError, match="newest_first"):
        run.fork(20)
    with pytest.raises(ConfigError, match="Oldest"):
        run.fork(20, recorded={"ordering": NewestFirst()})
    mine = {"ordering": NewestFirst(), "victim": Oldest()}
    assert history(run.fork(20, recorded=mine)) == history(run)
    assert upto(run.fork(20, recorded=mine, ordering="fcfs", victim="last_come"), 20) == upto(run, 20)
    with pytest.raises(TraceError, match=r"cannot be reproduced .*renamed.*recorded="):
        parent(3).fork(60, recorded={"victim": Renamed()})  # the same choices, but not the policy that was recorded
    with pytest.raises(TraceError, match=r"cannot be reproduced .*recorded="):
        run.fork(60, recorded={"ordering": "fcfs", "victim": MostBlocks()})


@pytest.mark.parametrize(("seam", "near"), [("orderin", "ordering"), ("victims", "victim"), ("composr", "composer")])
def test_an_unknown_seam_is_answered_with_the_nearest(seam: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"{seam}.*Did you mean '{near}'"):
        parent(1).fork(3, **{seam: "fcfs"})


def test_a_decision_replay_under_other_policies_finds_where_they_part() -> None:
    """And does not stumble over results that belong to plans which it never made."""
    for seed in range(4):
        run = parent(seed, overlap_depth=seed % 2)
        assert replay_decisions(run).differences == []
        first = replay_decisions(run, ordering=NewestFirst(), victim="most_blocks").differences[0]
        assert first.recorded != first.replayed


def test_what_cannot_be_forked_says_why() -> None:
    run = parent(1, overlap_depth=1)
    with pytest.raises(TraceError, match=r"at=9999: has not finished"):
        run.fork(9999)
    with pytest.raises(TraceError, match="has not finished"):
        run.fork(-1)
    with pytest.raises(ConfigError, match="Did you mean 'most_blocks'"):
        run.fork(3, victim="most_block")
    with pytest.raises(ConfigError, match="is a class"):
        run.fork(3, victim=Oldest)
    cut = llmlab.Run([run.log_events[0], *upto(run, 40)])
    with pytest.raises(TraceError, match="was in flight and never finished"):
        cut.fork(40)
    with pytest.raises(TraceError, match="log_level=1: decisions were not recorded"):
        llmlab.run(llmlab.EngineConfig(**{**TIGHT, "log_level": 1}), Workload.batch(3)).fork(1)


# ------------------------------------------------------------------------------------ comparisons
def test_a_run_and_its_fork_are_paired_by_request() -> None:
    run = parent(3)
    fork = run.fork(25, ordering=NewestFirst())
    found = llmlab.compare(run, fork)
    assert [pair.request for pair in found.requests] == list(run.requests) and not found.only_a and not found.only_b
    for pair in found.requests:
        a, b = run.requests[pair.request], fork.requests[pair.request]
        assert (pair.ttft.a, pair.ttft.b, pair.e2e.a, pair.e2e.b) == (a.ttft, b.ttft, a.e2e, b.e2e)
        assert (pair.preemptions.a, pair.preemptions.b) == (a.num_preemptions, b.num_preemptions)
        assert (pair.tpot.a, pair.output_tokens.b) == (a.tpot, b.num_output_tokens)
        assert pair.ttft.delta is None or pair.ttft.delta == b.ttft - a.ttft  # type: ignore[operator]
    assert found.better("ttft") == sum(1 for p in found.requests if p.ttft.delta is not None and p.ttft.delta < 0) > 0


def test_the_first_different_choice_is_named() -> None:
    run = parent(3)
    fork = run.fork(25, victim=Oldest())
    kinds = ("Decision", "StepPlanned", "RequestPreempted", "RequestAdmitted")
    for a, b in zip(run.events(*kinds), fork.events(*kinds)):
        if getattr(a, "chosen", None) != getattr(b, "chosen", None) or getattr(a, "items", None) != getattr(
            b, "items", None
        ):
            break
    assert isinstance(a, ev.Decision) and a.seam == "victim" == b.seam and a.step > 25
    said = llmlab.compare(run, fork).parted
    assert f"step {a.step}" in said and a.chosen in said and b.chosen in said and "Oldest" in said
    assert said in str(llmlab.compare(run, fork))


def test_equal_runs_took_the_same_decisions() -> None:
    run = parent(2)
    found = llmlab.compare(run, run.fork(30))
    assert found.parted == "They took the same decisions." and found.mean_ratio("e2e") == 1.0 == found.throughput_ratio
    shorter = llmlab.Run(run.log_events[:900])
    assert llmlab.compare(run, shorter).parted == "One goes on where the other ends."


def test_runs_without_a_request_in_common_cannot_be_compared() -> None:
    config = llmlab.EngineConfig(**TIGHT)
    a, b = llmlab.run(config, Workload.batch(2)), llmlab.run(config, Workload.batch(2).closed_loop(1))
    with pytest.raises(LabError, match="no request in common"):
        llmlab.compare(a, b)
    longer = llmlab.run(config, Workload.batch(4))
    assert llmlab.compare(a, longer).only_b == ("r2", "r3")
