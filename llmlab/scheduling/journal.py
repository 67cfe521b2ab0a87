"""What the scheduler writes down: for every decision its candidates, scores and alternatives, for every wait its reason.

The scheduler decides and mutates; the journal only reads and logs. Each method answers the `seq` of its event, which is
the cause of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from typing import Any

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.state import request_fingerprint
from llmlab.events.why import count
from llmlab.memory.kv_manager import KVManager, Shortage
from llmlab.scheduling.seamcalls import Considered, Seam
from llmlab.seams import CostModel, DraftLengths, Limits, Need, Offers, Placed, RequestView, TierOption
from llmlab.types import Cost, Request, Sequence, Span, Status, StepPlan, StepResult, WorkItem, total_tokens

FINISHED = Status.FINISHED  # looking a member up in its Enum costs as much as a call


class Journal:
    """See the module's text. `num_alternatives` is how many rejected options a Decision keeps."""

    def __init__(self, log: EventLog, memory: KVManager, cost: CostModel, limits: Limits, num_alternatives: int) -> None:
        self.log = log
        self.considered = Considered(cost.step)
        self._memory = memory
        self._cost = cost
        self.limits = limits
        self._keep = num_alternatives
        self._drafting = ""

    # ------------------------------------------------------------------------------- the queue
    def wait(self, seq: Sequence, reason: str, detail: str) -> None:
        """Once for each reason, not once for each step."""
        if seq.waiting_reason != reason:
            seq.waiting_reason = reason
            seq.cause = self.log.emit(ev.RequestWaiting, seq.id, seq.cause, reason=reason, detail=detail)

    def admission(self, seam: Seam[Any], seq: Sequence, chosen: str, reason: str, need: Need, num_free: int) -> None:
        said, considered = f"{chosen}: {reason}", self.considered.take()
        if seq.logged_wait == said or not self.log.wants(ev.Decision):
            return
        seq.logged_wait = said
        other = "admit" if chosen == "wait" else "wait"
        why_not = reason if chosen == "wait" else "it would idle in the queue"
        seq.cause = self.log.emit(
            ev.Decision, seq.id, seq.cause, seam=seam.name, policy=seam.policy_name, chosen=chosen, reason=reason,
            alternatives=(ev.Alternative(other, need.prompt, need.prompt <= num_free, why_not), *considered), num_candidates=2,
        )  # fmt: skip

    def ordering(self, seam: Seam[Any], seq: Sequence, head: AbstractSequence[Sequence], num_waiting: int) -> int:
        """The Decision that put `seq` before the rest of the queue, of which `head` is the beginning."""
        rest = [s for s in head if s is not seq]
        if not rest:
            return seq.cause
        return self.log.emit(
            ev.Decision, seq.id, seq.cause, seam=seam.name, policy=seam.policy_name, chosen=seq.id,
            alternatives=tuple(ev.Alternative(s.id, _shown(s.key)) for s in rest[: self._keep]),
            reason=f"smallest key {_said(seq.key)}", num_candidates=num_waiting,
        )  # fmt: skip

    # ----------------------------------------------------------------------------- composition
    def composition(self, seam: Seam[Any], offers: Offers, items: AbstractSequence[WorkItem]) -> None:
        """A Decision, if there was anything to decide: an offer left out or cut, or an alternative priced."""
        considered = self.considered.take()
        if not self.log.wants(ev.Decision):
            return
        num_offers = len(offers.running) + len(offers.waiting)
        if not considered and len(items) == num_offers and items is offers.running:
            return
        tokens = {item.request: item.num_tokens for item in items}
        left = [o for o in (*offers.running, *offers.waiting) if tokens.get(o.request, 0) < o.num_tokens]
        if not considered and not left:
            return
        alternatives = [
            ev.Alternative(f"{o.request}: {o.num_tokens} tokens", why_not=f"got {tokens.get(o.request, 0)}")
            for o in left[: self._keep]
        ]
        self.log.emit(
            ev.Decision, seam=seam.name, policy=seam.policy_name, num_candidates=num_offers,
            chosen=" ".join(f"{name}:{count}" for name, count in tokens.items()), alternatives=(*considered, *alternatives),
            reason=f"{sum(tokens.values())} of {self.limits.max_num_batched_tokens} tokens{_wished(offers)}",
        )  # fmt: skip

    # ------------------------------------------------------------------------------- placement
    def placement(self, seam: Seam[Any], placed: Placed) -> None:
        """A Decision, if there was anything to weigh; the score of a mode is its seconds per token."""
        chosen = next((m for m in placed.considered if m.name == placed.mode), None)
        others = tuple(
            ev.Alternative(m.name, 1 / m.rate if m.rate else None, not m.why_not, m.why_not or f"{m.rate:.1f} tokens/s",
                           Cost(m.seconds))
            for m in placed.considered if m is not chosen
        )  # fmt: skip
        if chosen is None and not others:
            return
        rate = f"{chosen.rate:.1f} tokens/s" if chosen is not None else ""
        self.log.emit(
            ev.Decision, seam=seam.name, policy=seam.policy_name, chosen=placed.mode, alternatives=others,
            reason="; ".join(filter(None, (rate, placed.reason))), num_candidates=len(placed.considered),
            predicted=Cost(chosen.seconds) if chosen is not None else None,
        )  # fmt: skip

    # --------------------------------------------------------------------------------- drafting
    def drafting(self, seam: Seam[Any], items: AbstractSequence[WorkItem], answer: DraftLengths) -> None:
        """A Decision, if the lengths are others than the last time."""
        lengths, considered = answer.lengths, self.considered.take()
        same = len(set(lengths)) == 1
        chosen = f"k={lengths[0]}" if same else " ".join(f"{i.request}:{k}" for i, k in zip(items, lengths))
        if chosen == self._drafting:
            return
        self._drafting = chosen
        if not self.log.wants(ev.Decision):
            return
        options = [o for o in answer.options if not same or o[0] != lengths[0]]
        best = sorted(options, key=lambda o: (o[1], o[0]))[: self._keep]
        said = next((f"; {s * 1e6:.3g} us a token expected" for k, s in answer.options if same and k == lengths[0]), "")
        self.log.emit(
            ev.Decision, seam=seam.name, policy=seam.policy_name, chosen=chosen, reason=answer.reason + said,
            num_candidates=max(1, len(answer.options)),
            alternatives=(*(ev.Alternative(f"k={k}", s, why_not="more seconds a token" if same else "") for k, s in best),
                          *considered),
        )  # fmt: skip

    def drafted(self, seq: Sequence, token_ids: tuple[int, ...], parents: tuple[int, ...], source: str, cause: int) -> None:
        if self.log.wants(ev.Drafted):
            self.log.emit(ev.Drafted, seq.id, cause, token_ids=token_ids, parents=parents, source=source)

    def verified(self, item: WorkItem, path: AbstractSequence[int], accepted: AbstractSequence[int], source: str, cause: int
                 ) -> None:  # fmt: skip
        """`path`: which drafts of `item` are among the `accepted` tokens."""
        if self.log.wants(ev.Verified):
            lost = [token for index, token in enumerate(item.drafts) if index not in path]
            bonus = accepted[len(path)] if len(accepted) > len(path) else None
            self.log.emit(ev.Verified, item.request, cause, accepted=tuple(accepted[: len(path)]), rejected=tuple(lost),
                          bonus=bonus, source=source)  # fmt: skip

    # -------------------------------------------------------------------------------- shortage
    def shortage(self, needy: Sequence, shortage: Shortage, running: AbstractSequence[Sequence]) -> int:
        holders = sorted(((s.id, self._memory.num_blocks_of(s.id)) for s in running), key=lambda h: -h[1])
        return self.log.emit(ev.ReserveFailed, needy.id, needy.cause, need=shortage.need, free=shortage.free,
                             quarantined=self._memory.num_quarantined, holders=tuple(holders[: self._keep]))  # fmt: skip

    def victim(self, seam: Seam[Any], needy: str, ranked: AbstractSequence[tuple[RequestView, tuple[Any, ...]]], cause: int
               ) -> int:  # fmt: skip
        """`ranked` holds every candidate with its score, the chosen one first."""
        options = [self._victim_option(view, score) for view, score in ranked[: 1 + self._keep]]
        chosen, score = ranked[0]
        return self.log.emit(
            ev.Decision, chosen.id, cause, seam=seam.name, policy=seam.policy_name, chosen=chosen.id,
            alternatives=(*options[1:], *self.considered.take()), predicted=options[0].predicted, num_candidates=len(ranked),
            reason=f"{needy} needs a block; smallest score {_said(score)}",
        )  # fmt: skip

    def _victim_option(self, view: RequestView, score: tuple[object, ...]) -> ev.Alternative:
        return ev.Alternative(view.id, _shown(score), predicted=self.cost_of_recompute(view.id, view.num_computed_tokens))

    def cost_of_recompute(self, request: str, num_computed_tokens: int) -> Cost:
        """What it takes to compute a victim's KV again."""
        return self._cost.step([WorkItem(request, Span(0, max(1, num_computed_tokens)))])

    def tier(self, seam: Seam[Any], victim: Sequence, mode: str, options: AbstractSequence[TierOption], cause: int) -> None:
        self.log.emit(
            ev.Decision, victim.id, cause, seam=seam.name, policy=seam.policy_name, chosen=mode, num_candidates=2,
            predicted=next(o.predicted for o in options if o.mode == mode),
            reason=count(self._memory.num_blocks_of(victim.id), "block"),
            alternatives=(*(ev.Alternative(o.mode, o.predicted.seconds, o.feasible, o.why_not, o.predicted)
                            for o in options if o.mode != mode), *self.considered.take()),
        )  # fmt: skip

    def preempted(self, victim: Sequence, mode: str, beneficiary: str | None, cause: int) -> None:
        tokens = 0 if mode == "swap" else victim.num_computed_tokens
        victim.cause = self.log.emit(ev.RequestPreempted, victim.id, cause, mode=mode, tokens_lost=tokens,
                                     beneficiary=beneficiary, num_blocks=self._memory.num_blocks_of(victim.id))  # fmt: skip

    def moved(self, seq: Sequence, num_blocks: int, src: str, dst: str) -> None:
        self.log.emit(ev.KVMoved, seq.id, seq.cause, bytes=num_blocks * self._cost.block_bytes(), src=src, dst=dst,
                      num_blocks=num_blocks)  # fmt: skip

    # ------------------------------------------------------------------------------------ steps
    def planned(self, plan: StepPlan, now: float, num_running: int, num_waiting: int, cost: CostModel | None = None) -> int:
        """The `seq` of StepPlanned, or -1 if the log does not want it. `cost`: what prices plans, if not the usual model."""
        if not self.log.wants(ev.StepPlanned):
            return -1
        return self.log.emit(
            ev.StepPlanned, now=now, items=plan.items, moves=plan.moves, num_tokens=total_tokens(plan.items),
            num_running=num_running, num_waiting=num_waiting, free_blocks=self._memory.pool.num_free,
            predicted=self._price(plan, cost or self._cost),
        )  # fmt: skip

    def _price(self, plan: StepPlan, cost: CostModel) -> Cost | None:
        if not plan.items and not plan.moves:
            return None
        return cost.plan(plan.items, plan.moves, self._writes(plan) if plan.moves else {})

    def _writes(self, plan: StepPlan) -> dict[str, AbstractSequence[int]]:
        """The device blocks that each item writes."""
        tables, size = self._memory.tables, self._memory.block_size
        return {item.request: tables[item.request].block_ids[item.tokens[0] // size :] for item in plan.items if item.home == "device"}

    def experts(self, result: StepResult, plan: int) -> None:
        """Where a mixture's experts were in a step, and how they came and went."""
        if not (result.experts or result.weight_moves) or not self.log.wants(ev.ExpertsDispatched):
            return
        for move in result.weight_moves:
            if move.evicted is not None:
                self.log.emit(ev.ExpertEvicted, cause=plan, layer=move.evicted[0], expert=move.evicted[1], unused=move.unused)
            self.log.emit(ev.ExpertFetched, cause=plan, layer=move.layer, expert=move.expert, bytes=move.num_bytes,
                          reason=move.reason, seconds=move.seconds)  # fmt: skip
        for at in result.experts:
            self.log.emit(ev.ExpertsDispatched, cause=plan, layer=at.layer, device=at.device, fetched=at.fetched, cpu=at.cpu,
                          deferred=at.deferred)  # fmt: skip

    def finished(self, result: StepResult, plan: int, num_tokens: int, state_hash: int, num_running: int, num_waiting: int
                 ) -> None:  # fmt: skip
        if not self.log.wants(ev.StepFinished):
            return
        self.log.emit(
            ev.StepFinished, cause=plan, plan=plan, results=result.results, measured=result.durations,
            state_hash=state_hash, blocks_hash=self._memory.blocks_hash, num_tokens=num_tokens, num_running=num_running,
            num_waiting=num_waiting, used_blocks=self._memory.num_used, lost=result.lost, lost_why=result.why,
        )  # fmt: skip


class StateHash:
    """The state hash, kept up to date request by request: a request that changed is `touch`ed, and counted anew by the
    next `settle`."""

    def __init__(self) -> None:
        self.value = 0
        self._fingerprints: dict[int, int] = {}
        self.touched: dict[int, Sequence] = {}

    def touch(self, seq: Sequence) -> None:
        request: Request = seq.request
        self.touched[request.number] = seq

    def forget(self) -> int:
        """Nobody will ask for the hash of this step: 0."""
        self.touched.clear()
        return 0

    def settle(self) -> int:
        known, value = self._fingerprints, self.value
        for number, seq in self.touched.items():
            finished, tokens = seq.status is FINISHED, seq.token_ids
            computed = 0 if finished else seq.num_computed_tokens
            new = request_fingerprint(number, seq.status, len(tokens), computed, tokens[-1], seq.home, seq.cursor)
            value ^= known.get(number, 0) ^ new
            known[number] = new
            if finished:
                del known[number]
        self.touched.clear()
        self.value = value
        return value


def _wished(offers: Offers) -> str:
    wish = offers.wish
    return "" if wish is None else f"; for prompts the placement wishes {wish.prompt_tokens}: {wish.reason}"


def _shown(key: tuple[object, ...]) -> float | str:
    """A key as a Decision shows it: the number itself, or its parts as text."""
    if len(key) == 1 and isinstance(key[0], (int, float)):
        return float(key[0])
    return ", ".join(f"{part:g}" if isinstance(part, (int, float)) else str(part) for part in key)


def _said(key: tuple[object, ...]) -> str:
    """A key in a sentence."""
    shown = _shown(key)
    return f"{shown:.6g}" if isinstance(shown, float) else shown
