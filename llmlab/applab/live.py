"""A real engine that runs in a thread of its own, so that pages can watch it and turn its knobs.

    page --do(command)--> queue --> [ commands | arrivals | one step | pause ] --> log --> page
                                      between two steps, in the engine's thread

The engine's thread alone touches the engine; pages leave commands and read the log. Nobody watching: it stands still. In
slow motion it stands still after each step, and the run's clock does not count that time, so durations stay measured.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import msgspec

from llmlab.applab.stream import Stream
from llmlab.applab.window import Window
from llmlab.clock import RealClock
from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.outputs import RequestOutput
from llmlab.tasks.base import Problem
from llmlab.tasks.registry import verify
from llmlab.types import LabError, SamplingParams

LONGEST = 160  # tokens of an answer
CROWD = 60  # waiting requests from which on the stream holds back: the page must stay readable
REMEMBERED = 200  # requests whose texts and times are kept
EVENTS = 30_000  # of the log's ring, about 10 MB
RECENT = 40  # finished requests that the page's averages are taken of
SLOWEST = 0.02
_NAP = 0.05  # seconds that an idle thread sleeps at most
LIVE = EngineConfig(model="lab-s", executor="torch", num_blocks=128, block_size=16, max_num_batched_tokens=128,
                    max_num_seqs=16, log_level=3, log_capacity=EVENTS, num_threads=1)  # fmt: skip


class Letter(msgspec.Struct):
    """One request as its sender sees it. `right`: whether its answer is right, if anybody can tell."""

    request: str
    kind: str
    prompt: str
    text: str = ""
    finished: bool = False
    right: bool | None = None


class Vitals(msgspec.Struct, frozen=True):
    """The engine at one instant; what a page shows as numbers. Seconds of the run's clock; means of the newest requests,
    None before the first has finished."""

    step: int = 0
    t: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    used_blocks: int = 0
    num_blocks: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    mean_ttft: float | None = None
    mean_e2e: float | None = None
    tokens_per_second: float | None = None
    right: int = 0
    judged: int = 0


class Drafts(msgspec.Struct, frozen=True):
    """What came of drafting since its source was chosen, as far as the log still tells: who drafts, tokens that were
    proposed and judged, those of them that held, and how many requests' steps judged some."""

    source: str
    judged: int = 0
    held: int = 0
    verifications: int = 0


