"""The checker of policies: every check finds the policy that breaks its rule, and lets the others pass."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest

import llmlab
from llmlab import checking
from llmlab.plugins import REGISTRIES
from llmlab.scheduling.composers import Chunked
from llmlab.seams import Admit, BlockView, EngineView, Need, Offers, RequestView, TierOption, Wait
from llmlab.types import ConfigError, LabError, Request, WorkItem

SEEN: list[str] = []  # what a careless policy leaves behind


class _Ordering:
    """The innocent ordering that the guilty ones below are made of."""

    refresh = "arrival"

    def key(self, request: RequestView, now: float) -> Any:
        return request.arrival


class _Composer:
    def compose(self, view: EngineView, offers: Offers) -> Sequence[WorkItem]:
        return Chunked().compose(view, offers)


class _Victim:
    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Any:
        return -candidate.arrival


class _Tiering:
    def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
        return "recompute"


class _Admission:
    def admit(self, view: EngineView, request: RequestView, need: Need) -> Any:
        return Admit() if need.prompt <= view.pool.num_free else Wait("no room")


def guilty(base: type, answer: Callable[..., Any], **attributes: Any) -> Any:
    """An object of a kind, whose one method is `answer(self, ...)`."""
    (method,) = (name for name in vars(base) if not name.startswith("_") and callable(getattr(base, name)))
    return type("Guilty", (base,), {method: answer, **attributes})()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the two checks that take a second: other processes, and the simulated run."""
    monkeypatch.setattr(checking, "_elsewhere", lambda *args: [])
    monkeypatch.setattr(checking, "_starvation", lambda *args: [])
    monkeypatch.setattr(checking, "CALLS", 100)


# -------------------------------------------------------------------------------- what is in order
BUILT_IN = [
    (seam, name) for seam, registry in REGISTRIES.items() if seam in checking.SEAMS for name in registry.names()
]


@pytest.mark.parametrize(("seam", "name"), BUILT_IN)
def test_built_in_policies_keep_their_contracts(seam: str, name: str, quick: None) -> None:
    report = llmlab.check(name, seam)
    assert report.ok and report.seam == seam and report.policy == name, str(report)
    assert report.num_cases >= 20 and set(report.microseconds) == {8, 64, 256}
    assert str(report).startswith(f"{name} as {seam}: ok (")


@pytest.mark.parametrize(
    ("seam", "name"), [("ordering", "fcfs"), ("victim", "most_blocks"), ("composer", "decode_first")]
)
def test_built_in_policies_are_fair_and_the_same_everywhere(seam: str, name: str) -> None:
    report = llmlab.check(name, seam)
    assert report.ok and not report.notes, str(report)


class Bounded(_Ordering):
    """Remembers, but only so much, and answers as if it did not."""

    refresh = "step"

    def __init__(self) -> None:
        self.cache: OrderedDict[str, float] = OrderedDict()

    def key(self, request: RequestView, now: float) -> Any:
        self.cache[request.id] = request.arrival
        if len(self.cache) > 100:
            self.cache.popitem(last=False)
        return (request.priority, -now + request.arrival)


class Lengths:
    """A belief about lengths: a histogram of fixed size."""

    def __init__(self) -> None:
        self.counts = [0] * 20

    def observe(self, request: Request, num_output_tokens: int) -> None:
        self.counts[min(19, num_output_tokens.bit_length())] += 1

    def sample(self, request: RequestView, quantile: float) -> float:
        left = quantile * max(1, sum(self.counts))
        for power, count in enumerate(self.counts):
            left -= count
            if left <= 0:
                return float(2**power)
        return 2.0**20


def _lazily(self: Any, view: EngineView, offers: Offers) -> Iterator[WorkItem]:
    yield from Chunked().compose(view, offers)


@pytest.mark.parametrize("policy", [Bounded(), Lengths(), guilty(_Composer, _lazily), _Admission(), _Tiering(), _Victim()],
                         ids=lambda policy: type(policy).__name__)  # fmt: skip
