"""Prices of draft sources, and what is learned beyond them: seconds, silence, acceptance; trees; replays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simlab import add_batch, run_to_end, sim_engine

from llmlab.decoding.draft_book import EVERY, FIRST_WAIT, LONGEST_WAIT, DraftBook
from llmlab.decoding.draft_lengths import ByGoodput, expected_tokens
from llmlab.decoding.draft_sizes import DraftSizes, HeadSizes, LayerSizes, LookupSizes, described, sizes_from
from llmlab.decoding.draft_trees import plan_of, tree_plan
from llmlab.decoding.speculative import Tried, tried
from llmlab.events import catalog as ev
from llmlab.execution.cost import RooflineCost
from llmlab.execution.draft_price import RoundPrices, draft_price, draft_seconds
from llmlab.forking import fork
from llmlab.replaying import replay_decisions
from llmlab.runs import Run
from llmlab.seams import DraftLengths, DraftOutlook, EngineView, Limits, PoolView, RequestView
from llmlab.speculating import Simulated
from llmlab.types import Cost, ItemResult, Request, SamplingParams, Span, Status, WorkItem
from roofline import shapes

XS, HEADS = shapes.get("lab-xs"), HeadSizes(128, 16)
TARGET = RooflineCost(shapes.get("lab-s"), "cpu-2core", 16, "fp32")
SIZES: list[DraftSizes] = [XS, HEADS, LayerSizes(3), LookupSizes(1e-6, 2e-6)]


def items(count: int, at: int = 40, propose: int = 0, drafts: int = 0) -> list[WorkItem]:
    return [WorkItem(f"r{i}", Span(at, at + 1 + drafts), drafts=(1,) * drafts, propose=propose) for i in range(count)]


def view(acceptance: Sequence[float | None]) -> EngineView:
    request = Request("r", 0, (1,), SamplingParams())
    running = tuple(RequestView(f"r{i}", i, 0.0, 0, Status.RUNNING, 10, 20, 19, 0, 2, 0, request, acceptance=a) for i, a in enumerate(acceptance))
    return EngineView(0.0, 0, (), 0, running, PoolView(1000, 900, 0, 0, 0, 16), Limits(256, 4096, 4096), lambda o, i: Cost(0.0))


def book(sizes: DraftSizes | None = None, longest: int = 4, branches: tuple[int, ...] = ()) -> DraftBook:
    return DraftBook(RoundPrices(TARGET, draft_price(TARGET, sizes, branches, 16), branches), longest)


# ------------------------------------------------------------------------------------------ prices
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: type(s).__name__)
def test_every_source_has_a_price_that_grows_with_its_work(sizes: DraftSizes) -> None:
    price = draft_price(TARGET, sizes, (), 16)
    few, many = (draft_seconds(price, items(n), 2) for n in (1, 16))
    assert 0 < few <= many and draft_seconds(price, items(4), 0) == 0.0
    rounds = [draft_seconds(price, items(4), k) for k in (1, 2, 3)]
    assert rounds[1] - rounds[0] == pytest.approx(rounds[2] - rounds[1], rel=0.05) and (rounds[1] > rounds[0]) != isinstance(sizes, LookupSizes)
    assert draft_seconds(price, items(2, propose=3)) == draft_seconds(price, items(2), 3), "by default what the items ask for"
    assert sizes_from(described(sizes)) == sizes, "as the log holds it"
    assert draft_price(TARGET, None, (), 16) is None


def test_only_a_model_of_its_own_reads_prompts() -> None:
    prompt = [WorkItem("r0", Span(0, 400), propose=2)]
    more = {type(s): draft_seconds(draft_price(TARGET, s, (), 16), prompt) / draft_seconds(draft_price(TARGET, s, (), 16), items(1, 399), 2) for s in SIZES}
    assert more[type(XS)] > 2 and more[HeadSizes] == more[LookupSizes] == 1.0 and more[LayerSizes] == pytest.approx(1.0)


@pytest.mark.parametrize("sizes", [XS, HEADS, LayerSizes(3)], ids=lambda s: type(s).__name__)
def test_goodput_minds_the_price_of_every_source(sizes: DraftSizes) -> None:
    """With drafts for nothing it would draft for sixteen requests; with their price it does not. On a GPU, where a model of the
    same sizes costs a fraction of a large target's step, it does."""
    known = [0.75] * 16
    free, dear = (book(s).outlook() for s in (None, sizes))
    lengths = [ByGoodput(margin=1.0).lengths(view(known), items(16), asked_of(o)).lengths[0] for o in (free, dear)]
    assert lengths[0] > 0 == lengths[1]


