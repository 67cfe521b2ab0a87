"""Where the experts of a mixture lie: the store's books, the policies, and the timelines they are judged on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.clock import VirtualClock
from llmlab.config import EngineConfig
from llmlab.events.log import EventLog
from llmlab.execution.expert_timeline import ExpertStage, Host, LayerWork, RooflineExperts, simulate
from llmlab.execution.timelines import Timelines
from llmlab.memory.weight_store import Fetch, WeightStore
from llmlab.running import run
from llmlab.runs import Run
from llmlab.scheduling.expert_calls import ExpertCalls
from llmlab.scheduling.seamcalls import Seam, checked_routing
from llmlab.scheduling.weights import LRU, WEIGHT_PLACEMENTS, Balanced, Oracle, most_popular, similarity
from llmlab.seams import ExpertId, ExpertUse, RoutingView, UnitView, Where
from llmlab.types import ConfigError, PolicyError, ResourceSpan, TraceError
from llmlab.workloads.routing import RoutingTrace, load_routing
from llmlab.workloads.workload import Workload
from roofline.cost import CostModel

DESKTOP = Host("2 channels of DDR4", 40e9, 0.65e12)
SERVER = Host("8 channels of DDR5", 250e9, 2.9e12)
LAYERS, EXPERTS = 4, 8


def made_trace(num_sequences: int = 12, length: int = 40, stay: float = 0.6, seed: int = 0) -> RoutingTrace:
    """Tokens that like some experts of their sequence and tend to stay with the last token's: skew and bursts."""
    random = np.random.default_rng(seed)
    rows = np.zeros((num_sequences * length, LAYERS, 2), dtype=np.uint8)
    for sequence, layer in itertools.product(range(num_sequences), range(LAYERS)):
        liked, share = random.permutation(EXPERTS), 1 / (1 + np.arange(EXPERTS))
        for token in range(length):
            at = sequence * length + token
            again = token and random.random() < stay
            rows[at, layer] = rows[at - 1, layer] if again else random.choice(liked, 2, False, share / share.sum())
    guess = np.concatenate([rows[:, 1:], rows[:, :1]], 1)
    weights = np.tile(np.array([0.7, 0.3], dtype=np.float32), (len(rows), LAYERS, 1))
    return RoutingTrace("made", EXPERTS, rows, weights, guess, np.arange(num_sequences + 1) * length, np.full(num_sequences, 4))


TRACE = made_trace()


def mixtral(host: Host, hardware: str = "a10") -> RooflineExperts:
    return RooflineExperts(CostModel("mixtral-8x7b", hardware, "fp16"), host)


# ------------------------------------------------------------------------------------------ the store
class Ledger:
    """A mover that writes down what it was told."""

    def __init__(self) -> None:
        self.fetches: list[Fetch] = []
        self.after: list[int | None] = []

    def fetch(self, fetch: Fetch, after: int | None) -> int:
        self.fetches.append(fetch)
        self.after.append(after)
        return len(self.fetches)


def oldest(unit: UnitView, incoming: ExpertId) -> int:
    return unit.last_used


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=60))
def test_the_store_never_holds_more_than_its_slots_nor_one_unit_twice(num_slots: int, asked: list[tuple[int, int, bool]]) -> None:
    ledger = Ledger()
    store: WeightStore[int] = WeightStore(num_slots, ledger)
    here: dict[int, ExpertId] = {}
    for layer, expert, keep in asked:
        store.tick += 1
        unit = ExpertId(layer, expert)
        known, number = unit in store, len(ledger.fetches)
        slot = store.bring(unit, "demand", oldest)
        assert slot is not None and slot.unit == unit
        assert (len(ledger.fetches) == number) == known, "a copy is made exactly when the unit is missing"
        store.pin(unit)
        store.release(unit, store.tick)
        for fetch in ledger.fetches[number:]:
            assert fetch.evicted is None or here[fetch.slot] == fetch.evicted
            here[fetch.slot] = fetch.unit
        if not keep:
            store.drop(unit)
            del here[slot.index]
        assert sorted(store.units) == sorted(here.values()) and len(here) <= num_slots


