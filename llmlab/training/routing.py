"""Record which experts a mixture's tokens take while it answers problems.

    python -m llmlab.training.routing lab-moe datasets/workloads/routing-lab-moe.npz

One request at a time, so that the rows of the trace are the tokens of one sequence after the other's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab import tasks
from llmlab.assembly import Assembly, assemble
from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.kernels import reference
from llmlab.models.transformer import MoEMLP, Transformer
from llmlab.types import ModelError, SamplingParams
from llmlab.workloads.routing import RoutingTrace

KINDS = (("arith", 1, "slow"), ("chat", 1, None), ("arith", 2, "slow"), ("doc", 1, None), ("arith", 2, "think"))


class Taken(NamedTuple):
    """One call of one layer's experts: [T, k] each."""

    experts: Tensor
    weights: Tensor
    guess: Tensor


class Listening:
    """A layer's experts, and an ear at their door."""

    def __init__(self, inner: Any, routers: Sequence[Any], layer: int, heard: list[list[Taken]]) -> None:
        self._inner, self._routers, self._layer, self._heard = inner, routers, layer, heard

    def __call__(self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu") -> Tensor:
        weights, experts = reference.route(router_logits, top_k, renormalize)
        following = self._routers[(self._layer + 1) % len(self._routers)]
        guess = reference.route(following(x), top_k, True)[1]
        self._heard[self._layer].append(Taken(experts.cpu(), weights.float().cpu(), guess.cpu()))
        out: Tensor = self._inner(x, router_logits, top_k, renormalize, act)
        return out


def listen(model: Transformer) -> list[list[Taken]]:
    """Put an ear at every layer's experts; what they hear, layer by layer. Raises ModelError for a dense model."""
    mixtures = [(i, layer) for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MoEMLP)]
    if not mixtures or not isinstance(model.layers, list):
        raise ModelError("model", type(model).__name__, "has no experts to listen to", "Name a mixture, such as lab-moe.")
    routers = [layer.mlp.router for _, layer in mixtures if isinstance(layer.mlp, MoEMLP)]
    heard: list[list[Taken]] = [[] for _ in mixtures]
    for number, (index, layer) in enumerate(mixtures):
        assert isinstance(layer.mlp, MoEMLP)
        ear = Listening(layer.mlp.experts, routers, number, heard)
        model.layers[index] = replace(layer, mlp=MoEMLP(layer.mlp.router, ear))
    return heard


def record(model: str, num_sequences: int, max_tokens: int, seed: int = 0) -> RoutingTrace:
    """The routing of `num_sequences` held-out problems of all kinds in turn, answered greedily."""
    config = EngineConfig(model=model, max_num_seqs=1, enable_prefix_caching=False, max_num_batched_tokens=2048, seed=seed)
    parts: Assembly = assemble(config)
    heard = listen(parts.executor._model)  # type: ignore[attr-defined]
    rng = random.Random(f"routing-{seed}")
    starts, prompts = [0], []
    with Engine(config, parts) as engine, torch.inference_mode():
        for number in range(num_sequences):
            suite, k, style = KINDS[number % len(KINDS)]
            problem = tasks.suite(suite).problem(rng, k=k, style=style, split="test")
            engine.add_request(problem.prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))
            while engine.has_unfinished_requests():
                outputs = engine.step()
            prompts.append(len(outputs[0].prompt_token_ids))
            starts.append(sum(len(taken.experts) for taken in heard[0]))

    def column(name: str) -> np.ndarray[Any, Any]:
        return np.stack([torch.cat([getattr(t, name) for t in layer]).numpy() for layer in heard], 1)

    return RoutingTrace(model, parts.model.shape.num_experts, column("experts").astype(np.uint8), column("weights"),
                        column("guess").astype(np.uint8), np.array(starts), np.array(prompts))  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Record the routing of a mixture of experts.")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=120)
    args = parser.parse_args()
    trace = record(args.model, args.sequences, args.max_tokens)
    trace.save(args.out)
    recall = (trace.guess[:, :-1, :, None] == trace.experts[:, 1:, None, :]).any(-1).mean()
    again = [(a[..., None] == b[:, None, :]).any(-1).mean() for a, b in zip(trace.experts[1:], trace.experts[:-1], strict=True)]
    print(f"{args.out}: {len(trace.experts)} tokens of {trace.num_sequences} sequences; the next layer's experts are guessed "
          f"with {recall:.0%}, those of the next token are the last one's with {np.mean(again):.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
