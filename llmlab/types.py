"""The nouns of llmlab, one page. Floor: just above `roofline`; imports neither torch nor any other floor.

A request's tokens live through `proposed -> committed -> released`; the engine's one unit of work is a
`WorkItem`: a span of tokens times a span of layers. There are no phases: prefill, decode, chunk,
verification and score are all spans. `Cost` is the one currency, predicted or measured.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as AbstractSequence
from enum import StrEnum
from types import NoneType
from typing import Any, Literal, NamedTuple

import msgspec

Json = Any


# ----------------------------------------------------------------------------------------- errors
class LabError(ValueError):
    """An error that a user can cause: names the field, shows the value, says the way out."""

    def __init__(self, field: str, value: object, problem: str, way_out: str = "") -> None:
        self.field, self.value, self.problem, self.way_out = field, value, problem, way_out
        shown = repr(value)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        super().__init__(f"{field}={shown}: {problem}." + (f" {way_out}" if way_out else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.problem, self.way_out)


class ConfigError(LabError):
    """A configuration field is wrong."""


class RequestError(LabError):
    """A request cannot be served; whatever else runs goes on."""


class ModelError(LabError):
    """A model cannot be found, read or run."""


class TraceError(LabError):
    """A trace file cannot be read or written."""


class PolicyError(LabError):
    """A policy broke its contract; the core falls back to the default."""


def unknown_name(field: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not registered, with the nearest known ones."""
    names = sorted(set(known))
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return ConfigError(field, name, "unknown name", f"{hint}Known: {', '.join(names)}.")


