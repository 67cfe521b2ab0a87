"""The seams: where ideas plug in. Protocols whose docstrings are the contracts, and the frozen views they see.

Rules for every policy
- pure: the same view gives the same answer; nothing in a view may be changed or kept;
- total: an answer for every view; if it raises, overruns or answers nonsense, the default decides for that
  once, a `PolicyFailed` event says so, and the run goes on;
- lower scores and smaller keys come first, everywhere; ties fall to (arrival, number);
- the seam records: candidates, scores, winner and alternatives are logged around the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from llmlab.types import Commit, Cost, FinishReason, Home, ItemResult, Move, Request, Status, WorkItem

Key = float | int | tuple[Any, ...]


# ------------------------------------------------------------------------------------------ views
class RequestView(msgspec.Struct, frozen=True, gc=False):
    """One request as a policy may see it. Token counts; `arrival`, `deadline` in seconds.

    `num_cached_tokens` of a queued request is what the prefix cache holds for it right now (a hint). `num_tokens`
    counts the `num_pending` ones in flight, not the `drafts`, which are only proposed (`parents`: their tree, if they
    are one). `acceptance` is the moving average of the share of its drafts that held; None before the first.
    `metadata` is the client's, e.g. `{"output_len": 80}` for oracle policies. `home` and `cursor`: see `types.Sequence`.
    """

    id: str
    number: int
    arrival: float
    priority: int
    status: Status
    num_prompt_tokens: int
    num_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_blocks: int
    num_preemptions: int
    request: Request
    home: Home = "device"
    cursor: int = 0
    num_host_blocks: int = 0
    num_pending: int = 0
    drafts: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    acceptance: float | None = None

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        """Tokens whose KV is still to be computed."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.request.metadata

    @property
    def deadline(self) -> float | None:
        return self.request.deadline

    @property
    def decoding(self) -> bool:
        """Only the newest token is left to compute (a description, not a phase)."""
        return self.num_output_tokens > 0 and self.num_new_tokens == 1


class PoolView(msgspec.Struct, frozen=True, gc=False):
    """KV memory in blocks. `num_free` counts cached blocks that nobody uses, too."""

    num_blocks: int
    num_free: int
    num_quarantined: int
    num_host_blocks: int
    num_host_free: int
    block_size: int

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


class Limits(msgspec.Struct, frozen=True):
    """Hard limits of a step that no policy can exceed."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class EngineView(msgspec.Struct, frozen=True):
    """All that a policy sees: frozen and capped. `waiting` holds the head of the queue in order
    (`num_waiting` counts all); `running` is in order of admission. `consider` prices a hypothetical list of
    items and logs it as an alternative of the decision in progress. `cpu`: whether the CPU can attend to KV in host
    memory; `costs` predicts the parts of a step, one layer and one resource at a time."""

    now: float
    step: int
    waiting: tuple[RequestView, ...]
    num_waiting: int
    running: tuple[RequestView, ...]
    pool: PoolView
    limits: Limits
    consider: Callable[[str, Sequence[WorkItem]], Cost]
    cpu: bool = False
    costs: LayerCost | None = None


class Wish(msgspec.Struct, frozen=True):
    """How many tokens of prompts a placement wants in a step, at most and over all, and why."""

    prompt_tokens: int
    reason: str = ""


class Offers(msgspec.Struct, frozen=True):
    """Work that the requests' decoding methods propose, at full length. `waiting` were admitted by the
    admission policy, in queue order; they own no memory yet. `wish`: what the placement says of prompts, if it says anything; the
    built-in `chunked` honours it."""

    running: tuple[WorkItem, ...]
    waiting: tuple[WorkItem, ...]
    wish: Wish | None = None


# ------------------------------------------------------------------- A: admission and ordering
@runtime_checkable
class Ordering(Protocol):
    """Who stands where in the queue. `refresh="arrival"`: a request's key is computed once when it enters
    the queue. `refresh="step"`: every key is computed anew in every step (costs O(queue))."""

    refresh: Literal["arrival", "step"]

    def key(self, request: RequestView, now: float) -> Key: ...


class Admit(msgspec.Struct, frozen=True, gc=False):
    """Let the request in now."""

    reason: str = ""


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Leave it in the queue, with the reason as a person would say it."""

    reason: str


