"""The roofline's tools: LLM-Viewer's formulas, fit, memory planner, energy, lenses, charts."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roofline import (
    CostModel,
    Efficiency,
    PowerModel,
    RooflineError,
    Rows,
    charts,
    energy,
    fit,
    hardware,
    memory,
    shapes,
)
from roofline import lenses as lens
from roofline import llm_viewer as viewer
from roofline.cost import turning_rows, turning_rows_limit
from roofline.precision import Precision

VIDUR = Path(__file__).parents[3] / "shared" / "data" / "vidur_mlp"
LLAMA = shapes.get("llama-2-7b")
DEVICES = {"a100": "a100-80gb", "a40": "a40", "h100": "h100-sxm"}

# ---------------------------------------------------------------- LLM-Viewer, number for number


def by_hand(b: int, s: int, w: float, a: float, k: float, stage: str, flash: bool) -> dict[str, tuple[float, ...]]:
    """The tool's table for Llama-2-7B, written out: name -> (operations, weights, read, written, kv in, kv out)."""
    d, heads, kv_heads, f, vocab = 4096, 32, 32, 11008, 32000
    h, t = d // heads, b if stage == "decode" else b * s
    q = 1 if stage == "decode" else s
    out: dict[str, tuple[float, ...]] = {}
    for name, ic, oc in (
        ("q_proj", d, d), ("out_proj", d, d), ("gate_proj", d, f), ("up_proj", d, f), ("down_proj", f, d),
    ):  # fmt: skip
        out[name] = (2 * ic * oc * t, ic * oc * w, ic * t * a, oc * t * a, 0, 0)
    for name in ("k_proj", "v_proj"):
        oc = d * kv_heads // heads
        out[name] = (2 * d * oc * t, d * oc * w, d * t * a, 0, 0, oc * t * k)
    if flash:
        passes = ceil(q / min(ceil(27.65e6 / (k * h)), h))
        ops = 2 * (2 * q * s * h * heads * b) + 5 * b * heads * s * q
        out["fused_attention"] = (
            ops,
            0,
            q * h * b * heads * a,
            2 * q * s * b * heads * a,
            passes * s * h * b * heads * k * 2,
            0,
        )
    else:
        query = h * heads * b * a if stage == "decode" else s * h * kv_heads * b * a
        cache = s * h * kv_heads * b * k
        out["qk_matmul"] = (2 * q * s * h * heads * b, 0, query, q * s * heads * b * a, cache, 0)
        out["sv_matmul"] = (2 * q * h * s * heads * b, 0, q * s * heads * b * a, q * h * heads * b * a, cache, 0)
        out["softmax"] = (5 * b * heads * s * q, 0, b * heads * s * q * a, b * heads * s * q * a, 0, 0)
    for name in ("attn_norm", "mlp_norm"):
        out[name] = (7 * t * d, 0, t * d * a, t * d * a, 0, 0)
    for name in ("attn_add", "mlp_add"):
        out[name] = (t * d, 0, t * d * a, t * d * a, 0, 0)
    out["mlp_act"] = (2 * t * d, 0, 2 * t * d * a, t * d * a, 0, 0)
    out["lm_head"] = (b * d * vocab, d * vocab * w, d * a, vocab * a, 0, 0)
    return out


@pytest.mark.parametrize("widths", [(16, 16, 16), (8, 8, 8), (4, 16, 16), (4, 4, 4), (8, 16, 8)])
@pytest.mark.parametrize("stage", ["decode", "prefill"])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("batch", "context"), [(1, 1024), (4, 300), (64, 2048)])
def test_compat_mode_repeats_the_tools_table(
    widths: tuple[int, int, int], stage: str, flash: bool, batch: int, context: int
) -> None:
    device, precision = viewer.hardware_table()["A100"], Precision.of_bits(*widths)
    mode = "llm_viewer_flash" if flash else "llm_viewer"
    model = CostModel(LLAMA, device, precision, mode=mode)
    rows = Rows.decode(batch, context) if stage == "decode" else Rows.prefill(*[context] * batch)
    want = by_hand(batch, context, widths[0] / 8, widths[1] / 8, widths[2] / 8, stage, flash)
    listed = model.ops(rows)
    got = {
        op.name: (op.flops, op.bytes_weight, op.bytes_in, op.bytes_out, op.bytes_kv_in, op.bytes_kv_out)
        for op in listed
    }
    assert got == want
    peak = 624e12 if max(widths) <= 8 else 312e12
    seconds = {name: max(row[0] / peak, sum(row[1:]) / 1555e9) for name, row in want.items()}
    total = 32 * sum(seconds[name] for name in seconds if name != "lm_head") + seconds["lm_head"]
    assert model.step(rows).seconds == pytest.approx(total, rel=1e-12)


