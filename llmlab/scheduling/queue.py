"""The waiting queue: sorted once, so that 10,000 waiting requests cost a step no more than 100."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import islice
from typing import Any

from llmlab.types import Sequence

Entry = tuple[tuple[Any, ...], float, int, Sequence]


class WaitingQueue:
    """Queued sequences by (policy key, arrival, number). The number is unique, so entries never tie."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sequence]:
        return (entry[3] for entry in self._entries)

    def head(self, count: int) -> list[Sequence]:
        return [entry[3] for entry in islice(self._entries, count)]

    def before(self, first: Sequence, second: Sequence) -> bool:
        """Whether `first` stands before `second`; both are queued."""
        return self._entry(first) < self._entry(second)

    def add(self, seq: Sequence, key: tuple[Any, ...]) -> None:
        seq.key = key
        insort(self._entries, self._entry(seq))

    def remove(self, seq: Sequence) -> None:
        index = bisect_left(self._entries, self._entry(seq)[:3], key=lambda entry: entry[:3])
        if index == len(self._entries) or self._entries[index][3] is not seq:
            raise KeyError(seq.id)
        del self._entries[index]

    def resort(self, keys: dict[str, tuple[Any, ...]]) -> None:
        """Give every entry a new key and sort again."""
        for entry in self._entries:
            entry[3].key = keys[entry[3].id]
        self._entries = sorted(self._entry(entry[3]) for entry in self._entries)

    @staticmethod
    def _entry(seq: Sequence) -> Entry:
        return seq.key, seq.request.arrival, seq.request.number, seq
