"""`llmlab.check(policy)`: does a plug-in keep the contract of its seam? Failures as sentences.

total         an answer that makes sense for every view: nobody, one, hundreds, no free block, huge numbers
pure          the same view, the same answer, whenever and in whatever order it is asked; nothing in a view changes
forgetful     no view is kept, and memory does not grow with the number of calls
reproducible  other processes, with other hash seeds, answer the same
order-blind   listing the same requests in another order changes no choice
fair          in a simulated run an old request ends in time, although newer ones never stop coming
quick         microseconds for a call, and none beyond what the engine allows
finite        every call comes back: one that does not is interrupted, and nothing else is asked of that policy
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from llmlab.checking_views import Case, Views
from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.plugins import REGISTRIES
from llmlab.registry import policy_name
from llmlab.running import Feed
from llmlab.scheduling import seamcalls
from llmlab.scheduling.watchdog import Overrun, Watchdog
from llmlab.seams import BlockView, EngineView, Limits, Offers, RequestView
from llmlab.sweeping import pack
from llmlab.types import ConfigError, PolicyError, total_tokens, unknown_name
from llmlab.workloads.source import Finished, TimedRequest
from llmlab.workloads.workload import Workload

A = TypeVar("A")
PATIENCE = 5.0  # how many times later than under the default policies an old request may end
STREAM = 500  # newer requests in the simulated run
ROUNDS, CALLS = 5, 250  # to see whether memory grows
LONGEST_WAIT = 10.0  # seconds that a call may sleep
INTERRUPTED = 5  # calls of a simulated run that must be interrupted before it is given up


class Report(msgspec.Struct, frozen=True):
    """What `check` found. `failures`: sentences, none if all is well. `notes`: what could not be checked, and why.
    `microseconds`: median time of a call, by the number of requests in the view; `num_cases`: questions asked."""

    policy: str
    seam: str
    failures: tuple[str, ...]
    notes: tuple[str, ...]
    microseconds: Mapping[int, float]
    num_cases: int

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        speed = ", ".join(f"{took:.3g} µs with {size}" for size, took in self.microseconds.items())
        wrong = f"{len(self.failures)} failure{'s' if len(self.failures) > 1 else ''}"
        asked = f" ({self.num_cases} questions; a call takes {speed})" if self.microseconds else ""
        lines = [f"{self.policy} as {self.seam}: {wrong if self.failures else 'ok'}{asked}"]
        return "\n".join([*lines, *(f"  - {f}" for f in self.failures), *(f"  note: {n}" for n in self.notes)])


def check(policy: Any, seam: str | None = None, *, patience: float = PATIENCE, timeout: float | None = None) -> Report:
    """Whether `policy` (an object, or a registered name with its `seam`) keeps the contract of its seam.

    The seam is recognised by the methods, or named: ordering, admission, length_model, victim, composer, placement,
    eviction, tiering. `patience`: how many times later than under the default policies an old request may end
    (math.inf: as late as it likes; shortest-job-first, for one, starves by design). `timeout`: seconds of CPU for a
    call, by default the engine's. Works on a copy. Raises ConfigError for what is no policy.
    """
    if not patience > 0:
        raise ConfigError(
            "patience", patience, "must be a positive number of times", "5 is usual, math.inf forgives all."
        )
    subject = _subject(policy, seam)
    allowed = EngineConfig().policy_timeout if timeout is None else timeout
    try:
        return _examined(subject, patience, allowed)
    except Endless as found:
        return Report(policy_name(subject.policy), subject.seam, (str(found),), ("nothing more was asked of it.",), {}, 0)


def _examined(subject: Subject, patience: float, allowed: float) -> Report:
    """Raises Endless."""
    ask = _Asking(subject, allowed)
    cases, answers = ask.first_pass()
    notes: list[str] = []
    failures = [
        *_interface(subject), *_nonsense(ask, cases, answers), *_overruns(ask, cases, answers, allowed),
        *_changes(ask, cases), *_impurity(ask, cases, answers), *_order(ask), *_keeps(ask, answers), *_grows(ask, notes),
        *_elsewhere(ask, cases, answers, notes),
    ]  # fmt: skip
    if subject.seam in REGISTRIES:
        failures += _starvation(subject, patience)
    return Report(policy_name(subject.policy), subject.seam, tuple(failures), tuple(notes), ask.speed(), len(cases))


# --------------------------------------------------------------------------------------------- seams
class SeamOf(NamedTuple):
    """How to ask a seam: its method, its number of arguments, and the answer as plain, comparable data (raises
    PolicyError on nonsense). `choice` is the part that must not depend on the order of candidates."""

    method: str
    num_args: int
    plain: Callable[[Any, tuple[Any, ...]], Any]
    choice: Callable[[Any], Any]


def _plain_key(answer: Any, args: tuple[Any, ...]) -> Any:
    return seamcalls.checked_key(answer)


def _plain_admission(answer: Any, args: tuple[Any, ...]) -> Any:
    checked = seamcalls.checked_admission(answer)
    return type(checked).__name__, checked.reason


def _plain_items(answer: Any, args: tuple[Any, ...]) -> Any:
    view, offers = args
    return tuple((item.request, *item.tokens) for item in seamcalls.checked_items(answer, offers, view.limits))


def _plain_places(answer: Any, args: tuple[Any, ...]) -> Any:
    view, items = args
    return tuple((item.request, item.device, item.lane) for item in seamcalls.checked_places(answer, items, view).items)


def _plain_mode(answer: Any, args: tuple[Any, ...]) -> Any:
    return seamcalls.checked_mode(answer, [option.mode for option in args[2] if option.feasible])


def _plain_length(answer: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(answer, (int, float)) or not 0 <= answer < math.inf:
        raise PolicyError("sample", answer, "must be a finite number of tokens, 0 or more")
    return float(answer)


def _same(value: Any) -> Any:
    return value


SEAMS: Mapping[str, SeamOf] = {
    "ordering": SeamOf("key", 2, _plain_key, _same),
    "admission": SeamOf("admit", 3, _plain_admission, lambda answer: answer[0]),
    "length_model": SeamOf("sample", 2, _plain_length, _same),
    "victim": SeamOf("score", 3, _plain_key, _same),
    "composer": SeamOf("compose", 2, _plain_items, sorted),
    "placement": SeamOf("place", 2, _plain_places, _same),
    "eviction": SeamOf("score", 1, _plain_key, _same),
    "tiering": SeamOf("choose", 3, _plain_mode, _same),
}


class Subject(NamedTuple):
    """The policy under examination, at its seam."""

    policy: Any
    seam: str

    @property
    def method(self) -> str:
        return SEAMS[self.seam].method


def _subject(policy: Any, seam: str | None) -> Subject:
    if seam is not None and seam not in SEAMS:
        raise unknown_name("seam", seam, SEAMS)
    if isinstance(policy, str):
        if seam not in REGISTRIES:
            raise ConfigError("seam", seam, "a name needs its seam", f'Write check({policy!r}, "ordering").')
        policy = REGISTRIES[seam].resolve(policy)
    if isinstance(policy, type):
        raise ConfigError("policy", policy.__name__, "is a class, not an object", f"Write check({policy.__name__}()).")
    fitting = [name for name, of in SEAMS.items() if _takes(getattr(policy, of.method, None), of.num_args)]
    if seam is None and len(fitting) > 1:
        raise ConfigError(
            "policy", policy_name(policy), f"fits {' and '.join(fitting)}", "Name one: check(policy, seam)."
        )
    if not fitting or seam not in (None, *fitting):
        wanted = ", ".join(f"{of.method}() of {name}" for name, of in SEAMS.items() if seam in (None, name))
        raise ConfigError("policy", policy_name(policy), f"has no method like {wanted}, with its arguments",
                          "llmlab.seams says what each seam asks.")  # fmt: skip
    with suppress(Exception):  # what cannot be copied is examined itself
        policy = copy.deepcopy(policy)
    return Subject(policy, seam or fitting[0])


def _takes(method: Any, num_args: int) -> bool:
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(*range(num_args))
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        return True
    return True


# -------------------------------------------------------------------------------------------- asking
class Answer(NamedTuple):
    """What came back: plain data, or what went wrong. `seconds` of CPU."""

    value: Any
    error: str
    seconds: float

    @property
    def said(self) -> Any:
        return self.error or self.value


class Endless(Exception):
    """A call did not come back and was interrupted. Its text is the sentence of the report."""


class _Asking:
    """Puts questions to a policy as the engine would. Whoever asks gets `Endless` if a call must be interrupted."""

    def __init__(self, subject: Subject, allowed: float, seed: int = 0) -> None:
        self.subject, self._seed, self.allowed = subject, seed, allowed
        self.seam = SEAMS[subject.seam]
        self._watchdog = Watchdog(allowed, LONGEST_WAIT)

    def cases(self) -> list[Case]:
        """All questions; equal but fresh objects at every call."""
        return list(Views(self._seed).cases(self.subject.seam))

    def answer(self, case: Case) -> Answer:
        began = time.thread_time()
        value, error = None, ""
        try:
            value = self.guarded(lambda: self.seam.plain(getattr(self.subject.policy, self.seam.method)(*case.args), case.args), case)
        except Endless:
            raise
        except PolicyError as nonsense:
            error = f"answers nonsense: {nonsense}"
        except (Exception, SystemExit) as raised:  # a policy may raise anything
            error = f"raises {type(raised).__name__}: {raised}"
        return Answer(value, error, time.thread_time() - began)

    def guarded(self, call: Callable[[], A], case: Case) -> A:
        """What `call` gives, if it comes back. Raises Endless."""
        began = time.thread_time()
        try:
            return self._watchdog.call(call)
        except Overrun:
            spent = time.thread_time() - began
            raise Endless(f"{self.seam.method}() does not come back: it was interrupted after {spent:.2g} s of CPU for "
                          f"{case.name or 'a view'}, the engine allows {self.allowed:g} s.") from None  # fmt: skip

    def first_pass(self) -> tuple[list[Case], list[Answer]]:
        cases = self.cases()
        return cases, [self.answer(case) for case in cases]

    def speed(self) -> dict[int, float]:
        """Median microseconds of a call, by the size of the view."""
        took = {}
        for size in (8, 64, 256):
            views = Views(size)
            questions = [
                Case("", args) for args in views.questions(self.subject.seam, views.view(min(64, size // 2), size // 2))
            ]
            times = [self._seconds(case) for _ in range(max(1, 30 // len(questions))) for case in questions]
            took[size] = round(median(times) * 1e6, 2)
        return took

    def _seconds(self, case: Case) -> float:
        """Of the call alone; an answer that is made while it is read (a generator) is read to its end."""
        method = getattr(self.subject.policy, self.seam.method)

        def call() -> float:
            began = time.perf_counter()
            with suppress(Exception, SystemExit):
                answer = method(*case.args)
                if isinstance(answer, Iterator):
                    deque(answer, maxlen=0)
            return time.perf_counter() - began

        return self.guarded(call, case)


# -------------------------------------------------------------------------------------------- checks
def _interface(subject: Subject) -> list[str]:
    refresh = getattr(subject.policy, "refresh", "arrival")
    if subject.seam == "ordering" and refresh not in ("arrival", "step"):
        return [f"refresh is {refresh!r}, which means neither 'arrival' nor 'step': keys are computed on arrival only."]
    if subject.seam == "length_model" and not callable(getattr(subject.policy, "observe", None)):
        return ["it has no observe(): it can never learn."]
    return []


def _nonsense(ask: _Asking, cases: Sequence[Case], answers: Sequence[Answer]) -> list[str]:
    """Cases without a proper answer, grouped by what went wrong."""
    wrong: dict[str, dict[str, None]] = {}
    for case, answer in zip(cases, answers):
        if answer.error:
            wrong.setdefault(answer.error[:300], {})[case.name] = None
    sentences = [f"{ask.seam.method}() {error.rstrip('.')}. For {_some(list(names))}." for error, names in wrong.items()]
    return _few(sentences, "other errors")


def _overruns(ask: _Asking, cases: Sequence[Case], answers: Sequence[Answer], allowed: float) -> list[str]:
    slow = [(answer.seconds, case.name) for case, answer in zip(cases, answers) if answer.seconds > allowed]
    if not slow:
        return []
    seconds, name = max(slow)
    return [f"{ask.seam.method}() is too slow: {seconds:.2g} s of CPU for {name}, the engine allows {allowed:g} s."]


def _changes(ask: _Asking, cases: Sequence[Case]) -> list[str]:
    """Anything in the views of the first pass that is not as it was drawn."""
    found = (_difference(case.args, fresh.args, "") for case, fresh in zip(cases, ask.cases()))
    said = {f"{ask.seam.method}() changes what it sees: {what} (in {case.name}).": None
            for case, what in zip(cases, found) if what}  # fmt: skip
    return _few(list(said), "other changes", 2)


def _difference(now: Any, before: Any, path: str) -> str:
    """Where two values differ, as part of a sentence; "" if nowhere."""
    if now == before:
        return ""
    parts: Iterator[tuple[str, Any, Any]] = iter(())
    if isinstance(now, msgspec.Struct) and type(now) is type(before):
        parts = ((f".{name}", getattr(now, name), getattr(before, name)) for name in now.__struct_fields__)
    elif isinstance(now, (tuple, list)) and isinstance(before, (tuple, list)):
        parts = ((f"[{index}]", a, b) for index, (a, b) in enumerate(zip(now, before)))
    inside = next((found for name, a, b in parts if (found := _difference(a, b, path + name))), "")
    return inside or f"{path.lstrip('.') or 'an argument'} was {_short(before)}, and is {_short(now)} afterwards"


def _impurity(ask: _Asking, cases: Sequence[Case], answers: Sequence[Answer]) -> list[str]:
    """Ask everything again, in another order."""
    again = ask.cases()
    order = list(range(len(again)))
    random.Random(1).shuffle(order)
    second = {index: ask.answer(again[index]) for index in order}
    differing = [i for i, answer in enumerate(answers) if second[i].said != answer.said]
    if not differing:
        return []
    index = differing[0]
    return [f"{ask.seam.method}() is no function of what it sees: for {cases[index].name} it said {_short(answers[index].said)}, "
            f"and {_short(second[index].said)} when asked again; {len(differing)} of {len(answers)} answers changed."]  # fmt: skip


def _order(ask: _Asking) -> list[str]:
    """List the same candidates in another order: the choice must stay."""
    sentences = {}
    for what, case, turned in _turned(ask):
        here, there = ask.answer(case), ask.answer(turned)
        if not here.error and not there.error and not _agree(ask, case, here, there):
            sentences[what] = (f"the order of {what} matters: for {case.name} {ask.seam.method}() said {_short(here.value)}, and "
                               f"{_short(there.value)} when they were listed the other way round.")  # fmt: skip
    return list(sentences.values())


def _turned(ask: _Asking) -> Iterator[tuple[str, Case, Case]]:
    """Pairs of questions that differ in the order of something that is no order."""
    for case in ask.cases():
        if not case.args or not isinstance(case.args[0], EngineView):
            continue
        view, *rest = case.args
        yield "running requests", case, Case(case.name, (replace(view, running=view.running[::-1]), *rest))
        if ask.subject.seam == "tiering":
            yield "options", case, Case(case.name, (view, rest[0], rest[1][::-1]))
        elif ask.subject.seam == "composer":  # offers come in order of priority: it may matter only if something binds
            roomy = replace(view, limits=Limits(1 << 20, 1 << 40, view.limits.max_model_len))
            turned = Offers(rest[0].running[::-1], rest[0].waiting[::-1])
            yield "offers that all fit", Case(case.name, (roomy, rest[0])), Case(case.name, (roomy, turned))


def _sum_and_decodes(spans: Iterable[tuple[str, int, int]]) -> tuple[int, list[str]]:
    lengths = {name: stop - start for name, start, stop in spans}
    return sum(lengths.values()), sorted(name for name, length in lengths.items() if length == 1)


def _agree(ask: _Asking, case: Case, here: Answer, there: Answer) -> bool:
    """Whether two answers choose the same. A composer that leaves something out of what would fit has a budget of its own
    for prompts: how much of whose it computes may depend on the order then, the sum may not, nor who decodes."""
    if ask.subject.seam == "composer" and isinstance(case.args[1], Offers):
        offered = total_tokens([*case.args[1].running, *case.args[1].waiting])
        if sum(stop - start for _, start, stop in here.value) < offered:
            return _sum_and_decodes(here.value) == _sum_and_decodes(there.value)
    return bool(ask.seam.choice(here.value) == ask.seam.choice(there.value))


def _keeps(ask: _Asking, answers: Sequence[Answer]) -> list[str]:
    """Count the references to everything in a view before and after the call."""
    for case, answer in zip(ask.cases(), answers):
        if answer.error:
            continue  # its traceback holds the frame that holds the view
        shown = _parts(case.args)
        before = [sys.getrefcount(part) for part in shown]
        ask.answer(case)
        after = [sys.getrefcount(part) for part in shown]
        if after != before:
            gc.collect()  # what a cycle holds is not kept
            after = [sys.getrefcount(part) for part in shown]
        kept = [part for part, was, now in zip(shown, before, after) if now > was]
        if kept:
            return [f"{ask.seam.method}() keeps what it was shown: a {type(kept[0]).__name__} of {case.name} was still "
                    "referenced after the call."]  # fmt: skip
    return []


def _parts(args: tuple[Any, ...]) -> list[Any]:
    """The objects in the arguments of a call that nobody may keep."""
    found: list[Any] = []
    for arg in args:
        views = (
            [*arg.running, *arg.waiting]
            if isinstance(arg, EngineView)
            else [arg]
            if isinstance(arg, RequestView)
            else []
        )
        found += [arg] if isinstance(arg, (EngineView, Offers, BlockView)) else []
        for view in views:
            found += [view, view.request, view.request.metadata]
    return list({id(part): part for part in found}.values())


def _grows(ask: _Asking, notes: list[str]) -> list[str]:
    """Memory after each of several rounds of calls with new requests: it must come to rest."""
    began, where = time.process_time(), _files(ask.subject.policy)
    sizes: list[int] = []
    with _traced_memory():
        for number in range(ROUNDS):
            _one_round(ask, Views(1000 + number, prefix=f"g{number}."))
            gc.collect()
            sizes.append(_allocated(where))
            if time.process_time() - began > 3.0:
                notes.append("whether its memory grows was not checked: its calls are too slow for that.")
                return []
    growth = [later - earlier for earlier, later in pairwise(sizes[1:])]
    per_call = fmean(growth) / CALLS
    if min(growth) <= 0 or per_call < 4:
        return []
    return [
        f"it keeps growing: by {per_call:.0f} bytes with every call, over {ROUNDS * CALLS} calls with new requests."
    ]


def _files(policy: Any) -> list[str]:
    """Patterns of the files (or cells) that the methods of a policy come from, and of those that made what they see."""
    methods = [value for kind in type(policy).__mro__ for value in vars(kind).values() if inspect.isfunction(value)]
    return [*{method.__code__.co_filename: None for method in methods}, str(Path(__file__).parent / "*")]


def _allocated(where: Sequence[str]) -> int:
    """Bytes that were taken in these files and are still held. What other threads of the process do does not count."""
    mine = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, name) for name in where])
    return sum(found.size for found in mine.statistics("filename"))


@contextmanager
def _traced_memory() -> Iterator[None]:
    """Trace allocations; what there is already is kept out of the way of the garbage collector, which is faster so."""
    traced, frozen = tracemalloc.is_tracing(), gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    tracemalloc.start()
    try:
        yield
    finally:
        if not traced:
            tracemalloc.stop()
        if not frozen:
            gc.unfreeze()


def _one_round(ask: _Asking, views: Views) -> None:
    made = 0
    while made < CALLS:
        for args in views.questions(ask.subject.seam, views.view(1, 1)):
            ask.answer(Case("", args))
            _observe(ask, args)
            made += 1


def _observe(ask: _Asking, args: tuple[Any, ...]) -> None:
    observe = getattr(ask.subject.policy, "observe", None)
    if ask.subject.seam == "length_model" and callable(observe):
        ask.guarded(lambda: observe(args[0].request, args[0].request.metadata["output_len"]), Case("what it observes", args))


# ----------------------------------------------------------------------------------- other processes
_CHILD = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from llmlab.checking import elsewhere; elsewhere()"


def _elsewhere(ask: _Asking, cases: Sequence[Case], answers: Sequence[Answer], notes: list[str]) -> list[str]:
    """Ask the same in two fresh processes with hash seeds of their own."""
    try:
        question = pickle.dumps(sys.path) + pickle.dumps((ask.subject.seam, ask.allowed)) + pack(ask.subject.policy)
    except ConfigError as error:
        notes.append(f"it was not asked in other processes: {error.problem}.")
        return []
    children = {seed: _start_child(seed) for seed in (1, 2)}
    here = [_comparable(answer) for answer in answers]
    failures = []
    for seed, child in children.items():
        out, err = child.communicate(question)
        if child.returncode:
            last = err.decode(errors="replace").strip().rpartition("\n")[2]
            notes.append(f"it was not asked in the process with PYTHONHASHSEED={seed}: {last[:200]}.")
            continue
        there = json.loads(out)
        if isinstance(there, str):
            failures.append(f"in another process (PYTHONHASHSEED={seed}) {there}")
            continue
        index = next((i for i, (a, b) in enumerate(zip(here, there)) if a != b), None)
        if index is not None:
            failures.append(f"another process (PYTHONHASHSEED={seed}) decides otherwise: for {cases[index].name} "
                            f"{ask.seam.method}() said {_short(there[index])} there and {_short(here[index])} here.")  # fmt: skip
    return failures[:1]


def _start_child(seed: int) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.Popen([sys.executable, "-c", _CHILD], stdin=pipe, stdout=pipe, stderr=pipe, env=env)


def elsewhere() -> None:
    """The other end of `_elsewhere`: a policy from stdin, its answers as a line of JSON to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr  # the policy may print
    (seam, allowed), policy = pickle.load(sys.stdin.buffer), pickle.load(sys.stdin.buffer)
    try:
        _, answers = _Asking(Subject(policy, seam), allowed).first_pass()
        said: Any = [_comparable(answer) for answer in answers]
    except Endless as found:
        said = str(found)
    out.write(json.dumps(said))
    out.flush()