def test_worked_anchors_of_llama_2_7b() -> None:
    """13.2 GB of weights per token: 8.5 ms on an A100-40G, 17.2 ms on an A6000; intensity 1 against a ridge of 200."""
    table = viewer.hardware_table()
    rows = Rows.decode(1, 1024)
    model = CostModel(LLAMA, table["A100"], "fp16", mode="llm_viewer")
    weights = sum(op.bytes_weight * op.count for op in model.ops(rows))
    assert weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 2 + 4096 * 32000 * 2 == 13_214_154_752
    assert weights / 1555e9 == pytest.approx(8.498e-3, rel=1e-4)
    assert weights / table["A6000"].bandwidth == pytest.approx(17.206e-3, rel=1e-4)
    q_proj = model.ops(rows)[0]
    assert 0.99 < q_proj.intensity < 1 and table["A100"].ridge("fp16") == pytest.approx(200.64, abs=0.01)
    corrected = CostModel(LLAMA, "a100-40gb", "fp16", efficiency=Efficiency.ideal())
    assert sum(op.bytes_weight * op.count for op in corrected.ops(rows)) == weights + 4096 * 2  # and one embedding row
    assert corrected.step(rows).seconds > weights / 1555e9


def test_compat_memory_is_the_tools() -> None:
    found = viewer.memory(LLAMA, 2, 1024, Precision.parse("fp16"), viewer.hardware_table()["A100"])
    assert found.weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 2
    assert found.cache == 2 * 1024 * 524288
    assert found.total == found.weights + found.cache + found.activations


def test_rows_where_linears_turn_compute_bound() -> None:
    a100 = hardware.get("a100-40gb")
    assert turning_rows_limit(Precision.parse("fp16"), a100) == pytest.approx(200.643, abs=1e-3)
    assert turning_rows_limit(Precision.parse("w4a16"), a100) == pytest.approx(50.161, abs=1e-3)
    exact = turning_rows(22016, 4096, Precision.parse("fp16"), a100)
    model = CostModel(LLAMA, a100, efficiency=Efficiency.ideal())
    assert exact == pytest.approx(213.02, abs=0.01)
    for rows, bound in ((int(exact), "memory"), (int(exact) + 1, "compute")):
        gate_up = next(op for op in model.ops(Rows.decode(rows, 8)) if op.name == "gate_up_proj")
        assert model.op_cost(gate_up).bound == bound
    assert turning_rows(64, 64, Precision.parse("fp16"), a100) == float("inf")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.step(Rows([1, 5], [9, 9])), "equal rows only"),
        (lambda m: m.step(Rows([1, 1], [9, 8])), "equal rows only"),
        (lambda m: m.layer_seconds(Rows.decode(1, 9)), "mode 'corrected'"),
        (lambda m: CostModel("mixtral-8x7b", m.hardware, mode="llm_viewer").step(Rows.decode(1, 9)), "gated dense"),
        (lambda m: CostModel(LLAMA, viewer.hardware_table()["13900k"], "int8", mode="llm_viewer"), "no int8 unit"),
    ],
)
def test_compat_mode_refuses_what_the_tool_cannot(call: Any, text: str) -> None:
    with pytest.raises(RooflineError, match=text):
        call(CostModel(LLAMA, viewer.hardware_table()["A100"], mode="llm_viewer"))


# ---------------------------------------------------------------- fit


def _profile(device: str, eff: Efficiency, noise: float = 0.0) -> list[fit.Measurement]:
    """Kernel times that the model itself would give on ``device``, with log-normal noise."""
    model = CostModel(LLAMA, device, "fp16", efficiency=eff)
    rng = np.random.default_rng(0)
    found = []
    for tokens in (1, 2, 5, 16, 40, 64, 100, 128, 200, 256, 400, 700, 1024, 2048, 4096):
        for op in model.ops(Rows([tokens], [tokens + 500])):
            if op.first_layer >= 0:
                found.append(fit.Measurement(op, model.op_cost(op).seconds * float(np.exp(noise * rng.normal()))))
    return found


