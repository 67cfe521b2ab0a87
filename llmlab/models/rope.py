"""Rotary position embedding: the angles of every position, computed once per model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmlab.models.model_shape import RopeShape


def _default_frequencies(rope: RopeShape) -> Tensor:
    """Radians per position of each pair of dimensions, `[rotary_dim / 2] float32`."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    return 1.0 / rope.theta**exponents


def _llama3_frequencies(rope: RopeShape) -> Tensor:
    """Long waves slow down by `factor`, short waves stay, those between are blended."""
    frequencies = _default_frequencies(rope)
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn_frequencies(rope: RopeShape) -> Tensor:
    """As arXiv 2309.00071, section 3.2: interpolate slow dimensions, keep fast ones, ramp between."""

    def dimension(turns: float) -> float:
        periods = rope.original_max_position / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(periods) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0.0, 1.0)
    frequencies = _default_frequencies(rope)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _longrope_frequencies(rope: RopeShape, max_position: int) -> Tensor:
    """Divide by the long factors if the model is to run beyond its original length, else by the short ones.

    One choice for all sequences of an engine: keys in the cache keep their angles. (transformers decides
    per call by the longest sequence, and recomputes the cache when a sequence crosses the border.)
    """
    factors = rope.long_factor if max_position > rope.original_max_position else rope.short_factor
    return _default_frequencies(rope) / torch.tensor(factors, dtype=torch.float32)


def frequencies(rope: RopeShape, max_position: int) -> Tensor:
    """Radians per position of each pair of dimensions, `[rotary_dim / 2] float32`."""
    if rope.kind == "longrope":
        return _longrope_frequencies(rope, max_position)
    if rope.kind == "linear":
        return _default_frequencies(rope) / rope.factor
    rules = {"default": _default_frequencies, "llama3": _llama3_frequencies, "yarn": _yarn_frequencies}
    return rules[rope.kind](rope)


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the tokens of one step, both `[T, rotary_dim / 2] float32`."""

    cos: Tensor
    sin: Tensor


class RopeTable:
    """cos and sin of all positions below `max_position`."""

    def __init__(self, rope: RopeShape, max_position: int, device: torch.device | str = "cpu") -> None:
        positions = torch.arange(max_position, dtype=torch.float32)
        angles = torch.outer(positions, frequencies(rope, max_position))
        self.cos = (angles.cos() * rope.attention_factor).to(device)
        self.sin = (angles.sin() * rope.attention_factor).to(device)

    def at(self, positions: Tensor) -> Rotation:
        """The rows of `positions [T]` (int32 or int64, each below `max_position`)."""
        return Rotation(self.cos.index_select(0, positions), self.sin.index_select(0, positions))