def test_a_pinned_unit_stays() -> None:
    store: WeightStore[int] = WeightStore(1, Ledger())
    store.load([ExpertId(0, 0)])
    store.pin(ExpertId(0, 0))
    assert store.bring(ExpertId(0, 1), "demand", oldest) is None
    store.drop(ExpertId(0, 0))
    assert ExpertId(0, 0) in store
    store.release(ExpertId(0, 0))
    assert store.bring(ExpertId(0, 1), "demand", oldest) is not None


def test_a_copy_waits_for_the_last_reader_of_its_slot_and_tells_who_left_unused() -> None:
    ledger = Ledger()
    store: WeightStore[int] = WeightStore(1, ledger)
    first, second, third = (ExpertId(0, expert) for expert in range(3))
    store.load([first])
    store.pin(first)
    store.release(first, 77)
    store.bring(second, "prefetch", oldest)
    store.bring(third, "demand", oldest)
    assert ledger.after == [None, 77, None], "the second copy must not overtake what reads the first unit"
    assert [(fetch.evicted, fetch.unused) for fetch in ledger.fetches] == [(None, False), (first, False), (second, True)]


def test_a_policy_sees_earlier_steps_and_when_each_unit_was_last_used() -> None:
    store: WeightStore[int] = WeightStore(2, Ledger())
    seam = Seam("weights", LRU(), LRU(), EventLog(VirtualClock()), 1.0)
    calls = ExpertCalls(seam, mixtral(DESKTOP), 2, 3, store)
    for step, experts in enumerate(((0, 1), (1, 2), (2, 0))):
        for layer in range(2):
            view = calls.look(layer, (ExpertUse(experts[layer], step + 1, 1.0),), ())
    assert view.past == (((1, 0, 0), (0, 1, 0)), ((0, 2, 0), (0, 0, 2)))
    assert view.counts == ((0, 0, 3), (3, 0, 0)) and view.step == 2
    for unit in (ExpertId(1, 1), ExpertId(1, 2), ExpertId(1, 1)):
        calls.look(1, (ExpertUse(unit.expert, 1, 1.0),), ())
        calls.bring(unit, "demand", view)
        store.pin(unit)
        store.release(unit)
    calls.bring(ExpertId(1, 0), "demand", view)
    assert calls.store.of_layer(1) == (0, 1), "the one that was not used for longest has left"


def test_a_store_without_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_expert_slots=0"):
        WeightStore(0, Ledger())


# ----------------------------------------------------------------------------------------- policies
def view(counts: Sequence[int], resident: Sequence[int] = (), host: Host = DESKTOP) -> RoutingView:
    uses = tuple(ExpertUse(i, n, float(n)) for i, n in enumerate(counts) if n)
    blank = tuple((0,) * len(counts) for _ in range(4))
    return RoutingView(0, 1, 4, uses, tuple(resident), 8, (), blank, (), mixtral(host))


def ends(places: Sequence[Where], at: RoutingView) -> float:
    """When link, device and CPU are done with these missing experts: one after the other on each, side by side."""
    cpu = sum(at.costs.cpu(use.num_tokens) for use, where in zip(at.uses, places, strict=True) if where == "cpu")
    arrival = device = 0.0
    for use, where in sorted(zip(at.uses, places, strict=True), key=lambda p: (-p[0].num_tokens, p[0].expert)):
        if where != "cpu":
            arrival += at.costs.fetch
            device = max(device, arrival) + at.costs.device(use.num_tokens)
    return max(cpu, device)


def serial(places: Sequence[Where], at: RoutingView) -> float:
    """The sum of all costs, as if nothing ran beside anything."""
    return sum(at.costs.cpu(u.num_tokens) if where == "cpu" else at.costs.fetch + at.costs.device(u.num_tokens)
               for u, where in zip(at.uses, places, strict=True))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=6, max_size=6).filter(any), st.sampled_from([DESKTOP, SERVER]))
def test_the_cheaper_side_is_the_cheapest_of_all_assignments(counts: list[int], host: Host) -> None:
    at = view(counts, host=host)
    chosen = WEIGHT_PLACEMENTS.resolve("cheaper_side").place(at)
    best = min(serial(places, at) for places in itertools.product(("cpu", "stream"), repeat=len(at.uses)))
    mine = serial([chosen[use.expert] for use in at.uses], at)
    assert mine == pytest.approx(best)
    for side in ("cpu", "stream"):
        assert mine <= serial([side] * len(at.uses), at) * 1.000001


