"""A step with rows on both tiers, on timelines: the program of `stages`, stage after stage, as the real executor runs it.

    device   |pre|attend|       |post pre|attend|  ...       waits only in `join`, and that wait is a JoinWait
    d2h          |q k v|
    cpu                |attention|
    h2d                           |out|

Every resource does its work in the order in which it is given it, so a step needs no search: each op starts when its
resource is free and what it needs is there. What an attention that was left running takes up is known by request in
`Pending.joins`. Blocks that move between the tiers come before the step; prompts of host rows send each layer's KV out
behind its attention; what the host has of them comes in, layer by layer, at the beginning of the step.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.execution.opgraph import Pending
from llmlab.execution.stages import stages
from llmlab.execution.timelines import Timelines
from llmlab.seams import LayerCost
from llmlab.types import Move, ResourceSpan, Span, WorkItem


class _Lane:
    """One sub-batch: how many tokens pass which layer, and when its rows are back from the CPU."""

    def __init__(self, items: Sequence[WorkItem], costs: LayerCost) -> None:
        num_layers = costs.num_layers
        near = [item for item in items if item.device == "device"]
        away = [(item, item.layers or Span(0, num_layers)) for item in items if item.device == "cpu"]
        self.staged = [item for item in near if item.home == "cpu"]
        self.near = sum(item.num_tokens for item in near)
        self.attention = costs.attention(near) if near else 0.0
        self.leaving = sum(1 for item in items if item.emit == "sample")
        self.arriving: dict[int, list[WorkItem]] = {}  # by the layer behind whose attention they go on
        self.sent: list[list[WorkItem]] = [[] for _ in range(num_layers)]
        self.kept = [self.near] * num_layers  # tokens that pass what follows layer l's attention
        self.passing = [self.near] * num_layers  # tokens that pass what comes before it
        for item, (start, stop) in away:
            if start:
                self.arriving.setdefault(start - 1, []).append(item)
                self.kept[start - 1] += item.num_tokens
            for layer in range(start, stop):
                self.sent[layer].append(item)
                self.passing[layer] += item.num_tokens
                self.kept[layer] += item.num_tokens * (not (item.halfway and layer == stop - 1))
        self.back = self.saved = 0.0
        self.loaded: list[float] = []  # by layer: when what the host has of a prompt is in
        self._attended: tuple[Sequence[WorkItem], float] = (), 0.0

    def host_attention(self, layer: int, costs: LayerCost) -> float:
        """Seconds; the same rows take the same time at every layer."""
        rows = self.sent[layer]
        if rows != self._attended[0]:
            self._attended = rows, costs.host_attention(rows)
        return self._attended[1]


class Overlap:
    """Places steps on `timelines`; `kv_bytes` of one token in one layer. `spans` of the step placed last, and `waited`:
    seconds in which the device waited for the CPU; `busy`: seconds of work on each resource. Without `detailed`, no spans
    are kept."""

    def __init__(self, costs: LayerCost, kv_bytes: float, timelines: Timelines, pending: Pending, detailed: bool = True) -> None:
        self._costs, self._kv_bytes, self._timelines, self._pending = costs, kv_bytes, timelines, pending
        self._detailed = detailed
        self._trips: dict[int, tuple[float, float]] = {}
        self.busy: dict[str, float] = {}
        self.spans: list[ResourceSpan] = []
        self.waited = 0.0
        self._start = 0.0

    def place(self, items: Sequence[WorkItem], moves: Sequence[Move], start: float) -> float:
        """Put a step on the timelines, not before `start`; when it ends on the device."""
        costs = self._costs
        lanes: dict[int, list[WorkItem]] = {}
        self.spans, self.waited, self.busy = [], 0.0, {}
        self._start = max([start, *(self._moved(move, start) for move in moves)])
        for item in items:
            lanes.setdefault(item.lane, []).append(item)
        built = {name: _Lane(found, costs) for name, found in lanes.items()}
        for lane in built.values():
            self._load(lane)
        pause = costs.pause(items)
        if pause:
            self._on("device", self._start, pause, "pause")
        acts = {"pre": self._pre, "begin": self._begin, "attend": self._attend, "join": self._join, "post": self._post}
        for act, name, layer in stages(tuple(sorted(built)), costs.num_layers):
            acts[act](built[name], layer)
        end = max([self._start, self._timelines.free.get("device", 0.0), *(lane.saved for lane in built.values())])
        for item in items:
            if not item.halfway:
                self._pending.joins.pop(item.request, None)
        return end

    def _on(self, resource: str, ready: float, seconds: float, op: str) -> float:
        self.busy[resource] = self.busy.get(resource, 0.0) + seconds
        if self._detailed:
            span = self._timelines.place(resource, max(ready, self._start), seconds, op)
            self.spans.append(span)
            return span.end
        free = self._timelines.free
        end = free[resource] = max(ready, self._start, free.get(resource, 0.0)) + seconds
        return end

    def _moved(self, move: Move, start: float) -> float:
        span = self._timelines.place(self._costs.link_of(move), start, self._costs.move_seconds(move), move.kind, move.request)
        self.spans += [span] if self._detailed else []
        self.busy[span.resource] = self.busy.get(span.resource, 0.0) + span.end - span.start
        return span.end

    def _trip(self, tokens: int) -> tuple[float, float]:
        """Seconds of q, k and v there, and of the output back."""
        found = self._trips.get(tokens)
        if found is None:
            costs = self._costs
            found = self._trips[tokens] = (costs.transfer_seconds(costs.sent_bytes(tokens), "d2h"),
                                           costs.transfer_seconds(costs.returned_bytes(tokens), "h2d"))  # fmt: skip
        return found

    # ------------------------------------------------------------------------------------- stages
    def _pre(self, lane: _Lane, layer: int) -> None:
        tokens = lane.passing[layer]
        if tokens:
            seconds = self._costs.around(tokens, layer).before + (self._costs.enter(tokens) if layer == 0 else 0.0)
            self._on("device", 0.0, seconds, f"linear {layer}")

    def _begin(self, lane: _Lane, layer: int) -> None:
        rows = lane.sent[layer]
        if not rows:
            return
        there, back = self._trip(lane.passing[layer] - lane.near)
        ready = self._timelines.free.get("device", 0.0)
        sent = self._on("d2h", ready, there, f"q k v {layer}")
        done = self._on("cpu", sent, lane.host_attention(layer, self._costs), f"attention {layer}")
        back = self._on("h2d", done, back, f"out {layer}")
        staying = False
        for item in rows:
            if item.halfway and item.layers is not None and item.layers[1] == layer + 1:
                self._pending.joins[item.request] = back
            else:
                staying = True
        lane.back = back if staying else 0.0

    def _attend(self, lane: _Lane, layer: int) -> None:
        if lane.attention:
            loaded = lane.loaded[layer] if lane.loaded else 0.0
            end = self._on("device", loaded, lane.attention, f"attention {layer}")
            if lane.staged:
                moved = self._kv_bytes * sum(item.num_tokens for item in lane.staged)
                lane.saved = self._on("d2h", end, self._costs.transfer_seconds(moved, "d2h"), f"KV out {layer}")

    def _load(self, lane: _Lane) -> None:
        """What the host has of a prompt's KV comes in, layer by layer, at the beginning of the step."""
        known = self._kv_bytes * sum(item.tokens[0] for item in lane.staged)
        if known:
            seconds = self._costs.transfer_seconds(known, "h2d")
            lane.loaded = [self._on("h2d", self._start, seconds, f"KV in {layer}") for layer in range(self._costs.num_layers)]

    def _join(self, lane: _Lane, layer: int) -> None:
        joins = self._pending.joins
        ready = max([lane.back, *(joins.pop(item.request, 0.0) for item in lane.arriving.get(layer, ()))])
        now = self._timelines.free.get("device", 0.0)
        if ready > now:
            self.waited += ready - max(now, self._start)
            if self._detailed:  # what it waited for, for the log
                self.spans.append(ResourceSpan("h2d", ready, ready, f"out {layer}"))
            self._timelines.free["device"] = ready

    def _post(self, lane: _Lane, layer: int) -> None:
        last = layer == self._costs.num_layers - 1
        tokens = lane.kept[layer]
        seconds = (self._costs.around(tokens, layer).after if tokens else 0.0) + (self._costs.leave(lane.leaving) if last else 0.0)
        if seconds:
            self._on("device", 0.0, seconds, f"linear {layer}'")