def test_the_vectorised_predictor_is_the_cost_model() -> None:
    eff = Efficiency(linear_compute=0.7, attention_memory=0.4, tile_side=20, launch=3e-6, linear_start=1e-6)
    measured = _profile("h100-sxm", eff)
    assert fit.errors(measured, "h100-sxm", eff).max() < 1e-12


def test_fit_recovers_the_efficiencies_behind_the_data() -> None:
    truth = Efficiency(
        linear_compute=0.75, linear_memory=0.65, attention_compute=0.5, attention_memory=0.45, elementwise_memory=0.6,
        tile_side=24.0, launch=4e-6, linear_start=2e-6,
    )  # fmt: skip
    found = fit.fit(_profile("a100-80gb", truth, noise=0.02), "a100-80gb")
    assert found.median_error < 0.03
    for name in ("linear_compute", "linear_memory", "attention_memory", "elementwise_memory", "launch"):
        assert getattr(found.efficiency, name) == pytest.approx(getattr(truth, name), rel=0.12), name


@pytest.mark.skipif(not VIDUR.exists(), reason="Vidur's profiles are not at ../shared/data/vidur_mlp")
@pytest.mark.parametrize("gpu", DEVICES)
def test_held_out_gemm_times_of_real_gpus(gpu: str) -> None:
    """Fitted on one half of the measured kernels, the other half is predicted within 10 % (median)."""
    device = DEVICES[gpu]
    measured = fit.load_vidur(VIDUR / f"{gpu}_llama2_7b.csv")
    assert len(measured) == 4 * 1044
    first, second = fit.split_halves(measured)
    found = fit.fit(first, device)
    fitted, default = (
        float(np.median(fit.errors(second, device, eff)))
        for eff in (found.efficiency, Efficiency.default(hardware.get(device)))
    )
    ideal = float(np.median(fit.errors(second, device, Efficiency.ideal())))
    assert fitted <= 0.10 and default <= 0.25
    assert fitted < default < ideal


@pytest.mark.skipif(not VIDUR.exists(), reason="Vidur's profiles are not at ../shared/data/vidur_mlp")
def test_published_efficiencies_are_what_the_fit_gives() -> None:
    for gpu, device in DEVICES.items():
        measured = fit.load_vidur(VIDUR / f"{gpu}_llama2_7b.csv", ("linear", "elementwise"))
        again, stated = fit.fit(measured, device).efficiency, fit.published()[device]
        for name in ("linear_compute", "linear_memory", "elementwise_memory", "launch", "linear_start"):
            assert getattr(again, name) == pytest.approx(getattr(stated, name), rel=0.03), (device, name)


@pytest.mark.skipif(not VIDUR.exists(), reason="Vidur's profiles are not at ../shared/data/vidur_mlp")
def test_the_fits_report_names_the_errors() -> None:
    text = fit.report("a40", VIDUR / "a40_llama2_7b.csv")
    assert text.startswith("a40: median error on 2088 held-out kernels: fitted ") and "data sheet 3" in text


def test_fit_refuses_too_little_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(RooflineError, match="at least 8 measurements, got 1"):
        fit.fit(_profile("t4", Efficiency())[:1], "t4")
    with pytest.raises(RooflineError, match=r"seconds of .* above 0"):
        fit.Measurement(CostModel("lab-s", "t4").ops(Rows.decode(1, 3))[0], -1.0)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(RooflineError, match="num_tokens is missing"):
        fit.load_vidur(other)


# ---------------------------------------------------------------- memory


def test_plan_adds_up_and_fills_the_device() -> None:
    plan = memory.plan("llama-2-7b", "t4")
    assert plan.weights == LLAMA.num_params() * 2
    assert plan.usable == pytest.approx(0.9 * 16 * 2**30)
    used = plan.weights + plan.activations + plan.tokens * plan.kv_per_token
    assert plan.usable - plan.kv_per_token < used <= plan.usable
    assert plan.blocks(16) == plan.tokens // 16 and plan.sequences(1000) == plan.tokens // 1000


