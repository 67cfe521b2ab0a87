"""The parts of KV memory against plain models of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmlab.clock import VirtualClock
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.state import block_fingerprint, cached_fingerprint, request_fingerprint
from llmlab.memory.block_pool import EVICTION_WINDOW, BlockPool
from llmlab.memory.block_table import slots
from llmlab.memory.eviction import EVICTIONS
from llmlab.memory.kv_manager import KVManager, Reserved, Shortage
from llmlab.memory.prefix_cache import chain_hashes
from llmlab.memory.tiers import HostPool
from llmlab.seams import BlockView
from llmlab.types import Request, SamplingParams, Status
from llmlab.types import Sequence as Seq


def best(policy: Any) -> Any:
    def choose(blocks: Sequence[BlockView]) -> int:
        return min(range(len(blocks)), key=lambda i: (policy.score(blocks[i]), i))

    return choose


# ------------------------------------------------------------------------------------------ the pool
class Pool(RuleBasedStateMachine):
    """BlockPool against a model that keeps every block's owners, content and age in plain dicts."""

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, best(EVICTIONS.resolve("lru")))
        self.owners = dict.fromkeys(range(num_blocks), 0)
        self.content: dict[int, bytes] = {}
        self.age: list[int] = []  # idle blocks, the one released longest ago first

    @precondition(lambda self: any(n == 0 for n in self.owners.values()))
    @rule()
    def take(self) -> None:
        blank = [b for b, n in self.owners.items() if n == 0 and b not in self.content]
        block, evicted = self.pool.take()
        assert self.owners[block] == 0
        if blank:
            assert block in blank and evicted is None
        else:
            assert block == self.age.pop(0) and evicted == self.content.pop(block)
        self.owners[block] = 1

    @precondition(lambda self: any(self.owners[b] or b in self.content for b in self.owners))
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b in self.owners if self.owners[b] or b in self.content]))
        self.pool.pin(block)
        self.owners[block] += 1
        if block in self.age:
            self.age.remove(block)

    @precondition(lambda self: any(self.owners.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.owners.items() if n]))
        self.pool.release(block)
        self.owners[block] -= 1
        if not self.owners[block] and block in self.content:
            self.age.append(block)

    @precondition(lambda self: any(self.owners.values()))
    @rule(data=st.data(), name=st.integers(0, 4))
    def cache(self, data: st.DataObject, name: int) -> None:
        block = data.draw(st.sampled_from([b for b, n in self.owners.items() if n]))
        block_hash = bytes([name])
        new = block not in self.content and block_hash not in self.content.values()
        assert self.pool.cache(block, block_hash, 0) == new
        if new:
            self.content[block] = block_hash

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.problems(self.owners) == []
        assert self.pool.num_free == sum(n == 0 for n in self.owners.values())
        assert self.pool.num_idle == len(self.age)
        for name in range(5):
            holders = [b for b, h in self.content.items() if h == bytes([name])]
            assert self.pool.lookup(bytes([name])) == (holders[0] if holders else None)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def cached_pool(num_blocks: int, policy: str) -> BlockPool:
    """All blocks idle and findable, block i at depth i, released in order."""
    pool = BlockPool(num_blocks, best(EVICTIONS.resolve(policy)))
    for i in range(num_blocks):
        block, _ = pool.take()
        pool.cache(block, bytes([i]), i)
    for block in range(num_blocks):
        pool.release(block)
    return pool


@pytest.mark.parametrize("asked", [True, False])
def test_lru_gives_away_the_block_released_longest_ago(asked: bool) -> None:
    pool = cached_pool(4, "lru")
    if not asked:
        pool._choose = None
    pool.pin(0)
    pool.release(0)
    assert [pool.take()[0] for _ in range(4)] == [1, 2, 3, 0]


def test_lfu_gives_away_the_block_that_was_hit_least() -> None:
    pool = cached_pool(4, "lfu")
    for block, hits in ((0, 3), (1, 1), (2, 2), (3, 1)):
        for _ in range(hits):
            pool.pin(block)
            pool.release(block)
    assert [pool.take()[0] for _ in range(4)] == [1, 3, 2, 0]


