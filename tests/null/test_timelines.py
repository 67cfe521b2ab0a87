"""Timelines: one thing at a time on each resource, everything in its order, and overlap only where it is earned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.execution.cost import RooflineCost
from llmlab.execution.opgraph import Graph, Pending, build
from llmlab.execution.timelines import RESOURCES, Op, Timelines, busy, makespan
from llmlab.replaying import recorded_config, recorded_cost, replay_decisions
from llmlab.seams import EngineView, Need, RequestView
from llmlab.speculating import Simulated
from llmlab.types import Home, Move, ResourceSpan, Span, WorkItem
from roofline import shapes

LAYERS = shapes.get("llama-2-7b").num_layers


def cost(hardware: str = "a10", **more: Any) -> RooflineCost:
    return RooflineCost(shapes.get("llama-2-7b"), hardware, 16, **more)


@st.composite
def op_lists(draw: st.DrawFn) -> list[Op]:
    ops: list[Op] = []
    for i in range(draw(st.integers(1, 14))):
        after = tuple(draw(st.lists(st.integers(0, i - 1), max_size=3))) if i else ()
        ready = draw(st.sampled_from([0.0, 0.0, 2.5]))
        ops.append(Op(draw(st.sampled_from(RESOURCES[:4])), draw(st.floats(0, 4)), f"op {i}", after, ready=ready))
    return ops


def check_spans(ops: Sequence[Op], spans: Sequence[ResourceSpan]) -> None:
    assert [(s.resource, s.op) for s in spans] == [(op.resource, op.name) for op in ops]
    for op, span in zip(ops, spans):
        assert span.end == span.start + op.seconds and span.start >= op.ready
        assert all(spans[i].end <= span.start for i in op.after)
    for resource in RESOURCES:
        own = sorted((s.start, s.end) for s in spans if s.resource == resource)
        assert all(a[1] <= b[0] for a, b in pairwise(own)), own


@given(ops=op_lists())
@settings(max_examples=300)
def test_no_overlap_on_a_resource_and_a_makespan_between_its_bounds(ops: list[Op]) -> None:
    spans = Timelines().run(ops, 0.0)
    check_spans(ops, spans)
    end, latest = max(s.end for s in spans), max(op.ready for op in ops)
    work = busy(spans)
    assert max(work.values()) <= end * (1 + 1e-12) and end <= latest + sum(work.values()) * (1 + 1e-12)


@given(ops=op_lists())
@settings(max_examples=200)
def test_no_resource_is_idle_while_an_op_of_its_own_could_run(ops: list[Op]) -> None:
    spans = Timelines().run(ops, 0.0)
    for op, span in zip(ops, spans):
        could = max([op.ready, *(spans[i].end for i in op.after)])
        others = sorted((s.start, s.end) for s in spans if s.resource == span.resource and s.end <= span.start and s.end > could)
        waited = could
        for start, end in others:
            assert start <= waited
            waited = max(waited, end)
        assert span.start == (waited if others else could)


def test_an_op_that_waits_for_a_later_one_is_refused() -> None:
    with pytest.raises(ValueError, match="does not come before"):
        Timelines().run([Op("device", 1.0, "a", (1,)), Op("device", 1.0, "b")], 0.0)


# ------------------------------------------------------------------------------------------ graphs
def decode(name: str, context: int, **more: Any) -> WorkItem:
    return WorkItem(name, Span(context, context + 1), **more)


def graph(items: Sequence[WorkItem], moves: Sequence[Move] = (), writes: Any = None, **more: Any) -> Graph:
    return build(items, moves, writes or {}, cost(**more).layers(), Pending(), 0.0)


@st.composite
def batches(draw: st.DrawFn, devices: Sequence[str] = ("device", "cpu")) -> list[WorkItem]:
    items = []
    for i in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, 900))
        layers = draw(st.sampled_from([None, None, Span(0, LAYERS), Span(0, 3), Span(3, 9), Span(9, LAYERS)]))
        items.append(WorkItem(f"r{i}", Span(start, start + draw(st.sampled_from([1, 1, 1, 40]))), layers=layers,
                              device=draw(st.sampled_from(devices)), lane=draw(st.integers(0, 1))))  # type: ignore[arg-type]  # fmt: skip
    return items


@given(items=batches(("device",)))
@settings(max_examples=80)
def test_a_lane_on_the_device_alone_costs_what_the_cost_model_says(items: list[WorkItem]) -> None:
    items = [WorkItem(i.request, i.tokens, i.layers, emit="sample" if i.layers is None else "none") for i in items]
    assert makespan(graph(items).ops) == pytest.approx(cost().step(items).seconds, rel=1e-12)


@given(items=batches())
@settings(max_examples=80)
def test_what_is_sent_is_what_the_rows_on_the_host_have(items: list[WorkItem]) -> None:
    found, costs = graph(items), cost().layers()
    check_spans(found.ops, Timelines().run(found.ops, 0.0))
    crossings = sum(i.num_tokens * (i.layers or Span(0, LAYERS)).size for i in items if i.device == "cpu")
    for link, each in (("d2h", costs.sent_bytes(1)), ("h2d", costs.returned_bytes(1))):
        assert sum(op.num_bytes for op in found.ops if op.resource == link) == pytest.approx(crossings * each)


def test_rows_on_the_host_send_and_wait_and_lanes_hide_it() -> None:
    """Two lanes overlap: the device works on one while the other's rows are away; it never pays for nothing."""
    near, far = [decode(f"d{i}", 300) for i in range(40)], [decode(f"h{i}", 700, device="cpu") for i in range(4)]
    together = makespan(graph([*near, *far]).ops)
    apart = makespan(graph([*near, *[decode(f"h{i}", 700, device="cpu", lane=1) for i in range(4)]]).ops)
    one_by_one = makespan(graph(near).ops) + makespan(graph(far).ops)
    assert makespan(graph(near).ops) < apart < one_by_one
    assert makespan(graph(near).ops) < together < one_by_one
    predicted = cost().step([*near, *far])
    assert predicted.seconds == pytest.approx(together) and predicted.bytes.d2h > 0 and predicted.bytes.h2d > 0


