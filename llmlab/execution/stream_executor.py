"""The executor of devices with a queue of their own: a step is queued, and its tokens are looked at one step later.

    submit(n+1)  prepare, queue: moves, forward, choice of tokens, tokens to the host     (the device still runs n)
    result(n)    wait for the mark behind n's tokens, read them

A token that the host has not seen yet is read by the next step where the device left it. Rows that need more
of the host than a token (penalties, log-probabilities, biases) make their step wait, as in `TorchExecutor`.
With `HostLine` all of this runs on a CPU, at once and in order; with `CudaLine` it has not run on a GPU yet.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab import rng
from llmlab.execution.base import Done, Row, StepBatch, Ticket
from llmlab.execution.decode_graph import DecodeGraphs, DecodeRow
from llmlab.execution.device_line import DeviceLine, Mark
from llmlab.execution.swap import HostTier
from llmlab.execution.torch_executor import KVCache, Loss, TorchExecutor, reason_of, unserved
from llmlab.kernels.layout import PLAN_FACTS, AttentionMetadata, sent
from llmlab.models.loader import LoadedModel
from llmlab.types import DEVICE, DEVICE_MEMORY, Durations, ItemResult, LabError, Move, ResourceSpan, StepResult

GREEDY = (0.0, 0.0, 0.0, 1.0, 0.0)
MOST_LIVES = 3  # losses after which everything is made anew; something that kills every device must not go on for ever


class StreamCache(KVCache):
    """KV whose host tier is reached by a queue of copies."""

    def __init__(self, loaded: LoadedModel, num_blocks: int, num_host_blocks: int, block_size: int, line: DeviceLine) -> None:
        super().__init__(loaded, num_blocks, num_host_blocks, block_size)
        self._tier = HostTier(self.layers, num_host_blocks, line)

    @property
    def host(self) -> list[tuple[Tensor, Tensor]]:
        """Nobody attends to swapped blocks here. Raises LabError."""
        way_out = "Start the engine with that placement: it then keeps its host blocks where the CPU can read them."
        raise LabError("placement", "on the CPU", "swapped KV lies in pieces of all layers, for fast copies", way_out)

    def move(self, move: Move) -> None:
        if move.kind == "swap_out":
            self._tier.swap_out(move.src, move.dst)
        elif move.kind == "swap_in":
            self._tier.swap_in(move.src, move.dst)
        else:
            super().move(move)


class Anew(NamedTuple):
    """What a lost device is replaced with: the model read once more, empty KV, and the queue of the device they are on."""

    loaded: LoadedModel
    cache: StreamCache
    line: DeviceLine


class Ran(NamedTuple):
    """A ticket of a step that ran at once."""

    executor: StreamExecutor
    value: StepResult

    def result(self) -> StepResult:
        return self.executor.told(self.value)


class InFlight:
    """A queued step: its rows, where their tokens will be, and the marks around it. `samples[i]`: row i's place, -1 if none."""

    def __init__(self, executor: StreamExecutor, batch: StepBatch, submitted: float) -> None:
        self.batch, self.executor, self.submitted, self.prepared = batch, executor, submitted, 0.0
        self.life = executor.life
        self.samples: list[int] = []
        self.facts: list[dict[str, float]] = []
        self.tokens: Tensor | None = None
        self.began: Mark | None = None
        self.moved: Mark | None = None
        self.ended: Mark | None = None
        self.error = ""
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """Wait for this step and those before it."""
        while self._result is None:
            self.executor.settle_one()
        return self.executor.told(self._result)

    def settle(self, previous_end: float, base: Mark | None) -> float:
        """Wait, take the tokens over; when it ended, in seconds of the host's clock."""
        began, seconds = previous_end, 0.0
        spans: tuple[ResourceSpan, ...] = ()
        loss = Loss()
        if self.life != self.executor.life:  # it was queued on a device that was lost; an earlier step has told so
            self._result = _in_vain(self.batch)
            return previous_end
        try:
            if self.error or self.began is None or self.ended is None or self.moved is None:
                raise RuntimeError(self.error)
            self.ended.wait()
            seconds = self.ended.seconds_after(self.began)
            gap = self.began.seconds_after(base) if base is not None else 0.0
            began = previous_end + gap if base is not None else self.submitted
            tokens = [] if self.tokens is None else self.tokens.tolist()
            results = tuple(self.executor.take(row, tokens[i] if i >= 0 else None) for row, i in zip(self.batch.rows, self.samples))
            spans = self._spans(began, self.moved.seconds_after(self.began), seconds)
        except Exception as error:  # whatever the device raises: the step is lost, the log says why
            reason = self.error or reason_of(error)
            loss = self.executor.loss(reason)
            results = unserved(self.batch.rows, None if DEVICE_MEMORY in loss.lost else reason)
        parts = {"prepare": self.prepared, "idle": max(0.0, began - previous_end) if base is not None else 0.0}
        self._result = StepResult(self.batch.plan.step, results, Durations(seconds, parts=parts), spans, lost=loss.lost, why=loss.why)
        return began + seconds

    def _spans(self, began: float, moving: float, seconds: float) -> tuple[ResourceSpan, ...]:
        """What the device did, in seconds since the executor was made; for logs of level 4."""
        zero = self.executor.zero
        moves = [ResourceSpan("device", began - zero, began - zero + moving, "moves")] if self.batch.plan.moves else []
        told = ", ".join(f"{name} {value:g}" for facts in self.facts for name, value in facts.items())
        plan = [ResourceSpan("plan", began - zero, began - zero, f"attention: {told}")] if told else []
        return (*plan, *moves, ResourceSpan("device", began - zero + moving, began - zero + seconds, "forward and sample"))


