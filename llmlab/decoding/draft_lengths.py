"""How many drafts to propose (seam E): fixed, by what was accepted lately, or by predicted goodput.

With acceptance a of a single draft, a chain of k yields on average 1 + a + ... + a^k tokens per verification
(Leviathan et al., arXiv 2211.17192, eq. 1). Whether that pays depends on what a longer span costs (nothing while the step is
bound by memory, in proportion once it is bound by arithmetic), on what the drafting costs, and on what the engine does for
each step and each draft. `DraftOutlook` says all of it: by price at first, and by what steps really took from then on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmlab.registry import Registry
from llmlab.seams import DraftLengths, DraftOutlook, DraftPolicy, EngineView
from llmlab.types import WorkItem

PRIOR = 0.6  # acceptance of a source that no draft of was verified yet
HOPE = 0.9  # acceptance at which drafts must pay, or they are not even tried
LONG = 4  # times its patience: then a trial needs neither hope (what is known of seconds may be wrong) nor a step of its own
TRIAL = 3  # drafts of one request, to learn whether they hold
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
    """Each request as many as it will probably accept, by the moving average of its own drafts; no drafts where those lengths
    promise less than plain decoding, until it is time to try again."""

    name = "ewma"
    rests = True

    def __init__(self, least: float = 0.3) -> None:
        self.least = least  # the chance that a draft must have to be made

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        if pressed(view):
            return none(items, "KV memory is short")
        known = acceptances(view)
        usual = PRIOR if outlook.acceptance is None else outlook.acceptance
        rates = [known.get(item.request, usual) for item in items]
        lengths = tuple([self._length(rate, outlook.longest) for rate in rates])
        plain, drafting = outlook.seconds(items, 0) / len(items), self._seconds(items, rates, lengths, outlook)
        if drafting <= plain:
            return DraftLengths(lengths, f"the last draft holds with a chance of {self.least:g} or more")
        if due(items, outlook):
            return trial(items, outlook, "to see whether drafts hold")
        return none(items, f"{plain / drafting:.2f} times the tokens a second of plain decoding")

    def _seconds(self, items: Sequence[WorkItem], rates: Sequence[float], lengths: Sequence[int], outlook: DraftOutlook) -> float:
        """A token, of a round in which the requests have these lengths."""
        tokens = sum([outlook.tokens(rate, k) for rate, k in zip(rates, lengths)])
        return outlook.seconds(items, round(sum(lengths) / len(lengths))) / tokens

    def _length(self, rate: float, longest: int) -> int:
        """At least 1, so that a request whose text becomes predictable again is noticed."""
        k = 1
        while k < longest and rate ** (k + 1) >= self.least:
            k += 1
        return k


class ByGoodput:
    """The one length for all that promises the most tokens a second. Drafting begins where it promises `margin` times plain
    decoding (predictions err), and ends where it promises less than `enough` times. Requests that no draft of was verified yet
    count as the source's drafts do on average.

    Who never drafts never learns that drafts would hold. So while nothing is known, and again after a while without drafts, the
    oldest request tries `TRIAL` drafts, if they would pay at an acceptance of HOPE or it was a long while. A trial that leads to
    nothing doubles the while."""

    name = "goodput"
    rests = True

    def __init__(self, margin: float = 1.1, enough: float = 1.03) -> None:
        self.margin, self.enough = margin, enough

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        if pressed(view):
            return none(items, "KV memory is short")
        rates = acceptances(view)
        usual = sum(rates.values()) / len(rates) if rates and outlook.acceptance is None else outlook.acceptance
        if usual is None:
            return self._hopeful(items, outlook, none(items, "a trial is being verified"))
        answer = self._best([rates.get(item.request, usual) for item in items], items, outlook)
        return answer if answer.lengths[0] or not due(items, outlook) else self._hopeful(items, outlook, answer)

    def _hopeful(self, items: Sequence[WorkItem], outlook: DraftOutlook, otherwise: DraftLengths) -> DraftLengths:
        """A trial, if it is time for one and drafts could pay."""
        hoped = self._best([HOPE] * len(items), items, outlook)
        if (hoped.lengths[0] and due(items, outlook)) or outlook.idle >= LONG * outlook.patience:
            return trial(items, outlook, hoped.reason, hoped.options)
        return none(items, otherwise.reason if hoped.lengths[0] else hoped.reason, otherwise.options or hoped.options)

    def _best(self, known: Sequence[float], items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        """The best length if drafts hold as often as `known` says of each request."""
        options = self._options(Counter([round(rate, 1) for rate in known]), items, outlook)
        best, seconds = min(options, key=lambda o: (o[1], o[0]))
        if options[0][1] < (self.margin if outlook.streak < 2 else self.enough) * seconds:
            best, seconds = options[0]
        gain, mean = options[0][1] / seconds, sum(known) / len(known)
        reason = f"{gain:.2f} times the tokens a second of plain decoding, at an acceptance of {mean:.2f}"
        return DraftLengths((best,) * len(items), reason, options)

    def _options(self, shares: Counter[float], items: Sequence[WorkItem], outlook: DraftOutlook) -> tuple[tuple[int, float], ...]:
        """Lengths with their seconds a token, from none up to some behind the best."""
        options: list[tuple[int, float]] = []
        best = 0
        for k in range(outlook.longest + 1):
            tokens = sum([count * outlook.tokens(rate, k) for rate, count in shares.items()])
            options.append((k, outlook.seconds(items, k) / tokens))
            best = k if options[k][1] < options[best][1] else best
            if k - best == PATIENCE:
                break
        return tuple(options)


def due(items: Sequence[WorkItem], outlook: DraftOutlook) -> bool:
    """Whether it is time for a trial. Beside it a draft model reads all prompts that are computed, so it waits for a step without
    others' prompts, but not forever."""
    alone = all([item.tokens[1] - item.tokens[0] == 1 + len(item.drafts) for item in items[1:]])  # noqa: C419  a list is faster
    return outlook.idle >= (1 if alone else LONG) * outlook.patience


def none(items: Sequence[WorkItem], reason: str, options: tuple[tuple[int, float], ...] = ()) -> DraftLengths:
    """Nobody drafts."""
    return DraftLengths((0,) * len(items), reason, options)


def trial(items: Sequence[WorkItem], outlook: DraftOutlook, reason: str, options: tuple[tuple[int, float], ...] = ()) -> DraftLengths:
    """The oldest request drafts a little."""
    lengths = (min(TRIAL, outlook.longest), *(0,) * (len(items) - 1))
    return DraftLengths(lengths, f"a trial: {reason}", options)


def acceptances(view: EngineView) -> dict[str, float]:
    """Acceptance of the running requests that have one."""
    return {request.id: request.acceptance for request in view.running if request.acceptance is not None}


DRAFT_POLICIES: Registry[DraftPolicy] = Registry(
    "draft_policy", {"fixed": Fixed, "ewma": ByAcceptance, "goodput": ByGoodput}
)
