"""Chat-like requests whose tone decides how long the answer is, with a heavy tail (about 3 to 400 tokens).

The answers say true things about sixteen places. What is true follows from the place's name by a fixed hash,
so the suite needs no files and a verifier can read every sentence of an answer.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from llmlab.tasks.base import Demonstration, Problem, Segment, Split, answer_part, split_of, stable_choice

TOPICS = ("river", "forest", "desert", "ocean", "mountain", "city", "garden", "market", "library", "harbor",
          "bridge", "castle", "island", "valley", "village", "museum")
RELATIONS: dict[str, tuple[str, ...]] = {
    "looks": ("red", "blue", "green", "white", "black", "yellow", "gray", "brown"),
    "is near the": TOPICS,
    "is known for": ("bread", "music", "flowers", "fish", "silk", "wine", "honey", "stone", "lamps", "boats"),
    "is often": ("warm", "cold", "windy", "quiet", "busy", "bright", "dark", "calm"),
    "is loved by": ("children", "sailors", "farmers", "painters", "students", "traders", "poets", "bakers"),
    "is best in": ("spring", "summer", "autumn", "winter", "may", "june"),
    "is home to": ("foxes", "owls", "bees", "deer", "cats", "gulls", "frogs", "horses"),
}
CONNECTORS = ("", "also ", "and ", "so ", "well ", "in fact ")
MAX_SENTENCES = 40
_SENTENCE = re.compile(
    rf"(?:{'|'.join(c for c in CONNECTORS if c)})?(it|the (?:{'|'.join(TOPICS)})) ({'|'.join(RELATIONS)}) (\w+)")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: the verb and tone set the median number of sentences (``log_length``)."""

    text: str
    topics: tuple[str, ...]
    log_length: float


@dataclass(frozen=True, slots=True)
class _Wish:
    words: str
    log_length: float


VERBS = {1: (_Wish("name one thing about the {0}", 0.0), _Wish("tell me about the {0}", 1.0),
             _Wish("describe the {0}", 1.5), _Wish("explain the {0}", 1.8)),
         2: (_Wish("compare the {0} and the {1}", 1.8), _Wish("tell me about the {0} and the {1}", 1.4))}
TONES = (_Wish("", 0.0), _Wish(" briefly", -0.8), _Wish(" please", 0.1), _Wish(" in detail", 0.7),
         _Wish(" as fully as you can", 1.2))


def facts(topic: str, relation: str) -> tuple[str, ...]:
    """The (one or two) true values of a relation of a place."""
    options = RELATIONS[relation]
    values = (stable_choice(f"{topic}/{relation}/{i}", [o for o in options if o != topic]) for i in range(2))
    return tuple(dict.fromkeys(values))


class Chat:
    """The suite ``chat``; ``k`` is the number of places that a request names (1 or 2)."""

    name = "chat"

    def problem(self, rng: random.Random, *, k: int = 1, style: str | None = None,
                split: Split | None = None) -> Problem:
        """Draw a request; ``style="word"`` asks for one word, None for anything."""
        if k not in VERBS:
            raise ValueError(f"chat: k={k} is out of range; choose 1 or 2")
        if style not in (None, "word"):
            raise ValueError(f"chat: unknown style {style!r}; choose 'word' or None")
        while True:
            request = _word_request(rng) if style else _request(rng, k)
            wish = rng.choice(("", "hello ", "hi ", "so ", "ok "))
            problem = _problem(wish + request.text, request, "word" if style else "free")
            if split is None or split_of(problem.canonical) == split:
                return problem

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demonstration:
        """A true answer whose length follows the tone, the writer's verbosity and luck."""
        topics, kind = problem.meta["topics"], problem.meta["kind"]
        if kind == "word":
            return Demonstration(problem.prompt, (Segment(f"{rng.choice(facts(topics[0], 'looks'))}<eos>"),))
        spread = rng.gauss(0.0, 0.4) + rng.gauss(0.0, 0.4)
        count = min(max(round(math.exp(problem.meta["log_length"] + spread)), 1), MAX_SENTENCES)
        return Demonstration(problem.prompt, (Segment(_answer(topics, count, rng) + "<eos>"),))

    def oracle(self, problem: Problem) -> ChatOracle:
        """The judge of this problem."""
        return ChatOracle(problem)

    def verify(self, problem: Problem, text: str) -> bool:
        """Is every sentence complete, about the places asked for, and true?"""
        return self.oracle(problem).final(text)


def _word_request(rng: random.Random) -> Request:
    topic = rng.choice(TOPICS)
    text = rng.choice(("in one word, how does the {0} look?", "what color is the {0}?", "the {0} looks?"))
    return Request(text.format(topic), (topic,), 0.0)


def _request(rng: random.Random, k: int) -> Request:
    topics = tuple(rng.sample(TOPICS, k))
    verb, tone = rng.choice(VERBS[k]), rng.choice(TONES)
    return Request(f"{verb.words.format(*topics)}{tone.words}?", topics, verb.log_length + tone.log_length)


def _problem(text: str, request: Request, kind: str) -> Problem:
    meta = {"k": len(request.topics), "kind": kind, "topics": request.topics, "log_length": request.log_length}
    return Problem("chat", f"<chat>{text}<ans>", "", f"chat:{text}", meta)


def _answer(topics: tuple[str, ...], count: int, rng: random.Random) -> str:
    sentences, last = [], ""
    for i in range(count):
        topic = rng.choice(topics)
        subject = "it" if topic == last and rng.random() < 0.7 else f"the {topic}"
        relation = rng.choice(tuple(RELATIONS))
        opener = "" if i == 0 or rng.random() < 0.4 else rng.choice(CONNECTORS)
        sentences.append(f"{opener}{subject} {relation} {rng.choice(facts(topic, relation))}.")
        last = topic
    return " ".join(sentences)


class ChatOracle:
    """Reads every sentence of an answer and looks it up."""

    def __init__(self, problem: Problem) -> None:
        self.topics: tuple[str, ...] = problem.meta["topics"]
        self.kind: str = problem.meta["kind"]

    def steps(self, text: str) -> list[bool]:
        """A label per sentence: is it complete, about a place asked for, and true?"""
        body = answer_part(text).strip()
        if self.kind == "word":
            return [body in facts(self.topics[0], "looks")]
        labels, last = [], ""
        for piece in re.findall(r"[^.]+\.?", body):
            sentence = _SENTENCE.fullmatch(piece.strip().removesuffix("."))
            last = _subject(sentence, last)
            labels.append(sentence is not None and piece.endswith(".") and last in self.topics
                          and sentence.group(3) in facts(last, sentence.group(2)))
        return labels

    def final(self, text: str) -> bool:
        """Is there at least one sentence, and is each of them right?"""
        labels = self.steps(text)
        return bool(labels) and all(labels)


def _subject(sentence: re.Match[str] | None, last: str) -> str:
    if sentence is None or sentence.group(1) == "it":
        return last
    return sentence.group(1).removeprefix("the ")
