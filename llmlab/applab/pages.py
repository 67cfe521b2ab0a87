"""What every page of an app has: a heading, a theme, a first picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from llmlab.applab import gallery, overlap, pictures, trial
from llmlab.applab.pictures import Sheet
from llmlab.applab.serving import THEME_COOKIE, WIDTH_COOKIE
from llmlab.applab.trial import Course, Lap, Trial
from llmlab.runs import Run
from llmlab.ui import figures

DRAFTS = {"nobody": None, "n-grams of its own text": "ngram", "suffixes of all texts": "suffix", "a smaller model (lab-xs)": "lab-xs"}


def drafting(source: str | None) -> str:
    """Who drafts, in the words of the menu."""
    return next((words for words, name in DRAFTS.items() if name == source), "nobody")


def heading(name: str) -> Any:
    """The title of an app, and its idea."""
    import marimo as mo

    one = gallery.app(name)
    return mo.md(f"# {one.title}\n\n{one.idea}")


def sheet() -> Sheet:
    """What to draw on: the theme that the visitor of this page chose, or marimo's own setting where no page was asked for,
    and the width of the browser's window when the page was opened. Ask in a page's first cell and hand it on: what a
    widget's message or a lazy element computes later knows no page."""
    import marimo as mo

    meta = mo.app_meta()
    cookies = dict(meta.request.cookies) if meta.request is not None else {}
    chosen, width = cookies.get(THEME_COOKIE), str(cookies.get(WIDTH_COOKIE, ""))
    theme = str(chosen) if chosen in ("light", "dark") else "dark" if meta.theme == "dark" else "light"
    return Sheet(theme, int(width)) if width.isdecimal() else Sheet(theme)


def recorded(name: str) -> Run:
    """A run that comes with llmlab."""
    return Run.load(gallery.recorded_runs()[name])


def once(work: Callable[[], object]) -> None:
    """Do `work` in a thread of this page."""
    import marimo as mo

    mo.Thread(target=work, daemon=True).start()


# ------------------------------------------------------------------------------------ the policy lab
def race(entry: Trial, course: Course) -> list[Lap]:
    """`trial.race`, with a bar that shows how far it is."""
    import marimo as mo

    total = course.seeds * len(trial.entrants(entry, entry.seam))
    with mo.status.progress_bar(total=total, title="Racing", subtitle=course.machine, remove_on_exit=True) as bar:
        return trial.race(entry, course, entry.seam, lambda: bar.update())


def head_to_head(entry: Trial, course: Course, on: Sheet) -> Any:
    """Two timelines of the first seed: the default and your policy."""
    a, b = trial.head_to_head(entry, course, entry.seam)
    return pictures.drawn(on, lambda: figures.policy_race(a.run, b.run, (a.policy, b.policy), 30))


# ------------------------------------------------------------------------------- CPU and GPU in parallel
@cache
def _atlas() -> dict[str, overlap.Record]:
    """The recorded machines, by name; without those that were recorded before the default one was."""
    opens_with = overlap.read(gallery.recorded_file("overlap.json"))
    atlas = overlap.read_atlas(gallery.recorded_file("overlap.msgpack.zst"))
    machines = atlas.machines if atlas.mark == opens_with.mark else {}
    return {**machines, overlap.Machine().name: opens_with}


def placements(of: overlap.Machine) -> dict[str, overlap.Served]:
    """All placements on this machine: recorded, or else simulated, with a bar that shows how far it is."""
    known = _atlas().get(of.name)
    if known is not None:
        return known.served
    import marimo as mo

    with mo.status.progress_bar(total=len(overlap.NAMES), title="Simulating", remove_on_exit=True) as bar:
        return overlap.compared(of, lambda name: bar.update(subtitle=name))


def iterations(of: overlap.Machine, chosen: Sequence[str]) -> list[overlap.Glimpse]:
    """Two iterations of each: recorded or simulated."""
    known = _atlas().get(of.name)
    if known is not None:
        return [known.glimpses[name] for name in chosen]
    import marimo as mo

    with mo.status.spinner(title="Simulating two iterations", remove_on_exit=True):
        return [overlap.glimpse(of, name) for name in chosen]


def side_by_side(chosen: Sequence[str], seen: Sequence[overlap.Glimpse], until: float | None, on: Sheet) -> Any:
    """Their iterations on one scale; one below the other where the page is narrow."""
    import marimo as mo

    end = min(until or float("inf"), max(one.length for one in seen))
    drawn = [pictures.drawn(on, partial(overlap.gantt, name, one, end)) for name, one in zip(chosen, seen)]
    return mo.hstack([panel.style(flex="1 1 420px", min_width="0") for panel in drawn], gap=1.5, wrap=True)
