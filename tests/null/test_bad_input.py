"""Bad input gets an error that names the field, the value and the way out, and loses nothing that runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simlab import Watch, expected_tokens, greedy, run_to_end, sim_engine, specs

from llmlab.config import EngineConfig, engine_config
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.types import ConfigError, LabError, RequestError, SamplingParams, TraceError

NAN, INF = float("nan"), float("inf")
LOOP: list[Any] = []
LOOP.append(LOOP)

PROMPTS = {
    "empty": ([], "prompt=[]"),
    "as long as the pool": ([1] * 64, "64 tokens"),
    "longer than the pool": ([1] * 100, "100 tokens"),
    "negative id": ([1, -1], "prompt_token_ids[1]=-1"),
    "id beyond the vocabulary": ([1, 2, 512], "prompt_token_ids[2]=512"),
    "float id": ([1.0], "prompt_token_ids[0]=1.0"),
    "bool id": ([True], "prompt_token_ids[0]=True"),
    "string id": (["a"], "prompt_token_ids[0]='a'"),
    "nested": ([[1, 2]], "prompt_token_ids[0]"),
    "text without a tokenizer": ("hello", "prompt='hello'"),
    "chat without a tokenizer": ([{"role": "user", "content": "hello"}], "tokenizer"),
    "number": (5, "prompt=5"),
    "nothing": (None, "prompt=None"),
    "bytes": (b"hello", "prompt=b'hello'"),
    "array": (np.array([1, 2]), "prompt=array"),
    "generator": ((i for i in [1]), "generator"),
    "empty dict": ({}, "prompt_token_ids"),
    "dict of a number": ({"prompt_token_ids": 5}, "prompt"),
    "dict of nothing": ({"prompt_token_ids": None}, "prompt"),
}
FIELDS: dict[str, list[Any]] = {
    "params": [{}, 5, "greedy", [SamplingParams()]],
    "request_id": [5, "", "\ud800", "two\nlines", b"x", 0, False, ["r"]],
    "arrival": [NAN, INF, -INF, -1, "now", True],
    "deadline": [NAN, INF, -0.5, "soon", False],
    "priority": [1.5, None, "high", 10**30, NAN],
    "session": [5, "\ud800", b"x", ["s"]],
    "metadata": [5, [1], "text", {"a": object()}, {"a": np.int64(3)}, {"a": "\ud800"}, {"a": LOOP}, {"a": 1j}],
}


def busy() -> Engine:
    """An engine in the middle of work, with requests running, waiting and preempted."""
    engine = sim_engine(num_blocks=16, block_size=4, max_num_seqs=4)
    for i in range(8):
        engine.add_request([i] * 10, greedy(9, ignore_eos=True))
    for _ in range(6):
        engine.step()
    assert engine.scheduler.running and engine.scheduler.waiting
    return engine


def unharmed(engine: Engine) -> None:
    """What ran before goes on to its right end."""
    watch = Watch(engine)
    done = run_to_end(engine, 500, watch)
    assert {f"r{i}" for i in range(8)} <= {*done, *watch.state.requests}
    for name, spec in specs(engine).items():
        if watch.state.requests[name].finish_reason != "abort":
            assert watch.state.requests[name].output_token_ids == expected_tokens(engine, spec)


@pytest.mark.parametrize(("prompt", "shown"), PROMPTS.values(), ids=PROMPTS)
def test_a_bad_prompt_is_refused_by_name_and_logged(prompt: Any, shown: str) -> None:
    engine = busy()
    with pytest.raises(RequestError) as caught:
        engine.add_request(prompt, greedy(4), request_id="bad")
    assert shown in str(caught.value)
    refused = engine.log.filter(ev.RequestRefused)
    assert [(e.request, e.reason) for e in refused] == [("bad", str(caught.value))]
    assert engine.metrics.num_refused == 1
    unharmed(engine)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in FIELDS.items() for v in values],
                         ids=lambda value: ascii(value)[:20])  # fmt: skip
def test_a_bad_field_is_refused_by_name(field: str, value: Any) -> None:
    engine = busy()
    with pytest.raises(RequestError) as caught:
        engine.add_request([1, 2, 3], **{"params": greedy(4), field: value})
    assert caught.value.field == field and caught.value.problem and caught.value.way_out
    assert str(caught.value).startswith(f"{field}=")
    assert len(specs(engine)) == 8 and not engine._future
    unharmed(engine)


@pytest.mark.parametrize(("field", "value"), [
    ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("top_p", 0.0), ("top_p", 1.1), ("top_p", NAN),
    ("top_k", -2), ("min_p", -0.1), ("min_p", NAN), ("max_tokens", 0), ("max_tokens", -3), ("max_tokens", 1.5),
    ("min_tokens", -1), ("min_tokens", 17), ("n", 0), ("n", -1), ("stop", ""), ("stop_token_ids", [-1]), ("seed", 1.5),
    ("logprobs", -1), ("presence_penalty", 2.1), ("frequency_penalty", NAN), ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: NAN}), ("logit_bias", [1]),
])  # fmt: skip
def test_bad_sampling_values_never_become_parameters(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert field in str(caught.value)


def test_stop_strings_need_a_tokenizer() -> None:
    engine = busy()
    with pytest.raises(RequestError, match="stop_token_ids"):
        engine.add_request([1], greedy(4, stop=("end",)))
    unharmed(engine)


# --------------------------------------------------------------------------------------- request ids
def test_an_id_in_use_is_refused_and_its_owner_goes_on() -> None:
    engine = busy()
    for name in ("r0", "r7"):
        with pytest.raises(RequestError, match="already in use"):
            engine.add_request([1], greedy(1), request_id=name)
    engine.add_request([1], greedy(1), request_id="late", arrival=1e6)
    with pytest.raises(RequestError, match="already in use"):
        engine.add_request([1], greedy(1), request_id="late")
    engine.abort("late")
    unharmed(engine)


def test_an_id_names_one_request_in_the_whole_log() -> None:
    engine = busy()
    unharmed(engine)
    with pytest.raises(RequestError, match="already in use"):
        engine.add_request([1], greedy(1), request_id="r0")


def test_answers_of_n_cannot_collide_with_other_ids() -> None:
    engine = sim_engine()
    engine.add_request([1, 2], greedy(3), request_id="a#1")
    with pytest.raises(RequestError, match="already in use"):
        engine.add_request([1, 2], SamplingParams(n=2, max_tokens=3), request_id="a")
    engine.add_request([1, 2], SamplingParams(n=2, max_tokens=3), request_id="b")
    with pytest.raises(RequestError, match="already in use"):
        engine.add_request([1, 2], greedy(3), request_id="b#1")
    assert set(run_to_end(engine, 50, Watch(engine))) == {"a#1", "b"}


def test_ids_that_the_engine_gives_are_free_ones() -> None:
    engine = sim_engine()
    engine.add_request([1], greedy(2), request_id="r1")
    engine.add_request([1], SamplingParams(n=3, max_tokens=2), request_id="r2")
    names = [engine.add_request([i], greedy(2)) for i in range(4)]
    assert len({*names, "r1", "r2"}) == 6
    assert set(run_to_end(engine, 60, Watch(engine))) == {*names, "r1", "r2"}


def test_aborts_of_unknown_and_finished_ids_do_nothing() -> None:
    engine = busy()
    before = engine.log.num_emitted
    engine.abort("nobody")
    assert engine.log.num_emitted == before
    unharmed(engine)
    before = engine.log.num_emitted
    engine.abort("r0")
    assert engine.log.num_emitted == before


def test_a_request_aborted_before_it_arrived_lived_no_time() -> None:
    engine = sim_engine()
    name = engine.add_request([1, 2], greedy(3), arrival=100.0)
    engine.abort(name)
    assert not engine.has_unfinished_requests()
    metrics = engine.metrics.requests[name]
    assert (metrics.finish_reason, metrics.e2e, metrics.num_output_tokens) == ("abort", 0.0, 0)
    Watch(engine).check()


# --------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(("field", "value"), [
    ("block_size", 0), ("block_size", -1), ("block_size", 2.0), ("block_size", True), ("num_blocks", 0),
    ("num_blocks", "many"), ("num_host_blocks", -1), ("max_num_batched_tokens", 0), ("max_num_seqs", 0),
    ("max_model_len", 0), ("overlap_depth", -1), ("log_level", 5), ("log_level", -1), ("log_capacity", 0),
    ("check_interval", -1), ("policy_timeout", 0), ("policy_timeout", NAN), ("policy_timeout", "1"),
    ("num_alternatives", -1), ("view_cap", 0), ("seed", 1.5), ("executor", "cuda"), ("device", "tpu"),
    ("dtype", "fp8"), ("kernels", "cutlass"), ("model", ""), ("model", 5), ("num_threads", 0),
])  # fmt: skip
def test_a_bad_configuration_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{field: value})
    assert caught.value.field == field and repr(value) in str(caught.value)


def test_unknown_fields_models_and_devices_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'block_size'"):
        engine_config(block_sise=4)
    with pytest.raises(LabError, match="llama-2-7b"):
        Engine(model="llama-2-7bb", executor="sim")
    with pytest.raises(LabError, match="a100"):
        Engine(model="lab-xs", executor="sim", hardware="a1000")
    with pytest.raises(LabError, match="larger device"):
        Engine(model="llama-2-70b", executor="sim", hardware="t4")


def test_a_trace_path_that_cannot_be_written_is_an_error_before_anything_runs() -> None:
    with pytest.raises(TraceError, match=r"/nowhere/at/all\.jsonl"):
        sim_engine(trace="/nowhere/at/all.jsonl")


# ------------------------------------------------------------------------------------------- limits
def test_an_output_ends_where_the_pool_or_the_model_ends() -> None:
    engine = sim_engine(num_blocks=4, block_size=4)
    engine.add_request([1] * 15, SamplingParams(max_tokens=None, ignore_eos=True))
    engine.add_request([2] * 3, SamplingParams(max_tokens=1000, ignore_eos=True))
    done = run_to_end(engine, 100, Watch(engine))
    assert [(len(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in done.values()] == [(1, "length"), (13, "length")]
    engine = sim_engine(max_model_len=6)
    with pytest.raises(RequestError, match="6 tokens"):
        engine.add_request([1] * 6, greedy(1))
    engine.add_request([1] * 5, greedy(8, ignore_eos=True), request_id="fits")
    assert len(run_to_end(engine, 20)["fits"].outputs[0].token_ids) == 1


@pytest.mark.parametrize("log_level", [0, 1, 2, 3, 4])
def test_every_log_level_serves_the_same_tokens(log_level: int) -> None:
    engine = sim_engine(log_level=log_level, num_blocks=8, overlap_depth=1)
    for i in range(6):
        engine.add_request([i] * 6, greedy(8, ignore_eos=True))
    done = run_to_end(engine, 200)
    for name, spec in specs(engine).items():
        assert done[name].outputs[0].token_ids == expected_tokens(engine, spec)
    assert max(type(e).LEVEL for e in engine.log) <= log_level
    assert not engine.scheduler.hash.touched and not engine.scheduler.sequences


@pytest.mark.parametrize("placement", ["fastdecode", "neo", "apex"])
def test_a_placement_on_the_host_without_host_memory_is_refused(placement: str) -> None:
    with pytest.raises(ConfigError, match=f"num_host_blocks=0: placement='{placement}' keeps KV in host memory"):
        Engine(EngineConfig(model="llama-2-7b", executor="sim", hardware="t4", placement=placement, num_host_blocks=0))
    assert Engine(EngineConfig(model="llama-2-7b", executor="sim", hardware="t4", placement="gpu_only", num_host_blocks=0))
