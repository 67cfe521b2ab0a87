"""Drafting on the real engine: whatever drafts, however badly, the tokens are those of plain decoding."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_util import (
    VOCAB,
    Oracle,
    check_greedy_answers,
    greedy,
    rough_sizes,
    serve,
    tiny_engine,
    tokens_of,
    write_heads,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.decoding.draft_lengths import DRAFT_POLICIES
from llmlab.decoding.drafts import Oracle as Script
from llmlab.events import catalog as ev
from llmlab.runs import Run
from llmlab.seams import DraftContext, Proposal
from llmlab.types import ConfigError, SamplingParams

PROMPTS = [[(i * 31 + n * 7) % VOCAB for i in range(n)] for n in (1, 3, 8, 17)] + [[4, 5, 6, 7] * 6, [9, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    model = write_model(directory)
    write_heads(directory)
    yield Oracle(directory, model)


def script(oracle: Oracle, acceptance: Sequence[float]) -> Script:
    """Knows what the model will say, and spoils it at random."""
    def truth(request: Any, position: int) -> int:
        return oracle.greedy(request.prompt_token_ids, 16)[min(15, position - request.num_prompt_tokens)]

    return Script(truth, acceptance, VOCAB)


def drafting(oracle: Oracle, source: str, **fields: Any) -> dict[str, Any]:
    """The settings under which `source` drafts: `suffix 2x2` is a tree."""
    name, _, tree = source.partition(" ")
    return fields | {"speculation": sources(oracle)[name], "draft_tree": tree or None}


def sources(oracle: Oracle) -> dict[str, Any]:
    return {"ngram": "ngram", "suffix": "suffix", "itself": str(oracle.directory), "script": script(oracle, (0.9, 0.6)),
            "layer_skip": "layer_skip", "heads": "heads", "bushes": Bushes(oracle)}


class Bushes:
    """Trees of random form, in which the right path hides among wrong ones, as far as the dice let it."""

    name = "bushes"

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.dice = oracle, random.Random(7)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        return [self._bush(c) if c.k else Proposal() for c in contexts]

    def _bush(self, context: DraftContext) -> Proposal:
        start = len(context.token_ids) - context.request.num_prompt_tokens
        truth = self.oracle.greedy(context.request.prompt_token_ids, 24)[start:]
        tokens: list[int] = []
        parents: list[int] = []
        path = [-1]
        for i in range(context.k):
            right = len(path) <= len(truth) and self.dice.random() < 0.5
            tokens.append(truth[len(path) - 1] if right else self.dice.randrange(VOCAB))
            parents.append(path[-1] if right else self.dice.randrange(-1, i))
            if right:
                path.append(i)
        return Proposal(tuple(tokens), tuple(parents))


@st.composite
def rough_rides(draw: st.DrawFn) -> dict[str, Any]:
    return draw(rough_sizes()) | {
        "tiering": draw(st.sampled_from(["recompute", "swap"])),
        "composer": draw(st.sampled_from(["chunked", "prefill_first", "decode_first"])),
        "num_speculative_tokens": draw(st.integers(1, 5)), "draft_policy": draw(st.sampled_from(DRAFT_POLICIES.names())),
    }  # fmt: skip


@pytest.mark.parametrize("source", ["ngram", "suffix", "itself", "script", "layer_skip", "bushes", "itself 2x2x1", "suffix 2x2",
                                    "layer_skip 3x1x1", "heads"])  # fmt: skip
@given(fields=rough_rides(), seed=st.integers(0, 2**16))
@settings(max_examples=6)
def test_rough_rides_end_at_the_tokens_of_plain_decoding(source: str, fields: dict[str, Any], seed: int, oracle: Oracle) -> None:
    """Arrivals in between, aborts, preemptions, prefix hits, chunks, and drafts of every source."""
    rng = random.Random(seed)
    with tiny_engine(oracle.directory, **drafting(oracle, source, **fields)) as engine:
        for i in range(rng.randint(3, 8)):
            engine.add_request(rng.choice(PROMPTS), greedy(rng.choice([1, 5, 14]), n=rng.choice([1, 1, 2])), request_id=f"q{i}")
            for _ in range(rng.randint(0, 4)):
                engine.step()
            if rng.random() < 0.2:
                engine.abort(f"q{rng.randint(0, i)}")
        serve(engine)
        check_greedy_answers(engine, oracle, 14)
        assert not engine.log.filter(ev.PolicyFailed)


@pytest.mark.parametrize("source", ["ngram", "suffix", "itself", "itself 2x2x1"])
def test_a_model_that_drafts_for_itself_is_always_right(source: str, oracle: Oracle) -> None:
    with tiny_engine(oracle.directory, num_blocks=200, **drafting(oracle, source)) as engine:
        names = [engine.add_request(prompt, greedy(16)) for prompt in PROMPTS]
        done = serve(engine)
    for name, prompt in zip(names, PROMPTS, strict=True):
        assert tokens_of(done[name]) == [oracle.greedy(prompt, 16)]
    metrics = Run.of(engine.log).metrics
    if source == "itself":
        assert metrics.acceptance_rate == 1.0 and metrics.wasted_tokens == 0
    elif " " in source:  # its first choices hold, the others are for nothing
        verified = engine.log.filter(ev.Verified)
        assert any(len(e.accepted) == 3 for e in verified) and all(len(e.accepted) == min(3, len(e.accepted) + len(e.rejected)) for e in verified)
    else:
        assert 0 < metrics.accepted_tokens < metrics.drafted_tokens


def test_the_draft_model_reads_a_shared_prompt_once(oracle: Oracle) -> None:
    """Its KV lies under the same block ids: what the prefix cache finds for the target is there for the draft, too."""
    fed: list[int] = []
    with tiny_engine(oracle.directory, speculation=str(oracle.directory), num_blocks=100) as engine:
        source = engine.executor._drafter._source  # type: ignore[attr-defined]
        run = source._run
        source._run = lambda feeds, last: (fed.append(sum(len(feed.ids) for feed in feeds)), run(feeds, last))[1]
        first, again = ([engine.add_request(PROMPTS[4], greedy(4)), serve(engine), sum(fed), fed.clear()][2] for _ in range(2))
    assert first >= len(PROMPTS[4]) and again <= first - 16


def test_sources_may_change_between_two_steps(oracle: Oracle) -> None:
    choices = [None, *sources(oracle).values()]
    with tiny_engine(oracle.directory, num_blocks=200, overlap_depth=1) as engine:
        names = [engine.add_request(prompt, greedy(16)) for prompt in PROMPTS]
        done = {}
        while engine.has_unfinished_requests():
            engine.reconfigure(speculation=choices[engine.scheduler.next_step % len(choices)])
            done |= {output.request_id: output for output in engine.step()}
        drafted = {event.source for event in engine.log.filter(ev.Drafted)}
    assert len(drafted) > 2
    for name, prompt in zip(names, PROMPTS, strict=True):
        assert tokens_of(done[name]) == [oracle.greedy(prompt, 16)]


# ------------------------------------------------------------------------------------- more than greedy
MANY = [
    SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True), SamplingParams(max_tokens=12, temperature=1.5, top_p=0.7, seed=3),
    SamplingParams(max_tokens=12, temperature=0.7, top_k=5, min_p=0.05, n=2),
    SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=1),
    SamplingParams(max_tokens=12, temperature=0.0, frequency_penalty=1.0, repetition_penalty=1.3),
    SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(3, 8, 20), min_tokens=5),
    SamplingParams(max_tokens=12, temperature=0.0, logit_bias={5: 3.0}),
]  # fmt: skip


@pytest.mark.parametrize("source", ["ngram", "itself", "script", "itself 2x2x1"])
def test_sampled_answers_are_those_of_plain_decoding_token_for_token(source: str, oracle: Oracle) -> None:
    """Random numbers are keyed by request and position: drafts change neither a token nor a log-probability."""
    def answers(**fields: Any) -> list[Any]:
        with tiny_engine(oracle.directory, num_blocks=300, **fields) as engine:
            names = [engine.add_request(p, s, request_id=f"{i}.{j}") for i, p in enumerate(PROMPTS[2:]) for j, s in enumerate(MANY)]
            done = serve(engine)
            assert all(e.accepted for e in engine.log.filter(ev.Verified)[:0]) and not engine.log.filter(ev.PolicyFailed)
        return [[(o.token_ids, [(t.rank, [r for r, _ in t.top]) for t in o.logprobs or ()], o.finish_reason, o.stop_reason)
                 for o in done[name].outputs] for name in names]  # fmt: skip

    assert answers(**drafting(oracle, source)) == answers()


def test_sampling_accepts_drafts_that_were_sampled_alike(oracle: Oracle) -> None:
    """A model drafting for itself at temperature 1 draws the same tokens with the same random numbers."""
    with tiny_engine(oracle.directory, speculation=str(oracle.directory), num_blocks=200) as engine:
        for prompt in PROMPTS:
            engine.add_request(prompt, SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True))
        serve(engine)
    assert Run.of(engine.log).metrics.acceptance_rate > 0.95


@pytest.mark.parametrize("stop", ["=", "4", "0", "1"])
def test_stop_strings_end_at_the_same_token(stop: str) -> None:
    def answer(**fields: Any) -> Any:
        with llmlab.LLM("lab-s", **fields) as llm:
            out = llm.generate("12+7*3?", SamplingParams(max_tokens=40, temperature=0.0, stop=stop, logprobs=1))[0].outputs[0]
        return out.text, out.token_ids, len(out.logprobs), out.finish_reason, out.stop_reason

    assert answer(speculation="lab-xs", num_speculative_tokens=6) == answer()


def test_the_shipped_pair_verifies_several_tokens_a_step() -> None:
    prompts = ["37*46-23*58?", "12+7*3?", "840/24+17*3?"]
    with llmlab.LLM("lab-s") as plain, llmlab.LLM("lab-s", speculation="lab-xs") as drafting:
        params = SamplingParams(max_tokens=60, temperature=0.0)
        assert [o.outputs[0].token_ids for o in plain.generate(prompts, params)] == \
            [o.outputs[0].token_ids for o in drafting.generate(prompts, params)]  # fmt: skip
        assert drafting.run.metrics.tokens_per_verification > 2.5
        assert drafting.run.metrics.num_steps < 0.5 * plain.run.metrics.num_steps


# ------------------------------------------------------------------------------------------ what goes wrong
def test_models_with_other_vocabularies_are_refused_and_the_ids_named(oracle: Oracle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the ids \d+ to \d+ are known to one of them only"):
        llmlab.Engine(model="lab-s", speculation=str(oracle.directory))
    other = tmp_path / "other"
    shutil.copytree(oracle.directory, other)
    text = (other / "tokenizer.json").read_text()
    written = text.replace(f'"{chr(7)}"', '"seven"') if f'"{chr(7)}"' in text else _swapped(text)
    (other / "tokenizer.json").write_text(written)
    with pytest.raises(ConfigError, match=r"another vocabulary .* ids differ, such as"):
        tiny_engine(oracle.directory, speculation=str(other))


def test_an_unknown_source_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"speculation='lab-z': .*Sources without a model: heads, layer_skip, ngram, suffix"):
        llmlab.Engine(model="lab-s", speculation="lab-z")


def _swapped(text: str) -> str:
    import json

    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(tokenizer)


class Wild:
    """Proposes ids that no vocabulary has, every other time."""

    name = "wild"

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        self.calls += 1
        return [Proposal((VOCAB + 5,) if self.calls % 2 else (1,)) if c.k else Proposal() for c in contexts]


def test_ids_outside_the_vocabulary_stop_the_drafts_and_not_the_answer(oracle: Oracle) -> None:
    with tiny_engine(oracle.directory, speculation=Wild()) as engine:
        name = engine.add_request(PROMPTS[2], greedy(12))
        assert tokens_of(serve(engine)[name]) == [oracle.greedy(PROMPTS[2], 12)]
    failed = engine.log.filter(ev.PolicyFailed)
    assert failed and "outside the vocabulary" in failed[0].error and engine.log.filter(ev.Verified)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_the_best_path_of_a_tree_is_taken(kernels: str, oracle: Oracle) -> None:
    """The right tokens lie behind wrong siblings, so that their KV must move to where it belongs."""
    class Forked:
        def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
            return [self._fork(c) if c.k >= 5 else Proposal() for c in contexts]

        def _fork(self, c: DraftContext) -> Proposal:
            right = oracle.greedy(c.request.prompt_token_ids, 30)[len(c.token_ids) - c.request.num_prompt_tokens :]
            wrong = [(t + 1) % VOCAB for t in right]
            return Proposal((wrong[0], wrong[1], right[0], wrong[0], right[1]), (-1, 0, -1, 2, 2))

    with tiny_engine(oracle.directory, speculation=Forked(), kernels=kernels, num_speculative_tokens=5, num_blocks=100) as engine:
        names = [engine.add_request(prompt, greedy(16)) for prompt in PROMPTS]
        done = serve(engine)
    assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(prompt, 16)] for prompt in PROMPTS]
    verified = engine.log.filter(ev.Verified)
    assert verified and all(len(e.accepted) == 2 and len(e.rejected) == 3 for e in verified)
    assert not engine.log.filter(ev.PolicyFailed)


@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_trees_under_sliding_windows(case: str, tmp_path: Path) -> None:
    """Windows of 11 and 10 tokens, behind which most of these texts lie; a node's window counts depths and not slots."""
    oracle = Oracle(tmp_path, write_model(tmp_path, case=case))
    with tiny_engine(tmp_path, kernels="numba", num_blocks=200, **drafting(oracle, "itself 2x2x1x1")) as engine:
        names = [engine.add_request(prompt, greedy(16)) for prompt in PROMPTS]
        done = serve(engine)
    assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(prompt, 16)] for prompt in PROMPTS]
    assert max(len(e.accepted) for e in engine.log.filter(ev.Verified)) == 4


def test_a_tree_of_too_many_nodes_is_refused(oracle: Oracle) -> None:
    class Wide:
        def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
            return [Proposal((1,) * 64, (-1,) * 64) if c.k >= 64 else Proposal() for c in contexts]

    with tiny_engine(oracle.directory, speculation=Wide(), num_speculative_tokens=70) as engine:
        name = engine.add_request(PROMPTS[2], greedy(80))
        assert tokens_of(serve(engine)[name]) == [oracle.greedy(PROMPTS[2], 80)]
    assert "more than the 63 nodes" in engine.log.filter(ev.PolicyFailed)[0].error


def test_a_draft_model_keeps_silent_where_its_context_ends(oracle: Oracle, tmp_path: Path) -> None:
    import json

    short = tmp_path / "short"
    shutil.copytree(oracle.directory, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    with tiny_engine(oracle.directory, speculation=str(short)) as engine:
        name = engine.add_request(PROMPTS[3], greedy(14))
        assert tokens_of(serve(engine)[name]) == [oracle.greedy(PROMPTS[3], 14)]
    assert not engine.log.filter(ev.PolicyFailed)
    assert len(engine.log.filter(ev.Drafted)) <= 1