def test_what_widens_the_room() -> None:
    base = memory.plan("llama-3.1-8b", "a10")
    assert memory.plan("llama-3.1-8b", "a10", "w8a16").tokens > base.tokens
    assert memory.plan("llama-3.1-8b", "a10", "w16a16kv8").tokens == pytest.approx(2 * base.tokens, rel=1e-3)
    assert memory.plan("llama-3.1-8b", "a10", tp=2).tokens > 2 * base.tokens
    assert memory.plan("llama-3.1-8b", "a10", max_num_batched_tokens=16384).tokens < base.tokens
    assert memory.plan("llama-3.1-8b", "a10", utilization=0.95).tokens > base.tokens


def test_a_model_that_does_not_fit_says_how_much_is_missing_and_what_helps() -> None:
    with pytest.raises(memory.DoesNotFit) as caught:
        memory.plan("llama-3.1-8b", "t4")
    text = str(caught.value)
    assert "llama-3.1-8b does not fit on 1 x t4" in text and "GiB missing per device" in text
    assert "8-bit weights" in text and "tensor parallelism over 2" in text
    assert caught.value.missing == pytest.approx(0.75 * 2**30, rel=0.02)
    assert memory.plan("llama-3.1-8b", "t4", "w8a16").tokens >= 2048  # the advice holds
    assert memory.plan("llama-3.1-8b", "t4", tp=2).tokens >= 2048
    with pytest.raises(memory.DoesNotFit, match="no single lens is enough"):
        memory.plan("llama-3.1-70b", "t4", "w4a16", tp=1, utilization=0.1)


@pytest.mark.parametrize(("dtype", "tp"), [("w4a16", 4), ("fp16", 16)])
def test_two_changes_at_once_are_named_where_they_spare_devices(dtype: str, tp: int) -> None:
    with pytest.raises(memory.DoesNotFit) as caught:
        memory.plan("llama-2-70b", "t4")
    assert any(f"TensorParallel({tp})" in way and ("4-bit" in way) == (dtype == "w4a16") for way in caught.value.remedies)
    assert memory.plan("llama-2-70b", "t4", dtype, tp=tp).tokens >= 2048  # the advice holds
    assert caught.value.plan.tokens == 0 and "beyond the wall" in json.dumps(charts.memory_bar([caught.value.plan], 9).to_dict())


def test_a_cache_that_does_not_fit_says_which_smaller_load_or_lens_would() -> None:
    load = {"sequences": 8, "context": 1024}
    with pytest.raises(memory.DoesNotFit) as caught:
        memory.room_for("llama-3.1-8b", "t4", "w8a16", sequences=200, context=1024)
    assert caught.value.missing == pytest.approx(204_800 * 131_072 - caught.value.plan.free)
    with pytest.raises(memory.DoesNotFit, match=r"contexts of 433 tokens; 3 at once; 4-bit cache .*; 8-bit weights.*over 2 devices") as caught:
        memory.room_for("llama-2-7b", "t4", **load)
    memory.room_for("llama-2-7b", "t4", sequences=8, context=433)
    memory.room_for("llama-2-7b", "t4", sequences=3, context=1024)
    memory.room_for("llama-2-7b", "t4", "w8a16", **load)
    memory.room_for("llama-2-7b", "t4", tp=2, **load)
    with pytest.raises(RooflineError, match="sequences must be at least 1"):
        memory.room_for("llama-2-7b", "t4", sequences=0, context=1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: memory.plan("lab-s", "t4", utilization=0), "utilization must lie in"),
        (lambda: memory.plan("lab-s", "t4", max_num_seqs=-1), "max_num_seqs must be at least 1, got -1"),
        (lambda: memory.plan("lab-s", "t4").blocks(0), "block_size must be at least 1"),
        (lambda: memory.plan("lab-s", "t4").sequences(0), "context must be at least 1"),
    ],
)
def test_planner_bad_input(call: Any, text: str) -> None:
    with pytest.raises(RooflineError, match=text):
        call()


# ---------------------------------------------------------------- energy


def test_energy_splits_add_up() -> None:
    for tp, rows in ((1, Rows.decode(8, 700)), (2, Rows([1, 200], [90, 200])), (4, Rows.prefill(2048))):
        step = CostModel("llama-3.1-8b", "a100-80gb", tp=tp).step(rows)
        parts = energy.split(step)
        assert parts.total == pytest.approx(step.joules, rel=1e-12)
        assert (parts.link > 0) == (tp > 1)


