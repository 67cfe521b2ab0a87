"""An endless stream of verifiable problems for a lab model: who comes, and when."""

from __future__ import annotations

import random
from collections.abc import Iterator

from llmlab.tasks.base import Problem
from llmlab.tasks.doc import Doc
from llmlab.tasks.tour import tour_problems

LONG_TOKENS = 1000  # of the prompt that a visitor drops in; it needs not be exact


class Stream:
    """Problems with exponential gaps. `gap(rate)` draws the seconds to the next one, so the rate may change at any time."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(f"stream-{seed}")
        self._problems = self._endless(seed)

    def next(self) -> Problem:
        return next(self._problems)

    def gap(self, rate: float) -> float:
        """Seconds to the next arrival at `rate` a second."""
        return self._rng.expovariate(rate)

    def long_prompt(self) -> Problem:
        """A record of about a thousand tokens with one question."""
        return Doc(LONG_TOKENS, LONG_TOKENS).problem(self._rng, split="test")

    @staticmethod
    def _endless(seed: int) -> Iterator[Problem]:
        while True:
            yield from tour_problems(seed, 64)
            seed += 1
