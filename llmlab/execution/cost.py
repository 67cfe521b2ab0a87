"""The core's cost model on top of `roofline`: WorkItems become rows (query tokens, KV tokens).

`hardware` is a name of the hardware table, or a measured profile (the path of a *.json, or the name of a shipped one).
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import llmlab
from llmlab.execution.attention_cost import plan_cost
from llmlab.execution.opgraph import Pending, build
from llmlab.execution.overlap import Overlap
from llmlab.execution.tensor_parallel import group_kv_bytes
from llmlab.execution.timelines import Timelines, busy
from llmlab.seams import LayerCost
from llmlab.types import Cost, Move, Span, Traffic, WorkItem
from roofline.cost import AroundAttention, Efficiency, StepCost
from roofline.cost import CostModel as RooflineModel
from roofline.errors import RooflineError, nearest
from roofline.hardware import Hardware
from roofline.hardware import get as get_hardware
from roofline.ops import AttentionRates
from roofline.precision import Precision
from roofline.profile import Machine, Profile, ProfileCost, read, same_sizes
from roofline.rows import Rows
from roofline.shapes import Shape

# What llmlab's executor needs for a step on a CPU whatever the step holds: Python, and the first touch of the weights. Of
# decoding steps of lab-s on one thread of `cpu-2core`: 0.18 ms with one row, of which the arithmetic is a third.
CPU_STEP_SECONDS = 1.2e-4
DEFAULT_HOST = "xeon-6130-2s"  # the CPU beside a GPU, if nobody says which


class RooflineCost:
    """Predicted cost of steps and swaps of one model on one device. See `seams.CostModel`.

    Measured if `hardware` names a profile, else computed. `host`: the CPU beside the device, which attends for items that
    were placed there (None: DEFAULT_HOST, or what the profile measured). `devices` share every layer: seconds are those of
    the group, operations, bytes and joules those of all its devices. Raises RooflineError.
    """

    def __init__(self, shape: Shape, hardware: Hardware | str, block_size: int, dtype: str | None = None,
                 host: Hardware | str | None = None, attention_plan: str = "ideal", devices: int = 1) -> None:  # fmt: skip
        self.shape, self.block_size, self.devices = shape, block_size, devices
        self.host = host
        self.name = hardware if isinstance(hardware, str) else hardware.name
        self.dtype = dtype
        self._layers: RooflineLayers | None = None
        self._last: tuple[Sequence[WorkItem], Cost] = (), Cost(0.0)
        self.model: RooflineModel | ProfileCost
        if isinstance(hardware, str) and is_profile(hardware):
            self.model = ProfileCost(find_profile(hardware), shape, hardware)
        else:
            self.model = RooflineModel(shape, hardware, dtype, efficiency=efficiency_of(get_hardware(hardware)), tp=devices)
        self.hardware = self.model.hardware
        self._planned = None if isinstance(self.model, ProfileCost) else plan_cost(attention_plan, self.model)
        self._block_bytes = int(group_kv_bytes(shape, Precision.parse(dtype or self.hardware.default_dtype), devices) * block_size)

    def step(self, items: Sequence[WorkItem]) -> Cost:
        if items is self._last[0]:  # the scheduler predicted the very step that the executor takes now
            return self._last[1]
        self._last = items, self._step(items)
        return self._last[1]

    def _step(self, items: Sequence[WorkItem]) -> Cost:
        if "cpu" in [item.device for item in items]:
            return self._split(items, (), {})
        cost = self._whole(items)
        return Cost(cost.seconds, cost.flops, Traffic(hbm=cost.bytes_hbm, net=cost.bytes_link), cost.joules, cost.bound)

    def plan(self, items: Sequence[WorkItem], moves: Sequence[Move], writes: Mapping[str, Sequence[int]]) -> Cost:
        if not moves and in_one_batch(items):
            return self.step(items)
        return self._split(items, moves, writes)

    def _whole(self, items: Sequence[WorkItem]) -> StepCost:
        rows = rows_of(items, self.shape.num_layers)
        cost = self.model.step(rows)
        if self._planned is not None:
            cost = replace(cost, seconds=cost.seconds + self._planned.extra_seconds(rows))
        return cost

    def _split(self, items: Sequence[WorkItem], moves: Sequence[Move], writes: Mapping[str, Sequence[int]]) -> Cost:
        """What goes to several resources: the time of its ops on otherwise idle timelines. Operations and bytes of memory
        are those of the whole model, wherever they are done."""
        layers = self.layers()
        time = placed_alone(items, moves, writes, layers, self._block_bytes / self.block_size / layers.num_layers)
        sent = sum(item.num_tokens * (layers.num_layers if item.layers is None else item.layers[1] - item.layers[0])
                   for item in items if item.device == "cpu")  # fmt: skip
        h2d, d2h = layers.returned_bytes(sent), layers.sent_bytes(sent)
        for move in moves:
            h2d += layers.move_bytes(move) if move.kind == "swap_in" else 0.0
            d2h += layers.move_bytes(move) if move.kind == "swap_out" else 0.0
        whole = self._whole(items) if items else None
        if whole is None:
            return Cost(time.seconds, bytes=Traffic(h2d=h2d, d2h=d2h), bound=time.bound)
        return Cost(time.seconds, whole.flops, Traffic(hbm=whole.bytes_hbm, h2d=h2d, d2h=d2h, net=whole.bytes_link), whole.joules, time.bound)

    def layers(self) -> RooflineLayers:
        """The same cost by layer and resource, with the host that this model of cost was made with."""
        if self._layers is None:
            self._layers = RooflineLayers(self)
        return self._layers

    def seconds(self, seen: Sequence[int], chunks: Sequence[Span], logits: int) -> float:
        """`step(...).seconds` of rows with one new token, which see `seen` tokens each, and of `chunks` of prompts."""
        if isinstance(self.model, ProfileCost):
            return self.model.step(_plain_rows(seen, chunks, logits)).seconds
        extra = 0.0 if self._planned is None else self._planned.extra_seconds(_plain_rows(seen, chunks, logits))
        kv = pairs = sum(seen)
        tokens = len(seen)
        for start, stop in chunks:
            query = stop - start
            tokens, kv, pairs = tokens + query, kv + stop, pairs + query * stop - query * (query - 1) // 2
        return self.model.seconds(tokens, kv, float(pairs), logits) + extra

    def engine_seconds(self, items: Sequence[WorkItem]) -> float:
        """What the engine itself needs for such a step, as far as it was measured: planning, committing, answers."""
        return self.model.engine_seconds(rows_of(items)) if isinstance(self.model, ProfileCost) else 0.0

    @property
    def wake(self) -> float:
        """Seconds that an engine without work loses until it has noticed an arrival, as far as they were measured."""
        return self.model.profile.wake if isinstance(self.model, ProfileCost) else 0.0

    def swap(self, num_blocks: int) -> Cost:
        size = num_blocks * self._block_bytes
        if "host" in self.hardware.links:  # every device has a link of its own
            return Cost(self.model.transfer_seconds(size / self.devices), bytes=Traffic(d2h=size), bound="link")
        return Cost(2 * size / self.hardware.bandwidth, bytes=Traffic(hbm=2 * size), bound="memory")

    def block_bytes(self) -> int:
        return self._block_bytes


def efficiency_of(hardware: Hardware) -> Efficiency:
    """The usual fractions, and on a CPU the executor's own time."""
    usual = Efficiency.default(hardware)
    return replace(usual, step=CPU_STEP_SECONDS) if hardware.kind == "cpu" else usual