def test_honest_plug_ins_pass(policy: Any, quick: None) -> None:
    assert llmlab.check(policy).failures == ()


def test_the_policy_that_is_handed_in_is_left_as_it_was(quick: None) -> None:
    policy = Bounded()
    llmlab.check(policy)
    assert not policy.cache


# ------------------------------------------------------------------------------------ what is not
def _counter(self: Any, request: RequestView, now: float) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    return self.calls


def _previous(self: Any, request: RequestView, now: float) -> Any:
    last, self.last = getattr(self, "last", 0.0), request.arrival
    return last


def _tags(self: Any, request: RequestView, now: float) -> Any:
    tags = request.metadata.get("tags")
    if tags:
        tags[1]["b"] = -1
    return 0


def _marks(self: Any, request: RequestView, now: float) -> Any:
    request.metadata["seen"] = True  # type: ignore[index]
    return 0


def _rejuvenates(self: Any, view: EngineView, candidate: RequestView, needy: RequestView) -> Any:
    msgspec.structs.force_setattr(candidate, "arrival", 0.0)
    return 0


def _keep_view(self: Any, view: EngineView, candidate: RequestView, needy: RequestView) -> Any:
    self.last = view
    return 0


def _keep_request(self: Any, request: RequestView, now: float) -> Any:
    self.last = request
    return 0


def _keep_metadata(self: Any, request: RequestView, now: float) -> Any:
    self.last = [request.metadata]
    return 0


def _keep_in_a_closure(self: Any, view: EngineView, offers: Offers) -> Any:
    self.later = lambda: view.running
    return Chunked().compose(view, offers)


def _dictionary(self: Any, request: RequestView, now: float) -> Any:
    self.__dict__.setdefault("arrivals", {})[request.id] = request.arrival
    return 0


def _global_list(self: Any, request: RequestView, now: float) -> Any:
    SEEN.append(request.id)
    return 0


@cache
def _length(name: str) -> int:
    return len(name)


def _unbounded_cache(self: Any, request: RequestView, now: float) -> Any:
    _length(request.id)
    return 0


def _position(self: Any, view: EngineView, candidate: RequestView, needy: RequestView) -> Any:
    return [r.id for r in view.running].index(candidate.id) if candidate in view.running else -1


def _eldest_first(self: Any, view: EngineView, request: RequestView, need: Need) -> Any:
    return Admit() if view.running and view.running[0].num_blocks > 3 else Wait("not yet")


def _two_at_most(self: Any, view: EngineView, offers: Offers) -> Any:
    every = [*offers.running, *offers.waiting]
    return [every[0].shortened(1)] if every else []


def _overfull(self: Any, view: EngineView, offers: Offers) -> Any:
    return [*offers.running, *offers.waiting]


def _busy(self: Any, request: RequestView, now: float) -> Any:
    until = time.thread_time() + 0.003
    while time.thread_time() < until:
        pass
    return 0


def _divides(self: Any, view: EngineView, candidate: RequestView, needy: RequestView) -> Any:
    return 1 / view.pool.num_free


def _exits(self: Any, request: RequestView, now: float) -> Any:
    raise SystemExit(3) if not request.metadata else ValueError("never mind") if request.number > 2**40 else SystemExit