@pytest.mark.parametrize("host", [DESKTOP, SERVER])
def test_the_cheaper_side_changes_within_one_token_of_where_the_costs_cross(host: Host) -> None:
    costs = mixtral(host)
    crossing = next(n for n in range(1, 5000) if costs.cpu(n) > costs.fetch + costs.device(n))
    policy = WEIGHT_PLACEMENTS.resolve("cheaper_side")
    assert policy.place(view([crossing - 1], host=host)) == {0: "cpu"}
    assert policy.place(view([crossing], host=host)) == {0: "stream"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=6, max_size=6).filter(any), st.sampled_from([DESKTOP, SERVER]))
def test_balanced_is_near_the_best_of_all_assignments(counts: list[int], host: Host) -> None:
    at = view(counts, host=host)
    chosen = Balanced().place(at)
    everything = {places: ends(places, at) for places in itertools.product(("cpu", "fetch"), repeat=len(at.uses))}
    mine = ends([chosen[use.expert] for use in at.uses], at)
    assert mine <= 1.03 * min(ends(["cpu"] * len(at.uses), at), ends(["fetch"] * len(at.uses), at))
    assert mine <= 1.5 * min(everything.values())


@pytest.mark.parametrize("name", WEIGHT_PLACEMENTS.names())
def test_every_policy_answers_for_every_expert_in_use(name: str) -> None:
    policy = WEIGHT_PLACEMENTS.resolve(name)
    at = view([3, 0, 1, 9], resident=() if name != "resident" else (0, 2, 3))
    assert set(checked_routing(policy.place(at), at)) == {0, 2, 3}
    assert all(0 <= unit.layer < 4 for unit in policy.prefetch(at))
    assert len(policy.initial([[0.25] * 4] * 4, 5)) <= 5


def test_nonsense_is_named() -> None:
    at = view([1, 2])
    for answer, problem in (({0: "cpu"}, "no place for expert 1"), ({0: "moon", 1: "cpu"}, "no place for expert 0"),
                            ({0: "device", 1: "cpu"}, "not on the device")):  # fmt: skip
        with pytest.raises(PolicyError, match=problem):
            checked_routing(answer, at)
    last = RoutingView(0, 3, 4, at.uses, (), 8, (), at.counts, (), at.costs)
    with pytest.raises(PolicyError, match="no layer after"):
        checked_routing({0: "defer", 1: "cpu"}, last)


def test_the_most_popular_experts_and_similar_routings() -> None:
    assert most_popular([[0.1, 0.6], [0.5, 0.2]], 2) == [ExpertId(0, 1), ExpertId(1, 0)]
    a, b = ((1, 0), (0, 2)), ((2, 0), (2, 0))
    assert similarity(a, a, 2) == pytest.approx(1.0)
    assert similarity(a, b, 2) == pytest.approx(0.5) and similarity(a, b, 1) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------- timelines
def one_by_one(spans: Sequence[ResourceSpan]) -> bool:
    ordered = sorted(spans, key=lambda span: span.start)
    return all(a.end <= b.start + 1e-12 for a, b in itertools.pairwise(ordered))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([n for n in WEIGHT_PLACEMENTS.names() if n != "resident"]), st.integers(1, 5), st.integers(1, 32),
       st.integers(0, 3))  # fmt: skip
def test_no_resource_does_two_things_at_once(name: str, batch: int, slots: int, seed: int) -> None:
    trace = made_trace(4, 12, seed=seed)
    steps = list(trace.decode_steps(batch, 6))
    run = simulate(WEIGHT_PLACEMENTS.resolve(name), trace, steps, mixtral(SERVER), slots, trace.popularity())
    for resource in ("device", "cpu", "h2d"):
        assert one_by_one([span for span in run.spans if span.resource == resource])
    busy = [sum(s.end - s.start for s in run.spans if s.resource == r) for r in ("device", "cpu")]
    assert run.seconds >= max(busy) - 1e-9
    assert sum(run.step_seconds) == pytest.approx(run.seconds)
    for dispatch in run.dispatches:
        assert set(dispatch.chosen) == {use.expert for use in dispatch.work.uses}