class LiveEngine:
    """An engine under an endless stream of requests. `do` leaves a command, `watching` keeps it running.

    `state` is "loading", "running", "standing still" or a sentence on why it stopped. `notes`: sentences on knobs that
    could not be turned, newest last.
    """

    def __init__(self, config: EngineConfig = LIVE, rate: float = 20.0, speed: float = 0.2, seed: int = 0) -> None:
        self.config = config
        self.state = "loading"
        self.rate, self.speed = rate, speed
        self.vitals = Vitals()
        self.notes: deque[str] = deque(maxlen=5)
        self.letters: OrderedDict[str, Letter] = OrderedDict()
        self.engine: Engine | None = None
        self.started: ev.RunStarted | None = None
        self._turned: list[tuple[int, dict[str, Any]]] = []  # place in the log, and what was changed there
        self._problems: dict[str, Problem] = {}
        self._stream = Stream(seed)
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._watchers: dict[int, None] = {}
        self._numbers = itertools.count()
        self._awake, self._ended, self._ready = threading.Event(), threading.Event(), threading.Event()
        self._next_arrival = 0.0
        self._counts = {"finished": 0, "preempted": 0, "right": 0, "judged": 0}
        self._recent: deque[tuple[float, float, int, float]] = deque(maxlen=RECENT)
        self._thread = threading.Thread(target=self._live, name="llmlab-live-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------- from the pages
    @contextmanager
    def watching(self) -> Iterator[None]:
        """While a page looks, the engine runs."""
        number = next(self._numbers)
        self._watchers[number] = None
        self._awake.set()
        try:
            yield
        finally:
            del self._watchers[number]

    @property
    def num_watchers(self) -> int:
        return len(self._watchers)

    @property
    def ended(self) -> bool:
        """Whether it was closed, or stopped by an error."""
        return not self._thread.is_alive()

    def wait_until_ready(self, timeout: float) -> bool:
        """Whether the model is loaded, `timeout` seconds from now at the latest."""
        return self._ready.wait(timeout)

    def turn(self, **changes: Any) -> None:
        """Change settings of the engine (`Engine.reconfigure`), from the next step on."""
        self._commands.put(lambda engine: self._reconfigure(engine, changes))
        self._awake.set()

    def turn_to(self, **wanted: Any) -> None:
        """`turn` only what is not as wanted."""
        now = self.settings()
        changes = {name: value for name, value in wanted.items() if now[name] != value}
        if changes:
            self.turn(**changes)

    def ask(self, text: str) -> str:
        """Send what a visitor typed, in the words that the lab models know; the id under which it will run."""
        return self.send(as_prompt(text))

    def send(self, prompt: str, kind: str = "yours", max_tokens: int = LONGEST) -> str:
        """Send a prompt; the id under which it will run."""
        name = f"you{next(self._numbers)}" if kind == "yours" else f"{kind}{next(self._numbers)}"
        self._commands.put(lambda engine: self._ask(engine, name, kind, prompt, max_tokens))
        self._awake.set()
        return name

    def drop_long_prompt(self) -> str:
        """Send a prompt of about a thousand tokens."""
        problem = self._stream.long_prompt()
        name = self.send(problem.prompt, "long", 24)
        self._problems[name] = problem
        return name

    def window(self, newest: int | None = None) -> Window | None:
        """What the log still holds, or only the `newest` requests of it, as a run; None before the engine is there."""
        if self.engine is None:
            return None
        events = tuple(self.engine.log)
        return Window(self.opening(events[0]), events, newest)

    def opening(self, first: ev.Event) -> list[ev.Event]:
        """How an account begins whose first event is `first`: what was started, and the settings in force by then."""
        assert self.started is not None
        changes: dict[str, Any] = {}
        for place, turned in tuple(self._turned):
            changes |= turned if place < first.seq else {}
        if not changes:
            return [self.started]
        return [self.started, ev.Reconfigured(seq=first.seq - 1, t=first.t, now=first.t, changes=changes)]

    def drafts(self) -> Drafts | None:
        """How the drafts did; None if nobody drafts."""
        source, engine = self.settings()["speculation"], self.engine
        if engine is None or source is None:
            return None
        since = max((place for place, turned in tuple(self._turned) if "speculation" in turned), default=0)
        seen = [e for e in tuple(engine.log) if isinstance(e, ev.Verified) and e.seq > since and e.source == source]
        held = sum(len(e.accepted) for e in seen)
        return Drafts(source, held + sum(len(e.rejected) for e in seen), held, len(seen))

    def settings(self) -> Mapping[str, Any]:
        """The configuration in force."""
        return (self.config if self.engine is None else self.engine.config).describe()

    def close(self) -> None:
        """End the thread and wait for it."""
        self._ended.set()
        self._awake.set()
        self._thread.join(timeout=30)

    # ------------------------------------------------------------------------------ in its own thread
    def _live(self) -> None:
        try:
            with Engine(self.config) as engine:
                first = engine.log[0]
                assert isinstance(first, ev.RunStarted)
                self.engine, self.started = engine, first
                self._ready.set()
                while not self._ended.is_set():
                    self._turn_of(engine)
        except Exception as error:  # the page must say what happened; the thread has nobody else to tell
            self.state = f"stopped: {error}"
            self._ready.set()

    def _turn_of(self, engine: Engine) -> None:
        began = time.perf_counter()
        if not self._watchers:
            self.state = "standing still"
            self._awake.clear()
            self._awake.wait(timeout=_NAP if self._watchers else 1.0)
            self._leave_out(engine, time.perf_counter() - began)
            return
        self.state = "running"
        self._obey(engine)
        self._let_arrive(engine)
        if engine.has_unfinished_requests():
            for output in engine.step():
                self._note(output)
            self._hold(engine, time.perf_counter() - began)
        else:
            self._idle(engine)
        self._publish(engine)

    def _reconfigure(self, engine: Engine, changes: dict[str, Any]) -> None:
        place = engine.log.num_emitted
        engine.reconfigure(**changes)
        old = {name: value for seq, turned in self._turned[:-REMEMBERED] for name, value in turned.items()}
        kept = self._turned[-REMEMBERED:]
        self._turned = [*([(0, old)] if old else []), *kept, (place, changes)]

    def _obey(self, engine: Engine) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            try:
                command(engine)
            except LabError as error:
                self.notes.append(str(error))

    def _let_arrive(self, engine: Engine) -> None:
        now = engine.clock.now()
        while self._next_arrival <= now:
            self._next_arrival = now + self._stream.gap(self.rate)
            if engine.num_waiting < CROWD:
                problem = self._stream.next()
                name = f"r{next(self._numbers)}"
                self._problems[name] = problem
                self._ask(engine, name, problem.suite, problem.prompt, LONGEST)

    def _ask(self, engine: Engine, name: str, kind: str, prompt: str, max_tokens: int) -> None:
        letter = Letter(name, kind, prompt)
        self.letters[name] = letter
        self._forget_old(engine)
        try:
            engine.add_request(prompt, SamplingParams(max_tokens=max_tokens), request_id=name)
        except LabError as error:
            letter.finished, letter.text = True, str(error)
            raise

    def _forget_old(self, engine: Engine) -> None:
        """Let go of the oldest finished ones; who starves is remembered for as long as it lives."""
        surplus = len(self.letters) - REMEMBERED
        if surplus > 0:
            for old in list(itertools.islice((n for n, one in self.letters.items() if one.finished), surplus)):
                del self.letters[old]
                self._problems.pop(old, None)
                engine.metrics.forget(old)

    def _note(self, output: RequestOutput) -> None:
        """Keep what a request has got so far."""
        letter = self.letters.get(output.request_id)
        if letter is not None:
            letter.text = output.outputs[0].text
        if not output.finished:
            return
        self._counts["finished"] += 1
        metrics = output.metrics
        if metrics is not None and metrics.ttft is not None and metrics.e2e is not None:
            self._counts["preempted"] += metrics.num_preemptions
            self._recent.append((metrics.ttft, metrics.e2e, metrics.num_output_tokens, metrics.arrival + metrics.e2e))
        if letter is not None:
            letter.finished = True
            self._judge(letter)

    def _judge(self, letter: Letter) -> None:
        problem = self._problems.get(letter.request)
        if problem is not None:
            letter.right = verify(problem, letter.text)
            self._counts["judged"] += 1
            self._counts["right"] += letter.right

    def _publish(self, engine: Engine) -> None:
        recent, memory = tuple(self._recent), engine.scheduler.memory
        n = len(recent)
        spent = recent[-1][3] - recent[0][3] if n > 1 else 0.0
        self.vitals = Vitals(
            engine.scheduler.next_step, engine.clock.now(), engine.num_running, engine.num_waiting, memory.num_used,
            memory.num_blocks, self._counts["finished"], self._counts["preempted"],
            sum(r[0] for r in recent) / n if n else None, sum(r[1] for r in recent) / n if n else None,
            sum(r[2] for r in recent[1:]) / spent if spent > 0 else None, self._counts["right"], self._counts["judged"],
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ pace
    def _hold(self, engine: Engine, took: float) -> None:
        """Slow motion: stand still so long that a step lasts 1/speed as long as it took."""
        if self.speed < 1:
            self._stand(engine, took * (1 / max(self.speed, SLOWEST) - 1))

    def _idle(self, engine: Engine) -> None:
        """Nobody is here: let time pass until the next arrival, at the page's speed."""
        missing = max(0.0, self._next_arrival - engine.clock.now())
        began = time.perf_counter()
        self._awake.clear()
        if self._commands.empty():
            self._awake.wait(min(_NAP, missing / max(self.speed, SLOWEST)))
        waited = time.perf_counter() - began
        self._leave_out(engine, waited * (1 - min(1.0, self.speed)))

    def _stand(self, engine: Engine, seconds: float) -> None:
        began = time.perf_counter()
        self._ended.wait(seconds)
        self._leave_out(engine, time.perf_counter() - began)

    @staticmethod
    def _leave_out(engine: Engine, seconds: float) -> None:
        if isinstance(engine.clock, RealClock):
            engine.clock.leave_out(seconds)


def as_prompt(text: str) -> str:
    """A sum as the lab models were taught sums, anything else as a question of a chat."""
    text = " ".join(text.split())
    if text.startswith("<"):
        return text
    if text and all(c in "0123456789+-*/()=? " for c in text):
        return f"<slow>{text.replace(' ', '').rstrip('=?')}?"
    return f"<chat>{text.lower()}<ans>"


@cache
def shared_engine() -> LiveEngine:
    """The one engine of this process; all pages that ask for it look at the same."""
    return LiveEngine()
