"""A small model that drafts for a large one (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

Its KV lies in tensors of its own under the SAME block ids: one block table serves both models, and where the target's
block is shared, freed or cut off, so is the draft's. Every slot remembers which beginning of a text it stands for, so
what must be computed again after a preemption, a rejection or a copy is found by looking, not by bookkeeping.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from llmlab.decoding.drafts import REMEMBERED, DraftSetup
from llmlab.decoding.sampler import greedy, plain, sample, sample_row
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.loader import LoadedModel, load_model
from llmlab.models.tokenizer import HFTokenizer
from llmlab.seams import DraftContext, Proposal
from llmlab.types import ConfigError

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
        self._texts: OrderedDict[str, list[int]] = OrderedDict()

    def of(self, context: DraftContext) -> list[int]:
        """The marks of all beginnings of a request's text."""
        marks = self._texts.setdefault(context.request.id, [])
        self._texts.move_to_end(context.request.id)
        marks += further(marks[-1] if marks else _START, context.token_ids[len(marks) :])
        while len(self._texts) > REMEMBERED:
            self._texts.popitem(last=False)
        return marks

    def valid(self, marks: Sequence[int], block_ids: Sequence[int]) -> int:
        """How many of the first positions hold what `marks` says."""
        blocks = np.asarray(block_ids[: -(-len(marks) // self._size)])
        same = self._slots[blocks].ravel()[: len(marks)] == np.asarray(marks, np.int64)
        return len(marks) if same.all() else int(same.argmin())

    def write(self, marks: Sequence[int], start: int, block_ids: Sequence[int]) -> None:
        """Positions from `start` on are computed now."""
        for position, mark in enumerate(marks, start):
            self._slots[block_ids[position // self._size], position % self._size] = mark


class DraftModel:
    """Drafts token by token with a model of the same vocabulary. A request that samples gets drafts sampled with the same
    random numbers, so that where the two models agree the same token comes out."""

    def __init__(self, loaded: LoadedModel, setup: DraftSetup, layers: int | None = None) -> None:
        self.name = loaded.name if layers is None else f"first {layers} layers of {loaded.name}"
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
        with torch.inference_mode():
            return self._propose([c for c in contexts if self._wanted(c)], contexts)

    def _wanted(self, context: DraftContext) -> bool:
        """Requests that want drafts; and, if the KV is our own, those whose prompt is being computed."""
        if len(context.token_ids) + context.k > self.loaded.max_model_len:
            return False
        return context.k > 0 or (self._own and len(context.token_ids) <= context.request.num_prompt_tokens)

    def _propose(self, active: Sequence[DraftContext], contexts: Sequence[DraftContext]) -> list[Proposal]:
        drafts: dict[str, list[int]] = {c.request.id: [] for c in contexts}
        starts = [self._computed(c) for c in active]
        fed = [list(c.token_ids[start:]) for c, start in zip(active, starts)]
        while active:
            ends = [len(c.token_ids) + len(drafts[c.request.id]) for c in active]
            logits = self._run(fed, ends, [c.block_ids for c in active])
            going = [i for i, c in enumerate(active) if c.k > len(drafts[c.request.id])]
            chosen = [active[i] for i in going]
            for c, token in zip(chosen, self._choose(logits if len(going) == len(active) else logits[going], chosen, drafts)):
                drafts[c.request.id].append(token)
            active = [c for i in going if (c := active[i]).k > len(drafts[c.request.id]) and drafts[c.request.id][-1] >= 0]
            fed = [[drafts[c.request.id][-1]] for c in active]
        self._mark_drafts(contexts, drafts)
        return [Proposal(tuple(t for t in drafts[c.request.id] if t >= 0)) for c in contexts]

    def _computed(self, context: DraftContext) -> int:
        """Tokens whose KV is there, before the last; marks those that are computed next."""
        num_tokens = len(context.token_ids)
        if not self._own:
            return num_tokens - 1
        marks = self._marks.of(context)
        start = min(self._marks.valid(marks, context.block_ids), num_tokens - 1)
        self._marks.write(marks[start:], start, context.block_ids)
        return start

    def _choose(self, logits: Tensor, contexts: Sequence[DraftContext], drafts: Mapping[str, Sequence[int]]) -> list[int]:
        """The next draft of each; -1 where there is none."""
        if all(plain(c.request.sampling) for c in contexts):
            return greedy(logits)
        rows = [sample_row(c.request, self._setup.seed, c.token_ids, drafts[c.request.id]) for c in contexts]
        return [sampled.token_id for sampled in sample(logits, rows)]

    def _mark_drafts(self, contexts: Sequence[DraftContext], drafts: Mapping[str, Sequence[int]]) -> None:
        """All drafts but the last were computed: if they hold, so does their KV."""
        for c in contexts if self._own else ():
            computed = drafts[c.request.id][:-1]
            if computed:
                self._marks.write(further(self._marks.of(c)[-1], computed), len(c.token_ids), c.block_ids)

    def _run(self, fed: Sequence[Sequence[int]], ends: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        """Logits behind the last token of each row: `fed` tokens that end at position `ends`."""
        device, size = self._model.device, self._setup.block_size
        lengths = [len(tokens) for tokens in fed]
        tables = [table[: -(-end // size)] for table, end in zip(tables, ends)]
        meta = AttentionMetadata.build(lengths, ends, tables, size, device=device)
        ids = [token for tokens in fed for token in tokens]
        positions = [p for n, end in zip(lengths, ends) for p in range(end - n, end)]
        hidden = self._model.embed(torch.tensor(ids, device=device))
        hidden = self._model.forward(hidden, torch.tensor(positions, device=device), meta, self._kv, self._layers)  # type: ignore[arg-type]
        if len(ids) > len(fed):
            hidden = hidden[[end - 1 for end in accumulate(lengths)]]
        return self._model.logits(hidden)


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
