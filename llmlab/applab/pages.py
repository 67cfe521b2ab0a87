"""What every page of an app has: a heading, a theme, a first picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmlab.applab import gallery, pictures, trial
from llmlab.applab.serving import THEME_COOKIE
from llmlab.applab.trial import Course, Lap, Trial
from llmlab.runs import Run
from llmlab.ui import figures


def heading(name: str) -> Any:
    """The title of an app, and its idea."""
    import marimo as mo

    one = gallery.app(name)
    return mo.md(f"# {one.title}\n\n{one.idea}")


def page_theme() -> str:
    """ "light" or "dark": what the visitor of this page chose, or marimo's own setting where no page was asked for."""
    import marimo as mo

    meta = mo.app_meta()
    chosen = dict(meta.request.cookies).get(THEME_COOKIE) if meta.request is not None else None
    return str(chosen) if chosen in ("light", "dark") else "dark" if meta.theme == "dark" else "light"


def recorded(name: str) -> Run:
    """A run that comes with llmlab."""
    return Run.load(gallery.recorded_runs()[name])


def first_look() -> Any:
    """The timeline of the recorded run, to look at while something else is being prepared."""
    from llmlab.ui.widget import Timeline

    return Timeline(recorded("first-look"), theme=page_theme())


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


def head_to_head(entry: Trial, course: Course) -> Any:
    """Two timelines of the first seed: the default and your policy."""
    a, b = trial.head_to_head(entry, course, entry.seam)
    return pictures.drawn(page_theme(), lambda: figures.policy_race(a.run, b.run, (a.policy, b.policy), 30))
