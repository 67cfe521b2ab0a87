"""Weights that do not all fit: the real executor gives the same tokens whatever the placement does."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from models_util import hf_greedy, hf_model, tiny_config

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.execution import offload
from llmlab.memory.weight_store import Fetch
from llmlab.scheduling.weights import LRU, WEIGHT_PLACEMENTS
from llmlab.seams import ExpertId, RoutingView, Where
from llmlab.types import ConfigError, SamplingParams

EXACT = [name for name in WEIGHT_PLACEMENTS.names() if name != "deferred"]
PROMPTS = [[3, 17, 41, 8, 60, 22, 9], [5, 5, 70, 12], [88, 2, 33, 4, 50, 61, 7, 19, 20, 3, 1]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random mixture of 3 layers with 4 experts on disk, and transformers' own model of it."""
    directory = tmp_path_factory.mktemp("mixture")
    model = hf_model(tiny_config("mixtral"))
    model.save_pretrained(directory)
    return directory, model


@functools.cache
def expected(model: Any) -> list[list[int]]:
    return [list(hf_greedy(model, prompt, 8)) for prompt in PROMPTS]


def served(directory: Path, **fields: Any) -> tuple[list[list[int]], Engine]:
    engine = Engine(model=str(directory), dtype="float32", num_blocks=64, block_size=8, max_num_batched_tokens=16, log_level=3,
                    **fields)  # fmt: skip
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    names = [engine.add_request(prompt, params) for prompt in PROMPTS]
    done: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            done[output.request_id] = list(output.outputs[0].token_ids)
    engine.close()
    return [done[name] for name in names], engine


@pytest.mark.parametrize("slots", [1, 3, 12])
@pytest.mark.parametrize("policy", EXACT)
def test_the_tokens_do_not_depend_on_where_experts_are(mixture: tuple[Path, Any], policy: str, slots: int) -> None:
    directory, model = mixture
    fields = {} if policy == "resident" else {"num_expert_slots": slots}
    tokens, engine = served(directory, weights=policy, **fields)
    assert tokens == expected(model)
    dispatched, fetched = engine.log.filter(ev.ExpertsDispatched), engine.log.filter(ev.ExpertFetched)
    if policy != "resident":
        assert {event.layer for event in dispatched} == {0, 1, 2}
        known = len({(e.layer, e.expert) for e in fetched} | {(e.layer, e.expert) for e in engine.log.filter(ev.ExpertEvicted)})
        assert known <= 12
    if policy == "on_demand":
        used = sum(len(event.fetched) for event in dispatched)
        assert len([e for e in fetched if e.reason == "demand"]) == used


def test_the_log_tells_what_is_resident(mixture: tuple[Path, Any]) -> None:
    """Fetches minus evictions never exceed the slots, and what counts as resident had been fetched or was there first."""
    _, engine = served(mixture[0], weights="lru", num_expert_slots=4)
    here: set[tuple[int, int]] = set()
    for event in engine.log.filter(ev.ExpertFetched, ev.ExpertEvicted):
        if isinstance(event, ev.ExpertEvicted):
            here.discard((event.layer, event.expert))
        else:
            here.add((event.layer, event.expert))
        assert len(here) <= 4
    assert here


def test_overlapped_steps_give_the_same_tokens(mixture: tuple[Path, Any]) -> None:
    tokens, _ = served(mixture[0], weights="balanced", num_expert_slots=3, overlap_depth=1)
    assert tokens == expected(mixture[1])


def test_deferral_changes_scores_but_ends(mixture: tuple[Path, Any]) -> None:
    tokens, engine = served(mixture[0], weights="deferred", num_expert_slots=1)
    assert [len(t) for t in tokens] == [8, 8, 8]
    assert any(event.deferred for event in engine.log.filter(ev.ExpertsDispatched))
    assert all(not event.deferred for event in engine.log.filter(ev.ExpertsDispatched) if event.layer == 2)


class Nonsense(LRU):
    """Says that everything is on the device."""

    name = "nonsense"

    def place(self, view: RoutingView) -> Mapping[int, Where]:
        return {use.expert: "device" for use in view.uses}


def test_a_policy_that_lies_is_replaced_for_that_decision(mixture: tuple[Path, Any]) -> None:
    tokens, engine = served(mixture[0], weights=Nonsense(), num_expert_slots=2)
    assert tokens == expected(mixture[1])
    failed = engine.log.filter(ev.PolicyFailed)
    assert failed and "is not on the device" in failed[0].error


def test_a_copy_that_fails_is_made_up_for_on_the_cpu(mixture: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = offload.HostExperts.to_device

    def broken(self: offload.HostExperts, unit: Any) -> Any:
        if unit.expert == 1:
            raise RuntimeError("out of memory")
        return whole(self, unit)

    monkeypatch.setattr(offload.HostExperts, "to_device", broken)
    tokens, _ = served(mixture[0], weights="on_demand", num_expert_slots=2)
    assert tokens == expected(mixture[1])


def test_a_dense_model_has_no_experts_to_place() -> None:
    with pytest.raises(ConfigError, match="no experts"):
        Engine(model="lab-xs", weights="lru")


@pytest.mark.parametrize("size", [2, 3, 6, 9])
def test_a_window_of_layers_gives_the_same_tokens(size: int) -> None:
    prompt, params = [1, 20, 75, 66, 64], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

    def tokens(**fields: Any) -> list[int]:
        with Engine(model="lab-s", dtype="float32", num_blocks=32, **fields) as engine:
            engine.add_request(prompt, params)
            while engine.has_unfinished_requests():
                outputs = engine.step()
            held = engine.executor._model.layers
            if fields:
                assert isinstance(held, offload.LayerWindow) and len(held.store.units) <= size
            return list(outputs[0].outputs[0].token_ids)

    assert tokens(layer_window=size) == tokens()


def test_a_window_reads_ahead() -> None:
    seen: list[int] = []
    window = offload.LayerWindow(5, 3, lambda index: seen.append(index) or index)  # type: ignore[func-returns-value,arg-type,return-value]
    assert [window[i] for i in (0, 1, 2, 3, 4, 0)] == [0, 1, 2, 3, 4, 0]
    window.copies.close()
    reasons = [move.reason for move in window.copies.moves]
    assert reasons[0] == "demand" and set(reasons[1:]) == {"prefetch"}, "only the first layer is waited for"
    assert seen[:7] == [0, 1, 2, 3, 4, 0, 1]


def test_the_same_kernels_run_on_either_side() -> None:
    """Packed on the device or on the CPU, an expert gives the same bits."""
    from llmlab.kernels.dispatch import make_kernels

    host = offload.HostExperts(make_kernels("numba"), make_kernels("numba"), "cpu")
    host.add_layer(torch.randn(2, 96, 40), torch.randn(2, 40, 48))
    unit, x = offload.ExpertId(0, 1), torch.randn(7, 40)
    assert torch.equal(host.to_device(unit)(x, "silu"), host.on_cpu(unit)(x, "silu"))


def test_a_copy_does_not_overtake_the_last_reader_of_its_slot() -> None:
    thread, reader = offload.CopyingThread(lambda unit: unit.expert, lambda unit: 1), Future[None]()
    ticket = thread.fetch(Fetch(ExpertId(0, 3), 0, "demand"), reader)
    assert not wait([ticket], timeout=0.2).done, "somebody still reads what lies there"
    reader.set_result(None)
    assert ticket.result(timeout=30) == 3
    thread.close()
