"""How weights are to be quantised, and the text that says so. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmlab.types import ConfigError

SMALLEST_GROUP = 16


@dataclass(frozen=True)
class QuantSpec:
    """How to quantise: bits (8 or 4), inputs that share a scale, and whether they share a zero of their own."""

    bits: int
    group: int = 64
    symmetric: bool = True

    @property
    def name(self) -> str:
        return f"int{self.bits}-g{self.group}" + ("-sym" if self.symmetric else "-asym")

    @property
    def bits_per_weight(self) -> float:
        """With the scales (float32) and zeros (8 bits)."""
        return self.bits + (32 + 8 * (not self.symmetric)) / self.group

    def precision(self, activation_bits: int) -> str:
        """The width code of `roofline` for a model with these weights."""
        return f"w{self.bits_per_weight:g}a{activation_bits}"

    def group_for(self, inputs: int) -> int:
        """The group of a layer: the largest common divisor with its inputs."""
        return math.gcd(self.group, inputs)

    def fits(self, inputs: int) -> bool:
        """Whether a layer of so many inputs is worth it: its groups are not too small."""
        return self.group_for(inputs) >= SMALLEST_GROUP


def parse_quantization(text: str) -> QuantSpec:
    """ "int8", "int4", "int4-g32", "int4-g128-sym", "int8-asym": int8 is symmetric, int4 is not, unless said. Raises ConfigError."""
    match = re.fullmatch(r"int([48])(?:-g(\d+))?(?:-(sym|asym))?", text)
    if match is None:
        raise ConfigError("quantization", text, "is not a form of quantisation",
                          "Use int8 or int4, with -gN for the group and -sym or -asym behind it if you like: int4-g32-sym.")  # fmt: skip
    bits, group = int(match[1]), int(match[2] or 64)
    if group < SMALLEST_GROUP or group & (group - 1):
        raise ConfigError("quantization", text, f"a group of {group} inputs", f"Choose a power of two from {SMALLEST_GROUP} on.")
    return QuantSpec(bits, group, match[3] == "sym" if match[3] else bits == 8)
