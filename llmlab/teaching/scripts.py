"""Lessons as percent scripts: plain Python whose comments `# %%` begin cells. Read, and run without a kernel."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmlab.types import ConfigError


class Cell(NamedTuple):
    """One cell. `name` is what follows the mark: `# %% exercise` makes a code cell called "exercise"."""

    kind: Literal["markdown", "code"]
    source: str
    name: str
    line: int


def cells_of(text: str) -> list[Cell]:
    """The cells of a percent script. Raises ConfigError for text before the first mark, or Markdown that is no comment."""
    lines = text.splitlines()
    marks = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    if not marks or any(line.strip() for line in lines[: marks[0]]):
        raise ConfigError("script", (lines or [""])[0], "a lesson begins with a mark", "Write `# %% [markdown]` first.")
    ends = [*marks[1:], len(lines)]
    return [_cell(lines[start], lines[start + 1 : end], start + 1) for start, end in zip(marks, ends)]


def _cell(mark: str, body: list[str], line: int) -> Cell:
    name = mark.removeprefix("# %%").strip()
    if not name.startswith("[markdown]"):
        return Cell("code", "\n".join(body).strip("\n"), name, line)
    if any(row.strip() and not row.startswith("#") for row in body):
        raise ConfigError("script", mark, f"the Markdown cell in line {line} has lines that are no comments")
    words = [row.removeprefix("#").removeprefix(" ") for row in body]
    return Cell("markdown", "\n".join(words).strip("\n"), name.removeprefix("[markdown]").strip(), line)


class Lesson(NamedTuple):
    """A lesson: its file's stem ("01_one_token"), where it lies, its cells."""

    name: str
    path: Path
    cells: tuple[Cell, ...]

    @property
    def title(self) -> str:
        """The first heading."""
        first = self.cells[0].source.splitlines()[0]
        return first.removeprefix("#").strip()

    @property
    def number(self) -> str:
        return self.name.partition("_")[0]


def read_lesson(path: Path) -> Lesson:
    """Raises ConfigError for a file that is no lesson."""
    return Lesson(path.stem, path, tuple(cells_of(path.read_text(encoding="utf-8"))))


def lessons_in(folder: Path) -> list[Lesson]:
    """All lessons of a folder, in order. Raises ConfigError if there is none."""
    found = [read_lesson(path) for path in sorted(folder.glob("[0-9][0-9]_*.py"))]
    if not found:
        raise ConfigError("folder", str(folder), "holds no lesson", "Lessons are called NN_title.py.")
    return found


def run(lesson: Lesson, replaced: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run all code cells in one namespace, which is returned; see `steps`."""
    names: dict[str, Any] = {}
    for _ in steps(lesson, names, replaced):
        pass
    return names


def steps(lesson: Lesson, names: dict[str, Any], replaced: Mapping[str, str] | None = None) -> Iterator[Cell]:
    """Run cell by cell in `names`, yielding each one after it. `replaced`: other source for cells by their name."""
    names.setdefault("__name__", lesson.name)
    for cell in lesson.cells:
        if cell.kind == "code":
            source = (replaced or {}).get(cell.name, cell.source) if cell.name else cell.source
            tree = ast.parse(source, filename=str(lesson.path))
            ast.increment_lineno(tree, cell.line)
            exec(compile(tree, str(lesson.path), "exec"), names)
        yield cell
