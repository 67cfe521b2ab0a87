"""The simulated executor for a mixture whose experts do not all fit: every step layer by layer, on the timelines.

Which experts a token takes comes from a recorded trace: request number r reads the tokens of its sequence r (again and
again if need be), whatever its own tokens are. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from llmlab.clock import Clock
from llmlab.execution.base import Row, StepBatch, Ticket
from llmlab.execution.cost import rows_of
from llmlab.execution.expert_timeline import Dispatch, ExpertStage, Host, LayerWork, RooflineExperts
from llmlab.execution.sim_executor import LayeredCost, SimExecutor, SimTicket, TokenSource
from llmlab.execution.timelines import busy
from llmlab.scheduling.expert_calls import told
from llmlab.scheduling.seamcalls import Seam
from llmlab.seams import WeightPlacement
from llmlab.types import ConfigError, Durations, ResourceSpan, WeightMove, WorkItem
from llmlab.workloads.routing import RoutingTrace
from roofline.cost import CostModel
from roofline.hardware import Hardware

HOST_READS, HOST_COMPUTES = 0.8, 0.7  # what a CPU reaches of its data sheet: bandwidth, float32 rate


def host_of(cpu: Hardware) -> Host:
    """The CPU of the hardware table that computes experts."""
    return Host(cpu.name, HOST_READS * cpu.bandwidth, HOST_COMPUTES * cpu.peak_of("fp32"))


def routing_for(trace: RoutingTrace, model: CostModel) -> RoutingTrace:
    """The trace at the depth of a model. Raises ConfigError if it has another number of experts a layer, or takes others."""
    shape = model.shape
    wanted, here = (shape.num_experts, shape.top_k), (trace.num_experts, int(trace.experts.shape[2]))
    if not shape.num_experts:
        raise ConfigError("weights", shape.name, "this model has no experts to place", "Leave weights at 'resident'.")
    if wanted != here:
        raise ConfigError("model", shape.name, f"takes {wanted[1]} of {wanted[0]} experts, the routing recorded from {trace.model} "
                          f"{here[1]} of {here[0]}", "Record one: python -m llmlab.training.routing MODEL FILE.")  # fmt: skip
    return trace.deeper(shape.moe_layers())


class ExpertSimExecutor(SimExecutor):
    """See the module's text. `seam`: the guarded placement; `num_slots`: experts that fit on the device."""

    def __init__(self, cost: LayeredCost, tokens: TokenSource, clock: Clock, description: dict[str, Any], block_size: int,
                 *, price: RooflineExperts, trace: RoutingTrace, seam: Seam[WeightPlacement], num_slots: int) -> None:  # fmt: skip
        super().__init__(cost, tokens, clock, description, block_size)
        self._price, self._trace = price, trace
        self._stage = ExpertStage(seam, price, trace.num_layers, num_slots, self._timelines, trace.popularity())
        self._dispatches: list[Dispatch] = []
        self._happened = self._stage.take()

    def submit(self, batch: StepBatch) -> Ticket:
        self._dispatches = []
        ticket = super().submit(batch)
        assert isinstance(ticket, SimTicket)
        done = self._happened
        moves = tuple(WeightMove(f.unit.layer, f.unit.expert, f.reason, int(self._price.num_bytes), span.end - span.start,
                                 f.evicted, f.unused) for f, span in zip(done.fetches, done.copies, strict=True))  # fmt: skip
        dispatches = tuple(told(one.work.layer, one.chosen) for one in self._dispatches)
        return ticket._replace(value=msgspec.structs.replace(ticket.value, experts=dispatches, weight_moves=moves))

    def adopt(self, seam: Seam[WeightPlacement]) -> None:
        """Go on under another policy, as a fork does."""
        self._stage.adopt(seam)

    def start(self) -> float | None:
        """No leaps: what a step takes depends on which experts it finds."""
        return None

    def _place_step(self, batch: StepBatch, now: float, start: float) -> tuple[tuple[ResourceSpan, ...], Durations]:
        swapped = sum(len(move.src) for move in batch.plan.moves if move.kind != "copy")
        at = start + (self._cost.swap(swapped).seconds if swapped else 0.0)
        if batch.plan.items:
            at = self._through_layers([row.item for row in batch.rows], self._taken(batch.rows), at)
        self._busy_until = self._timelines.free["device"] = at
        self._happened = self._stage.take()
        spans = self._happened.all_spans
        return spans, Durations(at - start, parts=busy(spans))

    def _through_layers(self, items: Sequence[WorkItem], rows: Sequence[int], at: float) -> float:
        parts = self._price.parts(rows_of(items))
        for layer in range(self._trace.num_layers):
            span = self._timelines.place("device", at, parts.layer, f"attention {layer}")
            self._stage.spans.append(span)
            work = LayerWork(layer, self._trace.uses(rows, layer), self._trace.guesses(rows, layer))
            self._dispatches.append(self._stage.run(work, span.end))
            at = self._dispatches[-1].end
        edges = self._timelines.place("device", max(at, self._stage.deferred), parts.edges, "vocabulary")
        self._stage.spans.append(edges)
        return edges.end

    def _taken(self, rows: Sequence[Row]) -> list[int]:
        """Rows of the trace for the tokens of a step."""
        starts, found = self._trace.starts, []
        for row in rows:
            sequence = row.request.number % self._trace.num_sequences
            begin, length = int(starts[sequence]), int(starts[sequence + 1] - starts[sequence])
            found += [begin + position % length for position in range(*row.item.tokens)]
        return found

