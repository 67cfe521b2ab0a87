"""A policy from the text of a cell: read, tried out, checked, and raced against the built-in ones.

Whatever is wrong with the text is a sentence with a line number. It runs in this process, like the rest of the page.
"""

from __future__ import annotations

import ctypes
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec

from llmlab.checking import SEAMS, Report, check
from llmlab.checking_views import Views
from llmlab.config import EngineConfig
from llmlab.events.metrics import RunMetrics
from llmlab.events.trace import Run
from llmlab.plugins import REGISTRIES
from llmlab.registry import policy_name
from llmlab.running import run
from llmlab.types import LabError, PolicyError
from llmlab.workloads.workload import Workload

FILE = "your policy"
PATIENCE = 5.0  # seconds in which a policy must have answered all questions of the first try
LONGEST = 120.0  # seconds of a check, and of a race
POINTLESS = ("priority",)  # no request of these loads has one
RACED = ("ordering", "admission", "composer", "victim", "tiering")
MODEL = "llama-2-7b"
HERE = "this machine"
EXAMPLES: Mapping[str, str] = {
    "shortest prompt first": '''class ShortestPrompt:
    """Who asks for little goes first."""

    refresh = "arrival"   # one key for life

    def key(self, request, now):
        return request.num_prompt_tokens
''',
    "shortest, but nobody starves": '''class Patience:
    """Every second in the queue is worth 200 tokens."""

    refresh = "step"      # a new key in every step

    def key(self, request, now):
        return request.num_prompt_tokens - 200 * (now - request.arrival)
''',
    "preempt who needs least to come back": '''class CheapestVictim:
    """Whose computed tokens are fewest is preempted; among equals, who came last."""

    def score(self, view, candidate, needy):
        return (candidate.num_computed_tokens, -candidate.arrival)
''',
    "half a step for prompts": '''class HalfAndHalf:
    """Decodes first; prompts get at most half of the token budget."""

    def compose(self, view, offers):
        every = [*offers.running, *offers.waiting]
        items = [offer for offer in every if offer.num_tokens == 1]
        room = min(view.limits.max_num_batched_tokens // 2, view.limits.max_num_batched_tokens - len(items))
        for offer in every:
            if offer.num_tokens > 1 and room > 0 and len(items) < view.limits.max_num_seqs:
                items.append(offer.shortened(room))
                room -= items[-1].num_tokens
        return items
''',
}  # fmt: skip


class Trial(msgspec.Struct, frozen=True):
    """What became of a text: the policy and its seam, or the `problem` that stopped it, as a sentence."""

    policy: Any = None
    seam: str = ""
    problem: str = ""

    @property
    def name(self) -> str:
        return policy_name(self.policy) if self.policy is not None else ""


def read(source: str) -> Trial:
    """The policy that `source` defines: its last class with the method of a seam, made without arguments."""
    try:
        with deadline(PATIENCE, "reading it and asking it once"):
            space = _executed(source)
            policy, seam = _policy_in(space)
            _tried(policy, seam)
    except LabError as error:
        return Trial(problem=_plainly(error))
    return Trial(policy, seam)


def checked(trial: Trial) -> Report:
    """What `llmlab.check` says of it. Raises PolicyError if that never ends."""
    with deadline(LONGEST, "checking it"):
        return check(trial.policy, trial.seam)


def _executed(source: str) -> dict[str, Any]:
    try:
        code = compile(source, FILE, "exec")
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        text = (getattr(error, "text", None) or "").strip()
        where = f"line {line}" if line else "the text"
        raise PolicyError(where, text, f"is no Python: {getattr(error, 'msg', error)}") from None
    space: dict[str, Any] = {"__name__": "your_policy"}
    _guarded(lambda: exec(code, space), "running the text")
    return space


