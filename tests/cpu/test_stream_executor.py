"""The executor of devices with a queue, its logic exercised with a CPU as the device: buckets, graphs' inputs, tokens
that only the device knows, swaps through staging. Every token is compared with the plain executor's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_util import POISON, VOCAB, greedy, serve, tiny_engine, tokens_of, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from models_util import CASES, hf_greedy, hf_model, tiny_config

from llmlab import executors
from llmlab.execution.buckets import bucket_for, bucket_sizes
from llmlab.execution.device_line import HostLine
from llmlab.execution.stream_executor import StreamExecutor
from llmlab.execution.swap import STAGED, HostTier
from llmlab.kernels.attention_plan import plan_capacity, plan_grid
from llmlab.types import SamplingParams


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines take the CPU for a device with a queue of its own."""
    monkeypatch.setattr(executors, "device_line", lambda loaded: HostLine(loaded.device))
    yield


SAMPLING: dict[str, list[SamplingParams]] = {
    "greedy": [greedy(9), greedy(17)],
    "drawn": [SamplingParams(max_tokens=12, temperature=1.1, top_p=0.8, top_k=20, seed=3, ignore_eos=True),
              SamplingParams(max_tokens=12, temperature=0.7, min_p=0.05, ignore_eos=True)],
    "mixed": [greedy(8), SamplingParams(max_tokens=9, temperature=0.9, ignore_eos=True),
              SamplingParams(max_tokens=7, temperature=0.0, repetition_penalty=1.3, ignore_eos=True, logprobs=2)],
}  # fmt: skip


def answers(directory: Path, sampling: list[SamplingParams], **fields: Any) -> tuple[dict[str, list[list[int]]], Any]:
    engine = tiny_engine(directory, **fields)
    generator = np.random.default_rng(5)
    for i in range(7):
        prompt = generator.integers(0, VOCAB - 1, int(generator.integers(1, 30))).tolist()
        engine.add_request(prompt, sampling[i % len(sampling)], request_id=f"r{i}")
    return {name: tokens_of(output) for name, output in sorted(serve(engine).items())}, engine


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "preempting"])
def test_tokens_are_those_of_the_plain_executor(
    directory: Path, kind: str, depth: int, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"overlap_depth": depth}
    if tight:
        fields |= {"num_blocks": 16, "tiering": "swap"}
    plain, _ = answers(directory, SAMPLING[kind], **fields)
    monkeypatch.setattr(executors, "device_line", lambda loaded: HostLine(loaded.device))
    have, engine = answers(directory, SAMPLING[kind], **fields)
    assert have == plain
    assert isinstance(engine.executor, StreamExecutor)
    if kind != "mixed":
        assert engine.executor.graphs.recorded, "no step was a graph"
    if tight:
        assert any(type(event).__name__ == "KVMoved" for event in engine.log), "nothing was swapped"


