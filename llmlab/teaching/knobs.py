"""Knobs: what a learner may turn, and the panel that computes anew when somebody does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmlab.teaching import front
from llmlab.teaching.boxes import box
from llmlab.types import ConfigError, LabError

Value = int | float | str


class Slider(NamedTuple):
    """A number between `low` and `high`. Its type is that of `start` and `step` together."""

    start: float
    low: float
    high: float
    step: float = 1

    @property
    def extremes(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    def widget(self, name: str) -> Any:
        import ipywidgets as w

        whole = all(isinstance(v, int) for v in self)
        make = w.IntSlider if whole else w.FloatSlider
        return make(value=self.start, min=self.low, max=self.high, step=self.step, description=name,
                    continuous_update=False, style={"description_width": "initial"}, layout={"width": "420px"})  # fmt: skip

    def read(self, text: str) -> Value:
        """What somebody typed. Raises ConfigError for what is no such number."""
        try:
            value = int(text) if isinstance(self.start, int) and isinstance(self.step, int) else float(text)
        except ValueError:
            value = float("nan")
        if not self.low <= value <= self.high:
            raise ConfigError("guess", text, f"must be a number from {self.low:g} to {self.high:g}")
        return value

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


class Choice:
    """One of several values; `start` is the first unless it is named."""

    def __init__(self, *options: Value, start: Value | None = None) -> None:
        if not options or (start is not None and start not in options):
            raise ConfigError("start", start, f"is none of the options {options}")
        self.options = options
        self.start: Value = options[0] if start is None else start

    @property
    def extremes(self) -> tuple[Value, ...]:
        return self.options

    def widget(self, name: str) -> Any:
        import ipywidgets as w

        numbers = all(isinstance(o, (int, float)) for o in self.options)
        make = w.SelectionSlider if numbers else w.Dropdown
        return make(options=list(self.options), value=self.start, description=name,
                    style={"description_width": "initial"}, layout={"width": "420px"})  # fmt: skip

    def read(self, text: str) -> Value:
        """What somebody typed: an option, or the number of one. Raises ConfigError."""
        found = [o for o in self.options if str(o) == text]
        if not found and text.isdigit() and 1 <= int(text) <= len(self.options):
            found = [self.options[int(text) - 1]]
        if not found:
            raise ConfigError("guess", text, f"must be one of {self}")
        return found[0]

    def __str__(self) -> str:
        return ", ".join(str(o) for o in self.options)


Knob = Slider | Choice


class Panel:
    """A function of knobs. In a notebook: widgets above its result. `controls` are the widgets by name."""

    def __init__(self, function: Callable[..., Any], knobs: Mapping[str, Knob]) -> None:
        self.function, self.knobs = function, dict(knobs)
        self.controls: dict[str, Any] = {}
        self.output: Any = None
        if front.in_notebook():
            self._open()
        else:
            start = {name: knob.start for name, knob in self.knobs.items()}
            front.show(*_listed(function(**start)))
            said = "; ".join(f"{name.replace('_', ' ')} {knob}" for name, knob in self.knobs.items())
            front.say(f"*In the notebook you can turn: {said}.*")

    def _open(self) -> None:
        import ipywidgets as w

        self.controls = {name: knob.widget(name.replace("_", " ")) for name, knob in self.knobs.items()}
        self.output = w.HTML()
        for control in self.controls.values():
            control.observe(self._turned, names="value")
        self._turned(None)
        front.put(w.VBox([*self.controls.values(), self.output]))

    def _turned(self, change: Any) -> None:
        """Compute anew; what a value makes impossible is said in the place of the result."""
        values = {name: control.value for name, control in self.controls.items()}
        try:
            self.output.value = "".join(front.shown(thing).as_html for thing in _listed(self.function(**values)))
        except LabError as error:
            self.output.value = box("failed", str(error))


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def knobs(function: Callable[..., Any], **knobs: Knob) -> Panel:
    """Show `function(**values)` (a chart, text, or several of them) with a knob for each of its arguments."""
    return Panel(function, knobs)
