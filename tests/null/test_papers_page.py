"""The table of papers: complete, in known states, and honest about what it points to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "papers.md"
HEADER = ("paper", "slug", "seam", "claimed", "measured here", "state")
STATES = ("not yet", "parts stand", "cost model stands")
SEAMS = {
    "A": "admission", "B": "composition", "C": "placement", "D": "KV memory", "E": "decoding",
    "F": "models and kernels", "G": "cluster", "H": "programs", "I": "analysis", "J": "privacy", "K": "training",
}  # fmt: skip
CORE = ("types.py", "seams.py", "config.py", "registry.py", "assembly.py", "plugins.py", "backends.py", "executors.py", "engine.py",
        "events", "memory", "scheduling", "decoding", "execution")  # fmt: skip
WORDS = {"cosine", "hyperparameters"}  # slugs that any code may use


class Paper(NamedTuple):
    """One row of the table."""

    paper: str
    slug: str
    seam: str
    claimed: str
    measured: str
    state: str


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))


@pytest.fixture(scope="module")
def papers() -> list[Paper]:
    rows = [cells(line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert rows[0] == HEADER and set("".join(rows[1])) <= set("-:")
    assert all(len(row) == len(HEADER) for row in rows), [row for row in rows if len(row) != len(HEADER)]
    return [Paper(*row) for row in rows[2:]]


def test_the_table_is_complete(papers: list[Paper]) -> None:
    assert len(papers) == 54
    slugs = [p.slug for p in papers]
    assert slugs == sorted(set(slugs))
    assert all(all(p) for p in papers), [p.slug for p in papers if not all(p)]
    assert all(re.search(r"arXiv \d{4}\.\d{5}\b", p.paper) for p in papers)
    assert all(p.claimed.endswith(".") for p in papers)


def test_states_are_known_and_what_stands_is_there(papers: list[Paper]) -> None:
    for p in papers:
        state, _, what = p.state.partition(":")
        assert state in STATES, p.slug
        paths = [path for path in re.findall(r"`([^`]+)`", what) if "/" in path]
        assert bool(paths) == (state != "not yet"), p.slug
        assert all(any(ROOT.glob(path.rstrip("/"))) for path in paths), (p.slug, paths)
        assert p.measured == "-" or state != "not yet", p.slug


def test_every_paper_of_the_future_has_its_seam(papers: list[Paper]) -> None:
    """The list below the table names each unbuilt paper once, under the seam that its row names first."""
    listed = {
        letter: (word, names.split(", "))
        for letter, word, names in re.findall(
            r"(?m)^- \*\*([A-K]) ([^*]+)\*\*: ([a-z0-9_, ]+)\.", PAGE.read_text("utf-8")
        )
    }
    assert {letter: word for letter, (word, _) in listed.items()} == SEAMS
    for letter, (_, names) in listed.items():
        assert names == [p.slug for p in papers if p.state == "not yet" and p.seam[0] == letter]
    for p in papers:
        for seam in p.seam.split(", "):
            assert seam == "A to F" or SEAMS[seam[0]] == seam[2:], p.slug


def test_the_core_contains_no_papers_name(papers: list[Paper]) -> None:
    quoted = re.compile(r'"[a-z_0-9]+"')  # a plug-in may go by the name that people know it by
    names = re.compile(r"\b(" + "|".join(p.slug for p in papers if p.slug not in WORDS) + r")\b", re.IGNORECASE)
    parts = [ROOT / "llmlab" / part for part in CORE]
    files = [file for part in parts for file in ([part] if part.is_file() else sorted(part.rglob("*.py")))]
    assert len(files) > len(CORE)
    found = {file.name: names.findall(quoted.sub("", file.read_text("utf-8"))) for file in files}
    assert not any(found.values()), {name: hits for name, hits in found.items() if hits}
