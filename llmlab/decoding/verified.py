"""Verified determinism (seam E): decode with whatever shapes come, then verify in windows of one fixed shape.

A request that asks for it (`SamplingParams.deterministic`) gets the same tokens whatever runs beside it. Its tokens from
the fast path are only candidates; once a window of them is full, or the answer seems to end, a pass with fixed numerics
computes the same positions again, overwrites their KV and says which candidates hold. From the first that does not, all are
dropped, and the pass's own token is the next one. Nobody sees a candidate: neither the client nor the prefix cache.

    v .. u      candidates, KV of the fast path            fast steps, batched with everybody
    [last verified, c0 .. cW-2] -> p0 .. pW-1              one window; ci holds while ci = pi
    c0 c1 c2 | c3 != p3                                    released: c0 c1 c2 p3; rolled back: c3 and all behind it

Source: verified speculation (arXiv 2601.17768, section 4). Here fixed shapes are the executor's business
(`execution.fixed`), which fills windows of several requests, and prompts, into passes of the same number of rows; so a
prompt need not be computed alone, and windows may begin anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.decoding.autoregressive import Autoregressive, TokenStop
from llmlab.decoding.speculative import Speculative
from llmlab.seams import DecodingMethod, EngineView, RequestView
from llmlab.types import Commit, ConfigError, ItemResult, Request, Span, WorkItem


class Verified:
    """`inner` for requests that do not ask for determinism; candidates and windows of `window` tokens for those that do.
    When one request is due, others that have candidates are verified with it, up to `rows` requests."""

    name = "verified"

    def __init__(self, window: int = 16, rows: int = 4, inner: DecodingMethod | None = None) -> None:
        if window < 1 or rows < 1:
            raise ConfigError("window", (window, rows), "tokens and requests of a window must be at least 1")
        self.window, self.rows = window, rows
        self._drafting, self._plain, self._stop = Speculative(), inner or Autoregressive(), TokenStop()

    def work(self, request: RequestView) -> WorkItem | None:
        if not request.request.sampling.deterministic:
            return self._inner(request).work(request)
        if request.num_pending or request.num_tokens >= request.request.max_total_tokens:
            return None
        if request.num_computed_tokens < request.num_tokens - 1 or not request.num_output_tokens:
            return WorkItem(request.id, Span(request.num_computed_tokens, request.num_tokens), numerics="fixed")
        if len(request.drafts) >= self.window or self._ends(request):
            return self._verify(request)
        return WorkItem(request.id, Span(request.num_computed_tokens, request.num_tokens + len(request.drafts)))

    def _inner(self, request: RequestView) -> DecodingMethod:
        return self._drafting if request.drafts else self._plain

    def _ends(self, request: RequestView) -> bool:
        """Whether a candidate would end the request."""
        count = request.num_output_tokens
        return any(self._stop.check(request.request, token, count + i) for i, token in enumerate(request.drafts, 1))

    def _verify(self, request: RequestView) -> WorkItem:
        """The last verified token and the candidates behind it, but for the last of the window: the pass makes its own."""
        count = min(self.window, len(request.drafts))
        start = request.num_tokens - 1
        return WorkItem(request.id, Span(start, start + count), kv_write="overwrite", numerics="fixed",
                        drafts=request.drafts[: count - 1], group="verify")  # fmt: skip

    def regroup(self, view: EngineView, offers: Sequence[WorkItem]) -> Sequence[WorkItem]:
        """If somebody is verified, so are others who have candidates, as many as `rows` allows."""
        due = sum(offer.group == "verify" for offer in offers)
        if not due:
            return offers
        views = {request.id: request for request in view.running}
        answer: list[WorkItem] = []
        for offer in offers:
            request = views[offer.request]
            waiting = request.request.sampling.deterministic and request.drafts and offer.numerics == "fast"
            joins = bool(waiting) and due < self.rows
            due += joins
            answer.append(self._verify(request) if joins else offer)
        return answer

    def accept(self, request: Request, proposed: Sequence[int], item: WorkItem, result: ItemResult) -> Commit:
        if not request.sampling.deterministic:
            return self._drafting.accept(request, proposed, item, result)
        tokens, kept = result.token_ids, tuple(proposed)
        if item.numerics == "fast":
            return Commit((), drafts=(*kept, *tokens), final=False)
        start = item.tokens[1] - len(item.drafts)
        if kept[: len(tokens)] == tokens:  # the candidates behind the window stay candidates
            rest = kept[len(tokens) :]
            return Commit(tokens, start + len(tokens) - 1 + len(rest), rest)
        return Commit(tokens, start + len(tokens) - 1)
