"""Every event there is. Frozen structs of plain data, never live objects or tensors.

Header of each: `seq` (position in the log), `t` (seconds of the run's clock), `step` (the step being
planned or collected, -1 before the first), `instance`, `request`, and `cause`: the `seq` of the event
that led to this one, -1 if it came from outside.

Levels (class attribute `LEVEL`): 0 metrics, 1 lifecycle, 2 decisions (the default), 3 blocks, 4 kernels.
A log of level L keeps the events of level L and below. `SCHEMA` changes when a field changes meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from llmlab.types import Cost, Durations, FinishReason, Home, ItemResult, Move, Request, WorkItem

SCHEMA = 1


class Event(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="event", kw_only=True, gc=False):
    """The header common to all events."""

    LEVEL: ClassVar[int] = 1

    seq: int
    t: float
    step: int = -1
    instance: int = 0
    request: str | None = None
    cause: int = -1


# ----------------------------------------------------------------------------------------- meta
class RunStarted(Event, frozen=True, tag=True):
    """The first event of every run: the effective configuration and where it ran."""

    LEVEL: ClassVar[int] = 0
    schema: int = 0  # set to SCHEMA below: a default would be left out of files, and read as any later schema
    mode: Literal["measured", "simulated"] = "measured"
    config: Mapping[str, Any] = {}
    code: str = ""
    seed: int = 0
    hardware: Mapping[str, Any] = {}
    model: Mapping[str, Any] = {}
    level: int = 2

    def __post_init__(self) -> None:
        if self.schema == 0:
            msgspec.structs.force_setattr(self, "schema", SCHEMA)


class PolicyFailed(Event, frozen=True, tag=True):
    """A plug-in raised, overran or answered nonsense; the default decided instead."""

    LEVEL: ClassVar[int] = 1
    seam: str
    policy: str
    error: str
    fallback: str = ""


class Reconfigured(Event, frozen=True, tag=True):
    """Somebody changed the configuration between two steps. `changes`: fields of EngineConfig; plug-ins by name."""

    LEVEL: ClassVar[int] = 0
    now: float
    changes: Mapping[str, Any]


class ResourceLost(Event, frozen=True, tag=True):
    """A resource died. "cpu", the worker that attends to host KV: the step's rows were computed elsewhere. "device memory", all
    KV of a device that runs again: every request begins anew. "device": every request ends."""

    LEVEL: ClassVar[int] = 0
    resource: str
    why: str = ""


class InvariantViolated(Event, frozen=True, tag=True):
    """The integrity check found a contradiction: a bug in the core, never in a policy."""

    LEVEL: ClassVar[int] = 0
    what: str


# ------------------------------------------------------------------------------------ lifecycle
class RequestArrived(Event, frozen=True, tag=True):
    """A request entered the queue. `spec` is all that a replay needs to ask for it again."""

    LEVEL: ClassVar[int] = 0
    spec: Request


class RequestRefused(Event, frozen=True, tag=True):
    """A request that can never be served was turned away; `reason` says why and the way out."""

    LEVEL: ClassVar[int] = 0
    reason: str


class RequestWaiting(Event, frozen=True, tag=True):
    """Why a queued request was not started in this step; logged when the reason changes."""

    reason: Literal["behind", "seats", "memory", "budget", "composer", "sibling", "policy", "in_flight", "host_memory",
                    "placement"]  # fmt: skip
    detail: str = ""
    behind: tuple[str, ...] = ()


class RequestAdmitted(Event, frozen=True, tag=True):
    """A request got its first memory (again, after recompute). Hits count as computed."""

    LEVEL: ClassVar[int] = 1
    num_cached_tokens: int = 0
    num_tokens: int = 0
    attempt: int = 0
    source: Literal["prefix", "fork"] = "prefix"
    home: Home = "device"


class RequestPreempted(Event, frozen=True, tag=True):
    """A running request lost its device memory to another one, or with the device (`beneficiary` None; swapped ones, too)."""

    LEVEL: ClassVar[int] = 1
    mode: Literal["recompute", "swap"]
    tokens_lost: int
    beneficiary: str | None = None
    num_blocks: int = 0


class RequestResumed(Event, frozen=True, tag=True):
    """A swapped request runs again: with all its KV back on the device, or where its KV lies, on the host."""

    LEVEL: ClassVar[int] = 1
    num_tokens: int
    num_blocks: int = 0
    home: Home = "device"


class RequestRehomed(Event, frozen=True, tag=True):
    """A running request's KV goes to the other tier; it goes on there."""

    LEVEL: ClassVar[int] = 1
    home: Home
    num_blocks: int = 0


