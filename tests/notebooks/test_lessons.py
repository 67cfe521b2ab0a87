"""Every lesson: runs, shows pictures that say where they come from, asks, checks; its exercise can be failed and solved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmlab.teaching import Guess, Panel, Shown, Verdict, collecting, front
from llmlab.teaching.build import outdated
from llmlab.teaching.exercises import EXERCISES
from llmlab.teaching.scripts import Lesson, cells_of, lessons_in, steps

FOLDER = Path(__file__).resolve().parents[2] / "lessons"
LESSONS = lessons_in(FOLDER)
SOLUTIONS = {cell.name: cell.source for cell in cells_of((FOLDER / "solutions.py").read_text(encoding="utf-8"))}
PARTS = ("**After this lesson you can**", "## Predict", "## Formula against measurement", "## Exercise", "## Break it",
         "## What this does not show", "## Three questions")  # fmt: skip


class Ran(NamedTuple):
    """A lesson that ran with its starter: its names, and what it showed."""

    lesson: Lesson
    names: dict[str, Any]
    shown: list[Shown]

    def all(self, kind: type) -> list[Any]:
        return [value for name, value in self.names.items() if isinstance(value, kind) and not name.startswith("_")]


@pytest.fixture(scope="module", params=LESSONS, ids=lambda lesson: lesson.name)
def ran(request: pytest.FixtureRequest) -> Iterator[Ran]:
    lesson: Lesson = request.param
    names: dict[str, Any] = {}
    with collecting() as shown:
        for _ in steps(lesson, names):
            pass
        yield Ran(lesson, names, list(shown))
    names.clear()


def test_it_runs_and_its_pictures_say_where_they_come_from(ran: Ran) -> None:
    pictures = [one for one in ran.shown if one.kind == "picture"]
    assert len(pictures) >= 3
    for one in pictures:
        assert re.search(r"Measured|Simulated|Computed|modelled", one.content), one.alt
        assert len(one.alt) > 12


def test_the_starter_fails_and_the_solution_passes(ran: Ran) -> None:
    (verdict,) = ran.all(Verdict)
    assert not verdict.passed
    exec(SOLUTIONS[ran.lesson.number], ran.names)
    (cell,) = [c for c in ran.lesson.cells if re.search(r"\bcheck\(\"", c.source)]
    exec(cell.source, ran.names)
    (verdict,) = ran.all(Verdict)
    assert verdict.passed, str(verdict)


def test_every_control_is_read(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(front, "in_notebook", lambda: True)
    panels = ran.all(Panel)
    assert panels
    for panel in panels:
        again = Panel(panel.function, panel.knobs)
        for name, knob in panel.knobs.items():
            before = again.output.value
            again.controls[name].value = next(v for v in reversed(knob.extremes) if v != again.controls[name].value)
            assert again.output.value != before, f"{name} changes nothing"
            assert "lesson-box failed" not in again.output.value, name


def test_guesses_are_asked_before_they_are_answered(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets")
    guesses = ran.all(Guess)
    assert guesses
    source = "\n".join(cell.source for cell in ran.lesson.cells)
    for name in [n for n, value in ran.names.items() if isinstance(value, Guess)]:
        assert source.index(f"{name} = predict(") < source.index(f"{name}.reveal(")
    monkeypatch.setattr(front, "in_notebook", lambda: True)
    for guess in guesses:
        again = Guess(guess.question, guess.knob, guess.unit)
        again.button.click()
        assert again.locked


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_it_has_all_its_parts_and_is_short(lesson: Lesson) -> None:
    words = "\n".join(cell.source for cell in lesson.cells if cell.kind == "markdown")
    found = [words.find(part) for part in PARTS]
    assert -1 not in found, PARTS[found.index(-1)]
    assert found == sorted(found)
    assert words.count("<details>") == words.count("</details>") == 3
    assert len(lesson.path.read_text(encoding="utf-8").splitlines()) <= 300


def test_every_lesson_has_a_solution_and_every_exercise_a_lesson() -> None:
    assert list(SOLUTIONS) == [lesson.number for lesson in LESSONS]
    code = "\n".join(cell.source for lesson in LESSONS for cell in lesson.cells)
    assert sorted(EXERCISES) == sorted(re.findall(r"\bcheck\(\"(\w+)\"", code))


def test_the_notebooks_are_up_to_date() -> None:
    assert outdated(FOLDER) == [], "run `python -m llmlab.teaching.build lessons/`"


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """One Jupyter kernel for all lessons: its imports are paid once."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    client = nbclient.NotebookClient(None, kernel_name="python3")
    manager = client.create_kernel_manager()
    yield manager
    if client.kc is None and manager.has_kernel:
        nbclient.util.run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_it_runs_under_a_jupyter_kernel(lesson: Lesson, kernel: Any) -> None:
    import nbclient
    import nbformat

    book = nbformat.read(lesson.path.with_suffix(".ipynb"), as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = nbclient.NotebookClient(book, km=kernel, timeout=120, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    data = [output.get("data", {}) for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    html = "".join("".join(one.get("text/html", "")) for one in data)
    assert "data:image/svg+xml" in html
    assert "lesson-box failed" in html  # the starter
    assert any("application/vnd.jupyter.widget-view+json" in one for one in data)
