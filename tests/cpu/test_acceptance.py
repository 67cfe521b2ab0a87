"""Rejection sampling of what one tiny model drafts for another: the answers are distributed as the target alone has them.

200,000 draws by the rule itself, on the two models' own probabilities and with the engine's keyed dice; then whole engines, with
what stands between: draft model, trees, KV that moves, budgets, neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from chi_square import chi_square_p
from engine_util import serve, tiny_engine, write_model
from models_util import hf_logits

from llmlab import rng
from llmlab.decoding import rejection
from llmlab.decoding.draft_trees import chain_plan, tree_plan
from llmlab.decoding.rejection import Walk, accept_tree, pick
from llmlab.decoding.sampler import SampleRow, probabilities
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.seams import DraftContext, Proposal
from llmlab.types import SamplingParams

N, V, PROMPT = 200_000, 6, [1, 2, 3, 1, 2]


class Pair(NamedTuple):
    """Two models of one small vocabulary."""

    directories: tuple[Path, Path]
    models: tuple[Any, Any]

    def odds(self, which: int, sampling: SamplingParams, behind: tuple[int, ...]) -> np.ndarray:
        """What the sampler makes of a model's logits behind the prompt and `behind`, [V]."""
        row = SampleRow(sampling, 0, "", 0, PROMPT, behind)
        return probabilities(hf_logits(self.models[which], [*PROMPT, *behind])[-1:], [row])[0]

    def table(self, which: int, sampling: SamplingParams, depth: int) -> np.ndarray:
        """Probabilities of the next token given `depth` tokens behind the prompt, [V] * (depth + 1)."""
        every = [self.odds(which, sampling, behind) for behind in product(range(V), repeat=depth)]
        return np.array(every).reshape((V,) * (depth + 1))

    def joint(self, sampling: SamplingParams, length: int) -> np.ndarray:
        """The target's distribution of the first `length` tokens, [V ** length]."""
        found = self.table(0, sampling, 0)
        for depth in range(1, length):
            found = found[..., None] * self.table(0, sampling, depth)
        return found.ravel()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directories = tuple(tmp_path_factory.mktemp(name) for name in ("target", "draft"))
    models = tuple(write_model(directory, vocab=V, seed=seed) for seed, directory in enumerate(directories))
    with torch.no_grad():
        models[1].load_state_dict({k: w + 0.7 * (models[0].state_dict()[k] - w) for k, w in models[1].state_dict().items()})
    models[1].save_pretrained(directories[1])  # a draft model that knows something of the target
    return Pair(directories, models)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- 200,000 draws by the rule
@cache
def thrown(position: int, draw: int) -> np.ndarray:
    """The engine's random numbers of N requests."""
    return np.array([rng.uniform(0, f"r{i}", position, draw) for i in range(N)])


