"""The core's cost model on top of `roofline`: WorkItems become rows (query tokens, KV tokens).

`hardware` is a name of the hardware table, or a measured profile (the path of a *.json, or the name of a shipped one).
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import llmlab
from llmlab.seams import CostModel
from llmlab.types import Cost, Span, Traffic, WorkItem
from roofline.cost import CostModel as RooflineModel
from roofline.cost import Efficiency
from roofline.errors import RooflineError, nearest
from roofline.hardware import Hardware
from roofline.hardware import get as get_hardware
from roofline.profile import Machine, Profile, ProfileCost, read, same_sizes
from roofline.rows import Rows
from roofline.shapes import Shape

# What llmlab's executor needs for a step on a CPU whatever the step holds: Python, and the first touch of the weights.
# Fitted by benchmarks/fidelity.py to whole steps of lab-s and of a 28M Llama on one thread of `cpu-2core`: 0.32 ms both.
CPU_STEP_SECONDS = 3.2e-4


class RooflineCost:
    """Predicted cost of steps and swaps of one model on one device. See `seams.CostModel`.

    Measured if `hardware` names a profile, else computed. Raises RooflineError.
    """

    def __init__(self, shape: Shape, hardware: Hardware | str, block_size: int, dtype: str | None = None) -> None:
        self.shape = shape
        self.model: RooflineModel | ProfileCost
        if isinstance(hardware, str) and is_profile(hardware):
            self.model = ProfileCost(find_profile(hardware), shape, hardware)
        else:
            self.model = RooflineModel(shape, hardware, dtype, efficiency=efficiency_of(get_hardware(hardware)))
        self.hardware = self.model.hardware
        self._block_bytes = int(shape.kv_bytes_per_token(dtype or self.hardware.default_dtype) * block_size)

    def step(self, items: Sequence[WorkItem]) -> Cost:
        cost = self.model.step(rows_of(items, self.shape.num_layers))
        return Cost(cost.seconds, cost.flops, Traffic(hbm=cost.bytes_hbm), cost.joules, cost.bound)

    def engine_seconds(self, items: Sequence[WorkItem]) -> float:
        """What the engine itself needs for such a step, as far as it was measured: planning, committing, answers."""
        return self.model.engine_seconds(rows_of(items)) if isinstance(self.model, ProfileCost) else 0.0

    def swap(self, num_blocks: int) -> Cost:
        size = num_blocks * self._block_bytes
        if "host" in self.hardware.links:
            return Cost(self.model.transfer_seconds(size), bytes=Traffic(d2h=size), bound="link")
        return Cost(2 * size / self.hardware.bandwidth, bytes=Traffic(hbm=2 * size), bound="memory")

    def block_bytes(self) -> int:
        return self._block_bytes


def efficiency_of(hardware: Hardware) -> Efficiency:
    """The usual fractions, and on a CPU the executor's own time."""
    usual = Efficiency.default(hardware)
    return replace(usual, step=CPU_STEP_SECONDS) if hardware.kind == "cpu" else usual


def rows_of(items: Sequence[WorkItem], num_layers: int = 0) -> Rows:
    """The rows of a step; items without layers pass all `num_layers`."""
    query = [item.tokens[1] - item.tokens[0] for item in items]
    kv = [item.tokens[1] for item in items]
    logits = sum(1 for item in items if item.emit == "sample")
    layers = None
    if any(item.layers for item in items):
        layers = [item.layers or Span(0, num_layers) for item in items]
    return Rows(query, kv, layers=layers, logits=logits)


class WallCost:
    """Costs as the clock on the wall sees them: each step takes the engine's own time, too."""

    def __init__(self, cost: RooflineCost) -> None:
        self._cost = cost
        self.swap, self.block_bytes = cost.swap, cost.block_bytes

    def step(self, items: Sequence[WorkItem]) -> Cost:
        cost = self._cost.step(items)
        seconds = cost.seconds + self._cost.engine_seconds(items)
        return Cost(seconds, cost.flops, cost.bytes, cost.joules, cost.bound)


def wall_cost(cost: CostModel, overlap_depth: int) -> CostModel:
    """What a simulated executor takes for a step: with a measured profile also the engine's time, unless it is hidden
    behind the step before (`overlap_depth` > 0)."""
    measured = isinstance(cost, RooflineCost) and isinstance(cost.model, ProfileCost)
    return WallCost(cost) if measured and not overlap_depth else cost  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- profiles
def is_profile(hardware: str) -> bool:
    """Whether a name of hardware means a profile."""
    return hardware.endswith(".json")


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with llmlab, by file name."""
    package = Path(llmlab.__path__[0])
    roots = package / "_data" / "profiles", package.parent / "datasets" / "profiles"
    return {path.name: path for root in roots for path in sorted(root.glob("*.json"))}


def find_profile(name: str) -> Profile:
    """The profile at a path, or the shipped one of this name. Raises RooflineError."""
    path, shipped = Path(name).expanduser(), shipped_profiles()
    if not path.exists() and name not in shipped:
        near = f"; shipped: {', '.join(nearest(name, shipped))}" if shipped else ""
        raise RooflineError(f"no such profile{near}; `llmlab profile` measures one")
    path = path if path.exists() else shipped[name]
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> Profile:
    return read(path)


def machine_here(threads: int, device: str = "cpu") -> Machine:
    """The machine at hand. `device`: "cpu", or the GPU's name."""
    return Machine(platform.node(), _processor(), os.cpu_count() or 1, threads, device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def warn_if_foreign(profile: Profile, shape: Shape, here: Machine) -> list[str]:
    """Log, and return, what a profile was not measured for: another machine or another model, with both names."""
    wrong = []
    if profile.machine != here:
        wrong.append(f"the profile is of another machine: measured on {profile.machine}; this is {here}")
    if not same_sizes(profile.shape, shape):
        wrong.append(f"the profile is of another model: measured with {profile.shape.name}, used for {shape.name}; "
                     "its times are carried over and less exact")  # fmt: skip
    for sentence in wrong:
        logging.getLogger("llmlab").warning(sentence)
    return wrong
