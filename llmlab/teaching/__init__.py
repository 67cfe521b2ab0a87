"""The kit of the lessons: guesses that lock, knobs, exercises that check themselves, pictures that show everywhere.

    from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show, timeline

    guess = predict("How many tokens does one step produce?", Slider(8, 1, 64))
    guess.reveal(1, "One per request.")
    knobs(draw, budget=Choice(64, 256, 1024, start=256))
    check("nucleus", my_function)

The same lines work in a notebook (widgets), in a plain script (text; a terminal is asked for the guesses) and on a page
of the documentation. Widgets are imported only where there is a notebook.
"""

from __future__ import annotations

from llmlab.teaching.exercises import Verdict, check
from llmlab.teaching.front import Shown, collecting, in_notebook, say, show, timeline
from llmlab.teaching.guesses import Guess, predict
from llmlab.teaching.knobs import Choice, Panel, Slider, knobs

__all__ = [
    "Choice", "Guess", "Panel", "Shown", "Slider", "Verdict", "check", "collecting", "in_notebook", "knobs", "predict",
    "say", "show", "timeline",
]  # fmt: skip
