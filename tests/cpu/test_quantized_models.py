"""Models with narrow weights: what becomes narrow, and that the engine runs them."""

from __future__ import annotations

import pytest
import torch

import llmlab
from llmlab import EngineConfig, SamplingParams, Workload, run
from llmlab.kernels.quantized import QuantizedTensor, QuantSpec
from llmlab.models.loader import load_model
from llmlab.models.quantize import QuantizedWeights
from llmlab.models.weights import RandomWeights
from llmlab.models.zoo import resolve
from llmlab.types import ConfigError


def test_layers_become_narrow_and_nothing_else() -> None:
    shape = resolve("llama-28m").shape
    assert shape is not None
    weights = QuantizedWeights(RandomWeights(shape), QuantSpec(8))
    kinds = {name.split(".", 2)[-1]: type(weights[name]).__name__ for name in weights}
    narrow = {name for name, kind in kinds.items() if kind == "QuantizedTensor"}
    assert narrow == {"qkv.weight", "output.weight", "gate_up.weight", "down.weight"}
    assert weights.report.num_narrow == 4 * shape.num_layers and weights.report.bytes_after < 0.5 * weights.report.bytes_before
    assert isinstance(weights["layers.0.qkv.weight"], QuantizedTensor)


@pytest.mark.parametrize("kernels", ["torch", "numba"])
def test_int8_answers_as_the_wide_model_does(kernels: str) -> None:
    prompts = ["37*46?", "What is 12 + 30?", "81*7?"]
    params = SamplingParams(max_tokens=12, temperature=0.0)
    wide = [o.outputs[0].token_ids for o in llmlab.LLM("lab-xs", kernels=kernels).generate(prompts, params)]
    narrow = [o.outputs[0].token_ids for o in llmlab.LLM("lab-xs", kernels=kernels, quantization="int8").generate(prompts, params)]
    same = sum(a == b for x, y in zip(wide, narrow) for a, b in zip(x, y)) / sum(map(len, wide))
    assert same > 0.7


def test_both_kernel_sets_agree_on_narrow_weights() -> None:
    models = [load_model("lab-xs", "float32", kernels=k, quantization="int4") for k in ("torch", "numba")]
    assert models[0].quantization is not None and models[0].quantization.num_narrow > 0
    hidden = torch.randn(3, models[0].shape.hidden_size)
    a, b = (m.model.layers[0].qkv(hidden) for m in models)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_quantised_run_says_so_and_counts_its_bytes() -> None:
    done = run(EngineConfig(model="lab-xs", quantization="int4", num_blocks=64), Workload.poisson(rate=50.0, n=3, prompt=8, output=6, seed=0))
    assert done.started.model["precision"] == "w4.625a32"
    assert done.started.config["quantization"] == "int4"
    assert done.metrics.mfu.n == done.metrics.mbu.n == done.metrics.num_steps
    assert done.metrics.mbu.p50 > 0 and done.verify() == []


def test_a_memory_budget_bounds_the_pool_of_a_real_engine() -> None:
    small = llmlab.Engine(model="lab-xs", gpu_memory="40MB").scheduler.memory.pool.num_blocks
    assert 0 < small < llmlab.Engine(model="lab-xs", gpu_memory="200MB").scheduler.memory.pool.num_blocks
    with pytest.raises(ConfigError, match="no room"):
        llmlab.Engine(model="lab-xs", gpu_memory="1MB")
