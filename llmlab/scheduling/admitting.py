"""Who comes in: the head of the queue, request by request, until a limit, a rule or the policy says wait (seam A)."""

from __future__ import annotations

from llmlab.events.why import count
from llmlab.scheduling.core import RUNNING, Core, shortage_of
from llmlab.scheduling.seamcalls import checked_admission, checked_home
from llmlab.seams import EngineView, Need, RequestView, Wait
from llmlab.types import Home, Sequence, Span, Status, WorkItem


def _stay(view: EngineView, request: RequestView, need: Need) -> Home:
    """The home of a queued request under a placement that does not say."""
    return "device"


class Admitting(Core):
    """Admission to the running requests."""

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
            self._journal.wait(seq, shortage_of(home), f"{short}, which runs, is short of memory")
        elif seq.num_preemptions and not forced:
            promised = sum(max(0, view.pool.blocks_for(r.num_tokens) - r.num_blocks) for r in view.running)
            need = self._need(seq, home).prompt
            if need + promised <= view.pool.num_free:
                return False
            self._journal.wait(seq, shortage_of(home), f"it was preempted and needs {count(need, 'block')} to come back; of {view.pool.num_free} "
                                          f"free ones {promised} are promised to those who run")  # fmt: skip
            return True
        return short is not None

    def _ask_admission(self, view: EngineView, seq: Sequence, home: Home, forced: bool) -> WorkItem | None:
        hits = self._hits(seq) if home == "device" else []
        need = self._need(seq, home)
        cached = len(hits) * self.memory.block_size
        request = self._viewer.request(seq, cached)
        seam = self.policies.admission
        answer = seam.ask(lambda p: p.admit(view, request, need), checked_admission, seq.cause)
        if isinstance(answer, Wait) and not forced:
            self._journal.admission(seam, seq, "wait", answer.reason, need, view.pool.num_free)
            self._journal.wait(seq, shortage_of(home) if need.prompt > view.pool.num_free else "policy", answer.reason)
            return None
        reason = answer.reason
        if isinstance(answer, Wait):
            reason = f"nothing else runs, so it may not wait ({reason})"
        self._journal.admission(seam, seq, "admit", reason, need, view.pool.num_free)
        start = seq.num_computed_tokens if seq.status is Status.SWAPPED else cached
        fixed = seq.request.sampling.deterministic
        return WorkItem(seq.id, Span(start, seq.num_tokens), home=home, numerics="fixed" if fixed else "fast")
