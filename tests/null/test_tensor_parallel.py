"""Several simulated devices side by side: what they hold and do together is what one would, and the link between them costs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import llmlab
from llmlab.cli.app import app
from llmlab.execution.cost import RooflineCost
from llmlab.execution.tensor_parallel import SIZES, divides, group_kv_bytes, group_weight_bytes
from llmlab.replaying import replay_decisions
from llmlab.types import ConfigError, Move, Span, WorkItem
from roofline import shapes
from roofline.memory import weight_bytes
from roofline.ops import all_reduce
from roofline.precision import Precision

FP16 = Precision.parse("fp16")
MODELS = ("llama-2-7b", "llama-3.1-8b", "llama-2-70b", "mixtral-8x7b")


def cost(model: str, devices: int, hardware: str = "a100-80gb") -> RooflineCost:
    return RooflineCost(shapes.get(model), hardware, 16, "fp16", devices=devices)


def config(**fields: Any) -> llmlab.EngineConfig:
    base: dict[str, Any] = {"model": "llama-2-7b", "executor": "sim", "hardware": "a100", "tensor_parallel_size": 2, "num_blocks": 60}
    return llmlab.EngineConfig(**{**base, **fields})


def load(n: int = 30) -> llmlab.Workload:
    return llmlab.Workload.poisson(rate=100.0, n=n, prompt=(20, 200), output=(5, 60), seed=3)


@st.composite
def batches(draw: st.DrawFn) -> list[WorkItem]:
    found = []
    for i in range(draw(st.integers(1, 12))):
        start, count = draw(st.integers(0, 900)), draw(st.sampled_from((1, 1, 1, 64, 300)))
        found.append(WorkItem(f"r{i}", Span(start, start + count)))
    return found


# ------------------------------------------------------------------------------------ conservation
@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(MODELS), st.sampled_from((2, 4, 8)))
def test_what_the_devices_do_together_is_what_one_would_do(items: list[WorkItem], model: str, devices: int) -> None:
    shape, (one, group) = shapes.get(model), (cost(model, n).step(items) for n in (1, devices))
    tokens, width = sum(i.num_tokens for i in items), shape.hidden_size
    again = tokens * width * shape.num_layers * (devices - 1)  # norms, the router and sums are computed by every device
    assert one.flops <= group.flops <= one.flops + again * (20 + 2 * shape.num_experts + 2 * shape.top_k) + 20 * again
    assert one.bytes.hbm <= group.bytes.hbm
    reduced = 2 * shape.num_layers * all_reduce("x", tokens * width, FP16, devices).bytes_link
    assert group.bytes.net == pytest.approx(devices * reduced) and one.bytes.net == 0


@pytest.mark.parametrize("model", MODELS)
def test_weights_and_kv_are_shared_out(model: str) -> None:
    shape = shapes.get(model)
    for devices in (2, 4, 8):
        assert group_weight_bytes(shape, FP16, devices) == pytest.approx(weight_bytes(shape, FP16), rel=1e-9)
        assert group_kv_bytes(shape, FP16, devices) == shape.kv_bytes_per_token("fp16")
    copies = group_kv_bytes(shapes.get("qwen2.5-7b"), FP16, 4) / shapes.get("qwen2.5-7b").kv_bytes_per_token("fp16")
    assert copies == 1 and group_kv_bytes(shapes.get("deepseek-v2-lite"), FP16, 4) == 4 * shapes.get("deepseek-v2-lite").kv_bytes_per_token("fp16")
    assert group_kv_bytes(shapes.get("llama-2-70b"), FP16, 16) == 2 * shapes.get("llama-2-70b").kv_bytes_per_token("fp16")


def test_one_device_costs_what_it_did() -> None:
    shape, items = shapes.get("llama-3.1-8b"), [WorkItem("a", Span(0, 99)), WorkItem("b", Span(700, 701))]
    assert cost("llama-3.1-8b", 1).step(items) == RooflineCost(shape, "a100-80gb", 16, "fp16").step(items)


# ------------------------------------------------------------------------------------ monotonicity
@settings(max_examples=40, deadline=None)
@given(batches(), st.sampled_from(MODELS), st.sampled_from((2, 4, 8)))
def test_more_work_takes_longer_and_a_group_is_never_more_than_so_many_times_as_fast(items: list[WorkItem], model: str, devices: int) -> None:
    one, group, more = cost(model, 1), cost(model, devices), [*items, WorkItem("more", Span(400, 500))]
    assert group.step(items).seconds < group.step(more).seconds
    assert group.step(items).bytes.net < group.step(more).bytes.net
    assert one.step(items).seconds / devices <= group.step(items).seconds
    layers = group.layers()
    assert 0 < layers.collective(1) < layers.collective(4096) and one.layers().collective(4096) == 0


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-2-70b"])
def test_decoding_gets_faster_with_devices_until_the_link_is_all_there_is(model: str) -> None:
    items = [WorkItem(f"r{i}", Span(500, 501)) for i in range(8)]
    times = [cost(model, n).step(items).seconds for n in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True) and times[0] < 8 * times[-1]
    slow = [cost("llama-2-7b", n, "a10").step([WorkItem("r", Span(0, 4096))]) for n in (1, 8)]
    assert slow[1].bound == "link" and slow[0].bound == "compute"  # PCIe between the devices


def test_the_pool_is_sized_from_the_memory_of_all() -> None:
    made = [llmlab.Engine(config(num_blocks=None, hardware="a10", tensor_parallel_size=n)).scheduler.memory.pool.num_blocks for n in (1, 2, 4)]
    assert made[1] > 2 * made[0] and made[2] > 2 * made[1]  # the weights are there once
    capped = llmlab.Engine(config(num_blocks=None, hardware="a100", gpu_memory="a10")).scheduler.memory.pool.num_blocks
    assert capped == made[1]  # of each device
    with pytest.raises(ConfigError, match=r"model='llama-2-70b'.*tensor_parallel_size=2 or") as told:
        llmlab.Engine(config(model="llama-2-70b", num_blocks=None, hardware="a100-80gb", tensor_parallel_size=1))
    assert "quantization='int8'" in str(told.value)
    assert llmlab.Engine(config(model="llama-2-70b", num_blocks=None, hardware="a100-80gb")).scheduler.memory.pool.num_blocks > 100


# ------------------------------------------------------------------------------------------- runs
def test_swapping_takes_all_links_at_once() -> None:
    one, two = cost("llama-2-7b", 1), cost("llama-2-7b", 2)
    assert two.block_bytes() == one.block_bytes() and two.swap(64).bytes.d2h == one.swap(64).bytes.d2h
    assert two.swap(512).seconds == pytest.approx(one.swap(512).seconds / 2, rel=0.02)
    copy = Move("copy", "r", (1, 2), (3, 4))
    assert two.layers().move_bytes(copy) == one.layers().move_bytes(copy) and two.layers().move_seconds(copy) < one.layers().move_seconds(copy)


def test_at_level_four_the_link_is_a_resource_and_the_times_are_the_same() -> None:
    told, brief = (llmlab.run(config(log_level=level, tiering="swap"), load()) for level in (4, 2))
    assert [m.e2e for m in told.requests.values()] == pytest.approx([m.e2e for m in brief.requests.values()], rel=1e-9)
    spans = sorted((s for s in told.events("Span") if s.resource in ("device", "net")), key=lambda s: s.start)
    assert all(a.end <= b.start + 1e-12 for a, b in pairwise(spans))  # nobody goes on before the parts are added up
    step = told.steps[3]
    plan = told.events("StepPlanned", step=step.step)[0]
    own = [s for s in spans if s.step == step.step and s.resource == "net"]
    layers = cost("llama-2-7b", 2, "a100").layers()
    tokens = sum(item.num_tokens for item in plan.items)
    assert len(own) == 32 and sum(s.end - s.start for s in own) == pytest.approx(32 * layers.collective(tokens))
    assert not [s for s in llmlab.run(config(tensor_parallel_size=1, log_level=4), load(3)).events("Span") if s.resource == "net"]


@pytest.mark.parametrize("tiering", ["recompute", "swap"])
def test_a_run_of_a_group_forks_into_itself_replays_and_leaps(tiering: str, tmp_path: Any) -> None:
    run = llmlab.run(config(tiering=tiering), load())
    run.save(tmp_path / "run.jsonl.zst")
    run = llmlab.Run.load(tmp_path / "run.jsonl.zst")
    assert run.started.hardware["devices"] == 2 and any(e for e in run.events("RequestPreempted"))
    assert run.fork(run.steps[20].step).log_events[1:] == run.log_events[1:]
    assert replay_decisions(run).differences == []
    single = llmlab.run(config(tiering=tiering), load(), on_output=lambda output: None)  # without leaps
    assert [e for e in single.log_events if e.seq] == [e for e in run.log_events if e.seq]
    assert run.metrics.mfu.max < 1 and run.metrics.mbu.max < 1


def test_a_group_drafts_on_one_of_its_devices() -> None:
    from llmlab.speculating import Simulated

    run = llmlab.run(config(model="llama-3.1-8b", num_blocks=200, speculation=Simulated((0.8,), "llama-3.2-1b")), load(8))
    assert run.metrics.num_finished == 8
    alone = RooflineCost(shapes.get("llama-3.2-1b"), "a100", 16)
    plans = {e.step: e for e in run.events("StepPlanned")}
    drafted = [e for e in run.events("StepFinished") if "draft" in e.measured.parts]
    assert drafted
    for done in drafted:
        row = next(i for i in plans[done.step].items if i.propose)
        assert done.measured.parts["draft"] >= alone.step([WorkItem(row.request, Span(row.tokens[1], row.tokens[1] + 1))]).seconds


# ------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(("fields", "said"), [
    ({"tensor_parallel_size": 3}, "32 heads, 32 KV heads and a width of 11008.*Choose 2, 4, 8, 16"),
    ({"tensor_parallel_size": 8, "model": "qwen2.5-7b"}, "28 heads, 4 KV heads.*Choose 2, 4, or leave it out"),
    ({"tensor_parallel_size": 0}, "at least 1"),
    ({"tensor_parallel_size": 2.0}, "must be an integer"),
    ({"hardware": "cpu-2core"}, "no link from one cpu-2core to another"),
    ({"hardware": "epyc-1-thread.lab-s.json", "model": "lab-s"}, "was measured on one device"),
    ({"placement": "neo"}, "placement='neo'.*does not go with tensor_parallel_size=2"),
    ({"model": "mixtral-8x7b", "weights": "on_demand"}, "weights='on_demand'.*does not go with"),
    ({"model": "lab-s", "executor": "torch"}, "runs on one device.*executor='sim'"),
])  # fmt: skip
def test_what_cannot_be_shared_out_is_refused_with_the_way_out(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(llmlab.LabError, match=said):
        llmlab.Engine(config(**fields))


def test_what_is_proposed_can_be_had() -> None:
    for name in shapes.names():
        shape = shapes.get(name)
        for devices in (n for n in SIZES if divides(shape, n)):
            whole = RooflineCost(shape, "h200", 16, "bf16", devices=devices)
            assert whole.step([WorkItem("r", Span(0, 9))]).seconds > 0


def test_the_command_line_takes_it() -> None:
    words = ["sim", "--model", "llama-2-70b", "--hardware", "a100-80gb", "-n", "4", "--tensor-parallel-size", "4"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "llama-2-70b on 4 x a100-80gb" in found.output