def asked_of(outlook: DraftOutlook) -> DraftOutlook:
    return msgspec.structs.replace(outlook, idle=1)


# ------------------------------------------------------------------------------------------ what is learned
def told(found: DraftBook, seconds: Any, steps: int, count: int, k: int, came: int | None = None, drafting: float = 0.0) -> None:
    """Steps of `count` requests that ask for `k` drafts and verify as many; `seconds(step)` from plan to plan."""
    came, now, names = k if came is None else came, 0.0, [f"r{i}" for i in range(count)]
    for step in range(steps):
        found.planned(step, items(count, propose=k, drafts=came), now)
        now += seconds(step)
        for name in names if came else ():
            found.verified(name, came, Tried(came, came))
        found.finished(step, [ItemResult(name, (1,), drafts=(1,) * came) for name in names], {"draft": drafting}, names)
    found.planned(steps, items(count), now)


def test_seconds_beyond_the_price_are_learned_and_carried_to_what_is_near() -> None:
    one = book(HEADS)
    plain, drafting = one.seconds(items(16), 0), one.seconds(items(16), 2)
    told(one, lambda step: plain + 5e-4, 8, 16, 0)
    assert one.seconds(items(16), 0) == pytest.approx(plain + 5e-4)
    assert one.seconds(items(16), 2) == pytest.approx(drafting + 5e-4), "drafts were never seen: they begin with what steps take"
    assert one.seconds(items(8), 0) > book(HEADS).seconds(items(8), 0), "so do other numbers of requests"
    passes = one.prices.drafting(16, 2, 64)
    told(one, lambda step: 3e-3, 30, 16, 2, drafting=passes + 4e-4)
    assert one.seconds(items(16), 2) == pytest.approx(3e-3, rel=1e-3) and one.seconds(items(16), 0) == pytest.approx(plain + 5e-4)
    assert one.seconds(items(16), 4) - one.seconds(items(16), 2) > 4e-4 * 0.9, "passes that take longer do so in longer rounds, too"


def test_a_step_that_was_held_up_does_not_change_the_mind() -> None:
    steady, held_up = book(), book()
    told(steady, lambda step: 1e-3, 40, 4, 0)
    told(held_up, lambda step: 1.0 if step in (0, 20, 24) else 1e-3, 40, 4, 0)
    assert steady.seconds(items(4), 0) == pytest.approx(1e-3)
    assert held_up.seconds(items(4), 0) == pytest.approx(1e-3), "nor does a first one that found the caches cold"


def test_goodput_stops_where_rounds_take_longer_than_their_price() -> None:
    """The same prices and acceptance; what the log told decides."""
    lengths = []
    for slow in (1.0, 3.0):
        one = book(longest=4)
        rounds = [one.seconds(items(4), k) for k in range(5)]
        told(one, lambda step, taken=rounds[0]: taken, 20, 4, 0)  # type: ignore[misc]
        for k in (2, 4):
            told(one, lambda step, taken=slow * rounds[k]: taken, 24, 4, k)  # type: ignore[misc]
        lengths.append(ByGoodput().lengths(view([0.8] * 4), items(4), one.outlook()).lengths[0])
    assert lengths[0] == 4 and lengths[1] == 0


