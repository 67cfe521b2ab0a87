"""Greedy tokens equal transformers' own, whatever the engine does on the way."""

from __future__ import annotations

import random
from collections.abc import Iterator
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
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.events import catalog as ev
from llmlab.plugins import REGISTRIES
from llmlab.types import SamplingParams

NUM_TOKENS = 12
SHARED = [(i * 37 + 5) % VOCAB for i in range(24)]
PROMPTS = [[(i * 31 + n * 7) % VOCAB for i in range(n)] for n in (1, 2, 5, 8, 16, 17, 33)]
PROMPTS += [SHARED + [n, n + 1] for n in range(3)] + [SHARED[:16], SHARED]
POOLS: dict[str, dict[str, Any]] = {
    "roomy": {"slots": 512}, "tight, recompute": {"slots": 80, "tiering": "recompute"},
    "tight, swap": {"slots": 80, "tiering": "swap"}, "tight, no cache": {"slots": 64, "enable_prefix_caching": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    yield Oracle(directory, write_model(directory))


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("budget", [5, 64])
@pytest.mark.parametrize("block_size", [1, 8, 16])
@pytest.mark.parametrize("pool", POOLS)
def test_tokens_do_not_depend_on_how_they_were_computed(
    pool: str, block_size: int, budget: int, overlap_depth: int, oracle: Oracle
) -> None:
    fields = dict(POOLS[pool])
    num_blocks = fields.pop("slots") // block_size
    engine = tiny_engine(oracle.directory, block_size=block_size, num_blocks=num_blocks, max_num_batched_tokens=budget,
                         overlap_depth=overlap_depth, **fields)  # fmt: skip
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
        names += [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS[-2:]]
        done |= serve(engine)
    for name, prompt in zip(names, PROMPTS + PROMPTS[-2:], strict=True):
        assert tokens_of(done[name]) == [oracle.greedy(prompt, NUM_TOKENS)], prompt
    assert bool(engine.log.filter(ev.RequestPreempted)) == (pool != "roomy")
    assert bool(engine.log.filter(ev.RequestResumed)) == (pool == "tight, swap")
    assert bool(engine.log.filter(ev.PrefixMatched)) == (pool != "tight, no cache")


@st.composite
def rough_rides(draw: st.DrawFn) -> dict[str, Any]:
    seams = ("ordering", "admission", "composer", "victim", "eviction", "tiering")
    fields: dict[str, Any] = {seam: draw(st.sampled_from(REGISTRIES[seam].names())) for seam in seams}
    return fields | draw(rough_sizes())


@given(fields=rough_rides(), seed=st.integers(0, 2**16))
@settings(max_examples=20)
def test_rough_rides_end_at_the_same_tokens(fields: dict[str, Any], seed: int, oracle: Oracle) -> None:
    """Arrivals in between, aborts, forks, any pairing of policies."""
    rng = random.Random(seed)
    kept: dict[str, list[int]] = {}
    with tiny_engine(oracle.directory, **fields) as engine:
        for i in range(rng.randint(3, 9)):
            prompt = rng.choice(PROMPTS)
            name = engine.add_request(prompt, greedy(rng.choice([1, 5, 10]), n=rng.choice([1, 1, 2])), priority=i % 3)
            kept[name] = prompt
            for _ in range(rng.randint(0, 6)):
                engine.step()
            if rng.random() < 0.2:
                victim = rng.choice(list(kept))
                engine.abort(victim)
        serve(engine)
        check_greedy_answers(engine, oracle, 10)


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_the_shipped_kernels_agree(overlap_depth: int, oracle: Oracle) -> None:
    """The same with the kernel set that a CPU gets by default."""
    with tiny_engine(oracle.directory, kernels="auto", num_blocks=20, tiering="swap", overlap_depth=overlap_depth) as engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
    assert engine.log.filter(ev.RequestResumed)
    for name, prompt in zip(names, PROMPTS, strict=True):
        assert tokens_of(done[name]) == [oracle.greedy(prompt, NUM_TOKENS)]


# ------------------------------------------------------------------------------------------ n > 1
@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("num_prompt", [1, 4, 7, 8, 23])
def test_siblings_share_the_prompt_and_copy_what_they_write(num_prompt: int, overlap_depth: int, oracle: Oracle) -> None:
    prompt = SHARED[:num_prompt]
    with tiny_engine(oracle.directory, overlap_depth=overlap_depth, enable_prefix_caching=False) as engine:
        name = engine.add_request(prompt, greedy(8, n=3))
        other = engine.add_request(PROMPTS[5], greedy(8))
        done = serve(engine)
    assert tokens_of(done[name]) == [oracle.greedy(prompt, 8)] * 3
    assert tokens_of(done[other]) == [oracle.greedy(PROMPTS[5], 8)]
    admitted = {e.request: e for e in engine.log.filter(ev.RequestAdmitted)}
    assert [admitted[f"{name}#{i}"].source for i in range(3)] == ["prefix", "fork", "fork"]
    computed = sum(i.num_tokens for e in engine.log.filter(ev.StepPlanned) for i in e.items if i.request == f"{name}#1")
    assert computed == 1 + 7  # of the prompt only the last token
    copies = [m for e in engine.log.filter(ev.StepPlanned) for m in e.moves if m.kind == "copy"]
    assert len(copies) == 2


def test_siblings_survive_preemption_and_swaps(oracle: Oracle) -> None:
    for tiering in ("recompute", "swap"):
        with tiny_engine(oracle.directory, num_blocks=11, tiering=tiering, admission="optimistic") as engine:
            names = [engine.add_request(SHARED[:n], greedy(10, n=3)) for n in (7, 12)]
            done = serve(engine)
        assert engine.log.filter(ev.RequestPreempted)
        assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(SHARED[:n], 10)] * 3 for n in (7, 12)]


