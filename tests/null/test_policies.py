"""What the built-in policies promise, one by one; the queue that they sort."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simlab import greedy, run_to_end, sim_engine

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.scheduling.admission import ADMISSIONS
from llmlab.scheduling.composers import COMPOSERS, fill, split
from llmlab.scheduling.ordering import ORDERINGS
from llmlab.scheduling.preemption import VICTIMS
from llmlab.scheduling.queue import WaitingQueue
from llmlab.scheduling.seamcalls import checked_items
from llmlab.seams import Admit, EngineView, Limits, Need, Offers, PoolView, RequestView, Wait
from llmlab.types import Cost, Request, SamplingParams, Sequence, Span, Status, WorkItem


def request(number: int, **more: Any) -> Request:
    fields = {"arrival": float(number), "max_total_tokens": 100, **more}
    return Request(f"r{number}", number, (1,) * fields.pop("prompt", 10), SamplingParams(), **fields)


def seen(number: int, *, blocks: int = 0, computed: int = 0, tokens: int | None = None, **more: Any) -> RequestView:
    spec = request(number, **more)
    tokens = spec.num_prompt_tokens if tokens is None else tokens
    return RequestView(spec.id, number, spec.arrival, spec.priority, Status.WAITING, spec.num_prompt_tokens, tokens,
                       computed, 0, blocks, 0, spec)  # fmt: skip


def view(free: int = 10, running: tuple[RequestView, ...] = (), budget: int = 8, seats: int = 4, priced: Any = None) -> EngineView:
    def consider(option: str, items: Any) -> Cost:
        if priced is not None:
            priced.append((option, list(items)))
        return Cost(1.0)

    pool = PoolView(200, free, 0, 0, 0, 4)
    return EngineView(0.0, 0, (), 0, running, pool, Limits(seats, budget, 1000), consider)


# ---------------------------------------------------------------------------------------- orderings
CROWD = [
    seen(0, priority=2, prompt=30, metadata={"output_len": 5}), seen(1, priority=0, prompt=10, metadata={"output_len": 90}),
    seen(2, priority=2, prompt=3, metadata={"output_len": 7}), seen(3, priority=1, prompt=20),
]  # fmt: skip


@pytest.mark.parametrize(("name", "order"), [
    ("fcfs", [0, 1, 2, 3]), ("priority", [1, 3, 0, 2]), ("sjf_oracle", [2, 0, 1, 3]), ("ljf", [1, 3, 0, 2]),
])  # fmt: skip
def test_orderings(name: str, order: list[int]) -> None:
    policy = ORDERINGS.resolve(name)
    assert [r.number for r in sorted(CROWD, key=lambda r: (policy.key(r, 0.0), r.arrival, r.number))] == order


# -------------------------------------------------------------------------------------------- queue
KEYS = st.lists(st.tuples(st.sampled_from([(0,), (1,), (1, 2), (float("inf"),), (-1.5,)]), st.integers(0, 3)), max_size=20)


@given(entries=KEYS, seed=st.integers(0, 100))
def test_the_queue_is_sorted_by_key_arrival_and_number(entries: list[Any], seed: int) -> None:
    queue, rng = WaitingQueue(), random.Random(seed)
    sequences = [Sequence(request(i, arrival=float(arrival))) for i, (_, arrival) in enumerate(entries)]
    added = list(zip(sequences, [key for key, _ in entries]))
    rng.shuffle(added)
    for seq, key in added:
        queue.add(seq, key)

    def wanted() -> list[Sequence]:
        return sorted((s for s, _ in added), key=lambda s: (s.key, s.request.arrival, s.request.number))

    assert list(queue) == wanted() and len(queue) == len(added)
    assert queue.head(3) == wanted()[:3]
    for a, b in zip(wanted(), wanted()[1:]):
        assert queue.before(a, b) and not queue.before(b, a)
    while added:
        gone = added.pop(rng.randrange(len(added)))[0]
        queue.remove(gone)
        with pytest.raises(KeyError):
            queue.remove(gone)
        assert list(queue) == wanted()


def test_resorting_gives_every_entry_its_new_key() -> None:
    queue = WaitingQueue()
    sequences = [Sequence(request(i)) for i in range(4)]
    for seq in sequences:
        queue.add(seq, (seq.request.number,))
    queue.resort({seq.id: (-seq.request.number,) for seq in sequences})
    assert list(queue) == sequences[::-1]
    queue.remove(sequences[2])
    assert list(queue) == [sequences[3], sequences[1], sequences[0]]


# ---------------------------------------------------------------------------------------- admissions
def test_prompt_fits_keeps_one_percent_spare_for_those_who_run() -> None:
    policy = ADMISSIONS.resolve("prompt_fits")
    assert isinstance(policy.admit(view(10), seen(0), Need(10, 25)), Admit)
    assert isinstance(policy.admit(view(9), seen(0), Need(10, 25)), Wait)
    running = (seen(1, blocks=3),)
    assert isinstance(policy.admit(view(12, running), seen(0), Need(10, 25)), Admit)  # 1 % of 200 blocks
    assert isinstance(policy.admit(view(11, running), seen(0), Need(10, 25)), Wait)


def test_worst_case_counts_what_is_promised() -> None:
    policy = ADMISSIONS.resolve("worst_case")
    running = (seen(1, blocks=5), seen(2, blocks=25))  # may grow to 25 blocks each
    assert isinstance(policy.admit(view(45, running), seen(0), Need(3, 25)), Admit)
    assert isinstance(policy.admit(view(44, running), seen(0), Need(3, 25)), Wait)


def test_optimistic_asks_for_one_block() -> None:
    policy = ADMISSIONS.resolve("optimistic")
    assert isinstance(policy.admit(view(1), seen(0), Need(10, 25)), Admit)
    assert isinstance(policy.admit(view(0), seen(0), Need(10, 25)), Wait)


@pytest.mark.parametrize("overlap_depth", [0, 1, 2])
def test_worst_case_never_preempts(overlap_depth: int) -> None:
    engine = sim_engine(admission="worst_case", num_blocks=10, block_size=2, overlap_depth=overlap_depth)
    for i in range(12):
        engine.add_request([i % 3] * (1 + i % 5), greedy(1 + 3 * (i % 4), ignore_eos=True))
    run_to_end(engine, 500)
    assert not engine.log.filter(ev.RequestPreempted)
    assert max(e.num_running for e in engine.log.filter(ev.StepPlanned)) > 1


# ------------------------------------------------------------------------------------------- victims
@pytest.mark.parametrize(("name", "victim"), [("last_come", 2), ("most_blocks", 0), ("least_progress", 1), ("lowest_priority", 0)])
def test_victims(name: str, victim: int) -> None:
    candidates = [seen(0, blocks=9, computed=30, priority=5), seen(1, blocks=4, computed=3), seen(2, blocks=1, computed=9)]
    policy = VICTIMS.resolve(name)
    assert min(candidates, key=lambda c: policy.score(view(), c, seen(3))).number == victim


# ----------------------------------------------------------------------------------------- composers
def offer(number: int, start: int, stop: int) -> WorkItem:
    return WorkItem(f"r{number}", Span(start, stop))


def composed(name: str, running: list[WorkItem], waiting: list[WorkItem], **limits: Any) -> list[tuple[str, int, str]]:
    items = COMPOSERS.resolve(name).compose(view(**limits), Offers(tuple(running), tuple(waiting)))
    return [(item.request, item.num_tokens, item.emit) for item in items]


DECODES = [offer(0, 20, 21), offer(1, 9, 10)]
CHUNK = offer(2, 4, 10)
NEW = [offer(3, 0, 5), offer(4, 0, 7)]


def test_chunked_fills_what_the_decodes_leave() -> None:
    assert composed("chunked", DECODES, NEW) == [("r0", 1, "sample"), ("r1", 1, "sample"), ("r3", 5, "sample"), ("r4", 1, "none")]
    assert composed("chunked", [CHUNK, *DECODES], NEW) == [("r0", 1, "sample"), ("r1", 1, "sample"), ("r2", 6, "sample")]
    assert composed("chunked", DECODES, NEW, seats=3) == [("r0", 1, "sample"), ("r1", 1, "sample"), ("r3", 5, "sample")]
    assert composed("chunked", DECODES, [], budget=1) == [("r0", 1, "sample")]


def test_chunked_prices_the_step_without_its_prompts() -> None:
    priced: list[Any] = []
    COMPOSERS.resolve("chunked").compose(view(priced=priced), Offers((CHUNK, *DECODES), ()))
    assert priced == [("decodes alone", DECODES)]
    COMPOSERS.resolve("chunked").compose(view(priced=priced), Offers(tuple(DECODES), ()))
    assert len(priced) == 1  # a pure step has no such alternative


def test_prefill_first_lets_prompts_go_alone() -> None:
    assert composed("prefill_first", DECODES, NEW) == [("r3", 5, "sample"), ("r4", 3, "none")]
    assert composed("prefill_first", [*DECODES, CHUNK], NEW) == [("r2", 6, "sample"), ("r3", 2, "none")]
    assert composed("prefill_first", DECODES, []) == [("r0", 1, "sample"), ("r1", 1, "sample")]
    assert composed("prefill_first", DECODES, NEW, seats=3) == [("r3", 5, "sample")]  # the decodes keep their seats


def test_decode_first_drains_the_batch() -> None:
    assert composed("decode_first", DECODES, NEW) == [("r0", 1, "sample"), ("r1", 1, "sample")]
    assert composed("decode_first", [], NEW) == [("r3", 5, "sample"), ("r4", 3, "none")]
    assert composed("decode_first", [CHUNK], NEW) == [("r2", 6, "sample"), ("r3", 2, "none")]


def test_spread_gives_prompts_what_the_weights_carry_and_more_if_many_wait() -> None:
    """On a T4 some 140 tokens make a layer of Llama-2-7B an eighth slower; 2,000 of them take an eighth of what is there."""
    import llmlab

    def chunks(prompt: int) -> list[int]:
        config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="t4", num_blocks=512, composer="spread",
                                     max_num_batched_tokens=1024)  # fmt: skip
        run = llmlab.run(config, llmlab.Workload.batch(1, prompt=prompt, output=2))
        return [event.items[0].num_tokens for event in run.events("StepPlanned") if event.items]

    few, many = chunks(400), chunks(2000)
    assert few == [few[0], few[0], 400 - 2 * few[0], 1] and 96 <= few[0] <= 192 and few[0] % 16 == 0
    assert many[0] == 250 and many[0] > many[1] > few[0] and few[0] in many


@given(data=st.data(), name=st.sampled_from(COMPOSERS.names()))
def test_composers_keep_every_limit(data: st.DataObject, name: str) -> None:
    """Checked by the very guard that stands around other people's composers."""
    lengths = data.draw(st.lists(st.integers(1, 9), max_size=8))
    cut = data.draw(st.integers(0, len(lengths)))
    offers = [offer(i, 0, n) if n > 1 else offer(i, 7, 8) for i, n in enumerate(lengths)]
    waiting = tuple(o for o in offers[cut:] if o.num_tokens > 1)
    seats = data.draw(st.integers(max(1, cut + len(waiting)), 10))
    limits = Limits(seats, data.draw(st.integers(1, 20)), 1000)
    both = Offers(tuple(offers[:cut]), waiting)
    items = COMPOSERS.resolve(name).compose(view(budget=limits.max_num_batched_tokens, seats=seats), both)
    assert checked_items(items, both, limits) == tuple(items)
    assert items or not (both.running or both.waiting)


