"""A policy from a text: whatever is wrong with it becomes a sentence; a race is fair; a loop without end is ended."""

from __future__ import annotations

import time

import pytest

from llmlab.applab import charts, trial
from llmlab.applab.trial import GOALS, Course, Lap, deadline, leaderboard, race, read
from llmlab.types import PolicyError
from llmlab.ui import theme

KEY = "class Mine:\n    def key(self, request, now):\n        {}\n"


@pytest.mark.parametrize("name", list(trial.EXAMPLES))
def test_every_example_is_a_policy_that_keeps_going(name: str) -> None:
    entry = read(trial.EXAMPLES[name])
    assert not entry.problem and entry.seam in trial.RACED
    laps = race(entry, Course(requests=12, seeds=1), entry.seam)
    mine = [lap for lap in laps if lap.yours]
    assert len(mine) == 1 and mine[0].metrics.num_finished == 12
    assert mine[0].run.events("PolicyFailed") == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class A:\n  def key(self, request now): pass", "Line 2: .* is no Python"),
        ("x = 1\n\x00", "is no Python"),
        ("x = 1", "no class here has the method of a seam"),
        ("import nothing_like_this", "Line 1: `ModuleNotFoundError"),
        ("raise SystemExit(3)", "Line 1: `SystemExit: 3`"),
        (KEY.format("return 1 / 0"), "Line 3: `ZeroDivisionError.*asked about"),
        (KEY.format("return request.nothing"), "Line 3: `AttributeError"),
        (KEY.format("return None"), "`None` must be a number"),
        (KEY.format("return float('nan')"), "must be a number"),
        ("class A:\n  def __init__(self, x): pass\n  def key(self, r, n): return 1", "making A"),
        ("class A:\n  def score(self, view): return 1", "TypeError"),
        ("class A:\n  def compose(self, view, offers): return [1]", "[Cc]ompose|items"),
    ],
)
def test_what_is_wrong_with_a_text_is_a_sentence(source: str, said: str) -> None:
    entry = read(source)
    assert entry.policy is None and entry.problem.endswith((".", "!")), entry.problem
    import re

    assert re.search(said, entry.problem), entry.problem


@pytest.mark.parametrize("source", ["while True: pass", KEY.format("while True: pass"),
                                    "while True:\n  try:\n    while True: pass\n  except Exception: pass"])  # fmt: skip
def test_a_loop_without_end_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE", 0.3)
    began = time.monotonic()
    assert "has not come to an end" in read(source).problem
    assert time.monotonic() - began < 20


def test_what_ends_in_time_is_left_alone() -> None:
    with deadline(0.2, "waiting"):
        pass
    time.sleep(0.4)  # nothing comes late
    with pytest.raises(PolicyError, match="never ends"), deadline(0.1, "looping"):
        while True:
            pass


def test_the_last_class_with_a_method_of_a_seam_is_the_policy() -> None:
    entry = read(KEY.format("return 1") + "class Other:\n    def score(self, view, candidate, needy):\n        return 1\nclass Helper: pass\n")
    assert (entry.name, entry.seam) == ("Other", "victim")


# -------------------------------------------------------------------------------------------- races
@pytest.fixture(scope="module")
def laps() -> list[Lap]:
    return race(read(trial.EXAMPLES["shortest prompt first"]), Course(load=1.6, requests=24, seeds=2), "ordering")


def test_all_race_on_the_same_arrivals(laps: list[Lap]) -> None:
    for seed in (0, 1):
        arrivals = {tuple(r.arrival for r in lap.run.requests.values()) for lap in laps if lap.seed == seed}
        assert len(arrivals) == 1
    # policies that other tests registered may race, too
    assert {lap.policy for lap in laps} >= {"fcfs", "sjf_oracle", "ljf", "ShortestPrompt (yours)"}


@pytest.mark.parametrize("goal", list(GOALS))
def test_the_leaderboard_puts_the_best_first(laps: list[Lap], goal: str) -> None:
    aim = GOALS[goal]
    places = leaderboard(laps, aim, "ordering")
    means = [p.mean for p in places]
    assert means == sorted(means, reverse=not aim.smaller)
    assert next(p for p in places if p.policy == "fcfs").beats_default == 0
    table = charts.leaderboard_table(places, aim, 2)
    assert all(p.policy in table for p in places) and "**ShortestPrompt (yours)**" in table


def test_the_finding_is_computed_from_the_laps(laps: list[Lap]) -> None:
    aim = GOALS["mean time to first token"]
    means = {p.policy: p.mean for p in leaderboard(laps, aim, "ordering")}
    change = abs(means["ShortestPrompt (yours)"] / means["fcfs"] - 1)
    said = charts.race_finding(laps, aim, "ordering")
    assert f"{change:.0%}" in said and "ShortestPrompt (yours)" in said and "of 2 seeds" in said
    assert "Nobody beats fcfs" in charts.race_finding([lap for lap in laps if lap.policy == "fcfs"], aim, "ordering")
    with theme.enable("dark"):
        assert charts.race_chart(laps, aim, "ordering").to_dict()["title"]["text"]


def test_a_policy_that_raises_in_the_race_counts_its_failures() -> None:
    source = KEY.format("return 1 / (0 if request.id.startswith('r1') and request.num_prompt_tokens > 250 else 1)")
    entry = read(source)
    assert not entry.problem
    places = leaderboard(race(entry, Course(requests=24, seeds=1), "ordering"), GOALS["mean latency"], "ordering")
    assert next(p for p in places if p.yours).failures > 0