class StreamExecutor(TorchExecutor):
    """See the module. `max_seqs`, `max_len`: what graphs are made for. `again`: makes everything anew once the device is lost,
    there or elsewhere, or says None; without it a loss is the end."""

    def __init__(self, loaded: LoadedModel, cache: KVCache, block_size: int, seed: int, line: DeviceLine, max_seqs: int,
                 max_len: int, fixed_rows: int = 64, again: Callable[[], Anew | None] | None = None) -> None:  # fmt: skip
        super().__init__(loaded, cache, block_size, seed, asynchronous=False, fixed_rows=fixed_rows)
        self.zero, self.life, self._told = time.perf_counter(), 0, 0  # `_told`: the life that the engine knows of
        self._max_seqs, self._max_len, self._again = max_seqs, max_len, again
        self._wrecks: list[object] = []
        self._queue: deque[InFlight] = deque()
        self._end = self.zero  # when the last settled step ended
        self._settle_on(line)

    def _settle_on(self, line: DeviceLine) -> None:
        """Everything that lies on the device beside model and KV."""
        self.line = line
        self._slots: dict[str, int] = {}
        self._free = list(range(4 * self._max_seqs, 0, -1))  # slot 0 takes what nobody needs
        self._last = torch.zeros(4 * self._max_seqs + 1, dtype=torch.int64, device=line.device)
        graphs = isinstance(self._model.layers, list)
        self.graphs = DecodeGraphs(self._model, self.cache.layers, self._last, self._max_seqs, self._max_len, self._block_size,
                                   line) if graphs else None  # fmt: skip
        self._base: Mark | None = None  # the mark of the last settled step

    # ------------------------------------------------------------------------------------ interface
    def submit(self, batch: StepBatch) -> Ticket:
        began = time.perf_counter()
        for row in batch.rows:
            self._known(row)
        if len(self._free) < len(batch.rows):
            self._reclaim()
        if not all(map(self._on_device, batch.rows)):
            while self._queue:
                self.settle_one()
            self._base = None  # the host steps in: the device waits, and its clock is read anew
            self._release(batch.forget)
            return Ran(self, self._run(batch) if self.life == self._told else _in_vain(batch))
        if self.life != self._told:  # planned by somebody who does not know yet that there is no KV to work on
            self._release(batch.forget)
            return Done(_in_vain(batch))
        step = InFlight(self, batch, began)
        try:
            with torch.inference_mode():
                self._launch(step)
        except Exception as error:  # a kernel that does not compile, or no memory: the step is lost, the engine is not
            step.error = reason_of(error)
        self._release(batch.forget)
        step.prepared = time.perf_counter() - began
        self._queue.append(step)
        return step

    def settle_one(self) -> None:
        """Take the oldest step in flight over."""
        step = self._queue.popleft()
        self._end = step.settle(self._end, self._base)
        self._base = None if step.error or step.life != self.life else step.ended

    # ----------------------------------------------------------------------------- a lost device
    def loss(self, reason: str) -> Loss:
        """What an error means: rows of a step, if the device answers; its memory, if everything could be made anew; or
        the device."""
        if self._gone or self.line.answers():
            return Loss()
        lost = self._loaded.device
        why = f"{lost} does not answer any more after {reason}"
        anew = self._again() if self._again is not None and self.life < MOST_LIVES else None
        if anew is None:
            self._gone = True
            return Loss((DEVICE,), why)
        # freeing what lies on a dead device would call it
        self._wrecks.append((self._loaded, self.cache, self.line, self._last, self.graphs))
        self._loaded, self._model, self.cache, self._fixed = anew.loaded, anew.loaded.model, anew.cache, None
        self._lost.clear()
        self._hidden.clear()
        self.life += 1
        self._settle_on(anew.line)
        self._warm_up(anew.cache.layers[0][0].shape[0] * self._block_size)
        return Loss((DEVICE_MEMORY,), f"{why}; begun anew on {anew.loaded.device}")

    _loss = loss

    def told(self, result: StepResult) -> StepResult:
        """The engine gets a result: what it plans from now on knows of a loss in it."""
        self._told += DEVICE_MEMORY in result.lost
        return result

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "graphs": list(self.graphs.sizes) if self.graphs else [], "line": type(self.line).__name__}

    def take(self, row: Row, token: int | None) -> ItemResult:
        """Row's result, its token known from now on. Rows that built on a failed one have none."""
        name, known = row.request.id, self._tokens.get(row.request.id)
        if name in self._lost:
            return ItemResult(name, error=self._lost[name])
        if known is None or len(known) < row.item.tokens[1]:
            return ItemResult(name, error="the step before it failed")
        if token is None:
            return ItemResult(name)
        if token < 0:
            return ItemResult(name, error=f"request {name!r}, position {row.item.tokens[1]}: its largest logit is not finite")
        known.append(token)
        return ItemResult(name, (token,))

    # ---------------------------------------------------------------------------------------- a step
    def _on_device(self, row: Row) -> bool:
        """Whether nothing but the last token of the row can be unknown to the host, and nothing but a token is asked for."""
        sampling, (start, stop) = row.request.sampling, row.item.tokens
        unknown = stop - max(start, len(self._known(row)))
        plain = self._plain[row.request.id] or not (
            sampling.logprobs is not None or sampling.prompt_logprobs is not None or sampling.logit_bias
            or sampling.has_penalties or sampling.min_tokens)  # fmt: skip
        item = row.item
        here = (item.device, item.home, item.layers) == ("device", "device", None)
        usual = (item.inputs, item.mask, item.numerics) == ("ids", "causal", "fast") and item.emit in ("sample", "none")
        known = unknown <= 0 or (unknown == 1 and row.request.id in self._slots)
        return here and usual and plain and known and not item.drafts and row.request.id not in self._lost

    def _launch(self, step: InFlight) -> None:
        step.began = self.line.mark()
        self._move(step.batch.plan.moves)
        step.moved = self.line.mark()
        rows = step.batch.rows
        emitting = [row for row in rows if row.item.emit == "sample"]
        places = {row.request.id: i for i, row in enumerate(emitting)}
        step.samples = [places.get(row.request.id, -1) if row.item.emit == "sample" else -1 for row in rows]
        tokens: Tensor | None = None
        if self.graphs is not None and rows and all(row.item.num_tokens == 1 for row in rows) and len(emitting) == len(rows):
            tokens = self._replayed(step, rows)
        if tokens is None and rows:
            tokens = self._eagerly(step, rows, emitting)
        if tokens is not None and emitting:
            step.tokens = self.line.host_empty((len(tokens),), torch.int64)
            step.tokens.copy_(tokens, non_blocking=True)
        step.ended = self.line.mark()

    def _replayed(self, step: InFlight, rows: Sequence[Row]) -> Tensor | None:
        """The tokens of a graph; None, now and for good, if graphs do not work here."""
        assert self.graphs is not None
        decoding = [self._decode_row(row) for row in rows]
        try:
            tokens = self.graphs.run(decoding)
        except torch.OutOfMemoryError:
            raise  # a smaller batch may fit; the step says what happened
        except Exception as error:  # a driver, a library or a kernel that cannot be recorded
            if not self.line.answers():
                raise
            logging.getLogger("llmlab").warning("graphs are off from here on, steps run kernel by kernel: %s", error)
            self.graphs = None
            return None
        step.facts = self.graphs.facts
        return tokens

    def _eagerly(self, step: InFlight, rows: Sequence[Row], emitting: Sequence[Row]) -> Tensor | None:
        """Any mixture of prompts, chunks and decoding rows, one kernel after the other."""
        ids: list[int] = []
        source: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        end = 0
        for row in rows:
            start, stop = row.item.tokens
            known = self._known(row)[start:stop]
            pending = stop - start - len(known)
            ids += [*known, *[0] * pending]
            source += [*[-1] * len(known), *[self._slots.get(row.request.id, 0)] * pending]
            positions += range(start, stop)
            end += stop - start
            if row.item.emit == "sample":
                last.append(end - 1)
        device = self.line.device
        meta = AttentionMetadata.build(
            [row.item.num_tokens for row in rows], [row.item.tokens[1] for row in rows], [row.block_ids for row in rows],
            self._block_size, device=device,
        )  # fmt: skip
        given = sent(np.array([ids, source, positions], np.int64), device)
        chosen = torch.where(given[1] >= 0, self._last[given[1].clamp(min=0)].clamp(min=0), given[0])
        hidden = self._model.forward(self._model.embed(chosen), given[2], meta, self.cache.layers)
        step.facts = meta.derived.get(PLAN_FACTS, [])
        if not last:
            return None
        places = sent(np.array([last, [self._slot(row.request.id) for row in emitting]], np.int64), device)
        tokens = self._choose(self._model.logits(hidden[places[0]]), emitting)
        self._last.index_copy_(0, places[1], tokens)
        return tokens

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        choices = [self._choice(row) for row in rows]
        if all(choice[0] == 0 for choice in choices):
            return self._model.kernels.argmax(logits)
        real = sent(np.ascontiguousarray(np.array(choices, np.float64).T), self.line.device)
        return self._model.kernels.draw(logits, real[0].float(), real[1].float(), real[2].int(), real[3], real[4])

    def _decode_row(self, row: Row) -> DecodeRow:
        position = row.item.tokens[0]
        known = self._known(row)
        pending = position >= len(known)
        source = self._slots[row.request.id] if pending else -1
        return DecodeRow(0 if pending else known[position], source, position, row.block_ids, self._slot(row.request.id), self._choice(row))

    def _choice(self, row: Row) -> tuple[float, float, float, float, float]:
        """Temperature, min_p, top_k, top_p and the draw of a row, as `decoding.sampler` draws it."""
        sampling, request = row.request.sampling, row.request
        if sampling.temperature == 0:
            return GREEDY
        seeded = sampling.seed is not None
        name = f"#{request.metadata.get('sample', 0)}" if seeded else request.id
        draw = rng.uniform(sampling.seed if sampling.seed is not None else self._seed, name, row.item.tokens[1])
        return sampling.temperature, sampling.min_p, float(sampling.top_k), sampling.top_p, draw

    # ------------------------------------------------------------------------- slots of last tokens
    def _slot(self, name: str) -> int:
        if name not in self._slots:
            self._slots[name] = self._free.pop()
        return self._slots[name]

    def _reclaim(self) -> None:
        """Take all slots back: once every step is taken over the host knows all tokens."""
        while self._queue:
            self.settle_one()
        self._free += self._slots.values()
        self._slots.clear()

    def _release(self, names: Sequence[str]) -> None:
        """Forget requests. Their tokens go when the steps that hold them are taken over: nobody asks for them again."""
        for name in names:
            if name in self._slots:
                self._free.append(self._slots.pop(name))
            for known in (self._tokens, self._plain, self._lost, self._hidden, self._prompt_scores):
                known.pop(name, None)


def _in_vain(batch: StepBatch) -> StepResult:
    """The result of a step that had no device to run on, and of which another step tells."""
    return StepResult(batch.plan.step, unserved(batch.rows, None))
