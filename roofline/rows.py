"""The ground-floor noun: a ragged batch, described by how many tokens each row computes and sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import le, mul

from roofline.errors import RooflineError


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of rows, each a span of new tokens of one sequence.

    ``query[i]``: new tokens of row i (at least 1). ``kv[i]``: tokens its last query sees, its own ``query[i]``
    included, so a whole prompt of n tokens is (n, n), a decode step at context n is (1, n) and the chunk of
    tokens 512..1023 is (512, 1024).

    Optional, per row: ``layers`` (half-open layer spans; None = all layers), ``pairs`` (query-key pairs that the
    mask keeps, for block, tree or sparse masks; None = causal: q * kv - q * (q - 1) / 2), ``devices`` (labels that
    :meth:`split` sorts by). Optional, for the batch: ``logits`` (tokens whose vocabulary scores are computed; None
    = one per row that reaches the last layer) and ``experts`` (distinct experts touched in each expert layer; None
    = the expectation under uniform routing).
    """

    query: Sequence[int]
    kv: Sequence[int]
    layers: Sequence[tuple[int, int]] | None = None
    logits: int | None = None
    pairs: Sequence[float] | None = None
    experts: float | None = None
    devices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        # The common case passes with three C-level scans; the slow path below only words the complaint.
        query, kv = self.query, self.kv
        plain = self.pairs is None and self.layers is None and self.devices is None
        if not (plain and len(query) == len(kv) and (not query or (min(query) >= 1 and all(map(le, query, kv))))):
            self._complain()
        if self.logits is not None and not 0 <= self.logits <= sum(query):
            raise RooflineError(f"logits must lie in 0..{sum(query)} (the tokens of the batch), got {self.logits}")
        if self.experts is not None and not 0 <= self.experts < float("inf"):
            raise RooflineError(f"experts must be at least 0, got {self.experts!r}")

    def _complain(self) -> None:
        for name in ("kv", "layers", "pairs", "devices"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.query):
                raise RooflineError(f"{name} has {len(column)} entries for {len(self.query)} rows")
        for i, (q, kv) in enumerate(zip(self.query, self.kv, strict=True)):
            if q < 1:
                raise RooflineError(f"query[{i}] must be at least 1, got {q}")
            if kv < (q if self.pairs is None else 1):
                raise RooflineError(f"kv[{i}] = {kv} must be at least query[{i}] = {q}: kv counts the new tokens too")
            if self.pairs is not None and not 0 <= self.pairs[i] <= q * kv:
                raise RooflineError(f"pairs[{i}] must lie in 0..{q * kv} (query x kv), got {self.pairs[i]}")
            if self.layers is not None and not 0 <= self.layers[i][0] < self.layers[i][1]:
                raise RooflineError(f"layers[{i}] must be a half-open span (start < stop), got {self.layers[i]}")

    def __len__(self) -> int:
        return len(self.query)

    @classmethod
    def decode(cls, batch: int, context: int) -> Rows:
        """Return ``batch`` rows of one new token each, which see ``context`` tokens."""
        return cls([1] * batch, [context] * batch)

    @classmethod
    def prefill(cls, *prompts: int) -> Rows:
        """Return one whole prompt per given length."""
        return cls(list(prompts), list(prompts))

    @property
    def tokens(self) -> int:
        """New tokens of the batch."""
        return sum(self.query)

    def total_pairs(self) -> float:
        """Return the query-key pairs of one layer over all rows."""
        if self.pairs is not None:
            return float(sum(self.pairs))
        query = self.query
        return float(sum(map(mul, query, self.kv)) - (sum(map(mul, query, query)) - sum(query)) / 2)

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at ``indices``; ``logits`` falls back to one per row."""

        def pick(column: Sequence | None) -> list | None:  # type: ignore[type-arg]
            return None if column is None else [column[i] for i in indices]

        query, kv = [self.query[i] for i in indices], [self.kv[i] for i in indices]
        return Rows(query, kv, pick(self.layers), None, pick(self.pairs), self.experts, pick(self.devices))

    def split(self) -> dict[str, Rows]:
        """Return the rows of each device, in order of first appearance; without ``devices`` all lie on ``""``."""
        labels = self.devices if self.devices is not None else [""] * len(self)
        groups: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            groups.setdefault(label, []).append(i)
        return {label: self.take(indices) for label, indices in groups.items()}


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers ``start..stop`` and the rows that pass through all of them."""

    start: int
    stop: int
    rows: Rows


def segments(rows: Rows, num_layers: int) -> list[Segment]:
    """Cut the model at every layer where the set of active rows changes; empty stretches are left out."""
    if rows.layers is None:
        return [Segment(0, num_layers, rows)] if len(rows) else []
    late = [span for span in rows.layers if span[1] > num_layers]
    if late:
        raise RooflineError(f"layers: the span {late[0]} ends beyond the model's {num_layers} layers")
    cuts = sorted({edge for span in rows.layers for edge in span})
    found = []
    for start, stop in pairwise(cuts):
        active = [i for i, (lo, hi) in enumerate(rows.layers) if lo <= start and stop <= hi]
        if active:
            found.append(Segment(start, stop, rows.take(active)))
    return found


def entering(rows: Rows) -> int:
    """Return how many tokens start at layer 0, so pass the embedding."""
    if rows.layers is None:
        return sum(rows.query)
    return sum(q for q, span in zip(rows.query, rows.layers, strict=True) if span[0] == 0)


def leaving(rows: Rows, num_layers: int) -> int:
    """Return for how many tokens vocabulary scores are computed."""
    if rows.logits is not None:
        return rows.logits
    if rows.layers is None:
        return len(rows.query)
    return sum(1 for span in rows.layers if span[1] == num_layers)