# ------------------------------------------------------------------------------------------ spans
class Span(NamedTuple):
    """A half-open range [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


# ------------------------------------------------------------------------------- what is asked for
_UNIT = "Choose a value in [0, 1]."


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop; names and meanings are vLLM's.

    `temperature=0` is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch the filter off.
    `seed=None` keys the random numbers by the engine's seed and the request's id. `deterministic` asks for the same
    tokens whatever runs beside the request, at some cost (see `decoding.verified`).
    Raises RequestError for values outside their range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        self._normalise()
        self._check_counts()
        self._check_floats()

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop)
        msgspec.structs.force_setattr(self, "stop", stop)
        msgspec.structs.force_setattr(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        for text in stop:
            if not isinstance(text, str) or not text:
                raise RequestError("stop", text, "must be a non-empty string", "Leave it out to switch it off.")

    def _check_counts(self) -> None:
        _integer("n", self.n, 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        _integer("top_k", self.top_k, -1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", self.min_tokens, f"is above max_tokens={self.max_tokens}",
                               "Lower min_tokens or raise max_tokens.")
        if self.seed is not None and not _is_int(self.seed):
            raise RequestError("seed", self.seed, "must be an integer of 64 bits or None",
                               "None leaves it to the engine's seed.")
        for name, meaning in (("ignore_eos", "True generates past the end."), ("deterministic", "True asks for it.")):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, getattr(self, name), "must be True or False", meaning)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)

    def _check_floats(self) -> None:
        _number("temperature", self.temperature, 0.0, math.inf, "Use 0 for greedy, about 1 to sample.")
        _number("top_p", self.top_p, 0.0, 1.0, _UNIT)
        if self.top_p == 0.0:
            raise RequestError("top_p", 0.0, "keeps no token at all", "Use a value in (0, 1].")
        _number("min_p", self.min_p, 0.0, 1.0, _UNIT)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0, "Choose a value in [-2, 2].")
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "Choose a value in [-2, 2].")
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 switches it off.")
        if self.repetition_penalty == 0.0:
            raise RequestError("repetition_penalty", 0.0, "divides by zero", "1 switches it off.")
        if not isinstance(self.logit_bias, (Mapping, NoneType)):
            raise RequestError("logit_bias", self.logit_bias, "must map token ids to numbers",
                               "Write {token_id: bias}.")
        for token, bias in (self.logit_bias or {}).items():
            _integer("logit_bias", token, 0)
            _number(f"logit_bias[{token}]", bias, -math.inf, math.inf, "Give a number; -100 all but forbids a token.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63  # as a log holds it


def _integer(field: str, value: object, low: int) -> None:
    if not _is_int(value):
        raise RequestError(field, value, "must be an integer of 64 bits", f"Give {low} or more.")
    if value < low:  # type: ignore[operator]
        raise RequestError(field, value, f"must be at least {low}", f"Give {low} or more.")


def _tuple(field: str, value: object) -> tuple[Any, ...]:
    if value is not None and not isinstance(value, Iterable):
        raise RequestError(field, value, "must be a list", f"Write {field}=[...].")
    return () if value is None else tuple(value)


def _number(field: str, value: object, low: float, high: float, way_out: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RequestError(field, value, "must be a number", way_out)
    if not (math.isfinite(value) if isinstance(value, float) else _is_int(value)):
        raise RequestError(field, value, "must be a finite number", way_out)
    if not low <= value <= high:
        raise RequestError(field, value, f"must lie in [{low:g}, {high:g}]", way_out)


class Request(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a client asked for. `number` counts arrivals and breaks every tie; `arrival` in seconds.

    `fork_of` names the sibling whose prompt KV this request shares (parallel sampling, `n > 1`).
    """

    id: str
    number: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    arrival: float = 0.0
    priority: int = 0
    deadline: float | None = None
    session: str | None = None
    program: str | None = None
    fork_of: str | None = None
    max_total_tokens: int = 0  # prompt + output may never exceed this (model length, pool size, max_tokens)
    eos_token_ids: tuple[int, ...] = ()
    metadata: Mapping[str, Json] = {}

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class Status(StrEnum):
    """Where a request stands. WAITING, PREEMPTED and SWAPPED stand in the queue; RUNNING owns device memory."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    SWAPPED = "swapped"
    FINISHED = "finished"


QUEUED = (Status.WAITING, Status.PREEMPTED, Status.SWAPPED)
MAX_NODES = 63  # of a tree of drafts: which of them a node attends to is one positive int64
FinishReason = Literal["stop", "length", "abort", "error"]
Home = Literal["device", "cpu"]  # where a request's KV lies: in the device's pool or in the host's


# --------------------------------------------------------------------------------- what is executed
# gc=False: no cycle can come through these, and a log of millions of them would keep the collector busy for a third of a
# simulation's time.
class WorkItem(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The atom of work: `tokens` x `layers` of one request.

        position:  0 ........ tokens.start ........ tokens.stop ....
                   KV exists  computed by this item  not yet

    `layers=None` means all of them, from the embedding on. `emit="sample"` asks for the token at position `tokens.stop`.

    `home` says where the KV lies, `device` where the attention runs; linear layers run on the device always.

        home device, device device    attention over device blocks
        home cpu,    device cpu       attention on the CPU, over host blocks
        home cpu,    device device    attention on the device; KV passes through a staging layer, from and to host blocks

    A row on the CPU may pass only some layers in a step. `layers=Span(a, b)` goes on behind the attention of layer a - 1,
    which an earlier step began, and begins the attention of layers a .. b - 1; it waits for each of them but, with
    `emit="none"`, the last. So `Span(l, l + 1)` waits for no attention of its own step, and after the last layer
    `Span(L, L)` takes up what is left: the token. `layers=None` starts the token afresh, whatever was begun.

    The last `len(drafts)` tokens of the span are proposals: the item verifies them and emits those that hold, and one
    more. With `mask="tree"` they are the nodes of a tree: `parents[i]` is the index of the draft that draft i follows,
    -1 for the last committed token. `propose` asks for that many drafts behind what the item emits.
    """

    request: str
    tokens: Span
    layers: Span | None = None
    device: Literal["device", "cpu"] = "device"
    home: Home = "device"
    lane: int = 0
    mask: Literal["causal", "tree", "block"] = "causal"
    kv_write: Literal["append", "overwrite", "none"] = "append"
    numerics: Literal["fast", "fixed"] = "fast"
    inputs: Literal["ids", "embeddings"] = "ids"
    adapter: str | None = None
    emit: Literal["sample", "score", "hidden", "none"] = "sample"
    group: str | None = None
    drafts: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    propose: int = 0

    @property
    def num_tokens(self) -> int:
        return self.tokens[1] - self.tokens[0]

    @property
    def halfway(self) -> bool:
        """Whether its token stays half-way, with an attention running."""
        return self.layers is not None and self.emit == "none"

    def passing(self, layer: int, num_layers: int) -> WorkItem:
        """The same work on the CPU, but this step only begins `layer`'s attention; at `num_layers` it ends instead."""
        last = layer == num_layers
        return msgspec.structs.replace(self, device="cpu", layers=Span(layer, layer if last else layer + 1),
                                       emit=self.emit if last else "none")  # fmt: skip

    @property
    def num_committed(self) -> int:
        """Tokens of the span that are no proposals."""
        return self.tokens[1] - self.tokens[0] - len(self.drafts)

    @property
    def reach(self) -> int:
        """Tokens whose KV blocks the item writes: its span, and the drafts that it asks for."""
        return self.tokens[1] + self.propose

    def shortened(self, num_tokens: int) -> WorkItem:
        """The same work, only its first `num_tokens` tokens. Drafts go first; an item that was cut further emits
        nothing."""
        start, stop = self.tokens
        if start + num_tokens >= stop:
            return self
        kept = start + num_tokens - (stop - len(self.drafts))
        cut = Span(start, start + num_tokens)
        if kept < 0:
            return msgspec.structs.replace(self, tokens=cut, emit="none", drafts=(), parents=(), propose=0, mask="causal")
        mask = self.mask if kept else "causal"
        return msgspec.structs.replace(self, tokens=cut, drafts=self.drafts[:kept], parents=self.parents[:kept], mask=mask)


