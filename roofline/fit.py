"""Fit efficiencies to measured kernel times: ``fit(measurements, hardware)``.

The free numbers are those of :class:`roofline.cost.Efficiency` that the measurements can tell: compute and memory
fractions, the tile side, and the launch time. The loss is the mean absolute log ratio of predicted to measured
time, which a few odd rows cannot pull (an L1 loss) and which treats half and double alike.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roofline.cost import TILES, Efficiency
from roofline.errors import RooflineError, positive
from roofline.hardware import Hardware
from roofline.hardware import get as get_hardware
from roofline.ops import NORM_FLOPS, ROPE_FLOPS, SILU_FLOPS, Op, elementwise, linear
from roofline.precision import Precision

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel and the seconds it took on the device."""

    op: Op
    seconds: float

    def __post_init__(self) -> None:
        positive(f"seconds of {self.op.name}", self.seconds)


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted efficiencies and how well they tell the measurements they were fitted to."""

    efficiency: Efficiency
    median_error: float
    count: int


class Predictor:
    """The cost model's kernel time for many ops at once (equal to ``CostModel.op_cost``, as a test asserts)."""

    def __init__(self, found: Sequence[Op], hardware: Hardware) -> None:
        self.linear = np.array([op.kind == "linear" for op in found])
        self.attention = np.array([op.kind == "attention" for op in found])
        peaks = {op.dtype: hardware.peak_of(op.dtype) for op in found}
        self.compute = np.array([op.flops / peaks[op.dtype] for op in found])
        self.memory = np.array([op.bytes / hardware.bandwidth for op in found])
        self.units = hardware.units
        self._tiles(found)

    def _tiles(self, found: Sequence[Op]) -> None:
        """Precompute, per op and tile, computed over useful area, and per tile its reading cost."""
        height, width = (np.array([tile[i] for tile in TILES], np.float64) for i in (0, 1))
        rows, columns, groups = (
            np.array([[getattr(op, name) or 1.0] for op in found]) for name in ("rows", "columns", "groups")
        )
        tiles = groups * np.ceil(rows / height) * np.ceil(columns / width)
        area = np.ceil(tiles / self.units) * self.units * height * width
        self.waste = area / (groups * rows * columns)
        self.reading = (height + width) / (2 * height * width)

    def seconds(self, eff: Efficiency) -> Array:
        """Return the predicted seconds of every op, shape [ops]."""
        compute = self.compute / np.where(
            self.linear, eff.linear_compute, np.where(self.attention, eff.attention_compute, 1.0)
        )
        if self.units > 1 and eff.tile_side:
            penalty = (self.waste * (1 + eff.tile_side * self.reading)).min(axis=1)
            compute = np.where(self.linear, compute * penalty, compute)
        memory = self.memory / np.where(
            self.linear, eff.linear_memory, np.where(self.attention, eff.attention_memory, eff.elementwise_memory)
        )
        start = eff.launch + np.where(self.linear, eff.linear_start, 0.0)
        return np.asarray(start + np.maximum(compute, memory), np.float64)


# Search ranges; the search ends well inside them for every device tried.
_RANGES = {
    "linear_compute": (0.2, 1.0), "linear_memory": (0.2, 1.0), "attention_compute": (0.1, 1.0),
    "attention_memory": (0.1, 1.0), "elementwise_memory": (0.1, 1.0), "tile_side": (0.0, 96.0), "launch": (0.0, 2e-5),
    "linear_start": (0.0, 2e-5),
}  # fmt: skip


def fit(
    measurements: Iterable[Measurement],
    hardware: Hardware | str,
    start: Efficiency | None = None,
    fields: Sequence[str] | None = None,
) -> Fit:
    """Fit the efficiencies of ``hardware`` to measured kernels by coordinate search.

    ``fields`` names the numbers to fit; by default those that the kinds of ops present can tell. Needs at least
    eight measurements. Deterministic.
    """
    found = list(measurements)
    if len(found) < 8:
        raise RooflineError(f"fitting needs at least 8 measurements, got {len(found)}")
    device = get_hardware(hardware)
    predictor = Predictor([m.op for m in found], device)
    seconds = np.array([m.seconds for m in found])
    best = start or Efficiency.default(device)
    names = list(fields) if fields is not None else _fields_of({m.op.kind for m in found}, device)
    loss = _loss(predictor, seconds, best)
    for _ in range(8):
        before = loss
        for name in names:
            best, loss = _line_search(predictor, seconds, best, name, loss)
        if before - loss < 1e-5:
            break
    return Fit(best, median_error(predictor, seconds, best), len(found))


def _fields_of(kinds: set[str], device: Hardware) -> list[str]:
    """Return what kernels of these kinds can tell: linears alone cannot separate their start from any launch."""
    matrix = [kind for kind in ("linear", "attention") if kind in kinds]
    names = [f"{kind}_{part}" for kind in matrix for part in ("compute", "memory")]
    names += ["tile_side"] if "linear" in kinds and device.units > 1 else []
    names += ["elementwise_memory"] if "elementwise" in kinds else []
    return [*names, "launch", *(["linear_start"] if "linear" in kinds and len(kinds) > 1 else [])]


def _loss(predictor: Predictor, seconds: Array, eff: Efficiency) -> float:
    return float(np.mean(np.abs(np.log(predictor.seconds(eff) / seconds))))