def drafted(pair: Pair, sampling: SamplingParams, plan: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Drafts [N, m] as the draft model draws them, siblings without replacement, and what each was drawn from, [N, V]."""
    drafts, odds = np.zeros((N, len(plan)), int), []
    depths, paths = {-1: 0}, {-1: ()}
    for node, parent in enumerate(plan):
        depths[node], paths[node] = depths[parent] + 1, (*paths[parent], node)  # type: ignore[assignment]
        table = pair.table(1, sampling, depths[parent])
        q = np.broadcast_to(table, (N, V)).copy() if parent < 0 else table[tuple(drafts[:, i] for i in paths[parent])]
        elder = [i for i in range(node) if plan[i] == parent]
        for i in elder:
            q[np.arange(N), drafts[:, i]] = 0.0
        none = q.sum(1) == 0  # of few tokens no more are left: a draft twice, which can never hold
        q[none, drafts[none, elder[-1]] if elder else 0] = 1.0
        q /= q.sum(1, keepdims=True)
        drafts[:, node] = pick(q, thrown(depths[parent], rejection.DRAFT + len(elder)))
        odds.append(q)
    return drafts, odds


def first_two(pair: Pair, sampling: SamplingParams, plan: tuple[int, ...], accept: Callable[..., Walk] = accept_tree) -> np.ndarray:
    """How often each pair of tokens comes first; where one round gives one token, plain decoding gives the other."""
    drafts, odds = drafted(pair, sampling, plan)
    tables = [pair.table(0, sampling, depth) for depth in range(4)]
    paths: dict[int, tuple[int, ...]] = {-1: ()}
    for node, parent in enumerate(plan):
        paths[node] = (*paths[parent], node)

    def p(node: int) -> np.ndarray:
        nodes = paths[node]
        return tables[len(nodes)][tuple(drafts[:, i] for i in nodes)] if nodes else np.broadcast_to(tables[0], (N, V))

    walk = accept(p, lambda node: odds[node], drafts, plan, thrown)
    found = np.full((N, 2), -1)
    for node, nodes in paths.items():
        here = walk.nodes == node
        answer = [*(drafts[here, i] for i in nodes), walk.tokens[here]][:2]
        found[here, : len(answer)] = np.stack(answer, 1)
    short = found[:, 1] < 0
    found[short, 1] = pick(tables[1][found[short, 0]], thrown(1, 0)[short])
    return np.bincount(found @ [V, 1], minlength=V * V)


PLANS = {"chain": chain_plan(3), "tree": tree_plan((2, 2)), "bush": tree_plan((3, 1))}
FILTERS = {
    "hot": SamplingParams(temperature=1.4), "nucleus": SamplingParams(temperature=0.8, top_p=0.8),
    "few": SamplingParams(temperature=1.0, top_k=4, min_p=0.05),
}  # fmt: skip


@pytest.mark.parametrize(("plan", "filters"), [("chain", "hot"), ("tree", "hot"), ("tree", "nucleus"), ("bush", "few")])
def test_the_rule_is_lossless(plan: str, filters: str, pair: Pair) -> None:
    counts = first_two(pair, FILTERS[filters], PLANS[plan])
    assert counts.sum() == N and chi_square_p(counts, pair.joint(FILTERS[filters], 2)) > 0.001


def test_the_test_sees_dice_that_are_thrown_twice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that are drawn with the numbers that judge them are found out."""
    monkeypatch.setattr(rejection, "DRAFT", rejection.LAST)
    assert chi_square_p(first_two(pair, FILTERS["hot"], PLANS["tree"]), pair.joint(FILTERS["hot"], 2)) < 1e-6


# ------------------------------------------------------------------------------------------- whole engines
def answers(pair: Pair, sampling: SamplingParams, count: int, **fields: Any) -> tuple[np.ndarray, EventLog]:
    """The first three tokens of `count` answers, counted, and the log."""
    base: dict[str, Any] = {"kernels": "numba", "num_blocks": 4000, "max_num_seqs": 256, "max_num_batched_tokens": 2048,
                            "log_level": 2, "check_interval": 0, "speculation": str(pair.directories[1])}  # fmt: skip
    with tiny_engine(pair.directories[0], **{**base, **fields}) as engine:
        names = [engine.add_request(PROMPT, sampling) for _ in range(count)]
        done = serve(engine)
    assert not engine.log.filter(ev.PolicyFailed)
    tokens = np.array([done[name].outputs[0].token_ids[:3] for name in names])
    return np.bincount(tokens @ [V * V, V, 1], minlength=V**3), engine.log


def held(log: EventLog) -> float:
    """Drafts that held, per verification."""
    verified = log.filter(ev.Verified)
    return sum(len(e.accepted) for e in verified) / len(verified)


ENGINES: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "chain": (SamplingParams(max_tokens=7, temperature=1.3, ignore_eos=True), {"num_speculative_tokens": 3}),
    "tree": (SamplingParams(max_tokens=7, temperature=1.1, top_p=0.95, frequency_penalty=0.5, ignore_eos=True), {"draft_tree": "2x2"}),
    "crowded": (SamplingParams(max_tokens=6, temperature=1.3, top_k=5, ignore_eos=True),
                {"draft_tree": "2x2x1", "num_blocks": 36, "max_num_seqs": 24, "max_num_batched_tokens": 70, "draft_policy": "ewma"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINES)
def test_engines_answer_as_the_target_alone_would(name: str, pair: Pair) -> None:
    sampling, fields = ENGINES[name]
    counts, log = answers(pair, sampling, 1500, acceptance="rejection", **fields)
    assert chi_square_p(counts, pair.joint(sampling, 3)) > 0.001
    assert held(log) > 0 and bool(log.filter(ev.RequestPreempted)) == (name == "crowded")


def test_an_unsure_draft_model_is_believed_more_often_by_rejection(pair: Pair) -> None:
    sampling = SamplingParams(max_tokens=7, temperature=1.3, ignore_eos=True)
    keyed, judged = (held(answers(pair, sampling, 200, acceptance=rule, draft_tree="3x1")[1]) for rule in ("keyed", "rejection"))
    assert judged > keyed


class Knowing:
    """Drafts drawn from wrong odds, as a source that errs or cheats would hand over."""

    name = "knowing"

    def __init__(self, odds: tuple[Any, ...]) -> None:
        self.odds = odds

    def propose(self, contexts: Any) -> list[Proposal]:
        return [self._two(c) for c in contexts]

    def _two(self, context: DraftContext) -> Proposal:
        return Proposal((0, 1), (-1, -1), self.odds) if context.k >= 2 else Proposal()


@pytest.mark.parametrize("odds", [(np.full(V, 0.5), None), (None,), (None, np.eye(V)[0]), (np.full(V - 1, 1 / (V - 1)), None)])
def test_odds_that_cannot_be_cost_the_drafts(odds: tuple[Any, ...], pair: Pair) -> None:
    with tiny_engine(pair.directories[0], speculation=Knowing(odds), acceptance="rejection") as engine:
        engine.add_request(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))
        serve(engine)
    failed = engine.log.filter(ev.PolicyFailed)
    assert bool(failed) == any(q is not None for q in odds)
    assert all("odds" in e.error for e in failed)


def test_log_probabilities_are_those_of_the_tokens_that_came(pair: Pair) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.3, logprobs=V, ignore_eos=True)
    with tiny_engine(pair.directories[0], speculation=str(pair.directories[1]), acceptance="rejection", draft_tree="2x2") as engine:
        name = engine.add_request(PROMPT, sampling)
        answer = serve(engine)[name].outputs[0]
    assert any(e.accepted for e in engine.log.filter(ev.Verified))
    want = torch.log_softmax(hf_logits(pair.models[0], [*PROMPT, *answer.token_ids]), -1)[len(PROMPT) - 1 :]
    assert [t.logprob for t in answer.logprobs] == pytest.approx([float(want[i, t]) for i, t in enumerate(answer.token_ids)], abs=1e-4)
