"""Tiny models of every family, made by transformers, and a runner that drives ours over paged KV.

The weights are drawn wide (not the 0.02 of an untrained model) so that attention is sharp, softcaps
bite, norms and biases matter, and a wrong detail moves the logits by far more than the tolerance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.transformer import Transformer

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 128,  # whole panels of every machine, so that plain layers become programs
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}

# Case name: (config class of transformers, what differs from SIZES).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 16}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "head_dim": 16}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 11, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2, "hidden_size": 64}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 10,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 10,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": (
        "Phi3Config",
        {
            "sliding_window": 13,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "hidden_size": 64,
        },
    ),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-raw": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": False},
    ),
}


def tiny_config(case: str) -> Any:
    """The transformers config of a case."""
    import transformers

    name, fields = CASES[case]
    return getattr(transformers, name)(**{**SIZES, **fields})


def hf_model(config: Any, seed: int = 0) -> Any:
    """A transformers model of that config with wide random weights, eager attention, float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1 and name.endswith("norm.weight"):
                weight.add_(0.3 * noise)  # around 1, or around 0 where the family stores w - 1
            elif "lm_head" in name or (config.tie_word_embeddings and "embed_tokens" in name):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[-1] ** 0.5)
    return model


def load_hf(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers makes of a model directory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=dtype)
    return model.eval()


@torch.no_grad()
def hf_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits of every position by one full forward of transformers, [len(ids), V] float32."""
    logits: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    return logits


@torch.no_grad()
def hf_greedy(model: Any, ids: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that `transformers.generate` continues with, greedily and without an end token."""
    out = model.generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return [int(t) for t in out[0, len(ids) :]]


@dataclass
class Row:
    """One sequence of a PagedRunner."""

    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


class PagedRunner:
    """Runs steps of ragged batches over a paged cache whose blocks are handed out in random order.

    The cache starts full of NaN: whoever reads a slot that nobody wrote is found out.
    """

    def __init__(self, model: Transformer, block_size: int, num_blocks: int, seed: int = 0) -> None:
        shape = model.shape
        self.model, self.block_size = model, block_size
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)
        size = (num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
        self.kv_caches = [
            (
                torch.full(size, float("nan"), dtype=model.dtype),
                torch.full(size, float("nan"), dtype=model.dtype),
            )
            for _ in range(shape.num_layers)
        ]

    def step(
        self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], spans: Sequence[range] | None = None
    ) -> list[Tensor]:
        """Add `tokens[i]` to `rows[i]`, all in one ragged batch; the logits of each row's new tokens.

        `spans`: run the layers in these pieces, one call of forward each.
        """
        for row, new in zip(rows, tokens, strict=True):
            total = row.num_computed_tokens + len(new)
            while len(row.block_table) * self.block_size < total:
                row.block_table.append(self._free.pop())
        lens = [len(t) for t in tokens]
        starts = [row.num_computed_tokens for row in rows]
        totals = [start + n for start, n in zip(starts, lens, strict=True)]
        meta = AttentionMetadata.build(lens, totals, [row.block_table for row in rows], self.block_size)
        positions = torch.tensor([p for s, t in zip(starts, totals, strict=True) for p in range(s, t)])
        hidden = self.model.embed(torch.tensor([t for new in tokens for t in new]))
        for span in spans or [range(self.model.shape.num_layers)]:
            hidden = self.model.forward(hidden, positions, meta, self.kv_caches, span)
        for row, total in zip(rows, totals, strict=True):
            row.num_computed_tokens = total
        return list(self.model.logits(hidden).split(lens))


def run_in_chunks(
    runner: PagedRunner, prompts: Sequence[Sequence[int]], choose: Callable[[int], int]
) -> list[Tensor]:
    """All prompts through the runner in ragged steps; `choose(n)` draws an int from 0..n.

    In each step every unfinished prompt takes a chunk of 0 to all of its remaining tokens, so rows come
    and go, decode and prefill mix. Returns the logits of all positions, per prompt.
    """
    rows = [Row() for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    while any(row.num_computed_tokens < len(p) for row, p in zip(rows, prompts, strict=True)):
        left = [len(p) - row.num_computed_tokens for row, p in zip(rows, prompts, strict=True)]
        take = [choose(n) if n else 0 for n in left]
        take = take if any(take) else [min(n, 1) for n in left]
        active = [i for i, n in enumerate(take) if n]
        chunks = [prompts[i][rows[i].num_computed_tokens :][: take[i]] for i in active]
        for i, out in zip(active, runner.step([rows[i] for i in active], chunks), strict=True):
            logits[i].append(out)
    return [torch.cat(parts) for parts in logits]


def greedy(runner: PagedRunner, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations of all prompts as one batch: a ragged prefill, then decode steps."""
    rows: list[Row] = [Row() for _ in prompts]
    new: list[list[int]] = [list(p) for p in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        new = [[int(logits[-1].argmax())] for logits in runner.step(rows, new)]
        for tokens, token in zip(out, new, strict=True):
            tokens.extend(token)
    return out
