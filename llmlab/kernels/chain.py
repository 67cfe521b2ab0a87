"""Greedy continuations in one entry of the team: token after token, for several rows at once.

A pass over one token of each row is the layers of a `Program`, with one operation before and two behind it: a token is
fed (its embedding, its position, its KV slot, what it attends to), its logits are multiplied out, the next token is
chosen. All passes lie one behind the other in one table of calls, so a chain of any length enters Python once. The
operations are the very ones that run pass by pass: the tokens and the KV are the same bits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llmlab.kernels.attention_plan import START, STOP, AttnPlan, deal
from llmlab.kernels.dispatch import ChainEnds, KVCaches
from llmlab.kernels.layout import rectangular
from llmlab.kernels.linear import PLAIN, PackedLinear, dense, share
from llmlab.kernels.linear import REGIONS as LINEAR_REGIONS
from llmlab.kernels.numba_attention import NO_MERGES
from llmlab.kernels.pool import SEQUENCE, Pool, Region, record, thread_num
from llmlab.kernels.program import Program
from llmlab.kernels.vector import (
    BF16,
    F16,
    F32,
    compiled,
    get,
    get_as,
    get_int,
    get_long,
    put,
    put_int,
    put_long,
    spliced,
    width,
)
from llmlab.types import LabError

NOTHING = -1  # in place of a token: behind the end of a row


@compiled()
def advance(a, row):
    """The row is one token longer: where that stands, where its KV goes, and what it sees under each window."""
    position = np.int64(get_int(a.seq_lens, row))
    block = np.int64(get_int(a.block_tables, row * a.table_width + position // a.block_size))
    put_int(a.seq_lens, row, np.int32(position + 1))
    put_long(a.positions, row, position)
    put_long(a.slots, row, block * a.block_size + position % a.block_size)
    for i in range(a.num_windows):
        window, item = get_long(a.windows, i), a.items + 48 * (i * a.rows + row)
        put_long(item, START, max(np.int64(0), position - window + 1) if window > 0 else np.int64(0))
        put_long(item, STOP, position + 1)


@spliced
def feed(a, storage):
    """One thread's rows: the next token of those that have one to feed; the last one of a row is none, and the others write no KV."""
    first, last = share(thread_num(), a.threads, a.rows)
    for row in range(first, last):
        fed, token = get_long(a.fed, row), get_long(a.tokens, row * a.steps + get_long(a.fed, row))
        if token < 0 or fed + 1 >= get_long(a.limits, row):
            put_long(a.slots, row, -1)
            continue
        put_long(a.fed, row, fed + 1)
        advance(a, row)
        for i in range(a.columns):
            value = get_as(a.embedding + width(storage) * token * a.columns, i, storage)
            put(a.hidden + 4 * row * a.columns, i, value * np.float32(a.scale))


@compiled()
def largest(logits, size):
    """The lowest id of the largest logit; -1 where that is not finite, as with any NaN."""
    best, top, sane = np.int64(0), get(logits, 0), True
    for i in range(size):
        value = get(logits, i)
        sane &= value == value
        if value > top:
            best, top = np.int64(i), value
    return best if sane and abs(top) < np.float32(np.inf) else np.int64(-1)


def choose(pointer):
    """One thread's rows: the token behind the one that was fed, if it is not known already."""
    a = record(pointer)
    first, last = share(thread_num(), a.threads, a.rows)
    for row in range(first, last):
        at = a.tokens + 8 * (row * a.steps + get_long(a.fed, row))
        if get_long(a.slots, row) >= 0 and get_long(at, 0) < 0:
            put_long(at, 0, largest(a.logits + 4 * row * a.columns, a.columns))


def feed_f32(pointer):
    feed(record(pointer), F32)


def feed_bf16(pointer):
    feed(record(pointer), BF16)


def feed_f16(pointer):
    feed(record(pointer), F16)


_FEED_FIELDS = (
    "rows columns steps tokens fed limits embedding hidden seq_lens positions slots "
    "block_tables table_width block_size items windows num_windows"
)
FEED_REGIONS = {
    dtype: Region(body, _FEED_FIELDS, floats="scale")
    for dtype, body in ((torch.float32, feed_f32), (torch.bfloat16, feed_bf16), (torch.float16, feed_f16))
}
CHOOSE_REGION = Region(choose, "rows columns steps tokens fed slots logits")


class Room:
    """What a chain knows of its R rows, changed by every pass: `fed`, `limits`, `positions`, `slots` [R] int64,
    `seq_lens` [R] int32, `hidden [R, d]`, `logits [R, V]` float32; and the attention plan of each of W windows, whose items lie in
    `items [W, R, 6]`. A row is one item, and items are dealt to the threads as if all rows were of one length."""

    def __init__(self, rows: int, threads: int, windows: int, kv_heads: int, hidden_size: int, vocab_size: int) -> None:
        self.rows, self.threads = rows, threads
        self.fed, self.limits, self.positions, self.slots = np.zeros((4, rows), np.int64)
        self.items = np.zeros((windows, rows, 6), np.int64)
        self.items[:] = [(row, row, 1, 0, 1, -1) for row in range(rows)]
        self.seq_lens, self.cu_seqlens_q = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
        self.hidden, self.logits = torch.empty(rows, hidden_size), torch.empty(rows, vocab_size)
        dealt = deal(np.ones(rows * kv_heads), threads)
        self.plans = [AttnPlan(items, dealt[0], NO_MERGES, 0, dealt[1]) for items in self.items]


