"""What a step contains (seam B). All of them cut prompts that exceed the budget; they differ in what may
share a step with what.

    chunked         [decode decode decode | chunk of a prompt ]   every step, up to the budget
    prefill_first   [prompt prompt chunk]  then  [decode decode]  prompts stall decodes
    decode_first    [decode decode] ... until none is left, then  [prompt prompt]
    spread          [decode decode decode | what the weights carry for nothing ]   many small chunks
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from llmlab.registry import Registry
from llmlab.seams import Composer, EngineView, LayerCost, Limits, Offers, Wish
from llmlab.types import WorkItem


def fill(offers: Iterable[WorkItem], budget: int, seats: int) -> list[WorkItem]:
    """Offers in order, the last one cut to what is left of `budget` tokens; at most `seats` of them."""
    taken: list[WorkItem] = []
    for offer in slimmed(offers, budget):
        if budget <= 0 or len(taken) >= seats:
            break
        item = offer.shortened(budget)
        taken.append(item)
        budget -= item.num_tokens
    return taken


def slimmed(offers: Iterable[WorkItem], budget: int) -> Iterable[WorkItem]:
    """The offers, their drafts cut evenly where all of them together would push requests out of `budget`."""
    offers = list(offers)
    drafting = [o for o in offers if o.drafts]
    room = budget - sum(o.num_committed for o in offers if o.num_committed == 1)
    if sum(len(o.drafts) for o in drafting) <= room:
        return offers
    level = 0
    while sum(min(len(o.drafts), level + 1) for o in drafting) <= room:
        level += 1
    return [o.shortened(o.num_committed + min(level, len(o.drafts))) for o in offers]


def fill_after(decodes: list[WorkItem], others: Iterable[WorkItem], limits: Limits) -> list[WorkItem]:
    """`fill` of decodes and then of others, at less cost where the decodes need no cutting."""
    budget, seats = limits.max_num_batched_tokens - len(decodes), limits.max_num_seqs - len(decodes)
    if budget < 0 or seats < 0 or any([offer.drafts for offer in decodes]):  # noqa: C419  a list is faster here
        return fill([*decodes, *others], limits.max_num_batched_tokens, limits.max_num_seqs)
    return decodes + fill(others, budget, seats)


def split(offers: Sequence[WorkItem]) -> tuple[list[WorkItem], list[WorkItem]]:
    """Offers of one token and its drafts (decodes) and longer ones (prompts, or what is left of them)."""
    decodes: list[WorkItem] = []
    prompts: list[WorkItem] = []
    for offer in offers:
        start, stop = offer.tokens
        (decodes if stop - start - len(offer.drafts) == 1 else prompts).append(offer)
    return decodes, prompts


class Chunked:
    """Decodes first, and the rest of the budget goes to chunks of prompts in the same step, or what the placement wishes."""

    name = "chunked"

    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        if not offers.waiting and len(offers.running) <= view.limits.max_num_batched_tokens:
            return fill_running(view, offers)
        decodes, prompts = split(offers.running)
        items = fill_after(decodes, [*prompts, *offers.waiting], wished(view.limits, decodes, offers.wish))
        consider_unmixed(view, items)
        return items

    def cuts(self, num_decodes: int, left: Sequence[int], limits: Limits) -> list[int]:
        """See `seams.Composer`: prompts share what the decodes leave, first come, first served."""
        room, cuts = limits.max_num_batched_tokens - num_decodes, []
        for tokens in left:
            cuts.append(min(room, tokens))
            room -= cuts[-1]
        return cuts


def fill_running(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
    """The common step: everybody decodes, or some prompt is still being computed."""
    if all(o.num_tokens == 1 for o in offers.running):
        return offers.running
    decodes, prompts = split(offers.running)
    items = fill_after(decodes, prompts, wished(view.limits, decodes, offers.wish))
    consider_unmixed(view, items)
    return items


def wished(limits: Limits, decodes: Sequence[WorkItem], wish: Wish | None) -> Limits:
    """The limits of a step in which prompts get what the placement wishes for them, beside `decodes` and their drafts."""
    if wish is None:
        return limits
    budget = sum(offer.num_tokens for offer in decodes) + wish.prompt_tokens
    return replace(limits, max_num_batched_tokens=min(limits.max_num_batched_tokens, budget))


def consider_unmixed(view: EngineView, items: Sequence[WorkItem]) -> None:
    """Log what a step without the prompt chunks would have cost, if the step is mixed."""
    decodes, prompts = split(items)
    if decodes and prompts:
        view.consider("decodes alone", decodes)


class PrefillFirst:
    """Prompts go first and alone; decodes run only when no prompt can."""

    name = "prefill_first"

    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        decodes, prompts = split(offers.running)
        limits = view.limits
        seats = limits.max_num_seqs - len(decodes)
        items = fill([*prompts, *offers.waiting], limits.max_num_batched_tokens, seats)
        if not items:
            return fill(decodes, limits.max_num_batched_tokens, limits.max_num_seqs)
        if decodes:
            view.consider("decodes alone", fill(decodes, limits.max_num_batched_tokens, limits.max_num_seqs))
        return items

    def cuts(self, num_decodes: int, left: Sequence[int], limits: Limits) -> list[int] | None:
        """See `seams.Composer`: foreseeable only without prompts in progress."""
        return None if left else []


class DecodeFirst:
    """Decodes run alone while there are any; prompts wait for the batch to drain."""

    name = "decode_first"

    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        decodes, prompts = split(offers.running)
        limits = view.limits
        entering = fill([*prompts, *offers.waiting], limits.max_num_batched_tokens, limits.max_num_seqs)
        if not decodes:
            return entering
        if entering:
            view.consider("prompts alone", entering)
        return fill(decodes, limits.max_num_batched_tokens, limits.max_num_seqs)

    def cuts(self, num_decodes: int, left: Sequence[int], limits: Limits) -> list[int] | None:
        """See `seams.Composer`: foreseeable only without prompts in progress."""
        return None if left else []


class Spread:
    """Chunked, but prompts are spread over many steps: each takes no more tokens than the linears carry almost for nothing.

    A layer's weights are read once a step, however few rows there are; up to some number of tokens that reading hides
    their arithmetic. Prompts get that many tokens a step, or one in `over` of all that are there to compute, if those are more.
    """

    name = "spread"

    def __init__(self, over: int = 8, slower: float = 1.125) -> None:
        self.over, self.slower = over, slower
        self._costs: LayerCost | None = None
        self._carried = 0

    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        if not offers.waiting and all(o.num_tokens == 1 for o in offers.running):
            return fill_running(view, offers)
        decodes, running = split(offers.running)
        prompts = [*running, *offers.waiting]
        room = max(self.carried(view), -(-sum(o.num_tokens for o in prompts) // self.over))
        budget = min(view.limits.max_num_batched_tokens, len(decodes) + room)
        items = fill_after(decodes, prompts, replace(view.limits, max_num_batched_tokens=budget))
        consider_unmixed(view, items)
        return items

    def carried(self, view: EngineView) -> int:
        """Tokens, in sixteens, that make a layer's linears at most `slower` times as long as one token does."""
        costs = view.costs
        if costs is not None and costs is not self._costs:
            self._costs, self._carried, limit = costs, 16, self.slower * _linears(costs, 1)
            while self._carried < view.limits.max_num_batched_tokens and _linears(costs, self._carried + 16) <= limit:
                self._carried += 16
        return self._carried or 16


def _linears(costs: LayerCost, num_tokens: int) -> float:
    around = costs.around(num_tokens, 0)
    return around.before + around.after


COMPOSERS: Registry[Composer] = Registry(
    "composer", {"chunked": Chunked, "prefill_first": PrefillFirst, "decode_first": DecodeFirst, "spread": Spread}
)
