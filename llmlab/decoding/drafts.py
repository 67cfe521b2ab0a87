"""Draft sources that need no model (seam E): what a text repeats of itself, or of others, and scripts for tests.

A source is asked once per step for all requests together (`seams.DraftSource`). Models as sources: `draft_model`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmlab import rng
from llmlab.decoding.draft_sizes import LookupSizes
from llmlab.decoding.draft_trees import chain_plan, is_chain, plan_of, planted
from llmlab.registry import Registry
from llmlab.seams import DraftContext, DraftSource, Proposal
from llmlab.types import ConfigError, Request

if TYPE_CHECKING:
    from llmlab.models.loader import LoadedModel

REMEMBERED = 4096  # requests whose index a source keeps


class DraftSetup(NamedTuple):
    """What a source is made from: the target (None in the simulator) and the KV pool whose block ids it shares. `tree`: the
    children of each node by depth; none: chains. `drawn`: requests that sample get drafts that were drawn, with their odds."""

    vocab_size: int
    num_blocks: int
    block_size: int
    seed: int
    target: LoadedModel | None = None
    kv_layers: Sequence[object] = ()
    tree: tuple[int, ...] = ()
    drawn: bool = False

    def plan(self, k: int) -> tuple[int, ...]:
        """The parents of at most `k` drafts."""
        return plan_of(self.tree, k)


# ------------------------------------------------------------------------------- one text repeats itself
class _Index:
    """Where each n-gram of one text last occurred, up to but not including its end."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, ...], int] = {}
        self.num_tokens = 0

    def extend(self, tokens: Sequence[int], shortest: int, longest: int) -> None:
        for end in range(max(1, self.num_tokens), len(tokens)):  # tokens[end] follows the n-grams that end before it
            for n in range(shortest, min(longest, end) + 1):
                self.after[tuple(tokens[end - n : end])] = end
        self.num_tokens = len(tokens)


class NGram:
    """What followed the last `longest` (or fewer) tokens when they stood in the same text before: prompt lookup."""

    name = "ngram"
    sizes = LookupSizes(7e-6, 5e-6, 1e-6)  # 1 to 16 requests on one core of `cpu-2core`

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ConfigError("shortest", shortest, f"must lie between 1 and longest={longest}")
        self._longest, self._shortest = longest, shortest
        self._texts: OrderedDict[str, _Index] = OrderedDict()

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        return [Proposal(self._next(c)) if c.k else Proposal() for c in contexts]

    def _next(self, context: DraftContext) -> tuple[int, ...]:
        tokens, name = context.token_ids, context.request.id
        index = self._texts.setdefault(name, _Index())
        self._texts.move_to_end(name)
        while len(self._texts) > REMEMBERED:
            self._texts.popitem(last=False)
        index.extend(tokens, self._shortest, self._longest)
        for n in range(min(self._longest, len(tokens)), self._shortest - 1, -1):
            at = index.after.get(tuple(tokens[len(tokens) - n :]))
            if at is not None:
                return _copied(tokens, at, context.k)
        return ()


def _copied(tokens: Sequence[int], at: int, k: int) -> tuple[int, ...]:
    """`k` tokens from position `at` on; behind the end of the text its repetition goes on."""
    drafts = list(tokens[at : at + k])
    while len(drafts) < k:
        drafts.append(drafts[len(drafts) - (len(tokens) - at)])
    return tuple(drafts)


