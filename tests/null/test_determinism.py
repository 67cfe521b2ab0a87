"""One seed, one history: reruns, replays and neighbours change nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simlab import expected_tokens, run_to_end, sim_engine, specs
from test_stateful import configs

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.replaying import replay_decisions
from llmlab.runs import Run as ForkableRun
from llmlab.seams import EngineView, Offers, RequestView
from llmlab.types import LabError, SamplingParams, TraceError, WorkItem

SCRIPTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12), st.integers(1, 8), st.integers(1, 2), st.booleans()),
        st.tuples(st.just("abort"), st.integers(0, 11)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    min_size=3, max_size=25,
)  # fmt: skip


def play(script: list[tuple[Any, ...]], **fields: Any) -> Engine:
    """Carry out `script`, then run to the end."""
    engine = sim_engine(**fields)
    names: list[str] = []
    for name, *args in script:
        if name == "add" and args[0] < engine.limits.max_model_len:
            length, max_tokens, n, later = args
            prompt = [length % 2] * min(3, length) + [length] * (length - 3)
            arrival = engine.clock.now() + 0.0005 if later else None
            names.append(engine.add_request(prompt, SamplingParams(n=n, max_tokens=max_tokens), arrival=arrival))
        elif name == "abort" and names:
            engine.abort(names[args[0] % len(names)])
        elif name == "step":
            for _ in range(args[0]):
                engine.step()
    run_to_end(engine, 3000)
    return engine


def encoded(engine: Engine) -> bytes:
    return b"\n".join(msgspec.json.encode(event) for event in engine.log)


@given(script=SCRIPTS, fields=configs())
@settings(max_examples=60)
def test_a_rerun_leaves_the_same_log_byte_for_byte(script: list[Any], fields: dict[str, Any]) -> None:
    """Even the times: the simulated clock is part of the history."""
    assert encoded(play(script, **fields)) == encoded(play(script, **fields))


@given(script=SCRIPTS, fields=configs())
@settings(max_examples=60)
def test_a_replay_takes_the_same_decisions(script: list[Any], fields: dict[str, Any]) -> None:
    engine = play(script, **fields)
    replayed = replay_decisions(Run.of(engine.log))
    assert replayed.differences == [] and replayed.num_events == len(engine.log)


@given(script=SCRIPTS, fields=configs())
@settings(max_examples=25)
def test_a_replay_from_a_file_agrees_and_so_does_every_hash(
    script: list[Any], fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "replayed.jsonl.zst"
    engine = play(script, **fields, trace=str(path))
    engine.close()
    run = Run.load(path)
    assert run.verify() == []
    assert replay_decisions(run).differences == []


@given(script=SCRIPTS, fields=configs(), other=st.tuples(st.sampled_from(["composer", "victim", "ordering"]), st.integers(0, 3)))
@settings(max_examples=40)
def test_other_policies_change_the_schedule_and_never_the_tokens(
    script: list[Any], fields: dict[str, Any], other: tuple[str, int]
) -> None:
    from llmlab.plugins import REGISTRIES

    names = REGISTRIES[other[0]].names()
    engine = play(script, **{**fields, other[0]: names[other[1] % len(names)]})
    outputs: dict[str, list[int]] = {}
    for event in engine.log.filter(ev.TokensReleased):
        outputs.setdefault(event.request, []).extend(event.token_ids)
    for name, spec in specs(engine).items():
        tokens = outputs.get(name, [])
        assert tokens == expected_tokens(engine, spec)[: len(tokens)]


def crowd(**fields: Any) -> Engine:
    script = [("add", 1 + i % 9, 8, 1 + i % 2, i % 3 == 0) for i in range(10)]
    return play([*script, ("step", 5), ("abort", 3), ("step", 4)], **{"num_blocks": 8, "block_size": 2, **fields})


@pytest.mark.parametrize(("seam", "name"), [("victim", "most_blocks"), ("composer", "prefill_first"), ("ordering", "ljf")])
def test_a_replay_finds_the_first_decision_that_differs(seam: str, name: str) -> None:
    """The proof is worth something: another policy is found out, at its first other choice."""
    run = Run.of(crowd().log)
    assert run.metrics.num_preemptions > 0
    differences = replay_decisions(run, **{seam: name}).differences
    assert 0 < len(differences) <= 10
    first = differences[0]
    assert first.recorded != first.replayed and str(first.index) in str(first)


def test_a_tampered_log_fails_its_own_hashes() -> None:
    run = Run.of(crowd().log)
    assert run.verify() == []
    for kind in (ev.TokensReleased, ev.RequestAdmitted, ev.StepPlanned, ev.BlocksReserved, ev.RequestPreempted):
        at = next(i for i, e in enumerate(run.log_events) if isinstance(e, kind))
        events = [*run.log_events[:at], ev.FirstToken(seq=at, t=0.0), *run.log_events[at + 1 :]]
        assert Run(events).verify(), kind.__name__
    changed = [msgspec.structs.replace(e, token_ids=(1,)) if isinstance(e, ev.TokensReleased) else e for e in run.log_events]
    assert Run(changed).verify()


@pytest.mark.parametrize("log_level", [0, 1])
def test_replays_say_what_a_low_log_level_lacks(log_level: int) -> None:
    run = Run.of(crowd(log_level=log_level).log)
    with pytest.raises(TraceError, match="log_level=2"):
        run.verify()
    with pytest.raises(TraceError, match="log_level=2"):
        replay_decisions(run)


def test_time_travel_agrees_with_the_live_engine_at_every_step() -> None:
    engine = sim_engine(num_blocks=8, block_size=2, tiering="swap")
    for i in range(6):
        engine.add_request([i % 2] * 3 + [i], SamplingParams(max_tokens=9, ignore_eos=True))
    seen: dict[int, dict[str, Any]] = {}
    while engine.has_unfinished_requests():
        engine.step()
        live = engine.scheduler.sequences.values()
        seen[engine.log.step] = {s.id: (s.status, s.num_computed_tokens, list(s.token_ids[s.num_prompt_tokens :])) for s in live}
    run = Run.of(engine.log)
    for step, live in seen.items():
        state = run.at(step)
        assert {name: (r.status, r.num_computed_tokens, r.output_token_ids)
                for name, r in state.requests.items() if not r.finish_reason} == live  # fmt: skip
    with pytest.raises(TraceError, match="step"):
        run.at(10_000)


class _Aging:
    """An ordering that looks at the clock when a request enters the queue."""

    name = "aging"
    refresh = "arrival"

    def key(self, request: RequestView, now: float) -> float:
        return -(now * 1e6 % 7) - request.num_computed_tokens


class _Greedy:
    """A composer that asks what others would cost."""

    name = "greedy"

    def compose(self, view: EngineView, offers: Offers) -> list[WorkItem]:
        pool = sorted([*offers.running, *offers.waiting], key=lambda o: view.consider(o.request, [o]).seconds)
        return [pool[0].shortened(view.limits.max_num_batched_tokens)]


def test_plug_ins_replay_too() -> None:
    run = Run.of(crowd(ordering=_Aging(), composer=_Greedy()).log)
    assert replay_decisions(run, ordering=_Aging(), composer=_Greedy()).differences == []


# ------------------------------------------------------------------------------------------- forks
LATER = st.lists(st.tuples(st.just("add"), st.integers(1, 12), st.integers(1, 8), st.integers(1, 2), st.booleans()),
                 min_size=1, max_size=10)  # fmt: skip


@given(script=LATER, fields=configs(), where=st.floats(0, 1))
@settings(max_examples=60)
def test_a_fork_without_changes_repeats_the_rest_with_its_times(script: list[Any], fields: dict[str, Any], where: float) -> None:
    _fork_repeats(script, {**fields, "overlap_depth": 0}, where)


@given(script=LATER, fields=configs(), where=st.floats(0, 1), overlap_depth=st.integers(1, 2))
@settings(max_examples=60)
def test_so_does_a_fork_of_a_run_with_steps_in_flight(
    script: list[Any], fields: dict[str, Any], where: float, overlap_depth: int
) -> None:
    _fork_repeats(script, {**fields, "overlap_depth": overlap_depth}, where)


def _fork_repeats(script: list[Any], fields: dict[str, Any], where: float) -> None:
    run = ForkableRun.of(play(script, **fields).log)
    if run.steps:
        forked = run.fork(run.steps[int(where * (len(run.steps) - 1))].step)
        assert forked.log_events[1:] == run.log_events[1:]


def test_a_fork_keeps_the_past_and_changes_the_future() -> None:
    run = ForkableRun.of(crowd(overlap_depth=0).log)
    preemption = run.events("RequestPreempted")[0]
    forked = run.fork(preemption.step - 1, victim="most_blocks", admission="worst_case")
    past = [e for e in run.log_events if e.step < preemption.step and not isinstance(e, ev.RunStarted)]
    assert list(forked.log_events[1 : 1 + len(past)]) == past
    assert forked.mode == "simulated" and forked.verify() == []
    assert forked.log_events[1:] != run.log_events[1:]
    for name, request in run.requests.items():
        if request.finish_reason != "abort":
            assert forked.requests[name].num_output_tokens == request.num_output_tokens
    with pytest.raises(TraceError, match="at="):
        run.fork(10_000)
    with pytest.raises(LabError, match="victim"):
        run.fork(3, victm="most_blocks")
