"""Lessons as pages of the documentation: their words, their code, and what the code showed when the page was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmlab.teaching.front import Shown, collecting
from llmlab.teaching.scripts import Cell, Lesson, steps
from llmlab.ui.theme import recoloured_svg


class Page(NamedTuple):
    """Markdown, and the pictures that it refers to, by file name: each in the colours of light and of dark pages."""

    text: str
    pictures: dict[str, str]


def lesson_page(lesson: Lesson, executed: bool = True) -> Page:
    """The page of a lesson. Without `executed`, the code stands there without its results."""
    pictures: dict[str, str] = {}
    parts = [f"*Download: [{lesson.name}.ipynb]({lesson.name}.ipynb). In the notebook the guesses lock, the knobs turn and "
             "the exercise turns green.*"]  # fmt: skip
    for cell, shown in _played(lesson) if executed else [(cell, ()) for cell in lesson.cells]:
        parts.append(_words(cell) if cell.kind == "markdown" else f"```python\n{cell.source}\n```")
        parts += [_result(lesson, one, pictures) for one in shown]
    parts[0], parts[1] = _below_title(parts[0], parts[1])
    return Page("\n\n".join(parts) + "\n", pictures)


def _played(lesson: Lesson) -> list[tuple[Cell, Sequence[Shown]]]:
    played: list[tuple[Cell, Sequence[Shown]]] = []
    with collecting() as shown:
        for cell in steps(lesson, {}):
            played.append((cell, tuple(shown)))
            shown.clear()
    return played


def _below_title(note: str, words: str) -> tuple[str, str]:
    title, _, rest = words.partition("\n")
    return title, f"{note}\n{rest}"


def _words(cell: Cell) -> str:
    """Markdown inside folded answers needs to be told so."""
    return cell.source.replace("<details>", '<details markdown="1">')


def _result(lesson: Lesson, one: Shown, pictures: dict[str, str]) -> str:
    if one.kind == "picture":
        name = f"{lesson.number}_{len(pictures) // 2:02}"
        pictures[f"{name}.svg"], pictures[f"{name}.dark.svg"] = one.content, recoloured_svg(one.content, "light", "dark")
        return f"![{one.alt}]({name}.svg#only-light)![{one.alt}]({name}.dark.svg#only-dark)"
    if one.kind == "text":
        return f"```text\n{one.content}\n```"
    return one.content
