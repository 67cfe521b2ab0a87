"""The task suites: teachers are right, verifiers can tell, and training never sees a held-out problem."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab import tasks
from llmlab.tasks import arith, chat, doc
from llmlab.tasks.base import split_of

seeds = st.integers(0, 2**32)
KINDS = [("arith", 1, "fast"), ("arith", 2, "slow"), ("arith", 3, "slow"), ("arith", 4, None), ("arith", 2, "think"),
         ("chat", 1, None), ("chat", 2, None), ("chat", 1, "word"), ("doc", 1, None), ("doc", 2, "family:3")]


def draw(kind: tuple[str, int, str | None], seed: int, split: tasks.Split | None = None) -> tasks.Problem:
    name, k, style = kind
    return tasks.suite(name).problem(random.Random(seed), k=k, style=style, split=split)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), seeds)
def test_the_teacher_is_right(kind: tuple[str, int, str | None], seed: int) -> None:
    problem = draw(kind, seed)
    text = tasks.suite(kind[0]).demonstrate(problem, random.Random(seed + 1)).completion
    assert tasks.verify(problem, text)
    assert text.endswith("<eos>")
    if kind[2] != "think":      # a thinking teacher may slip before it mends the slip
        assert all(tasks.suite(kind[0]).oracle(problem).steps(text))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), seeds)
def test_a_problem_follows_from_its_seed(kind: tuple[str, int, str | None], seed: int) -> None:
    assert draw(kind, seed) == draw(kind, seed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), seeds)
def test_the_split_is_kept_by_the_generator(kind: tuple[str, int, str | None], seed: int) -> None:
    assert draw(kind, seed, "train").split == "train"
    assert draw(kind, seed, "test").split == "test"


def test_training_draws_no_held_out_problem() -> None:
    data = pytest.importorskip("llmlab.training.data", reason="needs torch")
    rng = random.Random(5)
    for recipe in data.BROAD.mixture + data.FOCUS.mixture:
        for _ in range(40):
            prompt = data.demonstrate(recipe, rng).prompt
            canonical = arith.parse(prompt).canonical if recipe.suite == "arith" else \
                "chat:" + prompt[6:-5] if recipe.suite == "chat" else f"doc:{prompt}"
            assert split_of(canonical) == "train"


def test_about_a_tenth_is_held_out() -> None:
    rng = random.Random(0)
    held_out = sum(tasks.suite("arith").problem(rng, k=2).split == "test" for _ in range(5000))
    assert 400 < held_out < 600


def test_factor_order_does_not_move_a_problem_across_the_split() -> None:
    assert arith.parse("37*46-23*58?").canonical == arith.parse("<slow>46*37-58*23?").canonical


@settings(max_examples=100, deadline=None)
@given(st.integers(11, 99), st.integers(11, 99))
def test_every_line_of_every_route_is_a_true_equation(x: int, y: int) -> None:
    for route in arith.routes(x, y):
        assert all(eval(left) == eval(right) for left, right in (line.split("=") for line in route.lines))
        assert route.lines[-1].endswith(f"={x * y}")


def test_a_product_has_four_routes_and_a_round_one_has_one() -> None:
    assert len(arith.routes(37, 46)) == 4
    assert len(arith.routes(37, 40)) == 1
    assert len(arith.routes(37, 37)) == 2


RIGHT = "a46=40+6;a37*40=1480;a37*6=222;a1480+222=1702;b23=20+3;b58*20=1160;b58*3=174;b1160+174=1334;z1702-1334=368#368"


def labels(text: str) -> list[bool]:
    problem = arith.parse("37*46-23*58?")
    return tasks.suite("arith").oracle(problem).steps(text)


def test_step_labels_of_a_right_solution() -> None:
    assert labels(RIGHT) == [True] * 10


@pytest.mark.parametrize(("old", "new", "first_wrong"), [
    ("a37*6=222", "a37*6=212", 2),                     # a wrong number
    ("a37*6=222", "a37*7=259", 2),                     # a true equation about the wrong number
    ("b23=20+3", "b23=30-7;b58*30=1740", 6),           # an unfinished product: the next line is of another route
    ("b23=20+3", "a46=40+6", 4),                       # the same term twice
    ("z1702-1334=368", "z1334-1702=-368", 8),          # the sum in the wrong order
    ("#368", "#367", 9),
])
def test_step_labels_find_the_first_wrong_line(old: str, new: str, first_wrong: int) -> None:
    got = labels(RIGHT.replace(old, new))
    assert got[:first_wrong] == [True] * first_wrong
    assert not any(got[first_wrong:])


def test_a_right_answer_with_a_wrong_way_is_final_but_not_valid() -> None:
    text = RIGHT.replace("a37*6=222", "a37*6=212")
    assert tasks.verify(arith.parse("37*46-23*58?"), text)
    assert not all(labels(text))


def test_thinking_mends_a_slip() -> None:
    problem = arith.parse("<think>37*46?")
    text = ("a46=40+6;a37*40=1480;a37*6=232;a1480+232=1712; check;a37=30+7;a46*30=1380;a46*7=322;a1380+322=1702;"
            " wait;a37=40-3;a46*40=1840;a46*3=138;a1840-138=1702; ok;#1702<eos>")
    assert tasks.suite("arith").oracle(problem).steps(text) == [True, True, False, False] + [True] * 12
    assert tasks.verify(problem, text)


def test_slips_are_taught_without_loss() -> None:
    rng, slips = random.Random(0), 0
    for _ in range(200):
        problem = tasks.suite("arith").problem(rng, k=1, style="think")
        demo = tasks.suite("arith").demonstrate(problem, rng)
        slips += any(not s.learn for s in demo.segments)
        assert any(not s.learn for s in demo.segments) == (" wait;" in demo.completion)
    assert 10 < slips < 60


@pytest.mark.parametrize("text", ["", "no idea", "37*46?", "#369", RIGHT + "9"])
def test_wrong_answers_are_wrong(text: str) -> None:
    assert not tasks.verify(arith.parse("37*46-23*58?"), text)


@pytest.mark.parametrize("prompt", ["37+46?", "37*46", "hello?", "<quick>37*46?"])
def test_unreadable_prompts_are_refused_with_the_prompt_named(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        arith.parse(prompt)


def test_a_chat_answer_must_be_true_complete_and_about_the_place() -> None:
    problem = replace(draw(("chat", 1, None), 0), meta={"topics": ("river",), "kind": "free"})
    look = chat.facts("river", "looks")[0]
    wrong = next(v for v in chat.RELATIONS["looks"] if v not in chat.facts("river", "looks"))
    assert tasks.verify(problem, f"the river looks {look}. also it looks {look}.<eos>")
    for text in ("", f"the river looks {wrong}.", f"the river looks {look}", f"it looks {look}.",
                 f"the castle looks {chat.facts('castle', 'looks')[0]}."):
        assert not tasks.verify(problem, text)


def test_tone_decides_the_length_and_the_tail_is_heavy() -> None:
    rng, suite = random.Random(0), tasks.suite("chat")
    lengths: dict[str, list[int]] = {"briefly": [], "in detail": [], "as fully as you can": []}
    for _ in range(3000):
        problem = suite.problem(rng)
        words = len(suite.demonstrate(problem, rng).completion.split())
        for tone in lengths:
            if tone in problem.prompt:
                lengths[tone].append(words)
    median = {tone: sorted(v)[len(v) // 2] for tone, v in lengths.items()}
    assert median["briefly"] < median["in detail"] < median["as fully as you can"]
    full = sorted(lengths["as fully as you can"])
    assert full[-1] > 4 * full[len(full) // 2]


def test_records_of_a_family_share_their_beginning() -> None:
    one, two = (draw(("doc", 1, "family:3"), seed) for seed in (0, 1))
    start = f"<doc>{doc.boilerplate(3)}"
    assert one.prompt.startswith(start) and two.prompt.startswith(start)
    assert one.prompt != two.prompt


def test_a_record_states_its_gold_once() -> None:
    problem = draw(("doc", 1, None), 7)
    assert problem.prompt.count(f" is {problem.gold}.") == 1


def test_two_needles_are_answered_in_order() -> None:
    problem = draw(("doc", 2, None), 3)
    first, second = problem.gold.split()
    assert tasks.verify(problem, f"{first} {second}<eos>")
    assert not tasks.verify(problem, f"{second} {first}")
    assert tasks.suite("doc").oracle(problem).steps(f"{first} 0") == [True, False]


def test_tour_problems_are_mixed_held_out_and_seeded() -> None:
    problems = tasks.tour_problems(0, 40)
    assert len(problems) == 40
    assert problems == tasks.tour_problems(0, 40)
    assert {p.suite for p in problems} == set(tasks.SUITE_NAMES)
    assert all(p.split == "test" for p in problems)
    assert len({p.meta["family"] for p in problems if p.suite == "doc"}) == 1


@pytest.mark.parametrize(("name", "arguments"), [
    ("arith", {"k": 0}), ("arith", {"style": "quick"}), ("chat", {"k": 3}), ("doc", {"style": "family:99"})])
def test_bad_arguments_are_refused_with_the_suite_named(name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{name}: "):
        tasks.suite(name).problem(random.Random(0), **arguments)     # type: ignore[arg-type]


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="arith, chat, doc"):
        tasks.suite("poetry")


def test_tasks_import_without_torch() -> None:
    code = "import sys, llmlab.tasks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