def test_hits_of_an_earlier_content_do_not_count() -> None:
    """A block that was shared without being findable, and then freed, starts again at zero."""
    pool = BlockPool(2, best(EVICTIONS.resolve("lfu")))
    shared, _ = pool.take()
    for _ in range(5):
        pool.pin(shared)
    for _ in range(6):
        pool.release(shared)
    other, _ = pool.take()
    again, _ = pool.take()
    assert {other, again} == {0, 1}
    pool.cache(shared, b"a", 0)
    pool.cache(1 - shared, b"b", 0)
    pool.pin(1 - shared)
    for block in (shared, 1 - shared, 1 - shared):
        pool.release(block)
    assert pool.take()[0] == shared


def test_deepest_first_keeps_the_heads_of_prefixes_within_its_window() -> None:
    pool = cached_pool(EVICTION_WINDOW + 3, "deepest_first")
    taken = [pool.take()[0] for _ in range(EVICTION_WINDOW + 3)]
    assert taken[:3] == [EVICTION_WINDOW - 1, EVICTION_WINDOW, EVICTION_WINDOW + 1]
    assert taken[-1] == 0


def test_the_pool_reports_contradictions() -> None:
    pool = cached_pool(3, "lru")
    assert pool.problems({}) == []
    pool.refs[1] += 1
    assert any("block 1: 1 references, 0 owners" in p for p in pool.problems({}))
    pool = cached_pool(3, "lru")
    pool.by_hash[b"ghost"] = 2
    assert any("hash table" in p for p in pool.problems({}))
    pool = cached_pool(3, "lru")
    pool.hashes[0] = None
    assert any("idle block 0" in p for p in pool.problems({}))


@given(takes=st.lists(st.integers(1, 4), max_size=6))
def test_host_blocks_are_never_owned_twice(takes: list[int]) -> None:
    pool, owned = HostPool(8), []
    for count in takes:
        if count <= pool.num_free:
            owned.append(pool.take(count))
        elif owned:
            pool.release(owned.pop(0))
        assert pool.problems([b for blocks in owned for b in blocks]) == []
    assert pool.problems([]) == ([] if not owned else ["host blocks leaked or owned twice"])


# ------------------------------------------------------------------------------------------- hashes
TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(a=TOKENS, b=TOKENS, block_size=st.integers(1, 4))
def test_equal_hashes_mean_equal_prefixes(a: list[int], b: list[int], block_size: int) -> None:
    left, right = chain_hashes(a, block_size, [], 99), chain_hashes(b, block_size, [], 99)
    assert len(left) == len(a) // block_size
    for i, (x, y) in enumerate(zip(left, right)):
        stop = (i + 1) * block_size
        assert (x == y) == (a[:stop] == b[:stop])


@given(tokens=TOKENS, block_size=st.integers(1, 4), cuts=st.lists(st.integers(0, 12)))
def test_hashes_grow_with_the_tokens(tokens: list[int], block_size: int, cuts: list[int]) -> None:
    known: list[bytes] = []
    for cut in sorted(cuts):
        assert chain_hashes(tokens[:cut], block_size, known, 99) is known
    whole = chain_hashes(tokens, block_size, [], 99)
    assert known == whole[: len(known)]
    assert chain_hashes(tokens, block_size, known, 2)[:2] == whole[:2]


def test_hashes_are_the_same_on_every_machine() -> None:
    """A trace may be read anywhere: the hash of a block is part of it."""
    assert chain_hashes([1, 2, 3, 4], 2, [], 9)[1].hex() == "9d6fc78f40c8b1a6269735d7cc313d30"


def test_slots_follow_the_block_table() -> None:
    assert list(slots([5, 2, 9], 4, 2, 9)) == [22, 23, 8, 9, 10, 11, 36]


# ---------------------------------------------------------------------------------------- the manager
FINGERPRINTS = (0xe87df0a01d8820dd, 0x160c8c1445fcd794, 0x16bd8279462ae266)


