"""Kernels beside the usual ones, asked for by name: `kernels="triton+one-max@4+flat"`. Imports no torch.

    one-max[@PHI]   decoding takes scores around one maximum (0 if not said) instead of a running one     softmax_schemes
    rows[@N]        linear layers of up to N rows (8; at most 16) are sums in registers                   dataflow
    flat[@N]        linear layers of up to N rows (32; at most 64) that are not `rows` are flat products  dataflow

None of them has been measured on a GPU, so none is on by itself.
Source: FlashDecoding++, arXiv 2311.01282.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from llmlab.config import KERNEL_SETS
from llmlab.kernels.dataflow import LIBRARY, MOST_ROWS, Dataflow
from llmlab.types import ConfigError, unknown_name

DEFAULTS: Mapping[str, float] = {"one-max": 0.0, "rows": 8.0, "flat": 32.0}


class Variants(NamedTuple):
    """What was asked for: the one maximum (natural logarithm, after scaling; None: a running one), and who multiplies few rows."""

    phi: float | None = None
    few_rows: Dataflow = LIBRARY


class Asked(NamedTuple):
    """A kernel set by name, and the variants of it."""

    base: str
    variants: Variants


USUAL = Variants()


def parse_kernels(text: str) -> Asked:
    """What `kernels=` says. Raises ConfigError naming what is known."""
    base, *parts = str(text).split("+")
    if base not in KERNEL_SETS:
        raise unknown_name("kernels", text, KERNEL_SETS)
    found = dict(_part(text, part) for part in parts)
    if found and base != "triton":
        raise ConfigError("kernels", text, f"{base} has no variants", "Write triton+..., on a CUDA device.")
    rows, flat = int(found.get("rows", 0)), int(found.get("flat", 0))
    return Asked(base, Variants(found.get("one-max"), Dataflow(rows + 1, max(rows, flat) + 1) if rows or flat else LIBRARY))


def _part(text: str, part: str) -> tuple[str, float]:
    name, _, value = part.partition("@")
    if name not in DEFAULTS:
        raise unknown_name("kernels", text, [f"triton+{known}" for known in DEFAULTS])
    try:
        number = float(value) if value else DEFAULTS[name]
    except ValueError:
        number = math.nan
    most = MOST_ROWS.get(name)
    if not math.isfinite(number) or (most is not None and not 1 <= number <= most):
        raise ConfigError("kernels", text, f"{value!r} is not {'a number' if most is None else f'1 to {most} rows'}",
                          f"Write triton+{name}@{DEFAULTS[name]:g}.")  # fmt: skip
    return name, number