def _line_search(
    predictor: Predictor, seconds: Array, best: Efficiency, name: str, loss: float
) -> tuple[Efficiency, float]:
    """Try a grid over the field's range, then ever finer ones around the best value so far."""
    low, high = _RANGES[name]
    for _ in range(4):
        for value in np.linspace(low, high, 13):
            trial = replace(best, **{name: float(value)})
            trial_loss = _loss(predictor, seconds, trial)
            if trial_loss < loss:
                best, loss = trial, trial_loss
        middle, reach = getattr(best, name), (high - low) / 8
        low, high = max(_RANGES[name][0], middle - reach), min(_RANGES[name][1], middle + reach)
    return best, loss


def median_error(predictor: Predictor, seconds: Array, eff: Efficiency) -> float:
    """Return the median of |predicted - measured| / measured."""
    return float(np.median(np.abs(predictor.seconds(eff) - seconds) / seconds))


def errors(measurements: Iterable[Measurement], hardware: Hardware | str, eff: Efficiency) -> Array:
    """Return |predicted - measured| / measured of each measurement, shape [n]."""
    found = list(measurements)
    predicted = Predictor([m.op for m in found], get_hardware(hardware)).seconds(eff)
    seconds = np.array([m.seconds for m in found])
    return np.asarray(np.abs(predicted - seconds) / seconds, np.float64)


def split_halves(measurements: Sequence[Measurement], seed: int = 0) -> tuple[list[Measurement], list[Measurement]]:
    """Deal the measurements at random into a half to fit and a half to judge by."""
    order = np.random.default_rng(seed).permutation(len(measurements))
    half = len(measurements) // 2
    return [measurements[i] for i in order[:half]], [measurements[i] for i in order[half:]]


def published() -> dict[str, Efficiency]:
    """Return efficiencies fitted, by this module, to Vidur's kernel times of a Llama-2-7B layer (Vidur, MLSys 2024; MIT).

    Linears and elementwise passes are fitted; attention keeps its default, which no measurement here supports.
    """
    return {
        "a100-80gb": Efficiency(linear_compute=0.885, linear_memory=0.805, elementwise_memory=0.49, tile_side=18.25,
                                launch=2.15e-6, linear_start=3.8e-6),
        "a40": Efficiency(linear_compute=0.875, linear_memory=0.785, elementwise_memory=0.78, tile_side=15.5,
                          launch=1.26e-6, linear_start=6.8e-6),
        "h100-sxm": Efficiency(linear_compute=0.91, linear_memory=0.92, elementwise_memory=0.56, tile_side=27.5,
                               launch=1.86e-6, linear_start=4.95e-6),
    }  # fmt: skip


def load_vidur(path: str | Path, kinds: Iterable[str] = ("linear",)) -> list[Measurement]:
    """Read a Vidur profile of the token-wise parts of one layer (median kernel times, fp16, any tensor parallelism).

    ``kinds`` chooses matrix products (``"linear"``) and passes over activations (``"elementwise"``).
    """
    with Path(path).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or "num_tokens" not in rows[0]:
        raise RooflineError(f"{path} is no Vidur profile: the column num_tokens is missing")
    wanted = set(kinds)
    found = []
    for row in rows:
        for column, op in _vidur_ops(row).items():
            milliseconds = float(row[f"time_stats.{column}.median"])
            if op.kind in wanted and milliseconds > 0:
                found.append(Measurement(op, milliseconds * 1e-3))
    return found


def _vidur_ops(row: dict[str, str]) -> dict[str, Op]:
    """Return the profile's columns as ops of this package (one device's share)."""
    tokens, tp, fp16 = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"]), Precision.parse("fp16")
    d, f, heads, kv = (int(row[key]) for key in ("n_embd", "n_expanded_embd", "n_head", "n_kv_head"))
    h, width = d // heads, f // tp
    q, both = heads * h // tp, (heads + 2 * kv) * h // tp
    turned = tokens * (heads + kv) * h // tp
    return {
        "attn_pre_proj": linear("qkv_proj", tokens, both, d, fp16),
        "attn_post_proj": linear("o_proj", tokens, d, q, fp16),
        "mlp_up_proj": linear("gate_up_proj", tokens, 2 * width, d, fp16),
        "mlp_down_proj": linear("down_proj", tokens, d, width, fp16),
        "input_layernorm": elementwise("attn_norm", NORM_FLOPS * tokens * d, tokens * d, tokens * d, fp16),
        "attn_rope": elementwise("rope", ROPE_FLOPS * turned, turned, turned, fp16),
        "mlp_act": elementwise("act", SILU_FLOPS * tokens * width, 2 * tokens * width, tokens * width, fp16),
        "add": elementwise("add", tokens * d, 2 * tokens * d, tokens * d, fp16),
    }


def report(device: str, path: str | Path) -> str:
    """Fit on one half of a profile's matrix products and return the errors on the other, as a sentence."""
    first, second = split_halves(load_vidur(path))
    hardware = get_hardware(device)
    found = fit(first, hardware)
    trials = {"fitted": found.efficiency, "default": Efficiency.default(hardware), "data sheet": Efficiency.ideal()}
    medians = (f"{name} {np.median(errors(second, hardware, eff)):.1%}" for name, eff in trials.items())
    return f"{device}: median error on {len(second)} held-out kernels: {', '.join(medians)}\n{found.efficiency}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m roofline.fit DEVICE VIDUR_PROFILE.csv")
    print(report(sys.argv[1], sys.argv[2]))