def test_joules_per_token_fall_as_one_over_batch_until_the_ridge() -> None:
    model = CostModel("llama-2-7b", "h100-sxm")
    per_token = {b: model.step(Rows.decode(b, 16)).joules / b for b in (1, 2, 4, 512, 1024)}
    assert per_token[1] / per_token[4] == pytest.approx(4, rel=0.05)
    assert per_token[512] / per_token[1024] < 1.3


def test_a_lower_clock_is_free_for_decode_and_costs_prefill() -> None:
    model = CostModel("llama-2-7b", "h100-sxm")
    decode, prefill = model.step(Rows.decode(16, 512)), model.step(Rows.prefill(4096))
    assert energy.at_clock(decode, 1.0).joules == pytest.approx(decode.joules)
    assert energy.at_clock(decode, 1.0).seconds == decode.seconds
    assert energy.at_clock(decode, 0.6).seconds == pytest.approx(decode.seconds, rel=0.02)
    assert energy.at_clock(prefill, 0.6).seconds > 1.4 * prefill.seconds
    assert energy.best_clock(decode).clock < 1 and energy.best_clock(decode).joules < decode.joules
    watts = 0.7 * prefill.joules / prefill.seconds
    capped = energy.under_cap(prefill, watts)
    assert capped.watts <= watts and capped.seconds > prefill.seconds
    with pytest.raises(RooflineError, match="no clock meets a cap of 1 W"):
        energy.under_cap(prefill, 1)
    with pytest.raises(RooflineError, match="clock must lie in"):
        energy.at_clock(prefill, 1.5)


def test_which_stave_binds() -> None:
    model = CostModel("llama-2-7b", "a100-80gb")
    rows = Rows.decode(16, 512)
    free = energy.binding(model, rows)
    assert free.binding == "step" and free.staves["memory"] < free.staves["compute"]
    assert free.tokens_per_second == pytest.approx(16 / model.step(rows).seconds)
    site = energy.Site(groups=8, power_watts=8 * 150 * 1.2, pue=1.2)
    capped = energy.binding(model, rows, site)
    assert capped.binding == "power"
    assert capped.staves["power"] == pytest.approx(8 * 150 / capped.joules_per_token)
    doubled = energy.binding(model, rows, replace(site, pue=2.4))
    assert doubled.staves["power"] == pytest.approx(capped.staves["power"] / 2)
    assert energy.binding(model, rows, kv_tokens=100).binding == "capacity"
    assert min(capped.slack.values()) == 0
    for bad in ({"pue": 0.9}, {"groups": 0}, {"utilization": 0}, {"power_watts": -1.0}):
        with pytest.raises(RooflineError, match="site"):
            energy.Site(**bad)  # type: ignore[arg-type]
    with pytest.raises(RooflineError, match="static_fraction"):
        PowerModel(static_fraction=0.9)


# ---------------------------------------------------------------- lenses


def _case(rows: Rows, device: str = "a100-40gb", **kw: Any) -> lens.Case:
    return lens.Case.of("llama-2-7b", device, rows, **kw)


def test_a_case_without_lenses_is_the_cost_models_step() -> None:
    for rows in (Rows.decode(4, 900), Rows.prefill(700), Rows([1, 30], [70, 30])):
        got, want = _case(rows, tp=2).outcome(), CostModel("llama-2-7b", "a100-40gb", tp=2).step(rows)
        assert (got.seconds, got.flops, got.bytes, got.joules) == pytest.approx(
            (want.seconds, want.flops, want.bytes_hbm, want.joules)
        )


def test_weight_quantisation_scales_exactly_the_layers_weights() -> None:
    case = _case(Rows.decode(1, 64))
    before, after = case.ops(), lens.WeightQuant(4, group=0).after(case).ops()
    for a, b in zip(before, after, strict=True):
        share = 0.25 if a.kind == "linear" and a.first_layer >= 0 else 1.0
        assert b.bytes_weight == a.bytes_weight * share
        assert (b.flops, b.bytes_in, b.bytes_kv_in) == (a.flops, a.bytes_in, a.bytes_kv_in)


def test_four_bit_weights_speed_up_decode_and_not_prefill() -> None:
    quant = lens.WeightQuant(4)
    decode, prefill = (lens.compare(quant, _case(rows)).speedup for rows in (Rows.decode(1, 64), Rows.prefill(2048)))
    assert 2.5 < decode <= 4 and prefill == pytest.approx(1, abs=0.05)
    ideal = lens.compare(quant, _case(Rows.decode(1, 64), efficiency=Efficiency.ideal())).speedup
    assert 3.3 < ideal <= 4


