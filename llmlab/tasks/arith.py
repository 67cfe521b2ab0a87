"""Sums of products of two-digit numbers, with several solution routes.

A prompt is ``<slow>37*46-23*58?``. Every line of a solution begins with a tag that names its term (``a``,
``b``, ... and ``z`` for sums), so that where a number came from can be checked line by line:

- ``fast``: ``a37*46=1702;b23*58=1334;z1702-1334=368#368``: one route, products recalled as facts;
- ``slow``: ``a46=40+6;a37*40=1480;a37*6=222;a1480+222=1702;...#368``: either factor is split, down or up,
  and the terms come in any order, so that samples differ by route and their agreement is evidence;
- ``think``: slow, with products derived again by another route (`` check``, then `` ok`` or `` wait``).

Without a style token the teacher answers in the slow style.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from llmlab.tasks.base import Demonstration, Problem, Segment, Split, answer_part, split_of

STYLES = ("fast", "slow", "think")
TAGS = "abcdefgh"
_PROMPT = re.compile(r"(?:<chat>)?(?:<(fast|slow|think)>)?(\d+\*\d+(?:[+-]\d+\*\d+)*)\?(?:<ans>)?")
_SLIP_RATE = 0.25


@dataclass(frozen=True, slots=True)
class Term:
    """One signed product."""

    sign: int
    x: int
    y: int

    @property
    def value(self) -> int:
        """The product without its sign."""
        return self.x * self.y


@dataclass(frozen=True, slots=True)
class Route:
    """One way to a product: its lines, without the tag."""

    lines: tuple[str, ...]


def routes(x: int, y: int) -> tuple[Route, ...]:
    """All teacher routes to ``x*y``: which factor is split, and to the ten below or above."""
    if x % 10 == 0 or y % 10 == 0:
        return (Route((f"{x}*{y}={x * y}",)),)
    ways = [_split_route(whole, part, up) for whole, part in ((x, y), (y, x)) for up in (False, True)]
    return tuple(dict.fromkeys(ways))


def _split_route(whole: int, part: int, up: bool, slip: int = 0) -> Route:
    tens = part - part % 10 + (10 if up else 0)
    unit, sign = (tens - part, "-") if up else (part - tens, "+")
    first, second = whole * tens, whole * unit + slip
    total = first - second if up else first + second
    return Route((f"{part}={tens}{sign}{unit}", f"{whole}*{tens}={first}",
                  f"{whole}*{unit}={second}", f"{first}{sign}{second}={total}"))


def sum_lines(terms: tuple[Term, ...]) -> tuple[str, ...]:
    """The lines that add the products from left to right (none for a single product)."""
    lines, total = [], terms[0].value
    for term in terms[1:]:
        after = total + term.sign * term.value
        lines.append(f"z{total}{'+' if term.sign > 0 else '-'}{term.value}={after}")
        total = after
    return tuple(lines)


def parse(prompt: str) -> Problem:
    """The problem that a typed prompt asks, e.g. ``"37*46-23*58?"``.

    Raises:
        ValueError: if the prompt is not a sum of products that ends with a question mark.
    """
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"prompt {prompt!r} is not a sum of products such as '37*46-23*58?'")
    body = match.group(2)
    parts = re.findall(r"([+-]?)(\d+)\*(\d+)", body)
    terms = tuple(Term(-1 if sign == "-" else 1, int(x), int(y)) for sign, x, y in parts)
    if len(terms) > len(TAGS):
        raise ValueError(f"prompt {prompt!r} has {len(terms)} products; at most {len(TAGS)} have a line tag")
    return _problem(prompt.strip(), terms, match.group(1) or "slow")


def _problem(prompt: str, terms: tuple[Term, ...], style: str) -> Problem:
    gold = sum(t.sign * t.value for t in terms)
    meta = {"k": len(terms), "style": style, "terms": tuple((t.sign, t.x, t.y) for t in terms)}
    return Problem("arith", prompt, str(gold), _canonical(terms), meta)


def _canonical(terms: tuple[Term, ...]) -> str:
    return "arith:" + "".join(f"{'+' if t.sign > 0 else '-'}{min(t.x, t.y)}*{max(t.x, t.y)}" for t in terms)


def _terms(problem: Problem) -> tuple[Term, ...]:
    return tuple(Term(*t) for t in problem.meta["terms"])


class Arith:
    """The suite ``arith``; ``k`` is the number of products."""

    name = "arith"

    def __init__(self, low: int = 11, high: int = 99) -> None:
        self.low, self.high = low, high

    def problem(self, rng: random.Random, *, k: int = 1, style: str | None = None,
                split: Split | None = None) -> Problem:
        """Draw a problem of ``k`` products; ``style`` None leaves the style token out (answered slowly)."""
        if not 1 <= k <= len(TAGS):
            raise ValueError(f"arith: k={k} is out of range; choose 1..{len(TAGS)}")
        if style is not None and style not in STYLES:
            raise ValueError(f"arith: unknown style {style!r}; choose one of {', '.join(STYLES)}, or None")
        while True:
            terms = tuple(self._term(rng, first=i == 0) for i in range(k))
            if split is None or split_of(_canonical(terms)) == split:
                return _problem(_prompt(terms, style), terms, style or "slow")

    def _term(self, rng: random.Random, first: bool) -> Term:
        sign = 1 if first or rng.random() < 0.5 else -1
        return Term(sign, rng.randint(self.low, self.high), rng.randint(self.low, self.high))

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demonstration:
        """A teacher's solution in the problem's style, by a random route."""
        style = problem.meta["style"]
        teach = {"fast": _teach_fast, "slow": _teach_slow, "think": _teach_think}[style]
        segments = teach(_terms(problem), rng)
        return Demonstration(problem.prompt, (*segments, Segment(f"#{problem.gold}<eos>")))

    def oracle(self, problem: Problem) -> ArithOracle:
        """The judge of this problem."""
        return ArithOracle(problem)

    def verify(self, problem: Problem, text: str) -> bool:
        """Is the number after the last ``#`` the right one?"""
        return self.oracle(problem).final(text)


