"""The scene of the app that shows chunked prefill: what is said and drawn is what the simulated engine did."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llmlab.applab import chunks


@pytest.fixture(scope="module")
def scenes() -> list[chunks.Scene]:
    return chunks.frontier(4096)


def test_a_smaller_budget_makes_pauses_shorter_and_the_newcomer_wait_longer(scenes: list[chunks.Scene]) -> None:
    stalls, firsts = [s.stall for s in scenes], [s.first for s in scenes]
    assert stalls == sorted(stalls) and firsts == sorted(firsts, reverse=True)
    assert stalls[-1] > 10 * stalls[0] and firsts[0] > 2 * firsts[-1]
    assert all(s.usual <= s.stall for s in scenes)


def test_every_chunk_computes_a_budget_less_the_readers(scenes: list[chunks.Scene]) -> None:
    for one in scenes:
        room = one.budget - chunks.READERS
        assert len(one.chunks) == -(-one.prompt // room)
        assert one.chunks[0][0] >= 0 and one.chunks[-1][1] == pytest.approx(one.first)
        assert len(one.tokens) == chunks.READERS and all(times[0] < -0.2 < one.own[-1] <= times[-1] for times in one.tokens.values())


def test_the_longest_pause_is_one_of_the_steps_that_compute_the_prompt(scenes: list[chunks.Scene]) -> None:
    for one in scenes:
        assert max(b - a for a, b in one.chunks) == pytest.approx(one.stall, rel=1e-6)
        times = one.tokens["reader 1"]
        assert one.pause in list(pairwise(times))


def test_longer_prompts_make_longer_pauses_if_they_are_not_cut() -> None:
    stalls = [chunks.scene(prompt, 8192).stall for prompt in chunks.PROMPTS]
    assert stalls == sorted(stalls) and stalls[-1] > 8 * stalls[0]


def test_all_pictures_of_a_prompt_reach_the_end_of_their_scale(scenes: list[chunks.Scene]) -> None:
    end = chunks.longest(4096)
    assert end == scenes[0].first == max(s.first for s in scenes)
    assert all(s.own[-1] >= end for s in scenes)


def test_what_is_said_has_the_numbers_of_the_scene(scenes: list[chunks.Scene]) -> None:
    whole, cut, calm = scenes[-1], scenes[3], scenes[0]
    assert chunks.finding(whole).startswith("In one step") and "705 ms" in chunks.finding(whole)
    assert chunks.finding(cut).startswith("In 9 chunks") and chunks.finding(calm).startswith("Nobody notices the 4,096 tokens")
    assert "504 tokens" in chunks.reason(cut) and "74 such steps" in chunks.reason(calm)
    assert "8,192 tokens make readers wait 705 ms" in chunks.trade(scenes)


def test_the_pictures_hold_every_token_and_every_budget(scenes: list[chunks.Scene]) -> None:
    pytest.importorskip("altair")
    whole, calm = scenes[-1], scenes[0]
    drawn = chunks.scene_chart(whole, chunks.longest(4096)).to_dict()
    marks = drawn["datasets"][next(layer for layer in drawn["layer"] if layer["mark"]["type"] == "tick")["data"]["name"]]
    assert {row["who"] for row in marks} == {*whole.tokens, chunks.NEWCOMER}
    assert "without a token" in str(drawn) and "without a token" not in str(chunks.scene_chart(calm, 1.0).to_dict())
    frontier = chunks.frontier_chart(scenes, 512).to_dict()
    points = frontier["datasets"][frontier["data"]["name"]]
    assert [row["on"] for row in points] == [b == 512 for b in chunks.BUDGETS]
    assert [row["label"] for row in points][-2:] == ["", "4,096, 8,192"] and points[0]["label"] == "64"
