"""Where a lesson's output goes: the cells of a notebook, a terminal, or a list that somebody collects."""

from __future__ import annotations

import base64
import html
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from llmlab.events.trace import Run

Kind = Literal["markdown", "text", "html", "picture"]
_COLLECTED: ContextVar[list[Shown] | None] = ContextVar("llmlab_teaching_collected", default=None)


# What says that a page is dark: JupyterLab, VS Code, Colab, and pages that say it of themselves.
_DARK = ('[data-jp-theme-light="false"]', '.vscode-dark', '[data-vscode-theme-kind*="dark"]', 'html[theme="dark"]', '.dark', '[data-theme="dark"]')
# Important, because JupyterLab's own rule for pictures in an output is more specific than a class.
_FOLLOW = (f"<style>.llmlab-dark{{display:none!important}}{','.join(f'{one} .llmlab-light' for one in _DARK)}{{display:none!important}}"
           f"{','.join(f'{one} .llmlab-dark' for one in _DARK)}{{display:inline!important}}</style>")  # fmt: skip


class Shown(NamedTuple):
    """One piece of output: Markdown, plain text, HTML, or the SVG of a picture with its title as `alt`."""

    kind: Kind
    content: str
    alt: str = ""

    @property
    def as_html(self) -> str:
        """For a notebook, light or dark. A picture is an image of its own, so that the ids of two of them cannot clash."""
        if self.kind == "picture":
            from llmlab.ui.theme import recoloured_svg

            both = (("light", self.content), ("dark", recoloured_svg(self.content, "light", "dark")))
            return _FOLLOW + "".join(
                f'<img class="llmlab-{name}" style="max-width:100%" alt="{html.escape(self.alt)}" '
                f'src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">' for name, svg in both)  # fmt: skip
        return self.content if self.kind == "html" else f'<pre style="white-space:pre-wrap">{html.escape(self.content)}</pre>'

    @property
    def as_text(self) -> str:
        """For a terminal."""
        return f"[picture] {self.alt}" if self.kind == "picture" else self.content


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this. IPython is looked at only if somebody has loaded it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


@contextmanager
def collecting() -> Iterator[list[Shown]]:
    """Collect what a lesson shows instead of showing it."""
    shown: list[Shown] = []
    token = _COLLECTED.set(shown)
    try:
        yield shown
    finally:
        _COLLECTED.reset(token)


def say(text: str) -> None:
    """Markdown: a sentence with numbers that this cell computed."""
    _emit(Shown("markdown", text))


def show(*things: Any) -> None:
    """Charts as pictures, verdicts and explanations in their own form, everything else as text."""
    for thing in things:
        _emit(shown(thing))


def timeline(run: Run) -> None:
    """The timeline of a run: to scrub and to click in a notebook, a picture elsewhere."""
    from llmlab.ui import figures

    if not in_notebook() or is_collected():
        show(figures.request_timeline(run))
        return
    from llmlab.ui.widget import Timeline

    put(Timeline(run))


def shown(thing: Any) -> Shown:
    """How a thing is shown. A chart is drawn here, without a browser or a network."""
    if isinstance(thing, Shown):
        return thing
    if hasattr(thing, "to_dict") and hasattr(thing, "properties"):  # any kind of altair chart
        return _picture(thing.to_dict())
    return Shown("text", thing if isinstance(thing, str) else str(thing))


def _picture(spec: dict[str, Any]) -> Shown:
    import vl_convert

    title = spec.get("title", {})
    words = title.get("text", "") if isinstance(title, dict) else title
    alt = words if isinstance(words, str) else " ".join(words)
    return Shown("picture", vl_convert.vegalite_to_svg(json.dumps(spec)), alt)


def _emit(one: Shown) -> None:
    collected = _COLLECTED.get()
    if collected is not None:
        collected.append(one)
    elif in_notebook():
        _display(one)
    else:
        print(one.as_text)


def _display(one: Shown) -> None:
    if one.kind == "text":
        print(one.content)
        return
    from IPython import display

    ipython: Any = display  # its functions carry no types
    put(ipython.Markdown(one.content) if one.kind == "markdown" else ipython.HTML(one.as_html))


def put(widget: Any) -> None:
    """Put a widget into the output of the cell that runs."""
    from IPython import display

    ipython: Any = display
    ipython.display(widget)


def is_collected() -> bool:
    """Whether output is being collected, so that nobody can be asked."""
    return _COLLECTED.get() is not None
