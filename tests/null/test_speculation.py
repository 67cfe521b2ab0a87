"""Drafts from proposal to release: sources, lengths, verification, what the log says, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simlab import Watch, add_batch, expected_tokens, greedy, run_to_end, sim_engine, specs

from llmlab.config import EngineConfig
from llmlab.decoding.draft_book import DraftBook
from llmlab.decoding.draft_lengths import ByAcceptance, ByGoodput, Fixed
from llmlab.decoding.draft_lengths import expected_tokens as expected_per_round
from llmlab.decoding.drafts import NGram, Oracle, Suffix
from llmlab.decoding.speculative import accepted_path, depths, paths, within
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.metrics import acceptance_by_position
from llmlab.execution.cost import RooflineCost
from llmlab.execution.draft_price import CPU_ENGINE_SECONDS, CPU_REQUEST_SECONDS, ModelPrice, RoundPrices
from llmlab.execution.drafting import checked_proposal
from llmlab.replaying import replay_decisions
from llmlab.runs import Run
from llmlab.scheduling.composers import slimmed
from llmlab.seams import DraftContext, DraftLengths, DraftOutlook, EngineView, Limits, PoolView, Proposal, RequestView
from llmlab.speculating import Simulated
from llmlab.types import ConfigError, Cost, PolicyError, Request, SamplingParams, Span, Status, WorkItem

PROMPTS = [[7 * i + j for j in range(3 + 2 * i)] for i in range(5)]


def context(tokens: Sequence[int], k: int = 4, name: str = "r", prompt: int = 1) -> DraftContext:
    return DraftContext(Request(name, 0, tuple(tokens[:prompt]), SamplingParams()), list(tokens), (), k)


# ------------------------------------------------------------------------------------------ sources
@pytest.mark.parametrize(("tokens", "drafts"), [
    ([1, 2, 3, 4, 5, 1, 2, 3], (4, 5, 1, 2)),  # the longest match, and what followed it
    ([9, 2, 3, 7, 7, 1, 2, 3, 8, 8, 8, 9, 2, 3], (7, 7, 1, 2)),  # longer beats later
    ([2, 3, 7, 7, 2, 3, 8, 8, 5, 2, 3], (8, 8, 5, 2)),  # later beats earlier
    ([5, 6, 5, 6], (5, 6, 5, 6)),  # what ends the text repeats itself
    ([1, 2, 3, 4], ()), ([4], ()),
])  # fmt: skip
def test_ngrams(tokens: list[int], drafts: tuple[int, ...]) -> None:
    source = NGram()
    assert [p.token_ids for p in source.propose([context(tokens), context(tokens, k=0)])] == [drafts, ()]
    grown = NGram()  # token by token it says the same
    for end in range(1, len(tokens) + 1):
        (last,) = grown.propose([context(tokens[:end])])
    assert last.token_ids == drafts


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=4)


@given(texts=TEXTS)
def test_the_suffix_automaton_finds_the_longest_ending_that_goes_on_somewhere(texts: list[list[int]]) -> None:
    contexts = [context(text, name=f"r{i}", k=3) for i, text in enumerate(texts)]
    for text, proposal in zip(texts, Suffix(shortest=1).propose(contexts)):
        longest = next((n for n in range(len(text), 0, -1) if any(_goes_on(text[-n:], other) for other in texts)), 0)
        if longest == 0:
            assert proposal.token_ids == ()
            continue
        followers = {t for other in texts for t in _goes_on(text[-longest:], other)}
        assert proposal.token_ids[0] in followers
        whole = [*text[-longest:], *proposal.token_ids]
        assert any(_occurs(whole, other) for other in texts), "the drafts are the text of somebody"


def _goes_on(part: list[int], text: list[int]) -> list[int]:
    return [text[i + len(part)] for i in range(len(text) - len(part)) if text[i : i + len(part)] == part]


def _occurs(part: list[int], text: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text)))


def test_a_suffix_automaton_learns_from_requests_that_ended_and_forgets_when_it_is_full() -> None:
    source = Suffix(max_states=40)
    source.propose([context([4, 5, 6, 7, 8], name="ended")])
    (proposal,) = source.propose([context([1, 4, 5, 6], name="new", k=2)])
    assert proposal.token_ids == (7, 8)
    source.propose([context(list(range(100, 200)), name="long")])
    (proposal,) = source.propose([context([1, 4, 5, 6], name="new", k=2)])
    assert proposal.token_ids == ()


def test_an_oracle_is_right_as_often_as_it_says() -> None:
    source = Oracle(lambda request, position: 5, (0.9, 0.5), 100)
    drafts = [p.token_ids for i in range(2000) for p in source.propose([context([1], k=3, name=f"r{i}")])]
    for position, wanted in enumerate((0.9, 0.5, 0.5)):
        assert abs(sum(d[position] == 5 for d in drafts) / 2000 - wanted) < 0.04


# ------------------------------------------------------------------------------------- the life cycle
def served(prompts: Sequence[Sequence[int]] = PROMPTS, max_tokens: int = 9, **fields: Any) -> Engine:
    """Run to the end under a watch; everybody must have got the tokens of plain decoding."""
    engine = sim_engine(num_blocks=64, num_speculative_tokens=3, **fields)
    add_batch(engine, prompts, max_tokens, ignore_eos=True)
    done = run_to_end(engine, 400, Watch(engine))
    for name, spec in specs(engine).items():
        assert done[name].outputs[0].token_ids == expected_tokens(engine, spec), name
    return engine


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_perfect_drafts_make_every_step_worth_k_plus_one_tokens(overlap_depth: int) -> None:
    engine = served(PROMPTS[:1], speculation=Simulated((1.0,)), overlap_depth=overlap_depth)
    assert [len(e.token_ids) for e in engine.log.filter(ev.TokensReleased)] == [1, 4, 4]
    assert not engine.log.filter(ev.RolledBack)
    metrics = Run.of(engine.log).metrics
    assert (metrics.drafted_tokens, metrics.accepted_tokens, metrics.wasted_tokens) == (6, 6, 0)
    assert (metrics.acceptance_rate, metrics.tokens_per_verification, metrics.recomputed_tokens) == (1.0, 4.0, 0)


def test_wrong_drafts_cost_work_and_change_nothing() -> None:
    engine = served(PROMPTS[:1], speculation=Simulated((0.0,)))
    assert [len(e.token_ids) for e in engine.log.filter(ev.TokensReleased)] == [1] * 9
    verified, metrics = engine.log.filter(ev.Verified), Run.of(engine.log).metrics
    assert all(e.accepted == () and e.bonus is not None and len(e.rejected) in (1, 2, 3) for e in verified)
    assert metrics.wasted_tokens == sum(len(e.rejected) for e in verified) == sum(e.tokens_wasted for e in engine.log.filter(ev.RolledBack))
    assert metrics.wasted_joules > 0 and metrics.recomputed_tokens == 0


def test_what_was_drafted_is_what_is_verified_and_its_cause_is_the_step() -> None:
    engine = served(speculation=Simulated((0.7, 0.5)))
    drafted: dict[str, ev.Drafted] = {}
    for event in engine.log:
        if isinstance(event, ev.Drafted):
            drafted[event.request or ""] = event
        elif isinstance(event, ev.Verified):
            told = drafted.pop(event.request or "").token_ids
            count = len(event.accepted) + len(event.rejected)
            assert (*event.accepted, *event.rejected) == told[:count] and event.source == "simulated drafts"
            assert isinstance(next(e for e in engine.log if e.seq == event.cause), ev.StepPlanned)
    first, second = acceptance_by_position(engine.log)[:2]
    assert 0.4 < first < 0.95 and 0.2 < second < 0.9


def test_tokens_that_were_rejected_are_never_found_in_the_prefix_cache() -> None:
    """A client asks for the text with the rejected drafts in it; nothing of them may be cached."""
    engine = served([list(range(10))], max_tokens=10, speculation=Simulated((0.0,)), block_size=2)
    known = set(expected_tokens(engine, specs(engine)["q0"])) | set(range(10))
    cached = {e.hash for e in engine.log.filter(ev.BlockCached)}
    plain = sim_engine(num_blocks=64, block_size=2)
    add_batch(plain, [list(range(10))], 10, ignore_eos=True)
    run_to_end(plain, 100)
    assert known and cached == {e.hash for e in plain.log.filter(ev.BlockCached)}


def test_drafts_stay_within_the_tokens_that_are_left() -> None:
    engine = served(max_tokens=2, speculation=Simulated((1.0,)))
    assert max(len(i.drafts) for e in engine.log.filter(ev.StepPlanned) for i in e.items) == 0
    longest = served(max_tokens=3, speculation=Simulated((1.0,)))
    assert max(len(i.drafts) for e in longest.log.filter(ev.StepPlanned) for i in e.items) == 1


def test_nobody_is_preempted_for_a_guess() -> None:
    plain = sim_engine(num_blocks=10)
    drafting = sim_engine(num_blocks=10, speculation=Simulated((1.0,)), num_speculative_tokens=6)
    for engine in (plain, drafting):
        add_batch(engine, [[i] * 6 for i in range(5)], 7, ignore_eos=True)
        run_to_end(engine, 300, Watch(engine))
    assert len(drafting.log.filter(ev.RequestPreempted)) <= len(plain.log.filter(ev.RequestPreempted))


def test_a_recorded_run_replays_without_its_source_and_can_be_forked() -> None:
    engine = served(speculation=Simulated((0.8, 0.6)), draft_policy="ewma")
    run = Run.of(engine.log)
    assert run.verify() == []
    assert replay_decisions(run).differences == []
    forked = run.fork(at=2, draft_policy="fixed")
    assert forked.verify() == []
    assert {r.request: r.num_output_tokens for r in forked.requests.values()} == {r.request: 9 for r in run.requests.values()}
    assert any(isinstance(e, ev.Verified) for e in forked.log_events)


def test_why_tells_of_drafts() -> None:
    engine = served(speculation=Simulated((1.0,)))
    assert "Of 6 drafts (simulated drafts) 6 held: 4.0 tokens a verification." in str(Run.of(engine.log).why("q0"))


# ------------------------------------------------------------------------------------------- bad sources
class Broken:
    """A source that does one thing wrong."""

    name = "broken"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def propose(self, contexts: Sequence[DraftContext]) -> Any:
        wrong = {"outside": Proposal((100_000,)), "negative": Proposal((-1,)), "greedy": Proposal((1,) * 99),
                 "parents": Proposal((1, 2), (0, 0)), "short parents": Proposal((1, 2), (-1,)), "list": [1, 2]}  # fmt: skip
        if self.fault == "raises":
            raise RuntimeError("no drafts today")
        return [] if self.fault == "too few" else [wrong[self.fault] if c.k == 3 else Proposal() for c in contexts]


@pytest.mark.parametrize(("fault", "said"), [
    ("outside", "outside the vocabulary of 512"), ("negative", "outside the vocabulary"), ("greedy", "more than the 3"),
    ("parents", "one earlier draft"), ("short parents", "one earlier draft"), ("list", "is not a Proposal"),
    ("raises", "no drafts today"), ("too few", "one proposal for each"),
])  # fmt: skip
def test_a_source_that_fails_costs_its_drafts_and_nothing_else(fault: str, said: str) -> None:
    engine = served(speculation=Broken(fault))
    failed = engine.log.filter(ev.PolicyFailed)
    assert failed and all(said in e.error and (e.seam, e.policy, e.fallback) == ("drafts", "broken", "no drafts") for e in failed)
    assert not engine.log.filter(ev.Drafted)
    assert replay_decisions(Run.of(engine.log)).differences == []


@pytest.mark.parametrize(("fields", "said"), [
    ({"num_speculative_tokens": 0}, "num_speculative_tokens=0: must be an integer of at least 1"),
    ({"num_speculative_tokens": -3}, "at least 1"), ({"num_speculative_tokens": 2.5}, "at least 1"),
    ({"draft_policy": "fxed"}, "Did you mean 'fixed'"), ({"speculation": object()}, "has no method propose"),
    ({"speculation": NGram}, "has no method propose"), ({"speculation": "lab-xs"}, "the simulator runs no draft model"),
    ({"speculation": Simulated(())}, "must be probabilities"), ({"speculation": Simulated((1.5,))}, "must be probabilities"),
    ({"speculation": Simulated((0.5,), draft="no-such-shape")}, "unknown name"),
    ({"speculation": "ngram", "draft_policy": object()}, "has no method lengths"),
])  # fmt: skip
def test_mistakes_are_answered_before_anything_runs(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        sim_engine(**fields)


# ------------------------------------------------------------------------------------------ draft lengths
def view(acceptance: Sequence[float | None], free: int = 900) -> EngineView:
    running = tuple(RequestView(f"r{i}", i, 0.0, 0, Status.RUNNING, 10, 20, 19, 0, 2, 0, context([1]).request, acceptance=a)
                    for i, a in enumerate(acceptance))  # fmt: skip
    return EngineView(0.0, 0, (), 0, running, PoolView(1000, free, 0, 0, 0, 16), Limits(256, 4096, 4096), lambda o, i: Cost(0.0))


def items(count: int, at: int = 500) -> list[WorkItem]:
    return [WorkItem(f"r{i}", Span(at, at + 1)) for i in range(count)]


FREE = DraftOutlook(6, lambda items, k: 1.0, expected_per_round)


def test_expected_tokens_of_a_round() -> None:
    assert expected_per_round(0.0, 4) == 1.0 and expected_per_round(1.0, 4) == 5.0
    rng, k, a = random.Random(0), 4, 0.7
    drawn = [next((i for i in range(k) if rng.random() >= a), k) + 1 for _ in range(20_000)]
    assert abs(sum(drawn) / len(drawn) - expected_per_round(a, k)) < 0.03


def test_each_request_drafts_what_it_will_probably_accept() -> None:
    answer = ByAcceptance(least=0.3).lengths(view([0.0, 0.5, 0.9, None, 1.0]), items(5), FREE)
    assert answer.lengths == (1, 1, 6, 2, 6)
    assert ByAcceptance().lengths(view([0.9], free=0), items(1), FREE).lengths == (0,)
    assert Fixed().lengths(view([None]), items(1), FREE).lengths == (6,)


def test_goodput_stops_drafting_where_the_step_is_bound_by_arithmetic() -> None:
    """Eight billion parameters with a draft of one billion on an A10: drafting pays for one stream and not for 256."""
    cost, draft = (RooflineCost(_shape(name), "a10", 16, "fp16") for name in ("llama-3.1-8b", "llama-3.2-1b"))
    outlook = DraftBook(RoundPrices(cost, ModelPrice(draft)), 6).outlook()
    lengths = {n: ByGoodput().lengths(view([0.8] * n), items(n, at=40), outlook) for n in (1, 8, 256)}
    assert lengths[1].lengths[0] >= 3 and set(lengths[256].lengths) == {0}
    assert set(ByGoodput().lengths(view([0.8] * 256), items(256, at=2000), outlook).lengths) == {0}, "the draft model has to read it all first"
    known = DraftBook(RoundPrices(cost, ModelPrice(draft)), 6)
    known.planned(0, [msgspec.structs.replace(item, propose=1) for item in items(256, at=2000)], 0.0)
    assert set(ByGoodput().lengths(view([0.8] * 256), items(256, at=2000), known.outlook()).lengths) != {0}  # KV is read once for all
    assert len(lengths[1].options) == 7 and "times the tokens a second" in lengths[1].reason
    poor = ByGoodput().lengths(view([0.02]), items(1), msgspec.structs.replace(outlook, idle=1))
    assert poor.lengths == (0,)
    assert ByGoodput().lengths(view([0.99], free=0), items(1), outlook).lengths == (0,)


def priced(each: float, **told: Any) -> DraftOutlook:
    """Drafts that take `each` of a step, every one."""
    return DraftOutlook(6, lambda items, k: 1.0 + each * k, expected_per_round, **told)


def test_goodput_tries_drafts_that_nothing_is_known_of() -> None:
    """One request, and only where drafts could pay; again when it was long enough without."""
    cheap, dear = priced(0.05), priced(0.95)
    policy = ByGoodput()
    assert policy.lengths(view([None] * 3), items(3), cheap).lengths == (3, 0, 0)
    assert policy.lengths(view([None] * 3), items(3), dear).lengths == (0, 0, 0)
    assert policy.lengths(view([None, 0.9]), items(2), cheap).lengths == (6, 6), "the others' average serves for the new one"
    assert policy.lengths(view([None] * 2), items(2), priced(0.05, acceptance=0.9)).lengths == (6, 6), "and the source's own"
    assert policy.lengths(view([None]), items(1), priced(0.05, idle=0, streak=1)).lengths == (0,), "while a trial is verified"
    tried = [policy.lengths(view([0.0]), items(1), priced(0.05, idle=idle, patience=32)).lengths[0] for idle in range(1, 40)]
    assert tried == [0] * 31 + [3] * 8


def test_goodput_begins_with_more_to_gain_than_it_needs_to_go_on() -> None:
    barely = priced(0.55)  # 1.10 times plain decoding at best
    assert ByGoodput().lengths(view([0.7]), items(1), msgspec.structs.replace(barely, idle=1)).lengths == (0,)
    assert ByGoodput().lengths(view([0.7]), items(1), msgspec.structs.replace(barely, idle=0, streak=2)).lengths[0] > 0


def test_drafts_by_acceptance_end_where_they_do_not_pay() -> None:
    lengths = [ByAcceptance().lengths(view([0.6] * 16), items(16), priced(each, idle=1)).lengths[0] for each in (0.1, 2.0)]
    assert lengths == [2, 0]


def test_on_a_cpu_a_round_also_takes_the_engine_s_own_time() -> None:
    """Which a token that came as a draft does not need; on a GPU it hides behind the step."""
    for machine, own in (("cpu-2core", CPU_ENGINE_SECONDS + CPU_REQUEST_SECONDS), ("a10", 0.0)):
        cost = RooflineCost(_shape("lab-m"), machine, 16)
        step = cost.step([WorkItem("r0", Span(512, 513))]).seconds
        assert DraftBook(RoundPrices(cost), 6).seconds(items(1), 0) == pytest.approx(step + own, rel=1e-12)


def test_a_request_s_acceptance_counts_drafts_and_not_verifications() -> None:
    """Three that held weigh three times as much as one that did not."""
    found = []
    for held in ((1.0,), (0.0,)):
        engine = sim_engine(speculation=Simulated(held), num_speculative_tokens=3)
        engine.add_request([5] * 8, SamplingParams(max_tokens=16, temperature=0.0))
        seen = []
        while engine.has_unfinished_requests():
            engine.step()
            seen += [seq.acceptance for seq in engine.scheduler.running.values() if seq.acceptance is not None]
        found.append(seen[:2])
    assert found[0] == pytest.approx([3.6 / 4, 1 - 0.9**3 * 0.1]), "three held of three, with 0.6 of one more before them"
    assert found[1] == pytest.approx([0.6 / 2, 0.9 * 0.3])


def _shape(name: str) -> Any:
    from roofline import shapes

    return shapes.get(name)


def test_every_length_is_a_decision_with_its_alternatives() -> None:
    engine = served(speculation=Simulated((0.9,), draft="lab-xs"), draft_policy="goodput")
    decisions = [e for e in engine.log.filter(ev.Decision) if e.seam == "draft_policy"]
    assert decisions and all(e.alternatives and e.chosen.startswith("k=") for e in decisions)
    assert all(a.option.startswith("k=") and isinstance(a.score, float) for e in decisions for a in e.alternatives)
    fixed = served(speculation=Simulated((0.9,)))
    assert len([e for e in fixed.log.filter(ev.Decision) if e.seam == "draft_policy"]) == 1  # it never changes its mind


@pytest.mark.parametrize(("proposal", "problem"), [
    (Proposal(("a",)), "must hold integers"), (Proposal((1, 2), ("x", 0)), "must hold integers"), (Proposal((-1,)), "outside the vocabulary"),  # type: ignore[arg-type]
    (Proposal((1,) * 5), "more than the 4"), ([1, 2], "not a Proposal")])  # fmt: skip
def test_proposals_that_make_no_sense_are_named(proposal: Any, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem):
        checked_proposal(proposal, 4, 9)


class Silly:
    """A draft policy that answers nonsense."""

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        return DraftLengths((99,) * len(items))


def test_a_draft_policy_that_fails_is_replaced() -> None:
    engine = served(speculation=Simulated((0.9,)), draft_policy=Silly())
    failed = engine.log.filter(ev.PolicyFailed)
    assert failed and failed[0].fallback == "fixed" and "from 0 to num_speculative_tokens=3" in failed[0].error


# --------------------------------------------------------------------------------------- items and trees
CHAIN = WorkItem("r", Span(9, 13), drafts=(5, 6, 7), propose=2)
TREE = WorkItem("r", Span(9, 15), mask="tree", drafts=(5, 6, 7, 8, 9), parents=(-1, -1, 0, 0, 2))


def test_a_cut_takes_drafts_first() -> None:
    assert (CHAIN.num_committed, CHAIN.reach) == (1, 15)
    assert CHAIN.shortened(3).drafts == (5, 6) and CHAIN.shortened(3).emit == "sample" and CHAIN.shortened(3).propose == 2
    assert CHAIN.shortened(1) == WorkItem("r", Span(9, 10), propose=2)
    prompt = WorkItem("r", Span(0, 10), drafts=(1,), propose=3)
    assert prompt.shortened(4) == WorkItem("r", Span(0, 4), emit="none")
    assert TREE.shortened(4).parents == (-1, -1, 0) and TREE.shortened(1).mask == "causal"


def test_trees() -> None:
    assert depths(TREE) == [1, 1, 2, 2, 3] and paths(TREE.drafts, TREE.parents)[4] == (5, 7, 9)
    assert accepted_path(TREE, [5, 8, 1]) == [0, 3] and accepted_path(TREE, [6, 7]) == [1] and accepted_path(TREE, [1]) == []
    cut = within(TREE, 2)
    assert (cut.drafts, cut.parents, cut.tokens) == ((5, 6, 7, 8), (-1, -1, 0, 0), Span(9, 14))
    assert within(TREE, 0) == WorkItem("r", Span(9, 10)) and within(CHAIN, 1).drafts == (5,)


@given(drafts=st.lists(st.integers(0, 5), min_size=1, max_size=6), budget=st.integers(1, 30))
def test_under_a_tight_budget_everybody_keeps_the_own_token(drafts: list[int], budget: int) -> None:
    offers = [WorkItem(f"r{i}", Span(9, 10 + n), drafts=(1,) * n) for i, n in enumerate(drafts)]
    cut = list(slimmed(offers, budget))
    assert [o.num_committed for o in cut] == [1] * len(offers)
    if sum(o.num_tokens for o in offers) > budget >= len(offers):
        assert sum(o.num_tokens for o in cut) <= budget
        most = max(len(o.drafts) for o in cut)
        assert all(len(o.drafts) >= min(most, n) - 1 or len(o.drafts) == n for o, n in zip(cut, drafts))
    elif budget >= len(offers):
        assert cut == offers


def test_config_says_what_it_speculates_with() -> None:
    assert EngineConfig(speculation=Simulated((0.5,))).describe()["speculation"] == "simulated drafts"
    assert EngineConfig(speculation="ngram").describe()["speculation"] == "ngram"
    assert EngineConfig().describe()["speculation"] is None
    with pytest.raises(ConfigError):
        greedy(3) and sim_engine(speculation="ngramm")


# ------------------------------------------------------------------------------------------- the page
def test_the_method_of_the_page_runs_as_it_stands_there() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/decoding.md", "exec"), names)
    engine = served(speculation=Simulated((0.9, 0.9)), decoding=names["TwoAtATime"]())
    assert not engine.log.filter(ev.PolicyFailed)
    assert {len(i.drafts) for e in engine.log.filter(ev.StepPlanned) for i in e.items} == {0, 1, 2}
