"""What a step brought: tokens are judged, kept or cut off, and requests end (seam E)."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from llmlab.decoding.speculative import accepted_path, tried
from llmlab.events import catalog as ev
from llmlab.scheduling.core import FINISHED, Core, InFlight, Update
from llmlab.scheduling.seamcalls import checked_commit
from llmlab.types import DEVICE_MEMORY, Commit, ItemResult, Sequence, Status, StepResult, WorkItem, total_tokens

FIRST_ACCEPTANCE = 0.6  # counts as one draft at the start of a request's moving average
ACCEPTANCE_MEMORY = 0.9  # what each newer draft leaves of it


class Collecting(Core):
    """Taking in the results of steps."""

    def commit(self, result: StepResult) -> list[Update]:
        """Take in what a step produced; the oldest step in flight first."""
        flights = self.inflight.pop(result.step)
        plan = self.plan_seq.pop(result.step, -1)
        self.log.step = result.step
        self.spans.record(result.spans, plan)
        self._journal.experts(result, plan)
        updates = self._lose(result, plan) if result.lost else []
        for flight, item_result in zip(flights, result.results, strict=True):
            update = self._commit_item(flight, item_result, plan)
            if update is not None:
                updates.append(update)
        self.memory.collected(result.step)
        if self.policies.drafting is not None:
            self.policies.drafting.book.finished(result.step, result.results, result.durations.parts, tuple(self.running))
        self._close(result, plan, total_tokens([flight.item for flight in flights]))
        return updates

    def _lose(self, result: StepResult, plan: int) -> list[Update]:
        """What died with a step, and what becomes of requests before its rows are looked at."""
        updates: list[Update] = []
        for resource in result.lost:
            cause = self.log.emit(ev.ResourceLost, None, plan, resource=resource, why=result.why)
            if resource == "cpu":
                self._viewer.cpu = False
            elif resource == DEVICE_MEMORY:
                self._begin_anew(cause)
            else:
                updates += [self._end_with(seq, result.why, cause) for seq in list(self.sequences.values())]
        return updates

    def _begin_anew(self, cause: int) -> None:
        """Nobody has KV any more: whoever had some goes back to the queue and is computed again."""
        for seq in list(self.running.values()):
            self._forget_drafts(seq, cause)
            self._journal.preempted(seq, "recompute", None, cause)
            self._drop_kv(seq)
            self._begin_life(seq)
            self._stop_running(seq)
            self._enqueue(seq, seq.request.arrival)  # an instant that a replay knows, too
        for seq in [seq for seq in self.waiting if seq.status is Status.SWAPPED]:
            self._journal.preempted(seq, "recompute", None, cause)
            self._drop_kv(seq)
            self._begin_life(seq)
        self.memory.forget_cached(cause)

    def _end_with(self, seq: Sequence, why: str, cause: int) -> Update:
        seq.cause = cause
        self._finish(seq, "error", why)
        return Update(seq.id, (), ItemResult(seq.id, error=why), "error")

    def _close(self, result: StepResult, plan: int, num_tokens: int) -> None:
        foldable = self.log.wants(ev.StepPlanned)  # without plans in the log nobody can check the hash
        state_hash = self.hash.settle() if foldable else self.hash.forget()
        self._journal.finished(result, plan, num_tokens, state_hash, len(self.running), len(self.waiting))

    def _commit_item(self, flight: InFlight, result: ItemResult, plan: int) -> Update | None:
        seq, item = flight.seq, flight.item
        seq.num_pending -= item.emit == "sample"
        if seq.status is FINISHED:
            return None
        if flight.epoch != seq.epoch and not result.token_ids and result.error is None:
            return None  # its KV is gone, and nothing came of the step
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
        if commit.truncate_to is None and commit.final and not (commit.drafts or seq.drafts or item.drafts):
            if seq.home == item.home == "device":  # the common case, at half its cost
                self.memory.commit(seq, min(item.tokens[1], len(seq.token_ids) - 1))
            return
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
            outcome, before = tried(item, path), seq.acceptance
            share = outcome.held / outcome.first_choices
            if before is None:
                seq.acceptance = (outcome.held + FIRST_ACCEPTANCE) / (outcome.first_choices + 1)
            else:
                seq.acceptance = share + ACCEPTANCE_MEMORY**outcome.first_choices * (before - share)
            if self.policies.drafting is not None:
                self.policies.drafting.book.verified(seq.id, len(item.drafts), outcome)
            self._journal.verified(item, path, accepted, self._draft_source, plan)
        if result.draft_error is not None:
            self.log.emit(ev.PolicyFailed, seq.id, plan, seam="drafts", policy=self._draft_source, error=result.draft_error,
                          fallback="no drafts")  # fmt: skip
