"""The kit of the lessons: scripts are read cell by cell, guesses lock, knobs compute anew, checks say what is wrong."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

import llmlab
from llmlab import EngineConfig
from llmlab.teaching import Choice, Slider, check, collecting, front, knobs, predict, say, show, timeline
from llmlab.teaching.build import main, notebook, outdated
from llmlab.teaching.exercises import EXERCISES, judge
from llmlab.teaching.figures import Axis, Bar, Point, Token, bars, curves, token_strip
from llmlab.teaching.scripts import cells_of, read_lesson, run
from llmlab.types import ConfigError
from llmlab.ui import theme

SCRIPT = '''# %% [markdown]
# # 07 A lesson
#
# Words, with `# %%` in them.

# %%
x = 1

# %% exercise
def answer():
    return x

# %%
got = answer()
'''


@pytest.fixture
def in_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(front, "in_notebook", lambda: True)


def test_a_script_is_cells() -> None:
    words, first, exercise, last = cells_of(SCRIPT)
    assert (words.kind, words.source.splitlines()[0]) == ("markdown", "# 07 A lesson")
    assert words.source.endswith("Words, with `# %%` in them.")
    assert [c.name for c in (first, exercise, last)] == ["", "exercise", ""]
    assert first.source == "x = 1"
    assert exercise.line == SCRIPT.splitlines().index("# %% exercise") + 1


@pytest.mark.parametrize("text", ["x = 1\n# %%\n", "", "# %% [markdown]\n# words\nx = 1\n"])
def test_what_is_no_lesson_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        cells_of(text)


def test_the_cells_are_jupytexts(tmp_path: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    lessons = Path(__file__).resolve().parents[2] / "lessons"
    for path in sorted(lessons.glob("[0-9][0-9]_*.py")):
        theirs = [(c.cell_type, c.source) for c in jupytext.read(path, fmt="py:percent").cells]
        assert [(c.kind, c.source) for c in read_lesson(path).cells] == theirs


def test_a_lesson_runs_in_one_namespace_and_a_cell_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "07_it.py"
    path.write_text(SCRIPT)
    assert run(read_lesson(path))["got"] == 1
    assert run(read_lesson(path), {"exercise": "def answer(): return 2"})["got"] == 2


def test_an_error_in_a_lesson_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "07_it.py"
    path.write_text(SCRIPT + "\n# %%\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run(read_lesson(path))
    assert caught.traceback[-1].lineno + 1 == len(SCRIPT.splitlines()) + 3


def test_building_twice_changes_nothing_and_a_stale_notebook_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "07_it.py"
    path.write_text(SCRIPT)
    assert main([str(tmp_path), "--check"]) == 1
    assert main([str(tmp_path)]) == 0
    assert outdated(tmp_path) == []
    assert main([str(tmp_path), "--check"]) == 0
    path.write_text(SCRIPT.replace("x = 1", "x = 3"))
    assert main([str(tmp_path), "--check"]) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(empty)]) == 2
    assert "holds no lesson" in capsys.readouterr().err


def test_a_notebook_is_valid_and_offers_colab(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    path = tmp_path / "07_it.py"
    path.write_text(SCRIPT)
    for repository in ("", "owner/name"):
        text = notebook(read_lesson(path), repository)
        nbformat.validate(nbformat.reads(text, as_version=4))
        content = json.loads(text)
        assert content["metadata"]["kernelspec"]["name"] == "python3"
        assert "colab" in content["cells"][0]["source"][0]
        assert ("owner/name/blob/main/lessons/07_it.ipynb" in text) == bool(repository)
        compile("".join(content["cells"][1]["source"]), "install", "exec")


def test_the_command_copies_the_course_and_overwrites_nothing(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from llmlab.cli.app import app

    folder = tmp_path / "course"
    result = CliRunner().invoke(app, ["lessons", str(folder)])
    assert result.exit_code == 0, result.output
    assert len(list(folder.glob("*.ipynb"))) == len(list(folder.glob("*.py"))) >= 8
    assert not (folder / "solutions.py").exists()
    mine = folder / "01_one_token.py"
    mine.write_text("# my work\n")
    result = CliRunner().invoke(app, ["lessons", str(folder), "--solutions"])
    assert "1 file copied" in result.output.replace("\n", " ")
    assert mine.read_text() == "# my work\n"


# ------------------------------------------------------------------------------------------ guesses
def test_an_answer_stays_closed_until_the_guess_is_locked(in_notebook: None) -> None:
    guess = predict("How many?", Slider(4, 0, 10), "tokens")
    guess.reveal(8, "Because.")
    place = guess._revealed[0][0]
    assert "It is" not in place.value
    guess.control.value = 2
    guess.button.click()
    assert guess.locked
    assert guess.control.disabled
    assert "You said 2 tokens. It is 8 tokens. A factor of 4 too low." in place.value
    assert "Because." in place.value
    guess.control.value = 9
    guess.button.click()
    assert guess.value == 2


def test_a_script_goes_on_with_the_starting_value(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    guess = predict("Which?", Choice("a", "b", start="b"))
    guess.reveal("a")
    assert guess.locked
    assert "It is a." in capsys.readouterr().out
    typed = iter(["7", "a"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    guess = predict("Which?", Choice("a", "b"))
    guess.reveal("a")
    out = capsys.readouterr().out
    assert "must be one of a, b" in out
    assert "You said a. It is a. Right." in out


@pytest.mark.parametrize(("guess", "truth", "said"), [(10, 10.2, "Spot on."), (30, 10, "A factor of 3 too high."), (11, 10, "10% too high."),
                                                      (0, 3, "Off by 3.")])  # fmt: skip
def test_distances_are_said_as_people_do(guess: float, truth: float, said: str) -> None:
    from llmlab.teaching.guesses import _distance

    assert _distance(guess, truth) == said


def test_a_knob_reads_what_is_typed() -> None:
    assert Slider(4, 0, 10).read("7") == 7
    assert Slider(0.5, 0, 1, 0.1).read("0.25") == 0.25
    assert Choice("a", "b").read("2") == "b"
    for knob, text in ((Slider(4, 0, 10), "11"), (Slider(4, 0, 10), "x"), (Choice("a"), "c")):
        with pytest.raises(ConfigError):
            knob.read(text)
    with pytest.raises(ConfigError):
        Choice("a", start="b")


# -------------------------------------------------------------------------------------------- knobs
def test_a_panel_computes_anew_and_says_what_is_impossible(in_notebook: None) -> None:
    def told(budget: int, order: str) -> str:
        if budget == 1:
            raise ConfigError("budget", budget, "is too small")
        return f"<{order} {budget}>"

    panel = knobs(told, budget=Slider(8, 1, 64), order=Choice("fcfs", "ljf"))
    assert "&lt;fcfs 8&gt;" in panel.output.value
    panel.controls["budget"].value = 64
    assert "fcfs 64" in panel.output.value
    panel.controls["order"].value = "ljf"
    assert "ljf 64" in panel.output.value
    panel.controls["budget"].value = 1
    assert "is too small" in panel.output.value


def test_a_page_shows_the_start_and_names_the_knobs() -> None:
    with collecting() as shown:
        knobs(lambda budget: f"at {budget}", budget=Choice(8, 64, start=64))
        say("**bold**")
        show(bars([Bar("a", 0.5, 0.4)], "share", "A finding", "Simulated"))
    assert [one.kind for one in shown] == ["text", "markdown", "markdown", "picture"]
    assert shown[0].content == "at 64"
    assert "budget 8, 64" in shown[1].content
    assert shown[3].alt == "A finding"
    told = shown[3].as_html
    light, dark = (base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]*)", told))
    assert light == shown[3].content != dark and theme.LIGHT.ink in light and theme.DARK.ink in dark
    assert theme.LIGHT.paper not in dark and '[data-jp-theme-light="false"] .llmlab-dark' in told


def test_a_timeline_is_a_widget_in_a_notebook_and_a_picture_on_a_page(in_notebook: None, monkeypatch: pytest.MonkeyPatch) -> None:
    widget = pytest.importorskip("llmlab.ui.widget")
    config = EngineConfig(model="lab-xs", executor="sim", hardware="t4")
    done = llmlab.run(config, llmlab.Workload.batch(3, prompt=20, output=5))
    with collecting() as shown:
        timeline(done)
    assert [one.kind for one in shown] == ["picture"]
    put: list[object] = []
    monkeypatch.setattr(front, "put", put.append)
    timeline(done)
    assert isinstance(put[0], widget.Timeline)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_every_chart_of_the_kit_can_be_drawn(name: str) -> None:
    from llmlab.ui import theme

    line = [Point(1, 2, "here"), Point(2, 4)]
    with theme.enable(name), collecting() as shown:
        show(bars([Bar("a", 3.0, note="of three")], "seconds", "Bars", "Measured", ".2f"), token_strip([Token("a b", 0.2)] * 80, "Strip", ""),
             curves({"seen": line}, {"seen": line, "law": line}, Axis("x", True), Axis("y"), "Curves", "Simulated"))  # fmt: skip
    assert [one.alt for one in shown] == ["Bars", "Strip", "Curves"]
    assert "␣" in shown[1].content
    assert "law" in shown[2].content


# ------------------------------------------------------------------------------------------- checks
@pytest.mark.parametrize("exercise", sorted(EXERCISES))
@pytest.mark.parametrize("answer", [None, 3, lambda *a, **k: None, lambda *a, **k: 1 / 0, list])
def test_nonsense_fails_every_check_with_a_sentence(exercise: str, answer: object) -> None:
    verdict = judge(exercise, answer)
    assert not verdict.passed
    assert all(isinstance(s, str) and len(s) > 10 for s in verdict.failures)


def test_a_verdict_is_red_or_green_and_an_unknown_exercise_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    bad = check("nucleus", lambda probs, p: [0])
    assert "✘ nucleus: not yet." in capsys.readouterr().out
    assert "failed" in bad._repr_html_()
    with pytest.raises(ConfigError, match="nucleus"):
        judge("nucleos", None)
