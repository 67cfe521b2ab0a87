"""What an engine knows of one draft source (seam E): the prices of its rounds, and what the log has told since.

Prices are computed. A machine takes longer, by its dispatch, its Python, its cold caches; a source may keep silent where it was
asked; of its drafts a share holds. All of this is learned from what a replay is told as well (when steps were planned, how long
they took, what they brought) and from nothing else, so that a replay learns the same.

    seconds of a round = price + overrun        the overrun: what steps of this kind took beyond their price, the median of late
    tokens of a round  = 1 + first (a + a follows a + ...)     first, follows: the chance that a source speaks, and that it goes on
                                                               where all it said so far holds
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmlab.decoding.draft_trees import is_chain
from llmlab.decoding.speculative import Tried
from llmlab.seams import DraftOutlook, RoundPrice
from llmlab.types import ItemResult, WorkItem

LAST = 9  # observations of a kind of step that count
HABIT = 0.95  # what each newer draft leaves of an average over drafts
FIRST = 0.6  # counts as one draft at the start of the average: three drafts that hold are not yet a source that never errs
SIBLING = 0.3  # the chance of a second choice where the first one failed, until some were tried
GRAIN = 64  # tokens: texts are priced as if their lengths were multiples of it
FIRST_WAIT, LONGEST_WAIT = 16, 1024  # plans without drafts after which drafts are tried again
BRIEF = 2  # drafting that ends after so many plans did not pay
EVERY, CHECKED = 16, 8  # plans: of those without drafts one in so many is weighed anew; where nothing changes one in so many is timed
SETTLED = 8  # plans with drafts in a row after which nothing changes much
ROUNDS = 16  # over which a source makes up for the texts that it must read before it drafts


class Recent:
    """The median of the last values, of an even number the lower one: neither a first call, which compiles and finds the caches
    cold, nor a step that was held up shows in it."""

    __slots__ = ("_last", "value")

    def __init__(self) -> None:
        self.value, self._last = 0.0, deque[float](maxlen=LAST)

    def add(self, value: float) -> None:
        self._last.append(value)
        self.value = sorted(self._last)[(len(self._last) - 1) // 2]


class Habit:
    """The share of yes among answers, an average that forgets."""

    __slots__ = ("value",)

    def __init__(self, value: float) -> None:
        self.value = value

    def add(self, yes: int, asked: int) -> None:
        if asked:
            share = yes / asked
            self.value = share + HABIT**asked * (self.value - share)


class Overruns:
    """Seconds beyond the price, by how many requests take part (as powers of two) and by how many drafts each has. What was
    never seen is taken from what is nearest."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Recent] = {}
        self._near: dict[tuple[int, int], Recent | None] = {}

    def add(self, count: int, drafts: int, seconds: float, price: float) -> None:
        key = (count.bit_length(), drafts)
        if key not in self._seen:
            self._seen[key] = Recent()
            self._near.clear()
            seconds = min(seconds, 2 * price)  # alone it proves little: it may have been the first call of all
        self._seen[key].add(seconds - price)

    def of(self, count: int, drafts: int) -> float:
        key = (count.bit_length(), drafts)
        if key not in self._near:
            self._near[key] = self._nearest(*key)
        found = self._near[key]
        return found.value if found is not None else 0.0

    def _nearest(self, size: int, drafts: int) -> Recent | None:
        keys = sorted(self._seen, key=lambda k: (abs(k[0] - size), (k[1] > 0) != (drafts > 0), abs(k[1] - drafts), k))
        return self._seen[keys[0]] if keys else None


class Planned(NamedTuple):
    """A step as far as it can tell of prices: `drafts` of all requests together; `plain`: every row decodes."""

    step: int
    now: float
    items: Sequence[WorkItem]
    plain: bool
    drafts: int
    asks: bool


class Period(NamedTuple):
    """What is known of a finished step whose time ends as the next one is planned."""

    began: float
    rows: int
    drafts: int
    length: int
    drafting: float


