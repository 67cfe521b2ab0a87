"""Hybrid execution: rows whose KV lies on the host attend there, while the device goes on.

    device   | pre 0 | attend 0 |post 0 pre 1| attend 1 |post 1 pre 2| ...        linear layers of ALL rows, attention of its own
                 \\ q k v          o /   \\ q k v
    host            | attention 0 |        | attention 1 |                        appends k and v, attends over host blocks

What runs when is `stages.stages`; the host's side is one thread (`host_worker`). A row that passes one layer a step leaves
its residual and its running attention behind (`_Left`); the step that takes it up waits as late as possible: just
before the rest of that layer. Prompts of host rows run on the device: each layer's KV passes through one of two staging
buffers on its way to the host, beside the next layer's arithmetic.

With a CUDA device copies go over a stream of their own from and to pinned memory. On a machine without one, "device" and
host are two threads with a KV pool each: the concurrency and the results are real, speeds mean little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmlab.execution.base import Row
from llmlab.execution.host_worker import HostWorker, Job
from llmlab.execution.stages import stages
from llmlab.kernels.dispatch import Kernels, host_kernels
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.rope import Rotation
from llmlab.models.transformer import Transformer
from llmlab.types import ResourceSpan

Pair = tuple[Tensor, Tensor]  # keys and values of one layer, each [num_blocks, num_kv_heads, block_size, head_dim]


class Link:
    """Copies between device and host for the host's thread. Does nothing where both are the same memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        stream: Any = torch.cuda.Stream
        self._stream: Any = stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """What the device has been told so far: `down` waits for it."""
        return torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None

    def down(self, mark: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors in host memory, once the device is past `mark`."""
        return self.beside(mark, lambda: tuple(self._pinned(t) for t in tensors)) if self._stream is not None else tensors

    def beside(self, mark: Any, work: Callable[[], Any]) -> Any:
        """What `work` returns, its operations on the device queued beside the main queue: after `mark`, and done on return."""
        if self._stream is None:
            return work()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            found = work()
            self._stream.synchronize()
        return found

    def _pinned(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def up(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device, for what is queued there next."""
        return tensor if self._stream is None else tensor.to(self._device, non_blocking=True)


class Attend(NamedTuple):
    """Append keys and values of new tokens to host KV and attend. `k`, `v`: as a cache of their own, token by token."""

    op: str
    model: Transformer
    layer: int
    kernels: Kernels
    q: Tensor
    kv: Pair
    host: Pair
    meta: AttentionMetadata
    link: Link
    mark: Any

    def on_host(self) -> Tensor:
        q, k, v = self.link.down(self.mark, self.q, *self.kv)
        self._store(k, v)
        return self.model.attend(self.model.layers[self.layer], self.kernels, q, *self.host, self.meta)

    def on_device(self) -> Tensor:
        """The blocks of the rows go to the device, and its kernels attend."""
        self._store(*(t.cpu() for t in self.kv))
        tables, device = self.meta.block_tables, self.q.device
        k, v = (t[tables.flatten().long()].to(device) for t in self.host)
        near = torch.arange(tables.numel(), dtype=torch.int32).view(tables.shape)
        meta = AttentionMetadata(
            self.meta.cu_seqlens_q.to(device), self.meta.seq_lens.to(device), near.to(device),
            self.meta.slot_mapping.to(device), self.meta.max_seqlen_q,
        )  # fmt: skip
        return self.model.attend(self.model.layers[self.layer], self.model.kernels, self.q, k, v, meta)

    def _store(self, k: Tensor, v: Tensor) -> None:
        tokens = len(self.q)
        flat = [t.transpose(1, 2).flatten(0, 1)[:tokens] for t in (k, v)]
        slots, size = self.meta.slot_mapping, self.host[0].shape[2]
        block, offset = slots // size, slots % size
        for cache, new in zip(self.host, flat, strict=True):
            cache[block, :, offset] = new.to(cache.dtype)


class Copy(NamedTuple):
    """Blocks of one layer, `src` to `dst`, between the tiers."""

    op: str
    source: Pair
    target: Pair
    src: Tensor
    dst: Tensor
    link: Link
    mark: Any

    def on_host(self) -> None:
        """All of it beside the main queue: gathering there would read before the main queue has written, and wait for it."""
        self.link.beside(self.mark, self._copy)

    def _copy(self) -> None:
        for source, target in zip(self.source, self.target, strict=True):
            blocks = source[self.src.to(source.device)].to(target.device)
            target[self.dst.to(target.device)] = blocks

    def on_device(self) -> None:
        self.on_host()


class Call(NamedTuple):
    """Anything else that touches host KV."""

    op: str
    function: Any

    def on_host(self) -> Any:
        return self.function()

    def on_device(self) -> Any:
        return self.function()


class _Left(NamedTuple):
    """A token half-way: where it is, its residual [1, d], and its attention, row `at` of the job's result."""

    position: int
    layer: int
    hidden: Tensor
    job: Job
    at: int


class _Away:
    """A row on the CPU in one step. `span`: its tokens among the lane's; `job`: its running attention."""

    __slots__ = ("job", "offset", "row", "span", "start", "stop")

    def __init__(self, row: Row, span: range, num_layers: int) -> None:
        self.row, self.span = row, span
        self.start, self.stop = row.item.layers or (0, num_layers)
        self.job: Job | None = None
        self.offset = 0


class Hybrid:
    """Runs the layers of steps with rows on both tiers. `lost` tells once that the host's thread died."""

    def __init__(self, model: Transformer, device_kv: Sequence[Pair], host_kv: Sequence[Pair], block_size: int) -> None:
        self.model, self.device_kv, self.host_kv, self.block_size = model, device_kv, host_kv, block_size
        self.link = Link(model.device)
        self.kernels = host_kernels(model.kernels, model.device.type == "cpu")
        self.worker = HostWorker(torch.inference_mode)
        self.left: dict[str, _Left] = {}
        self.waited: list[tuple[float, float, str]] = []
        self._told = False

    def run(self, rows: Sequence[Row], ids_of: Callable[[Row], Sequence[int]]) -> dict[str, Tensor]:
        """Hidden states behind the last layer, [tokens of the item, d], of each row that gets there. `ids_of`: the
        tokens that a row computes."""
        names = sorted({row.item.lane for row in rows})
        lanes = {name: Lane(self, [row for row in rows if row.item.lane == name], ids_of) for name in names}
        for stage in stages(tuple(names), self.model.shape.num_layers):
            getattr(lanes[stage.lane], stage.act)(stage.layer)
        found: dict[str, Tensor] = {}
        for lane in lanes.values():
            found |= lane.ended()
        return found

    def wait(self, job: Job) -> Any:
        """The job's result; notes how long the device waited."""
        if job.done.is_set():
            return job.result
        began = time.perf_counter()
        result = self.worker.wait(job)
        self.waited.append((began, time.perf_counter(), job.task.op))
        return result

    def call(self, op: str, function: Callable[[], Any]) -> Any:
        """Let the host's thread do something in its turn, and wait for it."""
        return self.wait(self.worker.submit(Call(op, function)))

    def forget(self, request: str) -> None:
        self.left.pop(request, None)

    def take_lost(self) -> tuple[str, ...]:
        """What died since the last call."""
        if self.worker.alive or self._told:
            return ()
        self._told = True
        return ("cpu",)

    def take_spans(self, zero: float) -> tuple[list[ResourceSpan], float]:
        """What the host's thread did since the last call (times since `zero`), and how long the device waited for it."""
        spans = []
        while self.worker.finished:
            job = self.worker.finished.popleft()
            spans.append(ResourceSpan("cpu", job.began - zero, job.ended - zero, job.task.op))
        waited, self.waited = self.waited, []
        return spans, sum(end - began for began, end, _ in waited)


class Lane:
    """One sub-batch on its way through the layers. Tokens of rows that stay on the device come first in every tensor,
    then those whose KV passes the staging buffers, then those of rows on the CPU that are `here` at the moment."""

    def __init__(self, hybrid: Hybrid, rows: Sequence[Row], ids_of: Callable[[Row], Sequence[int]]) -> None:
        self._hybrid, self._model = hybrid, hybrid.model
        near = [row for row in rows if row.item.device == "device"]
        self._own = [row for row in near if row.item.home == "device"]
        staged = [row for row in near if row.item.home == "cpu"]
        away = [row for row in rows if row.item.device == "cpu"]
        ordered = [*self._own, *staged, *away]
        ids: list[int] = []
        positions: list[int] = []
        spans: list[range] = []
        for row in ordered:
            start, stop = row.item.tokens
            spans.append(range(len(ids), len(ids) + stop - start))
            ids += ids_of(row)
            positions += range(start, stop)
        self._near = [*self._own, *staged]
        self._num_own = sum(row.item.num_tokens for row in self._own)
        self._num_near = sum(row.item.num_tokens for row in near)
        num_layers = self._model.shape.num_layers
        self._away = [_Away(row, span, num_layers) for row, span in zip(away, spans[len(near) :], strict=True)]
        device = self._model.device
        self._rotations = self._model.rotations(torch.tensor(positions, dtype=torch.int64, device=device))
        self.here = [a for a in self._away if a.start == 0]
        entering = [*range(self._num_near), *(i for a in self.here for i in a.span)]
        self._hidden = self._model.embed(torch.tensor([ids[i] for i in entering], dtype=torch.int64, device=device))
        self._own_meta = self._meta(self._own, [row.block_ids for row in self._own], device)
        self._staging = Staging(hybrid, staged) if staged else None
        self._metas: dict[tuple[int, ...], AttentionMetadata] = {}
        self._heads = self._out = self._q = self._hidden

    def _meta(self, rows: Sequence[Row], tables: Sequence[Sequence[int]], device: torch.device | str) -> AttentionMetadata:
        return AttentionMetadata.build(
            [row.item.num_tokens for row in rows], [row.item.tokens[1] for row in rows], tables, self._hybrid.block_size,
            device=device,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- stages
    def pre(self, layer: int) -> None:
        if len(self._hidden):
            self._heads = self._model.project(self._model.layers[layer], self._hidden)

    def begin(self, layer: int) -> None:
        """Rotate; keys and values go to their pools; rows on the CPU begin to attend, and some stay away."""
        part, model = self._model.layers[layer], self._model
        own, near = self._num_own, self._num_near
        rotation = self._rotations[part.rope]
        if own:
            self._q = model.rotate(part, self._heads[:own], _rows(rotation, slice(0, own)), *self._hybrid.device_kv[layer],
                                   self._own_meta.slot_mapping)  # fmt: skip
        if self._staging is not None:
            self._staging.begin(layer, part, self._heads[own:near], _rows(rotation, slice(own, near)))
        if self.here:
            self._send(layer, part, self._heads[near:], rotation)

    def _send(self, layer: int, part: Any, heads: Tensor, rotation: Rotation) -> None:
        hybrid, rows = self._hybrid, [a.row for a in self.here]
        index = torch.tensor([i for a in self.here for i in a.span], dtype=torch.int64, device=heads.device)
        tokens, size = len(index), hybrid.block_size
        like = hybrid.device_kv[layer][0]
        shape = (-(-tokens // size), *like.shape[1:])
        new = like.new_empty(shape), like.new_empty(shape)
        q = self._model.rotate(part, heads, _rows(rotation, index), *new, torch.arange(tokens, device=heads.device))
        key = tuple(id(row) for row in rows)
        if key not in self._metas:
            self._metas[key] = self._meta(rows, [row.block_ids for row in rows], "cpu")
        job = hybrid.worker.submit(Attend(
            f"attention {layer}", self._model, layer, hybrid.kernels, q, new, hybrid.host_kv[layer], self._metas[key],
            hybrid.link, hybrid.link.mark(),
        ))  # fmt: skip
        self._part_with(layer, job)

    def _part_with(self, layer: int, job: Job) -> None:
        """Rows that only begin this layer's attention leave their residual; the others will be waited for."""
        kept, offset, position = list(range(self._num_near)), 0, self._num_near
        staying = []
        for a in self.here:
            span = range(position, position + a.row.item.num_tokens)
            if a.row.item.halfway and a.stop == layer + 1:
                self._hybrid.left[a.row.request.id] = _Left(
                    a.row.item.tokens[0], layer + 1, self._hidden[position : position + 1].clone(), job, offset
                )
            else:
                a.job, a.offset = job, offset
                staying.append(a)
                kept += span
            offset, position = offset + len(span), span.stop
        if len(staying) < len(self.here):
            self._hidden = self._hidden[torch.tensor(kept, dtype=torch.int64, device=self._hidden.device)]
        self.here = staying

    def attend(self, layer: int) -> None:
        part, outs = self._model.layers[layer], []
        if self._num_own:
            outs.append(self._model.attend(part, self._model.kernels, self._q, *self._hybrid.device_kv[layer], self._own_meta))
        if self._staging is not None:
            outs.append(self._staging.attend(layer, part))
        self._outs = outs

    def join(self, layer: int) -> None:
        """Rows come back from the CPU: those of this step, and those that an earlier one left at this layer."""
        outs, up = self._outs, self._hybrid.link.up
        for a in self.here:
            assert a.job is not None
            outs.append(up(self._hybrid.wait(a.job)[a.offset : a.offset + a.row.item.num_tokens]))
        arriving = [a for a in self._away if a.start == layer + 1]
        if arriving:
            left = [self._taken_up(a) for a in arriving]
            outs += [up(self._hybrid.wait(each.job)[each.at : each.at + 1]) for each in left]
            self._hidden = torch.cat([self._hidden, *(each.hidden.to(self._hidden.dtype) for each in left)])
            self.here += arriving
        self._out = outs[0] if len(outs) == 1 else torch.cat(outs) if outs else self._hidden

    def _taken_up(self, a: _Away) -> _Left:
        left = self._hybrid.left.pop(a.row.request.id, None)
        if left is None or (left.position, left.layer) != (a.row.item.tokens[0], a.start):
            raise RuntimeError(f"{a.row.request.id} is to go on at layer {a.start}, but was not left there")
        return left

    def post(self, layer: int) -> None:
        if len(self._hidden):
            self._hidden = self._model.after_attention(self._model.layers[layer], self._out, self._hidden)

    def ended(self) -> dict[str, Tensor]:
        """The rows behind the last layer."""
        if self._staging is not None:
            self._staging.finish()
        found, position = {}, 0
        for row in [*self._near, *(a.row for a in self.here)]:
            found[row.request.id] = self._hidden[position : position + row.item.num_tokens]
            position += row.item.num_tokens
        return found


def _rows(rotation: Rotation, index: Any) -> Rotation:
    return Rotation(rotation.cos[index], rotation.sin[index])


class Staging:
    """Rows that attend on the device although their KV lives on the host. Layer l's KV lies in buffer l mod 2: what the
    host has of it comes in two layers ahead, and the new part goes out as soon as the attention has been told."""

    def __init__(self, hybrid: Hybrid, rows: Sequence[Row]) -> None:
        self._hybrid, self._model, size = hybrid, hybrid.model, hybrid.block_size
        tables, first = [], 0
        known: list[tuple[int, int]] = []
        new: list[tuple[int, int]] = []
        for row in rows:
            start, _stop = row.item.tokens
            tables.append(list(range(first, first + len(row.block_ids))))
            known += zip(row.block_ids[: -(-start // size)], tables[-1], strict=False)
            new += zip(tables[-1][start // size :], row.block_ids[start // size :], strict=True)
            first += len(row.block_ids)
        self._meta = AttentionMetadata.build(
            [r.item.num_tokens for r in rows], [r.item.tokens[1] for r in rows], tables, size, device=self._model.device
        )
        shape = (first, *hybrid.device_kv[0][0].shape[1:])
        like = hybrid.device_kv[0][0]
        self._buffers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(2)]
        self._known, self._new = (torch.tensor(pairs, dtype=torch.int64).view(-1, 2) for pairs in (known, new))
        self._jobs: list[Job | None] = [None, None]
        self._q = like
        for layer in range(min(2, self._model.shape.num_layers)):
            self._fetch(layer)

    def _fetch(self, layer: int) -> None:
        if len(self._known) and layer < self._model.shape.num_layers:
            self._copy(f"in {layer}", layer, self._hybrid.host_kv[layer], self._buffers[layer % 2], self._known)

    def _copy(self, op: str, layer: int, source: Pair, target: Pair, pairs: Tensor) -> None:
        link = self._hybrid.link
        job = self._hybrid.worker.submit(Copy(op, source, target, pairs[:, 0], pairs[:, 1], link, link.mark()))
        self._jobs[layer % 2] = job

    def begin(self, layer: int, part: Any, heads: Tensor, rotation: Rotation) -> None:
        job = self._jobs[layer % 2]
        if job is not None:
            self._hybrid.wait(job)
        self._q = self._model.rotate(part, heads, rotation, *self._buffers[layer % 2], self._meta.slot_mapping)

    def attend(self, layer: int, part: Any) -> Tensor:
        out = self._model.attend(part, self._model.kernels, self._q, *self._buffers[layer % 2], self._meta)
        self._copy(f"out {layer}", layer, self._buffers[layer % 2], self._hybrid.host_kv[layer], self._new)
        self._fetch(layer + 2)
        return out

    def finish(self) -> None:
        """The buffers end with the step, so all that leaves them must have left."""
        for job in self._jobs:
            if job is not None:
                self._hybrid.wait(job)
