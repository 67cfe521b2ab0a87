"""Weights that do not all fit on the device: which units are there, which are on their way, which must leave.

    host (all units, for ever) --fetch--> [ slot | slot | ... ] on the device --> computed with

A unit is an expert of a layer, or a whole dense layer. The store keeps the books and asks a `Mover` for the copies; the
mover's tickets are whatever its world waits for: an instant of virtual time, or a future of a copying thread. The host
keeps every unit, so that leaving costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, Protocol, TypeVar

import msgspec

from llmlab.seams import ExpertId, Key, UnitView
from llmlab.types import ConfigError

T = TypeVar("T")
Reason = Literal["initial", "demand", "prefetch"]


class Fetch(msgspec.Struct, frozen=True):
    """A copy of a unit into a slot, and whom it drives out. `unused`: that one leaves without ever having been of use."""

    unit: ExpertId
    slot: int
    reason: Reason
    evicted: ExpertId | None = None
    unused: bool = False


class Mover(Protocol[T]):
    """Copies units to slots. `after`: the last work that reads the slot; the copy must not overtake it."""

    def fetch(self, fetch: Fetch, after: T | None) -> T: ...


class Slot(msgspec.Struct, Generic[T]):
    """One unit's room on the device. `ticket`: of the copy that filled it; `reader`: of the last work that read it."""

    index: int
    unit: ExpertId
    ticket: T
    reason: Reason
    loaded_at: int
    last_used: int
    num_uses: int = 0
    pins: int = 0
    reader: T | None = None


class Room(msgspec.Struct, Generic[T], frozen=True):
    """An empty slot, and the last work that read what was in it."""

    index: int
    reader: T | None = None


class WeightStore(Generic[T]):
    """See the module's text. `tick` counts layers executed.

    Raises ConfigError if there is no slot at all.
    """

    def __init__(self, num_slots: int, mover: Mover[T]) -> None:
        if num_slots < 1:
            raise ConfigError("num_expert_slots", num_slots, "leaves no room for a single expert", "Give 1 or more.")
        self.num_slots = num_slots
        self.tick = 0
        self._mover = mover
        self._slots: dict[ExpertId, Slot[T]] = {}
        self._empty: list[Room[T]] = [Room(index) for index in reversed(range(num_slots))]

    def __contains__(self, unit: object) -> bool:
        return unit in self._slots

    def of_layer(self, layer: int) -> tuple[int, ...]:
        """Experts of a layer that are there or on their way, in order."""
        return tuple(sorted(unit.expert for unit in self._slots if unit.layer == layer))

    @property
    def units(self) -> tuple[ExpertId, ...]:
        return tuple(self._slots)

    def slot(self, unit: ExpertId) -> Slot[T]:
        """The slot of a unit that is there or on its way."""
        return self._slots[unit]

    def load(self, units: Sequence[ExpertId]) -> None:
        """Bring units before the run, as many as fit."""
        for unit in units:
            if unit not in self._slots and self._empty:
                self._start(unit, "initial", None)

    def bring(self, unit: ExpertId, reason: Reason, score: Callable[[UnitView, ExpertId], Key]) -> Slot[T] | None:
        """The slot of a unit, which may have to be fetched first; None if all slots are pinned."""
        slot = self._slots.get(unit)
        if slot is not None:
            return slot
        victim = None
        if not self._empty:
            victim = self._victim(unit, score)
            if victim is None:
                return None
            self._leave(victim)
        return self._start(unit, reason, victim)

    def pin(self, unit: ExpertId) -> Slot[T]:
        """Use a unit that is there: it cannot leave before `release`."""
        slot = self._slots[unit]
        slot.pins += 1
        slot.num_uses += 1
        slot.last_used = self.tick
        return slot

    def release(self, unit: ExpertId, reader: T | None = None) -> None:
        """The work that reads the unit was issued as `reader` (None: it is done)."""
        slot = self._slots[unit]
        slot.pins -= 1
        slot.reader = reader

    def unpin(self) -> None:
        """Nobody uses anything: a new beginning after work that broke off."""
        for slot in self._slots.values():
            slot.pins = 0

    def drop(self, unit: ExpertId) -> None:
        """Give a unit's slot back: it was only passing through."""
        slot = self._slots[unit]
        if not slot.pins:
            self._leave(slot)

    def _victim(self, incoming: ExpertId, score: Callable[[UnitView, ExpertId], Key]) -> Slot[T] | None:
        free = [slot for slot in self._slots.values() if not slot.pins]
        if not free:
            return None
        return min(free, key=lambda s: (_key(score(UnitView(s.unit, s.last_used, s.loaded_at, s.num_uses), incoming)), s.index))

    def _leave(self, slot: Slot[T]) -> None:
        del self._slots[slot.unit]
        self._empty.append(Room(slot.index, slot.reader))

    def _start(self, unit: ExpertId, reason: Reason, victim: Slot[T] | None) -> Slot[T]:
        room = self._empty.pop()
        gone = None if victim is None else victim.unit
        fetch = Fetch(unit, room.index, reason, gone, victim is not None and not victim.num_uses)
        slot = self._slots[unit] = Slot(room.index, unit, self._mover.fetch(fetch, room.reader), reason, self.tick, self.tick)
        return slot


def _key(score: Key) -> tuple[float, ...]:
    return score if isinstance(score, tuple) else (score,)
