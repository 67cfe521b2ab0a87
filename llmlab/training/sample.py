"""Batched sampling from a model in training: enough to measure it, apart from any engine.

Rows are padded on the left, the KV cache is one tensor per layer, and rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmlab.training.net import Block, LabLlama, rotate_half

EOS = 2
_COMPACT_EVERY = 16


@dataclass(frozen=True, slots=True)
class Sampling:
    """At most ``max_tokens`` per answer; ``temperature`` 0 takes the likeliest token."""

    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 128


class _Cache:
    """Keys and values [rows, kv_heads, slots, head_dim] of each layer, and which slots hold a token."""

    def __init__(self, model: LabLlama, valid: Tensor, slots: int) -> None:
        shape, (rows, filled) = model.shape, valid.shape
        size = (rows, shape.num_kv_heads, slots, shape.head_dim)
        self.keys = [torch.empty(size) for _ in model.blocks]
        self.values = [torch.empty(size) for _ in model.blocks]
        self.valid = torch.cat((valid, torch.ones(rows, slots - filled, dtype=torch.bool)), 1)
        self.used = 0

    def keep(self, rows: Tensor) -> None:
        """Forget all other rows."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.valid = self.valid[rows]


@torch.inference_mode()
def generate(model: LabLlama, prompts: Sequence[Sequence[int]], how: Sampling) -> list[list[int]]:
    """Token ids of one completion per prompt, in order, without ``<eos>``."""
    random = torch.Generator().manual_seed(how.seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), how.batch_size):
        chosen = order[start:start + how.batch_size]
        for i, ids in zip(chosen, _generate_batch(model, [prompts[i] for i in chosen], how, random), strict=True):
            out[i] = ids
    return out


def _generate_batch(model: LabLlama, prompts: list[Sequence[int]], how: Sampling,
                    random: torch.Generator) -> list[list[int]]:
    ids, valid = _left_padded(prompts)
    cache = _Cache(model, valid, ids.shape[1] + how.max_tokens)
    out: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts))
    for step in range(how.max_tokens):
        ids = _choose(_last_logits(model, ids, cache), how.temperature, random)
        for row, token in zip(alive.tolist(), ids[:, 0].tolist(), strict=True):
            out[row].append(token)
        if step % _COMPACT_EVERY == 0:
            going = torch.tensor([EOS not in out[row] for row in alive.tolist()])
            if not going.any():
                break
            cache.keep(going)
            ids, alive = ids[going], alive[going]
    return [tokens[:tokens.index(EOS)] if EOS in tokens else tokens for tokens in out]


def _left_padded(prompts: list[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    valid = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, valid


def _choose(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)


def _last_logits(model: LabLlama, ids: Tensor, cache: _Cache) -> Tensor:
    """Logits [rows, vocab] after the new tokens ``ids`` [rows, time], whose keys and values join the cache."""
    start, end = cache.used, cache.used + ids.shape[1]
    slots = torch.arange(start, end)
    cos, sin = model.cos[slots], model.sin[slots]               # relative, so padding may count
    mask = cache.valid[:, None, None, :end] & (torch.arange(end) <= slots[:, None])
    mask = mask | (torch.arange(end) == slots[:, None])         # padding looks at itself: no empty rows
    x = model.embed(ids)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x = x + block.out(_attend(block, block.qkv(block.norm1(x)), cos, sin, mask, cache, i))
        x = x + block.mlp(block.norm2(x))
    cache.used = end
    return F.linear(model.norm(x[:, -1]), model.embed.weight)


def _attend(block: Block, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: _Cache, layer: int) -> Tensor:
    s, (rows, time, _) = block.shape, qkv.shape
    heads = qkv.view(rows, time, -1, s.head_dim).transpose(1, 2)
    qk, v = heads[:, :-s.num_kv_heads], heads[:, -s.num_kv_heads:]
    qk = qk * cos + rotate_half(qk) * sin
    end = cache.used + time
    cache.keys[layer][:, :, cache.used:end] = qk[:, s.num_heads:]
    cache.values[layer][:, :, cache.used:end] = v
    keys, values = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
    mixed = F.scaled_dot_product_attention(qk[:, :s.num_heads], keys, values, attn_mask=mask, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(rows, time, -1)
