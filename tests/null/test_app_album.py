"""Every picture that the time machine offers can be drawn of every shipped run, or says why not."""

from __future__ import annotations

import pytest

from llmlab.applab import album
from llmlab.applab.gallery import recorded_runs
from llmlab.runs import Run

pytest.importorskip("altair")


@pytest.mark.parametrize("name", sorted(recorded_runs()))
def test_every_picture_can_be_drawn(name: str) -> None:
    run = Run.load(recorded_runs()[name])
    for words, draw in album.pictures().items():
        drawn = draw(run, album.Look(run.steps[-1].step, 0.2)).to_dict()
        assert drawn["title"]["text"], words


def test_a_limit_and_a_step_change_what_is_drawn() -> None:
    run = Run.load(recorded_runs()["first-look"])
    drawn = {words: [str(draw(run, look).to_dict()) for look in (album.Look(50, 0.1), album.Look(197, 0.5))] for words, draw in album.pictures().items()}
    assert {words for words, (a, b) in drawn.items() if a != b} == {*filter(album.has_limit, drawn), "the decision of this step"}


def test_before_the_first_decision_nothing_is_shown() -> None:
    run = Run.load(recorded_runs()["first-look"])
    assert "Nothing was decided" in str(album.pictures()["the decision of this step"](run, album.Look(-2, 1.0)).to_dict())
