"""The host tier: a plain pool of host blocks for swapped-out KV, and the choice to use it (seam D)."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.registry import Registry
from llmlab.seams import EngineView, RequestView, Tiering, TierOption


class HostPool:
    """Free list of host blocks. Host blocks are never shared."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks; the caller has checked `num_free`."""
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        self._free.extend(reversed(blocks))

    def problems(self, owned: Sequence[int]) -> list[str]:
        if sorted([*self._free, *owned]) != list(range(self.num_blocks)):
            return ["host blocks leaked or owned twice"]
        return []


class Recompute:
    """Always drop the victim's KV and compute it again."""

    name = "recompute"

    def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
        return "recompute"


class Swap:
    """Move the victim's KV to the host whenever it fits there, else recompute."""

    name = "swap"

    def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
        return "swap" if any(o.mode == "swap" and o.feasible for o in options) else "recompute"


class Cheapest:
    """The feasible option with the smallest predicted time until the victim is back."""

    name = "cheapest"

    def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
        return min((o for o in options if o.feasible), key=lambda o: o.predicted.seconds).mode


TIERINGS: Registry[Tiering] = Registry("tiering", {"recompute": Recompute, "swap": Swap, "cheapest": Cheapest})
