"""Drafting on the real engine: the same problems with drafts and without, measured on this machine."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import msgspec

from llmlab.engine import Engine
from llmlab.events.trace import Run
from llmlab.tasks.registry import suite
from llmlab.types import SamplingParams
from llmlab.ui.chart import percent
from llmlab.ui.speculation import verifications

SOURCES = {"what was said before (ngram)": "ngram", "suffixes of all that was said": "suffix", "a smaller model (lab-xs)": "lab-xs"}
TASKS = {"sums": "arith", "chat": "chat", "documents": "doc"}
POLICIES = ("fixed", "ewma", "goodput")
PROBLEMS = 8


class Drafting(msgspec.Struct, frozen=True):
    """Where drafts come from, at most how long they are, who decides on their length, what is asked, how many at once."""

    source: str = "ngram"
    tokens: int = 4
    policy: str = "fixed"
    task: str = "arith"
    batch: int = 2


def served(drafting: Drafting | None, task: str, batch: int, level: int = 2) -> Run:
    """The problems of a task, `batch` at once; with drafts, or without for None. Raises LabError."""
    fields: dict[str, Any] = {} if drafting is None else {
        "speculation": drafting.source, "num_speculative_tokens": drafting.tokens, "draft_policy": drafting.policy,
    }  # fmt: skip
    dice = random.Random(f"speculation-{task}")
    with Engine(model="lab-s", num_threads=1, num_blocks=256, max_num_seqs=batch, log_level=level, **fields) as engine:
        for _ in range(PROBLEMS):
            engine.add_request(suite(task).problem(dice, split="test").prompt, SamplingParams(max_tokens=96))
        while engine.has_unfinished_requests():
            engine.step()
        return Run(tuple(engine.log))


@cache
def plain(task: str, batch: int) -> Run:
    """The same without drafts; the second of two runs, so that nothing is made for the first time."""
    served(None, task, batch)
    return served(None, task, batch)


def busy(run: Run) -> float:
    """Seconds in which the executor worked."""
    return sum(step.measured or 0.0 for step in run.steps)


def finding(run: Run, without: Run) -> str:
    """What drafting was worth, in one sentence."""
    found = verifications(run)
    drafted, accepted = sum(v.accepted + v.rejected for v in found), sum(v.accepted for v in found)
    if not drafted:
        return f"Nothing was drafted in {len(run.steps)} steps: the source found nothing that it could continue"
    ratio = busy(without) / busy(run) if busy(run) else 1.0
    verb = f"{ratio:.2f} times as fast as" if ratio >= 1 else f"{1 / ratio:.2f} times slower than"
    fewer = 1 - len(run.steps) / len(without.steps)
    steps = f"{percent(fewer)} fewer" if fewer >= 0 else f"{percent(-fewer)} more"
    return (f"{percent(accepted / drafted)} of {drafted} drafted tokens are accepted: {steps} steps, and the steps' own time is "
            f"{verb} without drafts (measured)")  # fmt: skip


def same_answers(run: Run, without: Run) -> bool:
    """Whether every request got the same tokens: greedy drafting must change none."""
    def tokens(one: Run) -> list[tuple[str, list[int]]]:
        said: dict[str, list[int]] = {}
        for event in one.events("TokensReleased"):
            said.setdefault(event.request, []).extend(event.token_ids)
        return sorted(said.items())

    return tokens(run) == tokens(without)
