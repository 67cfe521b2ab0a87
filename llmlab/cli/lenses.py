"""Techniques as words of the command line: `--lens int4 --lens gqa:4 --lens spec:4,0.7`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from llmlab.types import ConfigError, unknown_name

if TYPE_CHECKING:
    from roofline.lenses import Case, Lens


class Form(NamedTuple):
    """How a lens is written, what it is, and what makes it from the numbers behind its colon."""

    text: str
    about: str
    make: Callable[[Case, list[float]], Lens]
    least: int = 0
    most: int = 0


def _weights(bits: float) -> Callable[[Case, list[float]], Lens]:
    def make(case: Case, numbers: list[float]) -> Lens:
        from roofline.lenses import WeightQuant

        return WeightQuant(bits)

    return make


def _activations(case: Case, numbers: list[float]) -> Lens:
    from roofline.lenses import ActivationQuant

    return ActivationQuant(8)


def _cache(bits: float) -> Callable[[Case, list[float]], Lens]:
    def make(case: Case, numbers: list[float]) -> Lens:
        from roofline.lenses import KVQuant

        return KVQuant(bits)

    return make


def _grouped(case: Case, numbers: list[float]) -> Lens:
    """A quarter of the KV heads unless a number says how many."""
    from roofline.lenses import GroupedHeads

    return GroupedHeads(int(numbers[0]) if numbers else max(1, case.shape.num_kv_heads // 4))


def _fused(case: Case, numbers: list[float]) -> Lens:
    from roofline.lenses import FusedAttention

    return FusedAttention()


def _batch(case: Case, numbers: list[float]) -> Lens:
    from roofline.lenses import Batching

    return Batching(int(numbers[0]) if numbers else 8)


def _speculation(case: Case, numbers: list[float]) -> Lens:
    """A draft of a quarter of the width and of the layers, as in `roofline.lenses.standard`."""
    from roofline.lenses import Speculation, _draft_of

    k = int(numbers[0]) if numbers else 4
    return Speculation(_draft_of(case.shape), k, numbers[1] if len(numbers) > 1 else 0.7)


def _parallel(case: Case, numbers: list[float]) -> Lens:
    from roofline.lenses import TensorParallel

    return TensorParallel(int(numbers[0]) if numbers else 2)


def _pruned(pattern: str) -> Callable[[Case, list[float]], Lens]:
    def make(case: Case, numbers: list[float]) -> Lens:
        from roofline.lenses import Pruning

        return Pruning(numbers[0] if numbers else 0.5, pattern)

    return make


def _early(case: Case, numbers: list[float]) -> Lens:
    from roofline.lenses import LayerSkip

    return LayerSkip(int(numbers[0]))


FORMS: Mapping[str, Form] = {
    "int8": Form("int8", "weights in 8 bits", _weights(8)),
    "int4": Form("int4", "weights in 4 bits", _weights(4)),
    "act8": Form("act8", "activations in 8 bits; with int8 weights the 8-bit unit multiplies", _activations),
    "kv8": Form("kv8", "KV cache in 8 bits", _cache(8)),
    "kv4": Form("kv4", "KV cache in 4 bits", _cache(4)),
    "gqa": Form("gqa[:HEADS]", "so many KV heads, or a quarter of them", _grouped, most=1),
    "fused": Form("fused", "attention in one kernel, against three", _fused),
    "batch": Form("batch[:FACTOR]", "so many times the rows (8)", _batch, most=1),
    "spec": Form("spec[:K,ACCEPTED]", "a small draft proposes K tokens (4), each accepted with this chance (0.7)", _speculation, most=2),
    "tp": Form("tp[:DEVICES]", "tensor parallel over so many devices (2)", _parallel, most=1),
    "prune": Form("prune[:KEEP]", "structured pruning (0.5 of each layer kept)", _pruned("structured"), most=1),
    "prune24": Form("prune24", "two of four weights kept", _pruned("2:4")),
    "skip": Form("skip:LAYERS", "leave after so many layers", _early, least=1, most=1),
}  # fmt: skip


def lens_of(text: str, case: Case) -> Lens:
    """The lens that a word means for this case. Raises ConfigError."""
    name, _, rest = text.partition(":")
    if name not in FORMS:
        raise unknown_name("lens", name, FORMS)
    form = FORMS[name]
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
    except ValueError:
        raise ConfigError("lens", text, "needs numbers behind the colon", f"Write {form.text}.") from None
    if not form.least <= len(numbers) <= form.most:
        raise ConfigError("lens", text, "has another number of values", f"Write {form.text}.")
    return form.make(case, numbers)
