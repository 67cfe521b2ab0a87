"""Verified determinism: the same tokens in any company, where plain decoding in bf16 answers otherwise now and then."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_util import Oracle, greedy, serve, tiny_engine, tokens_of, write_model

import llmlab
from llmlab.decoding.verified import Verified
from llmlab.events import catalog as ev
from llmlab.execution.fixed import FixedPasses, Text
from llmlab.models.loader import load_model
from llmlab.replaying import replay_decisions
from llmlab.runs import Run
from llmlab.types import ConfigError, RequestError, SamplingParams

WIDE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1408, "vocab_size": 512,
    "head_dim": 64, "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "eos_token_id": 2, "bos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
PROMPT = [(37 * i + 11) % 500 + 3 for i in range(21)]
ASKED = 3  # requests whose answers are compared


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A shape whose products in bf16 have other bits for one row than for many."""
    directory = tmp_path_factory.mktemp("wide")
    (directory / "config.json").write_text(json.dumps(WIDE))
    return str(directory)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    yield Oracle(directory, write_model(directory))


def engine_of(model: str, **fields: Any) -> llmlab.Engine:
    base: dict[str, Any] = {"model": model, "dtype": "bfloat16", "kernels": "torch", "random_weights": True, "num_blocks": 64,
                            "decoding": Verified(window=6, rows=3), "fixed_rows": 32, "num_threads": 1}  # fmt: skip
    return llmlab.Engine(**{**base, **fields})


def random_batching(engine: llmlab.Engine, seed: int, deterministic: bool) -> tuple[tuple[int, ...], ...]:
    """The answers to the same few prompts in random company: alone or not, arrivals before and after."""
    dice = random.Random(seed)
    for i in range(dice.choice([0, 0, 1, 3])):
        prompt = [dice.randrange(3, 500) for _ in range(dice.randint(1, 40))]
        engine.add_request(prompt, SamplingParams(max_tokens=dice.randint(1, 9), temperature=1.0, deterministic=dice.random() < 0.3),
                           request_id=f"{seed}.{i}")  # fmt: skip
        for _ in range(dice.randint(0, 3)):
            engine.step()
    answers: dict[int, tuple[int, ...]] = {}
    order, names = dice.sample(range(ASKED), ASKED), {}
    while engine.has_unfinished_requests() or order:
        if order and dice.random() < 0.2:
            number = order.pop()
            params = SamplingParams(max_tokens=15, temperature=1.0, seed=number, ignore_eos=True, deterministic=deterministic)
            names[engine.add_request(PROMPT[number:], params, request_id=f"asked{seed}.{number}")] = number
        answers |= {names[o.request_id]: tuple(o.outputs[0].token_ids) for o in engine.step()
                    if o.request_id in names and o.finished}  # fmt: skip
    return tuple(answers[number] for number in range(ASKED))


def test_fifty_random_batchings_give_one_answer_where_plain_decoding_gives_several(wide: str) -> None:
    """Every engine, budget and neighbourhood is another; only what must not matter differs."""
    answers: dict[bool, list[Any]] = {True: [], False: []}
    for deterministic, found in answers.items():
        for ride in range(5):
            with engine_of(wide, max_num_batched_tokens=(7, 512, 16, 64, 33)[ride], max_num_seqs=1 + ride,
                           enable_prefix_caching=ride % 2 == 0, overlap_depth=ride % 2) as engine:  # fmt: skip
                found += [random_batching(engine, 10 * ride + i, deterministic) for i in range(10 if deterministic else 5)]
                assert not engine.log.filter(ev.PolicyFailed)
    assert len(answers[True]) == 50 and len(set(answers[True])) == 1
    assert len(set(answers[False])) > 1, "plain decoding in bf16 is deterministic here, so this shows nothing"


def test_a_row_does_not_depend_on_where_it_stands_or_beside_whom(wide: str) -> None:
    """Row-offset invariance, the hidden premise: permuted rows, shifted windows and other neighbours give the same bits."""
    loaded = load_model(wide, "bf16", "cpu", "torch", random_weights=True)
    shape = loaded.shape

    def logits(before: list[int], cuts: list[int], after: list[int]) -> torch.Tensor:
        kv = [tuple(torch.zeros(16, shape.num_kv_heads, 8, shape.head_dim, dtype=loaded.dtype) for _ in range(2))
              for _ in range(shape.num_layers)]  # fmt: skip
        passes, found = FixedPasses(loaded, kv, 8, 32), []
        for start, stop in zip([0, *cuts], [*cuts, len(PROMPT)]):
            texts = [Text(before, 0, [8, 9, 10]), Text(PROMPT[start:stop], start, [3, 1, 2]), Text(after, 0, [11, 12])]
            texts = [text for text in texts if len(text.ids)]
            at = len(before) if texts[0].ids is before else 0
            found.append(passes.run(texts).logits[at : at + stop - start])
        return torch.cat(found)

    with torch.inference_mode():
        whole = logits([], [], [])
        for before, cuts, after in (([5], [], []), ([5] * 17, [], [9] * 16), ([], [1, 2, 3], [4]), ([8] * 3, [7, 19], []),
                                    ([6] * 23, list(range(1, 21)), [])):  # fmt: skip
            assert torch.equal(logits(before, cuts, after), whole), (len(before), cuts, len(after))