# -------------------------------------------------------------------------------------------- seeds
def sampled(oracle: Oracle, crowd: int, **fields: Any) -> dict[str, list[list[int]]]:
    """Seeded and unseeded requests among `crowd` others."""
    with tiny_engine(oracle.directory, **fields) as engine:
        for i in range(crowd):
            engine.add_request(PROMPTS[i % len(PROMPTS)], SamplingParams(max_tokens=9, temperature=1.3), request_id=f"other{i}")
        names = [
            engine.add_request(SHARED[:9], SamplingParams(max_tokens=9, temperature=0.9, top_p=0.95, seed=7), request_id="seeded"),
            engine.add_request(SHARED[:9], SamplingParams(max_tokens=9, temperature=0.9, top_k=20), request_id="unseeded"),
            engine.add_request(SHARED[:9], SamplingParams(max_tokens=9, temperature=0.9, n=3, seed=7), request_id="three"),
            engine.add_request(SHARED[:9], SamplingParams(max_tokens=9, min_p=0.01, frequency_penalty=0.7,
                                                          repetition_penalty=1.2, seed=3), request_id="penalties"),
        ]  # fmt: skip
        done = serve(engine)
    return {name: tokens_of(done[name]) for name in names}


def test_sampled_tokens_depend_on_the_request_alone(oracle: Oracle) -> None:
    alone = sampled(oracle, 0)
    assert sampled(oracle, 7, overlap_depth=1, max_num_batched_tokens=7) == alone
    assert sampled(oracle, 5, num_blocks=16, block_size=3, tiering="swap", composer="prefill_first") == alone
    three = alone["three"]
    assert len({tuple(tokens) for tokens in three}) == 3
    other_seed = sampled(oracle, 0, seed=1)
    assert other_seed["seeded"] == alone["seeded"] and other_seed["unseeded"] != alone["unseeded"]


def test_a_seed_means_the_same_under_any_name(oracle: Oracle) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=11)
    with tiny_engine(oracle.directory) as engine:
        names = [engine.add_request(SHARED, params, request_id=name) for name in ("first", "second")]
        done = serve(engine)
    assert tokens_of(done[names[0]]) == tokens_of(done[names[1]])