def test_silence_counts_as_no_token_and_costs_no_verification() -> None:
    one = book(longest=4)
    assert one.tokens(0.8, 4) == pytest.approx(expected_tokens(0.8, 4))
    told(one, lambda step: 1e-3, 1500, 1, 4, came=0)
    assert one.tokens(0.8, 4) < 1.01 and one.seconds(items(1), 4) == pytest.approx(one.seconds(items(1), 0))
    brief = book(longest=4)
    told(brief, lambda step: 1e-3, 1500, 1, 4, came=1)
    assert brief.tokens(0.8, 4) == pytest.approx(1.8, abs=0.01), "one draft, whatever was asked for"
    unsure = book(longest=4)
    for _ in range(200):  # silent behind a draft that fails, never behind one that holds
        told(unsure, lambda step: 1e-3, 1, 1, 4, came=0)
        unsure.planned(1, items(1, propose=4), 0.0)
        unsure.finished(1, [ItemResult("r0", (1,), drafts=(1,) * 4)], {}, ["r0"])
        unsure.verified("r0", 4, Tried(4, 4))
    assert unsure._follows.value == 1.0 and 0.4 < unsure._first.value < 0.6


def test_a_source_that_must_read_first_has_to_make_up_for_it() -> None:
    """Eight requests of 400 tokens, which a draft model has never seen, are dearer to begin with than to go on with."""
    one, many = book(XS), [WorkItem(f"r{i}", Span(399, 400), propose=2) for i in range(8)]
    before = one.seconds(many, 2)
    one.planned(0, many, 0.0)
    assert before > 1.2 * one.seconds(many, 2), "it drafts now: what it has read is paid"
    assert book(HEADS).seconds(many, 2) < before, "heads read nothing"


def test_what_overlaps_or_was_idle_teaches_no_time() -> None:
    one, fresh = book(), book()
    one.planned(0, items(2), 0.0)
    one.planned(1, items(2), 0.0)
    one.finished(0, [], {}, ["r0", "r1"])
    one.planned(2, items(2), 9.0)
    one.finished(2, [], {}, [])  # nobody runs on: the engine waits for an arrival
    one.planned(3, items(2), 99.0)
    assert one.seconds(items(2), 0) == fresh.seconds(items(2), 0)


def test_trials_that_lead_to_nothing_become_rare() -> None:
    one, step, waits = book(), itertools.count(), []
    for _ in range(10):
        one.planned(next(step), items(1, propose=3), 0.0)
        one.planned(next(step), items(1), 0.0)
        waits.append(one.outlook().patience)
    assert waits[:3] == [2 * FIRST_WAIT, 4 * FIRST_WAIT, 8 * FIRST_WAIT] and waits[-1] == LONGEST_WAIT
    for _ in range(5):
        one.planned(next(step), items(1, propose=3), 0.0)
    assert one.outlook().streak == 5
    one.planned(next(step), items(1), 0.0)
    assert (one.outlook().patience, one.outlook().idle) == (FIRST_WAIT, 1), "drafting that went on for a while did pay"


# ------------------------------------------------------------------------------------------ trees
TREE = WorkItem("r", Span(9, 15), mask="tree", drafts=(5, 6, 7, 8, 9), parents=(-1, -1, 0, 0, 2))


@pytest.mark.parametrize(("path", "outcome"), [
    ((), Tried(1, 0, 1, 0)), ((0,), Tried(2, 1, 1, 0)), ((1,), Tried(1, 0, 1, 1)), ((0, 2), Tried(3, 2, 0, 0)),
    ((0, 3), Tried(2, 1, 1, 1)), ((0, 2, 4), Tried(3, 3, 0, 0)),
])  # fmt: skip
def test_of_a_tree_first_choices_and_others_are_told_apart(path: tuple[int, ...], outcome: Tried) -> None:
    assert tried(TREE, path) == outcome
    chain = WorkItem("r", Span(9, 13), drafts=(5, 6, 7))
    assert [tried(chain, tuple(range(n)))[:2] for n in range(4)] == [(1, 0), (2, 1), (3, 2), (3, 3)]