def test_rollbacks_are_logged_and_nobody_sees_a_candidate(wide: str) -> None:
    with engine_of(wide, log_level=3, check_interval=1) as engine:
        for i in range(6):
            engine.add_request(PROMPT[: 5 + i], SamplingParams(max_tokens=30, temperature=1.0, deterministic=True, ignore_eos=True))
        done = serve(engine)
    assert max(len(e.token_ids) for e in engine.log.filter(ev.TokensReleased)) > 1
    windows = [i for e in engine.log.filter(ev.StepPlanned) for i in e.items if i.group == "verify"]
    assert windows and all(i.numerics == "fixed" and i.kv_write == "overwrite" and i.num_tokens <= 6 for i in windows)
    assert any(sum(i.group == "verify" for i in e.items) > 1 for e in engine.log.filter(ev.StepPlanned)), "windows go together"
    run = Run.of(engine.log)
    assert run.metrics.padded_tokens > 0 and replay_decisions(run, decoding=Verified(window=6, rows=3)).differences == []
    assert all(len(o.outputs[0].token_ids) == 30 for o in done.values())


@pytest.mark.parametrize("fields", [{}, {"num_blocks": 18, "tiering": "swap"}, {"num_blocks": 18, "overlap_depth": 1},
                                    {"max_num_batched_tokens": 5}])  # fmt: skip
def test_in_float32_nothing_is_rolled_back_and_the_answers_are_those_of_plain_decoding(fields: dict[str, Any], oracle: Oracle) -> None:
    with tiny_engine(oracle.directory, decoding=Verified(4, 2), fixed_rows=8, **fields) as engine:
        params = SamplingParams(max_tokens=11, temperature=0.0, ignore_eos=True, deterministic=True)
        names = {engine.add_request([i, i + 1, i + 2] * (1 + i), params if i % 2 else greedy(11)): i for i in range(6)}
        done = serve(engine)
    for name, i in names.items():
        assert tokens_of(done[name]) == [oracle.greedy([i, i + 1, i + 2] * (1 + i), 11)]
    assert not [e for e in engine.log.filter(ev.Verified) if e.rejected]


def test_a_deterministic_request_without_the_verifier_is_computed_fixed_throughout(oracle: Oracle) -> None:
    with tiny_engine(oracle.directory) as engine:
        name = engine.add_request([1, 2, 3], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, deterministic=True))
        assert tokens_of(serve(engine)[name]) == [oracle.greedy([1, 2, 3], 5)]
    assert {i.numerics for e in engine.log.filter(ev.StepPlanned) for i in e.items} == {"fixed"}


def test_others_do_not_pay(oracle: Oracle) -> None:
    with tiny_engine(oracle.directory, decoding="verified") as engine:
        engine.add_request([1, 2, 3], greedy(9))
        serve(engine)
    assert Run.of(engine.log).metrics.padded_tokens == 0
    assert {i.numerics for e in engine.log.filter(ev.StepPlanned) for i in e.items} == {"fast"}


def test_blocks_of_the_fast_path_are_not_found_by_deterministic_requests(oracle: Oracle) -> None:
    prompt = list(range(20))
    with tiny_engine(oracle.directory, decoding="verified") as engine:
        for deterministic in (False, True, True):
            engine.add_request(prompt, SamplingParams(max_tokens=2, temperature=0.0, deterministic=deterministic))
            serve(engine)
    assert [e.num_cached_tokens for e in engine.log.filter(ev.RequestAdmitted)] == [0, 0, 16]


def test_a_stop_token_among_the_candidates_ends_the_window(oracle: Oracle) -> None:
    answer = oracle.greedy([1, 2, 3], 10)
    stop = next(t for i, t in enumerate(answer) if i >= 3 and t not in answer[:i])
    params = SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=(stop,), ignore_eos=True, deterministic=True)
    with tiny_engine(oracle.directory, decoding=Verified(window=16, rows=1)) as engine:
        name = engine.add_request([1, 2, 3], params)
        out = serve(engine)[name].outputs[0]
    assert out.token_ids == answer[: answer.index(stop) + 1] and out.finish_reason == "stop"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        Verified(window=0)
    with pytest.raises(RequestError, match="deterministic='yes': must be True or False"):
        SamplingParams(deterministic="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fixed_rows=0"):
        llmlab.EngineConfig(fixed_rows=0)
