"""Views to ask a policy about, drawn from a seed: ordinary ones, and every extreme that an engine can bring about."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llmlab.seams import BlockView, EngineView, Limits, Need, Offers, PoolView, RequestView, TierOption
from llmlab.types import Cost, Request, SamplingParams, Span, Status, WorkItem
from roofline import shapes
from roofline.cost import CostModel
from roofline.rows import Rows

BLOCK = 16  # tokens in a block


class Case(NamedTuple):
    """One question to the policy: what the view is like, and the arguments."""

    name: str
    args: tuple[Any, ...]


class Views:
    """Draws views from a seed: the same seed, the same views, in every process. Names of requests begin with `prefix`."""

    def __init__(self, seed: int, prefix: str = "r") -> None:
        self.dice = random.Random(seed)
        self._prefix, self._count = prefix, 0
        self._price, self._sampling = Price(), SamplingParams(max_tokens=100)

    def request(self, status: Status, **fields: Any) -> RequestView:
        """A request in some state that an engine could have brought it into."""
        dice, number = self.dice, self._count
        self._count += 1
        prompt = fields.pop("prompt", dice.randint(1, 200))
        done = status is Status.SWAPPED or (status is Status.RUNNING and dice.random() < 0.7)
        output = dice.randint(1, 60) if done else 0
        computed = prompt + output - 1 if done else dice.randrange(prompt) if status is Status.RUNNING else 0
        arrival = fields.pop("arrival", round(dice.uniform(0, 90), 3))
        details = {"deadline": dice.choice([None, arrival + dice.uniform(0, 60)]), "metadata": self._metadata(output)}
        request = Request(
            f"{self._prefix}{number}", number, (1,) * prompt, self._sampling, arrival,
            fields.pop("priority", dice.randint(-1, 2)), max_total_tokens=prompt + 100, **{**details, **fields},
        )  # fmt: skip
        blocks = -(-computed // BLOCK) if status is Status.RUNNING else 0
        return RequestView(request.id, number, arrival, request.priority, status, prompt, prompt + output, computed,
                           dice.randrange(prompt) // BLOCK * BLOCK, blocks, dice.randint(0, 2), request)  # fmt: skip

    def _metadata(self, output: int) -> dict[str, Any]:
        return {"output_len": output + self.dice.randint(1, 40), "tags": ["a", {"b": self.dice.randint(0, 9)}]}

    def view(self, num_waiting: int, num_running: int, num_free: int | None = None, **fields: Any) -> EngineView:
        """A view with so many requests; `fields` go into every request."""
        dice = self.dice
        queued = [
            dice.choice([Status.WAITING, Status.WAITING, Status.PREEMPTED, Status.SWAPPED]) for _ in range(num_waiting)
        ]
        waiting = tuple(self.request(status, **fields) for status in queued)
        running = tuple(self.request(Status.RUNNING, **fields) for _ in range(num_running))
        free = dice.randint(1, 60) if num_free is None else num_free
        pool = PoolView(sum(r.num_blocks for r in running) + free, free, 0, 64, dice.randint(0, 64), BLOCK)
        limits = Limits(num_running + dice.randint(1, 4), dice.choice([16, 64, 512, 8192]), 1 << 18)
        return EngineView(
            dice.uniform(90, 100), dice.randint(0, 9999), waiting, num_waiting, running, pool, limits, self._price
        )

    def situations(self) -> Iterator[tuple[str, EngineView]]:
        """Views of every kind that a policy must be able to answer, with a name for each."""
        for number in range(12):
            yield f"ordinary view {number}", self.view(self.dice.randint(0, 8), self.dice.randint(1, 8))
        yield "a view of nobody", self.view(0, 0)
        yield "a view of one queued request", self.view(1, 0)
        yield "a view of one running request", self.view(0, 1)
        yield "a view of 300 requests", self.view(64, 236)
        yield "a view with no free block", self.view(5, 5, num_free=0)
        yield "a view without deadlines and metadata", self.view(5, 5, deadline=None, metadata={})
        yield (
            "a view of requests that are all alike",
            self.view(5, 5, arrival=1.0, priority=0, deadline=2.0, metadata={}),
        )
        huge = {"prompt": 100_000, "arrival": 1e12, "priority": 2**63 - 1, "deadline": 1e300}
        yield "a view with huge numbers", self.view(3, 3, num_free=2**53, **huge)
        yield "a view with hugely negative priorities", self.view(3, 3, priority=-(2**63) + 1)

    def cases(self, seam: str) -> Iterator[Case]:
        """All situations, as questions to `seam`."""
        for name, view in self.situations():
            yield from (Case(name, args) for args in self.questions(seam, view))

    def questions(self, seam: str, view: EngineView) -> Iterator[tuple[Any, ...]]:
        """What `seam` may be asked in this view, at most eight questions."""
        dice, running = self.dice, view.running
        queued = view.waiting[:4] or (self.request(Status.WAITING),)
        if seam == "ordering":
            yield from ((request, view.now) for request in queued)
        elif seam == "length_model":
            yield from ((request, level) for request in queued[:2] for level in (0.1, 0.5, 0.9, 0.99))
        elif seam == "admission":
            need = dice.randint(0, 20)
            yield view, queued[0], Need(need, need + dice.randint(0, 20))
        elif seam == "composer":
            yield view, self._offers(view)
        elif seam == "placement":
            yield view, self._offers(view).running
        elif seam == "eviction":
            for top in (1, 50, 2**40):
                yield (BlockView(dice.randrange(top), dice.randrange(top), dice.randrange(top), dice.randrange(top)),)
        else:
            yield from self._about_victims(seam, view, running[:6] or (self.request(Status.RUNNING),))

    def _about_victims(self, seam: str, view: EngineView, running: Sequence[RequestView]) -> Iterator[tuple[Any, ...]]:
        if seam == "victim":
            yield from ((view, candidate, running[-1]) for candidate in running)
            return
        again = Cost(self.dice.uniform(0, 1))
        for feasible in (True, False):
            swap = TierOption(
                "swap", Cost(self.dice.uniform(0, 1)), feasible, "" if feasible else "no host block is free"
            )
            yield view, running[0], (TierOption("recompute", again, True), swap)

    def _offers(self, view: EngineView) -> Offers:
        """What the decoding methods would offer, as the scheduler builds it."""
        seats = view.limits.max_num_seqs - len(view.running)
        waiting = (WorkItem(r.id, Span(r.num_cached_tokens, r.num_tokens)) for r in view.waiting[:seats])
        return Offers(
            tuple(WorkItem(r.id, Span(r.num_computed_tokens, r.num_tokens)) for r in view.running), tuple(waiting)
        )


class Price:
    """`EngineView.consider` of the views: prices work, remembers nothing. All of them are equal."""

    def __init__(self) -> None:
        self._model = CostModel(shapes.get("lab-s"), "t4")

    def __call__(self, option: str, items: Sequence[WorkItem]) -> Cost:
        cost = self._model.step(Rows([item.num_tokens for item in items], [item.tokens[1] for item in items]))
        return Cost(cost.seconds, cost.flops)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Price)

    __hash__ = None  # type: ignore[assignment]
