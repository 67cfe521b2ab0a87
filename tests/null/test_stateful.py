"""The truth test: whatever arrives, aborts, preempts, swaps, forks or hits, the core stays sound.

After every turn: no block leaked or owned twice, every KV read finds the request's own prefix, the log's fold equals
the live state (both hashes), limits hold. At the end: everybody finished with exactly the tokens that it would have
got alone, and the pool is empty again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simlab import Restless, WaitingFirst, Watch, expected_tokens, run_to_end, sim_engine, specs

from llmlab.decoding.draft_lengths import DRAFT_POLICIES
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.execution.base import StepBatch
from llmlab.plugins import REGISTRIES
from llmlab.speculating import Simulated
from llmlab.types import DEVICE_MEMORY, ItemResult, RequestError, SamplingParams, StepResult

SEAMS = ("ordering", "admission", "composer", "victim", "placement", "eviction", "tiering")
MAX_REQUESTS = 12


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small and cruel: pools of a few blocks, budgets of a few tokens, every pairing of policies."""
    fields: dict[str, Any] = {seam: draw(st.sampled_from(REGISTRIES[seam].names())) for seam in SEAMS}
    fields |= {
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 8])),
        "num_blocks": draw(st.integers(3, 12)),
        "num_host_blocks": draw(st.sampled_from([None, 0, 2, 5])),
        "max_num_batched_tokens": draw(st.sampled_from([1, 2, 3, 5, 8, 16, 64])),
        "max_num_seqs": draw(st.integers(1, 6)),
        "overlap_depth": draw(st.integers(0, 2)),
        "enable_prefix_caching": draw(st.booleans()),
        "view_cap": draw(st.sampled_from([1, 2, 64])),
        "num_alternatives": draw(st.sampled_from([0, 1, 4])),
        "log_level": draw(st.sampled_from([2, 3, 3])),
        "speculation": draw(st.sampled_from([None, Simulated((0.9, 0.6)), Simulated((0.3,)), "ngram"])),
        "num_speculative_tokens": draw(st.integers(1, 6)), "draft_policy": draw(st.sampled_from(DRAFT_POLICIES.names())),
    }
    if fields["num_host_blocks"] == 0 and fields["placement"] in ("fastdecode", "neo", "apex"):
        fields["num_host_blocks"] = 1  # none is refused
    return fields


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 12))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])), max_tokens=max_tokens, min_tokens=draw(st.integers(0, min(3, max_tokens))),
        ignore_eos=draw(st.booleans()), stop_token_ids=draw(st.sampled_from([(), (), tuple(range(40))])),
    )  # fmt: skip


class Mortal:
    """An executor whose device loses its memory when it is told to. What is planned before the engine knows comes to nothing."""

    mode = "simulated"

    def __init__(self, inner: Any) -> None:
        self.inner, self.doomed, self.unknown = inner, False, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def submit(self, batch: StepBatch) -> Any:
        if not self.doomed and not self.unknown:
            return self.inner.submit(batch)
        lost, self.doomed, self.unknown = self.doomed, False, True
        if lost:
            self.inner.wipe()
        nothing = tuple(ItemResult(row.item.request) for row in batch.rows)
        return Told(self, StepResult(batch.plan.step, nothing, lost=(DEVICE_MEMORY,) * lost, why="a fault" * lost))


class Told(NamedTuple):
    mortal: Mortal
    value: StepResult

    def result(self) -> StepResult:
        self.mortal.unknown &= not self.value.lost
        return self.value


