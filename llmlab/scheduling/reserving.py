"""Memory for what a step is to do, in order of priority; whoever finds none preempts, waits or stays queued (seams A and D)."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

import msgspec

from llmlab.events import catalog as ev
from llmlab.memory.kv_manager import Reserved, Shortage
from llmlab.scheduling.core import RUNNING, Core, InFlight, shortage_of
from llmlab.scheduling.seamcalls import checked_key, checked_mode, unchecked
from llmlab.seams import EngineView, TierOption
from llmlab.types import Sequence, Span, Status, WorkItem


class Reserving(Core):
    """Reservation, preemption and the start of queued requests."""

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
        self._journal.preempted(victim, mode, needy.id, cause)
        if mode == "swap":
            moved = self.memory.swap_out(victim, victim.cause, self._inflight_step(victim))
            self._journal.moved(victim, moved, "device", "host")
            victim.status = Status.SWAPPED
        else:
            self._drop_kv(victim)
        self._begin_life(victim)
        self._stop_running(victim)
        self._enqueue(victim, view.now)

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
            self._journal.wait(seq, shortage_of(item.home), f"needs {got.need} blocks, {got.free} are free")
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