def test_a_slower_host_takes_longer() -> None:
    rows = [decode("h", 40_000, device="cpu")]
    assert cost(host="cpu-2core").step(rows).seconds > 2 * cost(host="xeon-6342-2s").step(rows).seconds


def test_an_attention_that_leaves_a_step_early_is_joined_by_the_next() -> None:
    near = [decode(f"d{i}", 300) for i in range(8)]
    first = graph([*near, decode("h", 900_000, device="cpu", layers=Span(0, 1), emit="none")])
    spans = Timelines().run(first.ops, 0.0)
    back = spans[first.joins["h"]].end
    assert back > max(spans[i].end for i in first.ends)  # the step does not wait for it
    pending = Pending()
    pending.joins["h"] = back
    again = [*near, decode("h", 900_000, device="cpu", layers=Span(1, 2), emit="none")]
    second = build(again, (), {}, cost().layers(), pending, 0.0)
    joined = next(s for s in Timelines().run(second.ops, 0.0) if s.op == "linear 1")
    assert joined.start >= back


def swap(kind: str, request: str, count: int, first: int = 0) -> Move:
    return Move(kind, request, tuple(range(first, first + count)), tuple(range(first, first + count)))  # type: ignore[arg-type]


def test_copies_overlap_with_what_does_not_need_their_blocks() -> None:
    items, costs = [decode(f"d{i}", 300) for i in range(8)], cost()
    alone, copy = costs.step(items).seconds, costs.swap(40).seconds
    moves = [swap("swap_out", "v", 40)]
    free = Timelines().run((out := graph(items, moves)).ops, 0.0)
    assert max(free[i].end for i in out.ends) == pytest.approx(alone)  # the step does not wait for the copy
    writing = Timelines().run((out := graph(items, moves, {"d0": (7,)})).ops, 0.0)
    waiting = max(writing[i].end for i in out.ends)
    assert max(alone, copy) < waiting < alone + copy  # layer by layer: neither free nor one after the other
    coming = graph([*items, decode("v", 640)], [swap("swap_in", "v", 40)])
    assert max(alone, copy) < makespan(coming.ops) < costs.step([*items, decode("v", 640)]).seconds + copy
    assert sum(op.num_bytes for op in coming.ops if op.resource == "h2d") == pytest.approx(40 * costs.block_bytes())


def test_moves_that_share_blocks_keep_their_order() -> None:
    out, back = swap("swap_out", "v", 3), Move("swap_in", "v", (0, 1, 2), (5, 6, 7))
    found = graph([], [out, back])
    spans = Timelines().run(found.ops, 0.0)
    for i, j in zip(found.copied[0].ops, found.copied[1].ops):
        assert spans[i].end <= spans[j].start
    assert found.ends == tuple(range(len(found.ops)))  # a step of copies alone ends with them


# ------------------------------------------------------------------------------------------- runs
class OddOnesOnTheHost:
    """Every second request lives on the host; its rows attend there, in a lane of their own."""

    name = "odd_ones_on_the_host"

    def home(self, view: EngineView, request: RequestView, need: Need) -> Home:
        return "cpu" if request.id[-1] in "13579" else "device"

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> list[WorkItem]:
        return [msgspec.structs.replace(i, device="cpu", lane=1) if i.request[-1] in "13579" else i for i in items]


def load(n: int = 30) -> llmlab.Workload:
    return llmlab.Workload.poisson(rate=40.0, n=n, prompt=(20, 200), output=(5, 60), seed=3)


def config(**fields: Any) -> llmlab.EngineConfig:
    base: dict[str, Any] = {"model": "llama-2-7b", "executor": "sim", "hardware": "a10", "num_blocks": 60, "tiering": "swap"}
    return llmlab.EngineConfig(**{**base, **fields})