class Need(msgspec.Struct, frozen=True, gc=False):
    """Blocks that a queued request would take: `prompt` for what is to be computed now, `total` for the
    longest it may ever get; cached blocks that it would share are already subtracted."""

    prompt: int
    total: int


@runtime_checkable
class Admission(Protocol):
    """Whether the head of the queue may start. Asked in queue order until the first `Wait`."""

    def admit(self, view: EngineView, request: RequestView, need: Need) -> Admit | Wait: ...


@runtime_checkable
class LengthModel(Protocol):
    """Belief about output lengths, learned from finished requests."""

    def observe(self, request: Request, num_output_tokens: int) -> None: ...

    def sample(self, request: RequestView, quantile: float) -> float: ...


@runtime_checkable
class Victim(Protocol):
    """Whom to preempt when `needy` finds no block. Smallest score first. Candidates own blocks and may
    include `needy` itself; the oldest running request is never among them, so somebody always advances."""

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Key: ...


# ----------------------------------------------------------------------- B: what a step contains
@runtime_checkable
class Composer(Protocol):
    """Which offers run in this step and how much of each, in order of priority.

    Answers items made with `offer.shortened(n)`; at most `limits.max_num_batched_tokens` tokens over all,
    at most `limits.max_num_seqs` requests, no request twice. An empty answer means: wait.

    A composer may promise what it does while nobody can be let in, so that simulations need not ask it in every step:
    `def cuts(self, num_decodes, left, limits) -> Sequence[int] | None` tells how many of the `left` tokens of each prompt
    in progress a step computes beside `num_decodes` rows of one new token, which all run, in the order of the offers and
    before the prompts; None: it depends on more. Define it in the class that defines `compose`."""

    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]: ...


# -------------------------------------------------------------------------------- C: placement
class Rehome(msgspec.Struct, frozen=True):
    """Bring a running request's KV to the other tier before the step runs. It is left where it is if the tier is full."""

    request: str
    home: Home


class Mode(msgspec.Struct, frozen=True):
    """A way to run the step that was considered: output tokens per second that it promises, and its seconds."""

    name: str
    rate: float
    seconds: float
    why_not: str = ""


class Placed(msgspec.Struct, frozen=True):
    """A placement: the items to run (those left out wait), which KV moves first, the mode, and what was weighed."""

    items: tuple[WorkItem, ...]
    moves: tuple[Rehome, ...] = ()
    mode: str = ""
    reason: str = ""
    considered: tuple[Mode, ...] = ()


@runtime_checkable
class Placement(Protocol):
    """On which device, in which lane and through which layers each item runs.

    `place` answers the items, changed in `device`, `lane` and `layers` only (`WorkItem.passing`), or a `Placed`. What is
    impossible is put right by the core: KV on the device is attended to on the device, and layers follow the cursor.

    A placement that uses host memory also has `home(view, request, need) -> "device" | "cpu"`: where a queued request's KV
    is to live if it starts now (`need`: device blocks that it would take). Those already let in within this step stand in
    `view.running` with the status they had in the queue. With `steady = True` in the class that defines it, `place` promises
    to leave items of one new token as they are, so that simulations need not ask in every step.

    One whose modes suit some lengths of prompt chunks better than others has `wish(view, offers) -> Wish | None`. It is asked
    before the composer, in steps in which a prompt could be computed; None: as the composer likes.
    """

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem] | Placed: ...


Where = Literal["device", "fetch", "stream", "cpu", "defer"]


