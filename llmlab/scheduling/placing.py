"""Where the work of a step runs: the placement is asked, its answer is checked, whoever is to move house moves (seam C)."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

import msgspec

from llmlab.events import catalog as ev
from llmlab.memory.kv_manager import Shortage
from llmlab.scheduling.core import RUNNING, Core
from llmlab.scheduling.seamcalls import checked_places, checked_wish
from llmlab.seams import EngineView, Offers, Placed, Rehome, Wish
from llmlab.types import WorkItem


def _no_wish(view: EngineView, offers: Offers) -> Wish | None:
    """Of a placement that has none."""
    return None


class Placing(Core):
    """Placement of what the composer chose, and what the placement wishes before that."""

    def _wishing(self, view: EngineView, offers: Offers) -> Offers:
        """The offers, with the placement's wish if it has one and there are prompts."""
        seam = self.policies.placement
        if not hasattr(seam.policy, "wish") or not (offers.waiting or any(o.num_committed > 1 for o in offers.running)):
            return offers
        wish = seam.ask(lambda p: getattr(p, "wish", _no_wish)(view, offers), checked_wish)
        return offers if wish is None else msgspec.structs.replace(offers, wish=wish)

    def _place(self, view: EngineView, items: AbstractSequence[WorkItem]) -> AbstractSequence[WorkItem]:
        """The items with their places: what the placement says, as far as it is possible."""
        seam = self.policies.placement
        answer = seam.ask(lambda p: p.place(view, items), lambda a: checked_places(a, items, view))
        if answer is items and all(item.home == "device" for item in items):
            return items
        placed = answer if isinstance(answer, Placed) else Placed(tuple(answer))
        if not placed.items and items and not self.inflight:
            placed = Placed(tuple(items))  # somebody must run
        self._journal.placement(seam, placed)
        for move in placed.moves:
            self._rehome(move)
        self._tell_not_placed(items, placed.items)
        return [self._settled(item) for item in placed.items]

    def _rehome(self, move: Rehome) -> None:
        """Move a running request's KV to the other tier, unless that is full. A token that is half-way starts afresh."""
        seq = self.running[move.request]
        if move.home == seq.home or not self._viewer.cpu or seq.device_bound or self._being_verified(seq):
            return
        self._forget_drafts(seq, seq.cause)
        if move.home == "cpu":
            if not self.memory.can_swap_out(seq):
                return
            num_blocks = self.memory.swap_out(seq, seq.cause, self._inflight_step(seq))
        else:
            if isinstance(self.memory.swap_in(seq, seq.num_computed_tokens, seq.cause), Shortage):
                return
            num_blocks = self.memory.num_blocks_of(seq.id)
        seq.home, seq.cursor = move.home, 0
        self._short.pop(seq.id, None)
        src, dst = ("device", "host") if move.home == "cpu" else ("host", "device")
        seq.cause = self.log.emit(ev.RequestRehomed, seq.id, seq.cause, home=move.home, num_blocks=num_blocks)
        self._journal.moved(seq, num_blocks, src, dst)
        self.hash.touch(seq)

    def _tell_not_placed(self, items: AbstractSequence[WorkItem], placed: AbstractSequence[WorkItem]) -> None:
        if len(placed) == len(items):
            return
        chosen = dict.fromkeys(item.request for item in placed)
        for item in items:
            seq = self.sequences[item.request]
            if item.request not in chosen and seq.status is not RUNNING:
                self._journal.wait(seq, "placement", f"{self.policies.placement.policy_name} left it out of this step")