class Fixture:
    """A manager with its log, and sequences made to measure."""

    def __init__(self, num_blocks: int = 8, num_host: int = 8, block_size: int = 4, caching: bool = True) -> None:
        self.log = EventLog(VirtualClock(), 3)
        self.memory = KVManager(num_blocks, num_host, block_size, caching, self.log, best(EVICTIONS.resolve("lru")))
        self._count = 0

    def sequence(self, tokens: Sequence[int], **sampling: Any) -> Seq:
        self._count += 1
        params = SamplingParams(max_tokens=20, **sampling)
        return Seq(Request(f"s{self._count}", self._count, tuple(tokens), params, max_total_tokens=len(tokens) + 20))

    def computed(self, seq: Seq, upto: int | None = None) -> Seq:
        """Start `seq` and pretend that its tokens are computed."""
        upto = len(seq.token_ids) if upto is None else upto
        got = self.memory.start(seq, upto, -1)
        assert isinstance(got, Reserved)
        seq.status, seq.num_computed_tokens = Status.RUNNING, max(upto, got.num_cached_tokens)
        self.memory.commit(seq, seq.num_computed_tokens)
        return seq

    def snapshot(self) -> Any:
        pool = self.memory.pool
        tables = {name: list(t.block_ids) for name, t in self.memory.tables.items()}
        return tables, list(pool.refs), dict(pool.by_hash), list(pool._idle), pool.num_free, self.memory.host.num_free


def test_a_shortage_changes_nothing() -> None:
    f = Fixture(num_blocks=4)
    first = f.computed(f.sequence(range(8)))
    f.memory.release(first, -1)
    f.computed(f.sequence(range(100, 108)))
    before = f.snapshot()
    got = f.memory.start(f.sequence([*range(8), *range(50, 70)]), 99, -1)
    assert got == Shortage(need=5, free=0)
    assert f.snapshot()[:3] == before[:3] and f.snapshot()[4:] == before[4:]
    assert isinstance(f.memory.start(f.sequence([*range(8), 9, 9, 9]), 2, -1), Shortage)


def test_the_last_token_is_always_computed() -> None:
    f = Fixture()
    f.computed(f.sequence(range(8)))
    same = f.sequence(range(8))
    assert len(f.memory.match(same)) == 1
    got = f.memory.start(same, 4, -1)
    assert isinstance(got, Reserved) and (got.num_cached_tokens, got.stop) == (4, 8)


def test_prompt_logprobs_need_every_token_computed() -> None:
    f = Fixture()
    f.computed(f.sequence(range(8)))
    assert f.memory.match(f.sequence(range(8), prompt_logprobs=0)) == []


def test_hits_are_pinned_before_fresh_blocks_are_taken() -> None:
    """The classic crash: taking a fresh block evicts the very prefix that was just matched."""
    f = Fixture(num_blocks=3)
    f.memory.release(f.computed(f.sequence(range(12))), -1)
    again = f.sequence([*range(8), 77, 78])
    hits = f.memory.match(again)
    got = f.memory.start(again, 2, -1)
    assert isinstance(got, Reserved) and got.num_cached_tokens == 8
    assert f.memory.tables[again.id].block_ids[:2] == hits
    assert f.memory.problems([again.id]) == []


def test_blocks_in_flight_are_free_only_after_their_step() -> None:
    f = Fixture(num_blocks=4)
    seq = f.computed(f.sequence(range(8)))
    f.memory.release(seq, -1, until_step=7)
    assert (f.memory.pool.num_free, f.memory.num_quarantined) == (2, 2)
    assert f.memory.problems([]) == []
    f.memory.collected(6)
    assert f.memory.pool.num_free == 2
    f.memory.collected(7)
    assert (f.memory.pool.num_free, f.memory.num_quarantined) == (4, 0)
    assert len(f.memory.match(f.sequence(range(8)))) == 1  # and their content is still found


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8])
def test_a_fork_shares_all_but_the_block_that_it_writes(num_prompt: int) -> None:
    f = Fixture(caching=False)
    parent = f.computed(f.sequence(range(num_prompt)))
    child = f.sequence(range(num_prompt))
    got = f.memory.fork(parent, child, -1)
    assert isinstance(got, Reserved) and got.num_cached_tokens == num_prompt - 1
    mine, its = (f.memory.tables[s.id].block_ids for s in (parent, child))
    assert mine[:-1] == its[:-1] and mine[-1] != its[-1]
    (move,) = f.memory.take_moves()
    assert (move.kind, move.src, move.dst) == ("copy", (mine[-1],), (its[-1],))
    assert f.memory.problems([parent.id, child.id]) == []
    f.memory.release(parent, -1)
    f.memory.release(child, -1)
    assert f.memory.pool.num_free == 8


def test_a_fork_without_a_free_block_is_a_shortage_and_changes_nothing() -> None:
    f = Fixture(num_blocks=2)
    parent = f.computed(f.sequence(range(8)))
    before = f.snapshot()
    assert f.memory.fork(parent, f.sequence(range(8)), -1) == Shortage(1, 0)
    assert f.snapshot() == before and not f.memory.take_moves()


