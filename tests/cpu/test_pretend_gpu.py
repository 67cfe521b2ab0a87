"""Engines on a CUDA device that is not there (`pretend_gpu`): every line of the path that only a GPU takes runs, with the devices,
shapes and dtypes that it would have; numbers are zeros. What is proven is what the host does: where it waits, what it copies and
how, in which queue, and which kernels it launches with what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from engine_util import greedy
from pretend_gpu import PretendGpu, pretend_gpu

from llmlab import Engine, SamplingParams
from llmlab.events import catalog as ev
from llmlab.execution.device_line import CudaLine
from llmlab.execution.hybrid import Copy, Link
from llmlab.execution.stream_executor import StreamExecutor
from llmlab.execution.swap import STAGED, HostTier
from llmlab.kernels.capability import capability_of

GREEDY = greedy(9)
DRAWN = SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, top_k=20, ignore_eos=True)


@pytest.fixture(params=["t4", "h200"])
def card(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gpu(card: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    with pretend_gpu(capability_of(card), monkeypatch) as found:
        yield found


def engine_of(model: str = "lab-xs", **fields: Any) -> Engine:
    return Engine(**{"model": model, "random_weights": True, "device": "cuda", "overlap_depth": 1, "max_num_seqs": 8,
                     "max_num_batched_tokens": 256, "max_model_len": 256, "check_interval": 1, "kernels": "triton", **fields})  # fmt: skip


def serve(engine: Engine, params: SamplingParams = GREEDY, lengths: tuple[int, ...] = (3, 70, 40, 100, 9)) -> Engine:
    """Answer prompts of these lengths; every one must come to its end."""
    for i, length in enumerate(lengths):
        engine.add_request([(7 * i + t) % 300 for t in range(length)], params)
    ended = []
    while engine.has_unfinished_requests():
        ended += [output for output in engine.step() if output.finished]
    assert len(ended) == len(lengths)
    failed = [e.detail for e in engine.log.filter(ev.RequestFinished) if e.reason == "error"]
    assert not failed, failed[0]
    return engine


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_host_waits_for_tokens_alone(gpu: PretendGpu, params: SamplingParams) -> None:
    engine = engine_of()
    assert isinstance(engine.executor, StreamExecutor)
    serve(engine, params)  # graphs are recorded
    began = len(gpu.noted)
    steps = engine.metrics.num_steps
    serve(engine, params)
    steps = engine.metrics.num_steps - steps
    assert gpu.all("replay", began) and not gpu.all("record graph", began)
    assert [n.detail for n in gpu.all("copy", began) if n.detail.waits] == []
    assert gpu.all("read", began) == []
    assert [n.detail for n in gpu.all("wait", began)] == ["event"] * steps


def test_graphs_are_recorded_on_one_queue_beside_and_after_the_main_one(gpu: PretendGpu) -> None:
    engine = engine_of()
    made = len(gpu.all("new stream"))
    serve(engine)
    serve(engine, DRAWN)
    assert len(gpu.all("record graph")) > 1 and len(gpu.all("new stream")) == made == 2
    recorded = {noted.stream for noted in gpu.launches_of("attend") if noted.stream != "main"}
    assert len(recorded) == 1, "warm-up and recording share a queue: libraries keep a workspace for each"
    (aside,) = recorded
    for at, noted in enumerate(gpu.noted):
        if noted.what == "record graph":
            before = [n for n in gpu.noted[:at] if n.what == "wait stream"][-2:]
            assert [(n.stream, n.detail) for n in before] == [(aside, "main"), ("main", aside)]
            assert noted.detail == "thread_local", "other threads may use the device"
    graphs = [n.detail for n in gpu.all("launch") if n.detail.recorded]
    warm = [n.detail for n in gpu.all("launch") if n.stream == aside and not n.detail.recorded]
    assert {k.specialization for k in graphs} <= {k.specialization for k in warm}, "a kernel is compiled while a graph is recorded"


def test_swapped_blocks_are_copied_beside_the_main_queue_in_the_right_order(gpu: PretendGpu) -> None:
    engine = serve(engine_of(num_blocks=16, tiering="swap"), greedy(40))
    assert engine.log.filter(ev.KVMoved)
    down = [at for at, n in enumerate(gpu.noted) if n.what == "copy" and not n.detail.up and n.stream != "main"]
    up = [at for at, n in enumerate(gpu.noted) if n.what == "copy" and n.detail.up and n.stream != "main"]
    assert down and up and not any(gpu.noted[at].detail.waits for at in [*down, *up])
    copies = gpu.noted[down[0]].stream
    for at in (*down, *up):
        before = [n for n in gpu.noted[:at] if n.what == "wait event" and n.stream == copies]
        assert before and gpu.noted[before[-1].detail].stream == "main", "a copy that waits for nothing"
    for at in up:
        after = next(n for n in gpu.noted[at:] if n.what == "wait event" and n.stream == "main")
        assert after.detail > at and gpu.noted[after.detail].stream == copies, "blocks are used before they have arrived"


@pytest.mark.parametrize(("model", "fields"), [
    ("lab-xs", {"quantization": "int4"}), ("lab-xs", {"quantization": "int8"}), ("lab-xs", {"kernels": "torch"}), ("lab-moe", {}),
    ("lab-xs", {"num_blocks": 16, "speculation": "ngram", "tiering": "swap"}), ("lab-xs", {"decoding": "verified"}),
    ("lab-xs", {"placement": "apex", "num_blocks": 16}), ("lab-xs", {"placement": "neo", "num_blocks": 16}),
    ("lab-moe", {"weights": "lru", "num_expert_slots": 8}),
], ids=str)  # fmt: skip
def test_every_way_of_running_works_with_tensors_on_two_devices(gpu: PretendGpu, model: str, fields: dict[str, Any], card: str) -> None:
    if fields.get("kernels") == "torch" and card == "h200":
        pytest.skip("once is enough")
    serve(engine_of(model, **{"kernels": "triton", "overlap_depth": 0, **fields}), greedy(20))


@pytest.mark.parametrize("card", ["h200"])
def test_staging_is_not_written_again_before_it_was_copied(gpu: PretendGpu) -> None:
    caches = [(torch.zeros(64, 2, 16, 8, device="cuda"), torch.zeros(64, 2, 16, 8, device="cuda"))]
    tier, began = HostTier(caches, 64, CudaLine(torch.device("cuda"))), len(gpu.noted)
    tier.swap_out(range(STAGED + 2), range(STAGED + 2))
    told = list(enumerate(gpu.noted))[began:]
    gathers = [at for at, n in told if n.what == "gather"]
    copied = [at for at, n in told if n.what == "copy" and not n.detail.up]
    second = next(at for at in gathers if at > copied[0])
    waited = [n.detail for at, n in told if n.what == "wait event" and n.stream == "main" and at < second]
    assert waited and max(waited) > max(at for at in copied if at < second), "the second gather waits for the first copies"


@pytest.mark.parametrize("card", ["h200"])
def test_the_pool_leaves_room_for_experts_to_come_and_takes_what_loading_left(gpu: PretendGpu) -> None:
    def blocks(slots: int, reserved: int = 0) -> int:
        gpu.free, gpu.total, gpu.reserved = 700 << 20, 700 << 20, reserved
        engine = engine_of("lab-moe", weights="lru", num_expert_slots=slots, overlap_depth=0, max_num_seqs=4096)
        return engine.scheduler.memory.pool.num_blocks

    few = blocks(4)
    shape = engine_of("lab-moe", weights="lru", num_expert_slots=4, overlap_depth=0).model.shape
    each = 3 * shape.hidden_size * shape.moe_intermediate_size * 2 / (16 * shape.kv_bytes_per_token("bf16"))
    assert few - blocks(12) == pytest.approx(8 * each, abs=1) and each > 1
    assert blocks(4, reserved=100 << 20) == few


@pytest.mark.parametrize("card", ["h200"])
def test_the_pool_leaves_room_for_a_draft_model_and_its_kv(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab import backends, executors
    from llmlab.models.loader import shape_of

    monkeypatch.setattr(executors, "_real_drafting", lambda setup, config: executors.Redraft(None))  # what is sized, not how it drafts
    gpu.free = gpu.total = 800 << 20
    made = {name: engine_of("lab-s", speculation=name, max_num_seqs=4096, overlap_depth=0) for name in ("ngram", "lab-xs")}
    blocks = {name: engine.scheduler.memory.pool.num_blocks for name, engine in made.items()}
    draft, block = shape_of("lab-xs"), 16 * made["ngram"].model.shape.kv_bytes_per_token("bf16")
    room = blocks["ngram"] * block - 2 * draft.num_parameters()
    assert blocks["lab-xs"] == pytest.approx(room / (block + 16 * 4 * draft.num_layers * draft.kv_size), abs=2)
    assert backends.DraftBytes() == (0.0, 0.0)


@pytest.mark.parametrize("card", ["h200"])
def test_kv_on_its_way_to_the_host_is_gathered_beside_the_main_queue_and_after_what_wrote_it(gpu: PretendGpu) -> None:
    link = Link(torch.device("cuda"))
    device, host = (tuple(torch.zeros(4, 2, 16, 8, device=place) for _ in range(2)) for place in ("cuda", "cpu"))
    blocks, began = torch.tensor([1, 2]), len(gpu.noted)
    Copy("out", device, host, blocks, blocks, link, link.mark()).on_host()  # type: ignore[arg-type]
    told = [(n.what, n.stream) for n in gpu.noted[began:] if n.what != "copy"]
    beside = told[1][1]
    assert told == [("event", "main"), ("wait event", beside), ("gather", beside), ("gather", beside), ("wait", beside)] != "main"
    assert {n.stream for n in gpu.all("copy", began)} == {beside}


@pytest.mark.parametrize("card", ["h200"])
def test_memory_of_fetched_experts_waits_for_the_queue_that_reads_them(gpu: PretendGpu) -> None:
    engine = engine_of("lab-moe", weights="lru", num_expert_slots=8, overlap_depth=0)
    serve(engine, greedy(4), (9,))
    told = gpu.all("record stream")
    assert told and {n.detail for n in told} == {"main"}


def test_variants_of_kernels_are_chosen_by_name_and_told(gpu: PretendGpu, card: str) -> None:
    engine = serve(engine_of(kernels="triton+one-max@2+rows@2+flat@8"))
    ran = {launch.function.__name__ for launch in gpu.launches()}
    around_one = {launch.arguments["phi"] for launch in gpu.launches() if launch.function.__name__ == "attend" and launch.arguments["UNIFIED"]}
    large = card == "h200"
    assert "row_linear" in ran and ("flat_linear" in ran) == large
    assert around_one == ({2.0 / math.log(2)} if large else set())
    assert "sums in registers up to 2 rows" in engine.chosen and ("one maximum, 2" in engine.chosen) == large


def test_forked_answers_copy_their_last_block(gpu: PretendGpu) -> None:
    engine = engine_of()
    engine.add_request(list(range(40)), SamplingParams(n=3, max_tokens=6, temperature=1.0, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert not [e for e in engine.log.filter(ev.RequestFinished) if e.reason == "error"]


def test_a_bucket_without_memory_runs_without_a_graph_and_the_others_with_one(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch,
                                                                              caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    engine = engine_of()
    capture = type(engine.executor.line).capture  # type: ignore[attr-defined]
    tried = []

    def once(self: Any, work: Any) -> Any:
        tried.append(work)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return capture(self, work)

    monkeypatch.setattr(type(engine.executor.line), "capture", once)  # type: ignore[attr-defined]
    serve(engine)
    serve(engine, greedy(5), (4,))
    assert len(tried) > 1 and engine.executor.graphs is not None and engine.executor.graphs.recorded  # type: ignore[attr-defined]
    assert [r for r in caplog.records if "no memory for a graph" in r.message]


def test_the_pool_leaves_room_and_the_host_tier_is_no_larger_than_the_host(gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab import backends

    monkeypatch.setattr(backends, "free_host_bytes", lambda: float(1 << 21))
    engine = engine_of(tiering="swap", max_num_seqs=64)
    memory = engine.scheduler.memory
    block = memory.block_size * engine.model.shape.kv_bytes_per_token("fp16")
    told = next(iter(engine.log.filter(ev.RunStarted))).config["num_host_blocks"]
    assert 0 < told < memory.pool.num_blocks and told * block <= 1 << 20


@pytest.mark.parametrize("card", ["h200"])
def test_launches_of_a_large_model_are_aligned_and_few_kinds(gpu: PretendGpu) -> None:
    """Each kind is compiled once, when it first comes: they must not multiply with lengths and batches."""
    engine = engine_of("llama-3.1-8b", max_model_len=2048, max_num_batched_tokens=2048, max_num_seqs=4)
    for lengths in ((700,), (5, 300), (33, 40, 1200)):
        serve(engine, greedy(3), lengths)
    kinds: dict[str, set[Any]] = {}
    for launch in gpu.launches():
        offsets = {name: launch.arguments[name].storage_offset() for name in ("items", "queue", "starts", "merges") if name in launch.arguments}
        assert not any(offset * 4 % 16 for offset in offsets.values()), f"{launch.function.__name__}: {offsets}"
        kinds.setdefault(launch.function.__name__, set()).add(launch.specialization)
    assert {name: len(found) for name, found in kinds.items() if len(found) > (4 if name == "attend" else 2)} == {}
