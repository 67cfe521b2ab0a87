"""Turning the knobs of an engine while it runs: memory stays sound, the log tells of it, replays and forks follow."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.events import catalog as ev
from llmlab.replaying import replay_decisions
from llmlab.speculating import Simulated
from llmlab.types import ConfigError

KNOBS = {
    "ordering": ["fcfs", "sjf_oracle", "ljf"], "composer": ["chunked", "prefill_first", "decode_first"],
    "tiering": ["recompute", "swap", "cheapest"], "victim": ["last_come", "most_blocks"], "eviction": ["lru", "deepest_first"],
    "max_num_batched_tokens": [8, 64, 512], "max_num_seqs": [1, 4, 16], "num_blocks": [10, 14, 20],
    "speculation": ["ngram", None, Simulated((0.8, 0.6), "lab-xs")], "draft_policy": ["fixed", "ewma", "goodput"],
    "num_speculative_tokens": [1, 3, 6],
}  # fmt: skip


def loaded(n: int = 14) -> llmlab.Engine:
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=20, max_num_batched_tokens=64,
                           log_level=3, check_interval=1)  # fmt: skip
    for i in range(n):
        ids = [1 + (i + j) % 5 for j in range(20 + 7 * (i % 9))]
        engine.add_request(ids, llmlab.SamplingParams(max_tokens=30), metadata={"output_len": 30 - i}, arrival=2e-4 * i)
    return engine


def to_the_end(engine: llmlab.Engine) -> llmlab.Run:
    while engine.has_unfinished_requests():
        engine.step()
    return llmlab.Run.of(engine.log)


turns = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(sorted(KNOBS)), st.integers(0, 2)), min_size=1, max_size=8)


@settings(max_examples=30)
@given(turns)
def test_knobs_may_be_turned_at_any_time(turned: list[tuple[int, str, int]]) -> None:
    engine = loaded()
    for steps, name, choice in turned:
        for _ in range(steps):
            engine.step()
        engine.reconfigure(**{name: KNOBS[name][choice % len(KNOBS[name])]})
        assert engine.scheduler.problems() == []
    run = to_the_end(engine)
    assert run.verify() == []
    assert all(r.finished is not None for r in run.requests.values())
    assert replay_decisions(run).differences == []


def test_a_smaller_pool_is_kept_to_as_soon_as_blocks_come_free() -> None:
    engine = loaded()
    for _ in range(12):
        engine.step()
    engine.reconfigure(num_blocks=10)
    run = to_the_end(engine)
    turned = next(e for e in run.log_events if isinstance(e, ev.Reconfigured))
    later = [e.used_blocks for e in run.events("StepFinished") if e.seq > turned.seq]
    earlier = [e.used_blocks for e in run.events("StepFinished") if e.seq < turned.seq]
    reached = next(i for i, used in enumerate(later) if used <= 10)
    assert max(earlier) > 10 and reached < len(later) // 2 and max(later[reached:]) <= 10
    assert run.metrics.num_preemptions > 0


def test_a_change_of_the_budget_holds_from_the_next_step_on() -> None:
    engine = loaded()
    engine.step()
    engine.reconfigure(max_num_batched_tokens=8)
    run = to_the_end(engine)
    assert run.steps[0].num_tokens > 8 and max(s.num_tokens for s in run.steps[1:]) <= 8


@pytest.mark.parametrize(
    "change", [{"model": "lab-xs"}, {"ordering": "nobody"}, {"num_blocks": 1}, {"num_blocks": 21}, {"max_num_seqs": 0},
               {"speculation": "lab-xs"}, {"speculation": "ngram", "draft_policy": "nobody"}, {"num_speculative_tokens": 0}]
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    engine = loaded()
    engine.step()
    before = engine.config, engine.scheduler.limits, engine.log.num_emitted
    with pytest.raises(ConfigError):
        engine.reconfigure(**change)
    assert (engine.config, engine.scheduler.limits, engine.log.num_emitted) == before
    assert to_the_end(engine).verify() == []


def test_a_fork_goes_on_with_the_settings_of_its_time() -> None:
    engine = loaded()
    for _ in range(5):
        engine.step()
    engine.reconfigure(ordering="ljf", max_num_batched_tokens=32)
    for _ in range(5):
        engine.step()
    engine.reconfigure(composer="prefill_first", victim="most_blocks")
    run = to_the_end(engine)
    fork = run.fork(at=7)
    assert {e.policy for e in fork.events("Decision") if e.seam == "ordering" and e.step > 8} <= {"ljf"}
    turned = [e.changes for e in fork.events("Reconfigured")]
    assert turned == [{"ordering": "ljf", "max_num_batched_tokens": 32}, {"composer": "prefill_first", "victim": "most_blocks"}]
    assert run.fork(at=7, victim="least_progress").events("Reconfigured")[-1].changes == {"composer": "prefill_first"}


def test_drafts_may_come_and_go() -> None:
    engine = loaded()
    for choice in ("ngram", None, Simulated((0.9,), "lab-xs"), None):
        for _ in range(6):
            engine.step()
        engine.reconfigure(speculation=choice)
    run = to_the_end(engine)
    turned = [e.seq for e in run.events("Reconfigured")]
    drafted = [e.seq for e in run.events("Drafted")]
    between = [sum(a < seq < b for seq in drafted) for a, b in zip([0, *turned], [*turned, 10**9])]
    assert between[0] == between[4] == 0 < between[3], "the sources draft while they are asked, and only then"
    assert between[2] == 0, "drafts go on behind their end"
    assert {e.source for e in run.events("Drafted") if e.seq > turned[2]} == {"simulated lab-xs"}
    assert run.verify() == [] and replay_decisions(run).differences == []


def test_a_fork_drafts_as_its_parent_did_by_then() -> None:
    engine = loaded()
    for _ in range(5):
        engine.step()
    engine.reconfigure(speculation=Simulated((0.9,), "lab-xs"))
    for _ in range(8):
        engine.step()
    engine.reconfigure(speculation=None)
    run = to_the_end(engine)
    for at in (2, 8, 14):
        fork = run.fork(at=at)
        assert fork.events("Drafted"), f"at {at}"
        assert [e.changes["speculation"] for e in fork.events("Reconfigured")] == ["simulated lab-xs", None]
        assert max(e.step for e in fork.events("Drafted")) <= 14
