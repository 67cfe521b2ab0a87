"""Rows on both tiers, for real: two threads, two KV pools, the same tokens."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from engine_util import VOCAB, Oracle, greedy, serve, tiny_engine, tokens_of, write_model
from msgspec.structs import replace

from llmlab.events import catalog as ev
from llmlab.execution.hybrid import Attend
from llmlab.seams import EngineView, Need, Placed, Rehome, RequestView
from llmlab.types import Home, WorkItem

NUM_TOKENS = 10
PROMPTS = [[(i * 31 + n * 7) % VOCAB for i in range(n)] for n in (1, 2, 5, 9, 16, 17, 30)]


def lot(view: EngineView, name: str, what: str) -> int:
    return zlib.crc32(f"{view.step} {name} {what}".encode())


class Halves:
    """Every second request lives on the host."""

    name = "halves"

    def home(self, view: EngineView, request: RequestView, need: Need) -> Home:
        return "cpu" if request.number % 2 else "device"

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Placed:
        return Placed(tuple(self.placed(view, item) for item in items), mode="halves")

    def placed(self, view: EngineView, item: WorkItem) -> WorkItem:
        return replace(item, device="cpu") if view.cpu and item.home == "cpu" and item.num_tokens == 1 else item


class TwoLanes(Halves):
    """Rows on the host form a sub-batch of their own."""

    name = "two_lanes"

    def placed(self, view: EngineView, item: WorkItem) -> WorkItem:
        return replace(super().placed(view, item), lane=int(item.home == "cpu"))


class LayerByLayer(Halves):
    """Rows on the host pass one layer a step."""

    name = "layer_by_layer"

    def placed(self, view: EngineView, item: WorkItem) -> WorkItem:
        cursor = next((r.cursor for r in view.running if r.id == item.request), 0)
        if view.cpu and item.home == "cpu" and item.num_tokens == 1 and item.emit == "sample" and view.costs:
            return item.passing(cursor, view.costs.num_layers)
        return item


class Restless(LayerByLayer):
    """Homes, lanes and modes by lot; KV moves to and fro."""

    name = "restless"

    def home(self, view: EngineView, request: RequestView, need: Need) -> Home:
        return "cpu" if lot(view, request.id, "home") % 2 else "device"

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Placed:
        moves = tuple(Rehome(r.id, "device" if r.home == "cpu" else "cpu") for r in view.running
                      if lot(view, r.id, "move") % 7 == 0)  # fmt: skip
        kept = tuple(self.placed(view, item) for item in items if lot(view, item.request, "leave") % 6)
        return Placed(kept, moves, "restless")

    def placed(self, view: EngineView, item: WorkItem) -> WorkItem:
        mode = lot(view, item.request, "mode") % 8
        if mode == 0 or not view.cpu:
            return item
        return super().placed(view, item) if mode < 5 else replace(item, device="cpu", lane=mode % 2)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    yield Oracle(directory, write_model(directory))


PLACEMENTS = {"gpu_only": "gpu_only", "fastdecode": "fastdecode", "halves": Halves(), "two_lanes": TwoLanes(),
              "layer_by_layer": LayerByLayer(), "restless": Restless()}  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", "numba"])
@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("slots", [512, 80])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_do_not_depend_on_where_they_attend(placement: str, slots: int, overlap_depth: int, kernels: str,
                                                   oracle: Oracle) -> None:  # fmt: skip
    engine = tiny_engine(oracle.directory, block_size=4, num_blocks=slots // 4, max_num_batched_tokens=24, kernels=kernels,
                         overlap_depth=overlap_depth, placement=PLACEMENTS[placement], tiering="swap")  # fmt: skip
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
    for name, prompt in zip(names, PROMPTS, strict=True):
        assert tokens_of(done[name]) == [oracle.greedy(prompt, NUM_TOKENS)], prompt
    items = [item for plan in engine.log.filter(ev.StepPlanned) for item in plan.items]
    assert any(item.device == "cpu" for item in items) == (placement != "gpu_only")


def passes(engine: Any) -> dict[str, list[tuple[int, int, int]]]:
    """(position, first, last layer) of every item that passed some layers, by request."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for plan in engine.log.filter(ev.StepPlanned):
        for item in plan.items:
            if item.layers is not None:
                found.setdefault(item.request, []).append((item.tokens[0], *item.layers))
    return found


