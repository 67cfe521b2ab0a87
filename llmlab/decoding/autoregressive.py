"""Plain decoding (seam E): compute what is missing, sample one token, repeat. And the token-level stop rule."""

from __future__ import annotations

from llmlab.registry import Registry
from llmlab.seams import DecodingMethod, RequestView
from llmlab.types import Commit, FinishReason, ItemResult, Request, Span, WorkItem


class Autoregressive:
    """One token at a time."""

    name = "autoregressive"

    def work(self, request: RequestView) -> WorkItem | None:
        if request.num_new_tokens <= 0 or request.num_tokens >= request.request.max_total_tokens:
            return None
        return WorkItem(request.id, Span(request.num_computed_tokens, request.num_tokens))

    def accept(self, request: Request, result: ItemResult) -> Commit:
        return Commit(result.token_ids)


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


DECODING_METHODS: Registry[DecodingMethod] = Registry("decoding", {"autoregressive": Autoregressive})
