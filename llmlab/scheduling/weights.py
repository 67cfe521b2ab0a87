"""Experts that do not fit on the device: where they lie, where they are computed (seam C). Smallest scores leave first.

Each class states what it does with a missing expert; `_Cached` is what they share: fill the slots with the experts that
were most popular elsewhere, as many of each layer, prefetch nothing, and make room in the layer of the expert that comes:
layers are computed in turn, so the least recently used expert of ALL layers is always of the layer that comes next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llmlab.registry import Registry
from llmlab.seams import ExpertId, ExpertUse, Key, RoutingView, UnitView, WeightPlacement, Where

Counts = tuple[tuple[int, ...], ...]


class _Cached:
    """Fetch what is missing and keep it; the least recently used expert leaves."""

    missing: Where = "fetch"

    def initial(self, popularity: Sequence[Sequence[float]], num_slots: int) -> Sequence[ExpertId]:
        return popular_of_each_layer(popularity, num_slots)

    def place(self, view: RoutingView) -> Mapping[int, Where]:
        return {use.expert: "device" if use.expert in view.resident else self.missing for use in view.uses}

    def prefetch(self, view: RoutingView) -> Sequence[ExpertId]:
        return ()

    def score(self, unit: UnitView, incoming: ExpertId, view: RoutingView) -> Key:
        return (unit.unit.layer != incoming.layer, unit.last_used)


class Resident(_Cached):
    """All experts are on the device; there is nothing to place."""

    name = "resident"


class OnDemand(_Cached):
    """Fetch every expert when it is needed and keep none: the floor that all others must beat."""

    name = "on_demand"
    missing = "stream"

    def initial(self, popularity: Sequence[Sequence[float]], num_slots: int) -> Sequence[ExpertId]:
        return ()


class LRU(_Cached):
    """Fetch what is missing; the least recently used expert leaves."""

    name = "lru"


class LFU(_Cached):
    """Fetch what is missing; the expert used least often since it came leaves, the older one among equals."""

    name = "lfu"

    def score(self, unit: UnitView, incoming: ExpertId, view: RoutingView) -> Key:
        return (unit.unit.layer != incoming.layer, unit.num_uses, unit.last_used)


class Popular(_Cached):
    """Keep the experts that were most popular elsewhere, whatever their layer, for ever; others pass through."""

    name = "popular"
    missing = "stream"

    def initial(self, popularity: Sequence[Sequence[float]], num_slots: int) -> Sequence[ExpertId]:
        return most_popular(popularity, num_slots)


class NextRouter(_Cached):
    """LRU, and bring what the next layer's router already wants, seen from this layer's input."""

    name = "next_router"

    def prefetch(self, view: RoutingView) -> Sequence[ExpertId]:
        order = sorted(view.guess, key=lambda use: (-use.weight, use.expert))
        return [ExpertId(view.layer + 1, use.expert) for use in order]


class SimilarPast(_Cached):
    """Find the earlier step whose routing so far is most like this one's, and bring what it used next.

    Similarity is the mean over layers of the cosine of the counts; an expert's urgency is its count there times
    1 - (distance in layers) / (number of layers + 1). Source: moe_offload (the card's section on activation traces).
    """

    name = "similar_past"

    def prefetch(self, view: RoutingView) -> Sequence[ExpertId]:
        best = max(view.past, key=lambda past: similarity(past, view.counts, view.layer + 1), default=None)
        if best is None:
            return ()
        wanted = [(count * (1 - (layer - view.layer) / (view.num_layers + 1)), ExpertId(layer, expert))
                  for layer in range(view.layer + 1, view.num_layers) for expert, count in enumerate(best[layer]) if count]
        return [unit for _, unit in sorted(wanted, key=lambda w: (-w[0], w[1]))]

    def score(self, unit: UnitView, incoming: ExpertId, view: RoutingView) -> Key:
        """Frequent units, and those of layers that come soon, stay."""
        distance = (unit.unit.layer - view.layer) % view.num_layers
        return (unit.num_uses + 1) * (1 - distance / (view.num_layers + 1))


class CheaperSide(_Cached):
    """For each missing expert the cheaper of two: bring it, or compute it on the CPU. Popular experts stay resident.

    The CPU's cost grows with the tokens, the fetch does not: decoding goes to the CPU, long prompts to the device.
    Source: moe_offload (min over fetch and CPU per expert).
    """

    name = "cheaper_side"

    def place(self, view: RoutingView) -> Mapping[int, Where]:
        return {use.expert: "device" if use.expert in view.resident else self._cheaper(use, view) for use in view.uses}

    def _cheaper(self, use: ExpertUse, view: RoutingView) -> Where:
        there = view.costs.fetch + view.costs.device(use.num_tokens)
        return "cpu" if view.costs.cpu(use.num_tokens) <= there else "stream"


class Balanced(_Cached):
    """Split missing experts between link and CPU so that both end as early as possible.

    Experts with the most tokens are the dearest on the CPU, so the best split fetches some number of those and computes
    the rest on the CPU; every such number is tried. Link and CPU run side by side.
    """

    name = "balanced"

    def place(self, view: RoutingView) -> Mapping[int, Where]:
        missing = sorted((u for u in view.uses if u.expert not in view.resident), key=lambda u: (-u.num_tokens, u.expert))
        fetched = min(range(len(missing) + 1), key=lambda n: self._ends(missing, n, view))
        chosen: dict[int, Where] = {use.expert: "device" for use in view.uses}
        chosen.update({use.expert: "fetch" if i < fetched else "cpu" for i, use in enumerate(missing)})
        return chosen

    def _ends(self, missing: Sequence[ExpertUse], fetched: int, view: RoutingView) -> float:
        there = view.costs.fetch * fetched + (view.costs.device(missing[fetched - 1].num_tokens) if fetched else 0.0)
        return max(there, sum(view.costs.cpu(use.num_tokens) for use in missing[fetched:]))


class CpuExperts(_Cached):
    """Whatever is not resident is computed on the CPU; nothing is ever moved."""

    name = "cpu_experts"
    missing = "cpu"


class Deferred(CpuExperts):
    """As `cpu_experts`, but only the weightiest half of the missing experts ends in its layer: the others are added one
    layer later, while the device is busy with attention. Changes the result a little."""

    name = "deferred"

    def place(self, view: RoutingView) -> Mapping[int, Where]:
        chosen = dict(super().place(view))
        missing = sorted((u for u in view.uses if u.expert not in view.resident), key=lambda u: (-u.weight, u.expert))
        if view.layer + 1 < view.num_layers:
            chosen.update({use.expert: "defer" for use in missing[math.ceil(len(missing) / 2) :]})
        return chosen


class Oracle(_Cached):
    """LRU's place with knowledge of the future: the expert that is needed again last leaves (Belady).

    `future[step][layer]`: the experts in use. Without a future it is LRU.
    """

    name = "oracle"

    def __init__(self, future: Sequence[Sequence[Sequence[int]]] = ()) -> None:
        self._times: dict[ExpertId, list[int]] = {}
        for step, layers in enumerate(future):
            for layer, experts in enumerate(layers):
                for expert in experts:
                    self._times.setdefault(ExpertId(layer, expert), []).append(step * len(layers) + layer)

    def score(self, unit: UnitView, incoming: ExpertId, view: RoutingView) -> Key:
        now = view.step * view.num_layers + view.layer
        if not self._times:
            return super().score(unit, incoming, view)
        return -next((t for t in self._times.get(unit.unit, ()) if t > now), 1 << 60)


def most_popular(popularity: Sequence[Sequence[float]], num_slots: int) -> list[ExpertId]:
    """The most popular experts of all layers, as many as there are slots."""
    ranked = [(-share, ExpertId(layer, expert)) for layer, row in enumerate(popularity) for expert, share in enumerate(row)]
    return [unit for _, unit in sorted(ranked)[:num_slots]]


def popular_of_each_layer(popularity: Sequence[Sequence[float]], num_slots: int) -> list[ExpertId]:
    """The most popular experts of each layer, as many of each as possible; the rest of the slots to the first layers."""
    rows = [sorted(range(len(row)), key=lambda expert: (-row[expert], expert)) for row in popularity]
    ranked = [ExpertId(layer, row[rank]) for rank in range(len(rows[0])) for layer, row in enumerate(rows)]
    return ranked[:num_slots]


def similarity(a: Counts, b: Counts, num_layers: int) -> float:
    """Mean cosine of the rows of two count matrices over their first `num_layers` layers."""
    if not num_layers:
        return 0.0
    return sum(_cosine(a[i], b[i]) for i in range(num_layers)) / num_layers


def _cosine(a: Sequence[int], b: Sequence[int]) -> float:
    norm = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


WEIGHT_PLACEMENTS: Registry[WeightPlacement] = Registry(
    "weights",
    {policy.name: policy for policy in (Resident, OnDemand, LRU, LFU, Popular, NextRouter, SimilarPast, CheaperSide, Balanced,
                                        CpuExperts, Deferred, Oracle)},
)  # fmt: skip