EVIL: dict[str, tuple[Any, str]] = {
    "raises without metadata": (guilty(_Ordering, lambda self, r, now: r.metadata["output_len"]),
                                r"key\(\) raises KeyError: 'output_len'.*without deadlines and metadata"),
    "raises without a free block": (guilty(_Victim, _divides), r"score\(\) raises ZeroDivisionError.*no free block"),
    "raises without a deadline": (guilty(_Ordering, lambda self, r, now: r.deadline - now), "raises TypeError"),
    "raises in an empty view": (guilty(_Admission, lambda self, view, r, need: Wait(max(x.id for x in view.running))),
                                r"admit\(\) raises ValueError.*a view of nobody"),
    "raises on huge numbers": (guilty(_Ordering, lambda self, r, now: math.exp(r.arrival)), "OverflowError.*huge numbers"),
    "leaves the interpreter": (guilty(_Ordering, _exits), "raises SystemExit"),
    "is not a number": (guilty(_Ordering, lambda self, r, now: math.nan), r"answers nonsense: key=nan"),
    "is too long for a log": (guilty(_Ordering, lambda self, r, now: r.priority * 10**6), "answers nonsense.*hugely"),
    "says maybe": (guilty(_Admission, lambda self, view, r, need: "maybe"), "answers nonsense: admit='maybe'"),
    "sells": (guilty(_Tiering, lambda self, view, v, options: "swap"), "is not among the feasible options"),
    "overfills": (guilty(_Composer, _overfull), "above the budget"),
    "counts": (guilty(_Ordering, _counter), "no function of what it sees"),
    "rolls dice": (guilty(_Ordering, lambda self, r, now: random.random()), "no function of what it sees"),
    "reads the clock": (guilty(_Victim, lambda self, view, c, needy: time.time()), "no function of what it sees"),
    "looks at the last one": (guilty(_Ordering, _previous), "no function of what it sees"),
    "writes into metadata": (guilty(_Ordering, _marks), r"changes what it sees: \[0\].request.metadata was \{"),
    "writes into nested metadata": (guilty(_Ordering, _tags), "changes what it sees"),
    "breaks the seal": (guilty(_Victim, _rejuvenates), r"changes what it sees: .*arrival was .*, and is 0.0 afterwards"),
    "keeps the view": (guilty(_Victim, _keep_view), "keeps what it was shown: a EngineView"),
    "keeps the request": (guilty(_Ordering, _keep_request), "keeps what it was shown: a RequestView"),
    "keeps the metadata": (guilty(_Ordering, _keep_metadata), "keeps what it was shown: a dict"),
    "keeps it in a closure": (guilty(_Composer, _keep_in_a_closure), "keeps what it was shown"),
    "grows a dict": (guilty(_Ordering, _dictionary), "keeps growing: by [0-9]+ bytes with every call"),
    "grows a global": (guilty(_Ordering, _global_list), "keeps growing"),
    "grows a cache": (guilty(_Ordering, _unbounded_cache), "keeps growing"),
    "scores by position": (guilty(_Victim, _position), "the order of running requests matters"),
    "asks the first": (guilty(_Admission, _eldest_first), "the order of running requests matters.*Admit"),
    "takes the first option": (guilty(_Tiering, lambda self, view, v, options: options[0].mode if options[1].feasible else "recompute"),
                               "the order of options matters"),
    "takes the first offer": (guilty(_Composer, _two_at_most), "the order of offers that all fit matters"),
    "refreshes never": (guilty(_Ordering, lambda self, r, now: 0, refresh="steps"), "refresh is 'steps'"),
}  # fmt: skip


@pytest.mark.parametrize("crime", EVIL)
def test_each_rule_finds_who_breaks_it(crime: str, quick: None) -> None:
    policy, pattern = EVIL[crime]
    report = llmlab.check(policy)
    assert not report.ok
    assert any(re.search(pattern, sentence) for sentence in report.failures), str(report)
    for sentence in report.failures:
        assert sentence.endswith(".") and sentence in str(report) and len(sentence) < 600