def test_an_expert_is_not_computed_before_it_arrives() -> None:
    timelines = Timelines()
    stage = ExpertStage(Seam("weights", LRU(), LRU(), EventLog(VirtualClock()), math.inf), mixtral(DESKTOP), 2, 4, timelines,
                        [[0.5] * EXPERTS] * 2)  # fmt: skip
    work = LayerWork(0, (ExpertUse(5, 1, 0.5), ExpertUse(6, 3, 0.5)))
    done, happened = stage.run(work, 1.0), stage.take()
    arrivals = {s.op.split()[1]: s.end for s in happened.copies}
    computed = {s.op.split()[1]: s.start for s in happened.spans if s.resource == "device"}
    assert set(arrivals) == set(computed) == {"0.5", "0.6"}
    assert all(computed[unit] >= arrivals[unit] > 1.0 for unit in arrivals)
    assert arrivals["0.6"] < arrivals["0.5"], "the expert that more tokens wait for comes first"
    assert done.end == max(s.end for s in happened.spans)
    assert not any(stage.take()), "what was taken is not told again"


def rates(policy: str, trace: RoutingTrace, slots: int, host: Host = SERVER, batch: int = 1, steps: int = 60) -> float:
    plan = list(trace.decode_steps(batch, steps))
    future = [[sorted({u.expert for u in trace.uses(rows, layer)}) for layer in range(trace.num_layers)] for rows in plan]
    chosen = Oracle(future) if policy == "oracle" else WEIGHT_PLACEMENTS.resolve(policy)
    return simulate(chosen, trace, plan, mixtral(host), slots, TRACE.popularity()).hit_rate


@pytest.mark.parametrize("slots", [8, 12, 16, 24])
def test_recency_beats_popularity_on_bursts_and_loses_to_knowing_the_future(slots: int) -> None:
    trace = made_trace(stay=0.8, seed=5)
    assert rates("popular", trace, slots) < rates("lru", trace, slots) <= rates("oracle", trace, slots)


def test_cpu_or_link_at_the_two_ends() -> None:
    """One token: the CPU computes sooner than the link brings. A long prompt: the link wins."""
    for host, decode in ((DESKTOP, 1.5), (SERVER, 5.0)):
        costs = mixtral(host)
        assert (costs.fetch + costs.device(1)) / costs.cpu(1) > decode
        tokens = 2048 * 2 // EXPERTS
        assert costs.cpu(tokens) / (costs.fetch + costs.device(tokens)) > 3


# ------------------------------------------------------------------------------------------- traces
def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    TRACE.save(tmp_path / "t.npz")
    back = load_routing(tmp_path / "t.npz")
    assert np.array_equal(back.experts, TRACE.experts) and np.allclose(back.weights, TRACE.weights, atol=0.01)
    assert back.uses([0, 1, 2], 3)[0].num_tokens == TRACE.uses([0, 1, 2], 3)[0].num_tokens
    assert sum(use.num_tokens for use in TRACE.uses([0, 5], 1)) == 4


def test_a_deeper_trace_renames_experts_and_keeps_their_skew() -> None:
    deep = TRACE.deeper(9)
    assert deep.num_layers == 9
    assert sorted(deep.popularity()[5]) == pytest.approx(sorted(TRACE.popularity()[1]))
    assert deep.popularity()[5] != TRACE.popularity()[1]
    assert np.array_equal(deep.guess[:, 4], deep.experts[:, 5]), "inside a repetition a perfect guess stays perfect"


def test_a_part_of_a_trace_begins_at_its_own_zero() -> None:
    part = TRACE.sequences(3, 5)
    assert part.num_sequences == 2 and part.starts.tolist() == [0, 40, 80]
    assert np.array_equal(part.experts[0], TRACE.experts[120])


def test_a_missing_or_broken_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="neither a file nor a shipped trace"):
        load_routing("routing-of-nobody")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(TraceError, match="cannot be read"):
        load_routing(tmp_path / "broken.npz")


