"""Sentences as the apps show them, computed from what is there."""

from __future__ import annotations

import html
from typing import Any

from llmlab.applab import pictures, traces, trial
from llmlab.applab.live import Drafts, LiveEngine
from llmlab.applab.trial import Trial
from llmlab.runs import Run
from llmlab.types import LabError
from llmlab.ui import figures
from llmlab.ui.chart import count, percent, seconds
from llmlab.ui.inspector import Forced


def beginning(live: LiveEngine) -> Any:
    """What is to be seen and tried here: the engine, or a recorded run until it is loaded, or why it stopped."""
    import marimo as mo

    if live.ended:
        return mo.callout(mo.md(f"The engine {live.state}"), kind="danger")
    if live.engine is None:
        return mo.md("*The model is being loaded. Until then: a run recorded earlier.*")
    return mo.md("Try: *Drop a long prompt* with a **token budget** of 512, then with 32: the long steps, in which all others stand still, "
                 "are gone. Drag **arrivals/s** to the right: grey bars pile up. Then change **who goes first**.")  # fmt: skip


def headline(text: str) -> Any:
    """A finding above a picture."""
    import marimo as mo

    return mo.Html(pictures.headline(html.escape(text)))


def engine_room(live: LiveEngine, selected: str) -> Any:
    """What the request that was clicked asked and got; then the engine in one sentence, who else looks at it, and what
    could not be done. One piece of text: it is made anew every second."""
    import marimo as mo

    return mo.Html(f"<p>{_letter(live, selected)}</p><p>{'<br>'.join(_findings(live))}</p>")


def _findings(live: LiveEngine) -> list[str]:
    v, lines = live.vitals, []
    if v.mean_ttft is not None and v.mean_e2e is not None:
        lines.append(f"The newest requests got their first token after <b>{seconds(v.mean_ttft)}</b> and their last after "
                     f"<b>{seconds(v.mean_e2e)}</b> on average (measured); {v.right} of {v.judged} answers were right.")  # fmt: skip
    if live.speed < 1:
        lines.append(f"Slow motion: after each step the engine stands still, so a step takes {1 / live.speed:.0f} times as "
                     "long on this page as in truth. Its clock does not count that.")  # fmt: skip
    drafts = live.drafts()
    if drafts is not None:
        lines.append(f"Drafts of {drafts.source}: {_drafted(drafts)}")
    if live.num_watchers > 1:
        lines.append(f"<b>{count(live.num_watchers, 'page')} look at this one engine</b>: whoever turns a knob turns it for all.")
    return lines + [f"<code>{html.escape(note)}</code>" for note in live.notes]


def _drafted(drafts: Drafts) -> str:
    if not drafts.judged:
        return "none has been verified yet."
    return (f"<b>{percent(drafts.held / drafts.judged)}</b> of {count(drafts.judged, 'token')} held, so a step brings a request that has "
            f"some <b>{1 + drafts.held / drafts.verifications:.1f}</b> tokens instead of one (measured).")  # fmt: skip


def _letter(live: LiveEngine, name: str) -> str:
    one = live.letters.get(name)
    if one is None:
        return "Click a bar: what it asked, what it got, and why it was late."
    verdict = {None: "", True: " ✓ right", False: " ✗ wrong"}[one.right]
    asked = one.prompt if len(one.prompt) < 300 else f"{one.prompt[:140]} … {one.prompt[-140:]}"
    said = html.escape(one.text) or "…"
    return (f"<b>{html.escape(name)}</b> asked <code>{html.escape(asked)}</code> and got "
            f"<code>{said}</code>{verdict if one.finished else ' …'}")  # fmt: skip


def problem(entry: Trial) -> Any:
    """What is wrong with the text of a policy."""
    import marimo as mo

    return mo.callout(mo.md(f"**It does not race.** {entry.problem}"), kind="danger")


def verdict(entry: Trial) -> Any:
    """What the check says of a policy."""
    import marimo as mo

    try:
        report = trial.checked(entry)
    except LabError as error:
        return mo.callout(mo.md(f"**The check was stopped.** {error}"), kind="danger")
    calls = ", ".join(f"{took:.2g} µs with {size} requests" for size, took in report.microseconds.items())
    said = "".join(f"\n- {failure}" for failure in (*report.failures, *report.notes))
    head = "keeps its seam's contract" if report.ok else f"{count(len(report.failures), 'finding')} of the check, and it races"
    text = f"**{entry.name}** ({entry.seam}): {head}. {report.num_cases} questions; a call takes {calls}.{said}"
    return mo.callout(mo.md(text), kind="success" if report.ok else "warn")


def forked(run: Run, at: int, seam: str, policy: str | Forced, sheet: pictures.Sheet) -> Any:
    """A fork and its parent: the finding, where they part, and both timelines."""
    import marimo as mo

    try:
        fork = traces.forked(run, at, seam, policy)
    except LabError as error:
        return mo.callout(mo.md(f"**No fork.** {error.problem}. {error.way_out}"), kind="danger")
    names = ("as it was", f"{seam} {fork.policy}")
    race = pictures.drawn(sheet, lambda: figures.policy_race(fork.as_it_was, fork.changed, names, 40))
    told = mo.md(f"Both continuations are simulated. {fork.comparison.parted}")
    return mo.vstack([headline(traces.fork_finding(fork)), told, race], gap=0)