class DraftBook:
    """See the module's text. Told of each plan and each result, in their order. Where steps overlap it learns nothing of time."""

    def __init__(self, prices: RoundPrice, longest: int) -> None:
        self.prices, self.longest = prices, longest
        self._tree = not is_chain(prices.plan(longest))
        self._first, self._more, self._follows, self._sibling = Habit(1.0), Habit(1.0), Habit(1.0), Habit(SIBLING)
        self._held: Habit | None = None
        self._steps, self._passes = Overruns(), Overruns()
        self._planned: Planned | None = None
        self._period: Period | None = None
        self._read: dict[str, int] = {}  # by request: tokens that the source has seen
        self._asked: dict[str, int] = {}  # by request: drafts that were asked for last
        self._weighed: tuple[Sequence[WorkItem], int] = (), 0  # the items that a policy asks about, and their length
        self._idle, self._streak, self._patience = FIRST_WAIT, 0, FIRST_WAIT

    def like(self, other: DraftBook) -> bool:
        """Whether both are about drafts of one form."""
        return self.longest == other.longest and self.prices.plan(self.longest) == other.prices.plan(self.longest)

    # ----------------------------------------------------------------------------------- what it tells
    def outlook(self) -> DraftOutlook:
        held = self._held.value if self._held is not None else None
        return DraftOutlook(self.longest, self.seconds, self.tokens, held, self._idle, self._streak, self._patience)

    def seconds(self, items: Sequence[WorkItem], k: int) -> float:
        """Of a round that asks for `k` drafts behind each of `items` and verifies as many as usually come."""
        if items is not self._weighed[0]:
            self._weighed = items, _length(items)
        count, length = len(items), self._weighed[1]
        come = round(self._drafted(k)) if k else 0
        took = self.prices.verifying(count, come, length)
        took = max(took / 4, took + self._steps.of(count, come))
        if not k:
            return took
        drafting = self.prices.drafting(count, k, length)
        drafting = max(drafting / 4, drafting + self._levels(k) * self._passes.of(count, 0))
        return took + drafting + (self._catching_up(items, length) if self._idle else 0.0)

    def _catching_up(self, items: Sequence[WorkItem], length: int) -> float:
        """What drafting would take in addition in each of its first ROUNDS rounds."""
        count, unread = len(items), self._unread(items)
        return max(0.0, self._reading(count, unread, 1, length) - self.prices.drafting(count, 1, length)) / ROUNDS

    def _unread(self, items: Sequence[WorkItem]) -> int:
        """Tokens of each text that the source has not seen, taken as equally many."""
        return sum([item.tokens[1] - self._read.get(item.request, 0) for item in items]) // len(items)

    def _reading(self, count: int, unread: int, k: int, length: int) -> float:
        """The price of a round of which so many tokens must be read first."""
        if unread <= GRAIN:
            return self.prices.drafting(count, k, length)
        return self.prices.reading(count, GRAIN * (-(-unread // GRAIN)), k)

    def tokens(self, acceptance: float, k: int) -> float:
        """Of one verification where `k` drafts were asked for, the bonus token included."""
        if self._tree:
            return 1.0 + self._first.value * _on_path(self.prices.plan(k), acceptance, self._sibling.value)
        total, chance = 1.0, self._first.value
        for _ in range(k):
            chance *= acceptance
            total += chance
            chance *= self._follows.value
        return total

    def rests(self) -> bool:
        """Whether nobody drafts now, and it is not time to weigh that anew: weighing costs time as well."""
        return self._idle > BRIEF and self._idle % EVERY != 0

    def _drafted(self, k: int) -> float:
        """How many drafts usually come if `k` are asked for."""
        if self._tree:
            return k * self._first.value
        total, chance = 0.0, self._first.value
        for _ in range(k):
            total += chance
            chance *= self._more.value
        return total

    def _levels(self, k: int) -> int:
        """Passes of a source that proposes `k` drafts."""
        if not self._tree:
            return k
        depths = {-1: 0}
        for node, parent in enumerate(self.prices.plan(k)):
            depths[node] = depths[parent] + 1
        return max(depths.values())

    # ------------------------------------------------------------------------------ what it is told
    def planned(self, step: int, items: Sequence[WorkItem], now: float) -> None:
        """A step that begins."""
        if self._period is not None:
            self._learn_period(self._period, now)
        self._period = self._planned = None
        asks = any([item.propose for item in items])  # noqa: C419  a list is faster here
        if asks or items[0].emit == "sample":
            self._turn(asks)
        if (self._idle > BRIEF and self._idle % CHECKED) or (self._streak > SETTLED and self._streak % CHECKED):
            return
        drafts = sum([len(item.drafts) for item in items])
        new = sum([item.tokens[1] - item.tokens[0] for item in items])
        self._planned = Planned(step, now, items, new - drafts == len(items), drafts, asks)

    def finished(self, step: int, results: Sequence[ItemResult], parts: Mapping[str, float], running: Sequence[str]) -> None:
        """The same step has ended. `running`: who goes on."""
        planned, self._planned = self._planned, None
        if planned is None or planned.step != step:
            return  # steps overlap, or it was planned before this book was begun
        drafting = parts.get("draft", 0.0)
        if planned.asks:
            self._learn_drafting(planned.items, results, drafting, running)
        count, drafts = len(planned.items), planned.drafts
        if running and planned.plain and (not drafts or 2 * drafts >= count):
            self._period = Period(planned.now, count, round(drafts / count), _length(planned.items), drafting)

    def verified(self, request: str, came: int, tried: Tried) -> None:
        """What became of one proposal of `came` drafts."""
        asked = self._asked.pop(request, 0)
        if not asked:
            return  # of a round that is not looked at
        if not self._tree and tried.held:
            silent = int(tried.held == came < asked)
            self._follows.add(min(tried.held + 1, asked) - 1 - silent, min(tried.held + 1, asked) - 1)
        if self._held is None and tried.first_choices:
            self._held = Habit((tried.held + FIRST) / (tried.first_choices + 1))
        elif self._held is not None:
            self._held.add(tried.held, tried.first_choices)
        self._sibling.add(tried.siblings_held, tried.siblings)

    def _turn(self, asks: bool) -> None:
        if asks:
            self._idle, self._streak = 0, self._streak + 1
            return
        if self._streak:
            self._patience = min(2 * self._patience, LONGEST_WAIT) if self._streak <= BRIEF else FIRST_WAIT
        self._idle, self._streak = self._idle + 1, 0

    def _learn_period(self, period: Period, now: float) -> None:
        """From plan to plan: the step, and what the engine did beside it."""
        price = self.prices.verifying(period.rows, period.drafts, period.length)
        self._steps.add(period.rows, period.drafts, now - period.began - period.drafting, price)

    def _learn_drafting(self, items: Sequence[WorkItem], results: Sequence[ItemResult], seconds: float, running: Sequence[str]) -> None:
        asked = [item for item in items if item.propose]
        longest = max([item.propose for item in asked])
        price, levels = self._reading(len(asked), self._unread(asked), longest, _length(asked)), self._levels(longest)
        self._passes.add(len(asked), 0, seconds / levels, price / levels)
        going = set(running)
        self._read = {name: at for name, at in self._read.items() if name in going}
        self._asked = {item.request: item.propose for item in asked}
        self._read |= {item.request: item.tokens[1] for item in asked if item.request in going}
        for item, result in zip(items, results):
            if item.propose and item.request in going and result.draft_error is None:
                self._learn_silence(item.propose, len(result.drafts))

    def _learn_silence(self, asked: int, came: int) -> None:
        self._first.add(int(came > 0), 1)
        if came and not self._tree:
            self._more.add(came - 1, min(came, asked - 1))


def _length(items: Sequence[WorkItem]) -> int:
    """All items taken as equally long, in steps of `GRAIN` tokens: a policy asks for every k in every step."""
    total, count = sum([item.tokens[1] for item in items]), max(1, len(items))
    return GRAIN * max(1, -(-total // (GRAIN * count)))


def _on_path(plan: Sequence[int], acceptance: float, sibling: float) -> float:
    """How many nodes of a tree hold, if first choices do with `acceptance`, and the next ones with `sibling` where those before
    them failed."""
    chances, total = {-1: 1.0}, 0.0
    left: dict[int, float] = {}  # by parent: the chance that it holds and no child so far does
    for node, parent in enumerate(plan):
        share = sibling if parent in left else acceptance
        chance = left.get(parent, chances[parent]) * share
        left[parent] = left.get(parent, chances[parent]) - chance
        chances[node] = chance
        total += chance
    return total