class Chain:
    """See `dispatch.GreedyChain`. One chain at a time: the working memory is its own."""

    def __init__(self, pool: Pool, program: Program, ends: ChainEnds) -> None:
        assert isinstance(ends.head, PackedLinear)
        self._pool, self._program, self._ends, self._head = pool, program, ends, ends.head
        self._norm = dense(ends.norm)
        self._windows = np.array([window or 0 for window in program.windows], np.int64)
        linear, feed = LINEAR_REGIONS[ends.head.panels.dtype], FEED_REGIONS[ends.embedding.dtype]
        regions = {"feed": feed, "head": linear, "choose": CHOOSE_REGION}
        self._records = {name: region.records(1) for name, region in regions.items()}
        self._calls = {name: (region.address, self._records[name].ctypes.data) for name, region in regions.items()}
        self._tables: dict[range, np.ndarray] = {}
        self._rooms: dict[tuple[int, int], Room] = {}
        self._room: Room | None = None
        self._fill()

    def _fill(self) -> None:
        """What no chain changes."""
        ends, lin = self._ends, self._head
        self._write("feed", embedding=ends.embedding.data_ptr(), columns=lin.in_features, scale=ends.scale,
                    windows=self._windows.ctypes.data, num_windows=len(self._windows))  # fmt: skip
        self._write("head", k=lin.in_features, w=lin.panels.data_ptr(), columns=lin.out_features, act=PLAIN,
                    norm_weight=self._norm.data_ptr(), eps=ends.eps)  # fmt: skip
        self._write("choose", columns=lin.out_features)

    def _write(self, name: str, **values: float) -> None:
        for field, value in values.items():
            self._records[name][field] = value

    def fits(self, kv_caches: KVCaches) -> bool:
        return self._program.fits(kv_caches)

    def run(self, texts: Sequence[Sequence[int]], starts: Sequence[int], block_tables: Sequence[Sequence[int]], counts: Sequence[int],
            span: range) -> np.ndarray:  # fmt: skip
        program, threads, rows = self._program, self._pool.num_threads, len(texts)
        limits = [len(text) + count for text, count in zip(texts, counts, strict=True)]
        tables, steps = self._checked(starts, block_tables, limits), max(limits)
        tokens = np.array([[*text, *[NOTHING] * (steps - len(text))] for text in texts], np.int64)
        room = self._enter(rows, threads)
        room.fed[:], room.limits[:], room.seq_lens[:] = 0, limits, starts
        program.place(rows, threads)
        program.set(block_tables=tables.ctypes.data, table_width=tables.shape[1])
        self._write("feed", steps=steps, tokens=tokens.ctypes.data, block_tables=tables.ctypes.data, table_width=tables.shape[1],
                    block_size=program.block_size)  # fmt: skip
        self._write("head", tiles=program.tiles, normed=program.normed)
        self._write("choose", steps=steps, tokens=tokens.ctypes.data)
        calls = self._table(span, steps - 1)
        self._pool.run(SEQUENCE.call(threads, len(calls), calls.ctypes.data))
        return tokens

    def _checked(self, starts: Sequence[int], block_tables: Sequence[Sequence[int]], limits: Sequence[int]) -> np.ndarray:
        """The block tables as a matrix, once they are known to hold all that the chain may write."""
        program, ends = self._program, np.add(starts, limits) - 1
        if ends.max() > program.max_positions:
            raise LabError("starts", int(ends.max()), f"is beyond the model's {program.max_positions} positions")
        tables = rectangular(block_tables, ends, program.block_size)
        if tables.min() < 0 or tables.max() >= program.num_blocks:
            raise LabError("block_tables", tables.tolist(), f"name a block outside a cache of {program.num_blocks}")
        return tables

    def _enter(self, rows: int, threads: int) -> Room:
        """Room for so many rows, to which all records point."""
        room = self._rooms.get((rows, threads))
        if room is None:
            sizes = len(self._windows), self._program.kv_heads, self._head.in_features, self._head.out_features
            room = self._rooms[rows, threads] = Room(rows, threads, *sizes)
        if room is not self._room:
            self._point(room)
            self._room = room
        return room

    def _point(self, room: Room) -> None:
        """Write the addresses of a room into the records."""
        hidden, logits, lens = room.hidden.data_ptr(), room.logits.data_ptr(), room.seq_lens.ctypes.data
        fed, positions, slots = (x.ctypes.data for x in (room.fed, room.positions, room.slots))
        self._program.set(threads=room.threads, tokens=room.rows, rows=room.rows, hidden=hidden, positions=positions, slots=slots,
                          seq_lens=lens, cu_seqlens_q=room.cu_seqlens_q.ctypes.data, causal=1, forks=0, seen=0)  # fmt: skip
        for window, plan in zip(self._program.windows, room.plans, strict=True):
            self._program.attend(window, plan)
        for name in self._records:
            self._write(name, threads=room.threads, rows=room.rows)
        self._write("feed", hidden=hidden, fed=fed, limits=room.limits.ctypes.data, seq_lens=lens, positions=positions, slots=slots,
                    items=room.items.ctypes.data)  # fmt: skip
        self._write("head", x=hidden, out=logits)
        self._write("choose", logits=logits, fed=fed, slots=slots)

    def _table(self, span: range, passes: int) -> np.ndarray:
        """The calls of so many passes."""
        once = np.concatenate([[self._calls["feed"]], self._program.calls(span), [self._calls["head"], self._calls["choose"]]])
        if span not in self._tables or len(self._tables[span]) < passes * len(once):
            self._tables[span] = np.tile(once, (passes, 1))
        return self._tables[span][: passes * len(once)]