def _comparable(answer: Answer) -> str:
    """An answer as text that is the same in every process; errors by their kind, for messages may hold addresses."""
    return answer.error.split(":")[0] if answer.error else repr(answer.value)


# ------------------------------------------------------------------------------------ a simulated run
_PROBES = {"a long request": (96, 64), "a short request": (6, 4)}
_NARROW: Mapping[str, Any] = {
    "model": "lab-xs", "executor": "sim", "hardware": "t4", "num_blocks": 64, "block_size": 4, "max_num_seqs": 8,
    "max_num_batched_tokens": 64, "log_level": 1, "check_interval": 0,
}  # fmt: skip


class _Stream:
    """24 requests at a time, a new one for every one that ends, and the probes, which come behind the first of them."""

    def __init__(self, vocab_size: int) -> None:
        self._stream = Workload.batch(STREAM, prompt=(4, 40), output=(2, 24)).requests(vocab_size)
        prompts, outputs = zip(*_PROBES.values())
        self._probes = Workload((0.0,) * len(_PROBES), prompts, outputs, seed=1).requests(vocab_size)

    def arriving(self) -> Iterator[TimedRequest]:
        yield from islice(self._stream, 24)
        yield from (dataclasses.replace(probe, id=name) for name, probe in zip(_PROBES, self._probes))

    def on_finish(self, finished: Finished) -> Sequence[TimedRequest]:
        if finished.request.id in _PROBES:
            return ()
        return [dataclasses.replace(request, arrival=finished.time) for request in islice(self._stream, 1)]


