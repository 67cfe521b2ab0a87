"""A small network that drafts from the target's own state (seam E), after EAGLE (arXiv 2401.15077) without its attention, as
in recurrent drafters (arXiv 2403.09919).

    s0                      the target's state behind its last layer, from which it drew token t0
    s(i+1) = s(i) + down (silu(gate) * up),      [gate; up] = W_state norm(s(i)) + sum over j of W_j norm(embed(t(i - j)))
    t(i+1) ~ the target's final norm and output layer over s(i+1)

Embedding, final norm and output layer are the target's. Instead of attention there is a window: each of the last few tokens,
those before the state included, has a matrix of its own, which is enough to copy what stands a line further up. What a token
adds in its place is known as soon as the weights are, so a step costs one row of a table for each place and two small products.

The heads read no prompt and keep no KV: a request whose drafts nobody wanted for a while costs nothing until they are wanted
again. They are trained for one target (`llmlab.training.heads`) and lie beside its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmlab.decoding.draft_sizes import HeadSizes
from llmlab.decoding.drafts import DraftSetup
from llmlab.decoding.sampler import greedy, plain, sample, sample_row
from llmlab.models.loader import LoadedModel
from llmlab.models.transformer import Transformer
from llmlab.seams import DraftContext, Proposal
from llmlab.types import ConfigError

FILE = "heads.safetensors"
EPS = 1e-5
LEAST = 0.5  # the chance below which a draft is not worth its verification, by default
CHUNK = 1 << 20  # bytes of a target's weights that its fingerprint is made from


class HeadWeights(NamedTuple):
    """`state_norm [d]`, `w_state [2f, d]`, `w_tokens [window, 2f, d]` (the newest token's first), `down [d, f]`."""

    state_norm: Tensor
    w_state: Tensor
    w_tokens: Tensor
    down: Tensor

    def check(self, hidden_size: int) -> None:
        """Raises ConfigError unless the sizes fit each other and a target of this width."""
        inner, window = self.down.shape[-1], len(self.w_tokens)
        wanted = {"state_norm": (hidden_size,), "w_state": (2 * inner, hidden_size), "down": (hidden_size, inner),
                  "w_tokens": (max(1, window), 2 * inner, hidden_size)}  # fmt: skip
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ConfigError("speculation", FILE, f"its {name} is {list(found)} where the target needs {list(shape)}", _RETRAIN)


_RETRAIN = "Train heads for this target: python -m llmlab.training.heads MODEL --minutes 3."


class DraftHeads:
    """Drafts token by token; all requests go on together. Those that sample draft with the random numbers of the target, so that
    where the two agree the same token comes out; or, for rejection sampling, which needs drafts that owe nothing to these
    numbers, what is likeliest (`chosen`). Where the likeliest token has a smaller chance than `least`, the proposal ends: a draft
    that will not hold costs a row of the verification."""

    reads_hidden = True

    def __init__(self, target: Transformer, weights: HeadWeights, seed: int = 0, chosen: bool = False, least: float = LEAST) -> None:
        weights.check(target.shape.hidden_size)
        self.sizes = HeadSizes(weights.down.shape[1], len(weights.w_tokens))
        self.name, self._target, self._seed, self._chosen, self._least = "heads", target, seed, chosen, least
        kernels, dtype, device = target.kernels, target.dtype, target.device
        self._norm = weights.state_norm.detach().to(device, torch.float32)
        self._w_state = kernels.linear(weights.w_state.detach().to(device, dtype))
        self._down = kernels.linear(weights.down.detach().to(device, dtype))
        self._window, self._table = len(weights.w_tokens), _table(target, weights)

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        drafts: dict[str, list[int]] = {c.request.id: [] for c in contexts}
        going = [c for c in contexts if c.k and c.hidden is not None]
        if going:
            with torch.inference_mode():
                self._draft(going, drafts)
        return [Proposal(tuple(drafts[c.request.id])) for c in contexts]

    def _draft(self, going: Sequence[DraftContext], drafts: dict[str, list[int]]) -> None:
        state = torch.stack([c.hidden for c in going])
        texts = [list(c.token_ids[-self._window :]) for c in going]
        while True:
            state = self.step(state, texts)
            newest = self._choose(self._target.logits(state), going, drafts)
            for c, text, token in zip(going, texts, newest, strict=True):
                if token >= 0:
                    drafts[c.request.id].append(token)
                    text.append(token)
            stay = [i for i, c in enumerate(going) if newest[i] >= 0 and len(drafts[c.request.id]) < c.k]
            if not stay:
                return
            if len(stay) < len(going):
                state, going, texts = state[stay], [going[i] for i in stay], [texts[i] for i in stay]

    def step(self, state: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """States [n, hidden_size] behind each text, from those that its last token was drawn from."""
        kernels, vocab = self._target.kernels, self._target.shape.vocab_size
        rows = [j * vocab + token for text in texts for j, token in enumerate(reversed(text[-self._window :]))]
        places = torch.tensor(rows, device=state.device)
        starts = torch.tensor([0, *accumulate(min(len(text), self._window) for text in texts[:-1])], device=state.device)
        tokens = torch.nn.functional.embedding_bag(places, self._table, starts, mode="sum")
        inner = kernels.norm_linear(state, self._norm, EPS, self._w_state) + tokens
        return kernels.linear_add(kernels.gated_act(inner, "silu"), self._down, state)

    def _choose(self, logits: Tensor, contexts: Sequence[DraftContext], drafts: dict[str, list[int]]) -> list[int]:
        """The next draft of each; -1 where there is none."""
        if self._chosen or all(plain(c.request.sampling) for c in contexts):
            sure = logits.softmax(-1).amax(-1).tolist()
            return [token if chance >= self._least else -1 for token, chance in zip(greedy(logits), sure, strict=True)]
        rows = [sample_row(c.request, self._seed, c.token_ids, drafts[c.request.id]) for c in contexts]
        return [sampled.token_id for sampled in sample(logits, rows)]


def _table(target: Transformer, weights: HeadWeights) -> Tensor:
    """What each token of the vocabulary adds before the gate in each place of the window, [window * vocab_size, 2f]."""
    ids = torch.arange(target.shape.vocab_size, device=target.device)
    embedded = torch.nn.functional.rms_norm(target.embed(ids).float(), (target.shape.hidden_size,), eps=EPS)
    parts = embedded @ weights.w_tokens.detach().to(target.device, torch.float32).transpose(1, 2)
    return parts.flatten(0, 1).to(target.dtype)


# ------------------------------------------------------------------------------------------- on disk
def fingerprint(directory: Path) -> str:
    """Tells the weights of one model directory from those of another: 16 hex digits from the size and the beginning of its
    first weights file."""
    files = [path for path in sorted(directory.glob("*.safetensors")) if path.name != FILE]
    if not files:
        return ""
    with files[0].open("rb") as file:
        return hashlib.sha256(f"{files[0].stat().st_size}/".encode() + file.read(CHUNK)).hexdigest()[:16]


def save_heads(weights: HeadWeights, directory: Path) -> Path:
    """Write heads (bfloat16) beside the weights of the target that they were trained for."""
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights._asdict().items()}
    path = directory / FILE
    save_file(tensors, str(path), metadata={"format": "pt", "target": directory.name, "fingerprint": fingerprint(directory)})
    path.chmod(0o644)
    return path


def load_heads(setup: DraftSetup) -> DraftHeads:
    """The heads of a target. Raises ConfigError if it has none, or they are those of another one."""
    target = setup.target
    if target is None:
        raise ConfigError("speculation", "heads", "the simulator has no states to draft from",
                          "Say what would be accepted: llmlab.speculating.Simulated((0.5, 0.4)).")  # fmt: skip
    if setup.tree:
        raise ConfigError("draft_tree", "x".join(map(str, setup.tree)), "heads draft chains only", "Leave draft_tree out.")
    path = None if target.directory is None else target.directory / FILE
    if path is None or not path.is_file():
        raise ConfigError("speculation", "heads", f"{target.name} has no {FILE} beside its weights",
                          f"Train some: python -m llmlab.training.heads {target.name} --minutes 3.")  # fmt: skip
    return DraftHeads(target.model, _read(path, target), setup.seed, setup.drawn)


def _read(path: Path, target: LoadedModel) -> HeadWeights:
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        weights = HeadWeights(**found)
    except (SafetensorError, TypeError, OSError) as error:
        raise ConfigError("speculation", str(path), f"does not read as draft heads ({error})", _RETRAIN) from None
    if metadata.get("fingerprint") != fingerprint(path.parent):
        raise ConfigError("speculation", str(path), f"was trained for the states of {metadata.get('target', 'another model')!r} "
                          f"with other weights than those of {target.name}", _RETRAIN)  # fmt: skip
    return weights
