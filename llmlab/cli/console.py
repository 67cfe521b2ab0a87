"""Consoles, spinners and interrupts shared by the commands."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def stdout() -> Console:
    """Where data goes. Obeys NO_COLOR and COLUMNS."""
    from rich.console import Console

    return Console(highlight=False)


def stderr() -> Console:
    """Where progress, warnings and errors go."""
    from rich.console import Console

    return Console(highlight=False, stderr=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; silent where stderr is no terminal."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


class Interrupt:
    """Whether Ctrl-C was pressed since `listening` began."""

    def __init__(self) -> None:
        self.pressed = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed:  # twice: now, wherever we are
            raise KeyboardInterrupt
        self.pressed = True


@contextmanager
def listening() -> Iterator[Interrupt]:
    """Turn the first Ctrl-C into a flag, so that a step can end before the engine is shut down."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt._handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def program() -> str:
    """How this program was called, for commands that a reader can paste."""
    called = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else ""
    return "python -m llmlab.cli" if called == "__main__.py" else "llmlab"


def command_line(*words: object) -> str:
    """A command as a shell takes it."""
    return f"{program()} {shlex.join(str(word) for word in words)}"


def shortened(text: str, width: int, keep: str = "start") -> str:
    """One line of at most `width` characters; `keep="end"` cuts the beginning off."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return line[: max(0, width - 1)] + "…" if keep == "start" else "…" + line[len(line) - max(0, width - 1) :]
