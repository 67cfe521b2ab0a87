"""Rows on both tiers, for real: two threads, two KV pools, the same tokens."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import pytest
from engine_util import VOCAB, Oracle, greedy, serve, tiny_engine, tokens_of, write_model
from msgspec.structs import replace

from llmlab.events import catalog as ev
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
