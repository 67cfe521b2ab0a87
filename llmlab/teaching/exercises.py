"""Exercises: hidden checks by name. Each asks the learner's answer the questions that matter, and says what is wrong.

A check never raises: whatever the answer does is said in a sentence, so that a notebook runs to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import msgspec

from llmlab.teaching.boxes import box, plain
from llmlab.types import unknown_name

Check = Callable[[Any], Iterator[str]]
# The check of an exercise: `module:function` in this package; it yields a sentence for everything that is wrong.
EXERCISES: Mapping[str, str] = {
    "nucleus": "tokens:nucleus", "latencies": "times:latencies", "slot": "blocks:slot",
    "turning_batch": "costs:turning_batch", "considerate": "composing:considerate",
    "patient": "ordering:patient", "fair_victim": "victims:fair_victim",
    "choose_way": "ways:choose_way",
}
MOST = 3  # sentences shown at a time: a learner mends one thing after the other


class Verdict(msgspec.Struct, frozen=True):
    """What a check found; nothing means that it passed."""

    exercise: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def headline(self) -> str:
        return f"{self.exercise}: {'passed.' if self.passed else 'not yet.'}"

    def __str__(self) -> str:
        return plain("passed" if self.passed else "failed", self.headline, self.failures)

    def _repr_html_(self) -> str:
        return box("passed" if self.passed else "failed", self.headline, self.failures)


def check(exercise: str, answer: Any) -> Verdict:
    """Whether `answer` solves an exercise; shown in green or red. Raises ConfigError for an unknown exercise."""
    from llmlab.teaching import front

    verdict = judge(exercise, answer)
    front.show(front.Shown("html", verdict._repr_html_()) if front.in_notebook() or front.is_collected() else verdict)
    return verdict


def judge(exercise: str, answer: Any) -> Verdict:
    """As `check`, without showing anything."""
    if exercise not in EXERCISES:
        raise unknown_name("exercise", exercise, EXERCISES)
    module, _, function = EXERCISES[exercise].partition(":")
    found: list[str] = []
    try:
        for sentence in getattr(import_module(f"llmlab.teaching.checks.{module}"), function)(answer):
            found.append(sentence)
            if len(found) == MOST:
                break
    except (Exception, SystemExit) as error:  # the answer is foreign code
        found.append(f"It raised {type(error).__name__}: {error}")
    return Verdict(exercise, tuple(found))