def test_a_policy_that_overruns_is_named_with_its_time(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CALLS", 20)
    report = llmlab.check(guilty(_Ordering, _busy), timeout=0.001)
    assert any("key() is too slow: 0.00" in f and "the engine allows 0.001 s" in f for f in report.failures)
    assert report.microseconds[8] >= 2900


def _for_ever(self: Any, *args: Any) -> Any:
    while True:
        try:
            for _ in iter(int, 1):
                pass
        except Exception:
            pass


def _sleeps(self: Any, *args: Any) -> Any:
    while True:
        time.sleep(0.01)


def _ends_rarely(self: Any, request: RequestView, now: float) -> Any:
    return 0 if len(request.request.metadata) < 1 else _for_ever(self)


class Learner(Lengths):
    def observe(self, request: Request, num_output_tokens: int) -> None:
        _for_ever(self)


ENDLESS: dict[str, tuple[Any, str]] = {
    "always": (guilty(_Ordering, _for_ever), r"key\(\) does not come back: it was interrupted after 0\.\d+ s of CPU for .*allows 0.02 s"),
    "composing": (guilty(_Composer, _for_ever), r"compose\(\) does not come back"),
    "sometimes": (guilty(_Ordering, _ends_rarely), r"key\(\) does not come back"),
    "sleeping": (guilty(_Tiering, _sleeps), r"choose\(\) does not come back"),
    "learning": (Learner(), "does not come back: .* for what it observes"),
}  # fmt: skip


@pytest.mark.parametrize("crime", ENDLESS)
def test_a_policy_that_never_ends_is_answered_with_a_sentence(crime: str, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "LONGEST_WAIT", 0.2)
    policy, pattern = ENDLESS[crime]
    report = llmlab.check(policy, timeout=0.02)
    assert len(report.failures) == 1 and re.search(pattern, report.failures[0]), str(report)
    assert "nothing more was asked" in str(report) and not report.ok
    assert str(report).splitlines()[0].endswith(": 1 failure")


class EndlessElsewhere(_Ordering):
    """Comes back only where strings hash as they do here."""

    def __init__(self) -> None:
        self.home = hash("llmlab")

    def key(self, request: RequestView, now: float) -> Any:
        return request.arrival if hash("llmlab") == self.home else _for_ever(self)


def test_a_policy_that_never_ends_elsewhere_or_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checking, "_starvation", lambda *args: [])
        report = llmlab.check(EndlessElsewhere(), timeout=0.02)
    assert any(re.search("in another process .* does not come back", f) for f in report.failures), str(report)
    monkeypatch.setattr(checking, "_elsewhere", lambda *args: [])
    monkeypatch.setattr(checking, "_NARROW", {**checking._NARROW, "policy_timeout": 0.02})
    report = llmlab.check(guilty(_Ordering, lambda self, r, now: 0 if not r.metadata or "tags" in r.metadata else _for_ever(self)))
    assert any("in a simulated run its calls do not come back" in f for f in report.failures), str(report)


def test_a_length_model_that_is_none(quick: None) -> None:
    class Mute:
        def sample(self, request: RequestView, quantile: float) -> float:
            return -1.0 if quantile > 0.9 else 3.0

    class Hoarder(Lengths):
        def observe(self, request: Request, num_output_tokens: int) -> None:
            self.counts.append(num_output_tokens)

    failures = llmlab.check(Mute()).failures
    assert any("no observe()" in f for f in failures) and any("0 or more" in f for f in failures)
    assert any("keeps growing" in f for f in llmlab.check(Hoarder()).failures)


# ----------------------------------------------------------------------------------- other processes
class ByHash(_Ordering):
    """Equal to nothing but itself: `hash` of a string differs from process to process."""

    def key(self, request: RequestView, now: float) -> Any:
        return hash(request.id)


class BySet(_Victim):
    """The first of a set: an order that only this process knows."""

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Any:
        return candidate.id == next(iter({r.id for r in view.running}), "")


@pytest.mark.parametrize("policy", [ByHash(), BySet()], ids=lambda policy: type(policy).__name__)
def test_what_depends_on_the_hash_seed_is_found_in_another_process(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "_starvation", lambda *args: [])
    failures = llmlab.check(policy).failures
    assert any(f.startswith("another process (PYTHONHASHSEED=") and "decides otherwise" in f for f in failures)


def test_what_cannot_travel_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_starvation", lambda *args: [])
    report = llmlab.check(guilty(_Ordering, lambda self, r, now: 0, lock=threading.Lock()))
    assert report.ok and len(report.notes) == 1 and "not asked in other processes" in report.notes[0]
    assert "note: it was not asked" in str(report)


