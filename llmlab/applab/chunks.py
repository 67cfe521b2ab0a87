"""Chunked prefill in one scene: eight people read their answers token by token, and somebody sends a long prompt.

Simulated; two numbers matter: how long the prompt is and how many tokens a step may compute.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import msgspec

from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.events.trace import Run
from llmlab.types import SamplingParams
from llmlab.ui.chart import WIDTH, data, log_ticks, seconds, setting, title
from llmlab.ui.theme import Roles, roles

MODEL, HARDWARE = "llama-3.1-8b", "a10"
READERS = 8
PROMPTS = (256, 512, 1024, 2048, 4096, 8192)
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
ARRIVES = 0.5  # seconds after the readers, who are in the middle of their answers by then
BEFORE, AFTER = 0.25, 0.3  # seconds that are shown before the newcomer arrives and after its first token
NEWCOMER = "newcomer"
GUIDE = """
1. Drag **tokens of the long prompt**: the longer it is, the longer all eight readers stand still.
2. Drag **token budget of a step** to the left: the prompt is cut into chunks, and each step brings the readers their tokens, too.
3. Go on to the end: the pauses are gone, but now the newcomer waits. The second picture shows where to stop.
"""
ELSEWHERE = """The same on a real engine: in the [engine room](../engine_room/), press *Drop a long prompt* with a token budget of 512,
and again with 32."""


class Scene(msgspec.Struct, frozen=True):
    """What happened around one long prompt. Seconds since it arrived.

    `tokens`: when each reader got its tokens; `chunks`: start and end of the steps that computed a part of the prompt;
    `first`: its first token; `pause`: start and end of the longest time in which a reader got nothing while the prompt
    was computed; `usual`: the median time between two tokens before.
    """

    prompt: int
    budget: int
    tokens: dict[str, tuple[float, ...]]
    own: tuple[float, ...]
    chunks: tuple[tuple[float, float], ...]
    first: float
    pause: tuple[float, float]
    usual: float
    setting: str

    @property
    def stall(self) -> float:
        """The longest time [s] in which a reader got nothing."""
        return self.pause[1] - self.pause[0]


@lru_cache(maxsize=128)
def scene(prompt: int, budget: int) -> Scene:
    """A newcomer with `prompt` tokens, in an engine whose steps compute `budget` tokens at most. Simulated."""
    config = EngineConfig(model=MODEL, executor="sim", hardware=HARDWARE, composer="chunked", max_num_batched_tokens=budget,
                          block_size=16, num_blocks=2048, enable_prefix_caching=False, log_level=2)  # fmt: skip
    with Engine(config) as engine:
        for number in range(READERS):
            engine.add_request([1 + number] * 16, SamplingParams(max_tokens=4000, ignore_eos=True), request_id=f"reader {number + 1}",
                               arrival=0.0)  # fmt: skip
        engine.add_request([100] * prompt, SamplingParams(max_tokens=4000, ignore_eos=True), request_id=NEWCOMER, arrival=ARRIVES)
        until = None if budget == BUDGETS[0] else ARRIVES + longest(prompt) + AFTER
        while until is None or engine.clock.now() < until:
            answers = engine.step()
            if until is None and any(one.request_id == NEWCOMER and one.outputs[0].token_ids for one in answers):
                until = engine.clock.now() + AFTER
        return _read(Run.of(engine.log), prompt, budget)


def _read(run: Run, prompt: int, budget: int) -> Scene:
    got: dict[str, list[float]] = {}
    for event in run.events("TokensReleased"):
        got.setdefault(str(event.request), []).append(event.t - ARRIVES)
    own = tuple(got.pop(NEWCOMER))
    chunks = tuple((step.start - ARRIVES, step.end - ARRIVES) for step in run.steps
                   if step.end is not None and any(item.request == NEWCOMER and item.num_tokens > 1 for item in step.items))  # fmt: skip
    readers = sorted(got)
    gaps = [pair for name in readers for pair in zip(got[name], got[name][1:])]
    usual = statistics.median(b - a for a, b in gaps if b <= 0)
    pause = max((pair for pair in gaps if pair[1] > 0 and pair[0] < own[0]), key=lambda pair: pair[1] - pair[0])
    return Scene(prompt, budget, {name: tuple(got[name]) for name in readers}, own, chunks, own[0], pause, usual, setting(run))


def longest(prompt: int) -> float:
    """Seconds until the newcomer's first token with the smallest budget: all pictures of one prompt have one scale."""
    return scene(prompt, BUDGETS[0]).first


