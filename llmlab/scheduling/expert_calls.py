"""Asking the placement of a mixture's experts, layer by layer, and keeping what it may look at. Both executors ask so."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

from msgspec.structs import replace

from llmlab.memory.weight_store import Reason, Slot, WeightStore
from llmlab.scheduling.seamcalls import Seam, checked_key, checked_routing, checked_units, unchecked
from llmlab.seams import ExpertCosts, ExpertId, ExpertUse, RoutingView, WeightPlacement, Where
from llmlab.types import ExpertDispatch

T = TypeVar("T")
KEPT_STEPS = 32  # earlier steps whose routing a policy may look at


class ExpertCalls(Generic[T]):
    """One placement with the store that it decides on. Layers come in order; layer 0 begins a step."""

    def __init__(self, seam: Seam[WeightPlacement], costs: ExpertCosts, num_layers: int, num_experts: int,
                 store: WeightStore[T]) -> None:  # fmt: skip
        self.store = store
        self._seam, self._costs = seam, costs
        self._num_layers, self._num_experts = num_layers, num_experts
        self._blank = ((0,) * num_experts,) * num_layers
        self._counts = self._blank
        self._past: deque[tuple[tuple[int, ...], ...]] = deque(maxlen=KEPT_STEPS)
        self._step = -1

    def load(self, popularity: Sequence[Sequence[float]]) -> None:
        """Bring what the policy wants on the device before the run."""
        slots = self.store.num_slots
        self.store.load(self._seam.ask(lambda p: p.initial(popularity, slots), self._known))

    def adopt(self, seam: Seam[WeightPlacement]) -> None:
        """Ask another policy from now on; what is on the device stays there."""
        self._seam = seam

    def look(self, layer: int, uses: tuple[ExpertUse, ...], guess: tuple[ExpertUse, ...]) -> RoutingView:
        """What the policy sees now that the router of `layer` has spoken."""
        self.store.tick += 1
        if layer == 0:
            self._step += 1
            if self._step:
                self._past.append(self._counts)
            self._counts = self._blank
        tokens = {use.expert: use.num_tokens for use in uses}
        row = tuple(tokens.get(expert, 0) for expert in range(self._num_experts))
        self._counts = (*self._counts[:layer], row, *self._counts[layer + 1 :])
        return RoutingView(self._step, layer, self._num_layers, uses, self.store.of_layer(layer), self.store.num_slots, guess,
                           self._counts, tuple(self._past), self._costs)  # fmt: skip

    def look_again(self, view: RoutingView) -> RoutingView:
        """The same view, after units have come and gone."""
        return replace(view, resident=self.store.of_layer(view.layer))

    def place(self, view: RoutingView) -> Mapping[int, Where]:
        return self._seam.ask(lambda p: p.place(view), lambda answer: checked_routing(answer, view))

    def prefetch(self, view: RoutingView) -> Sequence[ExpertId]:
        return self._seam.ask(lambda p: p.prefetch(view), self._known)

    def bring(self, unit: ExpertId, reason: Reason, view: RoutingView) -> Slot[T] | None:
        """The unit's slot; the policy says who leaves for it. None if all slots are pinned."""
        seam = self._seam
        return self.store.bring(unit, reason, lambda one, incoming: seam.ask(lambda p: checked_key(p.score(one, incoming, view)), unchecked))

    def _known(self, units: Sequence[ExpertId]) -> Sequence[ExpertId]:
        return checked_units(units, self._num_layers, self._num_experts)


def told(layer: int, chosen: Mapping[int, Where]) -> ExpertDispatch:
    """A layer's placement as the log tells it."""

    def those(*places: Where) -> tuple[int, ...]:
        return tuple(expert for expert, where in chosen.items() if where in places)

    return ExpertDispatch(layer, those("device"), those("fetch", "stream"), those("cpu"), those("defer"))
