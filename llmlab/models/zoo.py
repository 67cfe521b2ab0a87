"""Model names: the checkpoints that come with llmlab, shapes known by name, and how a name is resolved.

No torch here, and no network: a hub id is only recognised, `llmlab.models.hub` fetches it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

import llmlab
import roofline.shapes
from llmlab.models.files import read_json
from llmlab.models.model_shape import ModelShape
from llmlab.models.shapes import from_hf_config
from llmlab.types import ModelError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Resolved(msgspec.Struct, frozen=True):
    """Where a model name leads: to a `directory`, to a `hub_id`, or to a `shape` without weights."""

    name: str
    directory: Path | None = None
    hub_id: str | None = None
    shape: ModelShape | None = None


def model_roots() -> list[Path]:
    """Where shipped models lie: inside an installed package, or in `datasets/` of a source checkout."""
    package = Path(llmlab.__path__[0])
    return [package / "_data" / "models", package.parent / "datasets" / "models"]


def shipped_models() -> dict[str, Path]:
    """The checkpoints that come with llmlab, by name."""
    found: dict[str, Path] = {}
    for root in model_roots():
        for config in sorted(root.glob("*/config.json")):
            found.setdefault(config.parent.name, config.parent)
    return found


def model_path(name: str) -> Path:
    """The directory of a shipped model; ModelError with the nearest names if there is none."""
    shipped = shipped_models()
    if name not in shipped:
        raise unknown_model(name)
    return shipped[name]


def unknown_model(name: str) -> ModelError:
    shipped, shapes = sorted(shipped_models()), sorted(SHAPES)
    near = difflib.get_close_matches(name, shipped + shapes, 3, 0.4)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    way_out = (
        f"{hint}A model is a shipped name ({', '.join(shipped) or 'none found'}), a directory with a config.json, "
        f"a hub id (org/name), or a shape ({', '.join(shapes)})."
    )
    return ModelError("model", name, "unknown model", way_out)


def resolve(name: str) -> Resolved:
    """What a model name means. A directory wins over a hub id of the same spelling."""
    if name in (shipped := shipped_models()):
        return Resolved(name, directory=shipped[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return Resolved(path.resolve().name, directory=path)
    if name in SHAPES:
        return Resolved(name, shape=named_shape(name))
    if _HUB_ID.fullmatch(name):
        return Resolved(name, hub_id=name)
    if len(path.parts) > 1 or path.exists():
        problem = "is a file, not a model directory" if path.exists() else "no such directory"
        raise ModelError(
            "model", name, problem, "Give the directory that holds config.json and *.safetensors."
        )
    raise unknown_model(name)


def read_shape(directory: Path) -> ModelShape:
    """The shape that a model directory's `config.json` describes."""
    return from_hf_config(read_config(directory))


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        held = ", ".join(sorted(p.name for p in directory.iterdir())[:6]) or "nothing"
        problem = f"the directory has no config.json (it holds {held})"
        raise ModelError("model", str(directory), problem, "Give the directory that save_pretrained() wrote.")
    return read_json(path)


def find_shape(name: str) -> ModelShape:
    """The shape behind a name, without loading weights or torch: what the simulator needs."""
    found = resolve(name)
    if found.shape is not None:
        return found.shape
    if found.directory is not None:
        return read_shape(found.directory)
    way_out = f"Fetch it first and give its directory, or use a shape: {', '.join(sorted(SHAPES))}."
    raise ModelError("model", name, "a hub id has no shape until it is fetched", way_out)


def named_shape(name: str) -> ModelShape:
    """A shape of `SHAPES`; its integers come from `roofline.shapes` where that knows the name."""
    config = SHAPES[name]
    if name in (sizes := roofline.shapes.table()):
        size = sizes[name]
        fields = {theirs: getattr(size, ours) for theirs, ours in _SIZES.items() if getattr(size, ours)}
        config = fields | config
    return from_hf_config(config)


_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tied",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "moe_intermediate_size",
}
_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": "float16",
}
_LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "dtype": "bfloat16",
}
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "dtype": "bfloat16",
}

# What a config.json of these models says besides the sizes.
SHAPES: Mapping[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA2,
    "llama-2-13b": _LLAMA2,
    "llama-2-70b": _LLAMA2,
    "llama-3.1-8b": _LLAMA31,
    "llama-3.1-70b": _LLAMA31,
    "qwen2.5-7b": _QWEN25,
    "qwen2.5-14b": _QWEN25,
    "qwen3-8b": _QWEN3,
    "qwen3-30b-a3b": _QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
    },
    # Small enough for a benchmark on two CPU cores, large enough to leave the caches.
    "llama-28m": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1408,
        "vocab_size": 8192,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
}