class _Ran(NamedTuple):
    """How the probes fared: end-to-end seconds, and how many others ended before them; and the policy's failures."""

    e2e: list[float]
    overtaken: list[int]
    failed: list[ev.PolicyFailed]


def _starvation(subject: Subject, patience: float) -> list[str]:
    usual = _ran({})
    try:
        got = _ran({subject.seam: subject.policy})
    except Endless as found:
        return [str(found)]
    except (Exception, SystemExit) as error:  # past the engine's guard: what no run survives
        return [f"a simulated run ended with {type(error).__name__}: {_short(str(error))}."]
    failures = []
    if got.failed:
        failures.append(f"in a simulated run it failed {len(got.failed)} times, first: {got.failed[0].error}.")
    for index, (name, size) in enumerate(_PROBES.items()):
        if got.e2e[index] > patience * usual.e2e[index]:
            failures.append(
                f"starves requests: {name} ({size[0]} + {size[1]} tokens) ended after {got.overtaken[index]} of {STREAM} others, "
                f"{got.e2e[index] / usual.e2e[index]:.1f} times later than under the default policies; allowed are "
                f"{patience:g} times."
            )
    return failures


def _ran(policies: Mapping[str, Any]) -> _Ran:
    """Serve the stream; the same machine and requests, whatever the policies."""
    with Engine(EngineConfig(**{**_NARROW, **policies})) as engine:
        feed = Feed(engine, _Stream(engine.model.vocab_size))
        overtaken: dict[str, int] = {}
        ended, failures, interrupted = 0, engine.log.cursor(), 0
        while feed.pour():
            for output in engine.step():
                feed.take(output)
                if output.finished and output.request_id in _PROBES:
                    overtaken[output.request_id] = ended
                elif output.finished:
                    ended += 1
            interrupted += sum(isinstance(e, ev.PolicyFailed) and e.error.startswith("interrupted") for e in failures.read())
            if interrupted >= INTERRUPTED:
                raise Endless(f"in a simulated run its calls do not come back: {interrupted} were interrupted, then the run was given up.")
        e2e = [engine.metrics.requests[name].e2e or 0.0 for name in _PROBES]
        return _Ran(e2e, [overtaken[name] for name in _PROBES], engine.log.filter(ev.PolicyFailed))


# --------------------------------------------------------------------------------------------- words
def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 90 else text[:87] + "..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _few(sentences: Sequence[str], rest: str, most: int = 4) -> list[str]:
    return [*sentences[:most], *([f"{len(sentences) - most} {rest}."] if len(sentences) > most else [])]
