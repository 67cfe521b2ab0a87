"""Every family against transformers: logits, greedy tokens, dtypes, layer spans, over paged ragged batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_util import (
    CASES,
    PagedRunner,
    Row,
    greedy,
    hf_greedy,
    hf_logits,
    hf_model,
    load_hf,
    run_in_chunks,
    tiny_config,
)
from torch import Tensor

from llmlab.models.checkpoint import Checkpoint, save_checkpoint
from llmlab.models.loader import load_model
from llmlab.models.transformer import Transformer
from llmlab.types import LabError

KERNELS = ("torch", "numba")
TOLERANCE = 1e-4


@dataclass
class Tiny:
    """One case: its directory, transformers' model, prompts and what transformers says of them."""

    case: str
    directory: Path
    reference: Any
    prompts: list[list[int]]
    logits: list[Tensor]

    def load(self, kernels: str, **options: Any) -> Transformer:
        return load_model(self.directory, kernels=kernels, **options).model


@pytest.fixture(scope="module", params=sorted(CASES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = tmp_path_factory.mktemp(request.param)
    reference = hf_model(tiny_config(request.param))
    reference.save_pretrained(directory)
    draw = random.Random(request.param)
    prompts = [[draw.randrange(1, 96) for _ in range(n)] for n in (37, 1, 23, 8)]
    return Tiny(request.param, directory, reference, prompts, [hf_logits(reference, p) for p in prompts])


def largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_of_ragged_chunked_batches(tiny: Tiny, kernels: str) -> None:
    model = tiny.load(kernels)
    for block_size in (1, 8, 16):
        draw = random.Random(block_size)
        runner = PagedRunner(model, block_size, num_blocks=-(-120 // block_size) + 4, seed=block_size)
        logits = run_in_chunks(runner, tiny.prompts, lambda n, draw=draw: draw.randint(0, min(n, 15)))
        assert largest_error(logits, tiny.logits) <= TOLERANCE, f"block_size {block_size}"


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_tokens(tiny: Tiny, kernels: str) -> None:
    runner = PagedRunner(tiny.load(kernels), block_size=8, num_blocks=40)
    expected = [hf_greedy(tiny.reference, p, 20) for p in tiny.prompts]
    assert greedy(runner, tiny.prompts, 20) == expected


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_precision_is_as_close_as_transformers(tiny: Tiny, dtype: str) -> None:
    """Median error against float32 at most 1.5 times that of transformers in the same dtype (plus 1e-3).

    The median, because a token whose router stands between two experts may choose otherwise after rounding.
    """
    model = tiny.load("auto", dtype=dtype)
    assert model.dtype == {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    theirs = load_hf(tiny.directory, model.dtype)
    prompt, exact = tiny.prompts[0], tiny.logits[0]
    ours = PagedRunner(model, 16, 4).step([Row()], [prompt])[0]
    error = (ours - exact).abs().median()
    allowed = (hf_logits(theirs, prompt) - exact).abs().median()
    assert error <= 1.5 * allowed + 1e-3
    assert ours.dtype == torch.float32


def test_layer_spans_compose(tiny: Tiny) -> None:
    model = tiny.load("torch")
    whole = PagedRunner(model, 8, 8).step([Row()], [tiny.prompts[0]])
    cut = PagedRunner(model, 8, 8).step([Row()], [tiny.prompts[0]], spans=[range(1), range(1, 3)])
    assert torch.equal(whole[0], cut[0])


# Cases whose layers are plain and whose heads fill vectors. Others have experts, or norms behind their sublayers.
PROGRAMS = ("gemma", "llama", "llama-bias", "llama3-rope", "mistral", "phi3", "qwen2", "qwen3")


def test_a_program_yields_the_bits_of_its_operations(tiny: Tiny) -> None:
    """Layers as one call, and as one call for each span, are the operations run one by one."""
    whole, plain = tiny.load("numba"), tiny.load("numba")
    plain.__dict__["_program"] = None
    assert (whole._program is not None) == (tiny.case in PROGRAMS)
    runs: list[list[Tensor]] = []
    for model, spans in ((plain, None), (whole, None), (whole, [range(1), range(1, 3)])):
        runner, rows = PagedRunner(model, 8, 16), [Row() for _ in tiny.prompts]
        steps = [runner.step(rows, part, spans) for part in (tiny.prompts, [[5], [6], [7, 8], [9]])]
        runs.append([logits for step in steps for logits in step])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_a_block_outside_the_cache_is_refused(tiny: Tiny) -> None:
    runner = PagedRunner(tiny.load("numba"), 8, 4)
    with pytest.raises(LabError, match=r"block_tables|slot_mapping"):
        runner.step([Row([2]), Row([4])], [[1, 2], [3]])


def test_written_checkpoint_is_the_same_model_to_transformers(tiny: Tiny, tmp_path: Path) -> None:
    shape = load_model(tiny.directory, kernels="torch").shape
    save_checkpoint(tmp_path, shape, Checkpoint(tiny.directory, shape, torch.float32))
    assert load_model(tmp_path, kernels="torch").shape == shape
    assert torch.allclose(hf_logits(load_hf(tmp_path), tiny.prompts[0]), tiny.logits[0], atol=1e-5)


def test_num_parameters(tiny: Tiny) -> None:
    shape = load_model(tiny.directory, kernels="torch").shape
    assert shape.num_parameters() == sum(p.numel() for p in tiny.reference.parameters())


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Gemma 2 has most of what can go wrong: alternating windows, softcaps, post norms."""
    directory = tmp_path_factory.mktemp("windowed")
    reference = hf_model(tiny_config("gemma2"), seed=3)
    reference.save_pretrained(directory)
    draw = random.Random(7)
    prompts = [[draw.randrange(1, 96) for _ in range(40)] for _ in range(4)]
    return Tiny("gemma2", directory, reference, prompts, [hf_logits(reference, p) for p in prompts])


@pytest.fixture(scope="module")
def windowed_model(windowed: Tiny) -> Transformer:
    return windowed.load("auto")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_composition(windowed: Tiny, windowed_model: Transformer, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4), label="lengths")
    block_size = data.draw(st.sampled_from([1, 2, 3, 8, 16, 32]), label="block_size")
    runner = PagedRunner(windowed_model, block_size, num_blocks=180 // block_size + 4)
    prompts = [windowed.prompts[i][:n] for i, n in enumerate(lengths)]
    logits = run_in_chunks(runner, prompts, lambda n: data.draw(st.integers(0, n), label="chunk"))
    assert largest_error(logits, [windowed.logits[i][:n] for i, n in enumerate(lengths)]) <= TOLERANCE


def test_longrope_beyond_the_original_length(tmp_path: Path) -> None:
    """With max_model_len above the original length the long factors hold, as in transformers for long input."""
    reference = hf_model(tiny_config("phi3-longrope"))
    reference.save_pretrained(tmp_path)
    short, long = load_model(tmp_path), load_model(tmp_path, max_model_len=256)
    assert short.max_model_len == 64 and "long factors" in short.len_note
    assert long.max_model_len == 256 and not long.len_note
    prompt = [i % 95 + 1 for i in range(100)]
    ours = PagedRunner(long.model, 16, 8).step([Row()], [prompt])[0]
    assert float((ours - hf_logits(reference, prompt)).abs().max()) <= TOLERANCE
