"""The suites by name."""

from __future__ import annotations

from llmlab.tasks.arith import Arith
from llmlab.tasks.base import Problem, Suite
from llmlab.tasks.chat import Chat
from llmlab.tasks.doc import Doc

SUITE_NAMES = ("arith", "chat", "doc")


def suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        ValueError: if there is none.
    """
    made: Suite
    for made in (Arith(), Chat(), Doc()):
        if made.name == name:
            return made
    raise ValueError(f"unknown suite {name!r}; choose one of {', '.join(SUITE_NAMES)}")


def verify(problem: Problem, text: str) -> bool:
    """Is the answer given by ``text`` right? Works for a problem of any suite."""
    return suite(problem.suite).verify(problem, text)
