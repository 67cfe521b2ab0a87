"""Every decision carries what else was possible, who decided, and why; every request can be explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from simlab import greedy, run_to_end, sim_engine
from test_determinism import SCRIPTS, play
from test_stateful import configs

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.seams import Admit, BlockView, EngineView, Need, Offers, RequestView, TierOption
from llmlab.types import Cost, RequestError, SamplingParams, Status, TraceError, WorkItem


def decisions(engine: Engine, seam: str) -> list[ev.Decision]:
    return [d for d in engine.log.filter(ev.Decision) if d.seam == seam]


def crowd(**fields: Any) -> Engine:
    engine = sim_engine(**{"num_blocks": 8, "block_size": 2, "max_num_batched_tokens": 6, "tiering": "cheapest", **fields})
    for i in range(8):
        engine.add_request([i % 2] * 3 + [i] * (1 + i % 3), greedy(9, ignore_eos=True), priority=i % 3)
    run_to_end(engine, 800)
    return engine


def test_an_ordering_decision_names_who_was_passed_over_and_their_keys() -> None:
    engine = crowd(ordering="priority")
    found = decisions(engine, "ordering")
    assert found and {d.policy for d in found} == {"priority"}
    for d in found:
        assert d.chosen == d.request and d.num_candidates >= 2
        assert 1 <= len(d.alternatives) <= 4 and d.chosen not in [a.option for a in d.alternatives]
        assert d.reason.startswith("smallest key ")
        assert all(a.score is not None for a in d.alternatives)
    first = found[0]
    assert (first.chosen, first.num_candidates, len(first.alternatives)) == ("r0", 8, 4)


def test_an_admission_decision_says_what_was_needed_and_free() -> None:
    found = decisions(crowd(), "admission")
    assert {d.chosen for d in found} == {"admit", "wait"}
    for d in found:
        (other,) = d.alternatives
        assert {d.chosen, other.option} == {"admit", "wait"} and d.reason and other.why_not
        assert other.score is not None and d.num_candidates == 2
        assert other.feasible or d.chosen == "wait"


def test_a_composition_tells_what_was_left_out_or_cut_and_what_was_priced() -> None:
    engine = crowd(composer="prefill_first")
    found = decisions(engine, "composer")
    priced = [a for d in found for a in d.alternatives if a.option == "decodes alone"]
    assert priced and all(a.predicted is not None and a.score == a.predicted.seconds > 0 for a in priced)
    left = [a for d in found for a in d.alternatives if a.why_not]
    assert left and all("tokens" in a.option and a.why_not.startswith("got ") for a in left)
    plans = {p.step: p for p in engine.log.filter(ev.StepPlanned)}
    for d in found:
        chosen = dict(part.rsplit(":", 1) for part in d.chosen.split())
        assert {i.request for i in plans[d.step].items} <= set(chosen)


def test_a_step_without_a_choice_has_no_decision() -> None:
    engine = sim_engine()
    engine.add_request([1, 2, 3], greedy(5, ignore_eos=True))
    run_to_end(engine, 20)
    assert [d.seam for d in engine.log.filter(ev.Decision)] == ["admission"]


def test_a_victim_decision_ranks_the_candidates_and_prices_their_return() -> None:
    engine = crowd(victim="least_progress")
    found = decisions(engine, "victim")
    assert found
    for d in found:
        assert d.predicted is not None and d.predicted.seconds > 0
        assert len(d.alternatives) == min(4, d.num_candidates - 1)
        scores = [float(d.reason.rsplit(" ", 1)[1]), *(a.score for a in d.alternatives)]
        assert scores == sorted(scores)
        assert all(a.predicted is not None for a in d.alternatives)
        needy, cause = d.reason.split()[0], engine.log[d.cause]
        assert isinstance(cause, ev.ReserveFailed) and cause.request == needy
        assert cause.need > cause.free and cause.holders


def test_a_tiering_decision_prices_both_ways_and_says_why_one_is_closed() -> None:
    engine = crowd(num_host_blocks=3)
    found = decisions(engine, "tiering")
    assert {d.chosen for d in found} <= {"recompute", "swap"} and found
    for d in found:
        (other,) = d.alternatives
        assert {d.chosen, other.option} == {"recompute", "swap"}
        assert d.predicted is not None and other.predicted is not None
        if other.feasible:
            assert other.predicted.seconds >= d.predicted.seconds  # the cheapest was asked for
        else:
            assert "host blocks are free" in other.why_not
    assert any(not a.feasible for d in found for a in d.alternatives)


def test_an_eviction_at_level_3_names_the_blocks_that_stayed() -> None:
    found = decisions(crowd(log_level=3, eviction="deepest_first"), "eviction")
    assert found
    for d in found:
        assert d.chosen.startswith("block ") and 1 <= len(d.alternatives) <= 4
        assert d.chosen not in [a.option for a in d.alternatives]
        assert all(float(d.reason.rsplit(" ", 1)[1]) <= float(a.score or 0) for a in d.alternatives)
    assert not decisions(crowd(log_level=2), "eviction")


@pytest.mark.parametrize("num_alternatives", [0, 1, 3])
def test_the_number_of_alternatives_is_bounded(num_alternatives: int) -> None:
    engine = crowd(num_alternatives=num_alternatives)
    for seam in ("ordering", "victim", "eviction"):
        assert max((len(d.alternatives) for d in decisions(engine, seam)), default=0) == num_alternatives or seam == "victim"
    assert all(len(e.holders) <= num_alternatives for e in engine.log.filter(ev.ReserveFailed))


def test_what_a_policy_prices_belongs_to_its_own_decision() -> None:
    """Each seam may ask for the cost of other work; nobody else's decision shows it."""

    def ask(view: EngineView, seam: str) -> Cost:
        request = (view.running or view.waiting)[0].id
        return view.consider(f"asked by {seam}", [WorkItem(request, (0, 4))])  # type: ignore[arg-type]

    class Admission:
        def admit(self, view: EngineView, request: RequestView, need: Need) -> Admit:
            ask(view, "admission")
            return Admit()

    class Victim:
        def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> float:
            ask(view, "victim")
            return -candidate.number

    class Tiering:
        def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
            ask(view, "tiering")
            return "recompute"

    class Composer:
        def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
            ask(view, "composer")
            return [o.shortened(2) for o in (*offers.running, *offers.waiting)][:3]

    engine = crowd(admission=Admission(), victim=Victim(), tiering=Tiering(), composer=Composer())
    asked = {(d.seam, a.option) for d in engine.log.filter(ev.Decision) for a in d.alternatives if "asked" in a.option}
    assert asked == {(seam, f"asked by {seam}") for seam in ("admission", "victim", "tiering", "composer")}


