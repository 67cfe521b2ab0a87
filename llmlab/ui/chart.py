"""What the figures share: data without pandas, units, the facts of a run as a subtitle, and a sentence where a log says
too little for a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.events import why
from llmlab.events.why import count, listed

if TYPE_CHECKING:
    from llmlab.events.trace import Run

__all__ = [
    "WIDTH", "Unit", "count", "data", "listed", "load", "log_ticks", "percent", "seconds", "sentence", "setting", "title", "unit_for",
]  # fmt: skip

WIDTH = 820  # pixels of the plotting area; the report stretches it to its page
_TITLE_CHARS, _SUBTITLE_CHARS = 97, 148  # what fits on one line of that width


class Unit(NamedTuple):
    """A unit of time for one axis: multiply seconds by `per_second`."""

    name: str
    per_second: float


def unit_for(longest: float) -> Unit:
    """The unit in which `longest` seconds is a number that people can read."""
    if longest >= 2:
        return Unit("s", 1.0)
    return Unit("ms", 1e3) if longest >= 2e-3 else Unit("µs", 1e6)


def seconds(value: float) -> str:
    """A duration as people say it, with the sign for micro."""
    return why.seconds(value).replace(" us", " µs")


def log_ticks(low: float, high: float) -> list[float]:
    """At most a dozen round values in [low, high] for a logarithmic axis; round steps if it spans less than a decade."""
    decades = math.log10(high / low)
    if decades < 0.9:
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
        return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = (1, 2, 5) if decades <= 3 else (1, 3) if decades <= 5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]


def percent(share: float) -> str:
    """A share as a percentage that is 0% or 100% only if it is exactly that."""
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def data(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Inline data of a chart; no data frame, no limit of rows (merge before drawing instead)."""
    import altair as alt

    return alt.InlineData(values=list(rows))


def title(finding: str, *notes: str, width: int = WIDTH) -> Any:
    """A title that states the finding, over a subtitle of notes; both broken into lines that fit `width` pixels."""
    import altair as alt

    share = width / WIDTH
    subtitle = _lines(". ".join(filter(None, notes)), int(_SUBTITLE_CHARS * share))
    return alt.Title(_lines(finding, int(_TITLE_CHARS * share)), subtitle=subtitle)


def _lines(text: str, width: int) -> list[str]:
    """Lines that fit; of about equal length if the last one would be a mere stump."""
    lines = textwrap.wrap(text, width) or [""]
    if len(lines) == 1 or len(lines[-1]) > width // 3:
        return lines
    return textwrap.wrap(text, -(-len(text) // len(lines)) + 6)


def setting(run: Run) -> str:
    """Where the numbers come from: measured or simulated, hardware, model, seed, load."""
    started = run.started
    where = f"{started.hardware.get('name', 'unknown hardware')}, {started.model.get('name', 'unknown model')}"
    how = "Simulated on" if run.mode == "simulated" else "Measured on"
    return f"{how} {where}, seed {started.seed}, {load(run)}"


def load(run: Run) -> str:
    """The load in words: how many requests came in which time."""
    arrivals = [r.arrival for r in run.requests.values()]
    if not arrivals:
        return "no load"
    span = max(arrivals) - min(arrivals)
    return count(len(arrivals), "request") + (f" within {seconds(span)}" if span > 0 else "")


def sentence(finding: str, explanation: str, *notes: str) -> Any:
    """A chart that is only words: what cannot be shown, and what would be needed."""
    import altair as alt

    lines: Sequence[str] = textwrap.wrap(explanation, 110)
    return (
        alt.Chart(data([{}]))
        .mark_text(style="note", align="left", baseline="top", fontSize=13, lineHeight=20)
        .encode(x=alt.value(0), y=alt.value(4), text=alt.value(list(lines)))
        .properties(width=WIDTH, height=24 * max(1, len(lines)), title=title(finding, *notes), usermeta={"sentence": explanation})
    )