class ExpertId(NamedTuple):
    """One expert of one layer: a unit of weights that is moved as a whole. A dense layer is its own expert 0."""

    layer: int
    expert: int


class ExpertUse(msgspec.Struct, frozen=True):
    """`num_tokens` tokens of a step want this expert; `weight` is the sum of their gate weights."""

    expert: int
    num_tokens: int
    weight: float


class UnitView(msgspec.Struct, frozen=True):
    """A unit on the device that may leave. `last_used`, `loaded_at` count layers executed since the run began."""

    unit: ExpertId
    last_used: int
    loaded_at: int
    num_uses: int


@runtime_checkable
class ExpertCosts(Protocol):
    """Seconds. `fetch`: one expert over the host link. `device`, `cpu`: one expert's arithmetic for that many tokens,
    the weights read once; `cpu` includes the tokens' way to the host and back."""

    @property
    def fetch(self) -> float: ...

    def device(self, num_tokens: int) -> float: ...

    def cpu(self, num_tokens: int) -> float: ...


class RoutingView(msgspec.Struct, frozen=True):
    """What is known when the router of `layer` has spoken.

    `resident`: experts of this layer on the device or on their way. `guess`: what the next layer's router says of this
    layer's input, empty in the last layer. `counts[layer][expert]`: tokens of this step so far, 0 for layers to come.
    `past`: the counts of earlier steps, the newest last.
    """

    step: int
    layer: int
    num_layers: int
    uses: tuple[ExpertUse, ...]
    resident: tuple[int, ...]
    num_slots: int
    guess: tuple[ExpertUse, ...]
    counts: tuple[tuple[int, ...], ...]
    past: tuple[tuple[tuple[int, ...], ...], ...]
    costs: ExpertCosts


@runtime_checkable
class WeightPlacement(Protocol):
    """Where the experts lie and where their work is done, when not all of them fit on the device.

    `place` answers for each expert in use: `device` (it is resident), `fetch` (bring it, keep it), `stream` (bring it,
    do not keep it), `cpu` (compute there), or `defer` (compute there and add the result one layer later).
    """

    def initial(self, popularity: Sequence[Sequence[float]], num_slots: int) -> Sequence[ExpertId]:
        """Units to load before the run; `popularity[layer][expert]` was measured on other work."""
        ...

    def place(self, view: RoutingView) -> Mapping[int, Where]: ...

    def prefetch(self, view: RoutingView) -> Sequence[ExpertId]:
        """Units to bring next, the most urgent first, while nothing else needs the link."""
        ...

    def score(self, unit: UnitView, incoming: ExpertId, view: RoutingView) -> Key:
        """Which unit leaves to make room for `incoming`: the smallest score."""
        ...


# --------------------------------------------------------------------------------- D: KV memory
class BlockView(msgspec.Struct, frozen=True, gc=False):
    """A cached block that nobody uses. `last_used` counts releases; `depth` is its index in its prefix."""

    block_id: int
    last_used: int
    num_hits: int
    depth: int


@runtime_checkable
class Eviction(Protocol):
    """Which cached, unused block to give away. Smallest score goes first."""

    def score(self, block: BlockView) -> float: ...


class TierOption(msgspec.Struct, frozen=True):
    """One way to take a victim's memory away, and what it costs until the victim is back where it was."""

    mode: Literal["recompute", "swap"]
    predicted: Cost
    feasible: bool
    why_not: str = ""


@runtime_checkable
class Tiering(Protocol):
    """What becomes of a victim's KV. Must answer the mode of a feasible option."""

    def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str: ...


