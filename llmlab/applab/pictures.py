"""Figures on a page of an app: in the page's theme, on the page's ground, as wide as the page."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llmlab.ui import theme

BESIDE = 110  # pixels of a page that no plotting area gets: its margins, and the labels of an axis


FINDING = f"font:600 18px/1.3 {theme.FONT}; margin:10px 0 2px"  # on the element: a page's styles do not reach into tabs
SMALL = f"font:13px/1.4 {theme.FONT}; margin:0 0 8px; opacity:.7"


class Sheet(NamedTuple):
    """What a figure is drawn on: a theme ("light" or "dark"), and a page so many pixels wide."""

    theme: str = "light"
    width: int = 800


@cache
def _one_at_a_time() -> threading.Lock:
    """altair's theme belongs to the process, and every page is a thread of it."""
    return threading.Lock()


def drawn(sheet: Sheet, draw: Callable[[], Any]) -> Any:
    """The chart that `draw` makes, under the sheet's theme, with everything of the theme inside it; its title and subtitle
    as text above it, so that they fit every page. A chart that is only a sentence becomes that sentence."""
    with _one_at_a_time(), theme.enable(sheet.theme):
        return _page_chart(_spec(draw), sheet.width)


def headline(text: str) -> str:
    """HTML of a finding above a picture."""
    return f'<div class="llmlab-finding" role="heading" aria-level="2" style="{FINDING}">{text}</div>'


def modelled(sheet: Sheet, draw: Callable[[], Any]) -> Any:
    """`drawn` for charts of `roofline.charts`, which have two themes of their own."""
    import altair as alt

    from roofline import charts

    with _one_at_a_time():
        before = alt.theme.active
        try:
            charts.enable_theme(dark=sheet.theme == "dark")
            return _page_chart(_spec(draw), sheet.width)
        finally:
            alt.theme.enable(before)


class Spec:
    """A chart as marimo shows it. Through an altair chart it would be made and checked three times more."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec

    def _mime_(self) -> tuple[str, str]:
        return "application/vnd.vegalite.v6+json", json.dumps(self._spec)


def _spec(draw: Callable[[], Any]) -> dict[str, Any]:
    """What `draw` draws, unchecked: the tests check the same charts, and checking takes longer than drawing."""
    from altair.utils.schemapi import debug_mode

    with debug_mode(False):
        return dict(draw().to_dict())


def _page_chart(spec: dict[str, Any], page: int) -> Any:
    import marimo as mo

    heading, note = spec.pop("title", {}), spec.pop("usermeta", {}).get("sentence", "")
    words = mo.Html(headline(_lines(heading, "text")) + f'<p class="llmlab-sub" style="{SMALL}">{_lines(heading, "subtitle")}</p>')
    if note:
        return mo.vstack([words, mo.md(note)], gap=0)
    spec["background"] = spec["config"]["background"] = "transparent"
    spec["usermeta"] = {"embedOptions": {"actions": False}}
    beside = spec.pop("hconcat", None)
    if beside is None:
        return mo.vstack([words, Spec(_fitted(spec, page))], gap=0)
    panels = [mo.as_html(Spec(_fitted({**spec, **panel}, page))).style(flex=f"{panel['width']} 1 {panel['width'] // 2}px", min_width="0") for panel in beside]
    return mo.vstack([words, mo.hstack(panels, gap=1.5, wrap=True)], gap=0)


def _fitted(spec: dict[str, Any], page: int) -> dict[str, Any]:
    """As wide as the page; charts above one another, which do not follow it later, as wide as it is now."""
    if "vconcat" in spec:
        room = max(300, min(page, 1280) - BESIDE)
        share = room / max([part["width"] for part in spec["vconcat"] if "width" in part], default=room)
        return {**spec, "vconcat": [part | {"width": share * part["width"]} if "width" in part else part for part in spec["vconcat"]]}
    if isinstance(spec.get("width"), (int, float)):
        return {**spec, "width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return spec


def _lines(heading: Any, part: str) -> str:
    import html

    lines = heading.get(part, "") if isinstance(heading, dict) else heading if part == "text" else ""
    return html.escape(lines if isinstance(lines, str) else " ".join(lines))


def png(name: str, draw: Callable[[], Any]) -> bytes:
    """The chart that `draw` makes, under theme `name`, as an image of twice its size."""
    import vl_convert

    with _one_at_a_time(), theme.enable(name):
        spec = draw().to_dict()
    return bytes(vl_convert.vegalite_to_png(json.dumps(spec), scale=2))
