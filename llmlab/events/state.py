"""The reducer: the state of a run as a fold of its events.

The live engine computes `state_hash` from its own objects; this file computes it from events alone. They
must agree at every StepFinished: that is the truth test, and what makes time travel trustworthy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llmlab.events import catalog as ev
from llmlab.types import QUEUED, Home, Status, TraceError, WorkItem

_MASK = (1 << 64) - 1
_STATUS_CODE = {status: code for code, status in enumerate(Status)}


def mix(number: int) -> int:
    """64 bits that look random, from an integer of any size; the same on every machine and Python version."""
    number = (number * 0xFF51AFD7ED558CCD) & _MASK
    number = ((number ^ (number >> 32)) * 0xC4CEB9FE1A85EC53) & _MASK
    return number ^ (number >> 29)


def request_fingerprint(number: int, status: Status, num_tokens: int, num_computed: int, last_token: int,
                        home: Home = "device", cursor: int = 0) -> int:  # fmt: skip
    """What `state_hash` (the XOR over all requests) says about one request."""
    lengths = _STATUS_CODE[status] | num_tokens << 3 | num_computed << 33
    place = 0 if home == "device" else (cursor + 1) * 0xA0761D6478BD642F
    # `mix`, written out: this is counted for every running request in every step
    code = (lengths + number * 0x9E3779B97F4A7C15 + last_token * 0xD1B54A32D192ED03 + place) * 0xFF51AFD7ED558CCD & _MASK
    code = ((code ^ (code >> 32)) * 0xC4CEB9FE1A85EC53) & _MASK
    return code ^ (code >> 29)


def computed_after(item: WorkItem, computed: int) -> int:
    """Computed tokens of a request once `item` is planned. Overwriting computes nothing that was not there."""
    return item.tokens[1] if item.kv_write == "append" else max(computed, item.tokens[1])


def block_fingerprint(number: int, index: int, block_id: int) -> int:
    """What `blocks_hash` says about one entry of a block table."""
    return mix((block_id << 32 | index) + number * 0x9E3779B97F4A7C15)


def cached_fingerprint(block_id: int, block_hash: str) -> int:
    """What `blocks_hash` says about one findable block."""
    return mix(int(block_hash[:16], 16) + block_id * 0xD1B54A32D192ED03)


@dataclass
class RequestState:
    """One request as the events tell it."""

    id: str
    number: int
    arrival: float
    num_prompt_tokens: int
    last_token: int
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    waiting_reason: str = "behind"
    fingerprint: int = 0
    home: Home = "device"
    cursor: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_token_ids)


@dataclass
class LabState:
    """The whole run at one instant. `apply` folds one more event in."""

    t: float = 0.0
    step: int = -1
    seq: int = -1
    requests: dict[str, RequestState] = field(default_factory=dict)
    cached: dict[int, str] = field(default_factory=dict)
    state_hash: int = 0
    blocks_hash: int = 0
    items: tuple[object, ...] = ()

    # ------------------------------------------------------------------------------- views
    @property
    def running(self) -> list[RequestState]:
        return [r for r in self.requests.values() if r.status is Status.RUNNING]

    @property
    def waiting(self) -> list[RequestState]:
        return [r for r in self.requests.values() if r.status in QUEUED]

    @property
    def block_refs(self) -> dict[int, int]:
        """Reference count of every block in use (from level 3 on)."""
        refs: dict[int, int] = {}
        for request in self.requests.values():
            for block in request.block_ids:
                refs[block] = refs.get(block, 0) + 1
        return refs

    # ------------------------------------------------------------------------------- fold
    def apply(self, event: ev.Event) -> None:
        """Fold one event in. Events that change no state only move the time."""
        self.t, self.seq = event.t, event.seq
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event)

    def apply_all(self, events: Iterable[ev.Event]) -> LabState:
        for event in events:
            self.apply(event)
        return self

    def request(self, name: str | None) -> RequestState:
        if name not in self.requests:
            raise TraceError("request", name, "is not in this trace", f"Known: {', '.join(list(self.requests)[:20])}.")
        return self.requests[name]

    def touch(self, request: RequestState) -> None:
        """Bring the hash up to date after `request` changed."""
        new = request_fingerprint(request.number, request.status, request.num_tokens,
                                  request.num_computed_tokens, request.last_token, request.home, request.cursor)  # fmt: skip
        self.state_hash ^= request.fingerprint ^ new
        request.fingerprint = new

    def toggle_block(self, request: RequestState, index: int, block_id: int) -> None:
        self.blocks_hash ^= block_fingerprint(request.number, index, block_id)


def _arrived(state: LabState, event: ev.RequestArrived) -> None:
    spec = event.spec
    state.requests[spec.id] = request = RequestState(
        spec.id, spec.number, spec.arrival, len(spec.prompt_token_ids), spec.prompt_token_ids[-1]
    )
    state.touch(request)


def _waiting(state: LabState, event: ev.RequestWaiting) -> None:
    state.request(event.request).waiting_reason = event.reason


def _admitted(state: LabState, event: ev.RequestAdmitted) -> None:
    request = state.request(event.request)
    request.status = Status.RUNNING
    request.num_computed_tokens = request.num_cached_tokens = event.num_cached_tokens
    request.home = event.home
    state.touch(request)


def _preempted(state: LabState, event: ev.RequestPreempted) -> None:
    request = state.request(event.request)
    request.num_preemptions += 1
    request.status = Status.SWAPPED if event.mode == "swap" else Status.PREEMPTED
    if event.mode == "recompute":
        request.num_computed_tokens = 0
    request.home, request.cursor = "device", 0
    state.touch(request)


def _resumed(state: LabState, event: ev.RequestResumed) -> None:
    request = state.request(event.request)
    request.status, request.home = Status.RUNNING, event.home
    state.touch(request)


def _rehomed(state: LabState, event: ev.RequestRehomed) -> None:
    request = state.request(event.request)
    request.home, request.cursor = event.home, 0
    state.touch(request)


def _planned(state: LabState, event: ev.StepPlanned) -> None:
    state.step, state.items = event.step, event.items
    for item in event.items:
        request = state.request(item.request)
        if item.halfway and item.layers is not None:
            request.cursor = item.layers[1]
        else:
            request.num_computed_tokens, request.cursor = computed_after(item, request.num_computed_tokens), 0
        state.touch(request)


def _released(state: LabState, event: ev.TokensReleased) -> None:
    request = state.request(event.request)
    request.output_token_ids.extend(event.token_ids)
    request.last_token = event.token_ids[-1]
    state.touch(request)


def _rolled_back(state: LabState, event: ev.RolledBack) -> None:
    request = state.request(event.request)
    request.num_computed_tokens = event.num_computed_tokens
    state.touch(request)


def _finished(state: LabState, event: ev.RequestFinished) -> None:
    request = state.request(event.request)
    request.status, request.finish_reason = Status.FINISHED, event.reason
    request.num_computed_tokens, request.home, request.cursor = 0, "device", 0
    state.touch(request)


def _reserved(state: LabState, event: ev.BlocksReserved) -> None:
    request = state.request(event.request)
    for offset, block in enumerate(event.block_ids):
        state.toggle_block(request, event.start + offset, block)
    request.block_ids.extend(event.block_ids)


def _replaced(state: LabState, event: ev.BlockReplaced) -> None:
    request = state.request(event.request)
    state.toggle_block(request, event.index, event.old)
    state.toggle_block(request, event.index, event.new)
    request.block_ids[event.index] = event.new


def _blocks_released(state: LabState, event: ev.BlocksReleased) -> None:
    request = state.request(event.request)
    for index in range(event.keep, len(request.block_ids)):
        state.toggle_block(request, index, request.block_ids[index])
    del request.block_ids[event.keep :]


def _cached(state: LabState, event: ev.BlockCached) -> None:
    state.cached[event.block_id] = event.hash
    state.blocks_hash ^= cached_fingerprint(event.block_id, event.hash)


def _evicted(state: LabState, event: ev.BlockEvicted) -> None:
    state.cached.pop(event.block_id, None)
    state.blocks_hash ^= cached_fingerprint(event.block_id, event.hash)


def _step_finished(state: LabState, event: ev.StepFinished) -> None:
    state.step = max(state.step, event.step)


_HANDLERS: dict[type[ev.Event], Callable[[LabState, Any], None]] = {
    ev.RequestArrived: _arrived,
    ev.RequestWaiting: _waiting,
    ev.RequestAdmitted: _admitted,
    ev.RequestPreempted: _preempted,
    ev.RequestResumed: _resumed,
    ev.RequestRehomed: _rehomed,
    ev.StepPlanned: _planned,
    ev.StepFinished: _step_finished,
    ev.TokensReleased: _released,
    ev.RolledBack: _rolled_back,
    ev.RequestFinished: _finished,
    ev.BlocksReserved: _reserved,
    ev.BlockReplaced: _replaced,
    ev.BlocksReleased: _blocks_released,
    ev.BlockCached: _cached,
    ev.BlockEvicted: _evicted,
}
