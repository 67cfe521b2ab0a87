"""Charts of the apps that are not pictures of one run. Under a theme of `llmlab.ui.theme`, like all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmlab.applab.trial import Goal, Lap, Place, leaderboard
from llmlab.config import EngineConfig
from llmlab.ui.chart import WIDTH, count, data, percent, seconds, setting, title, unit_for
from llmlab.ui.theme import roles


def race_chart(laps: Sequence[Lap], goal: Goal, seam: str) -> Any:
    """One row a policy, the best on top: a dot for each seed, a bar at their mean, yours in green."""
    import altair as alt

    places, c = leaderboard(laps, goal, seam), roles()
    unit = unit_for(max(p.mean for p in places)) if goal.unit == "s" else None
    scale, name = (unit.per_second, unit.name) if unit else (1.0, "tokens/s")
    order = [p.policy for p in places]
    dots = [{"policy": lap.policy, "x": goal.of(lap.metrics) * scale, "seed": lap.seed, "who": _who(lap.yours)} for lap in laps]
    means = [{"policy": p.policy, "x": p.mean * scale, "who": _who(p.yours), "label": _amount(p.mean, goal)} for p in places]
    y = alt.Y("policy:N", sort=order, title=None, axis=alt.Axis(labelLimit=260, labelFontSize=13, grid=False))
    x = alt.X("x:Q", title=f"{goal.name} ({name})", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=8, format="~r"))
    colour = alt.Color("who:N", legend=None, scale=alt.Scale(domain=["built in", "yours"], range=[c.decode, c.cached]))
    bar = alt.Chart(data(means)).mark_bar(height=14, opacity=0.35, cornerRadiusEnd=3).encode(x=x, y=y, color=colour)
    told = [alt.Tooltip("policy:N"), alt.Tooltip("seed:Q"), alt.Tooltip("x:Q", title=goal.name, format=".4~g")]
    dot = alt.Chart(data(dots)).mark_point(filled=True, size=70, opacity=0.9).encode(x=x, y=y, color=colour, tooltip=told)
    text = alt.Chart(data(means)).mark_text(style="note", align="left", dx=4, dy=-13).encode(x=alt.value(0), y=y, text="label:N")
    return alt.layer(bar, dot, text).properties(
        width=WIDTH - 180, height=44 * len(places), title=title(race_finding(laps, goal, seam), _notes(laps))
    )


def race_finding(laps: Sequence[Lap], goal: Goal, seam: str) -> str:
    """Who won, by how much, and on how many of the seeds; in one sentence."""
    places = leaderboard(laps, goal, seam)
    default = next(p for p in places if p.policy == getattr(EngineConfig(), seam))
    mine = next((p for p in places if p.yours), None)
    seeds = len({lap.seed for lap in laps})
    told = mine or places[0]
    if told.policy == default.policy:
        return f"Nobody beats {default.policy}, the default: {goal.name} {_amount(default.mean, goal)}"
    change = told.mean / default.mean - 1 if default.mean else 0.0
    if abs(change) < 0.005:
        return f"{told.policy} leaves the {goal.name} as it is under {default.policy}"
    rank = f"; place {places.index(told) + 1} of {len(places)}" if mine else ""
    verb = "lowers" if change < 0 else "raises"
    return (f"{told.policy} {verb} the {goal.name} by {percent(abs(change))} against {default.policy}, "
            f"better on {told.beats_default} of {count(seeds, 'seed')}{rank}")  # fmt: skip


def _notes(laps: Sequence[Lap]) -> str:
    first, seeds = laps[0].run, len({lap.seed for lap in laps})
    requests = len(first.requests)
    where = setting(first).rsplit(", seed", 1)[0]
    return f"{where}. {count(requests, 'request')} on each of {count(seeds, 'seed')}, the same arrivals for all. A dot is a seed, the bar their mean"


def _who(yours: bool) -> str:
    return "yours" if yours else "built in"


def _amount(value: float, goal: Goal) -> str:
    return seconds(value) if goal.unit == "s" else f"{value:.0f} tokens/s"


def leaderboard_table(places: Sequence[Place], goal: Goal, seeds: int) -> str:
    """The leaderboard as a table of Markdown."""
    lines = [f"| place | policy | {goal.name} | beats the default | preemptions | failures |", "|---:|:---|---:|---:|---:|---:|"]
    for number, p in enumerate(places, 1):
        name = f"**{p.policy}**" if p.yours else p.policy
        lines.append(f"| {number} | {name} | {_amount(p.mean, goal)} | {p.beats_default} of {seeds} | {p.preemptions:.1f} | {p.failures} |")
    return "\n".join(lines)
