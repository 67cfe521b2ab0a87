"""Passes of one fixed shape: what a row yields depends on that row alone, bit for bit.

A linear layer may add up in another order when the number of its rows changes; with the same number it treats every row
alike, wherever it stands and whatever stands beside it. So all rows with fixed numerics, be they windows to verify or
parts of prompts, are laid one behind the other and cut into passes of `num_rows` tokens, the last one filled with tokens
that nobody reads. Attention is computed by the compiled kernel, whose order of summation depends on positions only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmlab.kernels.dispatch import TorchKernels
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.loader import LoadedModel


class Text(NamedTuple):
    """The tokens of one row: `ids` from position `start` on, and the KV blocks of all positions before and of them."""

    ids: Sequence[int]
    start: int
    block_ids: Sequence[int]


class Outcome(NamedTuple):
    """Of all tokens in order: hidden states [n, hidden_size] and logits [n, vocab_size]."""

    hidden: Tensor
    logits: Tensor


class FixedPasses:
    """Runs rows of a model in passes of `num_rows` tokens."""

    def __init__(self, loaded: LoadedModel, kv: Any, block_size: int, num_rows: int) -> None:
        self._model, self._kv = invariant(loaded.model), kv
        self._block_size, self.num_rows = block_size, num_rows
        self.num_padded = 0

    def run(self, texts: Sequence[Text]) -> Outcome:
        """KV is written for every token of `texts`."""
        found, hidden = [], []
        for part in self._cut(texts):
            states, logits = self._pass(part)
            hidden.append(states)
            found.append(logits)
        return Outcome(torch.cat(hidden), torch.cat(found))

    def _cut(self, texts: Sequence[Text]) -> list[list[Text]]:
        """The texts one behind the other, in passes; one that is divided goes on in the next."""
        passes: list[list[Text]] = [[]]
        room = self.num_rows
        for text in texts:
            at = 0
            while at < len(text.ids):
                if room == 0:
                    passes.append([])
                    room = self.num_rows
                ids = text.ids[at : at + room]
                passes[-1].append(Text(ids, text.start + at, text.block_ids))
                at, room = at + len(ids), room - len(ids)
        self.num_padded += room
        return passes

    def _pass(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        size, count = self._block_size, sum(len(text.ids) for text in texts)
        spare = self.num_rows - count
        rows = [*texts, *([Text([0] * spare, 0, [0] * -(-spare // size))] if spare else [])]
        stops = [text.start + len(text.ids) for text in rows]
        tables = [text.block_ids[: -(-stop // size)] for text, stop in zip(rows, stops)]
        meta = AttentionMetadata.build([len(text.ids) for text in rows], stops, tables, size, device=self._model.device)
        meta.slot_mapping[count:] = -1
        ids = torch.tensor([i for text in rows for i in text.ids], device=self._model.device)
        positions = torch.tensor([p for text, stop in zip(rows, stops) for p in range(text.start, stop)],
                                 device=self._model.device)  # fmt: skip
        hidden = self._model.forward(self._model.embed(ids), positions, meta, self._kv)
        return hidden[:count], self._model.logits(hidden)[:count]


class _Invariant(TorchKernels):
    """torch's products, and attention that does not depend on how a row was cut."""

    def __init__(self, attention: Any) -> None:
        self.paged_attention = attention  # type: ignore[method-assign]


def invariant(model: Any) -> Any:
    """The model with attention whose sums do not depend on the batch; its weights are the model's own."""
    if not isinstance(model.kernels, TorchKernels) or model.device.type != "cpu":
        return model
    from llmlab.kernels.numba_kernels import NumbaKernels

    twin = copy.copy(model)
    for made in ("_program", "_chain"):
        vars(twin).pop(made, None)
    twin.kernels = _Invariant(NumbaKernels().paged_attention)
    return twin