def rows_of(items: Sequence[WorkItem], num_layers: int = 0) -> Rows:
    """The rows of a step; items without layers pass all `num_layers`. 0: layers do not matter, and are left out."""
    query = [item.tokens[1] - item.tokens[0] for item in items]
    kv = [item.tokens[1] for item in items]
    logits = sum([1 + len(item.drafts) for item in items if item.emit == "sample"])
    if num_layers and any([item.layers is not None for item in items]):  # noqa: C419  a list is faster here
        passing = [item for item in items if item.layers is None or item.layers[1] > item.layers[0]]
        if len(passing) < len(items):  # what is left of a token behind the last layer is its logits
            rows = rows_of(passing, num_layers)
            return replace(rows, logits=min(logits, sum(rows.query)))
        return Rows(query, kv, layers=[item.layers or Span(0, num_layers) for item in items], logits=logits)
    return Rows(query, kv, logits=logits)


def _plain_rows(seen: Sequence[int], chunks: Sequence[Span], logits: int) -> Rows:
    return Rows([1] * len(seen) + [stop - start for start, stop in chunks], [*seen, *(stop for _, stop in chunks)], logits=logits)


class RooflineLayers:
    """See `seams.LayerCost`. `engine`: seconds of a step outside of the executor, where they were measured."""

    def __init__(self, cost: RooflineCost, engine: Callable[[Sequence[WorkItem]], float] = lambda items: 0.0) -> None:
        model = cost.model
        self.num_layers = cost.shape.num_layers
        self._cost, self._model, self._engine = cost, model, engine
        self._roofline = model if isinstance(model, RooflineModel) else model.roofline
        self._host: RooflineModel | float | None = None
        act = self._roofline.precision.act_bytes
        rates = AttentionRates.of(cost.shape, self._roofline.precision)
        self._sent, self._returned = rates.bytes_per_token_in + cost.shape.kv_elements * act, rates.bytes_per_token_out

    def pause(self, items: Sequence[WorkItem]) -> float:
        return self._model.pause(rows_of(items)) + self._engine(items)

    def enter(self, num_tokens: int) -> float:
        return self._model.edge_seconds(num_tokens, 0)

    def leave(self, num_rows: int) -> float:
        return self._model.edge_seconds(0, num_rows)

    def around(self, num_tokens: int, layer: int) -> AroundAttention:
        return self._model.around_attention(num_tokens, layer)

    def collective(self, num_tokens: int) -> float:
        return self._roofline.collective_seconds(num_tokens)

    def attention(self, items: Sequence[WorkItem]) -> float:
        return self._model.attention_seconds(rows_of(items))

    def host_attention(self, items: Sequence[WorkItem]) -> float:
        rows = rows_of(items)
        if isinstance(self._model, ProfileCost) and self._model.profile.cpu_attention is not None:
            return self._model.host_attention_seconds(rows)
        if self._host is None:
            self._host = host_model(self._roofline, self._cost.host or DEFAULT_HOST)
        if isinstance(self._host, float):
            return self._model.attention_seconds(rows) / self._host
        return self._host.attention_seconds(rows)

    def sent_bytes(self, num_tokens: int) -> float:
        return num_tokens * self._sent

    def returned_bytes(self, num_tokens: int) -> float:
        return num_tokens * self._returned

    def transfer_seconds(self, num_bytes: float, link: Literal["h2d", "d2h"]) -> float:
        return self._model.transfer_seconds(num_bytes, link if isinstance(self._model, ProfileCost) else "host")

    def weight_bytes(self, layer: int) -> float:
        return self._roofline.layer_weight_bytes(layer)

    def move_seconds(self, move: Move) -> float:
        if move.kind != "copy":
            return self._cost.swap(len(move.src)).seconds
        return self._model.copy_seconds(self.move_bytes(move) / self._cost.devices)

    def move_bytes(self, move: Move) -> float:
        return float(len(move.src) * self._cost.block_bytes())

    def link_of(self, move: Move) -> str:
        if move.kind == "copy" or self._cost.hardware.kind == "cpu":  # a CPU's cores copy themselves
            return "device"
        return "h2d" if move.kind == "swap_in" else "d2h"