class FinishRequested(Event, frozen=True, tag=True):
    """The outside ended a request between two steps: an abort, or a stop string in its text."""

    LEVEL: ClassVar[int] = 1
    reason: FinishReason
    detail: str = ""


class FirstToken(Event, frozen=True, tag=True):
    """The first output token was committed."""

    LEVEL: ClassVar[int] = 0


class TokensReleased(Event, frozen=True, tag=True):
    """Output tokens became final and visible to the client: at `t`, or each at its own of `times` where several steps of a
    simulation are logged at once."""

    LEVEL: ClassVar[int] = 1
    token_ids: tuple[int, ...]
    times: tuple[float, ...] = ()


class RequestFinished(Event, frozen=True, tag=True):
    """The end of a request; its memory is free again."""

    LEVEL: ClassVar[int] = 0
    reason: FinishReason
    num_output_tokens: int
    num_preemptions: int = 0
    detail: str = ""


# --------------------------------------------------------------------------------------- memory
class ReserveFailed(Event, frozen=True, tag=True):
    """A running request asked for blocks that were not there; `holders` own the most."""

    LEVEL: ClassVar[int] = 2
    need: int
    free: int
    quarantined: int = 0
    holders: tuple[tuple[str, int], ...] = ()


class PrefixMatched(Event, frozen=True, tag=True):
    """Cached blocks were found and pinned for a request."""

    LEVEL: ClassVar[int] = 2
    num_tokens: int
    num_blocks: int


class BlocksReserved(Event, frozen=True, tag=True):
    """Blocks appended to a request's table (pinned hits first, then fresh ones)."""

    LEVEL: ClassVar[int] = 3
    start: int
    block_ids: tuple[int, ...]
    shared: int = 0


class BlockReplaced(Event, frozen=True, tag=True):
    """Copy-on-write: entry `index` of the table now points at `new`."""

    LEVEL: ClassVar[int] = 3
    index: int
    old: int
    new: int


class BlocksReleased(Event, frozen=True, tag=True):
    """The last `len(block_ids)` entries of a table were given up, tail first."""

    LEVEL: ClassVar[int] = 3
    block_ids: tuple[int, ...]
    keep: int = 0
    quarantine: bool = False


class BlockCached(Event, frozen=True, tag=True):
    """A full block's content became findable under its hash (hex)."""

    LEVEL: ClassVar[int] = 3
    block_id: int
    hash: str


class BlockEvicted(Event, frozen=True, tag=True):
    """A cached, unused block was given away; its content is no longer findable."""

    LEVEL: ClassVar[int] = 3
    block_id: int
    hash: str


class KVMoved(Event, frozen=True, tag=True):
    """KV of a request went between tiers."""

    LEVEL: ClassVar[int] = 2
    bytes: int
    src: str
    dst: str
    num_blocks: int = 0


class KVDropped(Event, frozen=True, tag=True):
    """KV was thrown away and will have to be computed again."""

    LEVEL: ClassVar[int] = 2
    num_tokens: int


# ----------------------------------------------------------------------------------------- steps
class StepPlanned(Event, frozen=True, tag=True):
    """What the step will do, and what the cost model expects of it. `now` is what the policies saw."""

    LEVEL: ClassVar[int] = 2
    now: float
    items: tuple[WorkItem, ...]
    moves: tuple[Move, ...] = ()
    num_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    free_blocks: int = 0
    predicted: Cost | None = None


class StepFinished(Event, frozen=True, tag=True):
    """What came back. `state_hash` is the live engine's; a reducer must arrive at the same.

    Below level 2 it is 0, because plans are not recorded. `blocks_hash` covers block tables and the prefix cache;
    0 below level 3.
    """

    LEVEL: ClassVar[int] = 1
    plan: int
    results: tuple[ItemResult, ...] = ()
    measured: Durations = Durations()
    state_hash: int = 0
    blocks_hash: int = 0
    num_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    used_blocks: int = 0
    lost: tuple[str, ...] = ()
    lost_why: str = ""