# ---------------------------------------------------------------------------------- E: decoding
@runtime_checkable
class DecodingMethod(Protocol):
    """How a request turns computed tokens into new ones. `work` offers the next item at full length, or
    None if there is nothing to compute now; `accept` turns what came back into a commit. One that defines
    `regroup(view, offers)` is shown the offers of all running requests and may change them. With `steady = True` in the class
    that defines them, they promise to offer all that is left to compute and to accept each token as it comes."""

    def work(self, request: RequestView) -> WorkItem | None: ...

    def accept(self, request: Request, proposed: Sequence[int], item: WorkItem, result: ItemResult) -> Commit:
        """`proposed`: the drafts of the request when `item` came back."""
        ...


class DraftContext(msgspec.Struct, frozen=True):
    """A request that drafts are wanted for: `token_ids` is all it has so far (not to be changed), `block_ids` the KV
    blocks of positions [0, len(token_ids) + k). `k=0`: none are wanted, but the request moved on. `hidden`, for sources
    that ask for it: the target's state [hidden_size] behind its last layer, before the final norm, from which the newest
    token was drawn; None where there is none (the simulator, or a prompt that goes on)."""

    request: Request
    token_ids: Sequence[int]
    block_ids: tuple[int, ...]
    k: int
    hidden: Any = None


class Proposal(msgspec.Struct, frozen=True):
    """Drafts of one request, at most `k`. A tree has `parents`, one per draft: the index of the draft that it follows,
    -1 for the request's last token; a parent comes before its children.

    `odds`, for rejection sampling: of each draft the probabilities [vocab_size] (numpy, float64) that it was drawn from, given
    all drafts before it; None, as for all drafts if `odds` is empty: it was not drawn but chosen."""

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    odds: tuple[Any, ...] = ()


@runtime_checkable
class DraftSource(Protocol):
    """Where drafts come from. Runs beside the executor, once per step for all requests together; one answer for each
    context, in order. May keep what it learned; drafts never change what a request answers, only how fast (under rejection
    sampling: never the distribution of its answers, if `Proposal.odds` are true). If it raises
    or answers ids outside the vocabulary, the step goes on without drafts and a `PolicyFailed` event says so. One with
    `reads_hidden = True` is shown the target's states (`DraftContext.hidden`); else nobody gathers them. One with `sizes`
    (`decoding.draft_sizes`) is priced by them; of others the price is learned."""

    def propose(self, contexts: Sequence[DraftContext]) -> Sequence[Proposal]: ...


class RoundPrice(Protocol):
    """What rounds of drafts and verification cost, as far as that can be computed: seconds, of `count` requests of `length` tokens
    each. Pure, and cheap when asked again."""

    def plan(self, k: int) -> tuple[int, ...]:
        """The parents of `k` drafts, -1 for the text's end: a chain, or the best `k` nodes of a tree."""
        ...

    def verifying(self, count: int, drafts: int, length: int) -> float:
        """A step that verifies `drafts` drafts of each request, with the engine's own time around it."""
        ...

    def drafting(self, count: int, k: int, length: int) -> float:
        """Proposing `k` drafts behind each request, of which the source has read all but the newest token."""
        ...

    def reading(self, count: int, unread: int, k: int) -> float:
        """The same where the last `unread` tokens of each text were never read."""
        ...


class DraftOutlook(msgspec.Struct, frozen=True):
    """What a draft policy is told. At most `longest` drafts a request (of a tree: nodes). `seconds(items, k)` is what it takes to
    ask for k drafts behind each item and to verify what comes in one step (k=0: a step of plain decoding);
    `tokens(acceptance, k)` what such a verification of one request yields, its own token included, if a (first) draft holds with
    this chance. `acceptance` is the source's usual one, None before the first. `streak`: how many plans in a row asked for drafts, up to now;
    `idle`: how many did not; `patience`: after how many of those it is time to try some, the longer the less came of it."""

    longest: int
    seconds: Callable[[Sequence[WorkItem], int], float]
    tokens: Callable[[float, int], float]
    acceptance: float | None = None
    idle: int = 16
    streak: int = 0
    patience: int = 16


