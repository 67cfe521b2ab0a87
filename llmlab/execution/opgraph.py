"""From a plan to ops with dependencies, which `timelines` then places.

Items are sorted into lanes (sub-batches). In each lane, layer by layer:

    attention on the device     | after l-1, before l, attention l |
    attention on the host       | after l-1, before l |  ->d2h q k v->  | cpu: attention l |  ->h2d out->  | after l ...
                                    the rows of the lane that stay on the device attend meanwhile
    a group of devices             | before l, attention l |  linear l' |  ->net: all-reduce l->  | before l+1 ...

"before" and "after" are a layer's ops on both sides of its attention. Lanes wait for nothing but resources of each other,
so one computes while the other's rows are away. A host row whose layers end before the model's last one leaves its last
attention running: the step does not wait for it, and the row's next item, which goes on at the next layer, joins when it
is back. Blocks that are copied move layer by layer: layer l of a row waits for layer l of its blocks only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from llmlab.execution.timelines import Op
from llmlab.seams import LayerCost
from llmlab.types import Move, Span, WorkItem

Ends = tuple[float, ...]  # one instant for each layer


class Pending:
    """What earlier steps left running: until when, by layer, blocks are still being copied out of or read, and when the
    attention of a row that left a step early is back."""

    def __init__(self) -> None:
        self.device_blocks: dict[int, Ends] = {}
        self.host_blocks: dict[int, Ends] = {}
        self.joins: dict[str, float] = {}

    def prune(self, now: float) -> None:
        """Forget copies that have ended."""
        for blocks in (self.device_blocks, self.host_blocks):
            for block in [b for b, ends in blocks.items() if ends[-1] <= now]:
                del blocks[block]

    @property
    def copies(self) -> bool:
        return bool(self.device_blocks or self.host_blocks)


class Copied(NamedTuple):
    """The ops of one move, a layer each."""

    move: Move
    ops: tuple[int, ...]


class Graph(NamedTuple):
    """The ops of a step. `ends`: those that the step's results wait for. `joins`: by request, the op that brings back an
    attention which the step does not wait for."""

    ops: list[Op]
    ends: tuple[int, ...]
    copied: tuple[Copied, ...]
    joins: dict[str, int]


def build(items: Sequence[WorkItem], moves: Sequence[Move], writes: Mapping[str, Sequence[int]], costs: LayerCost,
          pending: Pending, now: float) -> Graph:  # fmt: skip
    """The graph of a step. `writes`: the device blocks that each request's item writes. Blocks may be copied in from `now`
    on, which is when the step was planned."""
    ops: list[Op] = []
    copied = _copies(ops, moves, costs, pending, now)
    lanes: dict[int, list[WorkItem]] = {}
    for item in items:
        lanes.setdefault(item.lane, []).append(item)
    ends: list[int] = []
    joins: dict[str, int] = {}
    pause = costs.pause(items)
    for name in sorted(lanes):
        lane = _Lane(ops, lanes[name], costs, _Blocks(lanes[name], writes, copied, pending), pending)
        ends += lane.build(pause)
        joins |= lane.joins
        pause = 0.0
    return Graph(ops, tuple(ends) or tuple(range(len(ops))), copied, joins)


# ------------------------------------------------------------------------------------------ copies
def _copies(ops: list[Op], moves: Sequence[Move], costs: LayerCost, pending: Pending, now: float) -> tuple[Copied, ...]:
    """The moves as one op a layer, layer by layer; a move waits for earlier ones that touch its blocks."""
    found: list[list[int]] = [[] for _ in moves]
    before = [[j for j in range(i) if _touch(moves[j], move)] for i, move in enumerate(moves)]
    seconds = [costs.move_seconds(move) / costs.num_layers for move in moves]
    for layer in range(costs.num_layers):
        for i, move in enumerate(moves):
            source, target = _pools(move, pending)
            ready = max([now, *(e[layer] for b in move.src if (e := source.get(b))),
                         *(e[layer] for b in move.dst if (e := target.get(b)))])  # fmt: skip
            after = (*found[i][-1:], *(found[j][layer] for j in before[i]))
            ops.append(Op(costs.link_of(move), seconds[i], move.kind, after, move.request,
                          costs.move_bytes(move) / costs.num_layers, ready))  # fmt: skip
            found[i].append(len(ops) - 1)
    return tuple(Copied(move, tuple(indices)) for move, indices in zip(moves, found))


def _pools(move: Move, pending: Pending) -> tuple[dict[int, Ends], dict[int, Ends]]:
    """Where the sources and the targets of a move lie."""
    return (pending.host_blocks if move.kind == "swap_in" else pending.device_blocks,
            pending.host_blocks if move.kind == "swap_out" else pending.device_blocks)  # fmt: skip


def _touch(a: Move, b: Move) -> bool:
    """Whether two moves have a block in common, so that their order matters."""
    places = [{(kind, block) for kind, blocks in _places(move) for block in blocks} for move in (a, b)]
    return not places[0].isdisjoint(places[1])


def _places(move: Move) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    return (("host" if move.kind == "swap_in" else "device", move.src),
            ("host" if move.kind == "swap_out" else "device", move.dst))  # fmt: skip


class _Blocks:
    """Which copies the rows of one lane wait for, at each layer."""

    def __init__(self, items: Sequence[WorkItem], writes: Mapping[str, Sequence[int]], copied: Sequence[Copied],
                 pending: Pending) -> None:  # fmt: skip
        names = {item.request for item in items}
        written = {block for item in items for block in writes.get(item.request, ())}
        self._moves = [
            c for c in copied
            if (c.move.request in names and c.move.kind != "swap_out")
            or (c.move.kind == "swap_out" and not written.isdisjoint(c.move.src))
        ]  # fmt: skip
        self._ends = [ends for block, ends in pending.device_blocks.items() if block in written]

    def after(self, layer: int) -> tuple[int, ...]:
        return tuple(c.ops[layer] for c in self._moves)

    def ready(self, layer: int) -> float:
        return max((ends[layer] for ends in self._ends), default=0.0)


# ------------------------------------------------------------------------------------------- lanes
class _Work(NamedTuple):
    """The rows that are active on layers [start, stop), the same ones on each. `arriving` come back from the host for what
    follows the attention of layer start - 1; `leaving` do not stay for what follows the attention of layer stop - 1."""

    start: int
    stop: int
    on_device: list[WorkItem]
    on_host: list[WorkItem]
    arriving: list[WorkItem]
    leaving: list[WorkItem]

    @property
    def num_tokens(self) -> int:
        return _tokens(self.on_device) + _tokens(self.on_host)


def _tokens(items: Iterable[WorkItem]) -> int:
    return sum(item.num_tokens for item in items)


def stretches(items: Sequence[WorkItem], num_layers: int) -> list[_Work]:
    """The lane cut at every layer where its set of active rows changes."""
    spans = [item.layers or Span(0, num_layers) for item in items]
    cuts = sorted({edge for span in spans for edge in span})
    found = []
    for start, stop in pairwise(cuts):
        active = [(item, span) for item, span in zip(items, spans) if span[0] <= start and stop <= span[1]]
        host = [(item, span) for item, span in active if item.device == "cpu"]
        if active:
            found.append(_Work(
                start, stop, [item for item, _ in active if item.device != "cpu"], [item for item, _ in host],
                [item for item, span in host if span[0] == start > 0],
                [item for item, span in host if span[1] == stop and item.halfway],
            ))  # fmt: skip
    return found


class _Lane:
    """Builds the ops of one lane. `_wait`: ops that the next one on the device waits for; `_owed`: seconds that come first
    in it; `_staying`: tokens that owe it what follows the attention of layer `_done`."""

    def __init__(self, ops: list[Op], items: Sequence[WorkItem], costs: LayerCost, blocks: _Blocks, pending: Pending) -> None:
        self.joins: dict[str, int] = {}
        self._ops, self._items, self._costs, self._blocks, self._pending = ops, items, costs, blocks, pending
        self._wait: tuple[int, ...] = ()
        self._owed = 0.0
        self._staying, self._done = 0, -1

    def build(self, pause: float) -> list[int]:
        """Add the ops; those that the step's results wait for. `pause`: seconds before the first."""
        costs = self._costs
        self._owed = pause + costs.enter(_tokens(i for i in self._items if not i.layers or i.layers[0] == 0))
        for part in stretches(self._items, costs.num_layers):
            if part.start - 1 != self._done:
                self._settle(part.start - 1)
            self._staying += _tokens(part.arriving)
            for layer in range(part.start, part.stop):
                self._layer(part, layer)
        ending = [item for item in self._items if item.layers == (costs.num_layers, costs.num_layers)]
        if ending:
            self._end(ending)
        self._settle(costs.num_layers)
        last = self._owed + costs.leave(sum(1 for item in self._items if item.emit == "sample"))
        ready = max((self._pending.joins.get(item.request, 0.0) for item in ending), default=0.0)
        return [self._add("device", last, "head", self._wait, ready)] if last else list(self._wait)

    def _end(self, ending: Sequence[WorkItem]) -> None:
        """Rows come back for what follows the last layer's attention."""
        if self._done != self._costs.num_layers - 1:
            self._settle(self._costs.num_layers - 1)
        self._staying += _tokens(ending)

    def _settle(self, done: int) -> None:
        """What follows the attention of the last layer built, if any token stays for it; the next is `done` + 1."""
        if self._staying:
            layer = max(0, self._done)
            shared = self._costs.collective(self._staying)
            self._owed += self._costs.around(self._staying, layer).after - shared
            if shared:
                begun = self._add("device", self._owed, f"linear {layer}'", self._wait)
                self._wait, self._owed = (self._add("net", shared, f"all-reduce {layer}", (begun,)),), 0.0
        self._staying, self._done = 0, done

    def _layer(self, part: _Work, layer: int) -> None:
        costs = self._costs
        self._settle(layer)
        linear = self._owed + costs.around(part.num_tokens, layer).before
        self._owed = 0.0
        attention = costs.attention(part.on_device) if part.on_device else 0.0
        ready = max([self._blocks.ready(layer), *self._joined(part, layer)])
        after = (*self._wait, *self._blocks.after(layer))
        leaving = part.leaving if layer == part.stop - 1 else []
        if part.on_host:
            begun = self._add("device", linear, f"linear {layer}", after, ready)
            self._wait = (self._add("device", attention, f"attention {layer}", (begun,)),) if attention else (begun,)
            self._wait += self._away(part, layer, begun, leaving)
        else:
            self._wait = (self._add("device", linear + attention, f"layer {layer}", after, ready),)
        self._staying = part.num_tokens - _tokens(leaving)

    def _joined(self, part: _Work, layer: int) -> list[float]:
        """When the attention is back of rows that go on at this layer."""
        return [self._pending.joins.get(item.request, 0.0) for item in (part.arriving if layer == part.start else ())]

    def _away(self, part: _Work, layer: int, begun: int, leaving: Sequence[WorkItem]) -> tuple[int, ...]:
        """Attention on the host: there, done, and back; the ops that the next layer waits for."""
        staying = [item for item in part.on_host if all(item is not other for other in leaving)]
        back = []
        for rows in (staying, leaving):
            if rows:
                back.append(self._trip(rows, layer, begun))
        if leaving:
            self.joins |= {item.request: back[-1] for item in leaving}
        return tuple(back[:1]) if staying else ()

    def _trip(self, rows: Sequence[WorkItem], layer: int, begun: int) -> int:
        costs, tokens = self._costs, _tokens(rows)
        request = rows[0].request if len(rows) == 1 else None
        there, back = costs.sent_bytes(tokens), costs.returned_bytes(tokens)
        sent = self._add("d2h", costs.transfer_seconds(there, "d2h"), f"q k v {layer}", (begun,), 0.0, request, there)
        done = self._add("cpu", costs.host_attention(rows), f"attention {layer}", (sent,), 0.0, request)
        return self._add("h2d", costs.transfer_seconds(back, "h2d"), f"out {layer}", (done,), 0.0, request, back)

    def _add(self, resource: str, seconds: float, name: str, after: tuple[int, ...], ready: float = 0.0,
             request: str | None = None, num_bytes: float = 0.0) -> int:  # fmt: skip
        self._ops.append(Op(resource, seconds, name, after, request, num_bytes, ready))
        return len(self._ops) - 1