def test_an_eviction_policy_sees_depth_hits_and_age() -> None:
    seen: list[BlockView] = []

    class Watching:
        def score(self, block: BlockView) -> float:
            seen.append(block)
            return block.last_used

    crowd(eviction=Watching())
    assert {b.depth for b in seen} > {0, 1} and max(b.num_hits for b in seen) > 0
    assert len({b.last_used for b in seen}) > 5


# ---------------------------------------------------------------------------- causes and explanations
@given(script=SCRIPTS, fields=configs())
@settings(max_examples=60)
def test_causes_point_back_to_what_is_in_the_log(script: list[Any], fields: dict[str, Any]) -> None:
    events = list(play(script, **fields).log)
    for event in events:
        assert -1 <= event.cause < event.seq
        if event.cause >= 0 and event.request is not None:
            cause = events[event.cause]
            assert cause.request in (None, event.request) or isinstance(event, (ev.Decision, ev.BlockEvicted)), (event, cause)


@given(script=SCRIPTS, fields=configs())
@settings(max_examples=60)
def test_every_request_is_explained_without_gaps(script: list[Any], fields: dict[str, Any]) -> None:
    run = Run.of(play(script, **fields).log)
    for name, request in run.requests.items():
        why = run.why(name)
        assert request.e2e is not None
        assert sum(why.parts.values()) == pytest.approx(request.e2e, abs=1e-12)
        for before, after in zip(why.stretches, why.stretches[1:]):
            assert before.end == after.start
        assert name in why.headline and all(isinstance(s, str) and s for s in why.sentences)
        assert len(why.chain) >= 1


def test_a_refused_request_is_explained_by_its_refusal() -> None:
    engine = sim_engine()
    with pytest.raises(RequestError):
        engine.add_request([], greedy(1), request_id="bad")
    run = Run.of(engine.log)
    assert "is empty" in str(run.why("bad"))
    with pytest.raises(TraceError, match="nobody"):
        run.why("nobody")


def test_waiting_reasons_name_what_is_missing() -> None:
    reasons: dict[str, list[str]] = {}
    engine = sim_engine(num_blocks=8, block_size=2, max_num_seqs=3, max_num_batched_tokens=6, overlap_depth=2)
    for i in range(6):
        engine.add_request([i] * 5, SamplingParams(n=1 + i % 2, max_tokens=6, ignore_eos=True))
    run_to_end(engine, 500)
    for event in engine.log.filter(ev.RequestWaiting):
        reasons.setdefault(event.reason, []).append(event.detail)
    assert {"seats", "memory", "sibling", "in_flight"} <= set(reasons) and all(all(d) for d in reasons.values())
    assert any("max_num_seqs" in d for d in reasons["seats"])
    assert any("r1#0" in d for d in reasons["sibling"])


def test_a_request_that_the_composer_left_out_says_so() -> None:
    engine = sim_engine(composer="decode_first", num_blocks=32)
    engine.add_request([1] * 4, greedy(6, ignore_eos=True))
    engine.step()
    engine.step()
    late = engine.add_request([2] * 4, greedy(2, ignore_eos=True))
    engine.step()
    assert engine.scheduler.sequences[late].status is Status.WAITING
    assert [e.reason for e in engine.log.filter(ev.RequestWaiting, request=late)] == ["composer"]
