"""Clocks: one interface, so that the same engine runs in real or in virtual time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the run began. `advance_to` waits (real) or jumps (virtual); never goes back."""

    def now(self) -> float: ...

    def advance_to(self, t: float) -> None: ...


class RealClock:
    """Wall time, counted from construction."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._zero

    def advance_to(self, t: float) -> None:
        remaining = t - self.now()
        if remaining > 0:
            time.sleep(remaining)

    def leave_out(self, seconds: float) -> None:
        """The last `seconds` do not count: the run was held on purpose (slow motion, a pause)."""
        self._zero += seconds


class VirtualClock:
    """Simulated time: moves only when told."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance_to(self, t: float) -> None:
        self._now = max(self._now, t)
