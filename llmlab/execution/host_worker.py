"""The host's side of hybrid execution: one thread that owns host KV, and does its work strictly in order.

Everything that reads or writes host blocks is a task of this thread: attention of host rows, prefilled KV on its way out,
blocks that move between the tiers. So a block that one request gave up and another took needs no lock: the earlier
task is done before the later one begins. The kernels release the GIL, so the device computes meanwhile.

A thread can die. What it had not finished is then done by the caller, in the same order, on the device: tasks write what
they would have written, so doing one twice changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Task(Protocol):
    """A piece of work on host KV."""

    @property
    def op(self) -> str: ...

    def on_host(self) -> Any:
        """Do it here, in the worker's thread."""

    def on_device(self) -> Any:
        """Do it in the caller's thread, the arithmetic on the device: the worker is dead."""


class Job:
    """A task in the queue. `began`, `ended`: seconds of `time.perf_counter`."""

    __slots__ = ("began", "done", "ended", "result", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.done = threading.Event()
        self.result: Any = None
        self.began = self.ended = 0.0


class HostWorker:
    """Runs tasks in order. `context()` is entered by the thread for its whole life (torch.inference_mode).

    `submit` never waits; `wait` returns a job's result. Both take over what a dead thread left behind. `error` is why it
    died; then tasks run in the caller's thread, at once.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.error: BaseException | None = None
        self.finished: deque[Job] = deque(maxlen=4096)
        self._context = context
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="llmlab-host-kv", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self.error is None

    def submit(self, task: Task) -> Job:
        job = Job(task)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        if not self.alive:
            self._take_over()
        return job

    def wait(self, job: Job) -> Any:
        while not job.done.wait(timeout=0.05):
            if not self._thread.is_alive() and not self._closing:
                self.error = self.error or RuntimeError("the thread is gone")
                self._take_over()
        return job.result

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        try:
            with self._context():
                while (job := self._next()) is not None:
                    job.began = time.perf_counter()
                    job.result = job.task.on_host()
                    self._finish(job)
        except BaseException as error:  # whatever kills it: the caller takes over
            self.error = error

    def _next(self) -> Job | None:
        """The first job, which stays in the queue until it is done."""
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            return self._jobs[0] if self._jobs else None

    def _finish(self, job: Job) -> None:
        job.ended = time.perf_counter()
        with self._changed:
            self._jobs.popleft()
        self.finished.append(job)
        job.done.set()

    def _take_over(self) -> None:
        """Do what is left, in order, in the caller's thread."""
        self._thread.join()
        while self._jobs:
            job = self._jobs[0]
            job.began = time.perf_counter()
            job.result = job.task.on_device()
            self._finish(job)
