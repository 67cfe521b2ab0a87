"""Train draft heads for a model, on its own greedy answers.

    python -m llmlab.training.heads lab-s --minutes 3

The model answers problems of the lab's suites on the engine, and a draft source that proposes nothing keeps the state that
each token was drawn from. The heads learn to go on from such a state: each level is fed the tokens that the model really
said, and is asked for the next one. The target stays as it is. A third of the minutes goes into answers, the rest into
training; they are minutes of this process's own CPU time, so other work on the machine prolongs a run and changes nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmlab import tasks
from llmlab.decoding.draft_heads import EPS, FILE, HeadWeights, save_heads
from llmlab.llm import LLM
from llmlab.models.checkpoint import Checkpoint
from llmlab.models.loader import shape_of
from llmlab.models.zoo import resolve
from llmlab.prompts import Prompt
from llmlab.seams import DraftContext, Proposal
from llmlab.training.cards import CARD_FILE, HeadsCard, load_card, save_card
from llmlab.training.data import FOCUS, Recipe, dress
from llmlab.types import ModelError, SamplingParams

DEPTH = 8  # tokens behind a state that are kept, and levels that are measured
PAST = 31  # tokens before a state's own that are kept
ABSENT = -100  # in place of a token before the beginning of a text or behind its end
MACHINE = "a 2-core AVX-512 CPU (one thread, shared with other work)"


class Plan(NamedTuple):
    """All that decides a run. `inner`: width of the gate; `window`: tokens that the heads look back on; `levels`: how deep
    training unrolls; `rate`: the first one, it falls linearly; `answers`: the share of the minutes that records."""

    minutes: float = 3.0
    inner: int = 128
    window: int = 16
    levels: int = 5
    rows: int = 768
    rate: float = 3e-3
    fade: float = 0.85
    answers: float = 1 / 3
    max_tokens: int = 256
    held_out: int = 64
    seed: int = 0


# --------------------------------------------------------------------------------------- what is learned from
class Samples(NamedTuple):
    """States [n, hidden_size] (float32); the token drawn from each and those that follow, `tokens [n, 1 + DEPTH]`; the tokens
    before, `past [n, PAST]`, the last one last. ABSENT where a text has no token."""

    states: Tensor
    tokens: Tensor
    past: Tensor


class Listener:
    """A draft source that proposes nothing and keeps what it is shown: (position of the token that was drawn, state)."""

    name, reads_hidden = "listener", True

    def __init__(self) -> None:
        self.heard: dict[str, list[tuple[int, Tensor]]] = {}

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        for context in contexts:
            if context.hidden is not None:
                heard = self.heard.setdefault(context.request.id, [])
                heard.append((len(context.token_ids) - 1, context.hidden.float().cpu().clone()))
        return [Proposal()] * len(contexts)


def problems(count: int, split: Literal["train", "test"], seed: int) -> list[Prompt]:
    """Prompts in the mixture that the lab models were trained on last."""
    dice = random.Random(f"heads-{split}-{seed}")
    recipes: list[Recipe] = dice.choices(FOCUS.mixture, [r.share for r in FOCUS.mixture], k=count)
    return [dress(tasks.suite(r.suite).problem(dice, k=r.k, style=r.style, split=split), dice).prompt for r in recipes]


def record(model: str, prompts: Sequence[Prompt], plan: Plan, cpu_seconds: float = float("inf")) -> Samples:
    """What the model says to the prompts, greedily, and the states that it said it from; stops early when the CPU time
    is used up."""
    listener, rows = Listener(), []
    began = time.process_time()
    with LLM(model, speculation=listener, num_speculative_tokens=1, dtype="float32", num_threads=1, max_num_seqs=32, device="cpu",
             enable_prefix_caching=False, check_interval=0, log_level=1, log_capacity=10_000) as llm:  # fmt: skip
        for start in range(0, len(prompts), 64):
            answers = llm.generate(prompts[start : start + 64], SamplingParams(max_tokens=plan.max_tokens, temperature=0.0))
            for answer in answers:
                text = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
                rows += [(state, text[at : at + 1 + DEPTH], text[max(0, at - PAST) : at])
                         for at, state in listener.heard.pop(answer.request_id, [])]  # fmt: skip
            if time.process_time() - began > cpu_seconds:
                break
    following = torch.tensor([[*after, *[ABSENT] * (1 + DEPTH - len(after))] for _, after, _ in rows])
    past = torch.tensor([[*[ABSENT] * (PAST - len(before)), *before] for _, _, before in rows])
    return Samples(torch.stack([state for state, _, _ in rows]), following, past)


# ------------------------------------------------------------------------------------------------ the heads
class Output(NamedTuple):
    """The frozen parts of a target that heads share: `embed [V, d]`, final norm `[d]`, output layer `[V, d]`, float32."""

    embed: Tensor
    norm: Tensor
    head: Tensor
    eps: float
    softcap: float | None

    @classmethod
    def of(cls, directory: Path) -> Output:
        """Raises ModelError if the directory holds no weights."""
        shape = shape_of(str(directory))
        weights = Checkpoint(directory, shape, torch.float32)
        embed = weights["embed"]
        return cls(embed * shape.embedding_scale, weights["final_norm"] + shape.norm_offset,
                   embed if shape.tie_word_embeddings else weights["lm_head"], shape.rms_norm_eps, shape.final_softcap)  # fmt: skip

    def logits(self, states: Tensor) -> Tensor:
        """[..., d] -> [..., V]"""
        scores = F.linear(F.rms_norm(states, self.norm.shape, self.norm, self.eps), self.head)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


class Heads(nn.Module):
    """The heads in training: the arithmetic of `decoding.draft_heads`, with gradients."""

    def __init__(self, output: Output, inner: int, window: int) -> None:
        super().__init__()
        self.output, width = output, output.embed.shape[1]
        self.norm = nn.Parameter(torch.ones(width))
        self.w_state = nn.Parameter(torch.randn(2 * inner, width) * width**-0.5)
        self.w_tokens = nn.Parameter(torch.randn(window, 2 * inner, width) * (width * window) ** -0.5)
        self.down = nn.Parameter(torch.randn(width, inner) * 0.1 * inner**-0.5)

    def table(self) -> Tensor:
        """What each token adds in each place of the window, [window * V + 1, 2f]; the last row is for absent ones."""
        embedded = F.rms_norm(self.output.embed, self.output.embed.shape[1:], None, EPS)
        parts = (embedded @ self.w_tokens.transpose(1, 2)).flatten(0, 1)
        return torch.cat([parts, torch.zeros(1, parts.shape[1])])

    def forward(self, states: Tensor, texts: Tensor, table: Tensor) -> Tensor:
        """States [n, d] and the texts [n, window or more] whose last token was drawn from them -> the states behind."""
        window, vocab = len(self.w_tokens), len(self.output.embed)
        recent = texts[:, -window:].flip(1)
        places = torch.where(recent >= 0, recent + vocab * torch.arange(window), window * vocab)
        inner = F.linear(F.rms_norm(states, states.shape[-1:], self.norm, EPS), self.w_state) + F.embedding_bag(places, table, mode="sum")
        gate, up = inner.chunk(2, -1)
        return states + F.linear(F.silu(gate) * up, self.down)

    def levels(self, samples: Samples, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [n, V] of the i-th draft, and what the model says [n], for the first `count` levels."""
        states, table = samples.states, self.table()
        texts = torch.cat([samples.past, samples.tokens], 1)
        for level in range(count):
            states = self(states, texts[:, : PAST + 1 + level], table)
            yield self.output.logits(states), samples.tokens[:, 1 + level]

    def loss(self, samples: Samples, plan: Plan) -> Tensor:
        """Cross-entropy per token, of levels that count less the deeper they lie."""
        total, weight = torch.zeros(()), 0.0
        for level, (logits, wanted) in enumerate(self.levels(samples, plan.levels)):
            lost = F.cross_entropy(logits, wanted, ignore_index=ABSENT, reduction="sum")
            total = total + plan.fade**level * lost / (wanted != ABSENT).sum().clamp(min=1)
            weight += plan.fade**level
        return total / weight

    @torch.no_grad()
    def acceptance(self, samples: Samples) -> list[float]:
        """How often the i-th draft is what the model says, given that those before it are, up to the end of the answer."""
        alive, found = torch.ones(len(samples.states), dtype=torch.bool), []
        for logits, wanted in self.levels(samples, DEPTH):
            alive = alive & (wanted != ABSENT)
            asked = int(alive.sum())
            alive = alive & (logits.argmax(-1) == wanted)
            found.append(round(int(alive.sum()) / max(1, asked), 4))
        return found

    def weights(self) -> HeadWeights:
        return HeadWeights(self.norm, self.w_state, self.w_tokens, self.down)


