"""Expert offload on timelines: device, CPU and host link, each with its own clock.

    device |attention|dense |expert 3|........|expert 5|attention of the next layer
    h2d              |fetch 5---------|prefetch ...
    cpu              |expert 1----|

A layer ends when the last of its experts has, wherever that was; deferred ones end with the next layer. Nothing is
assumed to overlap: an instant is shared only by work on different resources. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmlab.clock import VirtualClock
from llmlab.events.log import EventLog
from llmlab.execution.timelines import Timelines
from llmlab.memory.weight_store import Fetch, WeightStore
from llmlab.scheduling.expert_calls import ExpertCalls
from llmlab.scheduling.seamcalls import Seam
from llmlab.scheduling.weights import LRU
from llmlab.seams import ExpertCosts, ExpertId, ExpertUse, RoutingView, WeightPlacement, Where
from llmlab.types import ResourceSpan
from llmlab.workloads.routing import RoutingTrace
from roofline.cost import CostModel
from roofline.ops import SILU_FLOPS, elementwise, linear
from roofline.rows import Rows

CPU = ("cpu", "defer")


@dataclass(frozen=True, slots=True)
class Host:
    """The CPU that may compute experts: bytes per second that it reads, float32 operations per second that it reaches, and
    seconds before it starts."""

    name: str
    bandwidth: float
    flops: float
    start: float = 20e-6


class StepParts(NamedTuple):
    """Seconds on the device apart from experts: of each layer, and of the embedding, the head and sampling."""

    layer: float
    edges: float


class RooflineExperts:
    """`seams.ExpertCosts` of one model on one device and host. `link_share`: what copies reach of the link's data sheet."""

    def __init__(self, model: CostModel, host: Host, link_share: float = 0.8) -> None:
        shape = model.shape
        self._model, self._host = model, host
        self._row_bytes = shape.hidden_size * model.precision.act_bytes
        self._params = 3 * shape.hidden_size * shape.moe_intermediate_size
        self.num_bytes = self._params * model.precision.weight_bytes
        link = model.hardware.link("host")
        self._link_rate, self._latency = link.bandwidth * link_share, link.latency

    @property
    def fetch(self) -> float:
        return self._latency + self.num_bytes / self._link_rate

    def device(self, num_tokens: int) -> float:
        shape, precision = self._model.shape, self._model.precision
        width, depth, inner = shape.moe_intermediate_size, shape.hidden_size, num_tokens * shape.moe_intermediate_size
        ops = (linear("gate_up", num_tokens, 2 * width, depth, precision),
               elementwise("act", SILU_FLOPS * inner, 2 * inner, inner, precision),
               linear("down", num_tokens, depth, width, precision))  # fmt: skip
        return sum(self._model.op_cost(op).seconds for op in ops)

    def cpu(self, num_tokens: int) -> float:
        there_and_back = 2 * (self._latency + num_tokens * self._row_bytes / self._link_rate)
        arithmetic = max(2 * self._params * num_tokens / self._host.flops, self.num_bytes / self._host.bandwidth)
        return self._host.start + arithmetic + there_and_back

    def parts(self, rows: Rows) -> StepParts:
        """A step apart from its experts. Dense layers before the mixtures, if a model has any, are counted to the edges."""
        ops = self._model.ops(rows)
        last = max(op.first_layer for op in ops)
        layer = [op for op in ops if op.first_layer == last and not op.name.startswith("expert_")]
        edges = [op for op in ops if op.first_layer != last]
        return StepParts(sum(self._model.op_cost(op).seconds for op in layer),
                         sum(op.count * self._model.op_cost(op).seconds for op in edges))  # fmt: skip

    def rest(self, num_tokens: int, kv_tokens: int) -> float:
        """Seconds of a layer apart from its experts, for one new token each of sequences that hold `kv_tokens` in all."""
        return self.parts(Rows([1] * num_tokens, [max(1, kv_tokens // max(1, num_tokens))] * num_tokens)).layer


class TimelineMover:
    """Copies on the host link, one after the other. Tickets are instants."""

    def __init__(self, timelines: Timelines, seconds: float) -> None:
        self.now = 0.0
        self.spans: list[ResourceSpan] = []
        self.fetches: list[Fetch] = []
        self._timelines, self._seconds = timelines, seconds

    def fetch(self, fetch: Fetch, after: float | None) -> float:
        if fetch.reason == "initial":
            return 0.0
        self.fetches.append(fetch)
        name = f"{fetch.reason} {fetch.unit.layer}.{fetch.unit.expert}"
        span = self._timelines.place("h2d", max(self.now, after or 0.0), self._seconds, name)
        self.spans.append(span)
        return span.end


class LayerWork(NamedTuple):
    """What the router of one layer asks for."""

    layer: int
    uses: tuple[ExpertUse, ...]
    guess: tuple[ExpertUse, ...] = ()


class Dispatch(NamedTuple):
    """What became of a layer's experts, and when it ended. `hits` were resident when asked for."""

    work: LayerWork
    chosen: Mapping[int, Where]
    hits: int
    end: float


class Happened(NamedTuple):
    """Work on device and CPU, copies, and what each copy brought, in order."""

    spans: tuple[ResourceSpan, ...]
    copies: tuple[ResourceSpan, ...]
    fetches: tuple[Fetch, ...]

    @property
    def all_spans(self) -> tuple[ResourceSpan, ...]:
        return tuple(sorted((*self.spans, *self.copies), key=lambda span: span.start))


class ExpertStage:
    """The expert part of every layer, on the timelines. `popularity` was measured on other work than what follows."""

    def __init__(self, seam: Seam[WeightPlacement], costs: ExpertCosts, num_layers: int, num_slots: int, timelines: Timelines,
                 popularity: Sequence[Sequence[float]]) -> None:  # fmt: skip
        self.spans: list[ResourceSpan] = []
        self.mover = TimelineMover(timelines, costs.fetch)
        self._costs, self._timelines = costs, timelines
        self._calls = ExpertCalls(seam, costs, num_layers, len(popularity[0]), WeightStore(num_slots, self.mover))
        self._wanted: Sequence[ExpertId] = ()
        self._wanted_since = 0.0
        self._deferred = 0.0  # when what the layer before left to the CPU is done
        self._calls.load(popularity)

    def run(self, work: LayerWork, ready: float) -> Dispatch:
        """Serve one layer whose router spoke at `ready`."""
        seen = self._calls.look(*work)
        self._prefetch(seen, ready)
        view = self._calls.look_again(seen)  # copies that began meanwhile count as resident
        chosen = self._calls.place(view)
        self.mover.now = ready
        due, self._deferred = self._deferred, 0.0
        ends = [self._on_cpu(use, chosen[use.expert], work, ready) for use in work.uses if chosen[use.expert] in CPU]
        ends += self._on_device([use for use in work.uses if chosen[use.expert] not in CPU], chosen, view, ready)
        self._wanted, self._wanted_since = self._calls.prefetch(view), ready
        hits = sum(use.expert in view.resident for use in work.uses)
        return Dispatch(work, chosen, hits, max([ready, due, *ends]))

    def adopt(self, seam: Seam[WeightPlacement]) -> None:
        """Go on under another policy, with the experts that are on the device."""
        self._calls.adopt(seam)

    @property
    def deferred(self) -> float:
        """When the work that was put off is done: the end of a step waits for it."""
        return self._deferred

    def take(self) -> Happened:
        """What happened since the last call."""
        happened = Happened(tuple(self.spans), tuple(self.mover.spans), tuple(self.mover.fetches))
        self.spans.clear()
        self.mover.spans.clear()
        self.mover.fetches.clear()
        return happened

    def _prefetch(self, view: RoutingView, until: float) -> None:
        """Copies of wanted units that began before `until`; the others are forgotten, for demand comes first."""
        self.mover.now = self._wanted_since
        for unit in self._wanted:
            if max(self._timelines.free.get("h2d", 0.0), self._wanted_since) >= until:
                break
            self._calls.bring(unit, "prefetch", view)
        self._wanted = ()

    def _on_cpu(self, use: ExpertUse, where: Where, work: LayerWork, ready: float) -> float:
        span = self._timelines.place("cpu", ready, self._costs.cpu(use.num_tokens), f"expert {work.layer}.{use.expert}")
        self.spans.append(span)
        if where == "defer":
            self._deferred = span.end
            return ready
        return span.end

    def _on_device(self, uses: Sequence[ExpertUse], chosen: Mapping[int, Where], view: RoutingView, ready: float
                   ) -> list[float]:  # fmt: skip
        """Those that are there first, in the order of their arrival; then the missing ones, the most wanted first."""
        store, units = self._calls.store, {use.expert: ExpertId(view.layer, use.expert) for use in uses}
        there = [use for use in uses if units[use.expert] in store]
        there.sort(key=lambda use: (store.slot(units[use.expert]).ticket, use.expert))
        ends = [self._compute(use, units[use.expert], ready) for use in there]
        for use in sorted(uses, key=lambda use: (-use.num_tokens, use.expert)):
            unit = units[use.expert]
            if unit not in store:
                self._calls.bring(unit, "demand", view)
                ends.append(self._compute(use, unit, ready))
            if chosen[use.expert] == "stream":
                store.drop(unit)
        return ends

    def _compute(self, use: ExpertUse, unit: ExpertId, ready: float) -> float:
        slot = self._calls.store.pin(unit)
        span = self._timelines.place("device", max(ready, slot.ticket), self._costs.device(use.num_tokens),
                                     f"expert {unit.layer}.{unit.expert}")  # fmt: skip
        self.spans.append(span)
        self._calls.store.release(unit, span.end)
        return span.end


class OffloadRun(NamedTuple):
    """A finished simulation. `seconds` of the run's clock; `uses`: experts asked for, of which `hits` were resident."""

    seconds: float
    step_seconds: tuple[float, ...]
    tokens: int
    uses: int
    hits: int
    fetches: tuple[Fetch, ...]
    dispatches: tuple[Dispatch, ...]
    spans: tuple[ResourceSpan, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses


def simulate(policy: WeightPlacement, trace: RoutingTrace, steps: Sequence[Sequence[int]], costs: RooflineExperts,
             num_slots: int, popularity: Sequence[Sequence[float]], kv_tokens: int = 512) -> OffloadRun:  # fmt: skip
    """Run `steps` (rows of the trace that are computed together) through all layers under a policy.

    `kv_tokens`: KV that a step's rows read in all. The vocabulary's part of a step is left out: it is the same for all.
    """
    timelines = Timelines()
    seam = Seam("weights", policy, LRU(), EventLog(VirtualClock()), math.inf)
    stage = ExpertStage(seam, costs, trace.num_layers, num_slots, timelines, popularity)
    dispatches, ends, now = [], [], 0.0
    for rows in steps:
        rest = costs.rest(len(rows), kv_tokens)
        for layer in range(trace.num_layers):
            span = timelines.place("device", now, rest, f"attention {layer}")
            stage.spans.append(span)
            done = stage.run(LayerWork(layer, trace.uses(rows, layer), trace.guesses(rows, layer)), span.end)
            dispatches.append(done)
            now = done.end
        now = max(now, stage.deferred)
        ends.append(now)
    happened = stage.take()
    durations = tuple(end - begin for begin, end in zip([0.0, *ends], ends, strict=False))
    return OffloadRun(now, durations, sum(map(len, steps)), sum(len(d.work.uses) for d in dispatches),
                      sum(d.hits for d in dispatches), happened.fetches, tuple(dispatches), happened.all_spans)  # fmt: skip