def frontier(prompt: int) -> list[Scene]:
    """The same prompt with every budget."""
    return [scene(prompt, budget) for budget in BUDGETS]


# ------------------------------------------------------------------------------------------ words
def finding(one: Scene) -> str:
    """What the two sliders do to the readers and to the newcomer."""
    first = f"The newcomer's first token comes after {seconds(one.first)}"
    if one.stall < 1.15 * one.usual:
        return f"Nobody notices the {one.prompt:,} tokens: a reader waits {seconds(one.stall)} at most, as always. {first}"
    how = "In one step" if len(one.chunks) == 1 else f"In {len(one.chunks)} chunks"
    return (f"{how}, a prompt of {one.prompt:,} tokens makes everybody wait {seconds(one.stall)} for one token, "
            f"{one.stall / one.usual:.1f} times as long as usual. {first}")  # fmt: skip


def reason(one: Scene) -> str:
    """Why a small chunk costs little and a large one much, from the durations of the steps."""
    took, part, each = _chunk(one)
    small = scene(one.prompt, BUDGETS[0])
    told = (f"A step in which only the {READERS} readers get a token takes **{seconds(one.usual)}**: the model's weights are read from "
            f"memory once, for however many tokens. A step that also computes {part:,} tokens of the prompt takes "
            f"**{seconds(took)}**, so each of them costs {seconds(each)}.")  # fmt: skip
    if one.budget == small.budget:
        return f"{told} They ride along with the reading of the weights; but {len(one.chunks)} such steps are needed."
    return (f"{told} With a budget of {small.budget} a token costs {seconds(_chunk(small)[2])}: few tokens ride along with the reading of "
            "the weights, many are arithmetic for which all others wait.")  # fmt: skip


def _chunk(one: Scene) -> tuple[float, int, float]:
    """The longest step with a chunk [s], the tokens of a whole chunk, and what each of them adds to a step [s]."""
    took, part = max(end - start for start, end in one.chunks), min(one.prompt, one.budget - READERS)
    return took, part, (took - one.usual) / part


def trade(scenes: Sequence[Scene]) -> str:
    """What the budget trades, over all budgets."""
    calm, quick = min(scenes, key=lambda s: (s.stall, s.first)), min(scenes, key=lambda s: (s.first, s.stall))
    good = next(s for s in sorted(scenes, key=lambda s: -s.budget) if s.stall < 4 * s.usual or s is calm)
    return (f"The budget trades pauses for the newcomer's patience: {quick.budget:,} tokens make readers wait {seconds(quick.stall)} and the "
            f"newcomer {seconds(quick.first)}; {good.budget:,} tokens {seconds(good.stall)} and {seconds(good.first)}; "
            f"{calm.budget:,} tokens {seconds(calm.stall)} and {seconds(calm.first)}")  # fmt: skip


# --------------------------------------------------------------------------------------- pictures
def scene_chart(one: Scene, until: float) -> Any:
    """A row a reader with a mark a token, the newcomer's row with its chunks, and the longest pause."""
    import altair as alt

    c, end = roles(), until + AFTER
    names = [*one.tokens, NEWCOMER]
    x = alt.X("t:Q", title="seconds since the newcomer sent its prompt", scale=alt.Scale(domain=[-BEFORE, end], nice=False),
              axis=alt.Axis(tickCount=12, format="~g", offset=12))  # fmt: skip
    y = alt.Y("who:N", sort=names, title=None, axis=alt.Axis(grid=False), scale=alt.Scale(paddingInner=0.25))
    ticks = [{"who": who, "t": t} for who, times in (one.tokens | {NEWCOMER: one.own}).items() for t in times if -BEFORE <= t <= end]
    marks = alt.Chart(data(ticks)).mark_tick(color=c.decode, thickness=2, bandSize=15).encode(x=x, y=y)
    work = alt.Chart(data([{"who": NEWCOMER, "t": a, "t1": b} for a, b in one.chunks])).mark_bar(
        color=c.prefill, height=15, stroke=c.paper, strokeWidth=0.7).encode(x=x, x2="t1", y=y)  # fmt: skip
    layers = [*_pause(one, x, c), marks, work, _arrival(x, c), *_first(one, x, y)]
    notes = ["A blue mark is a token that somebody gets; orange: the prompt is computed", one.setting]
    return alt.layer(*layers).properties(width=WIDTH, height=26 * len(names), title=title(finding(one), *notes))


