"""Predict, then look: a guess that is locked before the answer is shown."""

from __future__ import annotations

import sys
from typing import Any

from llmlab.teaching import front
from llmlab.teaching.boxes import box, plain
from llmlab.teaching.knobs import Knob, Slider, Value
from llmlab.types import LabError


class Guess:
    """A question and what the learner says. `value` counts once `locked`; `reveal` keeps the answer closed until then.

    Outside a notebook a terminal is asked; where nobody can be asked, the starting value stands, locked.
    """

    def __init__(self, question: str, knob: Knob, unit: str = "") -> None:
        self.question, self.knob, self.unit = question, knob, unit
        self.value: Value = knob.start
        self.locked = False
        self.asked = False
        self.control: Any = None
        self.button: Any = None
        self._revealed: list[tuple[Any, Value, str]] = []
        if front.in_notebook():
            self._open()
        else:
            self._ask()

    # ------------------------------------------------------------------------------------ asking
    def _open(self) -> None:
        import ipywidgets as w

        self.asked = True
        self.control = self.knob.widget(self.unit)
        self.button = w.Button(description="Lock my guess", button_style="primary")
        self.button.on_click(lambda _: self.lock())
        front.put(w.VBox([w.HTML(f"<b>Predict.</b> {self.question}"), w.HBox([self.control, self.button])]))

    def _ask(self) -> None:
        front.say(f"**Predict.** {self.question} ({self.knob}{' ' + self.unit if self.unit else ''})")
        self.asked = not front.is_collected() and sys.stdin is not None and sys.stdin.isatty()
        while self.asked and not self.locked:
            text = input(f"Your guess [{self.knob.start}]: ").strip()
            try:
                self.value = self.knob.read(text) if text else self.knob.start
                self.locked = True
            except LabError as error:
                print(error)
        self.locked = True

    def lock(self) -> None:
        """The guess stands from here on; answers that waited for it open."""
        if self.locked:
            return
        self.locked = True
        if self.control is not None:
            self.value = self.control.value
            self.control.disabled = self.button.disabled = True
            self.button.description = "Locked"
        for place, truth, why in self._revealed:
            place.value = box("answer", self.compared(truth), [why] if why else ())

    # --------------------------------------------------------------------------------- answering
    def reveal(self, truth: Value, why: str = "") -> None:
        """Show what is the case beside what was guessed; in a notebook, once the guess is locked."""
        if not front.in_notebook():
            headline, more = self.compared(truth), [why] if why else ()
            front.show(front.Shown("html", box("answer", headline, more)) if front.is_collected()
                       else plain("answer", headline, more))  # fmt: skip
            return
        import ipywidgets as w

        closed = box("closed", "The answer opens when you lock your guess above.")
        place = w.HTML(box("answer", self.compared(truth), [why] if why else ()) if self.locked else closed)
        self._revealed.append((place, truth, why))
        front.put(place)

    def compared(self, truth: Value) -> str:
        """Guess and truth in one sentence."""
        answer = f"It is {_said(truth)}{_unit(self.unit)}."
        if not self.asked:
            return answer
        guessed = f"You said {_said(self.value)}{_unit(self.unit)}."
        if isinstance(self.knob, Slider) and isinstance(truth, (int, float)) and isinstance(self.value, (int, float)):
            return f"{guessed} {answer} {_distance(float(self.value), float(truth))}"
        return f"{guessed} {answer}" + (" Right." if self.value == truth else "")


def _said(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _unit(unit: str) -> str:
    return f" {unit}" if unit and unit != "%" else unit


def _distance(guess: float, truth: float) -> str:
    """How far a guess is off, as a factor where that makes sense."""
    if abs(guess - truth) <= 0.05 * abs(truth):
        return "Spot on."
    if guess <= 0 or truth <= 0:
        return f"Off by {_said(abs(guess - truth))}."
    factor = max(guess, truth) / min(guess, truth)
    side = "too high" if guess > truth else "too low"
    return f"A factor of {factor:.3g} {side}." if factor >= 1.5 else f"{factor - 1:.0%} {side}."


def predict(question: str, knob: Knob, unit: str = "") -> Guess:
    """Ask for a guess before a lesson shows the answer."""
    return Guess(question, knob, unit)
