"""A small model that drafts for a large one (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

Its KV lies in tensors of its own under the SAME block ids: one block table serves both models, and where the target's
block is shared, freed or cut off, so is the draft's. Every slot remembers which beginning of a text it stands for, so
what must be computed again after a preemption, a rejection or a copy is found by looking, not by bookkeeping.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab import rng
from llmlab.decoding.draft_sizes import LayerSizes
from llmlab.decoding.draft_trees import is_chain, planted
from llmlab.decoding.drafts import REMEMBERED, DraftSetup
from llmlab.decoding.rejection import draw_siblings
from llmlab.decoding.sampler import Sampled, SampleRow, greedy, plain, probabilities, sample, sample_row
from llmlab.kernels.dispatch import GreedyChain
from llmlab.kernels.layout import AttentionMetadata, TreeRow
from llmlab.models.loader import LoadedModel, load_model
from llmlab.models.tokenizer import HFTokenizer
from llmlab.seams import DraftContext, Proposal
from llmlab.types import ConfigError

GLANCE = 2  # new tokens of a text that a chain reads one by one: after a round that held, the last draft and the one behind it
_START = 0x9E3779B97F4A7C15


def _mixed(value: int, token: int) -> int:
    """The mark of a beginning that goes on with `token`; never 0, which marks a slot that nobody wrote."""
    return hash((value, token)) or 1


def further(mark: int, tokens: Sequence[int]) -> list[int]:
    """The marks of a text that goes on with `tokens`."""
    return list(accumulate(tokens, _mixed, initial=mark))[1:]


class Marks:
    """Which beginning of which text each slot of a KV pool stands for."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._slots = np.zeros((num_blocks, block_size), np.int64)
        self._size = block_size
        self._texts: OrderedDict[str, array[int]] = OrderedDict()

    def of(self, context: DraftContext) -> array[int]:
        """The marks of all beginnings of a request's text."""
        marks = self._texts.setdefault(context.request.id, array("q"))
        self._texts.move_to_end(context.request.id)
        if len(marks) < len(context.token_ids):
            marks.extend(further(marks[-1] if marks else _START, context.token_ids[len(marks) :]))
        while len(self._texts) > REMEMBERED:
            self._texts.popitem(last=False)
        return marks

    def valid(self, marks: array[int], block_ids: Sequence[int]) -> int:
        """How many of the first positions hold what `marks` says."""
        blocks = np.asarray(block_ids[: -(-len(marks) // self._size)])
        same = self._slots[blocks].ravel()[: len(marks)] == np.frombuffer(marks, np.int64)
        return len(marks) if same.all() else int(same.argmin())

    def write(self, marks: Sequence[int], start: int, block_ids: Sequence[int]) -> None:
        """Positions from `start` on are computed now."""
        for position, mark in enumerate(marks, start):
            self._slots[block_ids[position // self._size], position % self._size] = mark


class Guess(NamedTuple):
    """A token that may follow, and the probabilities [vocab_size] that it was drawn from; None: it was chosen."""

    token: int
    odds: np.ndarray | None = None


class Growth:
    """One request's drafts while they are made: the nodes of `plan`, which gives each its parent. The KV of node i lies behind
    the text, at the place of i in `fed`; what no node follows is never fed."""

    def __init__(self, context: DraftContext, plan: Sequence[int]) -> None:
        self.context, self.plan = context, plan
        self.guesses: list[Guess | None] = [None] * len(plan)
        self.children: dict[int, list[int]] = {}
        for node, parent in enumerate(plan):
            self.children.setdefault(parent, []).append(node)
        self.fed: list[int] = []
        self.paths: dict[int, tuple[int, ...]] = {-1: ()}
        self.seen: dict[int, int] = {-1: 0}

    def fill(self, node: int, guesses: Sequence[Guess]) -> list[int]:
        """What follows `node`; those of its children that are to be fed."""
        following = list(zip(self.children[node], guesses))
        for child, guess in following:
            self.guesses[child] = guess
            self.paths[child] = (*self.paths[node], guess.token)
        return [child for child, _ in following if child in self.children]

    def feed(self, nodes: Sequence[int]) -> Feed:
        """Compute these nodes, all of one depth."""
        for node in nodes:
            self.seen[node] = self.seen[self.plan[node]] | 1 << len(self.fed)
            self.fed.append(node)
        start, table = len(self.context.token_ids), self.context.block_ids
        position = start + len(self.paths[nodes[0]]) - 1
        tokens = [self.paths[node][-1] for node in nodes]
        tree = TreeRow() if is_chain(self.plan) else TreeRow(start, [self.seen[node] for node in nodes])
        return Feed(tokens, [position] * len(nodes), start + len(self.fed), table, tree)

    def proposal(self) -> Proposal:
        made = self.guesses
        return planted(self.plan, [g and g.token for g in made], [g and g.odds for g in made])


class Feed(NamedTuple):
    """Tokens of one row, where they stand in the text, the end of its KV, and which nodes they see if they are of a tree."""

    ids: Sequence[int]
    positions: Sequence[int]
    end: int
    table: Sequence[int]
    tree: TreeRow = TreeRow()

    def without_last(self) -> Feed:
        """All tokens but the last, of a row that is no tree."""
        return Feed(self.ids[:-1], self.positions[:-1], self.end - 1, self.table)


class DraftModel:
    """Drafts level by level with a model of the same vocabulary. A request that samples gets drafts sampled with the same
    random numbers, so that where the two models agree the same token comes out, and beside them in a tree the most likely ones;
    or, if the setup says so, drafts drawn with numbers of their own, and their odds."""

    def __init__(self, loaded: LoadedModel, setup: DraftSetup, layers: int | None = None) -> None:
        self.name = loaded.name if layers is None else f"first {layers} layers of {loaded.name}"
        self.sizes = None if layers is None else LayerSizes(layers)
        self.loaded = loaded
        self._model, self._setup = loaded.model, setup
        self._layers = range(layers if layers is not None else loaded.shape.num_layers)
        self._own = layers is None
        shape = loaded.shape
        size = (setup.num_blocks, shape.num_kv_heads, setup.block_size, shape.head_dim)
        self._kv = [(self._zeros(size), self._zeros(size)) for _ in self._layers] if self._own else setup.kv_layers
        self._marks = Marks(setup.num_blocks, setup.block_size)

    def _zeros(self, size: tuple[int, ...]) -> Tensor:
        return torch.zeros(size, dtype=self.loaded.dtype, device=self.loaded.device)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        wanted = [c for c in contexts if self._wanted(c)]
        with torch.inference_mode():
            made = self._drafted(wanted) if wanted else {}
        return [made.get(c.request.id, Proposal()) for c in contexts]

    def _wanted(self, context: DraftContext) -> bool:
        """Requests that want drafts; and, if the KV is our own, those whose prompt is being computed."""
        if len(context.token_ids) + context.k > self.loaded.max_model_len:
            return False
        return context.k > 0 or (self._own and len(context.token_ids) <= context.request.num_prompt_tokens)

    def _drafted(self, contexts: Sequence[DraftContext]) -> dict[str, Proposal]:
        """Chains of first choices in one call, where the kernels have it; all else level by level."""
        chain = None if self._setup.tree else self._model.chain(self._kv)  # type: ignore[arg-type]
        chained: list[DraftContext] = []
        others: list[DraftContext] = []
        for context in contexts:
            (chained if chain is not None and context.k and plain(context.request.sampling) else others).append(context)
        made = self._grow(others) if others else {}
        return made | self._follow(chain, chained) if chain is not None and chained else made

    def _follow(self, chain: GreedyChain, contexts: Sequence[DraftContext]) -> dict[str, Proposal]:
        """The most likely token behind each text, `k` times. What is new in a text is read on the way, unless it is long."""
        feeds = [self._unread(c) for c in contexts]
        texts = [feed.ids if len(feed.ids) <= GLANCE else feed.ids[-1:] for feed in feeds]
        before = [feed.without_last() for feed in feeds if len(feed.ids) > GLANCE]
        if before:
            self._run(before, last=True)
        starts, counts = [feed.end - len(text) for feed, text in zip(feeds, texts)], [c.k for c in contexts]
        rows = chain.run(texts, starts, [c.block_ids for c in contexts], counts, self._layers).tolist()
        made = {}
        for context, text, row in zip(contexts, texts, rows, strict=True):
            drafts = row[len(text) : len(text) + context.k]
            drafts = drafts[: drafts.index(-1)] if -1 in drafts else drafts
            if self._own:
                self._mark(context, further(self._marks.of(context)[-1], drafts[: context.k - 1]))
            made[context.request.id] = Proposal(tuple(drafts))
        return made

    def _grow(self, contexts: Sequence[DraftContext]) -> dict[str, Proposal]:
        """Read what is new in each text, then one level of all trees at a time."""
        states = self._run([self._unread(c) for c in contexts], last=True)
        growths = [Growth(c, self._setup.plan(c.k)) for c in contexts if c.k]
        states = states if len(growths) == len(contexts) else states[[i for i, c in enumerate(contexts) if c.k]]
        level = [(growth, -1) for growth in growths]
        while level:
            nodes: dict[Growth, list[int]] = {}
            for (growth, node), guesses in zip(level, self._guess(self._model.logits(states), level)):
                nodes.setdefault(growth, []).extend(growth.fill(node, guesses))
            level = [(growth, node) for growth, made in nodes.items() for node in made]
            if level:
                states = self._run([growth.feed(made) for growth, made in nodes.items() if made], last=False)
        for growth in growths:
            if self._own and growth.fed:
                text = self._marks.of(growth.context)[-1]
                self._mark(growth.context, [further(text, growth.paths[node])[-1] for node in growth.fed])
        return {growth.context.request.id: growth.proposal() for growth in growths}

    def _unread(self, context: DraftContext) -> Feed:
        """The tokens whose KV is missing, the last one in any case; marks what is computed now."""
        tokens = context.token_ids
        start = len(tokens) - 1
        if self._own:
            marks = self._marks.of(context)
            start = min(self._marks.valid(marks, context.block_ids), start)
            self._marks.write(marks[start:], start, context.block_ids)
        return Feed(tokens[start:], range(start, len(tokens)), len(tokens), context.block_ids)

    def _guess(self, logits: Tensor, level: Sequence[tuple[Growth, int]]) -> list[list[Guess]]:
        """What may follow each node of a level, the first choice first; nothing where the logits say nothing."""
        widths = [len(growth.children[node]) for growth, node in level]
        requests = [growth.context.request for growth, _ in level]
        if max(widths) == 1 and all(plain(request.sampling) for request in requests):
            return [[Guess(token)] if token >= 0 else [] for token in greedy(logits)]
        rows = [sample_row(g.context.request, self._setup.seed, g.context.token_ids, g.paths[node]) for g, node in level]
        drawn = self._setup.drawn and not all(row.sampling.greedy for row in rows)
        likely = _likely(logits, sample(logits, rows), widths) if not drawn or any(row.sampling.greedy for row in rows) else []
        if not drawn:
            return likely
        odds = probabilities(logits, rows)
        return [likely[i] if row.sampling.greedy else _drawn(odds[i], row, widths[i]) for i, row in enumerate(rows)]

    def _mark(self, context: DraftContext, marks: Sequence[int]) -> None:
        """What each slot behind the text stands for. A node that lies where its position is serves again if it holds."""
        self._marks.write(marks, len(context.token_ids), context.block_ids)

    def _run(self, feeds: Sequence[Feed], last: bool) -> Tensor:
        """The states [n, d] behind every token that is fed, or behind the `last` one of each row."""
        device, size = self._model.device, self._setup.block_size
        lengths = [len(feed.ids) for feed in feeds]
        tables = [feed.table[: -(-feed.end // size)] for feed in feeds]
        meta = AttentionMetadata.build(lengths, [feed.end for feed in feeds], tables, size, trees=[feed.tree for feed in feeds], device=device)
        ids = [token for feed in feeds for token in feed.ids]
        positions = [position for feed in feeds for position in feed.positions]
        hidden = self._model.embed(torch.tensor(ids, device=device))
        hidden = self._model.forward(hidden, torch.tensor(positions, device=device), meta, self._kv, self._layers)  # type: ignore[arg-type]
        return hidden[[end - 1 for end in accumulate(lengths)]] if last and len(ids) > len(feeds) else hidden


def _drawn(odds: np.ndarray, row: SampleRow, width: int) -> list[Guess]:
    """Different tokens, drawn with numbers that nothing else depends on."""
    siblings = draw_siblings(odds, width, lambda draw: rng.uniform(row.seed, row.request, row.position, draw))
    return [Guess(token, q) for token, q in siblings]


def _likely(logits: Tensor, first: Sequence[Sampled], widths: Sequence[int]) -> list[list[Guess]]:
    """Of each row the token that was sampled, and the most likely others: as many as `widths` says."""
    others = logits.topk(min(max(widths), logits.shape[1])).indices.tolist() if max(widths) > 1 else [[]] * len(first)
    found = []
    for sampled, best, width in zip(first, others, widths, strict=True):
        tokens = [sampled.token_id, *(token for token in best if token != sampled.token_id)] if sampled.token_id >= 0 else []
        found.append([Guess(token) for token in tokens[:width]])
    return found


def load_draft(name: str, setup: DraftSetup, kernels: str) -> DraftModel:
    """The draft model `name` for `setup.target`. Raises ConfigError if their vocabularies differ."""
    target = setup.target
    assert target is not None
    loaded = load_model(name, target.dtype, target.device, kernels)
    check_vocabularies(loaded, target)
    return DraftModel(loaded, setup)


def check_vocabularies(draft: LoadedModel, target: LoadedModel) -> None:
    """Raises ConfigError that says which ids differ."""
    way_out = "Draft with a model of the target's tokenizer, or with speculation='ngram'."
    if draft.shape.vocab_size != target.shape.vocab_size:
        low, high = sorted((draft.shape.vocab_size, target.shape.vocab_size))
        raise ConfigError("speculation", draft.name, f"has {draft.shape.vocab_size} tokens, {target.name} has "
                          f"{target.shape.vocab_size}: the ids {low} to {high - 1} are known to one of them only", way_out)  # fmt: skip
    if not (isinstance(draft.tokenizer, HFTokenizer) and isinstance(target.tokenizer, HFTokenizer)):
        return
    theirs, ours = draft.tokenizer.vocabulary, target.tokenizer.vocabulary
    if theirs != ours:
        other = {token: text for text, token in theirs.items()}
        differ = [(token, text, other.get(token)) for text, token in sorted(ours.items(), key=lambda e: e[1]) if other.get(token) != text]
        shown = ", ".join(f"{token} ({text!r} against {found!r})" for token, text, found in differ[:4])
        raise ConfigError("speculation", draft.name, f"has another vocabulary than {target.name}: {len(differ)} ids differ, "
                          f"such as {shown}", way_out)  # fmt: skip
