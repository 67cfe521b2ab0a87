"""Whom to preempt when a running request finds no block (seam A). Smallest score goes."""

from __future__ import annotations

from llmlab.registry import Registry
from llmlab.seams import EngineView, Key, RequestView, Victim


class LastCome:
    """The request that arrived last."""

    name = "last_come"

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Key:
        return (-candidate.arrival, -candidate.number)


class MostBlocks:
    """The request that owns the most blocks: one preemption frees much."""

    name = "most_blocks"

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Key:
        return -candidate.num_blocks


class LeastProgress:
    """The request with the fewest computed tokens: the least work is lost."""

    name = "least_progress"

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Key:
        return candidate.num_computed_tokens


class LowestPriority:
    """The request with the largest `priority` number, the last come among equals."""

    name = "lowest_priority"

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Key:
        return (-candidate.priority, -candidate.arrival)


VICTIMS: Registry[Victim] = Registry(
    "victim",
    {
        "last_come": LastCome,
        "most_blocks": MostBlocks,
        "least_progress": LeastProgress,
        "lowest_priority": LowestPriority,
    },
)
