"""Which drafts hold, once the target has spoken: two rules, both lossless (seam E)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from llmlab import rng
from llmlab.decoding.rejection import accept_tree
from llmlab.decoding.sampler import Sampled, SampleRow, probabilities, scored
from llmlab.decoding.speculative import parents_of
from llmlab.types import WorkItem


def by_key(item: WorkItem, sampled: Sequence[Sampled]) -> list[Sampled]:
    """Of what was sampled behind the last committed token and behind each draft, that which holds: at least one token."""
    found, at, parents = [sampled[0]], -1, parents_of(item)
    while True:
        at = next((i for i, p in enumerate(parents) if p == at and item.drafts[i] == found[-1].token_id), -1)
        if at < 0 or sampled[at + 1].error is not None:
            return found
        found.append(sampled[at + 1])


def by_rejection(item: WorkItem, sampled: Sequence[Sampled], logits: Tensor, rows: Sequence[SampleRow],
                 odds: Sequence[np.ndarray | None]) -> list[Sampled]:  # fmt: skip
    """The drafts that hold and one token more, by `decoding.rejection`. `logits [m + 1, vocab]` and `rows`: behind the last
    committed token and behind each of m drafts; `odds`: what each draft was drawn from. `sampled` says which rows are broken."""
    if sampled[0].error is not None:
        return [sampled[0]]
    parents, row = parents_of(item), rows[0]
    walk = accept_tree(
        lambda node: probabilities(logits[node + 1 : node + 2], [rows[node + 1]]),
        lambda node: None if (q := odds[node]) is None else q[None],
        np.array([item.drafts]), parents,
        lambda depth, draw: np.array([rng.uniform(row.seed, row.request, row.position + depth, draw)]),
    )  # fmt: skip
    path = [int(walk.nodes[0])]
    while path[-1] >= 0:
        path.append(parents[path[-1]])
    path.reverse()  # the root, then the nodes that hold
    tokens = [*(item.drafts[node] for node in path[1:]), int(walk.tokens[0])]
    if sampled[path[-1] + 1].error is not None:  # nothing can be said of what follows the last of them
        path, tokens = path[:-1], tokens[:-1]
    return [scored(logits[node + 1 : node + 2], token, rows[node + 1]) for node, token in zip(path, tokens, strict=True)]
