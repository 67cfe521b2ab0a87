"""Asking a draft source at the end of a step, for all requests together, and what becomes of wrong answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import numpy as np

from llmlab.decoding.draft_trees import is_chain
from llmlab.decoding.speculative import paths
from llmlab.execution.base import Row
from llmlab.seams import DraftContext, DraftSource, Proposal
from llmlab.types import MAX_NODES, ItemResult, PolicyError, WorkItem

NO_STATES: Mapping[str, Any] = MappingProxyType({})


class Drafter:
    """A guarded source. Drafts never make answers wrong, so whatever it does wrong costs its drafts and nothing else."""

    def __init__(self, source: DraftSource, vocab_size: int, acceptance: Literal["keyed", "rejection"] = "keyed") -> None:
        self._source, self._vocab_size = source, vocab_size
        self.acceptance = acceptance
        self.reads_hidden = bool(getattr(source, "reads_hidden", False))
        self._odds: dict[str, dict[tuple[int, ...], np.ndarray]] = {}  # by request and path: what its last drafts were drawn from

    def odds(self, item: WorkItem) -> list[np.ndarray | None]:
        """Of each draft of an item what it was drawn from, given those before it; None: it was chosen."""
        known = self._odds.get(item.request, {})
        return [known.get(path) for path in paths(item.drafts, item.parents)]

    def forget(self, request: str) -> None:
        self._odds.pop(request, None)

    def extend(self, rows: Sequence[Row], results: Sequence[ItemResult], known: Callable[[Row, ItemResult], Sequence[int]],
               hidden: Mapping[str, Any] = NO_STATES) -> tuple[ItemResult, ...]:  # fmt: skip
        """The results, with drafts for the rows that want some. `known`: the tokens of a row's request by now; `hidden`:
        the states that the newest tokens were drawn from, by request."""
        if not any([row.item.propose for row in rows]):  # noqa: C419  a list is faster here
            return tuple(results)
        contexts = {row.request.id: _context(row, result, known(row, result), hidden.get(row.request.id))
                    for row, result in zip(rows, results, strict=True) if result.error is None}  # fmt: skip
        asked = list(contexts.values())
        try:
            proposals = self._source.propose(asked)
            if len(proposals) != len(asked):
                raise PolicyError("propose", len(proposals), f"must be one proposal for each of {len(asked)} requests")
        except Exception as error:  # a source of one's own may raise anything: the step goes on
            return tuple(_failed(result, contexts, f"{type(error).__name__}: {error}") for result in results)
        answers = dict(zip(contexts, proposals))
        return tuple(self._with_drafts(r, contexts[r.request].k, answers[r.request]) if r.request in answers else r
                     for r in results)  # fmt: skip

    def _with_drafts(self, result: ItemResult, k: int, proposal: Proposal) -> ItemResult:
        self.forget(result.request)
        try:
            checked = checked_proposal(proposal, k, self._vocab_size)
        except PolicyError as error:
            return msgspec.structs.replace(result, draft_error=str(error))
        if not checked.token_ids:
            return result
        if checked.odds:
            places = paths(checked.token_ids, checked.parents)
            self._odds[result.request] = {path: q for path, q in zip(places, checked.odds) if q is not None}
        return msgspec.structs.replace(result, drafts=checked.token_ids, parents=checked.parents)


def _context(row: Row, result: ItemResult, known: Sequence[int], hidden: Any) -> DraftContext:
    last = result.token_ids[-1] if result.token_ids else -1
    over = last in row.request.sampling.stop_token_ids or (
        last in row.request.eos_token_ids and not row.request.sampling.ignore_eos
    )
    return DraftContext(row.request, known, row.block_ids, 0 if over else row.item.propose, hidden)


def _failed(result: ItemResult, contexts: Mapping[str, DraftContext], error: str) -> ItemResult:
    wanted = result.request in contexts and contexts[result.request].k > 0
    return msgspec.structs.replace(result, draft_error=error[:500]) if wanted else result


def checked_proposal(proposal: Proposal, k: int, vocab_size: int) -> Proposal:
    """The proposal as plain integers. Raises PolicyError."""
    if not isinstance(proposal, Proposal):
        raise PolicyError("propose", proposal, "is not a Proposal", "Return Proposal(token_ids).")
    try:
        tokens, parents = tuple(int(t) for t in proposal.token_ids), tuple(int(p) for p in proposal.parents)
    except (TypeError, ValueError):
        raise PolicyError("propose", proposal, "must hold integers: token ids, and the index of each draft's parent") from None
    if len(tokens) > k:
        raise PolicyError("propose", len(tokens), f"drafts are more than the {k} that were asked for")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise PolicyError("propose", token, f"is outside the vocabulary of {vocab_size} tokens")
    if parents and (len(parents) != len(tokens) or any(not -1 <= p < i for i, p in enumerate(parents))):
        raise PolicyError("propose", parents, "must name one earlier draft, or -1, for each draft")
    parents = () if is_chain(parents) else parents
    if parents and len(tokens) > MAX_NODES:
        raise PolicyError("propose", len(tokens), f"drafts are more than the {MAX_NODES} nodes that a tree may have")
    return Proposal(tokens, parents, _checked_odds(proposal.odds, tokens, parents, vocab_size))


def _checked_odds(odds: Sequence[Any], tokens: tuple[int, ...], parents: tuple[int, ...], vocab_size: int) -> tuple[Any, ...]:
    """The odds, if they can be what the drafts were drawn from. Raises PolicyError: wrong ones would bend the answers."""
    if not any(q is not None for q in odds):
        return ()
    if len(odds) != len(tokens) or len(set(paths(tokens, parents))) < len(tokens):
        raise PolicyError("odds", len(odds), f"must be one entry for each of {len(tokens)} drafts, and siblings must differ")
    for token, q in zip(tokens, odds):
        if q is not None and not (np.shape(q) == (vocab_size,) and np.min(q) >= 0 and abs(np.sum(q) - 1) < 1e-6 and q[token] > 0):
            raise PolicyError("odds", token, f"was not drawn from probabilities of {vocab_size} tokens that sum to 1")
    return tuple([q if q is None else np.asarray(q, np.float64) for q in odds])