class DraftLengths(msgspec.Struct, frozen=True):
    """How many drafts to propose behind each item. `options`: lengths that were weighed, with the predicted seconds per
    token of each (of those, what was learned from the log is part)."""

    lengths: tuple[int, ...]
    reason: str = ""
    options: tuple[tuple[int, float], ...] = ()


@runtime_checkable
class DraftPolicy(Protocol):
    """How many tokens to propose behind each of `items`, which sample in this step; they are verified in the next one.
    One length per item, 0 to `outlook.longest`. Asked in every step; one with `rests = True` only now and then while nobody drafts
    (and never while `outlook.idle` is between those: then nobody drafts)."""

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths: ...


@runtime_checkable
class StopRule(Protocol):
    """Whether a request ends with its newest token. `num_output_tokens` counts that token."""

    def check(self, request: Request, token_id: int, num_output_tokens: int) -> FinishReason | None: ...


# ------------------------------------------------------------- the currency, seen from the core
class CostModel(Protocol):
    """Predicted cost of work. Pure; a few microseconds a request."""

    def step(self, items: Sequence[WorkItem]) -> Cost:
        """One step that runs all `items` together."""
        ...

    def plan(self, items: Sequence[WorkItem], moves: Sequence[Move], writes: Mapping[str, Sequence[int]]) -> Cost:
        """A whole step on idle resources: items, copies of blocks beside them as far as they need not wait for each other,
        drafting. `writes`: the device blocks that each request's item writes (asked for with `moves` only)."""
        ...

    def swap(self, num_blocks: int) -> Cost:
        """Moving `num_blocks` blocks of KV over the host link, one way."""
        ...

    def block_bytes(self) -> int:
        """Bytes of KV in one block, over all layers."""
        ...

    def layers(self) -> LayerCost:
        """The same predictions, by layer and resource."""
        ...


class Around(Protocol):
    """Seconds of a layer's ops before its attention (norm, q/k/v, cache write) and after it (projection, feed-forward)."""

    @property
    def before(self) -> float: ...

    @property
    def after(self) -> float: ...


class LayerCost(Protocol):
    """The same predictions, one layer and one resource at a time: for timelines, and for placements that weigh the device
    against the host beside it. All of one layer unless said otherwise; seconds and bytes. Pure."""

    @property
    def num_layers(self) -> int: ...

    def pause(self, items: Sequence[WorkItem]) -> float:
        """What a step takes before its first op, all layers together."""
        ...

    def enter(self, num_tokens: int) -> float:
        """The embedding of tokens that begin at the first layer."""
        ...

    def around(self, num_tokens: int, layer: int) -> Around:
        """The linears of `num_tokens` new tokens, on the device."""
        ...

    def collective(self, num_tokens: int) -> float:
        """The part of `around(...).after` in which the devices of a group add up what each has (0 for one device)."""
        ...

    def attention(self, items: Sequence[WorkItem]) -> float:
        """The attention of `items` on the device."""
        ...

    def host_attention(self, items: Sequence[WorkItem]) -> float:
        """The attention of `items` on the host's cores, their KV in the host's memory."""
        ...

    def leave(self, num_rows: int) -> float:
        """Scores and sampling of the rows that end at the last layer."""
        ...

    def sent_bytes(self, num_tokens: int) -> float:
        """Queries, keys and values of new tokens, on their way to the host."""
        ...

    def returned_bytes(self, num_tokens: int) -> float:
        """What attention on the host sends back."""
        ...

    def transfer_seconds(self, num_bytes: float, link: Literal["h2d", "d2h"]) -> float: ...

    def weight_bytes(self, layer: int) -> float:
        """Weights of the layer, for placements that move or stream them."""
        ...

    def move_seconds(self, move: Move) -> float:
        """A move of whole blocks, all layers together."""
        ...

    def move_bytes(self, move: Move) -> float: ...

    def link_of(self, move: Move) -> str:
        """The resource that a move occupies."""
        ...
