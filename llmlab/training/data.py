"""Training batches, made on the fly: batch ``n`` is a pure function of the seed, so a run resumes exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llmlab.tasks import Demonstration, Problem, Suite, suite
from llmlab.tasks.doc import Doc
from llmlab.training.lab_tokenizer import CONTROL

LENGTHS = (32, 64, 96, 112, 128, 144, 160, 192, 256, 320, 384, 512, 768, 1024, 1280)
"""Rows are padded to the next of these, so that few shapes exist and little is wasted."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One kind of document and its share of the documents."""

    suite: str
    k: int
    style: str | None
    share: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: the mixture, and the tokens (padding included) of one batch."""

    mixture: tuple[Recipe, ...]
    batch_tokens: int


BROAD = Phase((
    Recipe("arith", 1, "fast", 0.10), Recipe("arith", 2, "fast", 0.05),
    Recipe("arith", 1, "slow", 0.20), Recipe("arith", 2, "slow", 0.20), Recipe("arith", 3, "slow", 0.08),
    Recipe("arith", 1, "think", 0.05), Recipe("arith", 2, "think", 0.08), Recipe("arith", 3, "think", 0.03),
    Recipe("chat", 1, None, 0.10), Recipe("chat", 1, "word", 0.03), Recipe("chat", 2, None, 0.04),
    Recipe("doc", 1, None, 0.035), Recipe("doc", 2, None, 0.005)), batch_tokens=4096)
"""Everything: until chat and records are learned, which takes few tokens."""

FOCUS = Phase((
    Recipe("arith", 1, "fast", 0.06), Recipe("arith", 2, "fast", 0.03),
    Recipe("arith", 1, "slow", 0.27), Recipe("arith", 2, "slow", 0.31), Recipe("arith", 3, "slow", 0.08),
    Recipe("arith", 1, "think", 0.04), Recipe("arith", 2, "think", 0.10), Recipe("arith", 3, "think", 0.02),
    Recipe("chat", 1, None, 0.04), Recipe("chat", 1, "word", 0.02), Recipe("chat", 2, None, 0.015),
    Recipe("doc", 1, None, 0.012), Recipe("doc", 2, None, 0.003)), batch_tokens=2048)
"""Mostly arithmetic, which takes many tokens, in smaller steps; enough of the rest to keep it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One document: token ids, and which of them carry loss."""

    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """``ids`` and ``learn`` are [rows, time] (int64, bool)."""

    ids: Tensor
    learn: Tensor

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int((self.ids != 0).sum())


class Source:
    """Documents drawn from a mixture, in pools; a pool is sorted by length and cut into batches.

    Pools before number ``focus_from`` are of the broad phase, the others of the focus phase.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, focus_from: int = 0, pool_rows: int = 4096) -> None:
        self.tokenizer, self.seed, self.focus_from, self.pool_rows = tokenizer, seed, focus_from, pool_rows

    def phase(self, index: int) -> Phase:
        """The phase to which pool ``index`` belongs."""
        return FOCUS if index >= self.focus_from else BROAD

    def pool(self, index: int) -> list[Batch]:
        """The batches of pool ``index``, in random order. Rows that fill no batch are left out."""
        rng, phase = random.Random(f"{self.seed}/{index}"), self.phase(index)
        recipes = rng.choices(phase.mixture, [r.share for r in phase.mixture], k=self.pool_rows)
        rows = encode(self.tokenizer, [demonstrate(r, rng) for r in recipes])
        groups = _by_length(rows).items()
        batches = [b for length, members in groups for b in _cut(members, length, phase.batch_tokens)]
        rng.shuffle(batches)
        return batches


def _cut(rows: list[Row], length: int, batch_tokens: int) -> Iterator[Batch]:
    height = max(batch_tokens // length, 1)
    for start in range(0, len(rows) - height + 1, height):
        yield _stack(rows[start:start + height], length)


def demonstrate(recipe: Recipe, rng: random.Random) -> Demonstration:
    """A training document of this kind; never a held-out problem."""
    made = _suite_for_training(recipe, rng)
    problem = made.problem(rng, k=recipe.k, style=recipe.style, split="train")
    return made.demonstrate(dress(problem, rng), rng)


def _suite_for_training(recipe: Recipe, rng: random.Random) -> Suite:
    if recipe.suite == "doc":
        return Doc(min_tokens=96, max_tokens=1024 if rng.random() < 0.1 else 448)
    return suite(recipe.suite)


def dress(problem: Problem, rng: random.Random) -> Problem:
    """Slow arithmetic is asked in three ways: with the style token, bare, and as a chat message."""
    if problem.suite != "arith" or problem.meta["style"] != "slow":
        return problem
    bare = problem.prompt.removeprefix("<slow>")
    dress = rng.choices((problem.prompt, bare, f"<chat>{bare}<ans>"), (0.6, 0.3, 0.1))[0]
    return replace(problem, prompt=dress)


def encode(tokenizer: Tokenizer, demos: Sequence[Demonstration]) -> list[Row]:
    """Token ids and loss marks; every document begins with ``<bos>``."""
    texts = [text for d in demos for text in (d.prompt, *(s.text for s in d.segments))]
    pieces = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    bos = CONTROL.index("<bos>")
    rows = []
    for demo in demos:
        prompt = next(pieces).ids
        row = Row([bos, *prompt], [False] * (1 + len(prompt)))
        for segment in demo.segments:
            ids = next(pieces).ids
            row.ids.extend(ids)
            row.learn.extend([segment.learn] * len(ids))
        rows.append(row)
    return rows


def _by_length(rows: Sequence[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {length: [] for length in LENGTHS}
    for row in sorted(rows, key=lambda r: len(r.ids)):
        fitting = next((length for length in LENGTHS if len(row.ids) <= length), None)
        if fitting is not None:
            groups[fitting].append(row)
    return groups


def _stack(rows: Sequence[Row], length: int) -> Batch:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    learn = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, :len(row.ids)] = torch.tensor(row.ids)
        learn[i, :len(row.ids)] = torch.tensor(row.learn)
    return Batch(ids, learn)
