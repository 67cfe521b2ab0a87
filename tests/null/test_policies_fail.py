"""Plug-ins that raise, lie, overrun or answer nonsense: the default decides, the log says why, the run goes on."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simlab import Watch, expected_tokens, run_to_end, sim_engine, specs

from llmlab.decoding.autoregressive import Autoregressive
from llmlab.events import catalog as ev
from llmlab.plugins import REGISTRIES
from llmlab.registry import policy_name
from llmlab.scheduling.composers import Chunked
from llmlab.scheduling.watchdog import Overrun, Watchdog
from llmlab.seams import Admit, EngineView, Need, Offers, RequestView, TierOption, Wait
from llmlab.types import ConfigError, SamplingParams, Span, WorkItem

# method of each seam, and the built-in that takes over
METHODS = {"ordering": "key", "admission": "admit", "composer": "compose", "victim": "score", "placement": "place",
           "tiering": "choose", "eviction": "score"}  # fmt: skip
DEFAULTS = {"ordering": "fcfs", "admission": "prompt_fits", "composer": "chunked", "victim": "last_come",
            "placement": "device_only", "tiering": "recompute", "eviction": "lru"}  # fmt: skip


def plugin(seam: str, answer: Callable[..., Any]) -> Any:
    """An object for `seam` whose one method is `answer`."""
    return type("Evil", (), {"refresh": "arrival", METHODS[seam]: lambda self, *args: answer(*args)})()


def crowd(engine: Any, n: int = 8) -> None:
    """More than the pool holds, with shared prefixes, so that every seam is asked."""
    for i in range(n):
        prompt = [i % 2] * 3 + [i] * (1 + i % 3)
        engine.add_request(prompt, SamplingParams(max_tokens=9, ignore_eos=True), priority=i % 3)


def survives(engine: Any, max_steps: int = 800) -> list[ev.PolicyFailed]:
    """All requests finish with the right tokens and a sound core; the failures that were logged."""
    watch = Watch(engine)
    crowd(engine)
    run_to_end(engine, max_steps, watch)
    for name, spec in specs(engine).items():
        assert watch.state.requests[name].output_token_ids == expected_tokens(engine, spec)
    return engine.log.filter(ev.PolicyFailed)  # type: ignore[no-any-return]


SMALL = {"num_blocks": 8, "block_size": 2, "max_num_batched_tokens": 12, "tiering": "swap"}


def small(seam: str, policy: Any, **more: Any) -> Any:
    return sim_engine(**{**SMALL, **more, seam: policy})


def raises(*args: Any) -> Any:
    raise ZeroDivisionError("on purpose")


NONSENSE: dict[str, list[Any]] = {
    "ordering": [None, float("nan"), [1], {}, (1, None), (1, (2, 3)), 10**400, 1j, b"x", "a", ()],
    "admission": [None, True, "yes", Admit, Wait(None), Wait(5), 3],  # type: ignore[arg-type]
    "composer": [None, 5, "items", [None], [1, 2], {"a": 1}, [WorkItem("nobody", Span(0, 1))]],
    "victim": [None, float("nan"), "", [0], (None,), (), -(10**400)],
    "placement": [None, [], 7, [None] * 3],
    "tiering": [None, "sell", 0, ["swap"], ""],
    "eviction": [None, float("nan"), [1], 10**400, "x", ()],
}  # fmt: skip


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("seam", METHODS)
def test_a_policy_that_raises_is_replaced_for_that_decision(seam: str, overlap_depth: int) -> None:
    failed = survives(small(seam, plugin(seam, raises), overlap_depth=overlap_depth))
    assert failed
    for event in failed:
        assert (event.seam, event.policy, event.fallback) == (seam, "Evil", DEFAULTS[seam])
        assert event.error == "ZeroDivisionError: on purpose"


@pytest.mark.parametrize(("seam", "answer"), [(s, a) for s, answers in NONSENSE.items() for a in answers],
                         ids=lambda value: str(value)[:12])  # fmt: skip
def test_a_nonsensical_answer_is_refused_with_its_reason(seam: str, answer: Any) -> None:
    failed = survives(small(seam, plugin(seam, lambda *args: answer)))
    assert failed and all(event.seam == seam and event.error for event in failed)


def test_the_default_decides_exactly_as_if_it_had_been_chosen() -> None:
    """A policy that always fails leaves the same history as the default, but for the failures."""
    kinds = (ev.StepPlanned, ev.RequestPreempted, ev.TokensReleased, ev.RequestFinished)

    def history(**fields: Any) -> list[Any]:
        engine = sim_engine(**{**SMALL, "tiering": "recompute", **fields})
        crowd(engine)
        run_to_end(engine, 800)
        return [(type(e), e.step, e.request, getattr(e, "items", None)) for e in engine.log.filter(*kinds)]

    assert history(**{seam: plugin(seam, raises) for seam in METHODS}) == history()


def test_an_overrun_is_measured_in_cpu_time_and_the_answer_dropped() -> None:
    def slow(request: RequestView, now: float) -> float:
        until = time.thread_time() + 0.004
        while time.thread_time() < until:
            pass
        return 0.0

    failed = survives(small("ordering", plugin("ordering", slow), policy_timeout=0.001))
    assert failed and all("allowed are 0.001 s" in event.error for event in failed)


class Stubborn:
    """Loops for ever and swallows what it can, at its first three questions."""

    def __init__(self, seam: str) -> None:
        self.left = 3
        self.refresh = "arrival"
        self._default = REGISTRIES[seam].resolve(DEFAULTS.get(seam, "autoregressive"))
        for method in ("key", "admit", "compose", "score", "accept", "work"):
            if hasattr(self._default, method):
                setattr(self, method, functools.partial(self._ask, method, method in (METHODS.get(seam), "accept")))

    def _ask(self, method: str, loops: bool, *args: Any) -> Any:
        self.left -= loops
        while loops and self.left >= 0:
            try:
                while True:
                    pass
            except Exception:
                pass
        return getattr(self._default, method)(*args)


@pytest.mark.parametrize("seam", ["ordering", "composer", "victim", "decoding"])
def test_an_endless_loop_is_interrupted(seam: str) -> None:
    failed = survives(small(seam, Stubborn(seam), policy_timeout=0.03))
    assert len(failed) == 3 and {event.seam for event in failed} == {seam}
    assert all("interrupted after" in event.error for event in failed)


def test_who_waits_is_not_interrupted_and_nobody_watches_when_nobody_is_asked() -> None:
    dog = Watchdog(0.01)
    dog.limit = 0.02
    assert dog.call(lambda: time.sleep(0.1)) is None
    with pytest.raises(Overrun):
        dog.call(lambda: [None for _ in itertools.count()])
    assert dog.call(lambda: 5) == 5
    thread = dog._thread
    assert thread is not None
    thread.join(20)
    assert not thread.is_alive()
    assert dog.call(lambda: 6) == 6  # and it watches again
    with pytest.raises(Overrun):
        dog.call(lambda: [None for _ in itertools.count()])


def test_trusted_policies_start_no_thread() -> None:
    before = {thread.name for thread in threading.enumerate()}
    engine = small("ordering", "fcfs")
    crowd(engine)
    run_to_end(engine, 800)
    assert {thread.name for thread in threading.enumerate()} - before == set()


def test_keys_of_different_kinds_sort_all_the_same() -> None:
    answers: list[Any] = [3, (1, -2.5), 2.5, np.float32(7), (np.int64(3), 1), (1, 2, 3), float("inf"), -(2**62), True, (-float("inf"),)]
    turn = iter(answers * 50)
    for seam in ("ordering", "victim", "eviction"):
        failed = survives(small(seam, plugin(seam, lambda *args: next(turn)), log_level=3))
        assert not failed
    assert not survives(small("ordering", _StepOrdering(random.Random(1))))


class _StepOrdering:
    """Sorts the queue anew in every step, by whatever comes to mind."""

    refresh = "step"

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def key(self, request: RequestView, now: float) -> Any:
        return self._rng.choice([1, (2, 1), (2,), 0.5])


def test_a_composer_may_be_a_generator() -> None:
    def compose(view: EngineView, offers: Offers) -> Iterator[WorkItem]:
        yield from Chunked().compose(view, offers)

    assert not survives(small("composer", plugin("composer", compose)))


def test_composers_that_break_a_limit_are_refused() -> None:
    def all_of_it(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        return [*offers.running, *offers.waiting]

    def twice(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        return [*offers.running, *offers.running] or offers.waiting[:1]

    def longer(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        item = (*offers.running, *offers.waiting)[0]
        return [WorkItem(item.request, Span(item.tokens.start, item.tokens.stop + 1))]

    def later(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        item = (*offers.running, *offers.waiting)[0]
        return [WorkItem(item.request, Span(item.tokens.start + 1, item.tokens.stop + 1))]

    def empty_span(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        item = (*offers.running, *offers.waiting)[0]
        return [WorkItem(item.request, Span(item.tokens.start, item.tokens.start))]

    wanted = {all_of_it: "above the budget", twice: "twice", longer: "not a cut", later: "not a cut", empty_span: "not a cut"}
    for compose, message in wanted.items():
        failed = survives(small("composer", plugin("composer", compose), max_num_batched_tokens=6))
        assert any(message in event.error for event in failed), compose.__name__


def test_a_composer_that_never_composes_cannot_stop_the_run() -> None:
    failed = survives(small("composer", plugin("composer", lambda view, offers: [])))
    assert {event.error for event in failed} == {"composed nothing while nothing is in flight"}


def test_an_admission_that_always_waits_lets_one_in_at_a_time() -> None:
    engine = small("admission", plugin("admission", lambda view, request, need: Wait("never")))
    assert not survives(engine)
    assert max(len(e.items) for e in engine.log.filter(ev.StepPlanned)) == 1


def test_the_oldest_running_request_is_never_a_candidate() -> None:
    """So somebody always advances, whatever a victim policy says."""

    def oldest_first(view: EngineView, candidate: RequestView, needy: RequestView) -> float:
        still = engine.scheduler.running.values()
        oldest = min(still, key=lambda s: (s.request.arrival, s.request.number))
        assert candidate.id != oldest.id
        return candidate.number

    engine = small("victim", plugin("victim", oldest_first))
    assert not survives(engine)
    assert engine.log.filter(ev.RequestPreempted)


@pytest.mark.parametrize("view_cap", [1, 2, 64])
@pytest.mark.parametrize("tiering", ["recompute", "swap"])
def test_siblings_that_an_ordering_puts_first_do_not_wait_for_their_parent(view_cap: int, tiering: str) -> None:
    last_come_first = plugin("ordering", lambda request, now: -request.number)
    engine = small("ordering", last_come_first, view_cap=view_cap, tiering=tiering)
    for i in range(4):
        engine.add_request([i] * 5, SamplingParams(n=3, max_tokens=6, ignore_eos=True))
    assert not survives(engine, 2000)


def test_a_composer_that_starves_the_oldest_ends_all_the_same() -> None:
    def newest_only(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        last = (*offers.running, *offers.waiting)[-1]
        return [last.shortened(min(last.num_tokens, 2))]

    for admission in ("optimistic", "prompt_fits", "worst_case"):
        for overlap_depth in (0, 1, 2):
            policy = plugin("composer", newest_only)
            survives(small("composer", policy, admission=admission, overlap_depth=overlap_depth), 2000)


def test_policies_cannot_change_what_they_see() -> None:
    def vandal(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        for target in (view, view.pool, view.running[0] if view.running else view.waiting[0], offers):
            for name in target.__struct_fields__:
                with pytest.raises(AttributeError):
                    setattr(target, name, None)
        return Chunked().compose(view, offers)

    assert not survives(small("composer", plugin("composer", vandal)))


def test_placement_may_move_items_but_not_change_them() -> None:
    import msgspec

    def cpu_lane(view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem]:
        return [msgspec.structs.replace(i, device="cpu", lane=1) for i in items]

    def shorter(view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem]:
        return items[:-1]

    def swapped(view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem]:
        return [msgspec.structs.replace(i, emit="none") for i in items]

    engine = small("placement", plugin("placement", cpu_lane))
    assert not survives(engine)
    assert {i.lane for e in engine.log.filter(ev.StepPlanned) for i in e.items} == {1}
    assert survives(small("placement", plugin("placement", shorter)))
    assert survives(small("placement", plugin("placement", swapped)))


@given(seed=st.integers(0, 2**32), overlap_depth=st.integers(0, 2), rate=st.sampled_from([0.05, 0.5, 1.0]))
@settings(max_examples=40)
def test_random_answers_at_every_seam_at_once(seed: int, overlap_depth: int, rate: float) -> None:
    rng = random.Random(seed)

    def maybe(good: Callable[..., Any], seam: str) -> Callable[..., Any]:
        def answer(*args: Any) -> Any:
            if rng.random() > rate:
                return good(*args)
            if rng.random() < 0.3:
                raise RuntimeError("dice")
            return rng.choice(NONSENSE[seam])

        return answer

    def compose(view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        pool = [*offers.running, *offers.waiting]
        rng.shuffle(pool)
        return [o.shortened(rng.randint(1, o.num_tokens)) for o in pool[: rng.randint(0, 3)]]

    def choose(view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
        return rng.choice([o.mode for o in options])

    good: dict[str, Callable[..., Any]] = {
        "ordering": lambda request, now: rng.choice([rng.random(), (1, 2)]),
        "admission": lambda view, request, need: rng.choice([Admit("heads"), Wait("tails")]),
        "composer": compose, "victim": lambda view, candidate, needy: rng.random(),
        "placement": lambda view, items: items, "tiering": choose, "eviction": lambda block: rng.random(),
    }  # fmt: skip
    policies = {seam: plugin(seam, maybe(answer, seam)) for seam, answer in good.items()}
    survives(sim_engine(**{**SMALL, **policies, "overlap_depth": overlap_depth}), 4000)


@pytest.mark.parametrize("broken", ["work", "accept"])
def test_a_decoding_method_that_raises_is_replaced_too(broken: str) -> None:
    class Decoding(Autoregressive):
        pass

    setattr(Decoding, broken, lambda self, *args: raises())
    assert survives(sim_engine(**{**SMALL, "decoding": Decoding()}))


class _Wrong:
    """Has none of the methods that it should have."""


@pytest.mark.parametrize("seam", METHODS)
@pytest.mark.parametrize("policy", [_Wrong(), 5, None, 3.5, [1], _Wrong])
def test_an_object_that_is_no_policy_is_a_configuration_error(seam: str, policy: Any) -> None:
    with pytest.raises(ConfigError, match=seam):
        sim_engine(**{seam: policy})


@pytest.mark.parametrize(("seam", "name", "near"), [
    ("ordering", "fcsf", "fcfs"), ("composer", "chunkd", "chunked"), ("victim", "last_came", "last_come"),
    ("admission", "worstcase", "worst_case"), ("tiering", "swp", "swap"), ("eviction", "lur", "lru"),
    ("placement", "device", "device_only"), ("decoding", "autoregresive", "autoregressive"),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_the_nearest(seam: str, name: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sim_engine(**{seam: name})
    assert seam in str(caught.value) and repr(name) in str(caught.value)
    assert f"Did you mean '{near}'" in str(caught.value) or f"or '{near}'" in str(caught.value)


def test_names_in_the_log_are_the_policies_own() -> None:
    class Mine:
        name = "my_order"
        refresh = "arrival"

        def key(self, request: RequestView, now: float) -> float:
            return -request.number

    engine = small("ordering", Mine())
    survives(engine)
    assert policy_name(Mine()) == "my_order" == engine.log.filter(ev.RunStarted)[0].config["ordering"]
    decisions = [e for e in engine.log.filter(ev.Decision) if e.seam == "ordering"]
    assert decisions and {e.policy for e in decisions} == {"my_order"}
    assert Need(1, 2).total == 2
