"""Train a lab model; stop and start again at will.

    python -m llmlab.training.pretrain lab-s --minutes 100
    python -m llmlab.training.export lab-s datasets/models/lab-s

The state (weights, average, optimizer, place in the data) goes to ``build/training/NAME`` once a minute; the
same command goes on from there. The learning rate falls linearly with the budget that is used up, in minutes
on the clock or in tokens, whichever is further. bfloat16 compute with float32 master weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlab.training.data import Batch, Source
from llmlab.training.lab_tokenizer import build
from llmlab.training.net import LabLlama, shape_of

LEARNING_RATES = {"lab-xs": 3e-3, "lab-s": 2e-3, "lab-m": 1.2e-3, "lab-moe": 1.2e-3}
FOCUS_FROM_POOL = {"lab-xs": 22, "lab-s": 19, "lab-m": 5, "lab-moe": 5}


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides a run. ``minutes`` and ``tokens`` are the budget; infinity means no limit."""

    name: str
    minutes: float = math.inf
    tokens: float = math.inf
    seed: int = 0
    learning_rate: float = 2e-3
    final_rate_share: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    average_decay: float = 0.999
    focus_from_pool: int = 18


@dataclass(slots=True)
class Progress:
    """Where a run stands: ``started`` on the clock (seconds), the place in the data, and what was done."""

    started: float
    pool: int = 0
    batch: int = 0
    step: int = 0
    tokens: int = 0
    learned_tokens: int = 0

    def share(self, plan: Plan, now: float) -> float:
        """The part of the budget that is used up, 0 to 1 and more."""
        return max(self.tokens / plan.tokens, (now - self.started) / 60 / plan.minutes)


class Training:
    """A model, its float32 master weights, their running average, and the optimizer."""

    def __init__(self, plan: Plan, started: float) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.progress = plan, Progress(started)
        self.model = LabLlama(shape_of(plan.name))
        self.master = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.average = [p.detach().clone() for p in self.master]
        self.model.to(torch.bfloat16)
        self.work: list[Tensor] = list(self.model.parameters())
        self.optimizer = _optimizer(self.master, plan)

    def compile(self) -> None:
        """Fuse the elementwise work of each block (one graph per row length; a third faster for lab-s)."""
        torch._dynamo.config.cache_size_limit = 64
        for block in self.model.blocks:
            block.compile(dynamic=False)

    def step(self, batch: Batch, rate: float) -> Tensor:
        """One update; returns the mean loss of the batch."""
        loss = self.model.loss(batch.ids, batch.learn)
        loss.backward()
        for master, work in zip(self.master, self.work, strict=True):
            master.grad = None if work.grad is None else work.grad.float()
            work.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, self.plan.clip, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._follow()
        self._count(batch)
        return loss.detach()

    @torch.no_grad()
    def _follow(self) -> None:
        n = self.progress.step
        decay = min(self.plan.average_decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.average, self.master, 1 - decay)
        torch._foreach_copy_(self.work, self.master)

    def _count(self, batch: Batch) -> None:
        self.progress.step += 1
        self.progress.tokens += batch.num_tokens
        self.progress.learned_tokens += int(batch.learn.sum())

    def rate(self, now: float) -> float:
        """Warm-up over the first steps, then linear in the budget down to a small share."""
        plan, warm = self.plan, min(1.0, (self.progress.step + 1) / self.plan.warmup_steps)
        left = max(0.0, 1.0 - self.progress.share(plan, now))
        return plan.learning_rate * warm * (plan.final_rate_share + (1 - plan.final_rate_share) * left)

    def averaged(self) -> LabLlama:
        """A float32 model with the averaged weights: the one that is shipped."""
        model = LabLlama(shape_of(self.plan.name))
        with torch.no_grad():
            for p, mean in zip(model.parameters(), self.average, strict=True):
                p.copy_(mean)
        return model

    def save(self, directory: Path) -> None:
        """Write the whole state, atomically."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {"plan": asdict(self.plan), "progress": asdict(self.progress), "master": self.master,
                 "average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save(state, directory / "state.tmp")
        (directory / "state.tmp").replace(directory / "state.pt")

    def restore(self, directory: Path) -> None:
        """Go on from a saved state. The plan may have changed (a longer budget, say), the shape may not."""
        state = torch.load(directory / "state.pt", weights_only=True)
        self.progress = Progress(**state["progress"])
        with torch.no_grad():
            for mine, saved in ((self.master, state["master"]), (self.average, state["average"])):
                torch._foreach_copy_(mine, saved)
            torch._foreach_copy_(self.work, self.master)
        self.optimizer.load_state_dict(state["optimizer"])


def _optimizer(master: list[Tensor], plan: Plan) -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in master if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in master if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def batches(source: Source, progress: Progress) -> Iterator[Batch]:
    """The batches from the place where ``progress`` stands; keeps the place up to date."""
    while True:
        pool = source.pool(progress.pool)
        while progress.batch < len(pool):
            progress.batch += 1
            yield pool[progress.batch - 1]
        progress.pool, progress.batch = progress.pool + 1, 0


def train(training: Training, directory: Path, save_every: float = 60.0) -> None:
    """Train until the budget is used up, saving and logging now and then."""
    plan, progress = training.plan, training.progress
    source = Source(build(), plan.seed, plan.focus_from_pool)
    recent: list[Tensor] = []
    saved = time.time()
    for batch in batches(source, progress):
        now = time.time()
        if progress.share(plan, now) >= 1:
            break
        recent.append(training.step(batch, training.rate(now)))
        if progress.step % 100 == 0:
            _log(training, directory, float(torch.stack(recent).mean()), now)
            recent.clear()
        if now - saved > save_every:
            training.save(directory)
            saved = now
    training.save(directory)


def _log(training: Training, directory: Path, loss: float, now: float) -> None:
    progress = training.progress
    line = {"step": progress.step, "tokens": progress.tokens, "loss": round(loss, 4),
            "rate": round(training.rate(now), 6), "seconds": round(now - progress.started, 1)}
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a lab model; the same command resumes it.")
    parser.add_argument("name", choices=sorted(LEARNING_RATES))
    parser.add_argument("--minutes", type=float, default=math.inf, help="budget on the clock, pauses included")
    parser.add_argument("--tokens", type=float, default=math.inf, help="budget in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="do not compile (lab-xs gains nothing from it)")
    args = parser.parse_args()
    if math.isinf(args.minutes) and math.isinf(args.tokens):
        parser.error("give a budget: --minutes, --tokens, or both")
    torch.set_num_threads(args.threads)
    directory = Path("build/training") / args.name
    plan = Plan(args.name, args.minutes, args.tokens, args.seed, LEARNING_RATES[args.name],
                focus_from_pool=FOCUS_FROM_POOL[args.name])
    training = Training(plan, time.time())
    if (directory / "state.pt").exists():
        training.restore(directory)
    if not args.eager:
        training.compile()
    train(training, directory)


if __name__ == "__main__":
    main()
