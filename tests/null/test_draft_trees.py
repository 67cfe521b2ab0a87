"""The forms of draft trees, what is left of them when they are cut, and where they are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simlab import sim_engine

from llmlab.config import EngineConfig, num_nodes, tree_shape
from llmlab.decoding.draft_trees import chain_plan, fed_by_level, is_chain, planted, tree_plan
from llmlab.decoding.drafts import DRAFT_SOURCES, DraftSetup
from llmlab.decoding.speculative import lineages, paths
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.execution.drafting import checked_proposal
from llmlab.seams import DraftContext, Proposal
from llmlab.speculating import Simulated, simulated_speculation
from llmlab.types import MAX_NODES, ConfigError, PolicyError, Request, SamplingParams

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple).filter(lambda s: num_nodes(s) <= MAX_NODES)


@given(shape=shapes, k=st.integers(0, MAX_NODES))
def test_a_cut_tree_is_a_tree_around_its_chain(shape: tuple[int, ...], k: int) -> None:
    plan = tree_plan(shape)
    assert len(plan) == num_nodes(shape) and all(-1 <= parent < node for node, parent in enumerate(plan))
    assert is_chain(plan[: min(k, len(shape))])
    depths = {-1: 0}
    for node, parent in enumerate(plan):
        depths[node] = depths[parent] + 1
    for depth, width in enumerate(shape):
        inner = [node for node in depths if depths[node] == depth]
        assert all(plan.count(node) == width for node in inner)


def test_a_draft_model_passes_once_a_level() -> None:
    assert fed_by_level(tree_plan((2, 2, 1))) == (1, 2, 4) and fed_by_level(chain_plan(3)) == (1, 1, 1) and fed_by_level(()) == ()
    assert fed_by_level(tree_plan((2, 2, 1))[:4]) == (1, 1, 1)  # the chain of three, and one beside its first


def test_a_tree_in_the_simulator_holds_as_often_as_was_said_and_is_paid_by_the_level() -> None:
    def served(**fields: Any) -> Engine:
        engine = sim_engine(speculation=Simulated((0.9, 0.5), draft="llama-3.2-1b"), num_blocks=300, **fields)
        engine.add_request([5] * 9, SamplingParams(max_tokens=900, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
        return engine

    tree, chain = served(draft_tree="2x2"), served(num_speculative_tokens=2)
    verified = tree.log.filter(ev.Verified)
    assert {len(e.accepted) + len(e.rejected) for e in verified} >= {6} and not tree.log.filter(ev.PolicyFailed)
    held = [len(e.accepted) for e in verified]
    assert abs(sum(n >= 1 for n in held) / len(held) - 0.9) < 0.05 and abs(sum(n >= 2 for n in held) / sum(n >= 1 for n in held) - 0.5) < 0.08
    drafting = [max(e.measured.parts.get("draft", 0.0) for e in engine.log.filter(ev.StepFinished)) for engine in (tree, chain)]
    assert drafting[1] <= drafting[0] < 1.3 * drafting[1]


def test_lineages_and_paths_say_the_same() -> None:
    parents = (-1, 0, -1, 2, 2, 4)
    assert lineages(parents) == [0b1, 0b11, 0b100, 0b1100, 0b10100, 0b110100]
    assert paths((5, 6, 7, 8, 9, 1), parents)[-1] == (7, 9, 1) and paths((5, 6), ()) == [(5,), (5, 6)]


def test_what_is_not_there_takes_its_branch_along() -> None:
    plan = tree_plan((2, 2))
    assert plan == (-1, 0, -1, 0, 2, 2)
    assert planted(plan, [5, 6, None, 7, 8, 9]) == Proposal((5, 6, 7), (-1, 0, 0))
    assert planted(plan, [5, 6, 4, None, None, 9], [None, "q", None, None, None, None]).odds == (None, "q", None, None)
    assert planted(plan, [None] * 6) == Proposal()


@pytest.mark.parametrize(("text", "problem"), [("", "no form"), ("2xx", "no form"), ("0x2", "no form"), ("-1", "no form"), ("2.5", "no form"),
                                               ("8x8", "63 nodes"), ("x".join("1" * 64), "63 nodes"), ("9" * 30, "63 nodes"), (7, "no form")])
def test_bad_forms_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        EngineConfig(speculation="suffix", draft_tree=text)


def test_a_tree_counts_its_nodes_and_needs_a_source_that_grows_it() -> None:
    assert tree_shape("2X2x1") == (2, 2, 1) and EngineConfig(speculation="suffix", draft_tree="2x2x1").num_drafts == 10
    assert EngineConfig(num_speculative_tokens=3).num_drafts == 3
    with pytest.raises(ConfigError, match="needs somebody who drafts"):
        EngineConfig(draft_tree="2x2")
    with pytest.raises(ConfigError, match="one continuation only"):
        DRAFT_SOURCES.resolve("ngram", setup=DraftSetup(9, 1, 1, 0, tree=(2, 2)))
    with pytest.raises(ConfigError, match="no tokens"):
        simulated_speculation(EngineConfig(speculation=Simulated((0.5,)), acceptance="rejection"), DraftSetup(9, 1, 1, 0), None)  # type: ignore[arg-type]


def test_suffixes_give_what_came_often_and_what_came_next_to_that() -> None:
    source = DRAFT_SOURCES.resolve("suffix", setup=DraftSetup(99, 1, 1, 0, tree=(2, 1)))
    text = (9, 1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1, 2, 5, 6, 9, 1, 2)
    request = Request("r", 0, text, SamplingParams(), max_total_tokens=99)
    (found,) = source.propose([DraftContext(request, text, (), 4)])
    assert found == Proposal((3, 4, 5, 6), (-1, 0, -1, 2))
    (chain,) = source.propose([DraftContext(request, text, (), 2)])
    assert chain.token_ids == (3, 4) and checked_proposal(chain, 2, 99).parents == ()


def test_too_many_nodes_and_odd_odds_are_refused() -> None:
    assert checked_proposal(Proposal((1,) * 70, chain_plan(70)), 70, 9).parents == ()  # a chain may be as long as it likes
    with pytest.raises(PolicyError, match="63 nodes"):
        checked_proposal(Proposal((1,) * 64, (-1,) * 64), 64, 9)
    with pytest.raises(PolicyError, match="siblings must differ"):
        checked_proposal(Proposal((1, 1), (-1, -1), ([0.0, 1.0], [0.0, 1.0])), 2, 2)
    with pytest.raises(PolicyError, match="was not drawn from"):
        checked_proposal(Proposal((1,), (), ([1.0, 0.0],)), 1, 2)
