"""The list of papers says the same in the package and in the documentation."""

from __future__ import annotations

from pathlib import Path

from llmlab.papers.seeds import SEEDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "papers.md"


def test_the_package_and_the_page_agree() -> None:
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 6 and cells[1] != "slug":
            rows[cells[1]] = cells[5].split(":")[0]
    assert {seed.slug: seed.state for seed in SEEDS} == rows
    assert len(SEEDS) == len(rows) == 54
