"""One file per paper: what it claims, which plug-ins carry it, and the experiment that shows it here.

    llmlab papers                    all of them with their state
    llmlab papers run moe_offload    its experiment: the claim beside what was found, tables, pictures

The core knows none of their names. An experiment is a function `run(quick, progress) -> Report`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

from llmlab.types import unknown_name

Progress = Callable[[float, str], None]  # the share that is done, 0 to 1, and what is being done


class Finding(NamedTuple):
    """A claim beside what was found here. `holds`: None where the two cannot be compared."""

    claim: str
    found: str
    kind: Literal["measured", "simulated", "computed"]
    holds: bool | None = None


class Table(NamedTuple):
    """Rows of text under a title; `note` says what the numbers are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


class Report(NamedTuple):
    """What an experiment found. `setup`: hardware, model, load and seed, in words. `figures`: names and what draws them
    (altair charts), called only if somebody wants to look."""

    slug: str
    title: str
    setup: str
    findings: tuple[Finding, ...]
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, Callable[[], Any]] = {}


class Experiment(Protocol):
    """A module of this package."""

    def run(self, quick: bool, progress: Progress) -> Report: ...


# Slugs that have an experiment, and the module that holds it.
EXPERIMENTS: Mapping[str, str] = {
    "apex": "llmlab.papers.apex",
    "llm42": "llmlab.papers.llm42",
    "moe_offload": "llmlab.papers.moe_offload",
    "speculation": "llmlab.papers.speculation",
}


def experiment(slug: str) -> Experiment:
    """The experiment of a paper. Raises ConfigError with the nearest names."""
    if slug not in EXPERIMENTS:
        raise unknown_name("paper", slug, EXPERIMENTS)
    module: Any = importlib.import_module(EXPERIMENTS[slug])
    found: Experiment = module
    return found


def silent(share: float, what: str) -> None:
    """Progress that nobody watches."""
