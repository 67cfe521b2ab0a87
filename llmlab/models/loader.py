"""From a model name to a model that runs: resolve, fetch, check, read, pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlab.kernels.dispatch import Kernels, make_kernels
from llmlab.kernels.quant_spec import parse_quantization
from llmlab.models.checkpoint import Checkpoint
from llmlab.models.files import read_json
from llmlab.models.hub import fetch
from llmlab.models.model_shape import ModelShape
from llmlab.models.quantize import QuantizedWeights, QuantReport
from llmlab.models.shapes import from_hf_config
from llmlab.models.tokenizer import HFTokenizer, NoTokenizer, load_tokenizer
from llmlab.models.transformer import Hold, Transformer, held_in_memory
from llmlab.models.weights import RandomWeights, to_dtype
from llmlab.models.zoo import read_config, resolve
from llmlab.types import ModelError


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run, and what the engine must know of it.

    `eos_token_ids`: generation ends at any of them. `max_model_len`: the most positions it can hold;
    `len_note` says why where that is less than the config promises. `directory` is None for a shape
    with random weights.
    """

    name: str
    model: Transformer
    shape: ModelShape
    tokenizer: HFTokenizer | NoTokenizer
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    len_note: str
    directory: Path | None
    quantization: QuantReport | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass(frozen=True)
class _Length:
    tokens: int
    note: str


def load_model(
    path_or_name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    kernels: str | Kernels = "auto",
    random_weights: bool = False,
    seed: int = 0,
    max_model_len: int | None = None,
    hold: Hold = held_in_memory,
    quantization: str | None = None,
) -> LoadedModel:
    """Load a shipped model, a directory, a hub id, or (with `random_weights`) a known shape.

    `dtype`: "auto" (the checkpoint's), "f32", "bf16", "f16". `kernels`: a name for `make_kernels`, or a
    kernel set. `random_weights` ignores the weights of a directory too. `hold`: see `Transformer`.
    `quantization`: "int8", "int4", ... (`quant_spec.parse_quantization`). Raises ModelError naming what is
    wrong and the way out; a model is returned whole or not at all.
    """
    found = resolve(str(path_or_name))
    directory = fetch(found.hub_id) if found.hub_id else found.directory
    config = read_config(directory) if directory else {}
    shape = found.shape or from_hf_config(config)
    if directory is None and not random_weights:
        way_out = 'Pass random_weights=True to fill it, executor="sim" to simulate it, or give a directory.'
        raise ModelError("model", found.name, "a shape without weights", way_out)
    torch_dtype = to_dtype(dtype, shape.dtype)
    weights: Mapping[str, Tensor] = (
        Checkpoint(directory, shape, torch_dtype, device)
        if directory and not random_weights
        else RandomWeights(shape, seed, torch_dtype, device)
    )
    narrow = None if quantization is None else QuantizedWeights(weights, parse_quantization(quantization))
    length = _model_length(shape, max_model_len)
    if isinstance(kernels, str):
        kernels = make_kernels(kernels, device=device, dtype=torch_dtype)
    tokenizer = load_tokenizer(directory) if directory else NoTokenizer(found.name)
    return LoadedModel(
        name=found.name,
        model=Transformer(shape, weights if narrow is None else narrow, kernels, length.tokens, hold),
        shape=shape,
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(directory, config) or tokenizer.eos_token_ids,
        max_model_len=length.tokens,
        len_note=length.note,
        directory=directory,
        quantization=None if narrow is None else narrow.report,
    )


def shape_of(path_or_name: str | Path) -> ModelShape:
    """What a model computes, without reading its weights. Raises ModelError."""
    found = resolve(str(path_or_name))
    directory = fetch(found.hub_id) if found.hub_id else found.directory
    return found.shape or from_hf_config(read_config(directory) if directory else {})


def _model_length(shape: ModelShape, wanted: int | None) -> _Length:
    """How many positions the model is to run. LongRoPE has two sets of angles, so it must be known here."""
    if wanted is not None:
        if not 1 <= wanted <= shape.max_position:
            way_out = f"Choose 1 to {shape.max_position}, or leave it out."
            raise ModelError("max_model_len", wanted, "the model was not made for this length", way_out)
        return _Length(wanted, "")
    short = [rope.original_max_position for rope in shape.ropes if rope.kind == "longrope"]
    if short and short[0] < shape.max_position:
        note = (
            f"LongRoPE with its short factors: {short[0]} positions of {shape.max_position}. "
            f"max_model_len={shape.max_position} takes the long factors, for short sequences too."
        )
        return _Length(short[0], note)
    return _Length(shape.max_position, "")


def _eos_token_ids(directory: Path | None, config: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends a generation: generation_config.json has the last word, then config.json."""
    path = directory / "generation_config.json" if directory else None
    generation = read_json(path) if path and path.exists() else {}
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
