"""Leaps change nothing: the same events at level 2, the same metrics below it, the same state behind them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.metrics import Summary
from llmlab.plugins import REGISTRIES
from llmlab.running import Feed, serve
from llmlab.scheduling.composers import Chunked
from llmlab.seams import EngineView, Offers
from llmlab.types import SamplingParams, WorkItem

SEAMS = ("ordering", "admission", "composer", "victim", "eviction", "tiering")


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration, from roomy to cruel."""
    fields: dict[str, Any] = {seam: draw(st.sampled_from(REGISTRIES[seam].names())) for seam in SEAMS}
    return {
        **fields, "model": "lab-xs", "executor": "sim", "hardware": draw(st.sampled_from(["t4", "cpu-2core"])),
        "block_size": draw(st.sampled_from([1, 2, 4, 16])), "num_blocks": draw(st.sampled_from([10, 24, 90, 400])),
        "max_num_batched_tokens": draw(st.sampled_from([3, 8, 32, 256])), "max_num_seqs": draw(st.sampled_from([1, 3, 8, 64])),
        "enable_prefix_caching": draw(st.booleans()), "check_interval": 1, "seed": draw(st.integers(0, 3)),
    }  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """(gap, prompt, parameters, true length) of each."""
    found = []
    for i in range(draw(st.integers(1, 9))):
        prompt = [i % 3] * draw(st.integers(0, 12)) + [7 + i] * draw(st.integers(1, 20))
        params = SamplingParams(
            n=draw(st.sampled_from([1, 1, 1, 2])), max_tokens=draw(st.sampled_from([1, 2, 9, 40, 90])), temperature=0.0,
            ignore_eos=draw(st.booleans()), stop_token_ids=draw(st.sampled_from([(), (), tuple(range(60))])),
            min_tokens=draw(st.sampled_from([0, 0, 1])),
        )  # fmt: skip
        found.append((draw(st.sampled_from([0.0, 1e-4, 1e-3, 0.01])), prompt, params, draw(st.sampled_from([None, 1, 5, 30]))))
    return found


def played(scene: dict[str, Any], work: list[tuple[Any, ...]], level: int, leaping: bool) -> tuple[Engine, int]:
    """The engine after all was served, and the number of turns that it took."""
    engine, t, turns = Engine(llmlab.EngineConfig(**scene, log_level=level)), 0.0, 0
    for gap, prompt, params, length in work:
        t += gap
        if len(prompt) < engine.limits.max_model_len:
            engine.add_request(prompt, params, arrival=t, metadata={} if length is None else {"output_len": length})
    outputs: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.leap() if leaping else engine.step():
            if output.finished:
                outputs[output.request_id] = [token for one in output.outputs for token in one.token_ids]
        turns += 1
        assert turns < 5000
    return engine, turns


