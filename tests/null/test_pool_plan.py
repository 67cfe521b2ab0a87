"""What a KV pool may take, what a budget imitates, and what a user is told when nothing fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab import Engine, EngineConfig, Workload, run
from llmlab.execution.pool_plan import MEMORY_SHARE, Memory, budget_bytes, kv_blocks, no_room, out_of_memory
from llmlab.types import ConfigError
from roofline.precision import Precision

GB = 10**9


def test_sizes_are_read_as_people_write_them() -> None:
    assert budget_bytes(123) == budget_bytes("123") == 123
    assert budget_bytes("16GB") == 16 * GB and budget_bytes("8 GiB") == 8 << 30 and budget_bytes("1.5gb") == 1.5 * GB
    assert budget_bytes("t4") == budget_bytes("Tesla T4") == 16 << 30
    for wrong in ("", "0", "-3", "much", True, 0, "16 TB"):
        with pytest.raises(ConfigError, match="gpu_memory"):
            budget_bytes(wrong)


@given(st.floats(1e9, 1e11), st.floats(0, 5e9), st.floats(1e8, 9e10), st.floats(1e5, 1e7), st.floats(1e9, 2e11))
def test_the_pool_fits_and_one_block_more_would_not(capacity, held, weights, block, budget) -> None:
    memory = Memory(capacity, held, weights, 1e7, 1e6)
    for limit in (None, budget):
        blocks = kv_blocks(memory, block, limit)
        usable = (capacity if limit is None else min(capacity, limit)) * MEMORY_SHARE
        usable -= held if limit is None or limit >= capacity else 0.0
        taken = weights + memory.activations + memory.reserve
        assert taken + blocks * block <= usable + 1 < taken + (blocks + 1) * block + 2


def test_a_budget_imitates_a_smaller_card() -> None:
    h200 = Memory(141 * GB, 0.5 * GB, 16 * GB, 0.3 * GB, 0.5 * GB)
    assert kv_blocks(h200, 2 << 20) > kv_blocks(h200, 2 << 20, 24 * GB) > 0 > kv_blocks(h200, 2 << 20, 16 * GB)
    assert kv_blocks(h200, 2 << 20, 10**15) == kv_blocks(h200, 2 << 20)


def test_the_way_out_names_what_would_fit() -> None:
    memory = Memory(16 * GB, 0.0, 16 * GB, 0.3 * GB, 0.5 * GB)
    told = str(no_room("model", "llama-3.1-8b", memory, 2 << 20, None, {"int8": 9 * GB, "int4": 5 * GB}))
    assert "quantization='int8' or 'int4' (weights of 9.00 GB or 5.00 GB" in told and "2.40 GB missing" in told
    assert "quantization='int4'" in str(no_room("model", "x", memory, 2 << 20, None, {"int8": 15 * GB, "int4": 8 * GB}))
    assert "int4" not in str(no_room("model", "llama-3.1-70b", memory, 2 << 20, None, {"int4": 40 * GB}))
    assert "int4" in str(out_of_memory("m", "float16", 16 * GB, 14 * GB, 5 * GB))
    assert "larger device" in str(out_of_memory("m", "float16", 140 * GB, 14 * GB, 40 * GB))


def test_a_simulated_card_with_a_budget_and_narrow_weights() -> None:
    def blocks(**fields: object) -> int:
        return Engine(model="llama-2-7b", executor="sim", hardware="a10", **fields).scheduler.memory.pool.num_blocks

    plain = blocks()
    assert 0 < blocks(gpu_memory="18GB") < plain < blocks(quantization="int8") < blocks(quantization="int4")
    with pytest.raises(ConfigError, match=r"gpu_memory='t4'.*int4"):
        Engine(model="llama-2-13b", executor="sim", hardware="a10", gpu_memory="t4")
    assert blocks(gpu_memory="t4", quantization="int4") > 0
    with pytest.raises(ConfigError, match="quantization"):
        blocks(quantization="int3")


def test_narrow_weights_make_decoding_cheaper_in_the_simulator_and_count_in_its_metrics() -> None:
    def one(**fields: object):
        config = EngineConfig(model="llama-2-7b", executor="sim", hardware="a10", **fields)
        return run(config, Workload.poisson(rate=2.0, n=4, prompt=64, output=32, seed=0)).metrics

    wide, narrow = one(), one(quantization="int4")
    assert narrow.tpot.mean < 0.55 * wide.tpot.mean
    for metrics in (wide, narrow):
        assert 0.5 < metrics.mbu.p50 < 1.0 and 0.0 < metrics.mfu.p50 < 0.2


def test_widths_of_quantised_models() -> None:
    precision = Precision.parse("w4.625a32")
    assert (precision.weight_bits, precision.act_bits, precision.linear_format) == (4.625, 32, "fp32")
    assert precision.edge.weight_bits == 32 and precision.name == "w4.625a32"
    assert Precision.parse("w4a16").edge.weight_bits == 16 and Precision.parse("w8a8").edge.weight_bits == 16