def test_growing_into_a_shared_block_copies_it_first() -> None:
    f = Fixture(caching=False)
    a = f.computed(f.sequence(range(6)))
    table = f.memory.tables[a.id].block_ids
    f.memory.pool.pin(table[1])  # somebody else holds the block that `a` writes next
    got = f.memory.grow(a, 7, -1)
    assert isinstance(got, Reserved)
    (move,) = f.memory.take_moves()
    assert move.kind == "copy" and move.dst == (f.memory.tables[a.id].block_ids[1],) != move.src
    assert [type(e) for e in f.log][-1] is ev.BlockReplaced


def test_swapping_out_and_in_keeps_the_order_of_blocks() -> None:
    f = Fixture(num_blocks=6, num_host=4)
    seq = f.computed(f.sequence(range(10)))
    device = tuple(f.memory.tables[seq.id].block_ids)
    assert f.memory.can_swap_out(seq) and f.memory.swap_out(seq, -1, None) == 3
    assert (f.memory.pool.num_free, f.memory.host.num_free) == (6, 1)
    seq.status = Status.SWAPPED
    assert f.memory.need(seq, []).prompt == 3
    f.computed(f.sequence(range(200, 204)))
    got = f.memory.swap_in(seq, 11, -1)
    assert isinstance(got, Reserved) and f.memory.host.num_free == 4
    out, back = f.memory.take_moves()
    assert (out.kind, out.src) == ("swap_out", device) and (back.kind, back.src) == ("swap_in", out.dst)
    assert back.dst == tuple(f.memory.tables[seq.id].block_ids)


def test_without_room_on_the_host_nothing_swaps() -> None:
    f = Fixture(num_host=2)
    assert not f.memory.can_swap_out(f.computed(f.sequence(range(12))))


def test_truncating_gives_back_the_tail_and_keeps_the_head_findable() -> None:
    f = Fixture()
    seq = f.computed(f.sequence(range(12)))
    f.memory.truncate(seq, 5, -1)
    assert len(f.memory.tables[seq.id]) == 2
    assert f.memory.problems([seq.id]) == []
    released = [e for e in f.log if isinstance(e, ev.BlocksReleased)][-1]
    assert (released.keep, len(released.block_ids)) == (2, 1)


def test_the_blocks_hash_follows_every_change() -> None:
    f = Fixture()
    seen = [f.memory.blocks_hash]
    a = f.computed(f.sequence(range(9)))
    seen.append(f.memory.blocks_hash)
    b = f.computed(f.sequence([*range(8), 5, 6]))
    seen.append(f.memory.blocks_hash)
    f.memory.release(a, -1)
    seen.append(f.memory.blocks_hash)
    f.memory.release(b, -1)
    seen.append(f.memory.blocks_hash)
    assert seen[0] == 0 and len(set(seen)) == 5  # the cached blocks that are left are part of it
    assert f.memory.blocks_hash == f.memory.fingerprint() and f.memory.problems([]) == []
    c = f.computed(f.sequence(range(9)))
    f.memory.tables[c.id].block_ids.reverse()
    assert any("behind the log's back" in p for p in f.memory.problems([c.id]))


@given(values=st.lists(st.tuples(*[st.integers(0, 40)] * 4), min_size=2, max_size=2, unique=True))
def test_fingerprints_of_different_states_differ(values: list[tuple[int, ...]]) -> None:
    a, b = (request_fingerprint(n, Status.RUNNING, t, c, last) for n, t, c, last in values)
    assert a != b and a ^ b != request_fingerprint(0, Status.WAITING, 0, 0, 0)
    x, y = (block_fingerprint(*value[:3]) for value in values)
    assert (x == y) == (values[0][:3] == values[1][:3])


def test_fingerprints_are_the_same_on_every_machine() -> None:
    assert request_fingerprint(3, Status.RUNNING, 300, 299, 7) == FINGERPRINTS[0]
    assert block_fingerprint(3, 2, 1) == FINGERPRINTS[1]
    assert cached_fingerprint(5, "00ff" * 8) == FINGERPRINTS[2]


def test_no_two_of_a_million_states_share_a_fingerprint() -> None:
    found = {request_fingerprint(n, Status.RUNNING, t, t - 1, last) for n in range(100) for t in range(1, 101) for last in range(100)}
    assert len(found) == 1_000_000
