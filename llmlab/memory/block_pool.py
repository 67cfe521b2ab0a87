"""The pool of KV blocks: who is free, who is shared, who is findable.

    every block is in exactly one state
      blank    no owner, no findable content          -> taken first
      idle     no owner, content findable by hash     -> taken by eviction, revived by a prefix hit
      owned    refs >= 1 (block tables, quarantine)
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import islice

from llmlab.seams import BlockView

# Eviction policies choose among this many of the least recently used blocks: keeps a step's cost bounded.
EVICTION_WINDOW = 8


class BlockPool:
    """Reference-counted blocks 0 .. num_blocks-1. Not thread-safe; only the KV manager calls it.

    `choose` picks the block to evict among the least recently used ones; None takes the very first of them.
    """

    def __init__(self, num_blocks: int, choose: Callable[[Sequence[BlockView]], int] | None) -> None:
        self.num_blocks = num_blocks
        self.choose = choose
        self.refs = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.by_hash: dict[bytes, int] = {}
        self._blank = deque(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._last_used = [0] * num_blocks
        self._num_hits = [0] * num_blocks
        self._depth = [0] * num_blocks
        self._releases = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken: blank, or idle and evictable."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def take(self) -> tuple[int, bytes | None]:
        """A block with one reference, and the hash that its eviction made unfindable, if any.

        The caller has checked `num_free`.
        """
        if self._blank:
            block, evicted = self._blank.popleft(), None
        elif self.choose is None:
            block, _ = self._idle.popitem(last=False)
            evicted = self._forget(block)
        else:
            block = self._pick_idle(self.choose)
            del self._idle[block]
            evicted = self._forget(block)
        self.refs[block], self._num_hits[block] = 1, 0
        return block, evicted

    def _pick_idle(self, choose: Callable[[Sequence[BlockView]], int]) -> int:
        if len(self._idle) == 1:
            return next(iter(self._idle))
        window = list(islice(self._idle, EVICTION_WINDOW))
        views = [BlockView(b, self._last_used[b], self._num_hits[b], self._depth[b]) for b in window]
        return window[choose(views)]

    def _forget(self, block: int) -> bytes | None:
        block_hash = self.hashes[block]
        if block_hash is not None:
            del self.by_hash[block_hash]
            self.hashes[block] = None
        return block_hash

    def pin(self, block: int) -> None:
        """One more owner of a block that is owned or idle (a prefix hit)."""
        if self.refs[block] == 0:
            del self._idle[block]
        self.refs[block] += 1
        self._num_hits[block] += 1

    def release(self, *blocks: int) -> None:
        """One owner less for each; without owners a block becomes idle (findable) or blank."""
        refs, hashes, last_used = self.refs, self.hashes, self._last_used
        for block in blocks:
            refs[block] -= 1
            if refs[block] > 0:
                continue
            self._releases += 1
            last_used[block] = self._releases
            if hashes[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def cache(self, block: int, block_hash: bytes, depth: int) -> bool:
        """Make an owned, full block findable; False if the same content is findable already."""
        if block_hash in self.by_hash or self.hashes[block] is not None:
            return False
        self.by_hash[block_hash] = block
        self.hashes[block] = block_hash
        self._depth[block] = depth
        return True

    def forget(self, block: int) -> None:
        """Make a findable block unfindable, because what it holds was lost."""
        self._forget(block)
        if block in self._idle:
            del self._idle[block]
            self._blank.append(block)

    def lookup(self, block_hash: bytes) -> int | None:
        return self.by_hash.get(block_hash)

    def problems(self, owners: dict[int, int]) -> list[str]:
        """Contradictions, given how many owners each block should have. Empty means sound."""
        found = [
            f"block {block}: {self.refs[block]} references, {owners.get(block, 0)} owners"
            for block in range(self.num_blocks)
            if self.refs[block] != owners.get(block, 0)
        ]
        blank = list(self._blank)
        free = blank + list(self._idle)
        if len(free) != len(dict.fromkeys(free)):
            found.append("a block is free twice")
        unowned = [block for block in range(self.num_blocks) if self.refs[block] == 0]
        if sorted(free) != unowned:
            found.append(f"free blocks {sorted(free)[:8]} differ from unowned blocks {unowned[:8]}")
        found += [f"blank block {block} is findable" for block in blank if self.hashes[block] is not None]
        found += [f"idle block {block} is not findable" for block in self._idle if self.hashes[block] is None]
        if {h: b for b, h in enumerate(self.hashes) if h is not None} != self.by_hash:
            found.append("the hash table and the blocks disagree")
        return found
