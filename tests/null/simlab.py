"""A simulated engine under a magnifying glass, for the tests of the core.

`GhostExecutor` runs plans on a KV cache of fingerprints instead of tensors: every slot remembers which tokens it
stands for, so a block that is shared, copied, swapped, freed or reused wrongly is found in the step that reads it.
`Watch` folds the log beside the live engine and compares the two at every turn.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from llmlab.decoding.speculative import accepted_path
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.state import LabState
from llmlab.execution.base import Executor, Row, StepBatch, Ticket
from llmlab.execution.sim_executor import PseudoTokens
from llmlab.outputs import RequestOutput
from llmlab.scheduling.composers import fill
from llmlab.seams import EngineView, Need, Offers, Placed, Rehome, RequestView, Wish
from llmlab.types import Home, Move, Request, SamplingParams, StepPlan, WorkItem

MODEL, HARDWARE = "lab-xs", "t4"
EMPTY = 0  # what a slot holds that nobody wrote


class GhostExecutor:
    """Wraps the simulated executor. KV slots hold the fingerprint of the whole prefix up to their token."""

    def __init__(self, inner: Executor, tokens: PseudoTokens, num_blocks: int, num_host_blocks: int, block_size: int,
                 limits: Any, num_layers: int = 0) -> None:  # fmt: skip
        self.mode = inner.mode
        self.plans: list[StepPlan] = []
        self._inner, self._source, self._size, self._limits = inner, tokens, block_size, limits
        self._device = [[EMPTY] * block_size for _ in range(num_blocks)]
        self._host = [[EMPTY] * block_size for _ in range(num_host_blocks)]
        self._tokens: dict[str, list[int]] = {}
        self._halfway: dict[str, tuple[int, int]] = {}
        self._num_layers = num_layers

    def submit(self, batch: StepBatch) -> Ticket:
        for name in batch.forget:
            self._tokens.pop(name, None)
        self.plans.append(batch.plan)
        self._check_limits(batch.plan)
        for move in batch.plan.moves:
            self._move(move)
        written: set[tuple[str, int, int]] = set()
        for row in batch.rows:
            self._write(row, written)
        for row in batch.rows:
            self._read(row)
        for row in batch.rows:
            self._pass_layers(row)
            if row.item.emit == "sample":
                self._sample(row)
        return self._inner.submit(batch)

    def wipe(self) -> None:
        """Everything that lay in KV slots is gone."""
        for pool in (self._device, self._host):
            pool[:] = [[EMPTY] * self._size for _ in pool]
        self._halfway.clear()

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()

    def close(self) -> None:
        self._inner.close()

    def _check_limits(self, plan: StepPlan) -> None:
        names = [item.request for item in plan.items]
        assert len(names) == len(set(names)) <= self._limits.max_num_seqs, names
        assert plan.num_tokens <= self._limits.max_num_batched_tokens, plan
        assert plan.items or plan.moves, "an empty step was submitted"

    def _move(self, move: Move) -> None:
        source = self._host if move.kind == "swap_in" else self._device
        target = self._host if move.kind == "swap_out" else self._device
        for src, dst in zip(move.src, move.dst, strict=True):
            target[dst] = list(source[src])

    def _known(self, request: Request) -> list[int]:
        return self._tokens.setdefault(request.id, list(request.prompt_token_ids))

    def _sample(self, row: Row) -> None:
        """Behind the last committed token comes what the source says, as long as the drafts say the same."""
        known = self._known(row.request)
        at = row.item.tokens.stop - len(row.item.drafts)
        del known[at:]
        known.append(self._source.token(row.request, at))
        while len(accepted_path(row.item, known[at:])) == len(known) - at:
            known.append(self._source.token(row.request, len(known)))

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        return row.block_ids[position // self._size], position % self._size

    def _fingerprints(self, row: Row) -> list[int]:
        found, value = [], 1
        committed = row.item.tokens.stop - len(row.item.drafts)
        for token in [*self._known(row.request)[:committed], *row.item.drafts]:
            value = hash((value, token)) or 1
            found.append(value)
        return found

    def _pool(self, row: Row) -> list[list[int]]:
        return self._device if row.item.home == "device" else self._host

    def _pass_layers(self, row: Row) -> None:
        """A row goes on exactly where an earlier step left it, within one token, and ends behind the last layer."""
        item = row.item
        assert item.device == "device" or item.home == "cpu", item
        before = self._halfway.pop(row.request.id, None)
        if item.layers is None:
            return
        position, cursor = before if before and item.layers[0] else (item.tokens.start, 0)
        assert (item.tokens.start, item.layers[0]) == (position, cursor) and item.num_tokens == 1, (item, before)
        if item.halfway:
            self._halfway[row.request.id] = position, item.layers[1]
        else:
            assert item.layers[1] == self._num_layers, item

    def _write(self, row: Row, written: set[tuple[str, int, int]]) -> None:
        start, stop = row.item.tokens
        assert len(row.block_ids) * self._size >= row.item.reach, f"{row.request.id} has no blocks for its drafts"
        prints = self._fingerprints(row)
        assert len(prints) == stop, f"{row.request.id} computes up to {stop}, but has {len(prints)} tokens"
        for position in range(start, stop):
            block, offset = self._slot(row, position)
            assert (row.item.home, block, offset) not in written, f"two rows write slot {offset} of block {block}"
            written.add((row.item.home, block, offset))
            self._pool(row)[block][offset] = prints[position]

    def _read(self, row: Row) -> None:
        for position, wanted in enumerate(self._fingerprints(row)):
            block, offset = self._slot(row, position)
            assert self._pool(row)[block][offset] == wanted, (
                f"{row.request.id} reads foreign KV at position {position} (block {block}), computing {row.item.tokens}"
            )


class Watch:
    """Folds the log beside the engine; `check` compares the fold with the live objects."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = LabState()
        self._cursor = engine.log.cursor(0)

    def check(self) -> None:
        for event in self._cursor.read():
            self.state.apply(event)
            if isinstance(event, ev.StepFinished):
                assert event.state_hash == self.state.state_hash, f"state hash after step {event.step}"
                if self.engine.log.level >= 3:
                    assert event.blocks_hash == self.state.blocks_hash, f"blocks hash after step {event.step}"
            assert not isinstance(event, ev.InvariantViolated), event
        scheduler, state = self.engine.scheduler, self.state
        assert scheduler.problems() == []
        assert scheduler.hash.settle() == state.state_hash
        self._compare_requests()
        if self.engine.log.level >= 3:
            assert scheduler.memory.fingerprint() == scheduler.memory.blocks_hash == state.blocks_hash
            assert {b: h.hex() for h, b in scheduler.memory.pool.by_hash.items()} == state.cached

    def _compare_requests(self) -> None:
        scheduler = self.engine.scheduler
        alive = {name for name, request in self.state.requests.items() if not request.finish_reason}
        assert alive == set(scheduler.sequences)
        assert len(scheduler.running) <= scheduler.limits.max_num_seqs
        for name, seq in scheduler.sequences.items():
            told = self.state.requests[name]
            assert (told.status, told.num_computed_tokens) == (seq.status, seq.num_computed_tokens), name
            assert (told.home, told.cursor) == (seq.home, seq.cursor), name
            assert told.output_token_ids == seq.output_token_ids, name
            drafts = max(len(seq.drafts), self.engine.config.num_speculative_tokens if seq.num_pending else 0)
            assert 0 <= seq.num_computed_tokens <= seq.num_tokens + drafts
            if self.engine.log.level >= 3:
                table = scheduler.memory.tables.get(name)
                assert told.block_ids == (table.block_ids if table else []), name


