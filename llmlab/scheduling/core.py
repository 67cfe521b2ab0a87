"""What all of the scheduler shares: its state, and the few changes to it that more than one part makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from llmlab.decoding.draft_book import DraftBook
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.spans import SpanLog
from llmlab.memory.kv_manager import KVManager
from llmlab.scheduling.journal import Journal, StateHash
from llmlab.scheduling.queue import WaitingQueue
from llmlab.scheduling.seamcalls import Seam, checked_key, unchecked
from llmlab.scheduling.view import Viewer
from llmlab.seams import (
    Admission,
    Composer,
    CostModel,
    DecodingMethod,
    DraftPolicy,
    EngineView,
    Limits,
    Ordering,
    Placement,
    StopRule,
    Tiering,
    Victim,
)  # fmt: skip
from llmlab.types import QUEUED, ConfigError, FinishReason, Home, ItemResult, Sequence, Span, Status, WorkItem

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
    """How many drafts to propose: the policy, and the book of what it is told. `source` is the name of what proposes them; `cost`
    prices plans together with their drafting."""

    seam: Seam[DraftPolicy]
    book: DraftBook
    source: str
    cost: CostModel


class InFlight(msgspec.Struct, frozen=True, gc=False):
    """An item that was submitted: whose it is, and in which life (`epoch`) of its owner."""

    seq: Sequence
    item: WorkItem
    epoch: int


class Update(msgspec.Struct, frozen=True, gc=False):
    """What one commit means to a client."""

    request: str
    token_ids: tuple[int, ...]
    result: ItemResult | None = None
    finish_reason: FinishReason | None = None


def unseated(seam: str, choice: Any) -> Any:
    raise ConfigError(seam, choice, "cannot be changed: this scheduler was built without a way to make policies")


def shortage_of(home: Home) -> str:
    """What a request waits for that finds no memory at its home."""
    return "memory" if home == "device" else "host_memory"


class Core:
    """See the module's text; the parts of the scheduler are built on it. `view_cap` bounds how much of the queue policies
    see; `num_alternatives` how many rejected options a Decision keeps; `reseat` makes the guarded seam for a choice of
    `reconfigure`."""

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

    @property
    def has_work(self) -> bool:
        return bool(self.sequences) or bool(self.inflight)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is half done: nobody short of memory, no copy to make, no block to withdraw."""
        return not self._short and not self.memory.moves and self.memory.is_settled

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

    def _stop_running(self, seq: Sequence) -> None:
        del self.running[seq.id]
        self._short.pop(seq.id, None)

    def _drop_kv(self, victim: Sequence) -> None:
        """Give up all memory of a request; it will be computed again."""
        self.memory.release(victim, victim.cause, self._inflight_step(victim))
        self.log.emit(ev.KVDropped, victim.id, victim.cause, num_tokens=victim.num_computed_tokens)
        victim.status, victim.num_computed_tokens = Status.PREEMPTED, 0

    def _begin_life(self, victim: Sequence) -> None:
        """What steps in flight still bring for its KV is nobody's."""
        victim.home, victim.cursor = "device", 0
        victim.epoch += 1
        victim.num_preemptions += 1
        victim.waiting_reason, victim.logged_wait = "", ""
        self.hash.touch(victim)

    def _inflight_step(self, seq: Sequence) -> int | None:
        return seq.inflight_step if seq.inflight_step in self.inflight else None

    def _hits(self, seq: Sequence) -> list[int]:
        return self.memory.match(seq) if seq.status is not Status.SWAPPED else []

    def _being_verified(self, seq: Sequence) -> bool:
        """Whether a step in flight computes drafts of it."""
        return bool(seq.num_pending) and seq.num_computed_tokens > len(seq.token_ids) + seq.num_pending - 1

    def _forget_drafts(self, seq: Sequence, cause: int) -> None:
        """Drafts do not outlive a request's stay on the device; of their KV nothing is kept."""
        seq.drafts = seq.draft_parents = ()
        if not seq.num_pending:
            self._cut_back(seq, len(seq.token_ids) - 1, cause)

    def _cut_back(self, seq: Sequence, num_tokens: int, cause: int) -> None:
        """Keep the KV of `num_tokens` tokens at most, and blocks for the tokens and drafts that are known."""
        wasted = seq.num_computed_tokens - num_tokens
        if wasted <= 0:
            return
        seq.num_computed_tokens = num_tokens
        self.log.emit(ev.RolledBack, seq.id, cause, num_computed_tokens=num_tokens, tokens_wasted=wasted)
        self.memory.truncate(seq, len(seq.token_ids) + len(seq.drafts), cause, self._inflight_step(seq))

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