class Trained(NamedTuple):
    """Heads after their training: steps, and the mean loss of the first and the last 50 steps (nats per token)."""

    heads: Heads
    steps: int
    first_loss: float
    loss: float


def train(output: Output, samples: Samples, plan: Plan, max_steps: int = 1 << 30) -> Trained:
    """Until the CPU time of the plan, or the steps, are used up."""
    torch.manual_seed(plan.seed)
    heads = Heads(output, plan.inner, plan.window)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01)
    dice = torch.Generator().manual_seed(plan.seed)
    losses: list[float] = []
    began, budget = time.process_time(), 60 * plan.minutes * (1 - plan.answers)
    while (used := max((time.process_time() - began) / budget, len(losses) / max_steps)) < 1:
        rows = torch.randint(len(samples.states), (plan.rows,), generator=dice)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1.0, (len(losses) + 1) / 50) * (1 - 0.97 * used)
        loss = heads.loss(Samples(*(part[rows] for part in samples)), plan)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Trained(heads, len(losses), _mean(losses[:50]), _mean(losses[-50:]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


# ------------------------------------------------------------------------------------------------ from end to end
def make(model: str, plan: Plan, machine: str = MACHINE) -> HeadsCard:
    """Record, train, measure on problems that nothing was trained on, and write heads and their card beside the model.
    Raises ModelError if the model is not a directory."""
    directory = resolve(model).directory
    if directory is None:
        raise ModelError("model", model, "has no directory in which its heads could lie", "Name a shipped model or a directory.")
    began = time.process_time()
    samples = record(model, problems(20_000, "train", plan.seed), plan, 60 * plan.minutes * plan.answers)
    made = train(Output.of(directory), samples, plan)
    held_out = record(model, problems(plan.held_out, "test", plan.seed), plan)
    path = save_heads(made.heads.weights(), directory)
    card = HeadsCard(sum(p.numel() for p in made.heads.parameters()), plan.inner, plan.window, plan.seed, made.steps, len(samples.states),
                     round(made.loss, 4), made.heads.acceptance(held_out), len(held_out.states), round((time.process_time() - began) / 60, 1),
                     machine, hashlib.sha256(path.read_bytes()).hexdigest())  # fmt: skip
    if (directory / CARD_FILE).is_file():
        save_card(msgspec.structs.replace(load_card(directory), heads=card), directory)
    return card


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=f"Train draft heads for a model; they are written beside its weights as {FILE}.")
    parser.add_argument("model", help="a shipped model, or a directory")
    parser.add_argument("--minutes", type=float, default=3.0, help="budget in minutes of CPU time")
    parser.add_argument("--inner", type=int, default=Plan().inner, help="width of the gate")
    parser.add_argument("--window", type=int, default=Plan().window, help=f"tokens that the heads look back on, 1 to {PAST + 1}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default=MACHINE, help="for the card")
    given: Any = parser.parse_args(args)
    torch.set_num_threads(1)
    card = make(given.model, Plan(given.minutes, given.inner, given.window, seed=given.seed), given.machine)
    print(f"{given.model}: {card.steps} steps on {card.states:,} states, loss {card.loss:.3f}, "
          f"acceptance by position {', '.join(f'{a:.2f}' for a in card.acceptance)}")  # fmt: skip


if __name__ == "__main__":
    main()