class Core(RuleBasedStateMachine):
    engine: Engine

    @initialize(fields=configs(), cruel=st.booleans(), restless=st.booleans())
    def start(self, fields: dict[str, Any], cruel: bool, restless: bool) -> None:
        fields = {**fields, **({"composer": WaitingFirst(), "admission": "optimistic"} if cruel else {})}
        self.engine = sim_engine(**{**fields, **({"placement": Restless()} if restless else {})})
        self.engine.executor = self.mortal = Mortal(self.engine.executor)
        self.watch = Watch(self.engine)
        self.names: list[str] = []
        self.work = self.repeats = 0

    @precondition(lambda self: len(self.names) < MAX_REQUESTS)
    @rule(family=st.integers(0, 2), shared=st.integers(0, 40), own=st.integers(0, 3), sampling=params(),
          priority=st.integers(0, 2), delay=st.sampled_from([None, None, 0.0, 0.001, 0.05]),
          output_len=st.sampled_from([None, 1, 4, 9]))  # fmt: skip
    def add(self, family: int, shared: int, own: int, sampling: SamplingParams, priority: int, delay: float | None,
            output_len: int | None) -> None:  # fmt: skip
        prompt = [family * 50 + i for i in range(shared)] + [200 + len(self.names)] * own
        arrival = None if delay is None else self.engine.clock.now() + delay
        metadata = {} if output_len is None else {"output_len": output_len}
        try:
            name = self.engine.add_request(prompt, sampling, arrival=arrival, priority=priority, metadata=metadata)
        except RequestError as error:
            assert not prompt or len(prompt) >= self.engine.limits.max_model_len, error
            assert self.engine.log.filter(ev.RequestRefused)[-1].reason == str(error)
            return
        self.names.append(name)
        self.work += sampling.n * (len(prompt) + (sampling.max_tokens or 0))

    @precondition(lambda self: self.names)
    @rule(which=st.integers(0, MAX_REQUESTS - 1))
    def abort(self, which: int) -> None:
        self.engine.abort(self.names[which % len(self.names)])

    @precondition(lambda self: self.names)
    @rule()
    def lose(self) -> None:
        """The next step finds the device without its memory: everybody begins anew."""
        self.mortal.doomed = True
        self.repeats += 1  # all work is done again

    @rule(turns=st.integers(1, 8))
    def step(self, turns: int) -> None:
        for _ in range(turns):
            self.engine.step()
            self.watch.check()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "watch"):
            self.watch.check()

    def teardown(self) -> None:
        if not hasattr(self, "watch"):
            return
        run_to_end(self.engine, 50 + 10 * self.work * (1 + self.repeats), self.watch)
        memory = self.engine.scheduler.memory
        assert (memory.pool.num_free, memory.num_quarantined) == (memory.pool.num_blocks, 0)
        assert memory.host.num_free == memory.host.num_blocks
        assert not memory.tables and not self.engine.scheduler.inflight
        assert not self.engine.log.filter(ev.PolicyFailed, ev.InvariantViolated)
        for name, spec in specs(self.engine).items():
            told, expected = self.watch.state.requests[name], expected_tokens(self.engine, spec)
            if told.finish_reason == "abort":
                expected = expected[: len(told.output_token_ids)]
            assert told.finish_reason in ("stop", "length", "abort"), name
            assert told.output_token_ids == expected, name


TestCore = Core.TestCase
TestCore.settings = settings(max_examples=120, stateful_step_count=40)


@pytest.mark.parametrize("composer", REGISTRIES["composer"].names())
@pytest.mark.parametrize("admission", REGISTRIES["admission"].names())
@pytest.mark.parametrize("overlap_depth", [0, 1, 2])
def test_no_live_lock_when_the_pool_is_a_tenth_of_the_demand(composer: str, admission: str, overlap_depth: int) -> None:
    """The worst case that is known: long prompts in chunks, a full pool, the youngest preempted again and again."""
    engine = sim_engine(num_blocks=7, block_size=2, max_num_batched_tokens=3, max_num_seqs=6, composer=composer,
                        admission=admission, overlap_depth=overlap_depth, log_level=2)  # fmt: skip
    for i in range(12):
        engine.add_request([i] * 8, SamplingParams(max_tokens=5, ignore_eos=True), priority=i % 3)
    done = run_to_end(engine, 1500)
    assert len(done) == 12
    if admission == "worst_case":
        assert not engine.log.filter(ev.RequestPreempted)


def test_a_sibling_swapped_out_in_the_step_that_forked_it_takes_its_copy_along() -> None:
    """The copies of one step happen in order: first the fork's, then the way to the host, then somebody else's tokens."""
    engine = sim_engine(num_blocks=3, block_size=4, composer=WaitingFirst(), admission="optimistic", tiering="swap")
    engine.add_request(list(range(8)), SamplingParams(n=2, max_tokens=4, ignore_eos=True))
    run_to_end(engine, 60, Watch(engine))
    kinds = [[move.kind for move in plan.moves] for plan in engine.log.filter(ev.StepPlanned)]
    assert ["copy", "swap_out"] in kinds and ["swap_in"] in kinds