def near(a: Any, b: Any) -> bool:
    """Equal, floats to 1e-9."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(near, a, b))
    return bool(a == b)


def state(engine: Engine) -> Any:
    memory = engine.scheduler.memory
    return (engine.scheduler.problems(), engine.scheduler.next_step, sorted(memory.pool.by_hash.items()), memory.pool.num_free,
            list(memory.pool._idle), list(memory.pool._blank))  # fmt: skip


@given(scene=scenes(), work=requests())
@settings(max_examples=150, deadline=None)
def test_with_and_without_leaps_the_events_are_the_same(scene: dict[str, Any], work: list[tuple[Any, ...]]) -> None:
    (leapt, _), (stepped, _) = (played(scene, work, 2, leaping) for leaping in (True, False))
    for a, b in zip(leapt.log, stepped.log, strict=True):
        assert type(a) is type(b) and near(msgspec.to_builtins(a), msgspec.to_builtins(b)), (a, b)
    assert state(leapt) == state(stepped)


@given(scene=scenes(), work=requests(), level=st.integers(0, 1))
@settings(max_examples=150, deadline=None)
def test_below_level_two_the_metrics_are_the_same(scene: dict[str, Any], work: list[tuple[Any, ...]], level: int) -> None:
    (leapt, _), (stepped, _) = (played(scene, work, level, leaping) for leaping in (True, False))
    for (name, a), (_, b) in zip(leapt.metrics.result().rows(), stepped.metrics.result().rows(), strict=True):
        assert near(a, b), (name, a, b)
    for name, request in stepped.metrics.requests.items():
        assert near(msgspec.to_builtins(leapt.metrics.requests[name]), msgspec.to_builtins(request)), name
    kinds = (ev.RequestArrived, ev.RequestAdmitted, ev.RequestPreempted, ev.RequestWaiting, ev.FirstToken, ev.RequestFinished)
    told = [[(type(e), e.step, e.request) for e in engine.log.filter(*kinds)] for engine in (leapt, stepped)]
    assert told[0] == told[1]
    assert state(leapt) == state(stepped)


def long_ones() -> list[tuple[Any, ...]]:
    return [(0.0, [i] * 40, SamplingParams(max_tokens=100, ignore_eos=True), 100) for i in range(4)]


BASE: dict[str, Any] = {"model": "lab-xs", "executor": "sim", "hardware": "t4", "num_blocks": 200}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_leaps_are_long_when_nothing_changes(level: int) -> None:
    (engine, turns), (_, steps) = (played(BASE, long_ones(), level, leaping) for leaping in (True, False))
    assert turns < steps / 20 and engine.metrics.num_steps == (0 if level == 0 else 100)
    assert len(engine.log.filter("Leapt")) == (2 if level == 1 else 0)


class _Mine(Chunked):
    """Overrides the answer, and so has made no promise."""

    def compose(self, view: EngineView, offers: Offers) -> list[WorkItem]:
        return list(super().compose(view, offers))


class _Promising(_Mine):
    def compose(self, view: EngineView, offers: Offers) -> list[WorkItem]:
        return list(super().compose(view, offers))

    cuts = Chunked.cuts


@pytest.mark.parametrize(("composer", "leaps"), [(Chunked(), True), (_Mine(), False), (_Promising(), True)])
def test_policies_of_others_are_asked_in_every_step_unless_they_promise(composer: Any, leaps: bool) -> None:
    _, turns = played({**BASE, "composer": composer}, long_ones(), 1, True)
    assert (turns < 20) == leaps


@pytest.mark.parametrize("fields", [{"overlap_depth": 1}, {"log_level": 3}, {"log_level": 4}])
def test_what_cannot_be_foreseen_goes_step_by_step(fields: dict[str, Any]) -> None:
    level = fields.get("log_level", 1)
    scene = {**BASE, **{k: v for k, v in fields.items() if k != "log_level"}}
    assert played(scene, long_ones(), level, True)[1] >= 100


def test_whoever_watches_sees_every_token_when_it_comes() -> None:
    work = llmlab.Workload.batch(4, prompt=40, output=50)
    with Engine(llmlab.EngineConfig(**BASE)) as engine:
        seen: list[int] = []
        serve(engine, work, lambda output: seen.append(len(output.outputs[0].token_ids)))
    assert len(seen) == 200
    silent, watched = llmlab.run(llmlab.EngineConfig(**BASE), work), llmlab.run(llmlab.EngineConfig(**BASE), work, print)
    assert silent.log_events == watched.log_events and isinstance(silent.metrics.ttft, Summary)


# --------------------------------------------------------------------------------- long runs, flat memory
def test_a_fold_that_condenses_agrees_with_one_that_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmlab.assembly.KEPT_REQUESTS", 20)
    config = llmlab.EngineConfig(**{**BASE, "log_level": 2})
    with Engine(config) as engine:
        serve(engine, llmlab.Workload.poisson(rate=2000.0, n=130, seed=1))
        condensed, whole = engine.metrics.result(), llmlab.Run.of(engine.log).metrics
        assert len(engine.metrics.requests) < 40 and whole.num_requests > 120
    for (name, a), (_, b) in zip(condensed.rows(), whole.rows(), strict=True):
        assert a == b or a == pytest.approx(b, rel=6e-4), name


def test_a_run_longer_than_its_log_has_metrics_and_says_what_it_lacks(tmp_path: Any) -> None:
    load, file = llmlab.Workload.batch(60, prompt=8, output=8), tmp_path / "whole.jsonl.zst"
    short = llmlab.run(llmlab.EngineConfig(**BASE, log_level=2, log_capacity=300, trace=str(file)), load)
    whole = llmlab.Run.load(file)
    assert short.metrics == whole.metrics and len(short.requests) == 60 and not short.whole and whole.whole
    assert short.started == whole.started and short.event(short.log_events[-1].seq) is short.log_events[-1]
    for lacking in (lambda: short.at(3), short.verify, lambda: short.fork(3), lambda: short.save(tmp_path / "x.jsonl")):
        with pytest.raises(llmlab.LabError, match="fell out of the ring"):
            lacking()
    assert whole.at(3).step == 3


def test_memory_does_not_grow_with_the_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while a request more costs its arrival and its lengths, not its tokens, times or events."""
    import gc
    import tracemalloc

    monkeypatch.setattr("llmlab.assembly.KEPT_REQUESTS", 50)
    config = llmlab.EngineConfig(**BASE, log_level=1, log_capacity=2000, enable_prefix_caching=False)
    load = llmlab.Workload.poisson(rate=3000.0, n=1500, prompt=(4, 12), output=(30, 60), seed=0)
    sizes: dict[int, int] = {}
    with Engine(config) as engine:
        feed = Feed(engine, load.source(engine.model.vocab_size))
        done = 0
        tracemalloc.start()
        while feed.pour():
            for output in engine.leap():
                feed.take(output)
                done += output.finished
                if done in (700, 1400) and output.finished:
                    gc.collect()
                    sizes[done] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert engine.metrics.result().num_finished == 1500
    assert sizes[1400] - sizes[700] < 300 * 700, sizes  # a request's tokens and times alone would take 2 kB
