"""What a decoder computes, as plain data: `ModelShape` and its `RopeShape`s. Neither torch nor numpy."""

from __future__ import annotations

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FULL_ATTENTION = 0  # a layer window of 0 tokens means "all of the past"


class RopeShape(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding of some layers: which dimensions turn, how fast, and the long-context rule.

    `kind`: default | linear | llama3 | yarn | longrope. `attention_factor` multiplies cos and sin.
    Fields of other kinds keep their neutral values. Sources: arXiv 2104.09864 (RoPE), 2309.00071 (YaRN),
    2402.13753 (LongRoPE), the Llama 3.1 release (llama3).
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what a decoder computes, and nothing about where its weights lie.

    Sizes are counts of elements. `layer_windows[i]`: tokens that layer i sees (its own included),
    0 = all. `layer_ropes[i]`: index into `ropes`. `query_scale` multiplies the attention scores,
    `embedding_scale` the embeddings. `norm_offset` is added to every norm weight (Gemma stores w - 1).
    `post_norms`: the output of attention and MLP is normed before it joins the residual stream.
    `moe_layers[i]` is true where the MLP is a mixture of `num_experts`, of which a token takes `top_k`.
    """

    family: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    ropes: tuple[RopeShape, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int, ...]
    query_scale: float
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    attn_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    num_experts: int = 0
    top_k: int = 0
    moe_intermediate_size: int = 0
    renormalize: bool = False
    moe_layers: tuple[bool, ...] = ()
    dtype: str = "float32"

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.query_size + 2 * self.kv_size

    def is_moe(self, layer: int) -> bool:
        return bool(self.moe_layers) and self.moe_layers[layer]

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of keys and values that one token keeps, over all layers."""
        return 2 * self.num_layers * self.kv_size * DTYPE_BYTES[dtype or self.dtype]

    def num_parameters(self, *, active: bool = False) -> int:
        """Weights of the model; with `active` only those that one token touches (`top_k` experts)."""
        d, q, kv, ff = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        attention = d * (q + 2 * kv) + q * d + self.qkv_bias * (q + 2 * kv) + self.output_bias * d
        norms = d * (4 if self.post_norms else 2) + 2 * self.head_dim * self.qk_norm
        dense = 3 * d * ff + self.mlp_bias * (2 * ff + d)
        experts = self.top_k if active else self.num_experts
        moe = d * self.num_experts + 3 * d * self.moe_intermediate_size * experts
        mlps = sum(moe if self.is_moe(i) else dense for i in range(self.num_layers))
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + norms) + mlps + tables + d
