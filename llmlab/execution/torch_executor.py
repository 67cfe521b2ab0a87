"""The real executor: ragged batches over paged KV with torch tensors and the kernels of `llmlab.kernels`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmlab.decoding.sampler import SampleRow, greedy, plain, prompt_logprobs, sample
from llmlab.execution.base import Done, Row, StepBatch, Ticket
from llmlab.execution.offload import ExpertOffload, LayerWindow
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.loader import LoadedModel
from llmlab.types import Durations, ItemResult, Move, RequestError, StepResult, TokenLogprobs


class KVCache:
    """Device and host KV of all layers, each [num_blocks, num_kv_heads, block_size, head_dim].

    Host memory is allocated when the first block is swapped out.
    """

    def __init__(self, loaded: LoadedModel, num_blocks: int, num_host_blocks: int, block_size: int) -> None:
        shape = loaded.shape
        self._host_shape = (num_host_blocks, shape.num_kv_heads, block_size, shape.head_dim)
        self._dtype, self._kernels = loaded.dtype, loaded.model.kernels
        self._device = loaded.device
        device_shape = (num_blocks, *self._host_shape[1:])
        self.layers = [self._pair(device_shape, loaded.device) for _ in range(shape.num_layers)]
        self._host: list[tuple[Tensor, Tensor]] = []

    def _pair(self, size: tuple[int, ...], device: torch.device | str) -> tuple[Tensor, Tensor]:
        return torch.zeros(size, dtype=self._dtype, device=device), torch.zeros(size, dtype=self._dtype, device=device)

    def move(self, moves: Sequence[Move]) -> None:
        """Carry out block copies, in order."""
        for move in moves:
            if not move.src:
                continue
            pairs = torch.tensor(list(zip(move.src, move.dst, strict=True)), dtype=torch.int64, device=self._device)
            if move.kind != "copy" and not self._host:
                self._host = [self._pair(self._host_shape, "cpu") for _ in self.layers]
            for layer, (k, v) in enumerate(self.layers):
                hk, hv = self._host[layer] if move.kind != "copy" else (k, v)
                for device, host in ((k, hk), (v, hv)):
                    src, dst = (host, device) if move.kind == "swap_in" else (device, host)
                    self._kernels.copy_blocks(src, dst, pairs)


class TorchExecutor:
    """Runs plans on the device of `loaded`. With `asynchronous`, in a worker thread, in order."""

    mode: Literal["measured", "simulated"] = "measured"

    def __init__(self, loaded: LoadedModel, num_blocks: int, num_host_blocks: int, block_size: int, seed: int,
                 asynchronous: bool, offload: ExpertOffload | None = None) -> None:  # fmt: skip
        self._model = loaded.model
        self._offload = offload
        self._loaded = loaded
        self._block_size = block_size
        self._seed = seed
        self.cache = KVCache(loaded, num_blocks, num_host_blocks, block_size)
        self._tokens: dict[str, list[int]] = {}
        self._plain: dict[str, bool] = {}  # of each request: whether its token is the largest logit, and no more was asked for
        self._prompt_scores: dict[str, list[TokenLogprobs]] = {}
        self._worker = ThreadPoolExecutor(1, "llmlab-executor") if asynchronous else None
        self._warm_up(num_blocks * block_size)

    # ------------------------------------------------------------------------------------ interface
    def submit(self, batch: StepBatch) -> Ticket:
        return Done(self._run(batch)) if self._worker is None else self._worker.submit(self._run, batch)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._offload is not None:
            self._offload.close()
        if isinstance(self._model.layers, LayerWindow):
            self._model.layers.copies.close()

    def describe(self) -> dict[str, Any]:
        return {
            "device": str(self._loaded.device), "dtype": str(self._loaded.dtype).removeprefix("torch."),
            "kernels": type(self._model.kernels).__name__, "machine": platform.machine(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        }  # fmt: skip

    def _warm_up(self, capacity: int) -> None:
        """One short prompt through blocks that nobody owns yet, so that loading compiled kernels does not count
        into the first request's time. What it writes is never read."""
        tokens = min(2, capacity)
        blocks = tuple(range(-(-tokens // self._block_size)))
        meta = AttentionMetadata.build([tokens], [tokens], [blocks], self._block_size, device=self._model.device)
        with torch.inference_mode():
            hidden = self._model.embed(torch.zeros(tokens, dtype=torch.int64, device=self._model.device))
            positions = torch.arange(tokens, device=self._model.device)
            self._model.logits(self._model.forward(hidden, positions, meta, self.cache.layers))

    # ---------------------------------------------------------------------------------------- a step
    def _run(self, batch: StepBatch) -> StepResult:
        began = time.perf_counter()
        for name in batch.forget:
            self._tokens.pop(name, None)
            self._plain.pop(name, None)
            self._prompt_scores.pop(name, None)
        parts: dict[str, float] = {}
        try:
            with torch.inference_mode():
                self.cache.move(batch.plan.moves)
                results = self._run_rows(batch.rows, parts)
        except Exception as error:  # whatever a kernel raises: the step is lost, the engine is not
            results = tuple(ItemResult(r.item.request, error=f"{type(error).__name__}: {error}") for r in batch.rows)
        seconds = time.perf_counter() - began
        result = StepResult(batch.plan.step, results, Durations(seconds, parts=parts))
        return result if self._offload is None else self._offload.told(result)

    def _run_rows(self, rows: Sequence[Row], parts: dict[str, float]) -> tuple[ItemResult, ...]:
        """All rows but those whose last token an earlier step in flight failed to produce: their neighbours run."""
        ready = [row for row in rows if len(self._known(row)) >= row.item.tokens[1]]
        results = self._forward(ready, parts) if ready else ()
        if len(ready) == len(rows):
            return results
        done = {result.request: result for result in results}
        lost = "the step before it failed"
        return tuple(done.get(row.item.request) or ItemResult(row.item.request, error=lost) for row in rows)

    def _forward(self, rows: Sequence[Row], parts: dict[str, float]) -> tuple[ItemResult, ...]:
        began = time.perf_counter()
        spans = [row.item.tokens for row in rows]
        ids: list[int] = []
        positions: list[int] = []
        device = self._model.device
        for row, (start, stop) in zip(rows, spans, strict=True):
            ids += self._known(row)[start:stop]
            positions += range(start, stop)
        meta = AttentionMetadata.build(
            [stop - start for start, stop in spans], [stop for _, stop in spans], [row.block_ids for row in rows],
            self._block_size, device=device,
        )  # fmt: skip
        given = torch.from_numpy(np.array([ids, positions])).to(device)
        prepared = time.perf_counter()
        hidden = self._model.forward(self._model.embed(given[0]), given[1], meta, self.cache.layers)
        forwarded = time.perf_counter()
        results = self._emit(rows, hidden)
        parts.update(prepare=prepared - began, forward=forwarded - prepared, sample=time.perf_counter() - forwarded)
        return results

    def _known(self, row: Row) -> list[int]:
        tokens = self._tokens.get(row.request.id)
        if tokens is None:
            request = row.request
            tokens = self._tokens[request.id] = list(request.prompt_token_ids)
            self._plain[request.id] = plain(request.sampling) and request.sampling.prompt_logprobs is None
        return tokens

    # ------------------------------------------------------------------------------------- sampling
    def _emit(self, rows: Sequence[Row], hidden: Tensor) -> tuple[ItemResult, ...]:
        """Logits only for rows that sample, and for prompts whose log-probabilities were asked for."""
        last, emitting, end = [], [], 0
        failed: dict[str, ItemResult] = {}
        for row in rows:
            end += row.item.num_tokens
            if row.request.sampling.prompt_logprobs is not None:
                try:
                    self._score_prompt(row, hidden[end - row.item.num_tokens : end])
                except RequestError as error:
                    failed[row.request.id] = ItemResult(row.request.id, error=str(error))
                    continue
            if row.item.emit == "sample":
                last.append(end - 1)
                emitting.append(row)
        if not emitting:
            return tuple(failed.get(row.request.id) or ItemResult(row.request.id) for row in rows)
        chosen = hidden if len(last) == hidden.shape[0] else hidden[last]
        logits = self._model.logits(chosen)
        if len(emitting) == len(rows) and all(self._plain[row.request.id] for row in rows):
            tokens = greedy(logits)
            if min(tokens) >= 0:
                return tuple([self._append(row.request.id, token) for row, token in zip(rows, tokens, strict=True)])
        sampled = sample(logits, [self._sample_row(row) for row in emitting])
        by_request = {row.request.id: result for row, result in zip(emitting, sampled, strict=True)}
        return tuple(failed.get(row.request.id) or self._item_result(row, by_request.get(row.request.id)) for row in rows)

    def _append(self, name: str, token: int) -> ItemResult:
        """The result of a row whose token is all that was asked for."""
        self._tokens[name].append(token)
        return ItemResult(name, (token,))

    def _sample_row(self, row: Row) -> SampleRow:
        request = row.request
        sampling, tokens = request.sampling, self._tokens[request.id]
        seeded = sampling.seed is not None
        return SampleRow(
            sampling, sampling.seed if sampling.seed is not None else self._seed,
            f"#{request.metadata.get('sample', 0)}" if seeded else request.id, row.item.tokens[1],
            request.prompt_token_ids, tokens[request.num_prompt_tokens :] if _needs_history(row) else (),
            request.eos_token_ids,
        )  # fmt: skip

    def _item_result(self, row: Row, sampled: Any) -> ItemResult:
        name = row.request.id
        if sampled is None:
            return ItemResult(name)
        if sampled.error is not None:
            return ItemResult(name, error=sampled.error)
        self._tokens[name].append(sampled.token_id)
        scores = tuple(self._prompt_scores.pop(name, ()))
        return ItemResult(name, (sampled.token_id,), (sampled.logprobs,) if sampled.logprobs else (), scores)

    def _score_prompt(self, row: Row, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the ones just computed."""
        request, (start, stop) = row.request, row.item.tokens
        num_top = request.sampling.prompt_logprobs
        following = request.prompt_token_ids[start + 1 : stop + 1]
        if num_top is None or not following or len(self._tokens[request.id]) > request.num_prompt_tokens:
            return
        scores = self._prompt_scores.setdefault(request.id, [])
        del scores[start:]
        scores += prompt_logprobs(self._model.logits(hidden[: len(following)]), following, num_top)


def _needs_history(row: Row) -> bool:
    sampling = row.request.sampling
    return sampling.has_penalties or sampling.min_tokens > 0