def _prompt(terms: tuple[Term, ...], style: str | None) -> str:
    body = "".join(f"{'' if i == 0 else '+' if t.sign > 0 else '-'}{t.x}*{t.y}" for i, t in enumerate(terms))
    return (f"<{style}>" if style else "") + body + "?"


def _teach_fast(terms: tuple[Term, ...], rng: random.Random) -> list[Segment]:
    del rng
    lines = [f"{tag}{t.x}*{t.y}={t.value}" for tag, t in zip(TAGS, terms, strict=False)]
    return [Segment(";".join([*lines, *sum_lines(terms)]))]


def _teach_slow(terms: tuple[Term, ...], rng: random.Random) -> list[Segment]:
    lines: list[str] = []
    for tag, term in _shuffled(terms, rng):
        lines += [tag + line for line in rng.choice(routes(term.x, term.y)).lines]
    return [Segment(";".join([*lines, *sum_lines(terms)]))]


def _shuffled(terms: tuple[Term, ...], rng: random.Random) -> list[tuple[str, Term]]:
    tagged = list(zip(TAGS, terms, strict=False))
    rng.shuffle(tagged)
    return tagged


def _teach_think(terms: tuple[Term, ...], rng: random.Random) -> list[Segment]:
    care = rng.betavariate(0.6, 0.6)
    out: list[Segment] = []
    for tag, term in _shuffled(terms, rng):
        out += _derive_with_care(tag, term, care, rng)
    sums = "".join(f"{line};" for line in sum_lines(terms))
    again = "".join(f" hmm;{sums} ok;" for _ in range(rng.randint(1, 2)) if sums and rng.random() < 0.5 * care)
    out.append(Segment(sums + again))
    return out


def _derive_with_care(tag: str, term: Term, care: float, rng: random.Random) -> list[Segment]:
    ways = list(routes(term.x, term.y))
    rng.shuffle(ways)
    if len(ways) == 1 or rng.random() >= care:
        return [Segment(_block(tag, ways[0]))]
    if rng.random() < _SLIP_RATE:
        return [*_slipped(tag, term, rng), Segment(f" check;{_block(tag, ways[0])} wait;{_block(tag, ways[1])} ok;")]
    return [Segment(f"{_block(tag, ways[0])} check;{_block(tag, ways[1])} ok;")]


