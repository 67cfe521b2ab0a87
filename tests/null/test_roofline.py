"""The roofline's cost model: anchors, conservation, monotonicity, the fast sum against the op list, bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline import CostModel, Efficiency, RooflineError, Rows, hardware, shapes, step_ops, transfer_seconds
from roofline.precision import Precision, canonical, dtype_bytes
from roofline.rows import segments

# Parameter counts as the published checkpoints state them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
}
SMALL = ("lab-s", "llama-3.1-8b", "opt-6.7b", "qwen3-30b-a3b", "deepseek-v2-lite")


@st.composite
def batches(draw: st.DrawFn, layers: int = 0, size: int = 6) -> Rows:
    """Ragged batches: prompts, chunks and decodes mixed; with ``layers`` > 0 also with layer spans."""
    n = draw(st.integers(1, size))
    query = [draw(st.sampled_from((1, 1, 2, 7, 64, 300))) for _ in range(n)]
    kv = [q + draw(st.sampled_from((0, 1, 30, 1000))) for q in query]
    spans = None
    if layers and draw(st.booleans()):
        starts = [draw(st.integers(0, layers - 1)) for _ in range(n)]
        spans = [(start, draw(st.integers(start + 1, layers))) for start in starts]
    return Rows(query, kv, spans)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert shapes.get(name).num_params() == PARAMETERS[name]


def test_active_parameters_of_expert_models() -> None:
    assert shapes.get("mixtral-8x7b").num_params(active=True) == 12_879_925_248
    assert 3.2e9 < shapes.get("qwen3-30b-a3b").num_params(active=True) < 3.5e9
    dense = shapes.get("llama-2-7b")
    assert dense.num_params(active=True) == dense.num_params()


def test_cache_bytes_per_token() -> None:
    assert shapes.get("llama-2-7b").kv_bytes_per_token() == 2 * 32 * 32 * 128 * 2
    assert shapes.get("llama-3.1-8b").kv_bytes_per_token("int8") == 2 * 32 * 8 * 128
    assert shapes.get("llama-3.1-8b").kv_bytes_per_token("w4a16kv8") == 2 * 32 * 8 * 128
    assert shapes.get("deepseek-v2-lite").kv_bytes_per_token() == 27 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Llama2 7B", "llama-2-7b"), ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("lab_s", "lab-s"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"), ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
    ],
)  # fmt: skip
def test_loose_spellings_are_found(spelling: str, name: str) -> None:
    assert shapes.get(spelling).name == name


def test_shape_from_a_hugging_face_configuration() -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False,
    }  # fmt: skip
    assert shapes.from_config(config).num_params() == PARAMETERS["qwen3-30b-a3b"]
    with pytest.raises(RooflineError, match="lacks num_layers"):
        shapes.from_config({"hidden_size": 8, "num_attention_heads": 1, "vocab_size": 9})


@pytest.mark.parametrize("name", [name for name in PARAMETERS if not name.startswith("opt")])
@pytest.mark.parametrize("tokens", [1, 10_000])
def test_the_op_list_reads_every_parameter_once(name: str, tokens: int) -> None:
    """One token reads the active parameters, very many read all; norms, biases and tables are no products."""
    shape = shapes.get(name)
    listed = step_ops(shape, Rows([1] * tokens, [1] * tokens))
    read = sum(op.bytes_weight * op.count for op in listed if op.kind == "linear") / 2
    want = shape.num_params(active=tokens == 1) - shape.vocab_size * shape.hidden_size
    assert read == pytest.approx(want, rel=1e-3) and read <= want
    if tokens == 1:  # two operations per parameter read
        assert sum(op.flops * op.count for op in listed if op.kind == "linear") == pytest.approx(2 * read)


def test_tensor_parallel_parts_add_up() -> None:
    shape, rows = shapes.get("llama-3.1-8b"), Rows([1, 300], [900, 300])
    whole, part = step_ops(shape, rows), step_ops(shape, rows, tp=4)
    for field in ("flops", "bytes_weight", "bytes_kv_in", "bytes_kv_out"):
        one, four = (
            sum(getattr(op, field) * op.count for op in found if op.kind in ("linear", "attention"))
            for found in (whole, part)
        )
        assert 4 * four == pytest.approx(one), field
    links = [op for op in part if op.kind == "collective"]
    assert len(links) == 2 and sum(op.count * op.bytes_link for op in links) == 32 * 2 * 1.5 * 301 * 4096 * 2


# ---------------------------------------------------------------- hardware


def test_every_number_has_a_source() -> None:
    for device in hardware.table().values():
        for field in ("memory_bytes", "bandwidth", "peak", "units", "onchip_bytes", "tdp", "links"):
            assert device.sources.get(field), (device.name, field)
        if device.cache_bandwidth is not None:
            assert device.sources.get("cache_bandwidth"), device.name


def test_device_spellings_and_prices() -> None:
    assert hardware.get("NVIDIA A100-80GB").name == "a100-80gb"
    assert hardware.get("A100").name == "a100-80gb" and hardware.get("h100").name == "h100-sxm"
    assert hardware.get("RTX 4090").name == hardware.get("4090").name == "rtx-4090"
    assert hardware.get("t4").price_per_hour is None
    assert hardware.get("t4").with_price(0.35).price_per_hour == 0.35


def test_ridge_points() -> None:
    assert hardware.get("a100-40gb").ridge() == pytest.approx(200.6, abs=0.05)
    assert hardware.get("t4").ridge("int8") == pytest.approx(130e12 / 320e9)


# ---------------------------------------------------------------- the fast sum is the op list


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(SMALL), device=st.sampled_from(("t4", "h200", "a100-40gb")))
def test_step_equals_the_sum_over_its_op_list(data: st.DataObject, name: str, device: str) -> None:
    shape = shapes.get(name)
    model = CostModel(shape, device, tp=data.draw(st.sampled_from((1, 2))))
    rows = data.draw(batches(layers=shape.num_layers))
    step, listed = model.step(rows), model.ops(rows)
    costs = [(model.op_cost(op), op.count) for op in listed]
    assert step.seconds == pytest.approx(sum(c.seconds * n for c, n in costs), rel=1e-9)
    assert step.joules == pytest.approx(model.tp * sum(c.joules * n for c, n in costs), rel=1e-9)
    assert step.flops == pytest.approx(model.tp * sum(c.op.flops * n for c, n in costs), rel=1e-9)
    assert step.bytes_hbm == pytest.approx(model.tp * sum(c.op.bytes * n for c, n in costs), rel=1e-9)
    assert step.bytes_link == pytest.approx(model.tp * sum(c.op.bytes_link * n for c, n in costs), rel=1e-9)
    assert sum(c.seconds for c in step.per_op()) <= step.seconds * (1 + 1e-9)
    assert model.step(rows) == step  # asked twice, answered alike


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(("lab-s", "llama-3.1-8b", "opt-6.7b")))
def test_layer_spans_add_up_to_the_whole(data: st.DataObject, name: str) -> None:
    """Running layers 0..k, then k..L of the same rows computes and moves what one step does."""
    shape = shapes.get(name)
    rows = data.draw(batches())
    k = data.draw(st.integers(1, shape.num_layers - 1))
    lower = Rows(rows.query, rows.kv, [(0, k)] * len(rows))
    upper = Rows(rows.query, rows.kv, [(k, shape.num_layers)] * len(rows))
    model = CostModel(shape, "a10")
    whole, a, b = model.step(rows), model.step(lower), model.step(upper)
    assert a.flops + b.flops == pytest.approx(whole.flops, rel=1e-9)
    assert a.bytes_hbm + b.bytes_hbm == pytest.approx(whole.bytes_hbm, rel=1e-9)
    assert a.seconds + b.seconds == pytest.approx(whole.seconds, rel=1e-9)


def test_segments_follow_the_active_rows() -> None:
    rows = Rows([1, 4, 2], [9, 4, 6], [(0, 6), (2, 4), (4, 6)])
    found = [(part.start, part.stop, part.rows.tokens) for part in segments(rows, 6)]
    assert found == [(0, 2, 1), (2, 4, 5), (4, 6, 3)]


def test_an_empty_batch_costs_nothing() -> None:
    step = CostModel("lab-s", "t4").step(Rows([], []))
    assert step.seconds == step.flops == step.joules == 0


# ---------------------------------------------------------------- conservation and monotonicity


@pytest.mark.parametrize("chunks", [2, 4, 16])
def test_a_chunked_prompt_equals_the_whole_up_to_weights_and_cache_read_again(chunks: int) -> None:
    shape, n, precision = shapes.get("llama-3.1-8b"), 2048, Precision.parse("fp16")
    size = n // chunks
    whole = step_ops(shape, Rows([n], [n], logits=1))
    parts = [
        op for i in range(chunks) for op in step_ops(shape, Rows([size], [(i + 1) * size], logits=int(i == chunks - 1)))
    ]

    def total(found: list, field: str) -> float:
        return sum(getattr(op, field) * op.count for op in found)

    for field in ("flops", "bytes_in", "bytes_out", "bytes_kv_out"):
        assert total(parts, field) == pytest.approx(total(list(whole), field), rel=1e-12), field
    per_token = shape.kv_bytes_per_token()
    read_again = sum((i + 1) * size for i in range(chunks)) - n
    assert total(parts, "bytes_kv_in") - total(list(whole), "bytes_kv_in") == pytest.approx(read_again * per_token)
    layer_weights = sum(op.bytes_weight * op.count for op in whole if op.kind == "linear" and op.first_layer >= 0)
    extra = total(parts, "bytes_weight") - total(list(whole), "bytes_weight")
    assert extra == pytest.approx((chunks - 1) * layer_weights)
    assert precision.kv_bytes * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers == per_token


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(SMALL))
def test_more_work_never_costs_less(data: st.DataObject, name: str) -> None:
    """One more row, or a longer context, raises operations, bytes, joules and (tiles apart) seconds."""
    model = CostModel(name, "a100-80gb", efficiency=Efficiency(tile_side=0))
    rows = data.draw(batches())
    more = Rows([*rows.query, 1], [*rows.kv, 17])
    longer = Rows(rows.query, [kv + 128 for kv in rows.kv])
    base = model.step(rows)
    for other in (model.step(more), model.step(longer)):
        assert other.seconds >= base.seconds * (1 - 1e-12)
        assert other.flops > base.flops and other.bytes_hbm > base.bytes_hbm
        assert other.joules >= base.joules * (1 - 1e-12)


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from(("linear_compute", "linear_memory", "attention_memory", "elementwise_memory")))
def test_a_better_efficiency_never_costs_time(rows: Rows, field: str) -> None:
    worse = CostModel("llama-3.1-8b", "l4", efficiency=Efficiency(**{field: 0.5}))
    better = CostModel("llama-3.1-8b", "l4", efficiency=Efficiency(**{field: 0.95}))
    assert better.step(rows).seconds <= worse.step(rows).seconds


def test_power_stays_within_the_tdp_and_decode_below_prefill() -> None:
    for device in hardware.names():
        model = CostModel("llama-3.1-8b", device)
        decode, prefill = model.step(Rows.decode(1, 512)), model.step(Rows.prefill(2048))
        tdp = model.hardware.tdp
        assert decode.joules / decode.seconds < prefill.joules / prefill.seconds <= tdp * (1 + 1e-9)


def test_explicit_experts_and_pairs_are_used() -> None:
    model = CostModel("mixtral-8x7b", "h100-sxm")
    one = model.step(Rows([4], [100], experts=2))
    all_ = model.step(Rows([4], [100], experts=8))
    assert all_.bytes_hbm - one.bytes_hbm > 5.9 * 32 * 3 * 4096 * 14336 * 2
    block = CostModel("lab-s", "t4").step(Rows([8], [64], pairs=[8 * 64]))
    causal = CostModel("lab-s", "t4").step(Rows([8], [64]))
    assert block.flops - causal.flops == pytest.approx(6 * 28 * 4 * (4 * 32 + 5))  # 28 pairs are masked causally


def test_rows_on_several_devices_split() -> None:
    rows = Rows([1, 5, 1], [7, 5, 9], devices=["gpu", "cpu", "gpu"])
    parts = rows.split()
    assert list(parts) == ["gpu", "cpu"]
    assert parts["gpu"].kv == [7, 9] and parts["cpu"].query == [5]


def test_layer_seconds_add_up_to_the_step() -> None:
    model = CostModel("llama-2-7b", "t4")
    rows = Rows.decode(16, 600)
    layer = model.layer_seconds(rows)
    edges = model.step(rows).seconds - 32 * (layer.linear + layer.attention)
    listed = sum(model.op_cost(op).seconds for op in model.ops(rows) if op.first_layer < 0)
    assert edges == pytest.approx(listed)


def test_small_weights_are_read_from_the_cache() -> None:
    device = hardware.get("cpu-2core")
    assert CostModel("lab-s", device).bandwidth == device.cache_bandwidth
    assert CostModel("llama-2-7b", device).bandwidth == device.bandwidth


def test_transfers() -> None:
    model = CostModel("llama-2-7b", "t4")
    link = model.hardware.links["host"]
    assert model.transfer_seconds(15.75e9) == pytest.approx(1 + link.latency)
    assert transfer_seconds(0, link) == 0
    assert model.kv_bytes(10) == 10 * 524288


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: shapes.get("lama-2-7"), "nearest names are llama-2-7b"),
        (lambda: hardware.get("a1000"), "unknown hardware 'a1000'.*a100"),
        (lambda: CostModel("lab-s", "t4", "bf16"), "t4 has no bf16 unit; it has fp32, fp16"),
        (lambda: CostModel("lab-s", "t4", "fp17"), "unknown dtype 'fp17'.*fp16"),
        (lambda: CostModel("lab-s", "t4", mode="fast"), "mode must be"),
        (lambda: CostModel("lab-s", "t4", tp=9), "tp must lie in 1..4"),
        (lambda: CostModel("lab-s", "t4").transfer_seconds(-1), "num_bytes must be .* at least 0, got -1"),
        (lambda: CostModel("lab-s", "t4").transfer_seconds(1, "bus"), "no link 'bus'; it has host"),
        (lambda: Rows([0], [3]), r"query\[0\] must be at least 1"),
        (lambda: Rows([4], [3]), r"kv\[0\] = 3 must be at least query\[0\] = 4"),
        (lambda: Rows([4], [3, 1]), "kv has 2 entries for 1 rows"),
        (lambda: Rows([4], [4], logits=5), r"logits must lie in 0..4"),
        (lambda: Rows([4], [4], experts=-1), "experts must be at least 0"),
        (lambda: Rows([4], [4], pairs=[17]), r"pairs\[0\] must lie in 0..16"),
        (lambda: Rows([4], [4], layers=[(2, 2)]), "half-open span"),
        (lambda: CostModel("lab-s", "t4").step(Rows([4], [4], [(0, 7)])), "beyond the model's 6 layers"),
        (lambda: Efficiency(linear_compute=1.2), r"linear_compute must lie in \(0, 1\]"),
        (lambda: Efficiency(launch=-1.0), "launch must be"),
        (lambda: hardware.Link(-1), "link bandwidth"),
        (lambda: Precision.of_bits(-4, 16, 16), "weight_bits must lie in"),
    ],
)  # fmt: skip
def test_bad_input_names_the_field_the_value_and_the_way_out(call, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RooflineError, match=text):
        call()


def test_dtype_names() -> None:
    assert canonical("torch.float16") == "fp16" and dtype_bytes("int4") == 0.5
    assert Precision.parse("w4a16").linear_format == "fp16"
    assert Precision.parse("w8a8kv8").linear_format == "int8"
    assert Precision.parse("w4a16kv8").kv_bytes == 1
    assert Precision.parse("fp8").attention_format == "fp16"


def test_importing_the_cost_model_loads_neither_torch_nor_llmlab_nor_altair() -> None:
    code = (
        "import sys, roofline; roofline.CostModel('lab-s','t4').step(roofline.Rows.decode(2, 9));"
        "print([m for m in ('torch','llmlab','altair','numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
