"""What a placement wishes for prompts, from the wish to the Decision: seams C and B meet."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simlab import sim_engine

import llmlab
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.execution.cost import RooflineCost
from llmlab.papers.apex import Fleet, by_hand, loop_config, loop_load
from llmlab.replaying import replay_decisions
from llmlab.scheduling.composers import COMPOSERS
from llmlab.scheduling.placement import DeviceOnly
from llmlab.scheduling.placement_times import Crowd, Forecast, Times
from llmlab.scheduling.steady import promised
from llmlab.seams import EngineView, Limits, Offers, PoolView, Wish
from llmlab.types import Cost, SamplingParams, Span, WorkItem
from roofline import shapes


class Wishing(DeviceOnly):
    """Everything on the device, prompts in small pieces."""

    name = "wishing"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked = 0

    def wish(self, view: EngineView, offers: Offers) -> Wish | None:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer  # type: ignore[no-any-return]


def served(placement: Any, num_requests: int = 6, **fields: Any) -> Engine:
    engine = sim_engine(placement=placement, num_blocks=256, max_num_batched_tokens=64, max_num_seqs=8, **fields)
    for number in range(num_requests):
        engine.add_request({"prompt_token_ids": [1 + number] * 50}, SamplingParams(max_tokens=4))
    while engine.has_unfinished_requests():
        engine.step()
    return engine


def prompts_per_step(engine: Engine) -> list[int]:
    return [sum(item.num_tokens for item in plan.items if item.num_tokens > 1) for plan in engine.log.filter(ev.StepPlanned)]


def test_prompts_get_what_the_placement_wishes_and_the_decision_says_so() -> None:
    engine = served(Wishing(Wish(10, "because of the weather")))
    assert max(prompts_per_step(engine)) == 10
    assert engine.log.filter(ev.RequestFinished)[-1].reason == "length" and not engine.log.filter(ev.PolicyFailed)
    said = [d.reason for d in engine.log.filter(ev.Decision) if d.seam == "composer"]
    assert said and all(text.endswith("for prompts the placement wishes 10: because of the weather") for text in said)


@pytest.mark.parametrize("answer", [None, Wish(10_000)])
def test_without_a_wish_or_with_a_large_one_nothing_changes(answer: Wish | None) -> None:
    plain = [plan.items for plan in served("device_only").log.filter(ev.StepPlanned)]
    assert [plan.items for plan in served(Wishing(answer)).log.filter(ev.StepPlanned)] == plain


@pytest.mark.parametrize("name", ["prefill_first", "decode_first", "spread"])
def test_other_composers_keep_to_their_own_rules(name: str) -> None:
    plain = [plan.items for plan in served("device_only", composer=name).log.filter(ev.StepPlanned)]
    assert [plan.items for plan in served(Wishing(Wish(10)), composer=name).log.filter(ev.StepPlanned)] == plain


@pytest.mark.parametrize("answer", [Wish(0), Wish(-3), Wish(True), Wish(2.5), 12, "much", ValueError("no idea")])  # type: ignore[arg-type]
def test_a_wish_that_makes_no_sense_is_no_wish(answer: Any) -> None:
    engine = served(Wishing(answer))
    failed = engine.log.filter(ev.PolicyFailed)
    assert failed and all(event.seam == "placement" and event.fallback == "device_only" for event in failed)
    assert max(prompts_per_step(engine)) == 64 and len(engine.log.filter(ev.RequestFinished)) == 6


def test_who_wishes_is_asked_in_every_step_with_prompts() -> None:
    placement = Wishing(Wish(10))
    engine = served(placement)
    assert not promised(engine.scheduler.policies)
    assert placement.asked >= sum(1 for tokens in prompts_per_step(engine) if tokens)


@given(st.lists(st.integers(1, 40), max_size=6), st.lists(st.integers(2, 90), max_size=4), st.integers(1, 120))
def test_a_wish_bounds_prompts_and_never_decodes(decodes: list[int], prompts: list[int], wish: int) -> None:
    offers = [WorkItem(f"d{i}", Span(at, at + 1)) for i, at in enumerate(decodes)]
    offers += [WorkItem(f"p{i}", Span(0, length)) for i, length in enumerate(prompts)]
    view = EngineView(0.0, 0, (), 0, (), PoolView(99, 99, 0, 0, 0, 16), Limits(16, 64, 999), lambda name, items: Cost(0.0))
    items = COMPOSERS.resolve("chunked").compose(view, Offers(tuple(offers), (), Wish(wish)))
    assert sum(item.num_tokens == 1 for item in items if item.request[0] == "d") == len(decodes)
    got = sum(item.num_tokens for item in items if item.request[0] == "p")
    assert got == min(wish, 64 - len(decodes), sum(prompts))


# ---------------------------------------------------------------------------------------- forecasts
def times(speed: float) -> Times:
    return Times(RooflineCost(shapes.get("llama-2-7b"), "t4", 16, None, f"{speed}%").layers())


def test_a_forecast_without_prompts_is_the_formula() -> None:
    """A prompt of one token for answers of ten thousand: G, and G + C where the CPU has rows enough."""
    hand = by_hand(Fleet("llama-2-7b", "t4", 8.0, 8, 0, 395))
    forecast = Forecast(times(8.0), Crowd(8, 2000, 395, 1.0, 10_000.0))
    assert forecast.rate("gpu_only", 144) == pytest.approx(hand.gpu_only, rel=0.1)
    assert forecast.rate("async_overlap", 144) == pytest.approx(hand.async_overlap, rel=0.1)


def test_few_rows_want_the_pipeline_and_many_want_overlap_in_small_chunks() -> None:
    few, many = (Forecast(times(10.0), Crowd(2, away, 395, 373.0, 45.0)).courses(500) for away in (54, 400))
    best = [max(courses, key=lambda c: c.rate) for courses in (few, many)]
    assert [course.mode for course in best] == ["asym_pipeline", "async_overlap"]
    assert best[1].chunk < 250


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 500), st.integers(2, 3000), st.floats(1, 4000), st.floats(4, 2000), st.integers(1, 2048))
def test_forecasts_are_finite_and_chunks_fit(near: int, away: int, kv: int, prompt: float, output: float, most: int) -> None:
    for course in Forecast(times(8.0), Crowd(near, away, kv, prompt, output)).courses(most):
        assert 1 <= course.chunk <= most and 0 < course.rate < 1e6


# --------------------------------------------------------------------------------- the whole engine
def test_apex_cuts_prompts_short_under_pressure_and_replays() -> None:
    run = llmlab.run(loop_config("apex", 5.0, log_level=2), loop_load(60, 40, (200, 300), (20, 30)))
    wishes = [d.reason for d in run.events("Decision") if d.seam == "composer" and "the placement wishes" in d.reason]
    assert wishes and all("tokens/s in the long run" in text for text in wishes)
    kept = [d for d in run.events("Decision") if d.seam == "placement" and "; in the long run " in d.reason]
    assert kept and replay_decisions(run).differences == [] and run.verify() == []