def test_a_faster_link_never_slows_a_run() -> None:
    plan = list(TRACE.decode_steps(2, 20))
    slow, fast = mixtral(SERVER), mixtral(SERVER)
    fast._link_rate *= 2
    for name in ("lru", "on_demand", "popular"):
        policy = WEIGHT_PLACEMENTS.resolve(name)
        runs = [simulate(policy, TRACE, plan, costs, 8, TRACE.popularity()).seconds for costs in (slow, fast)]
        assert runs[1] < runs[0]



# ---------------------------------------------------------------------------------- whole runs
def offloaded(weights: object, **fields: object) -> Run:
    config = EngineConfig(model="mixtral-8x7b", executor="sim", hardware="a10", weights=weights, num_expert_slots=48, log_level=4,
                          max_num_batched_tokens=256, **fields)  # type: ignore[arg-type]  # fmt: skip
    return run(config, Workload.poisson(rate=0.5, n=4, prompt=40, output=6, seed=0))


@pytest.mark.parametrize("weights", ["lru", "balanced", "deferred"])
def test_a_mixture_that_does_not_fit_is_simulated_with_its_experts_in_the_log(weights: str) -> None:
    done = offloaded(weights)
    assert len(done.requests) == 4 and done.verify() == []
    dispatched = done.events("ExpertsDispatched")
    assert {event.layer for event in dispatched} == set(range(32))
    for resource in ("device", "cpu", "h2d"):
        assert one_by_one([ResourceSpan(e.resource, e.start, e.end, e.op) for e in done.events("Span") if e.resource == resource])
    assert bool(done.events("ExpertFetched")) == (weights != "deferred")
    assert any(event.cpu or event.deferred for event in dispatched) == (weights != "lru")


def test_a_shorter_way_to_the_experts_is_a_faster_run() -> None:
    slow, fast = offloaded("cheaper_side", host="cpu-2core"), offloaded("cheaper_side", host="xeon-6342-2s")
    assert fast.metrics.duration < slow.metrics.duration


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="no experts to place"):
        run(EngineConfig(model="llama-2-7b", executor="sim", weights="lru"), Workload.poisson(rate=1, n=1, prompt=4, output=2))
    with pytest.raises(ConfigError, match="placement='fastdecode'"):
        offloaded("lru", placement="fastdecode")
    with pytest.raises(ConfigError, match="128 experts"):
        config = EngineConfig(model="qwen3-30b-a3b", executor="sim", hardware="a100-80gb", weights="lru")
        run(config, Workload.poisson(rate=1, n=1, prompt=4, output=2))
    with pytest.raises(ConfigError, match="cannot begin or end"):
        offloaded("lru").fork(at=2, weights="resident")


@pytest.mark.parametrize("weights", ["lru", "balanced", "deferred", "similar_past"])
def test_a_run_with_experts_on_the_host_forks_into_itself(weights: str) -> None:
    """The fork finds the same experts on the device and the same copies under way."""
    done = offloaded(weights)
    same = done.fork(at=done.steps[len(done.steps) // 2].step)
    assert same.log_events[1:] == done.log_events[1:] and same.verify() == []


def test_a_fork_goes_on_under_another_placement_of_experts() -> None:
    done = offloaded("on_demand", host="xeon-6342-2s")
    at = done.steps[3].step
    fork = done.fork(at=at, weights="balanced")
    assert not any(event.cpu for event in done.events("ExpertsDispatched"))
    assert {event.step > at for event in fork.events("ExpertsDispatched") if event.cpu} == {True}
    assert fork.metrics.duration < done.metrics.duration and fork.verify() == []


class Dreamer(LRU):
    """Wants an expert that the model does not have."""

    name = "dreamer"

    def prefetch(self, view: RoutingView) -> list[ExpertId]:
        return [ExpertId(view.layer, 99)]


def test_a_dream_is_refused_and_the_run_goes_on() -> None:
    done = offloaded(Dreamer())
    assert len(done.requests) == 4 and all(event.expert < 8 for event in done.events("ExpertFetched"))
    assert "is no expert of 32 layers" in done.events("PolicyFailed")[0].error
