"""Block tables: where a request's KV lies, token by token.

    token position p  ->  slot = block_ids[p // block_size] * block_size + p % block_size
"""

from __future__ import annotations

from collections.abc import Iterator


class BlockTable:
    """The blocks of one request, in order of token position. `num_findable` leading blocks have been
    offered to the prefix cache. `host_block_ids` holds the KV while the request is swapped out."""

    __slots__ = ("block_ids", "host_block_ids", "num_findable")

    def __init__(self) -> None:
        self.block_ids: list[int] = []
        self.host_block_ids: list[int] = []
        self.num_findable = 0

    def __len__(self) -> int:
        return len(self.block_ids)


def slots(block_ids: list[int], block_size: int, start: int, stop: int) -> Iterator[int]:
    """Slot of every token position in [start, stop)."""
    for position in range(start, stop):
        yield block_ids[position // block_size] * block_size + position % block_size
