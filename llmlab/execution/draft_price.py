"""What drafting costs: each kind of source has its price, and a round of drafts and verification has one made of them.

These are the prices to begin with. What a machine really takes beyond them is learned from the log (`decoding.draft_book`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from msgspec.structs import replace as replace_struct

from llmlab.decoding.draft_sizes import DraftSizes, HeadSizes, LayerSizes, LookupSizes
from llmlab.decoding.draft_trees import fed_by_level, plan_of
from llmlab.execution.cost import CPU_STEP_SECONDS, RooflineCost
from llmlab.seams import CostModel
from llmlab.types import Cost, Move, Span, Traffic, WorkItem
from roofline.cost import CostModel as RooflineModel
from roofline.precision import Precision
from roofline.profile import ProfileCost

# One pass of a draft model on a CPU whatever it holds, where it is called pass by pass: lab-m with lab-xs, rounds of 3 and of 6
# drafts, one thread of `cpu-2core`. And what chains that are one compiled call take beside their arithmetic: a round, and each
# request in it (lab-s and lab-m with lab-xs, 1 to 16 requests, rounds of 2 to 6).
CPU_DRAFT_SECONDS = 1.2e-4
CPU_CHAIN_SECONDS, CPU_CHAINED_SECONDS = 1e-4, 1e-5
# The same for draft heads (lab-s and lab-m, 1 to 16 requests, rounds of 2 and 4), which have no layers to call one by one, and
# for each request in a pass, whose next token is chosen in Python.
CPU_HEADS_SECONDS, CPU_CHOICE_SECONDS = 6e-5, 1e-5
HEADS_KERNELS = 6  # of a pass on a GPU: norm and product, table, gate, product, norm and output layer, choice
# And what the engine does between two steps: planning, committing, answers. A step, each request in it, and each of those whose
# drafts are judged. Of lab-s and lab-m with 1, 4 and 16 requests, the same machine.
CPU_ENGINE_SECONDS, CPU_REQUEST_SECONDS, CPU_JUDGED_SECONDS = 6e-5, 1.5e-5, 2e-5


class DraftPrice(Protocol):
    """What a source's own work costs. Pure."""

    def rounds(self, items: Sequence[WorkItem], k: int | None = None) -> list[Cost]:
        """Its passes one after the other, in which it proposes `k` drafts behind each item (None: as many as the items ask
        for)."""
        ...


class ModelPrice:
    """A model of its own: the passes of an engine, but for the time that a step takes on a CPU, where all passes of chains are one
    call. `branches`: the form of its trees, none for chains. In the first pass it also reads what the items compute of their
    prompts."""

    def __init__(self, cost: RooflineCost, branches: tuple[int, ...] = ()) -> None:
        self._cost, self._branches = cost, branches
        self._on_cpu = cost.hardware.kind == "cpu" and not isinstance(cost.model, ProfileCost)

    def rounds(self, items: Sequence[WorkItem], k: int | None = None) -> list[Cost]:
        counts = [fed_by_level(plan_of(self._branches, item.propose if k is None else k)) for item in items]
        passes = [[self._row(item, fed, level) for item, fed in zip(items, counts) if len(fed) > level]
                  for level in range(max(map(len, counts), default=0))]  # fmt: skip
        return [self._pass(rows, self._beside(level, len(rows))) for level, rows in enumerate(passes)]

    def step(self, items: Sequence[WorkItem]) -> Cost:
        """One pass by itself."""
        return self._pass(items, self._beside(0, len(items)))

    def _pass(self, items: Sequence[WorkItem], beside: float) -> Cost:
        cost = self._cost.step(items)
        alone = cost.seconds - (CPU_STEP_SECONDS if self._on_cpu else 0.0)
        return Cost(max(0.0, alone) + beside, cost.flops, cost.bytes, cost.joules, cost.bound)

    def _beside(self, level: int, count: int) -> float:
        """Seconds of a pass beside its arithmetic."""
        if not self._on_cpu:
            return 0.0
        if self._branches:
            return CPU_DRAFT_SECONDS
        return 0.0 if level else CPU_CHAIN_SECONDS + CPU_CHAINED_SECONDS * count

    def _row(self, item: WorkItem, fed: Sequence[int], level: int) -> WorkItem:
        at = item.tokens[1] + sum(fed[:level])
        return WorkItem(item.request, Span(self._first(item) if level == 0 else at, at + fed[level]))

    def _first(self, item: WorkItem) -> int:
        """Where it begins to read."""
        return item.tokens[0]


class LayersPrice(ModelPrice):
    """The target's own first layers, whose KV the target has written already: they read one token."""

    def _first(self, item: WorkItem) -> int:
        return item.tokens[1]


class HeadsPrice:
    """A gated layer on the target's last state, then the target's output layer, once for each draft (`draft_heads`)."""

    def __init__(self, cost: RooflineCost, sizes: HeadSizes) -> None:
        shape, model = cost.shape, cost.model if isinstance(cost.model, RooflineModel) else cost.model.roofline
        self._model, self._window = model, sizes.window
        self._params = 3 * sizes.inner * shape.hidden_size + shape.hidden_size * shape.vocab_size
        self._row_bytes = 2 * sizes.inner * Precision.parse(model.precision).act_bytes
        on_cpu = cost.hardware.kind == "cpu"
        self._pass = CPU_HEADS_SECONDS if on_cpu else HEADS_KERNELS * model.efficiency.launch
        self._choice = CPU_CHOICE_SECONDS if on_cpu else 0.0

    def rounds(self, items: Sequence[WorkItem], k: int | None = None) -> list[Cost]:
        wanted = [item.propose if k is None else k for item in items]
        return [self._round(sum([length > level for length in wanted])) for level in range(max(wanted, default=0))]

    def _round(self, count: int) -> Cost:
        model, usual = self._model, self._model.efficiency
        peak = model.hardware.peak_of(model.precision.linear_format) * usual.linear_compute
        flops = 2.0 * count * self._params
        read = self._params * model.precision.weight_bytes + count * self._window * self._row_bytes
        by_memory, by_arithmetic = read / (model.hardware.bandwidth * usual.linear_memory), flops / peak
        bound = "memory" if by_memory > by_arithmetic else "compute"
        return Cost(self._pass + count * self._choice + max(by_memory, by_arithmetic), flops, Traffic(hbm=read), 0.0, bound)