def _pause(one: Scene, x: Any, c: Roles) -> list[Any]:
    import altair as alt

    if one.stall < 1.15 * one.usual:
        return []
    height = 26 * READERS
    row = data([{"t": one.pause[0], "t1": one.pause[1], "middle": sum(one.pause) / 2, "label": f"{seconds(one.stall)} without a token"}])
    band = alt.Chart(row).mark_rect(color=c.preempted, opacity=0.13).encode(x=x, x2="t1", y=alt.value(2), y2=alt.value(height))
    words = alt.Chart(row).mark_text(style="strong", baseline="bottom").encode(x="middle:Q", y=alt.value(0), text="label:N")
    return [band, words]


def _arrival(x: Any, c: Roles) -> Any:
    import altair as alt

    return alt.Chart(data([{"t": 0.0}])).mark_rule(color=c.mute, strokeDash=[4, 3]).encode(x=x)


def _first(one: Scene, x: Any, y: Any) -> list[Any]:
    import altair as alt

    row = alt.Chart(data([{"who": NEWCOMER, "t": one.first, "label": f"first token after {seconds(one.first)}"}]))
    return [row.mark_text(align="left", baseline="top", dy=11, dx=-2).encode(x=x, y=y, text="label:N")]


def frontier_chart(scenes: Sequence[Scene], chosen: int) -> Any:
    """The longest pause against the newcomer's first token, a point a budget; the chosen one is filled."""
    import altair as alt

    c = roles()
    rows: list[dict[str, Any]] = [
        {"i": i, "x": s.stall, "y": s.first, "label": label, "on": s.budget == chosen} for i, (s, label) in enumerate(_labelled(scenes))]  # fmt: skip
    x, y = (_log(name, [r[name] for r in rows], words) for name, words in (
        ("x", "a reader's longest wait for a token (s, log)"), ("y", "the newcomer's first token (s, log)")))  # fmt: skip
    base = alt.Chart(data(rows)).encode(x=alt.X(**x), y=alt.Y(**y))
    line = base.mark_line(color=c.mute, strokeWidth=1.6).encode(order="i:O")
    fill, size = alt.condition("datum.on", alt.value(c.decode), alt.value(c.paper)), alt.condition("datum.on", alt.value(260), alt.value(90))
    dots = base.mark_point(opacity=1, stroke=c.decode, strokeWidth=2).encode(fill=fill, size=size)
    text = base.mark_text(align="left", dx=11, dy=-9).encode(text="label:N")
    notes = ["A point is a token budget; filled: the one that is chosen; better: left and down", scenes[0].setting]
    return alt.layer(line, dots, text).properties(width=WIDTH, height=250, title=title(trade(scenes), *notes))


def _labelled(scenes: Sequence[Scene]) -> list[tuple[Scene, str]]:
    """Each with its budget; those that lie on one another share the last one's label."""
    found, names = [], []
    for one, following in itertools.zip_longest(scenes, scenes[1:]):
        names.append(f"{one.budget:,}")
        shared = following is not None and following.stall < 1.1 * one.stall and one.first < 1.1 * following.first
        found.append((one, "" if shared else ", ".join(names)))
        names = names if shared else []
    return found


def _log(field: str, values: Sequence[float], words: str) -> dict[str, Any]:
    import altair as alt

    low, high = min(values) / 1.2, max(values) * 1.4
    return {"shorthand": f"{field}:Q", "title": words, "scale": alt.Scale(type="log", domain=[low, high], nice=False),
            "axis": alt.Axis(values=log_ticks(low, high), format="~g")}  # fmt: skip
