"""The tokens of a workload's prompts, drawn when a request arrives.

Every draw is keyed by (seed, what it is, its number), so a request's tokens depend neither on the requests before it
nor on the order in which they are asked for.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llmlab.workloads.lengths import zipf_ranks

OWN, PREFIX, FAMILY, BLOCK = 1, 2, 3, 4  # what a key stands for


class PromptTokens(Protocol):
    """Which tokens the prompt of request `index` has; `length` of them, each in [0, vocab_size)."""

    def prompt(self, index: int, length: int) -> tuple[int, ...]: ...


class RandomTokens:
    """Random prompts. The first `shared` tokens are those of the request's family, at most all but one of the prompt.

    With `skew` 0 the families take turns; else family k has a share proportional to (k + 1) ** -skew.
    """

    def __init__(self, vocab_size: int, seed: int, num_requests: int, shared: int, families: int, skew: float) -> None:
        self._vocab_size, self._seed, self._shared = vocab_size, seed, shared
        if not shared:
            self._family = np.zeros(0, np.int64)
        elif skew:
            self._family = zipf_ranks(families, skew, np.random.default_rng((seed, FAMILY)), num_requests)
        else:
            self._family = np.arange(num_requests) % families

    def prompt(self, index: int, length: int) -> tuple[int, ...]:
        if not self._shared:
            return self.own(index, length)
        shared = min(self._shared, length - 1)
        prefix = drawn_tokens(self._vocab_size, (self._seed, PREFIX, int(self._family[index])), self._shared)
        return (*prefix[:shared], *self.own(index, length - shared))

    def own(self, index: int, length: int) -> tuple[int, ...]:
        """Tokens that request `index` shares with nobody."""
        return tuple(drawn_tokens(self._vocab_size, (self._seed, OWN, index), length))


class BlockTokens:
    """Prompts made of named blocks of `block_tokens` tokens: equal names give equal tokens, the last block is cut."""

    def __init__(self, vocab_size: int, seed: int, names: tuple[tuple[int, ...], ...], block_tokens: int) -> None:
        self._vocab_size, self._seed, self._names, self._block_tokens = vocab_size, seed, names, block_tokens

    def prompt(self, index: int, length: int) -> tuple[int, ...]:
        tokens: list[int] = []
        for name in self._names[index]:
            tokens += drawn_tokens(self._vocab_size, (self._seed, BLOCK, name), self._block_tokens)
        return tuple(tokens[:length])


def drawn_tokens(vocab_size: int, key: tuple[int, ...], count: int) -> list[int]:
    """`count` token ids, the same for the same key."""
    return np.random.default_rng(key).integers(0, vocab_size, count).tolist()  # type: ignore[no-any-return]
