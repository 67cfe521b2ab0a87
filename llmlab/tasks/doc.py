"""Long records with key-value needles behind boilerplate that whole families of records share.

A prompt is ``<doc>`` + the family's boilerplate (the same tokens in every record of the family) + sentences of
filler with needles such as ``the code of mira tolen is 4821.`` + a question. For prefix sharing, chunked
prefill, and everything that has to do with long contexts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmlab.tasks.base import Demonstration, Problem, Segment, Split, answer_part, split_of
from llmlab.tasks.chat import RELATIONS, TOPICS, facts

FIRST_NAMES = ("mira", "toma", "lena", "karo", "nilo", "sera", "davi", "olan", "pela", "ruvi", "jona", "tali",
               "bero", "fina", "gano", "heli", "ivo", "kesi", "lumo", "mado", "nera", "osti", "pavo", "rika",
               "suno", "tesa", "ulmo", "vika", "wano", "yuri")
LAST_NAMES = ("tolen", "barik", "mossa", "renko", "valdi", "sorin", "kemal", "lunde", "farro", "niska", "holm",
              "pardo", "quist", "rosal", "stane", "terra", "urban", "vance", "weldo", "zeman")
KEYS = ("code", "room", "desk", "badge")
NUM_FAMILIES = 8
TOKENS_PER_SENTENCE = 9
"""Roughly; the knob for the length of a record need not be exact."""


@dataclass(frozen=True, slots=True)
class Needle:
    """One fact that only this record states."""

    key: str
    person: str
    value: str

    @property
    def sentence(self) -> str:
        """As it stands in the record."""
        return f"the {self.key} of {self.person} is {self.value}."

    @property
    def question(self) -> str:
        """As it is asked for."""
        return f" what is the {self.key} of {self.person}?<ans>"


def boilerplate(family: int) -> str:
    """The text with which every record of a family begins (60 to 200 tokens)."""
    rng = random.Random(f"doc-family-{family}")
    return f"record family {family}. " + " ".join(_filler(rng) for _ in range(rng.randint(6, 20)))


class Doc:
    """The suite ``doc``; ``k`` is the number of needles a question asks for (the answer lists their values)."""

    name = "doc"

    def __init__(self, min_tokens: int = 256, max_tokens: int = 1024) -> None:
        self.min_tokens, self.max_tokens = min_tokens, max_tokens

    def problem(self, rng: random.Random, *, k: int = 1, style: str | None = None,
                split: Split | None = None) -> Problem:
        """Draw a record with a question; ``style`` ``"family:3"`` fixes the boilerplate family."""
        family = _family(style, rng)
        while True:
            problem = self._record(rng, k, family)
            if split is None or split_of(problem.canonical) == split:
                return problem

    def _record(self, rng: random.Random, k: int, family: int) -> Problem:
        length = round(self.min_tokens * (self.max_tokens / self.min_tokens) ** rng.random())
        start = boilerplate(family)
        room = length // TOKENS_PER_SENTENCE - start.count(".")
        needles = _needles(rng, max(k, 1 + max(room, 4) // 3))
        body = [n.sentence for n in needles] + [_filler(rng) for _ in range(max(room - len(needles), 0))]
        rng.shuffle(body)
        text = f"<doc>{start} {' '.join(body)}"
        asked = rng.sample(needles, k)
        question = "".join(n.question.removesuffix("<ans>") for n in asked) + "<ans>"
        meta = {"k": k, "family": family, "record": text,
                "needles": tuple((n.key, n.person, n.value) for n in needles)}
        return Problem("doc", text + question, " ".join(n.value for n in asked), f"doc:{text}{question}", meta)

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demonstration:
        """The answer, then further questions on the same record (their text carries no loss)."""
        needles = [Needle(*n) for n in problem.meta["needles"]]
        segments = [Segment(f"{problem.gold}<eos>")]
        for needle in rng.choices(needles, k=min(2 * len(needles), 16)):
            segments += [Segment(needle.question, learn=False), Segment(f"{needle.value}<eos>")]
        return Demonstration(problem.prompt, tuple(segments))

    def oracle(self, problem: Problem) -> DocOracle:
        """The judge of this problem."""
        return DocOracle(problem)

    def verify(self, problem: Problem, text: str) -> bool:
        """Are the values asked for given, in order, and nothing else?"""
        return self.oracle(problem).final(text)


def _family(style: str | None, rng: random.Random) -> int:
    if style is None:
        return rng.randrange(NUM_FAMILIES)
    name, _, number = style.partition(":")
    if name != "family" or not number.isdigit() or int(number) >= NUM_FAMILIES:
        raise ValueError(f"doc: unknown style {style!r}; choose 'family:0'..'family:{NUM_FAMILIES - 1}', or None")
    return int(number)


def _needles(rng: random.Random, count: int) -> list[Needle]:
    seen: dict[tuple[str, str], Needle] = {}
    while len(seen) < count:
        key, person = rng.choice(KEYS), f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        seen[key, person] = Needle(key, person, str(rng.randint(100, 9999)))
    return list(seen.values())


def _filler(rng: random.Random) -> str:
    topic, relation = rng.choice(TOPICS), rng.choice(tuple(RELATIONS))
    return f"the {topic} {relation} {rng.choice(facts(topic, relation))}."


class DocOracle:
    """Compares the values listed with those of the record."""

    def __init__(self, problem: Problem) -> None:
        self.gold = problem.gold.split()

    def steps(self, text: str) -> list[bool]:
        """A label per value: is it the one asked for at this place (and all before it)?"""
        given = answer_part(text).split()
        return [given[: i + 1] == self.gold[: i + 1] for i in range(len(given))]

    def final(self, text: str) -> bool:
        """Are the values asked for given, in order, and nothing else?"""
        return answer_part(text).split() == self.gold