SCRIPT = """
import llmlab

class Mine:
    refresh = "arrival"
    def key(self, request, now):
        print("asked")
        return hash(request.id) if SHAKY else request.arrival

for SHAKY in (False, True):
    report = llmlab.check(Mine(), patience=1e9)
    assert report.ok != SHAKY and not report.notes, str(report)
"""


def test_policies_of_a_script_or_a_cell_travel_too(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, str(script)], check=True, timeout=100, env=env, capture_output=True)


# ------------------------------------------------------------------------------------ simulated runs
def _newest_only(self: Any, view: EngineView, offers: Offers) -> Any:
    newest = max((*offers.running, *offers.waiting), key=lambda o: [r.arrival for r in (*view.running, *view.waiting) if r.id == o.request],
                 default=None)  # fmt: skip
    return [newest.shortened(8)] if newest else []


def _leaves_clients(self: Any, request: RequestView, now: float) -> Any:
    return 0 if request.metadata == {} or "tags" in request.metadata else sys.exit(7)


def _fails_on_clients(self: Any, request: RequestView, now: float) -> Any:
    if request.metadata and "tags" not in request.metadata:
        raise RuntimeError("I do not serve clients")
    return 0


STARVING: dict[str, tuple[Any, str]] = {
    "newest first": (guilty(_Ordering, lambda self, r, now: -r.arrival), r"starves requests: a long request \(96 \+ 64 tokens\)"),
    "shortest first": (guilty(_Ordering, lambda self, r, now: r.num_prompt_tokens), "starves requests: a long request.*allowed are 5 times"),
    "longest first": (guilty(_Ordering, lambda self, r, now: -r.num_prompt_tokens), "starves requests: a short request"),
    "leaves a run": (guilty(_Ordering, _leaves_clients), "a simulated run ended with SystemExit: 7"),
    "fails in a run": (guilty(_Ordering, _fails_on_clients), "it failed [0-9]+ times, first: RuntimeError: I do not serve clients"),
}  # fmt: skip


@pytest.mark.parametrize("crime", STARVING)
def test_a_simulated_run_finds_who_starves(crime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_elsewhere", lambda *args: [])
    policy, pattern = STARVING[crime]
    report = llmlab.check(policy)
    assert any(re.search(pattern, sentence) for sentence in report.failures), str(report)
    if "starves" in pattern:
        assert llmlab.check(policy, patience=math.inf).ok


def test_a_composer_that_serves_the_newest_only_starves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_elsewhere", lambda *args: [])
    report = llmlab.check(guilty(_Composer, _newest_only))
    assert any(f.startswith("starves requests") for f in report.failures), str(report)


# -------------------------------------------------------------------------------------- what seam?
class Both(_Victim):
    def key(self, request: RequestView, now: float) -> float:
        return 0


def _any_score(*args: Any) -> int:
    return 0


def test_the_seam_is_recognised(quick: None) -> None:
    class Evict:
        def score(self, block: BlockView) -> float:
            return block.last_used

    assert llmlab.check(Evict()).seam == "eviction" and llmlab.check(_Victim()).seam == "victim"
    assert llmlab.check(Both(), "victim").seam == "victim" and llmlab.check(Both(), "ordering").seam == "ordering"
    assert llmlab.check("lru", "eviction").policy == "lru"


@pytest.mark.parametrize(("args", "message"), [
    ((Both(),), "fits ordering and victim"), ((type("S", (), {"score": staticmethod(_any_score)})(),), "fits victim and eviction"),
    ((object(),), r"has no method like key\(\) of ordering"), ((_Victim(), "eviction"), r"score\(\) of eviction, with its arg"),
    ((_Victim,), "is a class"), (("fcfs",), "a name needs its seam"), (("fcsf", "ordering"), "Did you mean 'fcfs'"),
    ((_Victim(), "victims"), "Did you mean 'victim'"), ((3,), "has no method"), ((None, "ordering"), "has no method"),
])  # fmt: skip
def test_what_is_no_policy_or_no_patience(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LabError, match=message) as caught:
        llmlab.check(*args)
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(ConfigError, match="patience=0"):
        llmlab.check("fcfs", "ordering", patience=0)