def test_a_cursor_advances_one_layer_a_step_and_kv_is_appended_once_a_layer(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    appended: list[tuple[int, int]] = []
    store = Attend._store

    def counted(self: Attend, k: Any, v: Any) -> None:
        appended.extend((self.layer, slot) for slot in self.meta.slot_mapping.tolist())
        store(self, k, v)

    monkeypatch.setattr(Attend, "_store", counted)
    engine = tiny_engine(oracle.directory, placement=LayerByLayer(), max_num_batched_tokens=64)
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        serve(engine)
    num_layers = engine.model.shape.num_layers
    steps = passes(engine)
    assert set(steps) == {name for index, name in enumerate(names) if index % 2}
    for spans in steps.values():
        stages = [(layer, min(layer + 1, num_layers)) for layer in range(num_layers + 1)]
        positions = sorted({position for position, *_ in spans})
        assert spans == [(position, *stage) for position in positions for stage in stages]
    assert len(appended) == len(set(appended)) == num_layers * sum(len({p for p, *_ in s}) for s in steps.values())


def abort_some(engine: Any, names: list[str]) -> dict[str, Any]:
    done: dict[str, Any] = {}
    turn = 0
    while engine.has_unfinished_requests() and turn < 3000:
        done |= {output.request_id: output for output in engine.step() if output.finished}
        turn += 1
        if turn in (5, 9, 14):
            engine.abort(names[turn % len(names)])
    return done | serve(engine)


@pytest.mark.parametrize("placement", ["layer_by_layer", "restless", "two_lanes"])
@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_aborts_and_preemptions_in_mid_flight_leave_the_others_alone(placement: str, overlap_depth: int, oracle: Oracle) -> None:
    engine = tiny_engine(oracle.directory, num_blocks=11, num_host_blocks=11, max_num_batched_tokens=24, tiering="cheapest",
                         placement=PLACEMENTS[placement], overlap_depth=overlap_depth)  # fmt: skip
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = abort_some(engine, names)
    assert engine.log.filter(ev.RequestPreempted) or placement == "restless"
    for name, prompt in zip(names, PROMPTS, strict=True):
        expected = oracle.greedy(prompt, NUM_TOKENS)
        got = tokens_of(done[name])[0] if name in done else []
        assert got == expected[: len(got)] and (name not in done or done[name].outputs[0].finish_reason == "abort" or got == expected)
    assert sum(len(tokens_of(output)[0]) == NUM_TOKENS for output in done.values()) >= len(PROMPTS) - 3


@pytest.mark.parametrize("fatal", [1, 6, 12])
@pytest.mark.parametrize("placement", ["fastdecode", "layer_by_layer", "two_lanes"])
def test_a_worker_that_dies_loses_nothing(placement: str, fatal: int, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows, and what was queued behind them, are computed on the device; nothing is placed on the CPU any more."""
    attend, count = Attend.on_host, itertools.count(1)

    def dying(self: Attend) -> Any:
        if next(count) == fatal:
            raise MemoryError("the worker is shot")
        return attend(self)

    monkeypatch.setattr(Attend, "on_host", dying)
    engine = tiny_engine(oracle.directory, placement=PLACEMENTS[placement], max_num_batched_tokens=24)
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
    assert [tokens_of(done[name])[0] for name in names] == [oracle.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    (lost,) = engine.log.filter(ev.ResourceLost)
    after = [item for plan in engine.log.filter(ev.StepPlanned) if plan.seq > lost.seq for item in plan.items]
    assert after and all(item.device == "device" for item in after) and any(item.home == "cpu" for item in after)


def test_a_full_host_pool_makes_requests_wait_with_that_reason(oracle: Oracle) -> None:
    engine = tiny_engine(oracle.directory, placement="fastdecode", num_host_blocks=12, max_num_batched_tokens=64)
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
    waits = [event for event in engine.log.filter(ev.RequestWaiting) if event.reason == "host_memory"]
    assert waits and all("block" in event.detail for event in waits)
    assert [tokens_of(done[name])[0] for name in names] == [oracle.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]


class Insists(Halves):
    """Asks for the CPU whatever the view says."""

    name = "insists"

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Placed:
        return Placed(tuple(replace(item, device="cpu") for item in items))


def test_a_placement_that_asks_for_an_absent_cpu_is_replaced_and_told(oracle: Oracle) -> None:
    engine = tiny_engine(oracle.directory, placement=Insists(), num_host_blocks=0)
    with engine:
        name = engine.add_request(PROMPTS[4], greedy(NUM_TOKENS))
        done = serve(engine)
    assert tokens_of(done[name])[0] == oracle.greedy(PROMPTS[4], NUM_TOKENS)
    assert "asks for the CPU" in engine.log.filter(ev.PolicyFailed)[0].error


@pytest.mark.parametrize("placement", ["neo", "apex"])
@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_placements_that_weigh_modes_give_the_same_tokens(placement: str, overlap_depth: int, oracle: Oracle) -> None:
    engine = tiny_engine(oracle.directory, num_blocks=14, num_host_blocks=64, max_num_batched_tokens=24, placement=placement,
                         overlap_depth=overlap_depth, host="30%")  # fmt: skip
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
    assert [tokens_of(done[name])[0] for name in names] == [oracle.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    told = [d for d in engine.log.filter(ev.Decision) if d.seam == "placement"]
    assert {d.chosen for d in told} - {"gpu_only"} and all(a.predicted for d in told for a in d.alternatives)
    assert any(item.device == "cpu" for plan in engine.log.filter(ev.StepPlanned) for item in plan.items)


@pytest.mark.parametrize("placement", ["halves", "two_lanes", "restless"])
def test_trees_are_verified_beside_rows_on_the_host(placement: str, oracle: Oracle) -> None:
    """Only rows whose KV is on the device get drafts; they run apart from those on both tiers."""
    engine = tiny_engine(oracle.directory, placement=PLACEMENTS[placement], max_num_batched_tokens=64, kernels="numba",
                         speculation=str(oracle.directory), draft_tree="2x2")  # fmt: skip
    with engine:
        names = [engine.add_request(prompt, greedy(NUM_TOKENS)) for prompt in PROMPTS]
        done = serve(engine)
    assert [tokens_of(done[name])[0] for name in names] == [oracle.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    steps = [plan.items for plan in engine.log.filter(ev.StepPlanned)]
    assert any({"cpu"} <= {i.home for i in items} and any(i.mask == "tree" for i in items) for items in steps)
    assert not engine.log.filter(ev.PolicyFailed)
