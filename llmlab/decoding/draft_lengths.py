"""How many drafts to propose (seam E): fixed, by what was accepted lately, or by predicted goodput.

With acceptance a of a single draft, a chain of k yields on average 1 + a + ... + a^k tokens per verification
(Leviathan et al., arXiv 2211.17192, eq. 1). Whether that pays depends on what a longer span costs, which the cost model
knows: nothing while the step is bound by memory, and in proportion once it is bound by arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmlab.registry import Registry
from llmlab.seams import DraftLengths, DraftOutlook, DraftPolicy, EngineView
from llmlab.types import WorkItem

PRIOR = 0.6  # acceptance of a request that no draft of was verified yet
HOPE = 0.9  # acceptance at which drafts must pay, or they are not even tried
AGAIN = 16
PATIENCE = 3  # lengths without gain behind the best one, after which no longer ones are priced
PRESSED = 0.05  # share of free blocks below which nobody drafts


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens of one verification of k drafts in a chain, the bonus token included."""
    if acceptance >= 1.0:
        return k + 1.0
    return float((1.0 - acceptance ** (k + 1)) / (1.0 - acceptance))


def pressed(view: EngineView) -> bool:
    """Whether KV memory is so short that drafts would take what requests need."""
    return view.pool.num_free < max(len(view.running), PRESSED * view.pool.num_blocks)


class Fixed:
    """As many as the configuration allows, always."""

    name = "fixed"

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        return DraftLengths((outlook.longest,) * len(items), "as configured")


class ByAcceptance:
    """Each request as many as it will probably accept, by the moving average of its own drafts."""

    name = "ewma"

    def __init__(self, least: float = 0.3) -> None:
        self.least = least  # the chance that a draft must have to be made

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        if pressed(view):
            return DraftLengths((0,) * len(items), "KV memory is short")
        rates = acceptances(view)
        lengths = tuple([self._length(rates.get(item.request, PRIOR), outlook.longest) for item in items])
        return DraftLengths(lengths, f"the last draft holds with a chance of {self.least:g} or more")

    def _length(self, rate: float, longest: int) -> int:
        """At least 1, so that a request whose text becomes predictable again is noticed."""
        k = 1
        while k < longest and rate ** (k + 1) >= self.least:
            k += 1
        return k


class ByGoodput:
    """The one length for all that promises the most tokens a second: the cost model prices the step that would verify
    them, and the drafting; no drafts where none promises `margin` times plain decoding: predictions err, and the draft
    model must read the prompts, too. Requests that no draft of was verified yet count as the others do on average.

    Who never drafts never learns that drafts would hold. So while nothing is known, and at every AGAIN-th token of the
    oldest request, that one tries `trial` drafts, if they would pay at an acceptance of HOPE."""

    name = "goodput"

    def __init__(self, margin: float = 1.15, trial: int = 3) -> None:
        self.margin = margin
        self.trial = trial

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        if pressed(view):
            return DraftLengths((0,) * len(items), "KV memory is short")
        rates = acceptances(view)
        if rates:
            usual = sum(rates.values()) / len(rates)
            answer = self._best([rates.get(item.request, usual) for item in items], items, outlook)
            if answer.lengths[0] or items[0].tokens[1] % AGAIN:
                return answer
        hoped = self._best([HOPE] * len(items), items, outlook)
        if not hoped.lengths[0]:
            return answer if rates else hoped
        lengths = (min(self.trial, outlook.longest), *(0,) * (len(items) - 1))
        return DraftLengths(lengths, f"a trial: {hoped.reason}", hoped.options)

    def _best(self, known: Sequence[float], items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        """The best length if drafts hold as often as `known` says of each request."""
        options = self._options(Counter([round(rate, 1) for rate in known]), items, outlook)
        best, seconds = min(options, key=lambda o: (o[1], o[0]))
        if options[0][1] < self.margin * seconds:
            best, seconds = options[0]
        gain, mean = options[0][1] / seconds, sum(known) / len(known)
        reason = f"{gain:.2f} times the tokens a second of plain decoding, at an acceptance of {mean:.2f}"
        return DraftLengths((best,) * len(items), reason, options)

    def _options(self, shares: Counter[float], items: Sequence[WorkItem], outlook: DraftOutlook) -> tuple[tuple[int, float], ...]:
        """Lengths with their seconds a token, from none up to some behind the best."""
        options: list[tuple[int, float]] = []
        best = 0
        for k in range(outlook.longest + 1):
            tokens = sum([count * expected_tokens(rate, k) for rate, count in shares.items()])
            options.append((k, outlook.seconds(items, k) / tokens))
            best = k if options[k][1] < options[best][1] else best
            if k - best == PATIENCE:
                break
        return tuple(options)


def acceptances(view: EngineView) -> dict[str, float]:
    """Acceptance of the running requests that have one."""
    return {request.id: request.acceptance for request in view.running if request.acceptance is not None}


DRAFT_POLICIES: Registry[DraftPolicy] = Registry(
    "draft_policy", {"fixed": Fixed, "ewma": ByAcceptance, "goodput": ByGoodput}
)