# -------------------------------------------------------------------------------- texts repeat each other
class Suffix:
    """What most often followed the longest ending of this text that occurs anywhere: in itself, in the other requests of
    the batch, or in those that ended. One suffix automaton over all (Blumer et al. 1985), grown token by token. As a tree: what
    followed most often, and next to most often, at every node of `plan(k)`."""

    name = "suffix"
    sizes = LookupSizes(2e-5, 6e-6, 2.5e-6)  # the same

    def __init__(self, shortest: int = 2, max_states: int = 1 << 18, plan: Callable[[int], tuple[int, ...]] = chain_plan) -> None:
        self._shortest, self._max_states, self._plan = shortest, max_states, plan
        self._clear()

    def _clear(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._visits = [-1], [0], [0]
        self._ends: dict[str, tuple[int, int]] = {}  # request -> (state of its whole text, tokens of it)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        if len(self._next) > self._max_states:
            self._clear()
        for context in contexts:
            self._read(context)
        return [self._walk(self._ends[c.request.id][0], c.k) if c.k else Proposal() for c in contexts]

    def _read(self, context: DraftContext) -> None:
        tokens, name = context.token_ids, context.request.id
        state, known = self._ends.get(name, (0, 0))
        for token in tokens[known:]:
            state = self._extend(state, token)
            above = self._link[state]
            for _ in range(8):  # the endings that are long enough to matter
                if above <= 0:
                    break
                self._visits[above] += 1
                above = self._link[above]
        self._ends[name] = state, len(tokens)

    def _walk(self, state: int, k: int) -> Proposal:
        while state > 0 and not self._next[state]:
            state = self._link[state]
        if state <= 0 or self._length[state] < self._shortest:
            return Proposal()
        plan = self._plan(k)
        tokens: list[int | None] = [None] * len(plan)
        states = {-1: state}
        for node, parent in enumerate(plan):
            arcs = self._next[states[parent]] if parent in states else {}
            rank = plan[:node].count(parent)
            if rank < len(arcs):
                tokens[node], states[node] = self._ranked(arcs, rank)
        return planted(plan, tokens)

    def _ranked(self, arcs: dict[int, int], rank: int) -> tuple[int, int]:
        """The arc that was taken most often, or the next ones by rank."""
        visits = self._visits
        return sorted(arcs.items(), key=lambda arc: (visits[arc[1]], arc[1]), reverse=True)[rank]

    def _extend(self, last: int, token: int) -> int:
        """The state of the text of `last` followed by `token`."""
        there = self._next[last].get(token)
        if there is not None:
            return there if self._length[there] == self._length[last] + 1 else self._split(last, there, token)
        new = self._add({}, self._length[last] + 1)
        at = last
        while at != -1 and token not in self._next[at]:
            self._next[at][token] = new
            at = self._link[at]
        if at == -1:
            self._link[new] = 0
            return new
        there = self._next[at][token]
        self._link[new] = there if self._length[there] == self._length[at] + 1 else self._split(at, there, token)
        return new

    def _add(self, arcs: dict[int, int], length: int) -> int:
        self._next.append(arcs)
        self._link.append(0)
        self._length.append(length)
        self._visits.append(0)
        return len(self._next) - 1

    def _split(self, at: int, there: int, token: int) -> int:
        """A state for the shorter strings of `there`, those that end in the text of `at` and `token`."""
        clone = self._add(dict(self._next[there]), self._length[at] + 1)
        self._link[clone], self._visits[clone] = self._link[there], self._visits[there]
        self._link[there] = clone
        while at != -1 and self._next[at].get(token) == there:
            self._next[at][token] = clone
            at = self._link[at]
        return clone


# ----------------------------------------------------------------------------------------- scripts
class Oracle:
    """Proposes what `truth(request, position)` says, spoiled at random: draft i of a proposal is right with the
    probability `acceptance[i]` (the last one also for those behind it). For tests, and for the simulator, which knows the
    tokens to come; the draws are keyed by (seed, request, position). Of a tree it is the first choice at depth i that is right
    with this probability, and nothing beside it."""

    name = "oracle"

    def __init__(self, truth: Callable[[Request, int], int], acceptance: Sequence[float], vocab_size: int, seed: int = 0,
                 plan: Callable[[int], tuple[int, ...]] = chain_plan) -> None:  # fmt: skip
        self._plan = plan
        self._truth, self._acceptance = truth, tuple(acceptance)
        self._vocab_size, self._seed = vocab_size, seed

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        return [self._grown(c) for c in contexts]

    def _grown(self, context: DraftContext) -> Proposal:
        plan = self._plan(context.k)
        tokens, depths = [], {-1: 0}
        for node, parent in enumerate(plan):
            depths[node] = depths[parent] + 1
            first = self._draft(context.request, len(context.token_ids), depths[parent])
            tokens.append((first + plan[:node].count(parent)) % self._vocab_size)  # what stands beside it is wrong in any case
        return Proposal(tuple(tokens), () if is_chain(plan) else plan)

    def _draft(self, request: Request, start: int, i: int) -> int:
        """The first choice at depth i."""
        right = self._acceptance[min(i, len(self._acceptance) - 1)]
        token = self._truth(request, start + i)
        spoiled = rng.uniform(self._seed, request.id, start + i, draw=1000 + i) >= right
        return token + 1 if spoiled else token


def ngram(setup: DraftSetup) -> DraftSource:
    if setup.tree:
        raise ConfigError("draft_tree", "x".join(map(str, setup.tree)), "ngram knows one continuation only, no trees",
                          "Leave draft_tree out, or choose suffix or a draft model.")  # fmt: skip
    return NGram()


def layer_skip(setup: DraftSetup) -> DraftSource:
    """The target drafts for itself with the first half of its layers; their KV is the target's own."""
    if setup.target is None:
        raise ConfigError("speculation", "layer_skip", "the simulator has no layers to skip",
                          "Say what would be accepted: llmlab.speculating.Simulated((0.5, 0.4), draft=...).")  # fmt: skip
    from llmlab.decoding.draft_model import DraftModel

    return DraftModel(setup.target, setup, max(1, setup.target.shape.num_layers // 2))


def heads(setup: DraftSetup) -> DraftSource:
    """The heads that were trained for the target and lie beside its weights."""
    from llmlab.decoding.draft_heads import load_heads

    return load_heads(setup)


DRAFT_SOURCES: Registry[DraftSource] = Registry(
    "speculation", {"ngram": ngram, "suffix": lambda setup: Suffix(plan=setup.plan), "layer_skip": layer_skip, "heads": heads}
)