@pytest.mark.usefixtures("streamed")
def test_the_compiled_kernels_run_in_graphs_too(directory: Path) -> None:
    have, engine = answers(directory, SAMPLING["greedy"], kernels="numba", overlap_depth=1)
    assert engine.executor.graphs.recorded
    assert have == answers(directory, SAMPLING["greedy"], kernels="torch", overlap_depth=1)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_half_precision_from_prompt_to_tokens(directory: Path, dtype: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, activations and KV in the formats of GPUs, swaps among them."""
    fields: dict[str, Any] = {"dtype": dtype, "kernels": kernels, "num_blocks": 16, "tiering": "swap"}
    plain, engine = answers(directory, SAMPLING["greedy"], **fields)
    assert engine.executor.describe()["dtype"] == dtype
    monkeypatch.setattr(executors, "device_line", lambda loaded: HostLine(loaded.device))
    have, engine = answers(directory, SAMPLING["greedy"], overlap_depth=1, **fields)
    assert isinstance(engine.executor, StreamExecutor) and engine.executor.graphs.recorded
    assert engine.executor.cache.layers[0][0].dtype == getattr(torch, dtype)
    assert have == plain


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("case", sorted(CASES))
def test_every_family_says_what_transformers_says(case: str, tmp_path: Path) -> None:
    reference = hf_model(tiny_config(case))
    reference.save_pretrained(tmp_path)
    engine = tiny_engine(tmp_path, overlap_depth=1)
    prompts = [[3 + i * 5 % 90 for i in range(n)] for n in (21, 1, 9)]
    names = [engine.add_request(prompt, greedy(10)) for prompt in prompts]
    done = serve(engine)
    assert isinstance(engine.executor, StreamExecutor) and engine.executor.graphs.recorded
    assert [tokens_of(done[name])[0] for name in names] == [hf_greedy(reference, prompt, 10) for prompt in prompts]


@pytest.mark.usefixtures("streamed")
def test_one_poisoned_request_fails_alone(tmp_path: Path) -> None:
    write_model(tmp_path, poisoned=True)
    engine = tiny_engine(tmp_path, overlap_depth=1)
    engine.add_request([1, 2, 3], greedy(6), request_id="good")
    engine.add_request([1, POISON, 3], greedy(6), request_id="bad")
    done = serve(engine)
    assert done["bad"].outputs[0].finish_reason == "error" and len(done["good"].outputs[0].token_ids) == 6


@pytest.mark.usefixtures("streamed")
def test_a_step_that_cannot_be_queued_fails_its_rows_and_the_engine_goes_on(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(directory, overlap_depth=1)
    engine.add_request([1, 2, 3], greedy(6), request_id="lost")
    engine.step()

    def broken(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "_launch", broken)
        engine.step()
    lost = serve(engine)["lost"]
    assert lost.outputs[0].finish_reason == "error"
    engine.add_request([1, 2, 3], greedy(6), request_id="later")
    assert len(serve_rest(engine)["later"].outputs[0].token_ids) == 6


@pytest.mark.usefixtures("streamed")
def test_where_graphs_cannot_be_recorded_steps_run_without_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: HostLine, work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    want, _ = answers(directory, SAMPLING["greedy"], overlap_depth=1)
    monkeypatch.setattr(HostLine, "capture", refuse)
    have, engine = answers(directory, SAMPLING["greedy"], overlap_depth=1)
    assert have == want and engine.executor.graphs is None
    assert [r.message for r in caplog.records if "graphs are off" in r.message]


def serve_rest(engine: Any) -> dict[str, Any]:
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return done


@pytest.mark.usefixtures("streamed")
def test_what_needs_the_host_in_its_midst_runs_synchronously(directory: Path) -> None:
    assert isinstance(tiny_engine(directory).executor, StreamExecutor)
    engine = tiny_engine(directory, speculation="ngram")
    assert not isinstance(engine.executor, StreamExecutor)
    name = engine.add_request([1, 2, 3, 1, 2, 3], greedy(8))
    assert len(serve(engine)[name].outputs[0].token_ids) == 8


@pytest.mark.usefixtures("streamed")
def test_more_requests_than_slots(directory: Path) -> None:
    engine = tiny_engine(directory, overlap_depth=1, max_num_seqs=2)
    for i in range(20):
        engine.add_request([1 + i, 2, 3], greedy(3))
    assert len(serve(engine)) == 20


@pytest.mark.usefixtures("streamed")
def test_spans_of_the_device_lie_in_order_and_inside_their_steps(directory: Path) -> None:
    _, engine = answers(directory, SAMPLING["greedy"], overlap_depth=1, log_level=4)
    spans = [event for event in engine.log if type(event).__name__ == "Span" and event.resource == "device"]
    assert len(spans) > 10
    assert all(a.start <= a.end <= b.start + 1e-6 for a, b in pairwise(spans))


# ------------------------------------------------------------------------------------------ parts
def test_buckets() -> None:
    assert bucket_sizes(1) == (1,) and bucket_sizes(3) == (1, 2, 4) and bucket_sizes(20) == (1, 2, 4, 8, 16, 24)
    assert bucket_for(5, bucket_sizes(20)) == 8 and bucket_for(25, bucket_sizes(20)) is None


@given(st.integers(1, 600))
def test_every_batch_has_a_bucket_that_wastes_little(most: int) -> None:
    sizes = bucket_sizes(most)
    assert all(a < b for a, b in pairwise(sizes)) and sizes[-1] >= most
    for rows in range(1, most + 1):
        size = bucket_for(rows, sizes)
        assert size is not None and rows <= size < rows + 8


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=64), st.sampled_from([1, 2, 8]), st.sampled_from([3, 80, 264]),
       st.sampled_from([None, 33]))  # fmt: skip
def test_no_plan_outgrows_what_a_graph_sets_aside(lens: list[int], heads: int, programs: int, window: int | None) -> None:
    room = plan_capacity(len(lens), heads, programs)
    plan = plan_grid(np.arange(len(lens) + 1), np.array(lens), heads=heads, programs=programs, tile=4, window=window)
    assert len(plan.items) <= room.items and len(plan.queue) <= room.units and plan.num_partials <= room.partials


def test_blocks_survive_a_round_trip_through_the_host() -> None:
    count = STAGED + 5
    caches = [(torch.randn(count, 2, 4, 8), torch.randn(count, 2, 4, 8)) for _ in range(3)]
    before = [(k.clone(), v.clone()) for k, v in caches]
    tier, order = HostTier(caches, count + 2, HostLine()), torch.randperm(count).tolist()
    tier.swap_out(range(count), [2 + i for i in order])
    for k, v in caches:
        k.zero_()
        v.zero_()
    tier.swap_in([2 + i for i in order], range(count))
    for pair, kept in zip(caches, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, kept, strict=True))
