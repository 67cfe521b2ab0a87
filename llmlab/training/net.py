"""A compact trainable Llama: the same arithmetic as ``LlamaForCausalLM``, with fused projections.

Fusing q, k, v (and gate, up) into one matrix halves the number of small matrix products, which is what costs
time on a CPU at these sizes. ``to_llama`` and ``from_llama`` change between the two layouts without loss.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a lab model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int = 512
    head_dim: int = 32
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    num_experts: int = 0        # 0: one dense feed-forward network a layer
    top_k: int = 0              # experts that a token takes

    @property
    def num_params(self) -> int:
        """Parameters, with the embedding counted once (it is also the output layer)."""
        d, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        q = self.num_heads * self.head_dim
        mlp = 3 * d * self.intermediate_size
        if self.num_experts:
            mlp = self.num_experts * (mlp + d)
        layer = d * (q + 2 * kv) + q * d + mlp + 2 * d
        return self.vocab_size * d + self.num_layers * layer + d

    def llama_config(self) -> dict[str, object]:
        """The content of a Hugging Face ``config.json``: of a Llama, or of a Mixtral if there are experts."""
        s = asdict(self)
        kind: dict[str, object] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.num_experts:
            kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None,
                    "num_local_experts": self.num_experts, "num_experts_per_tok": self.top_k}
        return {**kind, "hidden_act": "silu",
                "hidden_size": s["hidden_size"], "num_hidden_layers": s["num_layers"],
                "num_attention_heads": s["num_heads"], "num_key_value_heads": s["num_kv_heads"],
                "intermediate_size": s["intermediate_size"], "vocab_size": s["vocab_size"],
                "head_dim": s["head_dim"], "max_position_embeddings": s["max_positions"],
                "rope_theta": s["rope_theta"], "rms_norm_eps": s["norm_eps"], "tie_word_embeddings": True,
                "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}


BALANCE = 1e-3      # how much an uneven use of experts counts: enough that none dies, little enough to leave a skew

SHAPES = {
    "lab-xs": Shape(96, 3, 3, 1, 256),
    "lab-s": Shape(128, 6, 4, 2, 384),
    "lab-m": Shape(256, 6, 8, 4, 704),
    "lab-moe": Shape(192, 6, 6, 2, 256, num_experts=8, top_k=2),
}


def shape_of(name: str) -> Shape:
    """The shape of a lab model by name.

    Raises:
        ValueError: if there is no such model.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown lab model {name!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


class Norm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]"""
        f = x.float()
        return self.weight * (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GatedMLP(nn.Module):
    """A dense gated feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=False)
        self.down = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def split(self) -> dict[str, Tensor]:
        """Views of the weights under the names that transformers uses."""
        gate, up = self.gate_up.weight.chunk(2)
        return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": self.down.weight}


class Experts(nn.Module):
    """`num_experts` gated networks, of which each token takes `top_k`, weighted by a softmax over their router scores.

    `imbalance`: of the last call, 1 when all experts are taken equally often, more when they are not.
    """

    imbalance: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        count, d, ff = shape.num_experts, shape.hidden_size, shape.intermediate_size
        self.router = nn.Linear(d, count, bias=False)
        self.gate_up = nn.Parameter(torch.empty(count, 2 * ff, d))
        self.down = nn.Parameter(torch.empty(count, d, ff))
        self.imbalance = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]; tokens are sorted by expert, so that each expert is one pair of matrix products."""
        s, flat = self.shape, x.reshape(-1, x.shape[-1])
        scores, chosen = (probs := self.router(flat).float().softmax(-1)).topk(s.top_k, -1)
        order = chosen.flatten().argsort()
        tokens, counts = order // s.top_k, torch.bincount(chosen.flatten(), minlength=s.num_experts)
        parts = [self._expert(i, part) for i, part in enumerate(flat[tokens].split(counts.tolist()))]
        weight = (scores / scores.sum(-1, keepdim=True)).flatten()[order, None].to(x.dtype)
        self.imbalance = s.num_experts * (counts / counts.sum() * probs.mean(0)).sum()
        return torch.zeros_like(flat).index_add(0, tokens, torch.cat(parts) * weight).view(x.shape)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up[index]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down[index])

    def split(self) -> dict[str, Tensor]:
        """Views of the weights under the names of Mixtral."""
        out, at = {"block_sparse_moe.gate.weight": self.router.weight}, "block_sparse_moe.experts."
        for i in range(self.shape.num_experts):
            gate, up = self.gate_up[i].chunk(2)
            out |= {f"{at}{i}.w1.weight": gate, f"{at}{i}.w3.weight": up, f"{at}{i}.w2.weight": self.down[i]}
        return out


class Block(nn.Module):
    """One layer: attention and a gated MLP or experts, both with a norm before and a residual around."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        q = shape.num_heads * shape.head_dim
        self.norm1, self.norm2 = Norm(d, shape.norm_eps), Norm(d, shape.norm_eps)
        self.qkv, self.out = nn.Linear(d, q + 2 * kv, bias=False), nn.Linear(q, d, bias=False)
        self.mlp: GatedMLP | Experts = Experts(shape) if shape.num_experts else GatedMLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, time, d] -> [batch, time, d]; cos, sin: [time, head_dim]"""
        x = x + self.out(self._attend(self.qkv(self.norm1(x)), cos, sin))
        return x + self.mlp(self.norm2(x))

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, time, _) = self.shape, qkv.shape
        heads = qkv.view(batch, time, -1, s.head_dim).transpose(1, 2)
        qk, v = heads[:, :-s.num_kv_heads], heads[:, -s.num_kv_heads:]
        qk = qk * cos + rotate_half(qk) * sin
        mixed = _causal_attention(qk[:, :s.num_heads], qk[:, s.num_heads:], v)
        return mixed.transpose(1, 2).reshape(batch, time, -1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [batch, heads, time, head_dim], k and v [batch, kv_heads, time, head_dim] -> as q.

    Scores are kept whole: at these lengths two bfloat16 matrix products and a softmax take a ninth of the time
    of the fused CPU kernel and its backward pass. The query heads of a group are stacked along time.
    """
    (batch, heads, time, dim), kv_heads = q.shape, k.shape[1]
    groups = heads // kv_heads
    bias = torch.full((time, time), float("-inf"), dtype=q.dtype, device=q.device).triu(1).repeat(groups, 1)
    q = q.reshape(batch * kv_heads, groups * time, dim)
    k, v = k.reshape(batch * kv_heads, time, dim), v.reshape(batch * kv_heads, time, dim)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=dim ** -0.5)
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, time, dim)


