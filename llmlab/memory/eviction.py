"""Which cached, unused block to give away first (seam D). Smallest score goes first."""

from __future__ import annotations

from llmlab.registry import Registry
from llmlab.seams import BlockView, Eviction


class LRU:
    """The block that was released longest ago."""

    name = "lru"

    def score(self, block: BlockView) -> float:
        return block.last_used


class LFU:
    """The block that was hit least often; among equals the least recently used."""

    name = "lfu"

    def score(self, block: BlockView) -> float:
        return block.num_hits + block.last_used / (1 << 40)


class DeepestFirst:
    """The block deepest in its prefix: the heads of shared prefixes stay longest."""

    name = "deepest_first"

    def score(self, block: BlockView) -> float:
        return -block.depth


EVICTIONS: Registry[Eviction] = Registry("eviction", {"lru": LRU, "lfu": LFU, "deepest_first": DeepestFirst})