class WaitingFirst:
    """A composer that starts requests before it grows those that run, so that they are preempted as they start."""

    name = "waiting_first"

    def compose(self, view: EngineView, offers: Offers) -> list[WorkItem]:
        limits = view.limits
        return fill([*offers.waiting, *reversed(offers.running)], limits.max_num_batched_tokens, limits.max_num_seqs)


class Restless:
    """A placement that moves everybody about: homes, devices, lanes and layers by lot, and some items left out."""

    name = "restless"

    def home(self, view: EngineView, request: RequestView, need: Need) -> Home:
        return "cpu" if self._lot(view, request.id, "home") % 2 else "device"

    def wish(self, view: EngineView, offers: Offers) -> Wish | None:
        lot = self._lot(view, "", "wish")
        return Wish(1 + lot // 2 % 12) if lot % 2 else None

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Placed:
        homes = {r.id: r.home for r in view.running}
        moves = tuple(Rehome(name, "device" if home == "cpu" else "cpu") for name, home in homes.items()
                      if self._lot(view, name, "move") % 5 == 0)  # fmt: skip
        cursors = {r.id: r.cursor for r in view.running}
        kept = [item for item in items if self._lot(view, item.request, "leave") % 6]
        return Placed(tuple(self._placed(view, item, cursors.get(item.request, 0)) for item in kept), moves, "restless")

    def _placed(self, view: EngineView, item: WorkItem, cursor: int) -> WorkItem:
        lot, layers = self._lot(view, item.request, "place"), view.costs.num_layers if view.costs else 0
        if not view.cpu or lot % 8 == 0:
            return item
        if lot % 8 < 6 and item.num_tokens == 1 and item.emit == "sample":
            return item.passing(cursor, layers)
        return replace(item, device="cpu", lane=lot // 8 % 2)

    def _lot(self, view: EngineView, name: str, what: str) -> int:
        return zlib.crc32(f"{view.step} {name} {what}".encode())


def sim_engine(**fields: Any) -> Engine:
    """A small simulated engine whose executor checks every KV read. Level 3, integrity checked at every step."""
    base: dict[str, Any] = {
        "model": MODEL, "executor": "sim", "hardware": HARDWARE, "block_size": 4, "num_blocks": 16, "log_level": 3,
        "check_interval": 1, "max_num_batched_tokens": 32, "max_num_seqs": 8, "policy_timeout": 60.0,
    }  # fmt: skip
    engine = Engine(**{**base, **fields})
    memory = engine.scheduler.memory
    engine.executor = GhostExecutor(
        engine.executor, PseudoTokens(engine.model.vocab_size, engine.config.seed), memory.pool.num_blocks,
        memory.host.num_blocks, memory.block_size, engine.limits, engine.model.shape.num_layers,
    )  # fmt: skip
    return engine


def run_to_end(engine: Engine, max_steps: int, watch: Watch | None = None) -> dict[str, RequestOutput]:
    """Step until nothing is left; the finished outputs. Fails when `max_steps` turns were not enough."""
    done: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            return done
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        if watch is not None:
            watch.check()
    left = {name: str(seq.status) for name, seq in engine.scheduler.sequences.items()}
    raise AssertionError(f"not finished after {max_steps} turns: {left}, next step {engine.scheduler.next_step}")


def expected_tokens(engine: Engine, request: Request) -> list[int]:
    """What `request` must generate, whatever happens around it."""
    source, sampling = PseudoTokens(engine.model.vocab_size, engine.config.seed), request.sampling
    tokens: list[int] = []
    for position in range(request.num_prompt_tokens, request.max_total_tokens):
        tokens.append(source.token(request, position))
        ends = tokens[-1] in (*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids))
        if ends and len(tokens) >= sampling.min_tokens:
            break
    return tokens


def specs(engine: Engine) -> dict[str, Request]:
    """Every request that the log knows, as it arrived."""
    return {event.spec.id: event.spec for event in engine.log.filter(ev.RequestArrived)}


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)


def add_batch(engine: Engine, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **more: Any) -> list[str]:
    """Queue prompts under the names q0, q1, ..."""
    return [engine.add_request(list(p), greedy(max_tokens, **more), request_id=f"q{i}") for i, p in enumerate(prompts)]
