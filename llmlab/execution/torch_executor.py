"""The real executor: ragged batches over paged KV with torch tensors and the kernels of `llmlab.kernels`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from llmlab.decoding.sampler import Sampled, SampleRow, greedy, plain, prompt_logprobs, sample, sample_row
from llmlab.decoding.speculative import accepted_path, branches, depths, lineages, paths
from llmlab.execution.base import Done, Row, StepBatch, Ticket
from llmlab.execution.device_line import answers
from llmlab.execution.drafting import Drafter
from llmlab.execution.fixed import FixedPasses, Text
from llmlab.execution.hybrid import Hybrid
from llmlab.execution.judging import by_key, by_rejection
from llmlab.execution.offload import ExpertOffload, LayerWindow
from llmlab.kernels import pages
from llmlab.kernels.dispatch import first_line
from llmlab.kernels.layout import AttentionMetadata, TreeRow, sent
from llmlab.models.loader import LoadedModel
from llmlab.types import (
    DEVICE,
    DEVICE_MEMORY,
    MAX_NODES,
    Durations,
    ItemResult,
    Move,
    Request,
    RequestError,
    Span,
    StepResult,
    TokenLogprobs,
    WorkItem,
)


class Kept(NamedTuple):
    """Hidden states [tokens, hidden_size] in front of `layer`."""

    layer: int
    tokens: Span
    states: Tensor


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
        pin = torch.device(device).type == "cpu" and self._device.type == "cuda"  # so that copies can run beside kernels
        if torch.device(device).type == "cpu" and not pin:
            return pages.zeros(size, self._dtype), pages.zeros(size, self._dtype)
        k, v = (torch.zeros(size, dtype=self._dtype, device=device, pin_memory=pin) for _ in range(2))
        return k, v

    @property
    def host(self) -> list[tuple[Tensor, Tensor]]:
        """Host KV of all layers."""
        if not self._host:
            self._host = [self._pair(self._host_shape, "cpu") for _ in self.layers]
        return self._host

    def move(self, move: Move) -> None:
        """Carry out the block copies of a move. If it raises, the KV of its request is lost."""
        pairs = sent(np.array(list(zip(move.src, move.dst, strict=True)), np.int64).reshape(-1, 2), self._device)
        for layer, (k, v) in enumerate(self.layers):
            hk, hv = self.host[layer] if move.kind != "copy" else (k, v)
            for device, host in ((k, hk), (v, hv)):
                src, dst = (host, device) if move.kind == "swap_in" else (device, host)
                self._kernels.copy_blocks(src, dst, pairs)

    def rewrite(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV of single tokens within the device, (source slot, target slot) each; all are read before any is written."""
        if not pairs:
            return
        size = self.layers[0][0].shape[2]
        src, dst = sent(np.array(pairs, np.int64), self._device).unbind(1)
        for cache in (tensor for pair in self.layers for tensor in pair):
            cache[dst // size, :, dst % size] = cache[src // size, :, src % size]


class Loss(NamedTuple):
    """What an error took with it, as in `StepResult.lost`, and why."""

    lost: tuple[str, ...] = ()
    why: str = ""


class TorchExecutor:
    """Runs plans on the device of `loaded`. With `asynchronous`, in a worker thread, in order."""

    mode: Literal["measured", "simulated"] = "measured"

    def __init__(self, loaded: LoadedModel, cache: KVCache, block_size: int, seed: int, asynchronous: bool,
                 offload: ExpertOffload | None = None, fixed_rows: int = 64) -> None:  # fmt: skip
        self._model = loaded.model
        self._offload = offload
        self._drafter: Drafter | None = None
        self._fixed: FixedPasses | None = None  # made when the first row asks for it
        self._fixed_rows, self._padded = fixed_rows, 0
        self._loaded = loaded
        self._block_size = block_size
        self._seed = seed
        self._zero = time.perf_counter()
        self.cache = cache
        self._tokens: dict[str, list[int]] = {}
        self._plain: dict[str, bool] = {}  # of each request: whether its token is the largest logit, and no more was asked for
        self._lost: dict[str, str] = {}  # requests whose KV is gone, and why
        self._gone = False  # whether the device was lost for good
        self._hidden: dict[str, Kept] = {}  # of requests that are between two layers
        self._drawn_from: dict[str, Tensor] = {}  # this step's states, for draft sources that read them
        self._prompt_scores: dict[str, list[TokenLogprobs]] = {}
        self._hybrid: Hybrid | None = None
        self._worker = ThreadPoolExecutor(1, "llmlab-executor") if asynchronous else None
        self._warm_up(cache.layers[0][0].shape[0] * block_size)

    # ------------------------------------------------------------------------------------ interface
    def submit(self, batch: StepBatch) -> Ticket:
        return Done(self._run(batch)) if self._worker is None else self._worker.submit(self._run, batch)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._hybrid is not None:
            self._hybrid.worker.close()
        if self._offload is not None:
            self._offload.close()
        if isinstance(self._model.layers, LayerWindow):
            self._model.layers.copies.close()

    def draft_with(self, side: Drafter | None) -> None:
        self._drafter = side

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
            self._lost.pop(name, None)
            self._hidden.pop(name, None)
            self._prompt_scores.pop(name, None)
            if self._hybrid is not None:
                self._hybrid.forget(name)
            if self._drafter is not None:
                self._drafter.forget(name)
        parts: dict[str, float] = {}
        loss = Loss()
        try:
            with torch.inference_mode():
                self._move(batch.plan.moves)
                results = self._run_rows(batch.rows, parts)
        except Exception as error:  # whatever a kernel raises: the step is lost, the engine is not
            reason = reason_of(error)
            loss = self._loss(reason)
            results = unserved(batch.rows, None if DEVICE_MEMORY in loss.lost else reason)
        seconds = time.perf_counter() - began
        padded, self._padded = self._padded, 0
        result = StepResult(batch.plan.step, results, Durations(seconds, parts=parts, padded_tokens=padded), lost=loss.lost, why=loss.why)
        result = result if self._hybrid is None else self._with_host(result, parts)
        return result if self._offload is None else self._offload.told(result)

    def _loss(self, reason: str) -> Loss:
        """What an error in a step means: no more than its rows, as long as the device answers."""
        if self._gone or answers(self._loaded.device):
            return Loss()
        self._gone = True
        return Loss((DEVICE,), f"{self._loaded.device} does not answer any more after {reason}")

    def _move(self, moves: Sequence[Move]) -> None:
        """Block copies, in order. One that fails, for want of host memory as a rule, loses the KV of its request for
        good: a request that comes back from the host must not read what never arrived there."""
        for move in moves:
            if not move.src or move.request in self._lost:
                continue
            try:
                if self._hybrid is None:
                    self.cache.move(move)
                else:  # host blocks are the business of the host's thread
                    self._hybrid.call(move.kind, partial(self.cache.move, move))
            except Exception as error:  # whatever the allocator raises: the request is lost, its neighbours are not
                self._lost[move.request] = (f"its KV was lost: {move.kind} of {len(move.src)} blocks failed "
                                            f"({type(error).__name__}: {error})")  # fmt: skip

    def _with_host(self, result: StepResult, parts: dict[str, float]) -> StepResult:
        """The result with what the host's thread did, and whether it died."""
        assert self._hybrid is not None
        spans, waited = self._hybrid.take_spans(self._zero)
        parts = {**parts, "cpu": sum(span.end - span.start for span in spans), "join_wait": waited}
        lost = (*result.lost, *self._hybrid.take_lost())
        return replace(result, durations=replace(result.durations, parts=parts), spans=tuple(spans), lost=lost)

    def _run_rows(self, rows: Sequence[Row], parts: dict[str, float]) -> tuple[ItemResult, ...]:
        """All rows that can run, those over the same layers together; the others end with their reason."""
        done: dict[str, ItemResult] = {}
        groups: dict[Span | None, list[Row]] = {}
        both_tiers: list[Row] = []
        hybrid = any(row.item.home == "cpu" for row in rows)
        fixed: list[Row] = []
        for row in rows:
            reason = self._unready(row)
            if reason is None and row.item.numerics == "fixed":
                fixed.append(row)
            elif reason is None and hybrid and (row.item.home == "cpu" or (row.item.layers is None and not branches(row.item))):
                both_tiers.append(row)
            elif reason is None:
                groups.setdefault(row.item.layers, []).append(row)
            else:
                done[row.item.request] = ItemResult(row.item.request, error=reason)
        for layers, group in groups.items():
            done |= {result.request: result for result in self._forward(group, layers, parts)}
        if fixed:
            done |= {result.request: result for result in self._forward_fixed(fixed, parts)}
        if both_tiers:
            done |= {result.request: result for result in self._forward_hybrid(both_tiers, parts)}
        results = tuple([done[row.item.request] for row in rows])
        if self._drafter is None:
            return results
        began = time.perf_counter()
        results = self._drafter.extend(rows, results, self._known_after, self._drawn_from)
        self._drawn_from.clear()
        parts["draft"] = time.perf_counter() - began
        return results

    def _unready(self, row: Row) -> str | None:
        """Why a row cannot run, or None."""
        item = row.item
        if item.request in self._lost:
            return self._lost[item.request]
        if len(self._known(row)) < item.tokens[1] - len(item.drafts):
            return "the step before it failed"
        if branches(item) and (item.home == "cpu" or item.numerics == "fixed" or len(item.drafts) > MAX_NODES):
            return f"a tree of {len(item.drafts)} drafts needs KV on the device, fast numerics and at most {MAX_NODES} nodes"
        return None if item.home == "cpu" or (item.layers is None and item.inputs == "ids") else self._misfit(item)

    def _misfit(self, item: WorkItem) -> str | None:
        """What is wrong with an item over some of the layers, if anything is."""
        last = self._loaded.shape.num_layers
        start, stop = item.layers or (0, last)
        span = f"layers {start} to {stop} of tokens {item.tokens[0]} to {item.tokens[1]}"
        if not 0 <= start < stop <= last:
            return f"{span}: the model has layers 0 to {last}"
        if stop < last and item.emit in ("sample", "score"):
            return f"{span}: emit={item.emit!r} needs the last layer, {last}; ask for 'hidden' or 'none'"
        if item.inputs != ("embeddings" if start else "ids"):
            return f"{span}: inputs={item.inputs!r}, but layer 0 reads 'ids' and every later one 'embeddings'"
        kept = self._hidden.get(item.request)
        if start and (kept is None or (kept.layer, kept.tokens) != (start, item.tokens)):
            return f"{span}: no item has left the hidden states of these tokens before layer {start}"
        return None

    def _forward_hybrid(self, rows: Sequence[Row], parts: dict[str, float]) -> tuple[ItemResult, ...]:
        """Rows on both tiers; those that stay half-way have nothing to say yet."""
        began = time.perf_counter()
        if self._hybrid is None:
            self._hybrid = Hybrid(self._model, self.cache.layers, self.cache.host, self._block_size)
        hidden = self._hybrid.run(rows, self._ids)
        forwarded = time.perf_counter()
        ending = [row for row in rows if not row.item.halfway]
        results = self._emit(ending, torch.cat([hidden[row.request.id] for row in ending])) if ending else ()
        parts.update(forward=forwarded - began, sample=time.perf_counter() - forwarded)
        done = {result.request: result for result in results}
        return tuple(done.get(row.request.id) or ItemResult(row.request.id) for row in rows)

    def _ids(self, row: Row) -> list[int]:
        """The tokens that a row computes."""
        start, stop = row.item.tokens
        return [*self._known(row)[start : stop - len(row.item.drafts)], *row.item.drafts]

    def _forward(self, rows: Sequence[Row], layers: Span | None, parts: dict[str, float]) -> tuple[ItemResult, ...]:
        """Rows over the same layers, all of them if None."""
        began = time.perf_counter()
        spans = [row.item.tokens for row in rows]
        ids: list[int] = []
        positions: list[int] = []
        device = self._model.device
        for row in rows:
            ids += self._ids(row)
            positions += _positions(row.item)
        trees = [_tree(row.item) for row in rows] if any(branches(row.item) for row in rows) else ()
        meta = AttentionMetadata.build(
            [stop - start for start, stop in spans], [stop for _, stop in spans], [row.block_ids for row in rows],
            self._block_size, trees=trees, device=device,
        )  # fmt: skip
        given = sent(np.array([ids, positions]), device)
        prepared = time.perf_counter()
        first, last = layers or (0, self._loaded.shape.num_layers)
        hidden = torch.cat([self._hidden.pop(row.item.request).states for row in rows]) if first else self._model.embed(given[0])
        hidden = self._model.forward(hidden, given[1], meta, self.cache.layers, range(first, last))
        forwarded = time.perf_counter()
        results = self._emit(rows, hidden) if last == self._loaded.shape.num_layers else self._leave(rows, hidden, last)
        seconds = (prepared - began, forwarded - prepared, time.perf_counter() - forwarded)
        for name, spent in zip(("prepare", "forward", "sample"), seconds, strict=True):
            parts[name] = parts.get(name, 0.0) + spent
        return results

    def _forward_fixed(self, rows: Sequence[Row], parts: dict[str, float]) -> tuple[ItemResult, ...]:
        """Rows whose bits must not depend on the others."""
        began = time.perf_counter()
        if self._fixed is None:
            self._fixed = FixedPasses(self._loaded, self.cache.layers, self._block_size, self._fixed_rows)
        outcome = self._fixed.run([Text(self._ids(row), row.item.tokens[0], row.block_ids) for row in rows])
        results = self._emit(rows, outcome.hidden, outcome.logits)
        parts["fixed"] = time.perf_counter() - began
        self._padded, self._fixed.num_padded = self._fixed.num_padded, 0
        return results

    def _leave(self, rows: Sequence[Row], hidden: Tensor, layer: int) -> tuple[ItemResult, ...]:
        """Keep the hidden states of rows that ask for it, until an item goes on at `layer`."""
        for row, states in zip(rows, torch.split(hidden, [row.item.num_tokens for row in rows]), strict=True):
            if row.item.emit == "hidden":
                self._hidden[row.item.request] = Kept(layer, row.item.tokens, states)
        return tuple([ItemResult(row.item.request) for row in rows])

    def _known(self, row: Row) -> list[int]:
        tokens = self._tokens.get(row.request.id)
        if tokens is None:
            request = row.request
            tokens = self._tokens[request.id] = list(request.prompt_token_ids)
            self._plain[request.id] = plain(request.sampling) and request.sampling.prompt_logprobs is None
        return tokens

    def _known_after(self, row: Row, result: ItemResult) -> list[int]:
        """A request's tokens behind a row: all, if it sampled; else those that are computed."""
        known = self._known(row)
        return known if row.item.emit == "sample" else known[: row.item.tokens[1]]

    # ------------------------------------------------------------------------------------- sampling
    def _emit(self, rows: Sequence[Row], hidden: Tensor, logits: Tensor | None = None) -> tuple[ItemResult, ...]:
        """The results of rows whose last layer is done, and what they were drawn from, if the draft source asks."""
        results = self._sampled(rows, hidden, logits)
        if self._drafter is not None and self._drafter.reads_hidden and any([row.item.propose for row in rows]):  # noqa: C419
            self._drawn_from |= drawn_from(rows, results, hidden)
        return results

    def _sampled(self, rows: Sequence[Row], hidden: Tensor, logits: Tensor | None) -> tuple[ItemResult, ...]:
        """Logits (of all tokens, if they are there already) only for rows that sample, and for prompts whose
        log-probabilities were asked for."""
        last: list[int] = []
        emitting, end = [], 0
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
                last += range(end - 1 - len(row.item.drafts), end)
                emitting.append(row)
        if not emitting:
            return tuple(failed.get(row.request.id) or ItemResult(row.request.id) for row in rows)
        if logits is None:
            logits = self._model.logits(hidden if len(last) == hidden.shape[0] else hidden[last])
        else:
            logits = logits[last]
        sampled: Sequence[Sampled] = ()
        if all(self._plain[row.request.id] for row in emitting):
            tokens = greedy(logits)
            if min(tokens) >= 0 and len(last) == len(emitting) == len(rows):
                return tuple([self._append(row, token) for row, token in zip(rows, tokens, strict=True)])
            sampled = [Sampled(token) for token in tokens] if min(tokens) >= 0 else ()
        asked = [] if sampled else [r for row in emitting for r in self._sample_rows(row)]
        sampled = sampled or sample(logits, asked)
        held, at = {}, 0
        for row in emitting:
            here = slice(at, at := at + 1 + len(row.item.drafts))
            held[row.request.id] = self._held(row.item, row.request, sampled[here], logits[here], asked[here])
        results = tuple(failed.get(row.request.id) or self._item_result(row, held.get(row.request.id)) for row in rows)
        self.cache.rewrite([pair for row, result in zip(rows, results) for pair in _displaced(row, result, self._block_size)])
        return results

    def _held(self, item: WorkItem, request: Request, sampled: Sequence[Sampled], logits: Tensor, rows: Sequence[SampleRow]
              ) -> list[Sampled]:  # fmt: skip
        """The drafts that hold, and one token more."""
        drafter = self._drafter
        if drafter is None or drafter.acceptance == "keyed" or not item.drafts or request.sampling.greedy or item.numerics == "fixed":
            return by_key(item, sampled)
        return by_rejection(item, sampled, logits, rows, drafter.odds(item))

    def _append(self, row: Row, token: int) -> ItemResult:
        """The result of a row whose token is all that was asked for."""
        known = self._tokens[row.request.id]
        del known[row.item.tokens[1] :]
        known.append(token)
        return ItemResult(row.request.id, (token,))

    def _sample_rows(self, row: Row) -> list[SampleRow]:
        """One behind the last committed token, and one behind each draft."""
        request, item, tokens = row.request, row.item, self._tokens[row.request.id]
        if len(tokens) > (stop := item.tokens[1] - len(item.drafts)):
            tokens = tokens[:stop]  # what follows was only a candidate
        if not item.drafts:
            return [sample_row(request, self._seed, tokens)]
        return [sample_row(request, self._seed, tokens, path) for path in ((), *paths(item.drafts, item.parents))]

    def _item_result(self, row: Row, found: Sequence[Sampled] | None) -> ItemResult:
        name, item = row.request.id, row.item
        if found is None:
            return ItemResult(name)
        if found[0].error is not None:
            return ItemResult(name, error=found[0].error)
        token_ids = tuple([s.token_id for s in found])
        known, committed = self._tokens[name], item.tokens[1] - len(item.drafts)
        if known[committed : committed + len(token_ids)] != list(token_ids):
            known[committed:] = token_ids
        scores = tuple(self._prompt_scores.pop(name, ()))
        return ItemResult(name, token_ids, tuple([s.logprobs for s in found if s.logprobs]), scores)

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


def drawn_from(rows: Sequence[Row], results: Sequence[ItemResult], hidden: Tensor) -> dict[str, Tensor]:
    """Of `hidden` [tokens of all rows, hidden_size], the state [hidden_size] that each request's newest token was drawn from."""
    found, end = {}, 0
    for row, result in zip(rows, results, strict=True):
        item = row.item
        end += item.num_tokens
        if result.token_ids:
            held = accepted_path(item, result.token_ids[:-1])
            found[row.request.id] = hidden[end - 1 - len(item.drafts) + (held[-1] + 1 if held else 0)]
    return found


def _positions(item: WorkItem) -> Iterable[int]:
    """Where its tokens stand in the text: a node of a tree as deep as it is, although its KV lies in a slot of its own."""
    start, stop = item.tokens
    if not branches(item):
        return range(start, stop)
    fork = stop - len(item.drafts)
    return [*range(start, fork), *(fork + depth - 1 for depth in depths(item))]


def _tree(item: WorkItem) -> TreeRow:
    if not branches(item):
        return TreeRow()
    return TreeRow(item.tokens[1] - len(item.drafts), lineages(item.parents))


def _displaced(row: Row, result: ItemResult, block_size: int) -> Iterator[tuple[int, int]]:
    """(from, to): slots of the nodes that hold, whose KV does not lie where their position is."""
    if not branches(row.item):
        return
    fork, table = row.item.tokens[1] - len(row.item.drafts), row.block_ids
    for depth, node in enumerate(accepted_path(row.item, result.token_ids)):
        if node != depth:
            src, dst = (table[at // block_size] * block_size + at % block_size for at in (fork + node, fork + depth))
            yield src, dst


def reason_of(error: BaseException) -> str:
    """Why a step came to nothing, in one line; with the way out where memory ran out."""
    told = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        told += "; a smaller max_num_batched_tokens, max_num_seqs or gpu_memory leaves a step more room"
    return told


def unserved(rows: Sequence[Row], error: str | None) -> tuple[ItemResult, ...]:
    """The results of rows that came to nothing: they failed, or (None) nothing was wrong with them."""
    return tuple([ItemResult(row.item.request, error=error) for row in rows])
