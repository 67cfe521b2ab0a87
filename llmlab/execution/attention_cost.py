"""What a step pays because attention is dealt to programs in pieces: the very plan that the GPU's kernels would run.

    extra = attention seconds x (imbalance - 1) + partial states, written and read again, over the bandwidth

Per class of rows (decoding, prefilling), as they run one after the other. Imports no torch.
"""

from __future__ import annotations

import numpy as np

from llmlab.kernels.attention_plan import GridPlan, plan_grid, plan_per_row
from llmlab.kernels.capability import Capability, capability_of, decode_tile, prefill_tile
from llmlab.types import ConfigError, unknown_name
from roofline.cost import CostModel
from roofline.ops import Slice
from roofline.rows import Rows

PLANS = ("ideal", "balanced", "per_row")


class PlanCost:
    """Extra seconds of attention on one card, under "balanced" plans or "per_row"."""

    def __init__(self, kind: str, model: CostModel, capability: Capability) -> None:
        shape = model.shape
        self._kind, self._model, self._capability = kind, model, capability
        part = Slice.of(shape, model.tp)  # a group's devices run the same plan, each with its own heads
        self._heads, self._group, self._dim = part.kv_heads, part.heads // part.kv_heads, shape.head_dim
        self._num_layers, self._query_heads = shape.num_layers, part.heads

    def plans(self, rows: Rows) -> list[tuple[Rows, GridPlan]]:
        """The classes of a step, each with its plan."""
        query, kv = np.array(rows.query, np.int64), np.array(rows.kv, np.int64)
        small = decode_tile(self._capability, self._dim, self._group)
        few = query <= small.tokens(self._group)
        found = []
        for chosen, tile in ((few, small), (~few, prefill_tile(self._capability, self._dim, self._group))):
            if chosen.any():
                cu = np.concatenate(([0], np.cumsum(query[chosen])))
                make = plan_grid if self._kind == "balanced" else plan_per_row
                plan = make(cu, kv[chosen], heads=self._heads, programs=self._capability.units * tile.programs,
                            tile=tile.tokens(self._group))  # fmt: skip
                found.append((Rows(query[chosen].tolist(), kv[chosen].tolist()), plan))
        return found

    def extra_seconds(self, rows: Rows) -> float:
        """Seconds beyond those of a perfect deal, over all layers."""
        extra = 0.0
        for part, plan in self.plans(rows):
            state = 2 * 4 * plan.num_partials * self._query_heads * (self._dim + 1)
            one = self._model.attention_seconds(part) * (plan.imbalance - 1.0) + state / self._model.bandwidth
            extra += self._num_layers * one
        return extra


def plan_cost(kind: str, model: CostModel) -> PlanCost | None:
    """The extra cost of a way to plan; None for "ideal". Raises ConfigError for a device that is no GPU of the table."""
    if kind not in PLANS:
        raise unknown_name("attention_plan", kind, PLANS)
    if kind == "ideal":
        return None
    capability = capability_of(model.hardware.name)
    if not capability.is_gpu:
        raise ConfigError("attention_plan", kind, f"{model.hardware.name} is no GPU: there is no grid to deal to", "Leave it out.")
    return PlanCost(kind, model, capability)
