"""Metrics are folds of events: checked by hand on a small history, and by their own arithmetic on rough ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simlab import expected_tokens, specs
from test_determinism import SCRIPTS, play
from test_stateful import configs

from llmlab.events import catalog as ev
from llmlab.events.metrics import Summary, fold, percentile
from llmlab.events.trace import Run
from llmlab.types import Cost, Durations, Request, SamplingParams, Span, WorkItem


def history() -> list[ev.Event]:
    """Two requests: `a` runs through; `b` waits, is preempted once and computed again."""
    made: list[Any] = [
        (ev.RunStarted, 0.0, None, {"mode": "simulated"}),
        (ev.RequestArrived, 1.0, "a", {"spec": Request("a", 0, (1, 2, 3, 4), SamplingParams(), 1.0)}),
        (ev.RequestArrived, 2.0, "b", {"spec": Request("b", 1, (5, 6), SamplingParams(), 2.0)}),
        (ev.RequestAdmitted, 2.5, "a", {"num_tokens": 4}),
        (ev.StepPlanned, 2.5, None, {"now": 2.5, "items": (WorkItem("a", Span(0, 4)),), "predicted": Cost(0.5)}),
        (ev.FirstToken, 3.5, "a", {}),
        (ev.TokensReleased, 3.5, "a", {"token_ids": (7,)}),
        (ev.StepFinished, 3.5, None, {"plan": 4, "measured": Durations(1.0), "num_tokens": 4, "used_blocks": 2}),
        (ev.RequestAdmitted, 4.0, "b", {"num_tokens": 2, "num_cached_tokens": 1}),
        (ev.StepPlanned, 4.0, None, {"now": 4.0, "items": (WorkItem("a", Span(4, 5)), WorkItem("b", Span(1, 2)))}),
        (ev.TokensReleased, 5.0, "a", {"token_ids": (8,)}),
        (ev.FirstToken, 5.0, "b", {}),
        (ev.TokensReleased, 5.0, "b", {"token_ids": (9,)}),
        (ev.StepFinished, 5.0, None, {"plan": 9, "measured": Durations(1.0, 0.25, 0.25), "num_tokens": 2, "used_blocks": 4}),
        (ev.RequestPreempted, 5.0, "b", {"mode": "recompute", "tokens_lost": 2}),
        (ev.RequestAdmitted, 6.0, "b", {"num_tokens": 3}),
        (ev.StepPlanned, 6.0, None, {"now": 6.0, "items": (WorkItem("a", Span(5, 6)), WorkItem("b", Span(0, 3)))}),
        (ev.TokensReleased, 8.0, "a", {"token_ids": (8,)}),
        (ev.RequestFinished, 8.0, "a", {"reason": "length", "num_output_tokens": 3}),
        (ev.TokensReleased, 8.0, "b", {"token_ids": (9,)}),
        (ev.RequestFinished, 8.0, "b", {"reason": "stop", "num_output_tokens": 2}),
        (ev.StepFinished, 8.0, None, {"plan": 16, "measured": Durations(1.5), "num_tokens": 4, "used_blocks": 3}),
        (ev.RequestRefused, 9.0, "c", {"reason": "empty"}),
    ]  # fmt: skip
    return [kind(seq=i, t=t, step=0, request=request, **fields) for i, (kind, t, request, fields) in enumerate(made)]


def test_requests_by_hand() -> None:
    a, b = fold(history()).requests.values()
    assert (a.queue_time, a.ttft, a.tpot, a.e2e, a.itl) == (1.5, 2.5, (8.0 - 3.5) / 2, 7.0, [1.5, 3.0])
    assert (b.queue_time, b.ttft, b.tpot, b.e2e, b.itl) == (2.0, 3.0, 3.0, 6.0, [3.0])
    assert (a.num_preemptions, a.num_recomputed_tokens, a.num_cached_tokens) == (0, 0, 0)
    assert (b.num_preemptions, b.num_recomputed_tokens, b.num_cached_tokens) == (1, 2, 1)
    assert (a.finish_reason, b.finish_reason) == ("length", "stop")


def test_the_run_by_hand() -> None:
    m = fold(history()).result()
    assert (m.mode, m.num_requests, m.num_finished, m.num_refused, m.num_steps) == ("simulated", 2, 2, 1, 3)
    assert (m.prompt_tokens, m.output_tokens, m.cached_tokens) == (6, 5, 1)
    assert (m.computed_tokens, m.recomputed_tokens, m.num_preemptions) == (10, 2, 1)
    assert m.duration == 7.0
    assert (m.request_throughput, m.output_throughput, m.total_token_throughput) == pytest.approx((2 / 7, 5 / 7, 11 / 7))
    assert (m.recompute_tax, m.prefix_hit_rate) == (0.2, 1 / 11)
    assert (m.mean_batch, m.max_kv_blocks) == (10 / 3, 4)
    assert m.schedule_share == 0.5 / 4.0
    assert (m.ttft.mean, m.ttft.p50, m.ttft.max) == (2.75, 2.5, 3.0)
    assert m.itl.n == 3 and m.predicted_over_measured.mean == 0.5
    names = [name for name, _ in m.rows()]
    assert len(names) == len(set(names)) and {"mean_ttft", "p99_e2e", "output_throughput"} <= set(names)


def test_what_has_not_happened_is_none_and_never_nan() -> None:
    events = history()
    for count in range(1, len(events)):
        m = fold(events[:count]).result()
        assert all(value == value for _, value in m.rows())
    none = fold([]).result()
    assert (none.num_requests, none.duration, none.ttft.p50, none.recompute_tax) == (0, 0.0, None, 0.0)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_percentiles_are_nearest_ranks(values: list[float]) -> None:
    data = sorted(values)
    for q in (1, 50, 90, 99, 100):
        value = percentile(data, q)
        assert sum(v <= value for v in data) >= len(data) * q / 100
        assert sum(v < value for v in data) < max(1, len(data) * q / 100)
    summary = Summary.of([*values, None])
    assert (summary.n, summary.max, summary.p50) == (len(values), data[-1], percentile(data, 50))


@given(script=SCRIPTS, fields=configs())
@settings(max_examples=50)
def test_the_sums_agree_on_rough_histories(script: list[Any], fields: dict[str, Any]) -> None:
    engine = play(script, **fields)
    run = Run.of(engine.log)
    m = run.metrics
    assert engine.metrics.result() == m
    assert m.output_tokens == sum(len(e.token_ids) for e in run.events("TokensReleased"))
    assert m.computed_tokens == sum(e.num_tokens for e in run.events("StepFinished"))
    assert m.recomputed_tokens <= m.computed_tokens and 0 <= m.recompute_tax <= 1 and 0 <= m.prefix_hit_rate < 1
    assert m.max_kv_blocks <= engine.scheduler.memory.pool.num_blocks
    assert m.num_preemptions == len(run.events("RequestPreempted"))
    for name, spec in specs(engine).items():
        r = run.requests[name]
        assert len(r.token_times) <= r.num_output_tokens <= len(expected_tokens(engine, spec))
        assert fields["speculation"] is not None or len(r.token_times) == r.num_output_tokens
        assert r.finished is not None and r.e2e is not None and r.e2e >= 0
        if r.first_token is not None:
            assert r.arrival <= (r.first_scheduled or 0) <= r.first_token <= (r.last_token or 0) <= r.finished
            assert r.token_times == sorted(r.token_times)
        if not r.num_preemptions and r.finish_reason != "abort":
            assert r.num_recomputed_tokens == 0
            made = spec.num_prompt_tokens + r.num_output_tokens - 1
            assert r.num_computed_tokens == made + (_wasted(run, name) if fields["speculation"] is None else 0)


def _wasted(run: Run, name: str) -> int:
    """Tokens that were in flight when the request ended."""
    stops = [i.tokens[1] for e in run.events("StepPlanned") for i in e.items if i.request == name]
    made = run.requests[name].num_prompt_tokens + run.requests[name].num_output_tokens - 1
    return max(0, max(stops) - made)


def test_an_unknown_kind_of_event_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="RequestPreempted"):
        Run(history()).events("RequestPremted")