def _policy_in(space: Mapping[str, Any]) -> tuple[Any, str]:
    classes = [value for value in space.values() if isinstance(value, type) and value.__module__ == "your_policy"]
    for one in reversed(classes):
        for seam in RACED:
            if callable(getattr(one, SEAMS[seam].method, None)):
                return _guarded(one, f"making {one.__name__}()"), seam
    wanted = ", ".join(f"{SEAMS[seam].method}() ({seam})" for seam in RACED)
    raise PolicyError("policy", [one.__name__ for one in classes], "no class here has the method of a seam", f"Write one of {wanted}.")


def _tried(policy: Any, seam: str) -> None:
    """Ask it every question once, so that what raises or never ends is found before a race begins."""
    for case in Views(0).cases(seam):
        answer = _guarded(lambda args=case.args: getattr(policy, SEAMS[seam].method)(*args), f"asked about {case.name}")  # type: ignore[misc]
        try:
            SEAMS[seam].plain(answer, case.args)
        except PolicyError as error:
            raise PolicyError(error.field, error.value, f"{error.problem} (asked about {case.name})", error.way_out) from None


def _guarded(call: Callable[[], Any], doing: str) -> Any:
    """`call()`; whatever it raises becomes a PolicyError that names the line."""
    try:
        return call()
    except LabError:
        raise
    except (Exception, SystemExit) as error:  # a cell's code may raise anything
        raise PolicyError(_line(error) or "policy", f"{type(error).__name__}: {error}", f"was raised ({doing})") from None


class _Overdue(BaseException):
    """Thrown into a thread whose time is up. No Exception: neither a cell's own `except` nor the engine's guard stops it."""


@contextmanager
def deadline(seconds: float, doing: str) -> Iterator[None]:
    """Stop what this thread does in Python if it has not come to an end after `seconds`. Raises PolicyError then."""
    thread, over = ctypes.c_ulong(threading.get_ident()), threading.Lock()

    def stop() -> None:
        if over.acquire(blocking=False):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Overdue))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
        if not over.acquire(blocking=False):
            time.sleep(1.0)  # it is on its way
    except _Overdue as error:
        raise PolicyError(_line(error) or "policy", "", f"has not come to an end after {seconds:g} s ({doing})",
                          "Look for a loop that never ends.") from None  # fmt: skip
    finally:
        timer.cancel()