class Leapt(Event, frozen=True, tag=True):
    """Below level 2, a simulation takes steps in which nothing changes at once: `num_steps` up to and with `step`, of
    `num_tokens` query tokens and `seconds` together. `used_blocks` is the most after any of them."""

    LEVEL: ClassVar[int] = 1
    num_steps: int
    num_tokens: int
    seconds: float
    used_blocks: int


class Span(Event, frozen=True, tag=True):
    """Work on one resource between two instants of the run's clock."""

    LEVEL: ClassVar[int] = 4
    resource: str
    start: float
    end: float
    op: str


class Idle(Event, frozen=True, tag=True):
    """A resource had nothing to do."""

    LEVEL: ClassVar[int] = 4
    resource: str
    start: float
    end: float
    why: str = ""


class JoinWait(Event, frozen=True, tag=True):
    """The device had nothing to do until the host's share of the step was back: `op`, of `request` if of a single one."""

    LEVEL: ClassVar[int] = 4
    start: float
    end: float
    op: str


class ExpertsDispatched(Event, frozen=True, tag=True):
    """Where one layer's experts were computed in a step: resident on the device, fetched for it, on the CPU, or there with
    the result added one layer later."""

    LEVEL: ClassVar[int] = 3
    layer: int
    device: tuple[int, ...] = ()
    fetched: tuple[int, ...] = ()
    cpu: tuple[int, ...] = ()
    deferred: tuple[int, ...] = ()


class ExpertFetched(Event, frozen=True, tag=True):
    """An expert came to the device. `seconds` on the link."""

    LEVEL: ClassVar[int] = 3
    layer: int
    expert: int
    bytes: int
    reason: Literal["initial", "demand", "prefetch"]
    seconds: float = 0.0


class ExpertEvicted(Event, frozen=True, tag=True):
    """An expert left the device for another. `unused`: it had been brought in vain."""

    LEVEL: ClassVar[int] = 3
    layer: int
    expert: int
    unused: bool = False


# ------------------------------------------------------------------------------------- decoding
class Drafted(Event, frozen=True, tag=True):
    """Tokens were proposed for a request; nobody has verified them yet. `parents` is empty for a chain."""

    LEVEL: ClassVar[int] = 2
    token_ids: tuple[int, ...]
    parents: tuple[int, ...] = ()
    source: str = ""


class Verified(Event, frozen=True, tag=True):
    """Drafts were verified: `accepted` hold, `rejected` do not, `bonus` is the token that the verification itself
    yielded (None if the request ended before it)."""

    LEVEL: ClassVar[int] = 2
    accepted: tuple[int, ...]
    rejected: tuple[int, ...] = ()
    bonus: int | None = None
    source: str = ""


class RolledBack(Event, frozen=True, tag=True):
    """Computed tokens were cut back to `num_computed_tokens` (a sampled token had ended the request,
    or a proposal was rejected)."""

    LEVEL: ClassVar[int] = 2
    num_computed_tokens: int
    tokens_wasted: int


# ------------------------------------------------------------------------------------- decisions
class Alternative(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An option that a seam could have taken. Lower scores are better, whatever the policy."""

    option: str
    score: float | str | None = None
    feasible: bool = True
    why_not: str = ""
    predicted: Cost | None = None


class Decision(Event, frozen=True, tag=True):
    """What a policy chose at a seam, and what it could have chosen instead."""

    LEVEL: ClassVar[int] = 2
    seam: str
    policy: str
    chosen: str
    alternatives: tuple[Alternative, ...] = ()
    reason: str = ""
    predicted: Cost | None = None
    num_candidates: int = 0


AnyEvent = (
    RunStarted | PolicyFailed | Reconfigured | ResourceLost | InvariantViolated | RequestArrived | RequestRefused
    | RequestWaiting | RequestAdmitted | RequestPreempted | RequestResumed | RequestRehomed | FinishRequested
    | FirstToken | TokensReleased | RequestFinished | ReserveFailed | PrefixMatched | BlocksReserved | BlockReplaced
    | BlocksReleased | BlockCached | BlockEvicted | KVMoved | KVDropped | ExpertsDispatched | ExpertFetched
    | ExpertEvicted | StepPlanned | StepFinished | Leapt | Span | Idle | JoinWait | RolledBack
    | Decision | Drafted | Verified
)  # fmt: skip
EVENT_TYPES: dict[str, type[Event]] = {kind.__name__: kind for kind in AnyEvent.__args__}
