"""How wide weights, activations and KV entries are, and in which number format the linears multiply."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from roofline.errors import RooflineError, unknown

_FORMATS = {"fp64": 64, "fp32": 32, "tf32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}
_ALIASES = {
    "f32": "fp32", "float32": "fp32", "float": "fp32", "f16": "fp16", "float16": "fp16", "half": "fp16",
    "bfloat16": "bf16", "e4m3": "fp8", "float8": "fp8", "i8": "int8", "i4": "int4",
}  # fmt: skip
_WAK = re.compile(r"w(\d+(?:\.\d+)?)a(\d+)(?:kv(\d+))?")


def canonical(dtype: str) -> str:
    """Return the table's name of a number format (``"float16"`` -> ``"fp16"``); unknown names raise."""
    key = dtype.lower().removeprefix("torch.")
    key = _ALIASES.get(key, key)
    if key not in _FORMATS:
        raise unknown("dtype", dtype, [*_FORMATS, "w4a16", "w8a8", "w8a8kv8"])
    return key


def dtype_bytes(dtype: str) -> float:
    """Return the bytes of one element (0.5 for int4)."""
    return _FORMATS[canonical(dtype)] / 8


@dataclass(frozen=True, slots=True)
class Precision:
    """Storage widths in bits, and the formats in which linears and attention multiply.

    ``weight_bits`` may be fractional: 4-bit weights with a 16-bit scale per 128 take 4.125 bits.
    """

    weight_bits: float
    act_bits: float
    kv_bits: float
    linear_format: str
    attention_format: str

    def __post_init__(self) -> None:
        for field in ("weight_bits", "act_bits", "kv_bits"):
            value = getattr(self, field)
            if not 0 < value <= 64:
                raise RooflineError(f"{field} must lie in (0, 64], got {value!r}")

    @classmethod
    def parse(cls, text: str | Precision) -> Precision:
        """Read ``"fp16"``, ``"bf16"``, ``"fp8"``, ``"w4a16"``, ``"w8a8"``, ``"w8a8kv8"`` ... (case-free)."""
        if isinstance(text, Precision):
            return text
        match = _WAK.fullmatch(text.lower())
        if match:
            weight, act = float(match[1]), float(match[2])
            return cls.of_bits(weight, act, float(match[3] or act), "fp16" if act <= 16 else "fp32")
        name = canonical(text)
        bits = float(_FORMATS[name])
        wide = name if bits >= 16 else "fp16"
        return cls(bits, bits, bits, name, wide)

    @classmethod
    def of_bits(cls, weight: float, act: float, kv: float, wide: str = "fp16") -> Precision:
        """Return the precision of given widths; linears use an 8-bit unit only if both operands are narrow."""
        linear = ("int4" if max(weight, act) <= 4 else "int8") if max(weight, act) <= 8 else wide
        return cls(weight, act, kv, linear, wide if act <= 16 else "fp32")

    @property
    def edge(self) -> Precision:
        """The precision of embedding and head, which quantisation leaves as wide as activations, at least 16 bits."""
        if self.weight_bits >= 16:
            return self
        return replace(self, weight_bits=max(16.0, self.act_bits), linear_format=self.attention_format)

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight."""
        return self.weight_bits / 8

    @property
    def act_bytes(self) -> float:
        """Bytes of one activation."""
        return self.act_bits / 8

    @property
    def kv_bytes(self) -> float:
        """Bytes of one cached key or value element."""
        return self.kv_bits / 8

    @property
    def name(self) -> str:
        """Short name: the format if all widths agree, else ``w4a16`` or ``w4a16kv8``."""
        if self.weight_bits == self.act_bits == self.kv_bits:
            return self.linear_format
        cache = "" if self.kv_bits == self.act_bits else f"kv{self.kv_bits:g}"
        return f"w{self.weight_bits:g}a{self.act_bits:g}{cache}"
