"""The whole engine on a GPU: against transformers, with and without graphs, swapping, and for a long time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_util import VOCAB, Oracle, greedy, serve, tiny_engine, tokens_of, write_model
from models_util import CASES, hf_greedy, hf_model, tiny_config

from llmlab.execution.stream_executor import StreamExecutor
from llmlab.types import SamplingParams

ON_GPU: dict[str, Any] = {"device": "cuda", "kernels": "auto", "dtype": "float32", "overlap_depth": 1, "log_level": 2}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    path = tmp_path_factory.mktemp("tiny")
    return Oracle(path, write_model(path))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCAB - 1, (int(n),), generator=generator).tolist() for n in torch.randint(1, 30, (count,), generator=generator)]


def answers(oracle: Oracle, params: SamplingParams, graphs: bool = True, **fields: Any) -> list[list[int]]:
    engine = tiny_engine(oracle.directory, **{**ON_GPU, **fields})
    assert isinstance(engine.executor, StreamExecutor)
    if not graphs:
        engine.executor.graphs = None
    names = [engine.add_request(prompt, params) for prompt in prompts(9)]
    done = serve(engine)
    assert not graphs or engine.executor.graphs is None or engine.executor.graphs.recorded
    return [tokens_of(done[name])[0] for name in names]


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_are_those_of_transformers(oracle: Oracle, depth: int) -> None:
    assert answers(oracle, greedy(20), overlap_depth=depth) == [oracle.greedy(p, 20) for p in prompts(9)]


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_family_says_what_transformers_says(case: str, tmp_path: Path) -> None:
    reference = hf_model(tiny_config(case))
    reference.save_pretrained(tmp_path)
    engine = tiny_engine(tmp_path, **ON_GPU)
    names = [engine.add_request(prompt, greedy(10)) for prompt in prompts(5)]
    done = serve(engine)
    assert [tokens_of(done[name])[0] for name in names] == [hf_greedy(reference, prompt, 10) for prompt in prompts(5)]


@pytest.mark.parametrize("params", [greedy(20), SamplingParams(max_tokens=20, temperature=0.9, top_p=0.8, seed=1, ignore_eos=True)])
def test_graphs_change_no_token(oracle: Oracle, params: SamplingParams) -> None:
    assert answers(oracle, params) == answers(oracle, params, graphs=False)


def test_swapping_changes_no_token(oracle: Oracle) -> None:
    assert answers(oracle, greedy(20), num_blocks=20, tiering="swap") == answers(oracle, greedy(20))


@pytest.mark.slow
def test_memory_does_not_grow_over_many_steps(oracle: Oracle) -> None:
    engine = tiny_engine(oracle.directory, **{**ON_GPU, "log_level": 0, "check_interval": 0, "max_num_seqs": 4})
    seen = []
    for turn in range(4):
        for prompt in prompts(9) * 50:
            engine.add_request(prompt, greedy(30))
        while engine.has_unfinished_requests():
            engine.step()
        if turn:
            seen.append(torch.cuda.memory_allocated())
    assert engine.metrics.num_steps > 10_000, engine.metrics.num_steps
    assert max(seen) <= seen[0] + (1 << 20)


def test_a_budget_imitates_a_smaller_card(oracle: Oracle) -> None:
    assert Path(oracle.directory).exists()
    small = tiny_engine(oracle.directory, **{**ON_GPU, "num_blocks": None, "gpu_memory": "2GiB", "max_num_seqs": 4096})
    assert small.scheduler.memory.pool.num_blocks > 0