def test_narrow_weights_and_activations_use_the_narrow_unit() -> None:
    both = [lens.WeightQuant(8, group=0), lens.ActivationQuant(8)]
    case = _case(Rows.prefill(4096))
    assert lens.compose(case, both).precision.linear_format == "int8"
    assert case.outcome().seconds / lens.compose(case, both).outcome().seconds > 1.5
    scaled = lens.compose(case, [lens.WeightQuant(8), lens.ActivationQuant(8)])
    assert scaled.precision.linear_format == "int8" and scaled.precision.weight_bits > 8


def test_grouped_heads_raise_attentions_intensity() -> None:
    case = _case(Rows.decode(16, 2048))
    grouped = lens.GroupedHeads(8).after(case)
    one, other = (next(op for op in c.ops() if op.kind == "attention") for c in (case, grouped))
    assert other.intensity / one.intensity == pytest.approx(4, rel=0.01)
    assert grouped.kv_per_token() == case.kv_per_token() / 4


def test_cache_bytes_exceed_weights_beyond_the_crossing() -> None:
    crossing = LLAMA.weight_bytes() / LLAMA.kv_bytes_per_token()
    for tokens, more in ((0.9 * crossing, False), (1.1 * crossing, True)):
        listed = _case(Rows.decode(16, int(tokens / 16))).ops()
        cache, weights = (sum(getattr(op, f) * op.count for op in listed) for f in ("bytes_kv_in", "bytes_weight"))
        assert (cache > weights) == more


def test_fusion_removes_the_scores_traffic_in_prefill_and_little_in_decode() -> None:
    fused = lens.FusedAttention()
    prefill, decode = (lens.compare(fused, _case(rows)) for rows in (Rows.prefill(4096), Rows.decode(16, 1024)))
    pairs = 4096 * 4097 / 2
    saved = prefill.before.bytes - prefill.after.bytes
    assert saved == pytest.approx(4 * pairs * 32 * 2 * 32, rel=0.05)
    assert prefill.before.flops == pytest.approx(prefill.after.flops)
    assert prefill.speedup > 1.1 and decode.speedup < 1.1
    assert decode.before.bytes / decode.after.bytes < 1.02


def test_batching_speculation_and_sharding() -> None:
    case = _case(Rows.decode(2, 512))
    batch = lens.compare(lens.Batching(8), case)
    assert batch.after.tokens == 16 and 4 < batch.speedup < 8
    assert lens.expected_tokens(4, 0.0) == 1 and lens.expected_tokens(4, 1.0) == 5
    assert lens.expected_tokens(2, 0.5) == 1.75
    good, bad = (lens.compare(lens.Speculation("lab-s", 4, a), case) for a in (0.9, 0.05))
    assert good.speedup > 2 and bad.energy_gain < bad.speedup < 1.05
    model = CostModel("lab-s", "a100-40gb", "fp16")
    draft = [model.step(Rows.decode(2, context)) for context in (512, 513, 514, 515)]
    verify = CostModel("llama-2-7b", "a100-40gb", "fp16").step(Rows([5, 5], [516, 516], logits=10))
    for field in ("seconds", "joules", "flops"):
        want = getattr(verify, field) + sum(getattr(step, field) for step in draft)
        assert getattr(good.after, field) == pytest.approx(want), field
    two = lens.compare(lens.TensorParallel(2), case)
    assert 1 < two.speedup < 2 and two.energy_gain < 1


def test_gains_in_speed_and_in_energy_rank_techniques_differently() -> None:
    case = _case(Rows.decode(1, 1024))
    found = [lens.compare(one, case) for one in lens.standard(case)]
    by_speed, by_energy = (
        [c.name for c in sorted(found, key=lambda c: getattr(c, key))] for key in ("speedup", "energy_gain")
    )
    assert by_speed != by_energy


