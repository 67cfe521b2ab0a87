"""The scheduler: what runs next, for whom, and at whose expense.

    arrivals -> [ queue ] --admit--> [ running ] --finish--> gone
                   ^                     |
                   +------ preempt ------+

`schedule(now)` turns the state into a StepPlan and marks its tokens as computed; `commit(result)` appends what
came back. Between the two a step is in flight; with overlap there may be several. The scheduler mutates, policies
answer questions. It never asks which executor runs, reads no wall clock and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any

import msgspec

from llmlab.config import SEAM_FIELDS
from llmlab.events import catalog as ev
from llmlab.events.state import computed_after
from llmlab.registry import policy_name
from llmlab.scheduling.admitting import Admitting
from llmlab.scheduling.collecting import Collecting
from llmlab.scheduling.core import InFlight, Policies
from llmlab.scheduling.placing import Placing
from llmlab.scheduling.reserving import Reserving
from llmlab.scheduling.seamcalls import checked_items, checked_key, checked_lengths, checked_offer, unchecked
from llmlab.seams import EngineView, Offers, RequestView
from llmlab.types import (
    ConfigError,
    FinishReason,
    Request,
    RequestError,
    Sequence,
    Status,
    StepPlan,
    StepResult,
    WorkItem,
    total_tokens,
)  # fmt: skip


class Scheduler(Admitting, Placing, Reserving, Collecting):
    """See the module's text, and `Core` for its parameters."""

    # ------------------------------------------------------------------------ requests in and out
    def add(self, request: Request, now: float) -> None:
        """Queue a request that has arrived. Its key is that of the instant of its arrival, which a replay knows, not of
        the instant at which the loop noticed. Raises RequestError if its id is taken."""
        if request.id in self.sequences:
            raise RequestError("request_id", request.id, "is already in use", "Choose another id.")
        seq = self.sequences[request.id] = Sequence(request)
        seq.cause = self.log.emit(ev.RequestArrived, request.id, spec=request)
        self._enqueue(seq, min(now, request.arrival))

    def finish(self, request: str, reason: FinishReason, detail: str = "") -> None:
        """End a request from outside, at once; unknown or finished ones are ignored."""
        seq = self.sequences.get(request)
        if seq is None:
            return
        seq.cause = self.log.emit(ev.FinishRequested, request, seq.cause, reason=reason, detail=detail)
        self._finish(seq, reason, detail)

    # ------------------------------------------------------------------- for leaps (llmlab.scheduling.steady)
    def end(self, seq: Sequence, reason: FinishReason) -> None:
        """The last token of a running request has come."""
        self._finish(seq, reason)

    @property
    def can_admit_plainly(self) -> bool:
        """Whether letting in the head of the queue needs no copies and asks no policy that may fail."""
        trusted = self.policies.admission.trusted and self.policies.ordering.trusted
        return trusted and all(seq.status is Status.WAITING and seq.request.fork_of is None
                               for seq in self.waiting.head(self._viewer.cap))  # fmt: skip

    def offers_of_queue(self, now: float) -> tuple[WorkItem, ...]:
        """Whom the admission policy lets in now."""
        self._refresh_queue(now)
        return self._admit(self._look(now))

    def start(self, item: WorkItem) -> InFlight | None:
        """Move a queued request to the running ones, if its memory is there, with what of `item` is to be computed."""
        planned: dict[str, InFlight] = {}
        self._start(self.sequences[item.request], item, planned)
        return planned.get(item.request)

    def tell_plan(self, plan: StepPlan, now: float) -> int:
        """Log a step that is planned outside of `schedule`; the `seq` of its event."""
        return self._journal.planned(plan, now, len(self.running), len(self.waiting))

    def tell_finish(self, result: StepResult, plan: int, num_tokens: int) -> None:
        """Log the end of such a step."""
        self._journal.finished(result, plan, num_tokens, self.hash.settle(), len(self.running), len(self.waiting))

    # ---------------------------------------------------------------------------------- planning
    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can or needs to run now."""
        mark, last_step = self.log.num_emitted, self.log.step
        self.log.step = self.next_step
        self.memory.settle()
        planned = self._plan(now, let_in=True)
        while not planned and self.running and not self.inflight and not self.memory.moves:
            planned = self._plan(now, let_in=False)  # whoever was chosen found no memory: let those who run go on
        if not planned and not self.running and self.waiting and not self.inflight and not self.memory.moves:
            planned = self._plan(now, let_in=True)  # the last one that ran went back to the queue
        plan = StepPlan(self.next_step, tuple([flight.item for flight in planned]), self.memory.take_moves())
        idle = not plan.items and not plan.moves
        if not idle or self.log.num_emitted > mark:
            self._note(plan, now)
        if idle:
            if self.log.num_emitted == mark:
                self.log.step = last_step  # a turn without a trace must not show in the events that follow
            return None
        self._launch(plan, planned)
        if self.policies.drafting is not None and plan.items:
            self.policies.drafting.book.planned(plan.step, plan.items, now)
        return plan

    def _plan(self, now: float, let_in: bool) -> list[InFlight]:
        """Ask everybody who has a say, and reserve memory for the outcome."""
        self._refresh_queue(now)
        view = self._look(now)
        decoding = self.policies.decoding
        work = decoding.policy.work if decoding.trusted else self._guarded_work
        running = tuple([offer if request.home == "device" else msgspec.structs.replace(offer, home="cpu")
                         for request in view.running if (offer := work(request)) is not None])  # fmt: skip
        if hasattr(decoding.policy, "regroup"):
            running = self._regroup(view, running)
        waiting = self._admit(view) if let_in else ()
        items = self._compose(view, Offers(running, waiting))
        return self._reserve(view, items if self.policies.drafting is None else self._ask_drafts(view, items))

    def _regroup(self, view: EngineView, offers: tuple[WorkItem, ...]) -> tuple[WorkItem, ...]:
        """A decoding method's second look, at all offers together."""
        views = {request.id: request for request in view.running}

        def checked(answer: Any) -> tuple[WorkItem, ...]:
            items = tuple(answer)
            for item in items:
                checked_offer(item, views[item.request])
            return items

        return self.policies.decoding.ask(lambda p: getattr(p, "regroup", _unchanged)(view, offers), checked)

    def _guarded_work(self, request: RequestView) -> WorkItem | None:
        return self.policies.decoding.ask(lambda p: p.work(request), lambda offer: checked_offer(offer, request))

    def _note(self, plan: StepPlan, now: float) -> None:
        drafting = self.policies.drafting
        seq = self._journal.planned(plan, now, len(self.running), len(self.waiting), drafting.cost if drafting is not None else None)
        if seq >= 0:
            self.plan_seq[plan.step] = seq

    def _launch(self, plan: StepPlan, planned: AbstractSequence[InFlight]) -> None:
        self.inflight[plan.step] = tuple(planned)
        self.next_step += 1
        for flight in planned:
            seq, item = flight.seq, flight.item
            if item.halfway and item.layers is not None:
                seq.cursor = item.layers[1]
            else:
                seq.num_computed_tokens, seq.cursor = computed_after(item, seq.num_computed_tokens), 0
            seq.inflight_step = plan.step
            seq.num_pending += item.emit == "sample"
            self.hash.touch(seq)

    def adopt(self, policies: Policies, now: float) -> None:
        """Go on under other policies, as a fork does; the queue is sorted anew. What is known of a draft source stays known."""
        before, after = self.policies.drafting, policies.drafting
        if before is not None and after is not None and before.source == after.source and before.book.like(after.book):
            policies = policies._replace(drafting=after._replace(book=before.book))
        self.policies = policies
        self._sort_queue(now)

    def reconfigure(self, changes: Mapping[str, Any], now: float) -> None:
        """Go on with other policies, limits or memory from the next step on. `changes`: some of LIVE_FIELDS; of drafting
        all (`llmlab.plugins.reseated`). Drafts that were proposed before are still verified. Raises ConfigError, and changes nothing, for an unknown policy or if a request that is here would not fit any more."""
        blocks, seams = changes.get("num_blocks"), [n for n in changes if n in SEAM_FIELDS and n != "draft_policy"]
        if blocks is not None:
            self._check_pool(blocks)
        made = {name: self._reseat(name, changes[name]) for name in seams}
        if "speculation" in changes:
            made |= self._redraft(changes)
        named = (*SEAM_FIELDS, "speculation")
        shown = {name: policy_name(value) if name in named and not isinstance(value, str | None) else value
                 for name, value in changes.items()}  # fmt: skip
        self.log.emit(ev.Reconfigured, now=now, changes=shown)
        self.memory.pool.choose = made.pop("eviction", self.memory.pool.choose)
        self.adopt(self.policies._replace(**made), now)
        limits = {name: changes[name] for name in ("max_num_batched_tokens", "max_num_seqs") if name in changes}
        if blocks is not None:
            self.memory.resize(blocks)
            limits["max_model_len"] = min(self._longest, blocks * self.memory.block_size)
        self.limits = self._journal.limits = self._viewer.limits = msgspec.structs.replace(self.limits, **limits)

    def _redraft(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The policies of another drafting side; who decodes plainly verifies from now on, and keeps to it."""
        drafting = self._reseat("drafting", changes)
        if drafting is None or "decoding" in changes or self.policies.decoding.policy_name != "autoregressive":
            return {"drafting": drafting}
        return {"drafting": drafting, "decoding": self._reseat("decoding", "speculative")}

    def _check_pool(self, num_blocks: int) -> None:
        longest = max((seq.request.max_total_tokens for seq in self.sequences.values()), default=1)
        least, most = self.memory.blocks_for(longest), self.memory.pool.num_blocks
        if not least <= num_blocks <= most:
            raise ConfigError("num_blocks", num_blocks, f"must be {least} to {most} now",
                              "The longest request that is here must fit; the engine was made with no more blocks.")  # fmt: skip

    def _refresh_queue(self, now: float) -> None:
        if getattr(self.policies.ordering.policy, "refresh", "arrival") == "step" and len(self.waiting) > 1:
            self._sort_queue(now)

    def _sort_queue(self, now: float) -> None:
        ordering = self.policies.ordering
        views = {seq.id: self._viewer.request(seq) for seq in self.waiting}
        keys = {name: ordering.ask(lambda p, v=v: checked_key(p.key(v, now)), unchecked)  # type: ignore[misc]
                for name, v in views.items()}  # fmt: skip
        self.waiting.resort(keys)

    # -------------------------------------------------------------------------------- composition
    def _compose(self, view: EngineView, offers: Offers) -> AbstractSequence[WorkItem]:
        if not offers.running and not offers.waiting:
            return ()
        offers = self._wishing(view, offers)
        seam = self.policies.composer
        items = seam.ask(lambda p: p.compose(view, offers), lambda a: checked_items(a, offers, self.limits))
        if not items and not self.inflight:
            why = "composed nothing while nothing is in flight"
            items = seam.fall_back(lambda p: p.compose(view, offers), why, -1)
        self._journal.composition(seam, offers, items)
        self._tell_left_out(offers, items)
        return self._place(view, items)

    def _tell_left_out(self, offers: Offers, items: AbstractSequence[WorkItem]) -> None:
        if not offers.waiting:
            return
        chosen = dict.fromkeys(item.request for item in items)
        self.tell_left_out([offer for offer in offers.waiting if offer.request not in chosen], total_tokens(items))

    def tell_left_out(self, offers: AbstractSequence[WorkItem], num_tokens: int) -> None:
        """Queued requests that a step of `num_tokens` has no place for."""
        for offer in offers:
            self._journal.wait(self.sequences[offer.request], "composer", f"{self.policies.composer.policy_name} gave "
                               f"this step to others ({num_tokens} of {self.limits.max_num_batched_tokens} tokens)")  # fmt: skip

    # ----------------------------------------------------------------------------------- drafting
    def _ask_drafts(self, view: EngineView, items: AbstractSequence[WorkItem]) -> AbstractSequence[WorkItem]:
        """The items, those that sample with the number of drafts to propose behind them."""
        drafting = self.policies.drafting
        if drafting is not None and getattr(drafting.seam.policy, "rests", False) and drafting.book.rests():
            return items
        wanting = [item for item in items if item.emit == "sample" and item.home == "device"
                   and not self.sequences[item.request].request.sampling.deterministic]  # fmt: skip
        if drafting is None or not wanting:
            return items
        seam, outlook = drafting.seam, drafting.book.outlook()
        answer = seam.ask(lambda p: p.lengths(view, wanting, outlook), lambda a: checked_lengths(a, wanting, outlook.longest))
        self._journal.drafting(seam, wanting, answer)
        if not any(answer.lengths):
            return items
        lengths = {item.request: self._room_for(item, k) for item, k in zip(wanting, answer.lengths, strict=True)}
        return [msgspec.structs.replace(item, propose=lengths[item.request]) if lengths.get(item.request) else item
                for item in items]  # fmt: skip

    def _room_for(self, item: WorkItem, k: int) -> int:
        """No more drafts than the request has tokens left, even if only one of those being verified holds."""
        longest = self.sequences[item.request].request.max_total_tokens
        return max(0, min(k, longest - item.tokens[1] - 1))


def _unchanged(view: EngineView, offers: tuple[WorkItem, ...]) -> tuple[WorkItem, ...]:
    return offers