class Move(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Copies of whole KV blocks that must happen before the step's items run.

    `copy`: device -> device (copy-on-write). `swap_out`: device -> host. `swap_in`: host -> device.
    """

    kind: Literal["copy", "swap_out", "swap_in"]
    request: str
    src: tuple[int, ...]
    dst: tuple[int, ...]


class StepPlan(msgspec.Struct, frozen=True, gc=False):
    """What one step does: the items in order of priority, and the block copies before them."""

    step: int
    items: tuple[WorkItem, ...]
    moves: tuple[Move, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Log-probability (natural log) and rank of a chosen token, and the `logprobs` most likely ones."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class ItemResult(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What an item produced: the sampled tokens, and log-probabilities where they were asked for.

    Of an item with drafts `token_ids` are those that held and one more. `drafts` and `parents` are proposed for the next
    item; `draft_error` says why there are none although some were asked for.
    """

    request: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    drafts: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    draft_error: str | None = None


class Durations(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Seconds. `execute` is the executor's time; `schedule` and `commit` the core's own. `padded_tokens` were computed
    only to fill a fixed shape."""

    execute: float = 0.0
    schedule: float = 0.0
    commit: float = 0.0
    parts: Mapping[str, float] = {}
    padded_tokens: int = 0


class ResourceSpan(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One stretch of work on one resource (seconds of the run's clock)."""

    resource: str
    start: float
    end: float
    op: str
    request: str | None = None


class ExpertDispatch(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where one layer's experts were computed in a step. `fetched` ones came over the host link for it; `deferred` ones are
    added one layer later."""

    layer: int
    device: tuple[int, ...] = ()
    fetched: tuple[int, ...] = ()
    cpu: tuple[int, ...] = ()
    deferred: tuple[int, ...] = ()


class WeightMove(msgspec.Struct, frozen=True, omit_defaults=True):
    """One expert's way to the device. Bytes; seconds on the link or in the copying thread. `evicted`: (layer, expert) of
    the one that made room, `unused` if it had never been of use."""

    layer: int
    expert: int
    reason: Literal["initial", "demand", "prefetch"]
    num_bytes: int
    seconds: float
    evicted: tuple[int, int] | None = None
    unused: bool = False


DEVICE, DEVICE_MEMORY = "device", "device memory"  # what a step can lose beside the "cpu" that attends to host KV


class StepResult(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What came back from the executor for one StepPlan. `lost`: resources that died and will do no more: "cpu", "device" (then
    nothing runs any more), or "device memory" (what a device held, which runs again; nothing came of the step). `why` tells."""

    step: int
    results: tuple[ItemResult, ...]
    durations: Durations = Durations()
    spans: tuple[ResourceSpan, ...] = ()
    experts: tuple[ExpertDispatch, ...] = ()
    weight_moves: tuple[WeightMove, ...] = ()
    lost: tuple[str, ...] = ()
    why: str = ""


# ------------------------------------------------------------------------------------------- costs
class Traffic(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Bytes moved, by path."""

    hbm: float = 0.0
    h2d: float = 0.0
    d2h: float = 0.0
    disk: float = 0.0
    net: float = 0.0


class Cost(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The one currency: seconds, floating-point operations, bytes, joules, and what bounds them."""

    seconds: float
    flops: float = 0.0
    bytes: Traffic = Traffic()
    joules: float = 0.0
    bound: str = ""


# ------------------------------------------------------------------------------- a request's life
class Sequence:
    """The tokens of one request and how far each is computed. Only the scheduler mutates it.

        token_ids:  [ prompt ............ | output ......... ] + num_pending tokens in flight
                     0 .. num_computed_tokens: KV written, or being written by a step in flight

    `num_pending` counts sampled tokens that the executor owns but the scheduler has not seen yet. `home` says where the
    KV lies. `cursor`: layers whose attention has begun for a token that is half-way (0: none is). `device_bound`: it ran
    out of host memory and may live on the device only. `drafts` (with their `parents`) are proposed and not committed;
    `acceptance` is the moving average of the share of them that holds.
    """

    __slots__ = ("acceptance", "block_hashes", "cause", "cursor", "device_bound", "draft_parents", "drafts", "epoch",
                 "finish_reason", "home", "inflight_step", "key", "logged_wait",
                 "num_cached_tokens", "num_computed_tokens", "num_pending", "num_preemptions",
                 "num_prompt_tokens", "request", "status", "token_ids", "waiting_reason")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.status = Status.WAITING
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_pending = 0
        self.num_preemptions = 0
        self.epoch = 0
        self.drafts: tuple[int, ...] = ()
        self.draft_parents: tuple[int, ...] = ()
        self.acceptance: float | None = None
        self.inflight_step = -1
        self.finish_reason: FinishReason | None = None
        self.block_hashes: list[bytes] = []
        self.key: tuple[Any, ...] = ()
        self.cause = -1
        self.waiting_reason = ""
        self.logged_wait = ""
        self.home: Home = "device"
        self.cursor = 0
        self.device_bound = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, counting those in flight."""
        return len(self.token_ids) + self.num_pending

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED


class Commit(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a decoding method makes of a result: tokens to append, and what is proposed from now on.

    KV is kept for `truncate_to` tokens at most (None: for all that were computed). `final=False`: the KV that was
    written may still be overwritten, so nobody else may find it.
    """

    token_ids: tuple[int, ...]
    truncate_to: int | None = None
    drafts: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    final: bool = True


def total_tokens(items: AbstractSequence[WorkItem]) -> int:
    """Query tokens over all items."""
    return sum(item.tokens[1] - item.tokens[0] for item in items)