def test_fill_and_split() -> None:
    assert fill([], 5, 5) == [] and fill(NEW, 0, 5) == [] and fill(NEW, 5, 0) == []
    assert [i.num_tokens for i in fill(NEW, 6, 5)] == [5, 1]
    assert split([*DECODES, CHUNK]) == (DECODES, [CHUNK])


# ------------------------------------------------------------------------------------------ tierings
@pytest.mark.parametrize(("tiering", "num_host_blocks", "modes"), [
    ("recompute", None, {"recompute"}), ("swap", None, {"swap"}), ("swap", 0, {"recompute"}), ("swap", 3, {"swap", "recompute"}),
])  # fmt: skip
def test_tierings(tiering: str, num_host_blocks: int | None, modes: set[str]) -> None:
    engine = crowd(tiering=tiering, num_host_blocks=num_host_blocks)
    assert {e.mode for e in engine.log.filter(ev.RequestPreempted)} == modes
    lost = [e.tokens_lost for e in engine.log.filter(ev.RequestPreempted) if e.mode == "swap"]
    assert not any(lost)


def crowd(**fields: Any) -> Engine:
    engine = sim_engine(**{"num_blocks": 9, "block_size": 2, **fields})
    for i in range(6):
        engine.add_request([i] * 5, greedy(8, ignore_eos=True))
    run_to_end(engine, 500)
    return engine