def _block(tag: str, route: Route) -> str:
    return "".join(f"{tag}{line};" for line in route.lines)


def _slipped(tag: str, term: Term, rng: random.Random) -> list[Segment]:
    """A derivation with one wrong partial product. The wrong number carries no loss: the model learns to
    find and mend a slip, not to make one."""
    whole, part = (term.x, term.y) if rng.random() < 0.5 else (term.y, term.x)
    slip = rng.choice((-20, -10, -2, -1, 1, 2, 10, 20))
    route = _split_route(whole, part, rng.random() < 0.5, slip if whole > 20 else abs(slip))
    head, wrong = route.lines[2].split("=")
    return [Segment(_block(tag, Route(route.lines[:2])) + f"{tag}{head}="), Segment(wrong, learn=False),
            Segment(f";{tag}{route.lines[3]};")]


class ArithOracle:
    """Follows a solution line by line: numbers, where they came from, and progress are all checked."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.terms = _terms(problem)
        self.style: str = problem.meta["style"]

    def steps(self, text: str) -> list[bool]:
        """A label per line (``;`` ends a line, ``#`` begins the last): is this prefix a prefix of a teacher's
        solution? Once False it stays False, but for the think style, where `` wait`` begins a fresh route."""
        body, mark, answer = answer_part(text).partition("#")
        tracker = _Tracker(self.terms, self.style)
        labels = [tracker.feed(line) for line in body.split(";") if line]
        if mark:
            labels.append(tracker.finished and answer == self.problem.gold)
        return labels

    def final(self, text: str) -> bool:
        """Is the number after the last ``#`` the right one?"""
        _, mark, answer = answer_part(text).rpartition("#")
        return bool(mark) and answer.strip() == self.problem.gold


class _Tracker:
    """The state of a solution: which routes of the open term (``tag``) are still possible, and what is done."""

    def __init__(self, terms: tuple[Term, ...], style: str) -> None:
        self.think = style == "think"
        pairs = zip(TAGS, terms, strict=False)
        self.routes = {tag: _lines_of(term, style) for tag, term in pairs}
        self.open: list[tuple[str, ...]] = []
        self.tag, self.depth, self.valid = "", 0, True
        self.done: list[str] = []
        self.sums, self.num_sums = sum_lines(terms), 0

    @property
    def finished(self) -> bool:
        """All products and sums are derived and nothing is wrong."""
        return self.valid and not self.tag and len(self.done) == len(self.routes) \
            and self.num_sums == len(self.sums)

    def feed(self, line: str) -> bool:
        """Take one line; is the solution still valid?"""
        if line.startswith(" "):
            self._marker(line.strip())
        elif self.valid and line[0] == "z":
            self.valid = self._sum(line)
        elif self.valid:
            self.valid = self._product(line[0], line[1:])
        return self.valid

    def _marker(self, word: str) -> None:
        if not self.think or word not in ("check", "wait", "ok", "hmm"):
            self.valid = False
        elif word in ("check", "wait") and (self.tag or self.done):
            if not self.tag:
                self.done.pop()
            self.valid, self.tag, self.open, self.depth = True, "", [], 0
        elif word == "hmm":
            self.num_sums = 0

    def _product(self, tag: str, line: str) -> bool:
        if tag != self.tag:
            if self.tag or tag in self.done or tag not in self.routes:
                return False
            self.tag, self.open, self.depth = tag, list(self.routes[tag]), 0
        self.open = [r for r in self.open if len(r) > self.depth and r[self.depth] == line]
        self.depth += 1
        if any(len(r) == self.depth for r in self.open):
            self.done.append(tag)
            self.tag = ""
        return bool(self.open)

    def _sum(self, line: str) -> bool:
        ready = not self.tag and len(self.done) == len(self.routes) and self.num_sums < len(self.sums)
        right = ready and self.sums[self.num_sums] == line
        self.num_sums += 1
        return right


def _lines_of(term: Term, style: str) -> list[tuple[str, ...]]:
    if style == "fast":
        return [(f"{term.x}*{term.y}={term.value}",)]
    return [r.lines for r in routes(term.x, term.y)]
