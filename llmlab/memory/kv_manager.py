"""The KV manager: matching, pinning, counting and taking blocks in ONE transaction.

A stale count cannot exist: `start` matches the prefix again and pins the hits before it counts what is
missing, and undoes everything if that does not fit. Blocks of work in flight are quarantined on release and
become free when the step that may still write them has been collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.state import block_fingerprint, cached_fingerprint
from llmlab.memory.block_pool import BlockPool
from llmlab.memory.block_table import BlockTable
from llmlab.memory.prefix_cache import FIXED_ROOT, ROOT, chain_hashes
from llmlab.memory.tiers import HostPool
from llmlab.seams import BlockView, Need
from llmlab.types import Move, Sequence


class Reserved(msgspec.Struct, frozen=True):
    """Memory for tokens [.., stop) is there. `num_cached_tokens` of them need no computing."""

    stop: int
    num_cached_tokens: int = 0
    source: str = "prefix"


class Shortage(msgspec.Struct, frozen=True):
    """Nothing was taken: `need` blocks were wanted, `free` are there."""

    need: int
    free: int


class KVManager:
    """All KV memory of one engine. Only the scheduler calls it; `moves` collects the copies that the next
    plan must carry, in the order in which they must happen."""

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int, enable_prefix_caching: bool,
                 log: EventLog, choose_eviction: Callable[[AbstractSequence[BlockView]], int] | None) -> None:  # fmt: skip
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, choose_eviction)
        self.host = HostPool(num_host_blocks)
        self.tables: dict[str, BlockTable] = {}
        self.moves: list[Move] = []
        self._numbers: dict[str, int] = {}
        self._caching = enable_prefix_caching
        self._log = log
        self._quarantine: dict[int, list[int]] = {}
        self._withheld: list[int] = []  # taken out of service by `resize`
        self._num_to_withhold = 0
        self._hashed = log.wants(ev.BlocksReserved)  # blocks are logged one by one, so their hash is kept
        self._blocks_hash = 0

    # ------------------------------------------------------------------------------- looking
    @property
    def num_quarantined(self) -> int:
        return sum(map(len, self._quarantine.values()))

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks in service."""
        return self.pool.num_blocks - self._num_to_withhold

    @property
    def num_used(self) -> int:
        """Blocks that requests hold; quarantined ones count."""
        return self.pool.num_blocks - self.pool.num_free - len(self._withheld)

    def num_blocks_of(self, request: str) -> int:
        table = self.tables.get(request)
        return 0 if table is None else len(table.block_ids)

    def num_host_blocks_of(self, request: str) -> int:
        table = self.tables.get(request)
        return 0 if table is None else len(table.host_block_ids)

    def match(self, seq: Sequence) -> list[int]:
        """Blocks that hold the longest cached prefix of `seq`. Changes nothing; the answer is valid until
        the next call that takes or releases blocks. The last token is never matched, so there is always
        something to compute."""
        if not self._caching or seq.request.sampling.prompt_logprobs is not None:
            return []
        limit = (len(seq.token_ids) - 1) // self.block_size
        hits: list[int] = []
        for block_hash in chain_hashes(seq.token_ids, self.block_size, seq.block_hashes, limit, root_of(seq))[:limit]:
            block = self.pool.lookup(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def need(self, seq: Sequence, hits: AbstractSequence[int]) -> Need:
        """Blocks that starting `seq` now would take from the free ones (idle hits count: pinning uses them)."""
        shared = sum(1 for block in hits if self.pool.refs[block] > 0)
        if seq.id in self.tables:  # swapped out: everything must come back
            shared = 0
        prompt = self.blocks_for(len(seq.token_ids)) - shared
        return Need(prompt, max(prompt, self.blocks_for(seq.request.max_total_tokens) - shared))

    def need_on_host(self, seq: Sequence) -> Need:
        """Host blocks that starting `seq` with its KV on the host would take from the free ones."""
        owned = self.num_host_blocks_of(seq.id)  # swapped out: its KV is there already
        return Need(max(0, self.blocks_for(len(seq.token_ids)) - owned),
                    max(0, self.blocks_for(seq.request.max_total_tokens) - owned))  # fmt: skip

    # -------------------------------------------------------------------------------- taking
    def start(self, seq: Sequence, num_new_tokens: int, cause: int) -> Reserved | Shortage:
        """Memory for a queued request: match, pin, count, take, or nothing at all."""
        hits = self.match(seq)
        for block in hits:
            self.pool.pin(block)
        cached = len(hits) * self.block_size
        stop = min(cached + num_new_tokens, len(seq.token_ids))
        missing = self.blocks_for(stop) - len(hits)
        if missing > self.pool.num_free:
            shortage = Shortage(missing, self.pool.num_free)
            for block in reversed(hits):
                self.pool.release(block)
            return shortage
        table = self._new_table(seq)
        table.num_findable = len(hits)
        self._extend(seq, table, hits, missing, cause)
        if hits:
            self._log.emit(ev.PrefixMatched, seq.id, cause, num_tokens=cached, num_blocks=len(hits))
        return Reserved(stop, cached)

    def fork(self, parent: Sequence, seq: Sequence, cause: int) -> Reserved | Shortage:
        """Share all of the prompt's blocks with a sibling that has computed it; the first write into the
        shared last block copies it."""
        shared = self.tables[parent.id].block_ids[: self.blocks_for(seq.num_prompt_tokens)]
        if self.pool.num_free < 1:
            return Shortage(1, self.pool.num_free)
        for block in shared:
            self.pool.pin(block)
        table = self._new_table(seq)
        table.num_findable = seq.num_prompt_tokens // self.block_size
        self._extend(seq, table, shared, 0, cause)
        cached = seq.num_prompt_tokens - 1
        self._unshare(seq, table, cached, cause)
        return Reserved(seq.num_prompt_tokens, cached, "fork")

    def grow(self, seq: Sequence, stop: int, cause: int) -> Reserved | Shortage:
        """Memory of a running request up to `stop` tokens; shared blocks that it will write are copied."""
        table, size, refs = self.tables[seq.request.id], self.block_size, self.pool.refs
        missing = max(0, -(-stop // size) - len(table.block_ids))
        shared = 0
        for block in table.block_ids[seq.num_computed_tokens // size :]:
            shared += refs[block] > 1
        if missing or shared:
            if missing + shared > self.pool.num_free:
                return Shortage(missing + shared, self.pool.num_free)
            self._unshare(seq, table, seq.num_computed_tokens, cause)
            self._extend(seq, table, (), missing, cause)
        return Reserved(stop)

    def covers(self, seq: Sequence, stop: int) -> bool:
        """Whether a running request has memory of its own up to `stop` tokens, so that `grow` would change nothing."""
        blocks = self.tables[seq.request.id].block_ids
        first = seq.num_computed_tokens // self.block_size
        return first + 1 == len(blocks) and len(blocks) * self.block_size >= stop and self.pool.refs[blocks[first]] == 1

    def extend(self, seq: Sequence, count: int) -> None:
        """`count` more blocks for a running request; the caller has seen that they are there."""
        if self._hashed and count:
            self._extend(seq, self.tables[seq.id], (), count, seq.cause)
        elif count:  # blocks are not logged one by one
            self.tables[seq.request.id].block_ids.extend([self.pool.take()[0] for _ in range(count)])

    @property
    def caching(self) -> bool:
        """Whether full blocks are made findable."""
        return self._caching

    @property
    def is_settled(self) -> bool:
        """Whether `settle` would change nothing."""
        return len(self._withheld) == self._num_to_withhold

    def _new_table(self, seq: Sequence) -> BlockTable:
        self._numbers[seq.id] = seq.request.number
        table = self.tables[seq.id] = BlockTable()
        return table

    def _extend(self, seq: Sequence, table: BlockTable, hits: AbstractSequence[int], fresh: int, cause: int) -> None:
        start = len(table.block_ids)
        blocks = [*hits, *(self._take(seq.id, cause) for _ in range(fresh))]
        table.block_ids.extend(blocks)
        if blocks:
            self._toggle(seq, enumerate(blocks, start))
            self._log.emit(ev.BlocksReserved, seq.id, cause, start=start, block_ids=tuple(blocks), shared=len(hits))

    def _take(self, request: str | None, cause: int) -> int:
        block, evicted = self.pool.take()
        if evicted is not None and self._hashed:
            self._toggle_cached(block, evicted)
            self._log.emit(ev.BlockEvicted, request, cause, block_id=block, hash=evicted.hex())
        return block

    def _unshare(self, seq: Sequence, table: BlockTable, first_token: int, cause: int) -> None:
        for index in range(first_token // self.block_size, len(table.block_ids)):
            old = table.block_ids[index]
            if self.pool.refs[old] > 1:
                new = self._take(seq.id, cause)
                table.block_ids[index] = new
                table.num_findable = min(table.num_findable, index)
                self.pool.release(old)
                self._toggle(seq, ((index, old), (index, new)))
                self.moves.append(Move("copy", seq.id, (old,), (new,)))
                self._log.emit(ev.BlockReplaced, seq.id, cause, index=index, old=old, new=new)

    # ------------------------------------------------------------------------------- resizing
    def resize(self, num_blocks: int) -> None:
        """Keep only `num_blocks` (at most all) in service. What is in use goes when it comes free: see `settle`."""
        self._num_to_withhold = self.pool.num_blocks - num_blocks
        self.settle()

    def settle(self) -> None:
        """Take blocks out of service, or bring them back, as far as `resize` asked for it."""
        while len(self._withheld) > self._num_to_withhold:
            self.pool.release(self._withheld.pop())
        while len(self._withheld) < self._num_to_withhold and self.pool.num_free:
            self._withheld.append(self._take(None, -1))

    # ------------------------------------------------------------------------------- keeping
    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is computed: make their full blocks findable."""
        table = self.tables.get(seq.request.id)
        if table is None or num_tokens // self.block_size <= table.num_findable or not self._caching:
            return
        full = min(num_tokens // self.block_size, len(table.block_ids))
        hashes = chain_hashes(seq.token_ids, self.block_size, seq.block_hashes, full, root_of(seq))
        for index in range(table.num_findable, full):
            if self.pool.cache(table.block_ids[index], hashes[index], index) and self._hashed:
                self._toggle_cached(table.block_ids[index], hashes[index])
                self._log.emit(ev.BlockCached, seq.id, block_id=table.block_ids[index], hash=hashes[index].hex())
        table.num_findable = full

    def forget_cached(self, cause: int) -> None:
        """The device lost its memory: no block can be found by its content any more."""
        for block_hash, block in list(self.pool.by_hash.items()):
            self.pool.forget(block)
            if self._hashed:
                self._toggle_cached(block, block_hash)
                self._log.emit(ev.BlockEvicted, None, cause, block_id=block, hash=block_hash.hex())

    # ------------------------------------------------------------------------------- leaving
    def release(self, seq: Sequence, cause: int, until_step: int | None = None) -> None:
        """Give up all memory of `seq`. `until_step`: a step in flight may still write there."""
        table = self.tables.pop(seq.id, None)
        if table is None:
            return
        self._drop_tail(seq, table, 0, cause, until_step)
        self.host.release(table.host_block_ids)
        del self._numbers[seq.id]

    def truncate(self, seq: Sequence, num_tokens: int, cause: int, until_step: int | None = None) -> None:
        """Keep the blocks of the first `num_tokens` tokens."""
        table = self.tables[seq.id]
        keep = self.blocks_for(num_tokens)
        table.num_findable = min(table.num_findable, num_tokens // self.block_size)
        if keep < len(table.block_ids):
            self._drop_tail(seq, table, keep, cause, until_step)

    def _drop_tail(self, seq: Sequence, table: BlockTable, keep: int, cause: int, until_step: int | None) -> None:
        """Tail first, so that the head of a prefix is the last to be evicted."""
        gone = table.block_ids[keep:][::-1]
        del table.block_ids[keep:]
        if until_step is None:
            self.pool.release(*gone)
        else:
            self._quarantine.setdefault(until_step, []).extend(gone)
        if gone:
            self._toggle(seq, enumerate(reversed(gone), keep))
            self._log.emit(ev.BlocksReleased, seq.id, cause, block_ids=tuple(gone), keep=keep,
                           quarantine=until_step is not None)  # fmt: skip

    def collected(self, step: int) -> None:
        """Nothing writes on behalf of `step` any more."""
        for block in self._quarantine.pop(step, ()):
            self.pool.release(block)

    # ---------------------------------------------------------------------- KV that lives on the host
    # Executors read and write host blocks in the order of submission, so those given up need no quarantine.
    def start_on_host(self, seq: Sequence, num_new_tokens: int) -> Reserved | Shortage:
        """Host memory for a queued request, whether new or swapped out; or nothing at all. Host KV is never shared."""
        if seq.id not in self.tables:
            stop = min(num_new_tokens, len(seq.token_ids))
            missing = self.blocks_for(stop)
            if missing > self.host.num_free:
                return Shortage(missing, self.host.num_free)
            self._new_table(seq)
        else:
            stop = min(seq.num_computed_tokens + num_new_tokens, len(seq.token_ids))
        return self.grow_on_host(seq, stop)

    def grow_on_host(self, seq: Sequence, stop: int) -> Reserved | Shortage:
        """Host memory of a request up to `stop` tokens."""
        table = self.tables[seq.id]
        missing = max(0, self.blocks_for(stop) - len(table.host_block_ids))
        if missing > self.host.num_free:
            return Shortage(missing, self.host.num_free)
        table.host_block_ids.extend(self.host.take(missing))
        return Reserved(stop)

    # -------------------------------------------------------------------------------- tiers
    def can_swap_out(self, seq: Sequence) -> bool:
        return self.host.num_free >= self.num_blocks_of(seq.id)

    def swap_out(self, seq: Sequence, cause: int, until_step: int | None) -> int:
        """Plan the copy of all blocks to the host and give up the device blocks; number of blocks moved."""
        table = self.tables[seq.id]
        self.truncate(seq, seq.num_computed_tokens, cause, until_step)
        src = tuple(table.block_ids)
        table.host_block_ids = self.host.take(len(src))  # of the computed tokens, which `can_swap_out` has counted
        self.moves.append(Move("swap_out", seq.id, src, tuple(table.host_block_ids)))
        self._drop_tail(seq, table, 0, cause, until_step)
        table.num_findable = 0
        return len(src)

    def swap_in(self, seq: Sequence, stop: int, cause: int) -> Reserved | Shortage:
        """Device memory for a swapped request up to `stop` tokens, and the copy back from the host."""
        table = self.tables[seq.id]
        missing = self.blocks_for(stop)
        if missing > self.pool.num_free:
            return Shortage(missing, self.pool.num_free)
        self._extend(seq, table, (), missing, cause)
        src = tuple(table.host_block_ids[: self.blocks_for(seq.num_computed_tokens)])
        self.moves.append(Move("swap_in", seq.id, src, tuple(table.block_ids[: len(src)])))
        self.host.release(table.host_block_ids)
        table.host_block_ids = []
        return Reserved(stop)

    def take_moves(self) -> tuple[Move, ...]:
        moves, self.moves = tuple(self.moves), []
        return moves

    # ---------------------------------------------------------------------------- integrity
    def problems(self, alive: Iterable[str]) -> list[str]:
        """Contradictions between tables, pool and requests; empty means sound."""
        owners: dict[int, int] = {}
        for blocks in [*(t.block_ids for t in self.tables.values()), *self._quarantine.values(), self._withheld]:
            for block in blocks:
                owners[block] = owners.get(block, 0) + 1
        found = self.pool.problems(owners)
        found += self.host.problems([b for t in self.tables.values() for b in t.host_block_ids])
        known = dict.fromkeys(alive)
        found += [f"request {name} owns memory but is not alive" for name in self.tables if name not in known]
        if self._hashed and self._blocks_hash != self.fingerprint():
            found.append("a block table or the prefix cache changed behind the log's back")
        return found

    @property
    def blocks_hash(self) -> int:
        """`fingerprint()`, kept up to date with every change; 0 below level 3."""
        return self._blocks_hash

    def _toggle(self, seq: Sequence, entries: Iterable[tuple[int, int]]) -> None:
        if self._hashed:
            for index, block in entries:
                self._blocks_hash ^= block_fingerprint(seq.request.number, index, block)

    def _toggle_cached(self, block: int, block_hash: bytes) -> None:
        self._blocks_hash ^= cached_fingerprint(block, block_hash.hex())

    def fingerprint(self) -> int:
        """XOR over all tables and findable blocks, from scratch; see `LabState.blocks_hash`."""
        value = 0
        for name, table in self.tables.items():
            number = self._numbers[name]
            for index, block in enumerate(table.block_ids):
                value ^= block_fingerprint(number, index, block)
        for block_hash, block in self.pool.by_hash.items():
            value ^= cached_fingerprint(block, block_hash.hex())
        return value


def root_of(seq: Sequence) -> bytes:
    """Where the hashes of a request's blocks begin: bits of KV that must be the same come from the same numerics."""
    return FIXED_ROOT if seq.request.sampling.deterministic else ROOT
