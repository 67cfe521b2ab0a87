"""The nouns of the task suites: a problem, a teacher text, an oracle, a suite."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["train", "test"]

HELD_OUT_SHARE = 10
"""One problem in this many is held out (chosen by hash, so no list has to be kept)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One verifiable question.

    ``prompt`` is the exact text given to the model (without ``<bos>``), ``gold`` the reference answer,
    ``canonical`` the text whose hash decides the split, ``meta`` plain data for the oracle.
    """

    suite: str
    prompt: str
    gold: str
    canonical: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """``"test"`` for held-out problems, ``"train"`` for all others."""
        return split_of(self.canonical)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a teacher text; ``learn`` is False where the loss must not look (slips, later questions)."""

    text: str
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What a model is trained on: a prompt and the segments that follow it (the last ends with ``<eos>``)."""

    prompt: str
    segments: tuple[Segment, ...]

    @property
    def completion(self) -> str:
        """The text after the prompt, ``<eos>`` included."""
        return "".join(s.text for s in self.segments)


class Oracle(Protocol):
    """Judges solutions of one problem; knows the ground truth and never the model."""

    def steps(self, text: str) -> list[bool]:
        """One label for each step of ``text``: is the solution up to here still a right one?"""
        ...

    def final(self, text: str) -> bool:
        """Is the answer given by ``text`` right?"""
        ...


class Suite(Protocol):
    """A family of problems with a difficulty knob ``k``."""

    name: str

    def problem(self, rng: random.Random, *, k: int = 1, style: str | None = None,
                split: Split | None = None) -> Problem:
        """Draw one problem; ``split`` restricts the draw to one side of the held-out split."""
        ...

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demonstration:
        """A teacher's solution by a route drawn from ``rng``."""
        ...

    def oracle(self, problem: Problem) -> Oracle:
        """The judge of this problem."""
        ...

    def verify(self, problem: Problem, text: str) -> bool:
        """Is the answer given by ``text`` right?"""
        ...


def split_of(canonical: str) -> Split:
    """The side of the split on which a problem lies: ``sha1(canonical) % 10 == 0`` is held out."""
    digest = int.from_bytes(hashlib.sha1(canonical.encode()).digest(), "big")
    return "test" if digest % HELD_OUT_SHARE == 0 else "train"


def stable_choice(key: str, options: Sequence[str]) -> str:
    """The option that a text always picks, on every machine and Python version."""
    return options[int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "big") % len(options)]


def answer_part(text: str) -> str:
    """The text of one answer: up to the first ``<eos>``."""
    return text.split("<eos>", 1)[0]
