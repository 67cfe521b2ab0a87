"""Plain decoding (seam E): compute what is missing, sample one token, repeat. And the token-level stop rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmlab.seams import RequestView
from llmlab.types import Commit, FinishReason, ItemResult, Request, Span, WorkItem


class Autoregressive:
    """One token at a time."""

    name = "autoregressive"
    steady = True  # what it offers and accepts depends on the request's tokens alone

    def work(self, request: RequestView) -> WorkItem | None:
        if request.num_new_tokens <= 0 or request.num_tokens >= request.request.max_total_tokens:
            return None
        span = Span(request.num_computed_tokens, request.num_tokens)
        if request.request.sampling.deterministic:
            return WorkItem(request.id, span, numerics="fixed")
        return WorkItem(request.id, span)

    def accept(self, request: Request, proposed: Sequence[int], item: WorkItem, result: ItemResult) -> Commit:
        return Commit(result.token_ids)


class Stop(NamedTuple):
    """Which token ends a request, and why."""

    at: int
    reason: FinishReason


class TokenStop:
    """End on an end-of-sequence or stop token (not before `min_tokens`), or at the longest allowed length."""

    name = "token_stop"

    def check(self, request: Request, token_id: int, num_output_tokens: int) -> FinishReason | None:
        sampling = request.sampling
        if num_output_tokens >= sampling.min_tokens:
            if token_id in sampling.stop_token_ids:
                return "stop"
            if not sampling.ignore_eos and token_id in request.eos_token_ids:
                return "stop"
        if request.num_prompt_tokens + num_output_tokens >= request.max_total_tokens:
            return "length"
        return None


    def first(self, request: Request, token_ids: Sequence[int], num_output_tokens: int) -> Stop | None:
        """The first of `token_ids`, which follow on `num_output_tokens` others, for which `check` gives a reason."""
        sampling = request.sampling
        length = request.max_total_tokens - request.num_prompt_tokens - num_output_tokens - 1
        ends = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids))
        start = max(0, sampling.min_tokens - num_output_tokens - 1)
        found = [token_ids.index(end, start) for end in ends if end in token_ids[start:]]
        index = min([*found, max(0, length)])
        if index >= len(token_ids):
            return None
        return Stop(index, "stop" if index in found else "length")