def test_pruning_patterns() -> None:
    case = _case(Rows.decode(1, 64))
    half = lens.compare(lens.Pruning(0.5), case)
    assert half.memory_gain == pytest.approx(2, rel=0.05) and 1.5 < half.speedup <= 2
    sparse = lens.compare(lens.Pruning(0.5, "2:4"), case)
    assert 1.6 < sparse.memory_gain < half.memory_gain
    loose = lens.compare(lens.Pruning(0.5, "unstructured"), _case(Rows.prefill(2048)))
    assert loose.speedup == pytest.approx(1, abs=0.05)
    assert lens.compare(lens.LayerSkip(16), case).speedup == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: lens.Pruning(1.5).after(c), "keep in"),
        (lambda c: lens.Pruning(0.4, "2:4").after(c), "2:4 pattern keeps 0.5"),
        (lambda c: lens.Batching(0).after(c), "factor must be at least 1"),
        (lambda c: lens.Speculation("lab-s", 4, 1.2).after(c), "acceptance in"),
        (lambda c: lens.Speculation("lab-s").after(replace(c, rows=Rows.prefill(9))), "decode batch"),
        (lambda c: lens.LayerSkip(99).after(c), "layers must lie in 1..32"),
        (lambda c: lens.GroupedHeads(5).after(c), "no multiple of num_kv_heads 5"),
        (lambda c: lens.TensorParallel(99).after(c).ops(), "tp must lie in 1..32"),
        (lambda c: lens.WeightQuant(-4).after(c), "weight_bits must lie in"),
        (lambda c: lens.Case.of("llama-2-7b", "t4", Rows.decode(1, 1), tokens=-1), "tokens must be"),
    ],
)
def test_lenses_bad_input(call: Any, text: str) -> None:
    with pytest.raises(RooflineError, match=text):
        call(_case(Rows.decode(1, 64)))


# ---------------------------------------------------------------- charts


def _steps() -> dict[str, Any]:
    model = CostModel("llama-3.1-8b", "a10")
    return {"decode of 8": model.step(Rows.decode(8, 1024)), "prefill of 512": model.step(Rows.prefill(512))}


def _charts() -> dict[str, Any]:
    steps = _steps()
    case = lens.Case.of("llama-3.1-8b", "a10", Rows.decode(8, 1024))
    compared = [lens.compare(one, case) for one in lens.standard(case)]
    measured = [m for m in _profile("a10", Efficiency()) if m.op.kind == "linear"]
    return {
        "roofline": charts.roofline(steps, [hardware.get("t4")]),
        "time": charts.time_stack(steps),
        "milliseconds": charts.time_stack(steps, normalize=False),
        "memory": charts.memory_bar([memory.plan("llama-3.1-8b", "a10"), memory.plan("llama-2-7b", "t4")], 9000),
        "energy": charts.energy_waterfall(steps["decode of 8"]),
        "lenses": charts.lens_gains(compared, "llama-3.1-8b, a10"),
        "fit": charts.fit_quality(measured, hardware.get("a10"), Efficiency(), "a10"),
    }


def test_charts_are_valid_and_their_titles_carry_computed_numbers() -> None:
    for name, chart in _charts().items():
        spec = json.dumps(chart.to_dict())
        title = chart.to_dict()["title"]
        assert any(letter.isdigit() for letter in title["text"]) and title["subtitle"], name
        assert "NaN" not in spec and "Infinity" not in spec, name


def test_charts_move_with_their_input() -> None:
    model = CostModel("llama-3.1-8b", "a10")
    titles = {charts.roofline({"x": model.step(Rows.decode(b, 512))}).to_dict()["title"]["text"] for b in (1, 8, 64)}
    assert len(titles) == 3
    plans = [memory.plan("llama-3.1-8b", "a10")]
    over, under = (json.dumps(charts.memory_bar(plans, n).to_dict()) for n in (99_000, 9_000))
    assert "GiB too much" in over and "GiB too much" not in under


def test_the_waterfall_ends_at_the_steps_joules() -> None:
    step = _steps()["decode of 8"]
    data = charts.energy_waterfall(step).to_dict()["layer"][1]["data"]["values"]
    total = next(row for row in data if row["part"] == "total")
    assert total["stop"] == pytest.approx(step.joules / 8)


def test_a_chart_is_written_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    charts.save(_charts()["memory"], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_charts_refuse_nothing_to_draw() -> None:
    with pytest.raises(RooflineError, match="at least one step"):
        charts.roofline({})
    with pytest.raises(RooflineError, match="at least one comparison"):
        charts.lens_gains([], "")
    with pytest.raises(RooflineError, match="tokens must be at least 0"):
        charts.memory_bar([memory.plan("lab-s", "t4")], -1)