def host_share(host: str) -> float:
    """The fraction that a text such as "8%" names. Raises ValueError."""
    share = float(host.removesuffix("%")) / 100
    if not 0 < share <= 10:
        raise ValueError("the share must lie above 0 %")
    return share


def host_model(device: RooflineModel, host: Hardware | str) -> RooflineModel | float:
    """The attention of a device's model on a CPU: the device's KV format in memory, arithmetic in the CPU's widest. A share
    ("8%") stands for a CPU of that fraction of the device's speed."""
    if isinstance(host, str) and host.endswith("%"):
        return host_share(host)
    hardware, own = get_hardware(host), device.precision
    widest = hardware.default_dtype
    precision = replace(own, linear_format=widest, attention_format=widest)
    return RooflineModel(device.shape, hardware, precision, efficiency=efficiency_of(hardware))


class Placed(NamedTuple):
    """How long a step takes on otherwise idle timelines, and the resource that works longest."""

    seconds: float
    bound: str


def placed_alone(items: Sequence[WorkItem], moves: Sequence[Move], writes: Mapping[str, Sequence[int]], layers: LayerCost,
                 kv_bytes: float) -> Placed:  # fmt: skip
    """A step placed as the simulated executor places it, with nothing left over from earlier ones. `kv_bytes` of one token
    in one layer."""
    homes = [item.home for item in items]
    if "cpu" in homes or (not moves and "cpu" in [item.device for item in items]):
        overlap = Overlap(layers, kv_bytes, Timelines(), Pending(), detailed=False)
        seconds, work = overlap.place(items, moves, 0.0), overlap.busy
    else:
        graph = build(items, moves, writes, layers, Pending(), 0.0)
        spans = Timelines().run(graph.ops, 0.0)
        seconds, work = max((spans[i].end for i in graph.ends), default=0.0), busy(spans)
    return Placed(seconds, max(work, key=lambda name: work[name]) if work else "")


def in_one_batch(items: Sequence[WorkItem]) -> bool:
    """Whether all items stay on the device, in one batch."""
    placed = [(item.device, item.lane, item.home) for item in items]
    return placed.count(("device", 0, "device")) == len(placed)


class WallCost:
    """Costs as the clock on the wall sees them: each step takes the engine's own time, too."""

    def __init__(self, cost: RooflineCost) -> None:
        self._cost = cost
        self.swap, self.block_bytes, self.wake = cost.swap, cost.block_bytes, cost.wake

    def seconds(self, seen: Sequence[int], chunks: Sequence[Span], logits: int) -> float:
        engine = self._cost.model.engine_seconds if isinstance(self._cost.model, ProfileCost) else None
        own = engine(_plain_rows(seen, chunks, logits)) if engine is not None else 0.0
        return self._cost.seconds(seen, chunks, logits) + own

    def layers(self) -> RooflineLayers:
        """By layer and resource; the engine's time comes before the first."""
        return RooflineLayers(self._cost, self._cost.engine_seconds)

    def step(self, items: Sequence[WorkItem]) -> Cost:
        cost = self._cost.step(items)
        seconds = cost.seconds + self._cost.engine_seconds(items)
        return Cost(seconds, cost.flops, cost.bytes, cost.joules, cost.bound)


def wall_cost(cost: RooflineCost, overlap_depth: int) -> RooflineCost | WallCost:
    """What a simulated executor takes for a step: with a measured profile also the engine's time, unless it is hidden
    behind the step before (`overlap_depth` > 0)."""
    return WallCost(cost) if isinstance(cost.model, ProfileCost) and not overlap_depth else cost


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
