"""The simulated executor: the same plans, costed instead of run, on a virtual clock.

Tokens come from a `TokenSource`; by default a request ends after `metadata["output_len"]` tokens and its tokens are
pseudo-random numbers keyed by (seed, request, position). Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol

from llmlab import rng
from llmlab.clock import Clock
from llmlab.decoding.speculative import accepted_path
from llmlab.execution.base import Row, StepBatch, Ticket
from llmlab.execution.cost import in_one_batch
from llmlab.execution.draft_price import DraftPrice, draft_seconds
from llmlab.execution.drafting import Drafter
from llmlab.execution.opgraph import Copied, Pending, build
from llmlab.execution.overlap import Overlap
from llmlab.execution.timelines import Timelines, busy
from llmlab.seams import LayerCost
from llmlab.types import Cost, Durations, ItemResult, Move, Request, ResourceSpan, Span, StepResult, WorkItem


class TokenSource(Protocol):
    """Which token a simulated request gets at `position`."""

    def token(self, request: Request, position: int) -> int: ...


class ManyTokens(TokenSource, Protocol):
    """A source that gives the tokens of a stretch of positions at once."""

    def tokens(self, request: Request, position: int, count: int) -> Sequence[int]: ...


class PseudoTokens:
    """Deterministic tokens, keyed by (seed, request, position); the end-of-sequence token when the request's true length
    (`metadata["output_len"]`) is reached, and never before."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._vocab_size, self._seed = vocab_size, seed

    def token(self, request: Request, position: int) -> int:
        if request.eos_token_ids and position + 1 >= request.num_prompt_tokens + request.metadata.get("output_len", 1 << 60):
            return request.eos_token_ids[0]
        chunk, offset = divmod(position, CHUNK)
        return _drawn(self._seed, self._vocab_size, request.id, chunk, request.eos_token_ids)[offset]


    def tokens(self, request: Request, position: int, count: int) -> Sequence[int]:
        """`token` of positions [position, position + count)."""
        end = request.num_prompt_tokens + request.metadata.get("output_len", 1 << 60) - 1  # where the request ends
        found: list[int] = []
        for chunk in range(position // CHUNK, -(-(position + count) // CHUNK)):
            found += _drawn(self._seed, self._vocab_size, request.id, chunk, request.eos_token_ids)
        found = found[position % CHUNK :][:count]
        if request.eos_token_ids and end < position + count:
            kept = max(0, int(end) - position)
            found[kept:] = [request.eos_token_ids[0]] * (count - kept)
        return found


CHUNK = 64


@lru_cache(maxsize=1024)
def _drawn(seed: int, vocab_size: int, request: str, chunk: int, avoided: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens of positions [chunk * CHUNK, ...), drawn together, none of them in `avoided`."""
    tokens = rng.integers(seed, request, chunk, vocab_size, CHUNK)
    while avoided and not set(avoided).isdisjoint(tokens) and len(set(avoided)) < vocab_size:
        tokens = tuple((t + 1) % vocab_size if t in avoided else t for t in tokens)
    return tokens


class SimDrafting(NamedTuple):
    """A draft source in the simulator. `price` is that of its own steps; None: they cost nothing."""

    drafter: Drafter
    price: DraftPrice | None


class SimTicket(NamedTuple):
    """A simulated step: known at once, but the clock reaches its end only when it is collected."""

    value: StepResult
    end: float
    clock: Clock

    def result(self) -> StepResult:
        self.clock.advance_to(self.end)
        return self.value


class LayeredCost(Protocol):
    """What a simulated executor asks: steps whole and by layer and resource, and what it takes to notice an arrival."""

    @property
    def wake(self) -> float: ...

    def step(self, items: Sequence[WorkItem]) -> Cost: ...

    def swap(self, num_blocks: int) -> Cost: ...

    def layers(self) -> LayerCost: ...

    def seconds(self, seen: Sequence[int], chunks: Sequence[Span], logits: int) -> float:
        """`step(...).seconds` of rows with one new token, which see `seen` tokens each, and of `chunks` of prompts."""
        ...


class SimExecutor:
    """Runs plans on simulated timelines (`llmlab.execution.timelines`), one step's arithmetic after the other's.

    A step that stays on the device and moves no block is one op: `cost.step`. Any other becomes a graph of ops by layer
    (`llmlab.execution.opgraph`). Copies to the host may go on beside later steps, which wait for the blocks that they
    write. `block_size` in tokens; `detailed`: tell the spans of steps with rows on both tiers, and of a group of devices what
    each step spends on the link between them.
    """

    mode: Literal["measured", "simulated"] = "simulated"

    def __init__(self, cost: LayeredCost, tokens: TokenSource, clock: Clock, description: dict[str, Any], block_size: int,
                 drafting: SimDrafting | None = None, detailed: bool = True) -> None:  # fmt: skip
        self._drafting = drafting
        self._texts: dict[str, list[int]] = {}
        self._cost = cost
        self._layers, self._wake = cost.layers(), cost.wake
        self._tokens = tokens
        self._clock = clock
        self._description = description
        self._block_size = block_size
        self._busy_until = 0.0
        self._timelines = Timelines()
        self._pending = Pending()
        self._apart = detailed and self._layers.collective(1) > 0
        block = Move("swap_out", "", (0,), (0,))
        kv_bytes = self._layers.move_bytes(block) / block_size / self._layers.num_layers
        self._overlap = Overlap(self._layers, kv_bytes, self._timelines, self._pending, detailed)
        self._ahead: dict[str, tuple[int, Sequence[int]]] = {}  # by request: tokens from a position on, drawn together

    def submit(self, batch: StepBatch) -> Ticket:
        now = self._clock.now()
        self.forget(batch.forget)
        spans, durations = self._place(batch, now)
        results = tuple(self._result(row) for row in batch.rows)
        if self._drafting is not None:
            results = self._drafting.drafter.extend(batch.rows, results, self._known)
        return SimTicket(StepResult(batch.plan.step, results, durations, spans), self._busy_until, self._clock)

    def draft_with(self, side: SimDrafting | None) -> None:
        self._drafting = side

    def forget(self, requests: Iterable[str]) -> None:
        """These have ended."""
        for name in requests:
            self._pending.joins.pop(name, None)
            self._texts.pop(name, None)
            self._ahead.pop(name, None)

    def resume(self, batch: StepBatch, busy_until: float) -> None:
        """Take note of a recorded step: what it left running. Those before it had ended by `busy_until`."""
        self.occupy(busy_until)
        self._place(batch, self._clock.now())

    def occupy(self, until: float) -> None:
        """The device is busy until then, and not longer."""
        self._busy_until = self._timelines.free["device"] = until

    def _place(self, batch: StepBatch, now: float) -> tuple[tuple[ResourceSpan, ...], Durations]:
        """Put a step on the timelines; its arithmetic begins when that of the step before has ended."""
        start = self._busy_until if now <= self._busy_until else now + self._wake
        self._pending.prune(start)
        spans, durations = self._place_step(batch, now, start)
        drafting = draft_seconds(self._drafting.price, batch.plan.items) if self._drafting is not None else 0.0
        if not drafting:
            return spans, durations
        begin = self._busy_until
        self._busy_until = self._timelines.free["device"] = begin + drafting
        parts = {**durations.parts, "draft": drafting}
        drafted = ResourceSpan("device", begin, begin + drafting, "draft")
        return (*spans, drafted), Durations(durations.execute + drafting, parts=parts)

    def _place_step(self, batch: StepBatch, now: float, start: float) -> tuple[tuple[ResourceSpan, ...], Durations]:
        if not self._is_plain(batch):
            away = "cpu" in [item.home for item in batch.plan.items]
            return self._place_overlap(batch, start) if away else self._place_graph(batch, now, start)
        seconds = self._cost.step(batch.plan.items).seconds
        self._busy_until = self._timelines.free["device"] = start + seconds
        return (ResourceSpan("device", start, start + seconds, "step"),), Durations(seconds)

    def _is_plain(self, batch: StepBatch) -> bool:
        """Whether nothing but the device works, on one batch."""
        return not (batch.plan.moves or self._pending.copies or self._apart) and in_one_batch(batch.plan.items)

    def _place_overlap(self, batch: StepBatch, start: float) -> tuple[tuple[ResourceSpan, ...], Durations]:
        """A step with rows on both tiers; it begins when copies of earlier steps have ended."""
        left = (ends[-1] for blocks in (self._pending.device_blocks, self._pending.host_blocks) for ends in blocks.values())
        self._busy_until = self._overlap.place(batch.plan.items, batch.plan.moves, max([start, *left]))
        self._timelines.free["device"] = self._busy_until
        spans = tuple(self._overlap.spans)
        return spans, Durations(self._busy_until - start, parts={**self._overlap.busy, "join_wait": self._overlap.waited})

    def _place_graph(self, batch: StepBatch, now: float, start: float) -> tuple[tuple[ResourceSpan, ...], Durations]:
        plan = batch.plan
        writes = {row.item.request: row.block_ids[row.item.tokens[0] // self._block_size :] for row in batch.rows}
        graph = build(plan.items, plan.moves, writes, self._layers, self._pending, now)
        computing = {i for copied in graph.copied for i in copied.ops}
        ops = [op if i in computing else op._replace(ready=max(op.ready, start)) for i, op in enumerate(graph.ops)]
        spans = tuple(self._timelines.run(ops, now))
        for item in plan.items:
            self._pending.joins.pop(item.request, None)
        self._pending.joins |= {request: spans[i].end for request, i in graph.joins.items()}
        for copied in graph.copied:
            self._remember(copied, tuple(spans[i].end for i in copied.ops))
        self._busy_until = max([start, self._timelines.free.get("device", 0.0), *(spans[i].end for i in graph.ends)])
        return spans, Durations(self._busy_until - start, parts=busy(spans))

    def _remember(self, copied: Copied, ends: tuple[float, ...]) -> None:
        move, pending = copied.move, self._pending
        if move.kind == "swap_out":
            pending.device_blocks |= dict.fromkeys(move.src, ends)
        if move.kind != "copy":
            pending.host_blocks |= dict.fromkeys(move.dst if move.kind == "swap_out" else move.src, ends)

    # --------------------------------------------------------------------- what leaps ask (llmlab.scheduling.steady)
    def start(self) -> float | None:
        """When the next step would begin; None while earlier ones have left something running, or with drafts."""
        now = self._clock.now()
        if self._drafting is not None:
            return None
        self._pending.prune(now)
        return None if self._busy_until > now or self._pending.copies or self._pending.joins else now

    def tokens(self, request: Request, position: int, count: int) -> Sequence[int]:
        """The tokens at [position, position + count)."""
        many = getattr(self._tokens, "tokens", None)
        if many is not None:
            return many(request, position, count)  # type: ignore[no-any-return]
        return [self._tokens.token(request, p) for p in range(position, position + count)]

    def seconds(self, seen: Sequence[int], chunks: Sequence[Span], logits: int) -> float:
        """Of a step on the device alone; see LayeredCost."""
        return self._cost.seconds(seen, chunks, logits)

    def pass_to(self, t: float) -> None:
        """Steps up to `t` are done, and it is `t` now."""
        self.occupy(t)
        self._clock.advance_to(t)

    def _result(self, row: Row) -> ItemResult:
        item = row.item
        if item.emit != "sample":
            return ItemResult(item.request)
        if not item.drafts:
            return ItemResult(item.request, (self._token(row.request, item.tokens[1]),))
        at = item.tokens[1] - len(item.drafts)
        found = [self._token(row.request, at)]
        while len(accepted_path(item, found)) == len(found):
            found.append(self._token(row.request, at + len(found)))
        return ItemResult(item.request, tuple(found))

    def _token(self, request: Request, position: int) -> int:
        start, ahead = self._ahead.get(request.id, (0, ()))
        if not start <= position < start + len(ahead):
            start, ahead = self._ahead[request.id] = position, self.tokens(request, position, CHUNK)
        return ahead[position - start]

    def _known(self, row: Row, result: ItemResult) -> list[int]:
        """A request's tokens behind a row."""
        request, item = row.request, row.item
        text = self._texts.setdefault(request.id, list(request.prompt_token_ids))
        stop = item.tokens[1] - len(item.drafts) + len(result.token_ids)
        text += [self._token(request, position) for position in range(len(text), stop)]
        return text if item.emit == "sample" else text[:stop]

    def describe(self) -> dict[str, Any]:
        return self._description

    def close(self) -> None:
        pass
