"""Figures on a page of an app: in the page's theme, on the page's ground, as wide as the page."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from llmlab.applab.serving import THEME_COOKIE
from llmlab.ui import theme


def page_theme() -> str:
    """ "light" or "dark": what the visitor of this page chose, or marimo's own setting where no page was asked for."""
    import marimo as mo

    meta = mo.app_meta()
    chosen = dict(meta.request.cookies).get(THEME_COOKIE) if meta.request is not None else None
    return chosen if chosen in ("light", "dark") else "dark" if meta.theme == "dark" else "light"


@cache
def _one_at_a_time() -> threading.Lock:
    """altair's theme belongs to the process, and every page is a thread of it."""
    return threading.Lock()


def drawn(name: str, draw: Callable[[], Any]) -> Any:
    """The chart that `draw` makes, under theme `name`, with everything of the theme inside it."""
    import altair as alt

    with _one_at_a_time(), theme.enable(name):
        spec = draw().to_dict()
    spec.pop("usermeta", None)
    spec["background"] = "transparent"
    spec["config"]["background"] = "transparent"
    return alt.Chart.from_dict(spec)
