"""The core's cost model on top of `roofline`: WorkItems become rows (query tokens, KV tokens)."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.types import Cost, Span, Traffic, WorkItem
from roofline.cost import CostModel as RooflineModel
from roofline.hardware import Hardware
from roofline.hardware import get as get_hardware
from roofline.rows import Rows
from roofline.shapes import Shape


class RooflineCost:
    """Predicted cost of steps and swaps of one model on one device. See `seams.CostModel`."""

    def __init__(self, shape: Shape, hardware: Hardware | str, block_size: int, dtype: str | None = None) -> None:
        self.hardware = get_hardware(hardware)
        self.shape = shape
        self.model = RooflineModel(shape, self.hardware, dtype)
        self._block_bytes = int(shape.kv_bytes_per_token(dtype or self.hardware.default_dtype) * block_size)

    def step(self, items: Sequence[WorkItem]) -> Cost:
        spans = [item.tokens for item in items]
        query, kv = [stop - start for start, stop in spans], [stop for _, stop in spans]
        logits = [item.emit for item in items].count("sample")
        named = [item.layers for item in items]
        layers = [span or Span(0, self.shape.num_layers) for span in named] if any(named) else None
        cost = self.model.step(Rows(query, kv, layers=layers, logits=logits))
        return Cost(cost.seconds, cost.flops, Traffic(hbm=cost.bytes_hbm), cost.joules, cost.bound)

    def swap(self, num_blocks: int) -> Cost:
        size = num_blocks * self._block_bytes
        if "host" in self.hardware.links:
            return Cost(self.model.transfer_seconds(size), bytes=Traffic(d2h=size), bound="link")
        return Cost(2 * size / self.hardware.bandwidth, bytes=Traffic(hbm=2 * size), bound="memory")

    def block_bytes(self) -> int:
        return self._block_bytes
