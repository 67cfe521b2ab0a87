"""Interrupting a policy that does not come back: an endless loop in a cell must not hang the run.

While a foreign policy is asked, a thread looks at the clock; once the asking thread has spent far more than
allowed, on the wall and on the CPU, it raises `Overrun` there. Python delivers it between two byte codes, so a
loop of Python ends; a call that never returns from C does not. Nobody watches while nobody is asked. Who only waits
is left alone, unless a longest wait was named.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

A = TypeVar("A")
FAR = 4.0  # times the allowed seconds: what lies between is let run, and its answer dropped
LEAST = 0.1  # seconds that are waited for in any case
LOOKS = 10  # per limit, and at least one in LONGEST seconds
LONGEST = 0.2
PATIENCE = 20  # looks without anybody to watch, then the thread ends


class Overrun(BaseException):
    """Raised in a policy that takes far too long. Not an Exception: `except Exception` in a loop must not swallow it."""


class _Asked(NamedTuple):
    """Who is being asked, and until when: a thread, the wall clock, and the CPU clock of that thread."""

    thread: int
    wall: float
    cpu_clock: int | None
    cpu: float


class Watchdog:
    """Bounds calls to about FAR times `allowed` seconds. One call at a time.

    `longest_wait`: seconds after which a call is interrupted although it took no time of the CPU. They are counted in
    looks, so time in which the whole process stood still is not held against anybody.
    """

    def __init__(self, allowed: float, longest_wait: float = math.inf) -> None:
        self.limit = max(LEAST, FAR * allowed)
        self._pause = min(LONGEST, self.limit / LOOKS)
        self._most_looks, self._looks = longest_wait / self._pause, 0
        self._lock = threading.Lock()
        self._asked: _Asked | None = None
        self._raised = False
        self._idle = 0
        self._thread: threading.Thread | None = None

    def call(self, work: Callable[[], A]) -> A:
        """`work()`. Raises Overrun if it took so long that it had to be interrupted."""
        self._begin()
        try:
            try:
                return work()
            finally:
                self._end()
        except Overrun:
            self._end()  # it may have struck within the first one
            raise

    def _begin(self) -> None:
        thread = threading.get_ident()
        cpu_clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None
        asked = _Asked(thread, time.monotonic() + self.limit, cpu_clock, time.thread_time() + self.limit)
        with self._lock:
            self._asked, self._idle, self._looks = asked, 0, 0
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="llmlab-watchdog", daemon=True)
                self._thread.start()

    def _end(self) -> None:
        """Nobody is asked any more; what was raised but has not arrived is taken back."""
        with self._lock:
            asked, self._asked = self._asked, None
            if asked is not None and self._raised:
                self._raised = False
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(asked.thread), None)

    def _watch(self) -> None:
        while True:
            time.sleep(self._pause)
            with self._lock:
                self._looks += 1
                if self._asked is None:
                    self._idle += 1
                    if self._idle > PATIENCE:
                        self._thread = None
                        return
                elif self._looks >= self._most_looks or _overdue(self._asked):
                    self._raised = True
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._asked.thread), ctypes.py_object(Overrun))


def _overdue(asked: _Asked) -> bool:
    """Whether the wall clock and the thread's own CPU clock have both run out; who only waits is not overdue."""
    if time.monotonic() < asked.wall:
        return False
    return asked.cpu_clock is None or time.clock_gettime(asked.cpu_clock) >= asked.cpu
