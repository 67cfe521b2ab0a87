"""Greedy continuations in one entry of the team: token after token, for several rows at once.

A pass over one token of each row is the layers of a `Program`, with one operation before and two behind it: the
token that was chosen last is fed (its embedding, its position, its KV slot, what it attends to), its logits are
multiplied out, the next token is chosen. All passes lie one behind the other in one table of calls, so a chain of
any length enters Python once. The operations are the very ones that run pass by pass: the tokens and the KV are
the same bits.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles)
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

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

OVER = -1  # in place of a row's newest token: nothing more is fed, nothing more is chosen


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
    """One thread's rows: the newest token becomes the input of the next pass; a row that is over writes no KV."""
    first, last = share(thread_num(), a.threads, a.rows)
    for row in range(first, last):
        token = get_long(a.newest, row)
        if token < 0:
            put_long(a.slots, row, -1)
            continue
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
    """One thread's rows: the next token of those that are not over, into `tokens [rows, steps]`."""
    a = record(pointer)
    first, last = share(thread_num(), a.threads, a.rows)
    for row in range(first, last):
        if get_long(a.newest, row) < 0:
            continue
        made, token = get_long(a.made, row), largest(a.logits + 4 * row * a.columns, a.columns)
        put_long(a.tokens, row * a.steps + made, token)
        put_long(a.made, row, made + 1)
        put_long(a.newest, row, token if made + 1 < get_long(a.limits, row) else OVER)


def feed_f32(pointer):
    feed(record(pointer), F32)


def feed_bf16(pointer):
    feed(record(pointer), BF16)


def feed_f16(pointer):
    feed(record(pointer), F16)


_FEED_FIELDS = (
    "rows columns embedding hidden newest seq_lens positions slots block_tables table_width block_size items windows num_windows"
)
FEED_REGIONS = {
    dtype: Region(body, _FEED_FIELDS, floats="scale")
    for dtype, body in ((torch.float32, feed_f32), (torch.bfloat16, feed_bf16), (torch.float16, feed_f16))
}
CHOOSE_REGION = Region(choose, "rows columns steps logits newest made limits tokens")


class Room:
    """What a chain knows of its R rows, changed by every pass: `newest`, `made`, `limits`, `positions`, `slots` [R] int64,
    `seq_lens` [R] int32, `hidden [R, d]`, `logits [R, V]` float32; and the attention plan of each of W windows, whose items lie in
    `items [W, R, 6]`. A row is one item, and items are dealt to the threads as if all rows were of one length."""

    def __init__(self, rows: int, threads: int, windows: int, kv_heads: int, hidden_size: int, vocab_size: int) -> None:
        self.rows, self.threads = rows, threads
        self.newest, self.made, self.limits, self.positions, self.slots = np.zeros((5, rows), np.int64)
        self.items = np.zeros((windows, rows, 6), np.int64)
        self.items[:] = [(row, row, 1, 0, 1, -1) for row in range(rows)]
        self.seq_lens, self.cu_seqlens_q = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
        self.hidden, self.logits = torch.empty(rows, hidden_size), torch.empty(rows, vocab_size)
        dealt = deal(np.ones(rows * kv_heads), threads)
        self.plans = [AttnPlan(items, dealt[0], NO_MERGES, 0, dealt[1]) for items in self.items]

    def start(self, hidden: Tensor, lengths: Sequence[int], limits: Sequence[int]) -> None:
        self.hidden.copy_(hidden)
        self.newest[:], self.made[:], self.limits[:], self.seq_lens[:] = 0, 0, limits, lengths


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

    def run(self, hidden: Tensor, lengths: Sequence[int], block_tables: Sequence[Sequence[int]], limits: Sequence[int], span: range
            ) -> np.ndarray:  # fmt: skip
        program, threads, rows, steps = self._program, self._pool.num_threads, len(lengths), max(limits)
        tables, tokens = self._checked(lengths, block_tables, limits), np.full((rows, steps), OVER, np.int64)
        self._enter(rows, threads).start(hidden, lengths, limits)
        program.place(rows, threads)
        program.set(block_tables=tables.ctypes.data, table_width=tables.shape[1])
        self._write("feed", block_tables=tables.ctypes.data, table_width=tables.shape[1], block_size=program.block_size)
        self._write("head", tiles=program.tiles, normed=program.normed)
        self._write("choose", steps=steps, tokens=tokens.ctypes.data)
        calls = self._table(span, steps)
        self._pool.run(SEQUENCE.call(threads, len(calls), calls.ctypes.data))
        return tokens

    def _checked(self, lengths: Sequence[int], block_tables: Sequence[Sequence[int]], limits: Sequence[int]) -> np.ndarray:
        """The block tables as a matrix, once they are known to hold all that the chain may write."""
        program, ends = self._program, np.add(lengths, limits) - 1
        if ends.max() > program.max_positions:
            raise LabError("lengths", int(ends.max()), f"is beyond the model's {program.max_positions} positions")
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
        positions, slots, newest = (x.ctypes.data for x in (room.positions, room.slots, room.newest))
        self._program.set(threads=room.threads, tokens=room.rows, rows=room.rows, hidden=hidden, positions=positions, slots=slots,
                          seq_lens=lens, cu_seqlens_q=room.cu_seqlens_q.ctypes.data, causal=1, forks=0, seen=0)  # fmt: skip
        for window, plan in zip(self._program.windows, room.plans, strict=True):
            self._program.attend(window, plan)
        for name in self._records:
            self._write(name, threads=room.threads, rows=room.rows)
        self._write("feed", hidden=hidden, newest=newest, seq_lens=lens, positions=positions, slots=slots, items=room.items.ctypes.data)
        self._write("head", x=hidden, out=logits)
        self._write("choose", logits=logits, newest=newest, made=room.made.ctypes.data, limits=room.limits.ctypes.data)

    def _table(self, span: range, steps: int) -> np.ndarray:
        """The calls of so many tokens: the state that the first one is chosen from is there, every later token is fed."""
        first = [self._calls["head"], self._calls["choose"]]
        again = np.concatenate([[self._calls["feed"]], self._program.calls(span), first])
        count = len(first) + (steps - 1) * len(again)
        if span not in self._tables or len(self._tables[span]) < count:
            self._tables[span] = np.concatenate([first, *[again] * (steps - 1)])
        return self._tables[span][:count]
