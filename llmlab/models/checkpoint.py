"""Safetensors directories: read strictly, tensor by tensor, from memory-mapped files; and written.

What is wrong with a directory is found before any weight is read, from the headers of its files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmlab.models.files import read_json
from llmlab.models.model_shape import ModelShape
from llmlab.models.shapes import family_of, to_hf_config
from llmlab.models.weights import DTYPES, Blueprint, Part, RandomWeights, Recipe, blueprints
from llmlab.types import ModelError

INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_AGAIN = "Download or copy the file again."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header; checks that the file is as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        raw = file.read(length) if length <= size else b""
    if start == b"version ":
        raise _damaged(
            path, "it is a Git LFS pointer, not the weights", "Run `git lfs pull` in its directory."
        )
    if size < 8 + length or size < 8:
        raise _damaged(path, f"truncated: the header ends at byte {8 + length:,}, the file at {size:,}")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {n: StoredTensor(path, e["dtype"], tuple(e["shape"])) for n, e in header.items()}
        end = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"not a safetensors file: its header does not parse ({error})") from error
    if size < end:
        raise _damaged(path, f"truncated: the header promises {end:,} bytes, the file has {size:,}")
    return tensors


def _damaged(path: Path, problem: str, way_out: str = _AGAIN) -> ModelError:
    return ModelError("safetensors", str(path), problem, way_out)


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory: those of the index, or the only one."""
    if (directory / INDEX).exists():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        for name in names:
            if not (directory / name).exists():
                problem = f"a shard that {INDEX} names is missing"
                raise ModelError(
                    "safetensors", str(directory / name), problem, "Fetch it into the directory."
                )
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    single = directory / "model.safetensors"
    if single in files or len(files) == 1:
        return [single if single in files else files[0]]
    if files:
        problem = f"{len(files)} safetensors files and no {INDEX} that says how they belong together"
        raise ModelError("model", str(directory), problem, f"Fetch {INDEX} too, or keep one file.")
    pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    found = f"only pickled weights ({pickled[0]}), which are not loaded" if pickled else "no weights"
    way_out = "Save the model with save_pretrained(..., safe_serialization=True) of transformers."
    raise ModelError("model", str(directory), f"the directory has {found}: no *.safetensors", way_out)


class Checkpoint(Mapping[str, Tensor]):
    """The weights of a model directory as the tensors that `Transformer` reads, each made when asked for.

    Construction checks names, shapes and dtypes of all tensors against the shape and raises ModelError;
    reading converts to `dtype` and moves to `device`. A float16 target must hold every value.
    """

    def __init__(
        self,
        directory: Path,
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._dtype, self._device, self._directory = dtype, torch.device(device), directory
        self._files: dict[Path, Any] = {}
        self._stored: dict[str, StoredTensor] = {}
        for path in _weight_files(directory):
            self._stored |= read_header(path)
        self._plans = {name: self._choose(name, bp) for name, bp in blueprints(shape).items()}
        self._shapes = {name: bp.shape for name, bp in blueprints(shape).items()}
        self._check_leftovers(shape)

    def __getitem__(self, name: str) -> Tensor:
        recipe, shape = self._plans[name], self._shapes[name]
        parts = recipe.parts
        if len(parts) == 1 and parts[0].shape == shape:
            return self._convert(parts[0].name, self._read(parts[0].name))
        tensor = torch.empty(shape, dtype=self._dtype)
        for part, target in recipe.targets(tensor):
            target.copy_(self._convert(part.name, self._read(part.name)))
        return tensor.to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def _read(self, name: str) -> Tensor:
        path = self._stored[name].file
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt", device="cpu")
        tensor: Tensor = self._files[path].get_tensor(name)
        return tensor

    def _convert(self, name: str, tensor: Tensor) -> Tensor:
        converted = tensor.to(dtype=self._dtype)
        if self._dtype == torch.float16 and tensor.dtype != torch.float16 and converted.isinf().any():
            largest = f"{tensor.abs().max():.3g}"
            way_out = 'Load with dtype="bfloat16" or "float32".'
            raise ModelError("dtype", "float16", f"{name} holds {largest}, more than float16 can", way_out)
        return converted.to(self._device) if self._device.type != "cpu" else converted

    def _choose(self, ours: str, blueprint: Blueprint) -> Recipe:
        """The recipe whose parts are all here; else an error about the one that is nearest to it."""

        def missing(recipe: Recipe) -> list[Part]:
            return [part for part in recipe.parts if part.name not in self._stored]

        best = min(blueprint.recipes, key=lambda r: len(missing(r)) / len(r.parts))
        if lost := missing(best):
            others = [r.parts[0].name for r in blueprint.recipes if r is not best]
            way_out = f"config.json and the weights do not belong together{_or_as(others)}. Fetch both again."
            raise ModelError("safetensors", lost[0].name, f"missing in {self._directory}", way_out)
        for part in best.parts:
            self._check_part(part)
        return best

    def _check_part(self, part: Part) -> None:
        found = self._stored[part.name]
        if found.dtype not in _FLOATS:
            way_out = f"Supported: {', '.join(_FLOATS)}; take an unquantized checkpoint."
            raise ModelError("safetensors", part.name, f"dtype {found.dtype} in {found.file.name}", way_out)
        if found.shape != part.shape:
            problem = f"{found.file.name} has shape {list(found.shape)}, config.json means {list(part.shape)}"
            raise ModelError(
                "safetensors", part.name, problem, "config.json and the weights do not belong together."
            )

    def _check_leftovers(self, shape: ModelShape) -> None:
        used = {part.name for recipe in self._plans.values() for part in recipe.parts}
        left = [name for name in self._stored if name not in used and not _harmless(name, shape)]
        if left:
            problem = f"{len(left)} tensors that a {shape.architecture} of this config.json does not have"
            way_out = "config.json and the weights do not belong together, or the model has extra parts."
            raise ModelError("safetensors", ", ".join(left[:3]), problem, way_out)


def _or_as(names: list[str]) -> str:
    return f" (neither is it stored as {' or '.join(names)})" if names else ""


def _harmless(name: str, shape: ModelShape) -> bool:
    """Tensors that old checkpoints carry and that the shape makes redundant."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and shape.tie_word_embeddings)


def save_checkpoint(
    directory: Path, shape: ModelShape, weights: Mapping[str, Tensor], max_shard_bytes: int = 5 << 30
) -> None:
    """Write config.json and safetensors (sharded beyond `max_shard_bytes`) under Hugging Face's names."""
    directory.mkdir(parents=True, exist_ok=True)
    config = to_hf_config(shape)
    style, plans = family_of(config).layout, blueprints(shape)
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, blueprint in plans.items():
        for part, piece in blueprint.recipe(style).targets(weights[name]):
            size = math.prod(part.shape) * piece.element_size()
            if size > room and shards[-1]:
                shards.append({})
                room = max_shard_bytes
            shards[-1][part.name], room = piece.cpu().clone(), room - size
    _write_shards(directory, shards)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(directory: Path, shards: list[dict[str, Tensor]]) -> None:
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_random_model(shape: ModelShape, directory: Path | str, seed: int = 0) -> Path:
    """Write a model directory with the weights that `RandomWeights(shape, seed)` gives, in `shape.dtype`.

    For tests and benchmarks: other engines load the same weights from it. Returns the directory.
    """
    directory = Path(directory)
    save_checkpoint(directory, shape, RandomWeights(shape, seed, DTYPES[shape.dtype]))
    return directory
