"""HTML reports of comparisons and of rooflines, in the frame of the report of a run: offline, light and dark."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from llmlab.ui import figures, theme
from llmlab.ui.report import Figure, drawing, figure_card, page_html, write_page

if TYPE_CHECKING:
    from llmlab.comparing import Comparison
    from llmlab.events.trace import Run

Rows = Sequence[Sequence[str]]
ROOM = {"left": 5, "top": 5, "bottom": 5, "right": 40}  # pixels around a chart whose labels stand beside their marks
RACERS = 60  # requests on a page's timelines


class Section(NamedTuple):
    """A table of a page: its heading, its rows with their head, and how many columns are words."""

    heading: str
    rows: Rows
    wide: int = 1


def table(rows: Rows, wide: int = 1) -> str:
    """A table of plain text, the first row its head; all but the first `wide` columns are numbers."""
    def line(cells: Sequence[str], tag: str) -> str:
        places = ("" if i < wide else " style='text-align:right'" for i in range(len(cells)))
        return f"<tr>{''.join(f'<{tag}{place}>{html.escape(c)}</{tag}>' for c, place in zip(cells, places))}</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<div class='card scroll'><table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table></div>"


def _frame(title: str, lead: str, sections: Iterable[str], links: Mapping[str, str]) -> Iterator[str]:
    """A page's head, its sections and its foot."""
    from llmlab import __version__

    bar = "".join(f'<a href="#{name}">{label}</a>' for name, label in links.items())
    yield f"<nav><b>llmlab</b>{bar}<button id=theme type=button>dark</button></nav>\n<main>"
    yield f"<header><h1>{html.escape(title)}</h1><p class=lead>{html.escape(lead)}</p></header>"
    yield from sections
    yield (f"<footer>Written by llmlab {__version__}. This file contains all that it shows and requests nothing from the "
           "network.</footer>\n</main>")  # fmt: skip


# ------------------------------------------------------------------------------------------ comparison
def write_comparison(path: Path, runs: Mapping[str, Run], comparison: Comparison, ratios: Rows, changed: Rows) -> Path:
    """The report of two runs side by side. `ratios`, `changed`: tables of text, heads first. Raises TraceError."""
    (name_a, a), (name_b, b) = runs.items()
    with theme.enable("light"):
        drawn = [
            drawing("race", figures.policy_race(a, b, (name_a, name_b), RACERS)),
            drawing("ttft", figures.latency_ecdf(runs, "ttft")),
            drawing("e2e", figures.latency_ecdf(runs, "e2e")),
        ]
    race, ttft, e2e = drawn
    title = f"{name_a} against {name_b}"
    lead = f"{len(comparison.requests)} requests in both runs: a is {name_a} ({comparison.modes[0]}), b is {name_b} ({comparison.modes[1]}). {comparison.parted}"
    sections = [
        f"<section id=ratios>{table(ratios)}</section>",
        f"<section id=race>{figure_card(race)}</section>",
        f"<section id=latency><div class=pair>{figure_card(ttft)}{figure_card(e2e)}</div></section>",
        f"<section id=requests><h2>Requests that changed most</h2>{table(changed)}</section>",
    ]
    links = {"ratios": "Ratios", "race": "Timelines", "latency": "Latency", "requests": "Requests"}
    return write_page(path, page_html(title, drawn, _frame(title, lead, sections, links)))


# -------------------------------------------------------------------------------------------- roofline
def write_roofline(path: Path, title: str, lead: str, charts: Mapping[str, Callable[[], Any]],
                   tables: Sequence[Section]) -> Path:  # fmt: skip
    """The report of a roofline: charts of `roofline.charts` by name, then tables. Raises TraceError."""
    drawn = [_drawing(name, draw) for name, draw in charts.items()]
    sections = [f'<section id="{figure.name}">{figure_card(figure)}</section>' for figure in drawn]
    sections += [f"<section><h2>{html.escape(t.heading)}</h2>{table(t.rows, t.wide)}</section>" for t in tables]
    links = {figure.name: figure.name.capitalize() for figure in drawn}
    return write_page(path, page_html(title, drawn, _frame(title, lead, sections, links)))


def _drawing(name: str, draw: Callable[[], Any]) -> Figure:
    """A chart of `roofline.charts` under that package's own two themes, which have styles that ours do not."""
    import altair

    from roofline import charts

    before = altair.theme.active
    try:
        charts.enable_theme()
        figure = drawing(name, draw())
    finally:
        altair.theme.enable(before)
    light = {**figure.specs["light"], "padding": ROOM}
    dark = {**light, "config": {**charts.theme_config(dark=True), "background": theme.DARK.paper}}
    return msgspec.structs.replace(figure, specs={"light": light, "dark": dark})