def _line(error: BaseException) -> str:
    """The line of the text in which something was raised, the innermost."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    return f"line {lines[-1]}" if lines else ""


def _plainly(error: LabError) -> str:
    where = error.field[:1].upper() + error.field[1:]
    value = f" `{error.value}`" if error.value not in ("", []) else ""
    return f"{where}:{value} {error.problem}. {error.way_out}".strip()


# -------------------------------------------------------------------------------------------- races
class Course(msgspec.Struct, frozen=True):
    """On what is raced. `load`: arrivals over what the device can serve; `blocks`: of the KV pool."""

    machine: str = "a100"
    load: float = 1.3
    blocks: int = 300
    requests: int = 40
    seeds: int = 3

    @property
    def measured(self) -> bool:
        return self.machine == HERE


class Lap(msgspec.Struct, frozen=True):
    """One policy on one load."""

    policy: str
    yours: bool
    seed: int
    run: Run

    @property
    def metrics(self) -> RunMetrics:
        return self.run.metrics


class Goal(msgspec.Struct, frozen=True):
    """What a race is about. `of` reads it from a run; `smaller` is better, or larger."""

    name: str
    of: Callable[[RunMetrics], float]
    smaller: bool = True
    unit: str = "s"


GOALS: Mapping[str, Goal] = {
    goal.name: goal
    for goal in (
        Goal("mean time to first token", lambda m: m.ttft.mean or 0.0),
        Goal("p99 time to first token", lambda m: m.ttft.p99 or 0.0),
        Goal("mean latency", lambda m: m.e2e.mean or 0.0),
        Goal("slowest tokens (p99 between two)", lambda m: m.itl.p99 or 0.0),
        Goal("output tokens per second", lambda m: m.output_throughput, smaller=False, unit="/s"),
    )
}


def entrants(trial: Trial, seam: str) -> dict[str, Any]:
    """Who races at a seam: the built-in policies, and yours if it has no problem."""
    rivals: dict[str, Any] = {name: name for name in REGISTRIES[seam].names() if name not in POINTLESS}
    if trial.policy is not None:
        rivals[f"{trial.name} (yours)"] = trial.policy
    return rivals


def race(trial: Trial, course: Course, seam: str, advance: Callable[[], object] = lambda: None) -> list[Lap]:
    """All entrants on the same arrivals, seed by seed. `advance` is called after each lap. Raises LabError."""
    laps = []
    with deadline(LONGEST, "racing"):
        for seed in range(course.seeds):
            load = _load(course, seed)
            for name, policy in entrants(trial, seam).items():
                laps.append(Lap(name, policy is trial.policy, seed, run(_config(course, seam, policy), load)))
                advance()
    return laps


def head_to_head(trial: Trial, course: Course, seam: str) -> tuple[Lap, Lap]:
    """The default and your policy on the first seed, with every step recorded. Raises LabError."""
    load, default = _load(course, 0), getattr(EngineConfig(), seam)
    with deadline(LONGEST, "racing"):
        a, b = (run(_config(course, seam, policy, 2), load) for policy in (default, trial.policy))
    return Lap(default, False, 0, a), Lap(f"{trial.name} (yours)", True, 0, b)


def _config(course: Course, seam: str, policy: Any, level: int = 1) -> EngineConfig:
    shared = {"num_blocks": course.blocks, "log_level": level, seam: policy}
    if course.measured:
        return EngineConfig(model="lab-s", num_threads=1, max_num_batched_tokens=256, **shared)
    return EngineConfig(model=MODEL, executor="sim", hardware=course.machine, **shared)


def _lengths(course: Course) -> dict[str, str]:
    if course.measured:
        return {"prompt": "lognormal:96,0.9", "output": "lognormal:32,0.7"}
    return {"prompt": "lognormal:256,1.0", "output": "lognormal:64,0.8"}


def _load(course: Course, seed: int) -> Workload:
    rate = course.load * capacity(course.machine, course.blocks, course.requests)
    return Workload.poisson(rate, course.requests, seed=seed, **_lengths(course))


@cache
def capacity(machine: str, blocks: int, requests: int) -> float:
    """Requests a second that the default policies serve when all are there at once."""
    course = Course(machine, 1.0, blocks, requests)
    batch = Workload.batch(requests, seed=99, **_lengths(course))
    return run(_config(course, "ordering", "fcfs"), batch).metrics.request_throughput


# --------------------------------------------------------------------------------------- results
class Place(msgspec.Struct, frozen=True):
    """One line of the leaderboard: the mean over all seeds, and how often the default was beaten."""

    policy: str
    yours: bool
    mean: float
    beats_default: int
    failures: int
    preemptions: float


def leaderboard(laps: Sequence[Lap], goal: Goal, seam: str) -> list[Place]:
    """The best first. Pairs are made by seed: the same arrivals under both policies."""
    default = {lap.seed: goal.of(lap.metrics) for lap in laps if lap.policy == getattr(EngineConfig(), seam)}
    places = []
    for name in dict.fromkeys(lap.policy for lap in laps):
        own = [lap for lap in laps if lap.policy == name]
        values = [goal.of(lap.metrics) for lap in own]
        better = sum((v < default[lap.seed]) == goal.smaller and v != default[lap.seed] for lap, v in zip(own, values))
        failures = sum(len(lap.run.events("PolicyFailed")) for lap in own)
        preempted = sum(lap.metrics.num_preemptions for lap in own) / len(own)
        places.append(Place(name, own[0].yours, sum(values) / len(values), better, failures, preempted))
    return sorted(places, key=lambda p: p.mean if goal.smaller else -p.mean)
