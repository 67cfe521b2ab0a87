"""Decoding steps as graphs: one row one token, batch sizes rounded up to a bucket, every input at a fixed address.

A step fills the inputs (one copy of 64-bit, one of 32-bit numbers, the block tables and the attention plan)
and replays the graph of its bucket: embed, all layers, logits, the choice of tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab.execution.buckets import bucket_for, bucket_sizes
from llmlab.execution.device_line import DeviceLine
from llmlab.kernels.dispatch import KVCaches, first_line
from llmlab.kernels.layout import HOST, AttentionMetadata, pinned, sent
from llmlab.models.transformer import Transformer

WIDE = ("given", "source", "position", "kv_slot", "token_slot")
REAL = ("temperature", "min_p", "top_k", "top_p", "uniform")


class DecodeRow(NamedTuple):
    """One row of a decoding step. `source`: where its input lies among the last tokens, -1 if `given` is it.
    `token_slot`: where the new token goes. `choice`: temperature, min_p, top_k, top_p, uniform; temperature 0 is greedy."""

    given: int
    source: int
    position: int
    block_ids: tuple[int, ...]
    token_slot: int
    choice: tuple[float, float, float, float, float]


class Inputs:
    """The static inputs of one bucket, and how a step fills them."""

    def __init__(self, rows: int, max_blocks: int, block_size: int, line: DeviceLine) -> None:
        self.rows, self._block_size, self._device = rows, block_size, line.device
        self.wide = torch.zeros(len(WIDE), rows, dtype=torch.int64, device=line.device)
        self.real = torch.zeros(len(REAL), rows, dtype=torch.float64, device=line.device)
        self.lens = torch.ones(rows, dtype=torch.int32, device=line.device)
        self.tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=line.device)
        self.cu = torch.arange(rows + 1, dtype=torch.int32, device=line.device)

    def column(self, name: str) -> Tensor:
        return self.wide[WIDE.index(name)] if name in WIDE else self.real[REAL.index(name)]

    def fill(self, rows: Sequence[DecodeRow]) -> np.ndarray:
        """Copy a step's rows; rows beyond them attend to one position, write no KV, and put their token into slot 0.
        Returns the lengths [rows of the bucket]."""
        lens = np.ones(self.rows, np.int32)
        wide, real = np.zeros((len(WIDE), self.rows), np.int64), np.zeros((len(REAL), self.rows))
        wide[1], wide[3] = -1, -1
        tables = np.zeros((self.rows, max(len(row.block_ids) for row in rows)), np.int32)
        for i, row in enumerate(rows):
            block, offset = row.block_ids[row.position // self._block_size], row.position % self._block_size
            wide[:, i] = row.given, row.source, row.position, block * self._block_size + offset, row.token_slot
            real[:, i], lens[i] = row.choice, row.position + 1
            tables[i, : len(row.block_ids)] = row.block_ids
        for target, array in ((self.wide, wide), (self.real, real), (self.lens, lens)):
            target.copy_(pinned(array, self._device), non_blocking=True)
        self.tables[:, : tables.shape[1]].copy_(sent(tables, self._device))
        return lens


class DecodeGraph:
    """One bucket: inputs, what attention derives from them, the recorded work, and its tokens [rows]."""

    def __init__(self, model: Transformer, caches: KVCaches, last_tokens: Tensor, inputs: Inputs, line: DeviceLine,
                 draws: bool) -> None:  # fmt: skip
        shape = model.shape
        self._model, self._caches, self._last, self._inputs, self._line, self._draws = model, caches, last_tokens, inputs, line, draws
        self.tokens = torch.zeros(inputs.rows, dtype=torch.int64, device=line.device)
        windows = [window or None for window in shape.layer_windows]
        self._derived = model.kernels.decode_plans(inputs.rows, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads,
                                                   shape.head_dim, windows, line.device)  # fmt: skip
        self._replay: Callable[[], Any] | None = None
        self.facts: list[dict[str, float]] = []  # of the last step's attention plans
        self._lens: np.ndarray = np.ones(inputs.rows, np.int32)

    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Fill, replay; the tokens of `rows` (a view that the next run overwrites)."""
        self._lens = self._inputs.fill(rows)
        self.facts = [] if self._derived is None else [plan.facts() for plan in self._derived.fill(self._lens)]
        if self._replay is None:
            self._replay = self._line.capture(self._step)
        self._replay()
        # not part of the graph: recording it runs it several times, and its own input must not change meanwhile
        self._last.index_copy_(0, self._inputs.column("token_slot"), self.tokens)
        return self.tokens[: len(rows)]

    def _step(self) -> None:
        inputs, model = self._inputs, self._model
        meta = AttentionMetadata(inputs.cu, inputs.lens, inputs.tables, inputs.column("kv_slot"), 1)
        if self._derived is None:
            meta.derived[HOST] = (np.arange(inputs.rows + 1), self._lens)
        else:
            meta.derived.update(self._derived.entries)
        source = inputs.column("source")
        pending = self._last[source.clamp(min=0)].clamp(min=0)  # -1, a failed row, is nobody's input
        ids = torch.where(source >= 0, pending, inputs.column("given"))
        hidden = model.forward(model.embed(ids), inputs.column("position"), meta, self._caches)
        self.tokens.copy_(self._choose(model.logits(hidden)))

    def _choose(self, logits: Tensor) -> Tensor:
        if not self._draws:
            return self._model.kernels.argmax(logits)
        temperature, min_p, top_k, top_p, uniform = (self._inputs.column(name) for name in REAL)
        return self._model.kernels.draw(logits, temperature.float(), min_p.float(), top_k.int(), top_p, uniform)


class DecodeGraphs:
    """All buckets of an engine; each is recorded when it is first needed."""

    def __init__(self, model: Transformer, caches: KVCaches, last_tokens: Tensor, max_rows: int, max_len: int,
                 block_size: int, line: DeviceLine) -> None:  # fmt: skip
        self._model, self._caches, self._last, self._line = model, caches, last_tokens, line
        self._max_blocks, self._block_size = -(-max_len // block_size), block_size
        self.sizes = bucket_sizes(max_rows)
        self._inputs: dict[int, Inputs] = {}
        self._graphs: dict[tuple[int, bool], DecodeGraph] = {}
        self._refused: dict[tuple[int, bool], str] = {}  # buckets that there was no memory to record, and what was said
        self.facts: list[dict[str, float]] = []

    def run(self, rows: Sequence[DecodeRow]) -> Tensor | None:
        """The tokens of a step of decoding rows; None if no bucket holds so many, or there was no memory for its graph."""
        size, draws = bucket_for(len(rows), self.sizes), any(row.choice[0] > 0 for row in rows)
        if size is None or (size, draws) in self._refused:
            return None
        known = self._graphs.get((size, draws))
        try:
            graph = known or self._made(size, draws)
            tokens = graph.run(rows)
        except torch.OutOfMemoryError as error:
            if known is not None:
                raise
            self._refused[size, draws] = first_line(error)
            logging.getLogger("llmlab").warning("no memory for a graph of %d rows, such steps run kernel by kernel: %s", size, first_line(error))
            return None
        self._graphs[size, draws], self.facts = graph, graph.facts
        return tokens

    def _made(self, size: int, draws: bool) -> DecodeGraph:
        if size not in self._inputs:
            self._inputs[size] = Inputs(size, self._max_blocks, self._block_size, self._line)
        return DecodeGraph(self._model, self._caches, self._last, self._inputs[size], self._line, draws)

    @property
    def recorded(self) -> list[tuple[int, bool]]:
        """(rows, whether tokens are drawn) of the graphs so far."""
        return list(self._graphs)