def rotate_half(x: Tensor) -> Tensor:
    """The other half of the rotation of ``rotary`` positions, in the convention of transformers."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class LabLlama(nn.Module):
    """The model. Rows are padded on the right; with causal attention the padding touches nothing."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        cos, sin = _rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        small = 0.02 / (2 * self.shape.num_layers) ** 0.5       # for what is added to the residual stream
        if isinstance(module, GatedMLP):
            nn.init.normal_(module.down.weight, std=small)
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up, std=0.02)
            nn.init.normal_(module.down, std=small)
        if isinstance(module, Block):
            nn.init.normal_(module.out.weight, std=small)

    def hidden(self, ids: Tensor) -> Tensor:
        """Token ids [batch, time] -> normed hidden states [batch, time, d]."""
        time = ids.shape[1]
        x = self.embed(ids)
        cos, sin = self.cos[:time].to(x.dtype), self.sin[:time].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, time] -> logits [batch, time, vocab]."""
        return F.linear(self.hidden(ids), self.embed.weight)

    def loss(self, ids: Tensor, learn: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens ``ids[:, t]`` where ``learn[:, t]``, given those before them."""
        at = learn[:, 1:]
        logits = F.linear(self.hidden(ids[:, :-1])[at], self.embed.weight)
        loss = F.cross_entropy(logits.float(), ids[:, 1:][at])
        routed = [block.mlp for block in self.blocks if isinstance(block.mlp, Experts)]
        return loss + BALANCE * sum((experts.imbalance for experts in routed), torch.zeros(()))


def _rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    inverse = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.outer(torch.arange(shape.max_positions).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def to_llama(model: LabLlama) -> dict[str, Tensor]:
    """The weights under the names of ``LlamaForCausalLM`` or ``MixtralForCausalLM`` (the tied output layer is left out)."""
    out = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        out.update({f"model.layers.{i}.{name}": w for name, w in _split_block(block).items()})
    return {name: w.detach().clone().contiguous() for name, w in out.items()}


def from_llama(shape: Shape, weights: dict[str, Tensor]) -> LabLlama:
    """The inverse of ``to_llama``, in float32."""
    model = LabLlama(shape)
    with torch.no_grad():
        model.embed.weight.copy_(weights["model.embed_tokens.weight"])
        model.norm.weight.copy_(weights["model.norm.weight"])
        for i, block in enumerate(model.blocks):
            for name, view in _split_block(block).items():
                view.copy_(weights[f"model.layers.{i}.{name}"])
    return model


def _split_block(block: nn.Module) -> dict[str, Tensor]:
    """Views of a block's weights under the names that transformers uses."""
    assert isinstance(block, Block)
    s = block.shape
    q, kv = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    q_proj, k_proj, v_proj = block.qkv.weight.split([q, kv, kv])
    return {"input_layernorm.weight": block.norm1.weight, "post_attention_layernorm.weight": block.norm2.weight,
            "self_attn.q_proj.weight": q_proj, "self_attn.k_proj.weight": k_proj, "self_attn.v_proj.weight": v_proj,
            "self_attn.o_proj.weight": block.out.weight, **block.mlp.split()}