class LookupPrice:
    """A table in the host's memory, asked once for all drafts of a proposal."""

    def __init__(self, sizes: LookupSizes) -> None:
        self._sizes = sizes

    def rounds(self, items: Sequence[WorkItem], k: int | None = None) -> list[Cost]:
        asking = [item for item in items if (item.propose if k is None else k)]
        read = sum([item.tokens[1] - item.tokens[0] for item in asking])
        sizes = self._sizes
        return [Cost(sizes.call + len(asking) * sizes.request + read * sizes.token, bound="host")] if asking else []


def draft_price(cost: CostModel, sizes: DraftSizes | None, branches: tuple[int, ...], block_size: int) -> DraftPrice | None:
    """The price of a source beside a target that `cost` prices; None: nobody knows, or it costs nothing."""
    if sizes is None or not isinstance(cost, RooflineCost):
        return None
    if isinstance(sizes, LookupSizes):
        return LookupPrice(sizes)
    if isinstance(sizes, HeadSizes):
        return HeadsPrice(cost, sizes)
    if isinstance(sizes, LayerSizes):
        first = replace(cost.shape, num_layers=sizes.first)
        return LayersPrice(RooflineCost(first, cost.name, block_size, cost.dtype, cost.host), branches)
    return ModelPrice(RooflineCost(sizes, cost.name, block_size, cost.dtype, cost.host), branches)


def draft_seconds(price: DraftPrice | None, items: Sequence[WorkItem], k: int | None = None) -> float:
    """What a source takes to propose `k` tokens behind each item; by default as many as the items ask for."""
    return 0.0 if price is None else sum([cost.seconds for cost in price.rounds(items, k)])


class WithDrafts:
    """The costs of a model, behind whose steps somebody drafts: part of a plan's cost, not of a step's."""

    def __init__(self, cost: CostModel, price: DraftPrice) -> None:
        self._cost, self._price = cost, price
        self.step, self.swap, self.block_bytes, self.layers = cost.step, cost.swap, cost.block_bytes, cost.layers

    def plan(self, items: Sequence[WorkItem], moves: Sequence[Move], writes: Mapping[str, Sequence[int]]) -> Cost:
        own = self._cost.plan(items, moves, writes)
        if not any([item.propose for item in items]):  # noqa: C419  a list is faster here
            return own
        drafts = self._price.rounds(items)
        traffic = replace_struct(own.bytes, hbm=own.bytes.hbm + sum(cost.bytes.hbm for cost in drafts))
        seconds, flops, joules = (sum(part) for part in zip(*((c.seconds, c.flops, c.joules) for c in (own, *drafts))))
        return Cost(seconds, flops, traffic, joules, own.bound)


class RoundPrices:
    """Steps that verify drafts, and the drafting behind them, of requests that are equally long. See `seams.RoundPrice`."""

    def __init__(self, cost: CostModel, price: DraftPrice | None = None, plan: tuple[int, ...] = ()) -> None:
        self._cost, self._price, self.branches = cost, price, plan
        self._verifying: dict[tuple[int, int, int], float] = {}
        self._drafting: dict[tuple[int, int, int], float] = {}
        self._reading: dict[tuple[int, int, int], float] = {}

    def plan(self, k: int) -> tuple[int, ...]:
        return plan_of(self.branches, k)

    def verifying(self, count: int, drafts: int, length: int) -> float:
        key = (count, drafts, length)
        if key not in self._verifying:
            items = [WorkItem(f"r{i}", Span(length, length + 1 + drafts), drafts=(0,) * drafts) for i in range(count)]
            self._verifying[key] = self._cost.step(items).seconds + _between_steps(self._cost, items)
        return self._verifying[key]

    def drafting(self, count: int, k: int, length: int) -> float:
        key = (count, k, length)
        if key not in self._drafting:
            self._drafting[key] = self._propose(Span(length - 1, length), count, k)
        return self._drafting[key]

    def reading(self, count: int, unread: int, k: int) -> float:
        key = (count, unread, k)
        if key not in self._reading:
            self._reading[key] = self._propose(Span(0, unread), count, k)
        return self._reading[key]

    def _propose(self, span: Span, count: int, k: int) -> float:
        return draft_seconds(self._price, [WorkItem(f"r{i}", span) for i in range(count)], k)


def _between_steps(cost: CostModel, items: Sequence[WorkItem]) -> float:
    """The engine's own time for a step, which a token that came as a draft does not need."""
    if not isinstance(cost, RooflineCost) or cost.hardware.kind != "cpu":
        return 0.0
    judged = CPU_JUDGED_SECONDS * sum([bool(item.drafts) for item in items])
    if isinstance(cost.model, ProfileCost):
        return cost.engine_seconds(items) + judged
    return CPU_ENGINE_SECONDS + CPU_REQUEST_SECONDS * len(items) + judged