@pytest.mark.parametrize("overlap_depth", [0, 1, 2])
@pytest.mark.parametrize("placement", ["device_only", OddOnesOnTheHost()])
def test_a_run_with_copies_and_host_rows_forks_into_itself(overlap_depth: int, placement: Any) -> None:
    """What a step leaves running (copies) is part of the state, and a fork finds it again."""
    run = llmlab.run(config(overlap_depth=overlap_depth, placement=placement), load())
    assert run.metrics.num_finished == 30 and any(e.mode == "swap" for e in run.events("RequestPreempted"))
    for step in (run.steps[20].step, run.steps[len(run.steps) // 2].step):
        assert run.fork(step, recorded={"placement": placement}).log_events[1:] == run.log_events[1:]


@pytest.mark.parametrize("placement", ["device_only", OddOnesOnTheHost()])
def test_level_four_tells_what_every_resource_did(placement: Any) -> None:
    run = llmlab.run(config(placement=placement, log_level=4, host="1%"), load())
    spans = run.events("Span")
    for resource in RESOURCES:
        own = [(s.start, s.end) for s in spans if s.resource == resource]
        assert all(a[1] <= b[0] for a, b in pairwise(sorted(own)))
        gaps = sorted([(g.start, g.end) for g in run.events("Idle") if g.resource == resource]
                      + [(g.start, g.end) for g in run.events("JoinWait") if resource == "device"])  # fmt: skip
        if resource in ("device", "cpu") and own:
            assert sorted(own + gaps)[0][0] == 0.0  # spans and gaps tile the run
            assert all(a[1] == b[0] for a, b in pairwise(sorted(own + gaps)))
    assert bool(run.events("JoinWait")) == (placement != "device_only")
    assert any(s.op == "swap_out" and s.resource == "d2h" for s in spans)
    assert "nothing to do" in {g.why for g in run.events("Idle")}
    assert run.fork(run.steps[40].step, recorded={"placement": placement}).log_events[1:] == run.log_events[1:]
    assert replay_decisions(run, placement=placement).differences == []


def test_a_plan_is_predicted_by_the_timelines_that_place_it() -> None:
    """Swapped blocks, rows in lanes: a step that finds nothing left over takes what was predicted, to the digit; with
    copies of earlier steps in its way, longer. And copies beside the step's work cost less than one after the other."""
    run = llmlab.run(config(), load())
    cost = recorded_cost(run, recorded_config(run))
    plans = {e.step: e for e in run.events("StepPlanned")}
    swapping = [s for s in run.steps if plans[s.step].moves]
    assert swapping and all(s.measured >= s.predicted.seconds * (1 - 1e-9) for s in run.steps if s.predicted and s.measured)
    assert sum(s.measured == pytest.approx(s.predicted.seconds) for s in swapping) > len(swapping) / 2
    serial = [cost.step(p.items).seconds + sum(cost.swap(len(m.src)).seconds for m in p.moves)
              for p in plans.values() if p.moves and p.items]  # fmt: skip
    told = [p.predicted.seconds for p in plans.values() if p.moves and p.items]
    assert all(a <= b * (1 + 1e-9) for a, b in zip(told, serial)) and sum(told) < 0.97 * sum(serial)
    moved = [p for p in plans.values() if p.moves]
    assert all(p.predicted.bytes.h2d + p.predicted.bytes.d2h == cost.block_bytes() * sum(len(m.src) for m in p.moves) for p in moved)


@pytest.mark.parametrize("placement", [OddOnesOnTheHost(), "neo"])
def test_a_plan_with_host_rows_is_predicted_as_it_is_placed(placement: Any) -> None:
    run = llmlab.run(config(placement=placement, host="8%"), load())
    away = [s for s in run.steps if any(i.home == "cpu" for i in run.events("StepPlanned", step=s.step)[0].items)]
    assert away and sum(s.measured == pytest.approx(s.predicted.seconds) for s in away) > len(away) / 2
    assert replay_decisions(run, placement=placement).differences == []


def test_a_plan_with_a_draft_model_is_predicted_with_its_drafting() -> None:
    drafts = Simulated((0.8, 0.7), "llama-3.2-1b")
    run = llmlab.run(config(model="llama-3.1-8b", num_blocks=200, speculation=drafts), load(12))
    drafted = [s for s in run.steps if any(i.propose for i in run.events("StepPlanned", step=s.step)[0].items)]
    assert drafted and all(s.measured == pytest.approx(s.predicted.seconds) for s in drafted)
    alone = recorded_cost(run, recorded_config(run))
    plan = run.events("StepPlanned", step=drafted[5].step)[0]
    assert plan.predicted.seconds > alone.step(plan.items).seconds and plan.predicted.joules > alone.step(plan.items).joules


def test_a_host_that_is_no_cpu_or_unknown_is_refused() -> None:
    for host in ("a100", "xeon-1"):
        with pytest.raises(llmlab.LabError, match="host="):
            llmlab.run(config(host=host), load(1))
