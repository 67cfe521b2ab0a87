"""The scheduler: what runs next, for whom, and at whose expense.

    arrivals -> [ queue ] --admit--> [ running ] --finish--> gone
                   ^                     |
                   +------ preempt ------+

`schedule(now)` turns the state into a StepPlan and marks its tokens as computed; `commit(result)` appends what
came back. Between the two a step is in flight; with overlap there may be several. The scheduler mutates, policies
answer questions. It never asks which executor runs, reads no wall clock and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AbstractSequence
from typing import Any, NamedTuple

import msgspec

from llmlab.config import SEAM_FIELDS
from llmlab.decoding.speculative import accepted_path, depths
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.spans import SpanLog
from llmlab.events.state import computed_after
from llmlab.events.why import count
from llmlab.memory.kv_manager import KVManager, Reserved, Shortage
from llmlab.registry import policy_name
from llmlab.scheduling.journal import Journal, StateHash
from llmlab.scheduling.queue import WaitingQueue
from llmlab.scheduling.seamcalls import (
    Seam,
    checked_admission,
    checked_commit,
    checked_home,
    checked_items,
    checked_key,
    checked_lengths,
    checked_mode,
    checked_offer,
    checked_places,
    unchecked,
)  # fmt: skip
from llmlab.scheduling.view import Viewer
from llmlab.seams import (
    Admission,
    Composer,
    CostModel,
    DecodingMethod,
    DraftOutlook,
    DraftPolicy,
    EngineView,
    Limits,
    Need,
    Offers,
    Ordering,
    Placed,
    Placement,
    Rehome,
    RequestView,
    StopRule,
    Tiering,
    TierOption,
    Victim,
    Wait,
)  # fmt: skip
from llmlab.types import (
    QUEUED,
    Commit,
    ConfigError,
    FinishReason,
    Home,
    ItemResult,
    Request,
    RequestError,
    Sequence,
    Span,
    Status,
    StepPlan,
    StepResult,
    WorkItem,
    total_tokens,
)  # fmt: skip

ACCEPTANCE_WEIGHT = 0.2  # of the newest verification in a request's moving average
# Looking a member up in its Enum costs as much as a call, and these are needed for every request in every step.
RUNNING, FINISHED = Status.RUNNING, Status.FINISHED


class Policies(NamedTuple):
    """The guarded seams that the scheduler asks."""

    ordering: Seam[Ordering]
    admission: Seam[Admission]
    composer: Seam[Composer]
    victim: Seam[Victim]
    placement: Seam[Placement]
    tiering: Seam[Tiering]
    decoding: Seam[DecodingMethod]
    stop_rule: StopRule
    drafting: Drafting | None = None


class Drafting(NamedTuple):
    """How many drafts to propose: the policy, and what it is told. `source` is the name of what proposes them."""

    seam: Seam[DraftPolicy]
    outlook: DraftOutlook
    source: str


class InFlight(msgspec.Struct, frozen=True, gc=False):
    """An item that was submitted: whose it is, and in which life (`epoch`) of its owner."""

    seq: Sequence
    item: WorkItem
    epoch: int


def _stay(view: EngineView, request: RequestView, need: Need) -> Home:
    """The home of a queued request under a placement that does not say."""
    return "device"


def _shortage_of(home: Home) -> str:
    return "memory" if home == "device" else "host_memory"


class Update(msgspec.Struct, frozen=True, gc=False):
    """What one commit means to a client."""

    request: str
    token_ids: tuple[int, ...]
    result: ItemResult | None = None
    finish_reason: FinishReason | None = None


def unseated(seam: str, choice: Any) -> Any:
    raise ConfigError(seam, choice, "cannot be changed: this scheduler was built without a way to make policies")


class Scheduler:
    """See the module's text. `view_cap` bounds how much of the queue policies see; `num_alternatives` how many
    rejected options a Decision keeps; `reseat` makes the guarded seam for a choice of `reconfigure`."""

    def __init__(self, policies: Policies, memory: KVManager, cost: CostModel, log: EventLog, limits: Limits,
                 view_cap: int = 64, num_alternatives: int = 4,
                 reseat: Callable[[str, Any], Any] = unseated) -> None:  # fmt: skip
        self.policies = policies
        self.memory = memory
        self.log = log
        self.spans = SpanLog(log)
        self.limits = limits
        self.sequences: dict[str, Sequence] = {}
        self.running: dict[str, Sequence] = {}
        self.waiting = WaitingQueue()
        self.inflight: dict[int, tuple[InFlight, ...]] = {}
        self.plan_seq: dict[int, int] = {}
        self.next_step = 0
        self.hash = StateHash()
        self._cost = cost
        self._journal = Journal(log, memory, cost, limits, num_alternatives)
        self._viewer = Viewer(memory, limits, self._journal.considered.consider, view_cap, cost.layers())
        self._num_layers = cost.layers().num_layers
        self._num_compared = 2 + num_alternatives  # how much of the queue a Decision about its order needs
        self._longest = limits.max_model_len
        self._reseat = reseat
        self._short: dict[str, None] = {}  # running requests that found no memory when they were last planned

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

    @property
    def has_work(self) -> bool:
        return bool(self.sequences) or bool(self.inflight)

    def _enqueue(self, seq: Sequence, now: float) -> None:
        view = self._viewer.request(seq)
        key = self.policies.ordering.ask(lambda p: checked_key(p.key(view, now)), unchecked, seq.cause)
        self.waiting.add(seq, key)
        self.hash.touch(seq)

    def _finish(self, seq: Sequence, reason: FinishReason, detail: str = "") -> None:
        if seq.status is RUNNING:
            self._stop_running(seq)
        elif seq.status in QUEUED:
            self.waiting.remove(seq)
        seq.status, seq.finish_reason, seq.home, seq.cursor = FINISHED, reason, "device", 0
        self.memory.release(seq, seq.cause, self._inflight_step(seq))
        del self.sequences[seq.id]
        self.log.emit(ev.RequestFinished, seq.id, seq.cause, reason=reason, num_output_tokens=seq.num_output_tokens,
                      num_preemptions=seq.num_preemptions, detail=detail)  # fmt: skip
        self.hash.touch(seq)

    # ------------------------------------------------------------------- for leaps (llmlab.scheduling.steady)
    @property
    def is_settled(self) -> bool:
        """Whether nothing is half done: nobody short of memory, no copy to make, no block to withdraw."""
        return not self._short and not self.memory.moves and self.memory.is_settled

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

    def _stop_running(self, seq: Sequence) -> None:
        del self.running[seq.id]
        self._short.pop(seq.id, None)

    def _inflight_step(self, seq: Sequence) -> int | None:
        return seq.inflight_step if seq.inflight_step in self.inflight else None

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
        seq = self._journal.planned(plan, now, len(self.running), len(self.waiting))
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
        """Go on under other policies, as a fork does; the queue is sorted anew."""
        self.policies = policies
        self._sort_queue(now)

    def reconfigure(self, changes: Mapping[str, Any], now: float) -> None:
        """Go on with other policies, limits or memory from the next step on. `changes`: some of LIVE_FIELDS. Raises
        ConfigError, and changes nothing, for an unknown policy or if a request that is here would not fit any more."""
        blocks, seams = changes.get("num_blocks"), [name for name in changes if name in SEAM_FIELDS]
        if blocks is not None:
            self._check_pool(blocks)
        made = {name: self._reseat(name, changes[name]) for name in seams}
        shown = {name: policy_name(value) if name in seams and not isinstance(value, str) else value
                 for name, value in changes.items()}  # fmt: skip
        self.log.emit(ev.Reconfigured, now=now, changes=shown)
        self.memory.pool.choose = made.pop("eviction", self.memory.pool.choose)
        drafting, lengths = self.policies.drafting, made.pop("draft_policy", None)
        if drafting is not None and lengths is not None:
            made["drafting"] = drafting._replace(seam=lengths)
        self.adopt(self.policies._replace(**made), now)
        limits = {name: changes[name] for name in ("max_num_batched_tokens", "max_num_seqs") if name in changes}
        if blocks is not None:
            self.memory.resize(blocks)
            limits["max_model_len"] = min(self._longest, blocks * self.memory.block_size)
        self.limits = self._journal.limits = self._viewer.limits = msgspec.structs.replace(self.limits, **limits)

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

    # --------------------------------------------------------------------------------- admission
    def _admit(self, view: EngineView) -> tuple[WorkItem, ...]:
        """Offers of queued requests, in queue order, until a limit is hit or the policy says wait."""
        offers: list[WorkItem] = []
        budget, forced = self.limits.max_num_batched_tokens, not self.running and not self.inflight
        for seq in self.waiting.head(self._viewer.cap):
            if len(self.running) + len(offers) >= self.limits.max_num_seqs:
                self._journal.wait(seq, "seats", f"all {self.limits.max_num_seqs} seats (max_num_seqs) are taken")
                break
            if budget <= 0:
                self._journal.wait(seq, "budget", "earlier requests in the queue fill the token budget of this step")
                break
            if self._must_wait(seq):
                continue
            home = self._choose_home(view, seq, forced)
            tier = self._viewer.of_tier(view, home)
            if self._lacks_memory(tier, seq, home, forced):
                break
            offer = self._ask_admission(tier, seq, home, forced)
            if offer is None:
                break
            offers.append(offer)
            budget -= offer.num_tokens
            taken = self._need(seq, home).prompt
            view, forced = self._viewer.after_admission(view, seq, taken, home), False
        return tuple(offers)

    def _choose_home(self, view: EngineView, seq: Sequence, forced: bool) -> Home:
        """Where the KV of a queued request is to live: the placement says, if it uses host memory at all. One that must
        run (`forced`) does not wait for the host."""
        seam = self.policies.placement
        if not self._viewer.cpu or seq.device_bound or not hasattr(seam.policy, "home"):
            return "device"
        request, need = self._viewer.request(seq), self._need(seq, "device")
        home = seam.ask(lambda p: getattr(p, "home", _stay)(view, request, need), checked_home, seq.cause)
        return "device" if forced and self.memory.need_on_host(seq).prompt > view.pool.num_host_free else home

    def _need(self, seq: Sequence, home: Home) -> Need:
        return self.memory.need_on_host(seq) if home == "cpu" else self.memory.need(seq, self._hits(seq))

    def _must_wait(self, seq: Sequence) -> bool:
        """Cases that no policy may decide: a token of it is still in flight, or the sibling whose prompt it shares
        comes first and is not done with it."""
        if seq.num_pending:
            self._journal.wait(seq, "in_flight", "its last token is still being computed")
            return True
        parent = self.sequences.get(seq.request.fork_of or "")
        if parent is None or seq.status is not Status.WAITING or parent.num_computed_tokens >= parent.num_prompt_tokens:
            return False
        if parent.status is RUNNING or self.waiting.before(parent, seq):
            self._journal.wait(seq, "sibling", f"shares the prompt that {parent.id} is still computing")
            return True
        return False

    def _lacks_memory(self, view: EngineView, seq: Sequence, home: Home, forced: bool) -> bool:
        """Two rules that no policy may break, else requests could preempt each other for ever: nobody is let in
        while a running request is short of memory; and who was preempted comes back only when all its tokens fit
        beside those that running requests have still to compute. Both count within one tier, which `view` shows."""
        short = next((name for name in self._short if name in self.running and self.running[name].home == home), None)
        if short is not None:
            self._journal.wait(seq, _shortage_of(home), f"{short}, which runs, is short of memory")
        elif seq.num_preemptions and not forced:
            promised = sum(max(0, view.pool.blocks_for(r.num_tokens) - r.num_blocks) for r in view.running)
            need = self._need(seq, home).prompt
            if need + promised <= view.pool.num_free:
                return False
            self._journal.wait(seq, _shortage_of(home), f"it was preempted and needs {count(need, 'block')} to come back; of {view.pool.num_free} "
                                          f"free ones {promised} are promised to those who run")  # fmt: skip
            return True
        return short is not None

    def _hits(self, seq: Sequence) -> list[int]:
        return self.memory.match(seq) if seq.status is not Status.SWAPPED else []

    def _ask_admission(self, view: EngineView, seq: Sequence, home: Home, forced: bool) -> WorkItem | None:
        hits = self._hits(seq) if home == "device" else []
        need = self._need(seq, home)
        cached = len(hits) * self.memory.block_size
        request = self._viewer.request(seq, cached)
        seam = self.policies.admission
        answer = seam.ask(lambda p: p.admit(view, request, need), checked_admission, seq.cause)
        if isinstance(answer, Wait) and not forced:
            self._journal.admission(seam, seq, "wait", answer.reason, need, view.pool.num_free)
            self._journal.wait(seq, _shortage_of(home) if need.prompt > view.pool.num_free else "policy", answer.reason)
            return None
        reason = answer.reason
        if isinstance(answer, Wait):
            reason = f"nothing else runs, so it may not wait ({reason})"
        self._journal.admission(seam, seq, "admit", reason, need, view.pool.num_free)
        start = seq.num_computed_tokens if seq.status is Status.SWAPPED else cached
        fixed = seq.request.sampling.deterministic
        return WorkItem(seq.id, Span(start, seq.num_tokens), home=home, numerics="fixed" if fixed else "fast")

    # -------------------------------------------------------------------------------- composition
    def _compose(self, view: EngineView, offers: Offers) -> AbstractSequence[WorkItem]:
        if not offers.running and not offers.waiting:
            return ()
        seam = self.policies.composer
        items = seam.ask(lambda p: p.compose(view, offers), lambda a: checked_items(a, offers, self.limits))
        if not items and not self.inflight:
            why = "composed nothing while nothing is in flight"
            items = seam.fall_back(lambda p: p.compose(view, offers), why, -1)
        self._journal.composition(seam, offers, items)
        self._tell_left_out(offers, items)
        return self._place(view, items)

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

    def _settled(self, item: WorkItem) -> WorkItem:
        """The item as it can run: KV on the device is attended to there; layers follow the cursor, else all of them run."""
        seq = self.sequences[item.request]
        home = seq.home if seq.status is RUNNING else item.home
        device = item.device if home == "cpu" and self._viewer.cpu else "device"
        if item.drafts and (home == "cpu" or not seq.drafts):  # it moved, and left them behind
            item = item.shortened(item.num_committed)
        layers, emit = item.layers, item.emit
        if layers is not None and not (device == "cpu" and item.num_tokens == 1 and self._follows(layers, seq, emit)):
            layers, emit = None, "sample" if item.tokens[1] == seq.num_tokens else "none"
        if (home, device, layers, emit) == (item.home, item.device, item.layers, item.emit):
            return item
        return msgspec.structs.replace(item, home=home, device=device, layers=layers, emit=emit)

    def _follows(self, layers: Span, seq: Sequence, emit: str) -> bool:
        """Whether layers go on where a token is half-way, and as far as they can."""
        start, stop = layers
        ends = stop == self._num_layers
        goes_on = start < stop <= self._num_layers or (start == stop and ends)
        return start == seq.cursor and goes_on and (ends or emit == "none")

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
        wanting = [item for item in items if item.emit == "sample" and item.home == "device"
                   and not self.sequences[item.request].request.sampling.deterministic]  # fmt: skip
        if drafting is None or not wanting:
            return items
        seam, outlook = drafting.seam, drafting.outlook
        answer = seam.ask(lambda p: p.lengths(view, wanting, outlook), lambda a: checked_lengths(a, wanting, outlook.longest))
        self._journal.drafting(seam, wanting, answer)
        lengths = {item.request: self._room_for(item, k) for item, k in zip(wanting, answer.lengths, strict=True)}
        return [msgspec.structs.replace(item, propose=lengths[item.request]) if lengths.get(item.request) else item
                for item in items]  # fmt: skip

    def _room_for(self, item: WorkItem, k: int) -> int:
        """No more drafts than the request has tokens left, even if only one of those being verified holds."""
        longest = self.sequences[item.request].request.max_total_tokens
        return max(0, min(k, longest - item.tokens[1] - 1))

    # -------------------------------------------------------------------------------- reservation
    def _reserve(self, view: EngineView, items: AbstractSequence[WorkItem]) -> list[InFlight]:
        """Memory for the items, in their order; whoever finds none preempts, waits or stays queued."""
        planned: dict[str, InFlight] = {}
        was_running = dict(self.running)
        for item in items:
            seq = was_running.get(item.request)
            if seq is None:
                self._start(self.sequences[item.request], item, planned)
            elif item.home == "device" and not self._short and seq.status is RUNNING and self.memory.covers(seq, item.reach):
                planned[item.request] = InFlight(seq, item, seq.epoch)  # the common case, at half its cost
            else:
                self._grow(view, seq, item, planned)
        return list(planned.values())

    def _grow(self, view: EngineView, seq: Sequence, item: WorkItem, planned: dict[str, InFlight]) -> None:
        while seq.status is RUNNING:
            on_device = seq.home == "device"
            got = self.memory.grow(seq, item.reach, seq.cause) if on_device else self.memory.grow_on_host(seq, item.tokens[1])
            if isinstance(got, Reserved):
                self._short.pop(item.request, None)
                planned[item.request] = InFlight(seq, item, seq.epoch)
                return
            if item.propose or (item.drafts and item.kv_write == "append"):  # nobody is preempted for a guess
                item = msgspec.structs.replace(item.shortened(item.num_committed), propose=0)
            elif not self._make_room(view, seq, got, planned):
                if seq.status is RUNNING:
                    self._short[seq.id] = None
                return

    def _make_room(self, view: EngineView, needy: Sequence, shortage: Shortage, planned: dict[str, InFlight]) -> bool:
        """Preempt somebody for `needy`; False if it must wait for a step in flight or for its turn."""
        if needy.home == "device" and self.memory.num_quarantined >= shortage.need - shortage.free:
            return False
        tier = [s for s in self.running.values() if s.home == needy.home]
        oldest = min(tier, key=lambda s: (s.request.arrival, s.request.number))
        candidates = [s for s in tier if s is not oldest]
        if not candidates and needy.home == "cpu":  # alone, and the host is full: the device has room for anybody
            needy.device_bound = True
            candidates = [needy]
        if not candidates:
            return False
        failed = self._journal.shortage(needy, shortage, list(self.running.values()))
        victim, decision = self._choose_victim(view, needy, candidates, failed)
        planned.pop(victim.id, None)
        self._preempt(view, victim, needy, decision)
        return victim is not needy

    def _choose_victim(self, view: EngineView, needy: Sequence, candidates: list[Sequence], cause: int
                       ) -> tuple[Sequence, int]:  # fmt: skip
        views = [self._viewer.request(s) for s in candidates]
        wanting = self._viewer.request(needy)
        seam = self.policies.victim
        scores = seam.ask(lambda p: [checked_key(p.score(view, v, wanting)) for v in views], unchecked, cause)
        order = sorted(range(len(views)), key=lambda i: (scores[i], -views[i].arrival, -views[i].number))
        decision = self._journal.victim(seam, needy.id, [(views[i], scores[i]) for i in order], cause)
        return candidates[order[0]], decision

    def _preempt(self, view: EngineView, victim: Sequence, needy: Sequence, cause: int) -> None:
        self._forget_drafts(victim, cause)
        mode = self._choose_tier(view, victim, cause)
        until = self._inflight_step(victim)
        self._journal.preempted(victim, mode, needy.id, cause)
        if mode == "swap":
            moved = self.memory.swap_out(victim, victim.cause, until)
            self._journal.moved(victim, moved, "device", "host")
            victim.status = Status.SWAPPED
        else:
            self.memory.release(victim, victim.cause, until)
            self.log.emit(ev.KVDropped, victim.id, victim.cause, num_tokens=victim.num_computed_tokens)
            victim.status, victim.num_computed_tokens = Status.PREEMPTED, 0
        victim.home, victim.cursor = "device", 0
        victim.epoch += 1
        victim.num_preemptions += 1
        victim.waiting_reason, victim.logged_wait = "", ""
        self._stop_running(victim)
        self._enqueue(victim, view.now)

    def _forget_drafts(self, seq: Sequence, cause: int) -> None:
        """Drafts do not outlive a request's stay on the device; of their KV nothing is kept."""
        seq.drafts = seq.draft_parents = ()
        if not seq.num_pending:
            self._cut_back(seq, len(seq.token_ids) - 1, cause)

    def _being_verified(self, seq: Sequence) -> bool:
        """Whether a step in flight computes drafts of it."""
        return bool(seq.num_pending) and seq.num_computed_tokens > len(seq.token_ids) + seq.num_pending - 1

    def _cut_back(self, seq: Sequence, num_tokens: int, cause: int) -> None:
        """Keep the KV of `num_tokens` tokens at most, and blocks for the tokens and drafts that are known."""
        wasted = seq.num_computed_tokens - num_tokens
        if wasted <= 0:
            return
        seq.num_computed_tokens = num_tokens
        self.log.emit(ev.RolledBack, seq.id, cause, num_computed_tokens=num_tokens, tokens_wasted=wasted)
        self.memory.truncate(seq, len(seq.token_ids) + len(seq.drafts), cause, self._inflight_step(seq))

    def _choose_tier(self, view: EngineView, victim: Sequence, cause: int) -> str:
        seam = self.policies.tiering
        num_blocks = self.memory.num_blocks_of(victim.id)
        both_ways = self._cost.swap(2 * num_blocks)
        guessing = self._being_verified(victim)
        room = (self.memory.can_swap_out(victim) and victim.num_computed_tokens > 0 and victim.home == "device"
                and not guessing)  # fmt: skip
        why_not = "its drafts are being verified" if guessing else f"{self.memory.host.num_free} host blocks are free"
        options = (
            TierOption("recompute", self._journal.cost_of_recompute(victim.id, victim.num_computed_tokens), True),
            TierOption("swap", both_ways, room, "" if room else why_not),
        )
        feasible = [o.mode for o in options if o.feasible]
        request = self._viewer.request(victim)
        mode = seam.ask(lambda p: p.choose(view, request, options), lambda a: checked_mode(a, feasible), cause)
        self._journal.tier(seam, victim, mode, options, cause)
        return mode

    def _start(self, seq: Sequence, item: WorkItem, planned: dict[str, InFlight]) -> None:
        """Move a queued request to the running ones, if its memory is there."""
        swapped = seq.status is Status.SWAPPED
        got = self._start_memory(seq, item)
        if isinstance(got, Shortage):
            self._journal.wait(seq, _shortage_of(item.home), f"needs {got.need} blocks, {got.free} are free")
            return
        head = self.waiting.head(self._num_compared)
        ordering = self._journal.ordering(self.policies.ordering, seq, head, len(self.waiting))
        self.waiting.remove(seq)
        seq.status, seq.waiting_reason, seq.logged_wait = RUNNING, "", ""
        self.running[seq.id] = seq
        seq.home = item.home
        if swapped:
            num_blocks = self.memory.num_blocks_of(seq.id)
            seq.cause = self.log.emit(ev.RequestResumed, seq.id, ordering, num_tokens=seq.num_computed_tokens,
                                      num_blocks=num_blocks, home=seq.home)  # fmt: skip
            if seq.home == "device":
                self._journal.moved(seq, num_blocks, "host", "device")
            start = seq.num_computed_tokens
        else:
            start = seq.num_cached_tokens = got.num_cached_tokens
            seq.num_computed_tokens = start
            seq.cause = self.log.emit(ev.RequestAdmitted, seq.id, ordering, num_cached_tokens=start,
                                      num_tokens=seq.num_tokens, attempt=seq.num_preemptions,
                                      source=got.source, home=seq.home)  # fmt: skip
        whole = msgspec.structs.replace(item, tokens=Span(start, seq.num_tokens), emit="sample")
        started = self._settled(whole.shortened(got.stop - start))
        if started.propose and isinstance(self.memory.grow(seq, started.reach, seq.cause), Shortage):
            started = msgspec.structs.replace(started, propose=0)
        planned[seq.id] = InFlight(seq, started, seq.epoch)
        self.hash.touch(seq)

    def _start_memory(self, seq: Sequence, item: WorkItem) -> Reserved | Shortage:
        if item.home == "cpu":
            return self.memory.start_on_host(seq, item.num_tokens)
        if seq.status is Status.SWAPPED:
            return self.memory.swap_in(seq, item.tokens[1], seq.cause)
        parent = self.running.get(seq.request.fork_of or "")
        if (parent is not None and parent.home == "device"
                and seq.num_tokens == seq.num_prompt_tokens <= parent.num_computed_tokens):  # fmt: skip
            return self.memory.fork(parent, seq, seq.cause)
        return self.memory.start(seq, item.num_tokens, seq.cause)

    # ---------------------------------------------------------------------------------- collecting
    def commit(self, result: StepResult) -> list[Update]:
        """Take in what a step produced; the oldest step in flight first."""
        flights = self.inflight.pop(result.step)
        plan = self.plan_seq.pop(result.step, -1)
        self.log.step = result.step
        self.spans.record(result.spans, plan)
        updates = []
        for resource in result.lost:
            self.log.emit(ev.ResourceLost, None, plan, resource=resource)
            self._viewer.cpu = self._viewer.cpu and resource != "cpu"
        for flight, item_result in zip(flights, result.results, strict=True):
            update = self._commit_item(flight, item_result, plan)
            if update is not None:
                updates.append(update)
        self.memory.collected(result.step)
        self._close(result, plan, total_tokens([flight.item for flight in flights]))
        return updates

    def _close(self, result: StepResult, plan: int, num_tokens: int) -> None:
        foldable = self.log.wants(ev.StepPlanned)  # without plans in the log nobody can check the hash
        state_hash = self.hash.settle() if foldable else self.hash.forget()
        self._journal.experts(result, plan)
        self._journal.finished(result, plan, num_tokens, state_hash, len(self.running), len(self.waiting))

    def _commit_item(self, flight: InFlight, result: ItemResult, plan: int) -> Update | None:
        seq, item = flight.seq, flight.item
        seq.num_pending -= item.emit == "sample"
        if seq.status is FINISHED:
            return None
        self.hash.touch(seq)
        seq.cause = plan if plan >= 0 else seq.cause
        if result.error is not None:
            self._finish(seq, "error", result.error)
            return Update(seq.id, (), result, "error")
        if item.emit == "sample":
            return self._append(flight, result, plan)
        if flight.epoch == seq.epoch and seq.home == item.home == "device":
            self.memory.commit(seq, item.tokens[1])
        return Update(seq.id, (), result) if result.prompt_logprobs else None

    def _append(self, flight: InFlight, result: ItemResult, plan: int) -> Update:
        policies, log, seq, item = self.policies, self.log, flight.seq, flight.item
        decoding, request = policies.decoding, seq.request
        commit = (decoding.policy.accept(request, seq.drafts, item, result) if decoding.trusted
                  else decoding.ask(lambda p: p.accept(request, seq.drafts, item, result), checked_commit, plan))  # fmt: skip
        accepted = commit.token_ids
        num_outputs, reason = len(seq.token_ids) - seq.num_prompt_tokens, None
        for index, token in enumerate(accepted, 1):
            reason = policies.stop_rule.check(request, token, num_outputs + index)
            if reason is not None:
                accepted = accepted[:index]
                break
        seq.token_ids.extend(accepted)
        if item.drafts or result.draft_error is not None:
            self._learn(seq, item, accepted, result, plan)
        if flight.epoch == seq.epoch:
            self._keep(flight, commit, plan)
        if not accepted:
            return Update(request.id, (), result)
        if not num_outputs:
            log.emit(ev.FirstToken, request.id, plan)
        log.emit_tokens(request.id, plan, accepted)
        if reason is not None:
            self._finish(seq, reason)
        return Update(request.id, accepted, result, reason)

    @property
    def _draft_source(self) -> str:
        return self.policies.drafting.source if self.policies.drafting is not None else self.policies.decoding.policy_name

    def _keep(self, flight: InFlight, commit: Commit, plan: int) -> None:
        """What stays of the KV that an item wrote, and what is proposed from now on."""
        seq, item = flight.seq, flight.item
        kept = min(item.tokens[1] if commit.truncate_to is None else commit.truncate_to,
                   len(seq.token_ids) - 1 + len(commit.drafts))  # fmt: skip
        fresh = commit.drafts if commit.final else commit.drafts[len(seq.drafts) :]
        seq.drafts, seq.draft_parents = commit.drafts, commit.parents
        if commit.final and seq.home == item.home == "device":
            self.memory.commit(seq, min(kept, len(seq.token_ids) - 1))
        if item.drafts or commit.truncate_to is not None:
            self._cut_back(seq, kept, plan)
        if fresh and item.kv_write == "append":
            self._journal.drafted(seq, fresh, commit.parents, self._draft_source, plan)

    def _learn(self, seq: Sequence, item: WorkItem, accepted: AbstractSequence[int], result: ItemResult, plan: int) -> None:
        """How good the drafts were, and whether their source failed."""
        if item.drafts:
            path = accepted_path(item, accepted)
            tried, before = min(max(depths(item)), len(path) + 1), seq.acceptance  # drafts behind a wrong one tell nothing
            share = len(path) / tried
            seq.acceptance = share if before is None else before + ACCEPTANCE_WEIGHT * (share - before)
            self._journal.verified(item, path, accepted, self._draft_source, plan)
        if result.draft_error is not None:
            self.log.emit(ev.PolicyFailed, seq.id, plan, seam="drafts", policy=self._draft_source, error=result.draft_error,
                          fallback="no drafts")  # fmt: skip

    # --------------------------------------------------------------------------- views and checks
    def problems(self) -> list[str]:
        """Contradictions anywhere in the core's state; empty means sound."""
        found = self.memory.problems(self.sequences)
        for seq in self.sequences.values():
            blocks, hosted = self.memory.num_blocks_of(seq.id), self.memory.num_host_blocks_of(seq.id)
            owned, other = (blocks, hosted) if seq.home == "device" else (hosted, blocks)
            if seq.status is RUNNING and owned < self.memory.blocks_for(seq.num_computed_tokens):
                found.append(f"{seq.id} has computed {seq.num_computed_tokens} tokens but owns {owned} blocks")
            if seq.status is RUNNING and other:
                found.append(f"{seq.id} lives on the {seq.home} but owns {other} blocks of the other tier")
            if seq.status is not RUNNING and blocks:
                found.append(f"{seq.id} is {seq.status} but owns {blocks} device blocks")
            if seq.cursor and (seq.status is not RUNNING or seq.home != "cpu"):
                found.append(f"{seq.id} is half-way through its layers, but does not run on the CPU")
        if len(self.running) + len(self.waiting) != len(self.sequences):
            found.append("a live request is neither running nor queued")
        return found

    def _look(self, now: float) -> EngineView:
        return self._viewer.engine(now, self.next_step, self.waiting.head(self._viewer.cap), len(self.waiting),
                                   self.running.values())  # fmt: skip


def _unchanged(view: EngineView, offers: tuple[WorkItem, ...]) -> tuple[WorkItem, ...]:
    return offers
