"""A line on stderr that says how far a run is: finished, running, waiting, KV memory, tokens a second."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from llmlab.cli.console import stderr

if TYPE_CHECKING:
    from rich.console import Console

    from llmlab.engine import Engine

REFRESH = 0.1  # seconds between two looks at the engine


class RunProgress:
    """Follows an engine. On a terminal a live bar, elsewhere a plain line at each quarter (if `plain`)."""

    def __init__(self, engine: Engine, total: int, console: Console, plain: bool) -> None:
        self._engine, self._total, self._console, self._plain = engine, total, console, plain
        self._began, self._looked = engine.clock.now(), 0.0
        self._quarter = 0
        self.finished = 0
        self.bar = Progress(
            BarColumn(bar_width=12), MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(total)) + 1)),
            TextColumn("{task.fields[status]}"),
            console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal, refresh_per_second=10,
        )  # fmt: skip
        self._task = self.bar.add_task("serving", total=total, status="")

    def step(self, finished: int) -> None:
        """After every step: `finished` requests are done."""
        self.finished = finished
        if self._console.is_terminal:
            now = time.perf_counter()
            if now - self._looked >= REFRESH:
                self._looked = now
                self.bar.update(self._task, completed=finished, status=self.status())
        elif self._plain and finished * 4 // max(1, self._total) > self._quarter:
            self._quarter = finished * 4 // self._total
            self._console.print(f"{finished}/{self._total} finished, {self.status()}")

    def status(self) -> str:
        """One line about now."""
        engine = self._engine
        pool = engine.scheduler.memory.pool
        metrics = engine.metrics
        tokens = metrics.past.output_tokens + sum(r.num_output_tokens for r in metrics.requests.values())
        used = (pool.num_blocks - pool.num_free) / pool.num_blocks
        rate = tokens / max(1e-9, engine.clock.now() - self._began)  # of a simulation: in its own time
        return (f"step {engine.scheduler.next_step}, {engine.num_running} running, {engine.num_waiting} waiting, "
                f"KV {used:.0%}, {rate:,.0f} tok/s")  # fmt: skip


@contextmanager
def following(engine: Engine, total: int, console: Console | None = None, plain: bool = False) -> Iterator[RunProgress]:
    """Progress of `engine` on `console` (stderr if None) while the block runs."""
    progress = RunProgress(engine, total, console or stderr(), plain)
    with progress.bar:
        yield progress