@given(st.sampled_from([(2, 2, 1), (3, 2), (2, 1, 1, 1), (1, 1), (4,)]), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**20))
def test_the_tokens_that_a_tree_yields_are_those_of_a_game_of_dice(branches: tuple[int, ...], first: float, other: float, seed: int) -> None:
    one = book(longest=len(tree_plan(branches)), branches=branches)
    one._sibling.value = other
    dice, plan, rounds, held = random.Random(seed), tree_plan(branches), 1500, 0
    for _ in range(rounds):
        at = -1
        while True:
            children = [i for i, parent in enumerate(plan) if parent == at]
            at = next((c for rank, c in enumerate(children) if dice.random() < (other if rank else first)), -2)
            if at < 0:
                break
            held += 1
    assert one.tokens(first, one.longest) == pytest.approx(1 + held / rounds, abs=0.2)


def test_goodput_cuts_trees_by_their_nodes() -> None:
    """All ten nodes for one request beside which nothing runs; a chain of first choices, or nothing, for many."""
    lengths = {}
    for count in (1, 16, 64):
        large = RooflineCost(shapes.get("llama-3.1-8b"), "a10", 16, "fp16")
        prices = RoundPrices(large, draft_price(large, shapes.get("llama-3.2-1b"), (2, 2, 1), 16), (2, 2, 1))
        one = DraftBook(prices, 10)
        one._sibling.value = 0.9
        answer = ByGoodput().lengths(view([0.5] * count), items(count), asked_of(one.outlook()))
        lengths[count] = answer.lengths[0]
    assert lengths[1] > len(plan_of((2, 2, 1), 3)) and lengths[64] < lengths[1]


# ------------------------------------------------------------------------------------------ in the engine
GOODPUT: dict[str, Any] = {"draft_policy": "goodput", "num_speculative_tokens": 6}


def served(**fields: Any) -> Run:
    engine = sim_engine(hardware="a10", model="llama-3.1-8b", num_blocks=4096, max_num_batched_tokens=4096, max_num_seqs=64, **fields)
    add_batch(engine, [[3 + i] * (4 + i) for i in range(24)], max_tokens=24)
    run_to_end(engine, 2000)
    return Run(engine.log)


def test_who_rests_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing takes time as well: it is done at some plans of those without drafts."""
    asked: list[int] = []
    monkeypatch.setattr(ByGoodput, "lengths", lambda self, view, items, outlook: asked.append(1) or DraftLengths((0,) * len(items)))
    run = served(speculation=Simulated((0.1,), "llama-3.2-1b"), **GOODPUT)
    assert 0 < len(asked) <= 2 + 1 + len(run.steps) // EVERY
    monkeypatch.setattr(ByGoodput, "rests", False)
    before, run = len(asked), served(speculation=Simulated((0.1,), "llama-3.2-1b"), **GOODPUT)
    assert len(asked) - before >= len(run.steps) - 1


@pytest.mark.parametrize("fields", [GOODPUT, {**GOODPUT, "draft_tree": "2x2x1"}, {**GOODPUT, "draft_policy": "ewma"}], ids=["chains", "trees", "ewma"])
def test_what_is_learned_is_learned_again_by_a_replay_and_a_fork(fields: dict[str, Any]) -> None:
    run = served(speculation=Simulated((0.8, 0.6), "llama-3.2-1b"), **fields)
    lengths = {e.chosen for e in run.events(ev.Decision) if e.seam == "draft_policy"}
    assert len(lengths) > 1 and replay_decisions(run).differences == []
    assert served(speculation=Simulated((0.8, 0.6), "llama-3.2-1b"), **fields).metrics.output_throughput == run.metrics.output_throughput
    at = len(run.steps) // 2
    forked = [e for e in fork(run, at, draft_policy=fields["draft_policy"]) if isinstance(e, ev.StepPlanned)]
    assert [e.items for e in forked] == [e.items for e in run.events(ev.StepPlanned)], "the same policy goes on with what it knew"


def test_a_replay_that_ignored_what_steps_took_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded times matter: with others the lengths are others."""
    slow = served(speculation=Simulated((0.8,), "llama-3.2-1b"), **GOODPUT)
    monkeypatch.setattr(DraftBook, "seconds", lambda self, items, k: 1.0 + 9.0 * k)
    assert replay_decisions(slow).differences != []
