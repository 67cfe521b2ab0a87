"""Items over some of the layers: a prompt that goes through the model in two steps yields what it yields in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_util import Oracle, greedy, write_model

from llmlab.execution.base import Row, StepBatch
from llmlab.execution.torch_executor import KVCache, TorchExecutor
from llmlab.models.loader import load_model
from llmlab.types import ItemResult, Request, Span, StepPlan, WorkItem

PROMPT, OTHER = (5, 17, 40, 8, 33), (61, 2, 9)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    directory = tmp_path_factory.mktemp("layers")
    return Oracle(directory, write_model(directory))


class Bench:
    """An executor driven by hand: each request has two blocks of eight positions."""

    def __init__(self, directory: Path, kernels: str) -> None:
        loaded = load_model(directory, kernels=kernels)
        self.executor = TorchExecutor(loaded, KVCache(loaded, 8, 0, 8), 8, seed=0, asynchronous=False)
        self.requests = {name: Request(name, i, prompt, greedy(8)) for i, (name, prompt) in
                         enumerate((("a", PROMPT), ("b", OTHER)))}  # fmt: skip
        self.step = 0

    def run(self, *items: WorkItem) -> tuple[ItemResult, ...]:
        tables = {"a": (3, 5), "b": (6, 1)}
        rows = tuple(Row(i, self.requests[i.request], tables[i.request][: -(-i.tokens[1] // 8)]) for i in items)
        self.step += 1
        return self.executor.submit(StepBatch(StepPlan(self.step, items), rows)).result().results


@pytest.fixture(params=["torch", "numba"])
def bench(request: pytest.FixtureRequest, oracle: Oracle) -> Iterator[Bench]:
    made = Bench(oracle.directory, request.param)
    yield made
    made.executor.close()


def item(name: str, tokens: tuple[int, int], layers: tuple[int, int] | None = None, **more: Any) -> WorkItem:
    return WorkItem(name, Span(*tokens), None if layers is None else Span(*layers), **more)


def test_a_prompt_in_two_spans_of_layers_is_the_prompt(bench: Bench, oracle: Oracle) -> None:
    """Its neighbours, over all layers, run in the same steps."""
    assert bench.run(item("a", (0, 5), (0, 1), emit="hidden"), item("b", (0, 3)))[0] == ItemResult("a")
    a, b = bench.run(item("a", (0, 5), (1, 3), inputs="embeddings"), item("b", (3, 4)))
    assert a.token_ids == tuple(oracle.greedy(PROMPT, 1)) and b.token_ids == (oracle.greedy(OTHER, 2)[1],)
    found = [*a.token_ids]
    for at in range(5, 8):
        bench.run(item("a", (at, at + 1), (0, 2), emit="hidden"))
        found += bench.run(item("a", (at, at + 1), (2, 3), inputs="embeddings"))[0].token_ids
    assert found == oracle.greedy(PROMPT, 4)


@pytest.mark.parametrize(("wrong", "reason"), [
    (item("a", (0, 5), (1, 3), inputs="embeddings"), "before layer 1"),
    (item("a", (0, 5), (0, 4), emit="hidden"), "layers 0 to 3"),
    (item("a", (0, 5), (2, 2), emit="hidden"), "layers 0 to 3"),
    (item("a", (0, 5), (0, 2)), "emit='sample'"),
    (item("a", (0, 5), (1, 3)), "inputs='ids'"),
    (item("a", (0, 5), inputs="embeddings"), "inputs='embeddings'"),
])  # fmt: skip
def test_spans_that_cannot_run_are_refused_alone(bench: Bench, oracle: Oracle, wrong: WorkItem, reason: str) -> None:
    failed, fine = bench.run(wrong, item("b", (0, 3)))
    assert reason in (failed.error or "") and fine.token_ids == tuple(oracle.greedy(OTHER, 1))


def test_hidden_states_of_other_tokens_are_not_taken(bench: Bench) -> None:
    bench.run(item("a", (0, 3), (0, 1), emit="hidden"))
    assert "tokens 0 to 5" in (bench.run(item("a", (0, 5), (1, 3), inputs="embeddings"))[0].error or "")
