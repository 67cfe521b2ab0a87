"""Coloured boxes of a lesson: passed, failed, answered, still closed. Colour never stands alone: a sign says the same."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

from llmlab.ui.theme import LIGHT

Mood = Literal["passed", "failed", "answer", "closed"]
SIGNS: dict[Mood, str] = {"passed": "✔", "failed": "✘", "answer": "→", "closed": "…"}
COLOURS: dict[Mood, str] = {
    "passed": LIGHT.cached, "failed": LIGHT.preempted, "answer": LIGHT.decode, "closed": LIGHT.mute,
}  # fmt: skip


def box(mood: Mood, headline: str, sentences: Sequence[str] = ()) -> str:
    """A box as HTML, readable on light and on dark pages."""
    colour = COLOURS[mood]
    items = "".join(f"<li>{html.escape(s)}</li>" for s in sentences)
    more = f'<ul style="margin:4px 0 0 18px;padding:0">{items}</ul>' if items else ""
    return (
        f'<div class="lesson-box {mood}" style="border-left:5px solid {colour};padding:6px 12px;margin:6px 0;'
        f'background:{colour}1A;max-width:820px"><b style="color:{colour}">{SIGNS[mood]}</b> '
        f"{html.escape(headline)}{more}</div>"
    )


def plain(mood: Mood, headline: str, sentences: Sequence[str] = ()) -> str:
    """The same for a terminal."""
    return "\n".join([f"{SIGNS[mood]} {headline}", *(f"  - {s}" for s in sentences)])
