"""Model shapes: the integers from which every byte and flop of a transformer follows. No arrays, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from roofline.errors import RooflineError, nearest
from roofline.precision import Precision


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder-only transformer.

    ``head_dim`` is the width of one query head (and of one value head). With ``kv_lora_rank`` > 0 attention is
    multi-head latent: the cache holds ``kv_lora_rank + rope_head_dim`` elements per token and layer.
    ``positions`` > 0 means learned positions (that many rows) in place of rotary ones.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = False
    gated: bool = True
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: bool = False
    positions: int = 0
    num_experts: int = 0
    top_k: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    first_dense_layers: int = 0
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise RooflineError(f"{self.name}: {field} must be at least 1, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise RooflineError(
                f"{self.name}: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_experts and not 0 < self.top_k <= self.num_experts:
            raise RooflineError(f"{self.name}: top_k must lie in 1..{self.num_experts}, got {self.top_k}")

    @property
    def latent(self) -> bool:
        """Whether the cache holds a compressed latent (multi-head latent attention)."""
        return self.kv_lora_rank > 0

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * (self.head_dim + (self.rope_head_dim if self.latent else 0))

    @property
    def kv_elements(self) -> int:
        """Cache elements per token and layer."""
        if self.latent:
            return self.kv_lora_rank + self.rope_head_dim
        return 2 * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: str = "fp16") -> float:
        """Return the cache bytes of one token over all layers; ``dtype`` may be a width code (``"w8a8kv8"``)."""
        return self.num_layers * self.kv_elements * Precision.parse(dtype).kv_bytes

    def is_moe(self, layer: int) -> bool:
        """Return whether ``layer`` has experts."""
        return self.num_experts > 0 and layer >= self.first_dense_layers

    def moe_layers(self, start: int = 0, stop: int | None = None) -> int:
        """Return how many layers of the half-open span have experts."""
        stop = self.num_layers if stop is None else stop
        return max(0, stop - max(start, self.first_dense_layers)) if self.num_experts else 0

    def attention_params(self) -> int:
        """Return the parameters of one attention block, without norms before it."""
        d, h = self.hidden_size, self.num_heads * self.head_dim
        if self.latent:
            down = d * self.kv_elements + self.kv_lora_rank
            return d * self.q_size + down + self.kv_lora_rank * 2 * h + h * d
        kv = 2 * self.num_kv_heads * self.head_dim
        bias = {"none": 0, "qkv": h + kv, "all": h + kv + d}[self.bias]
        return d * (h + kv) + h * d + bias + (2 * self.head_dim if self.qk_norm else 0)

    def mlp_params(self, moe: bool) -> int:
        """Return the parameters of one feed-forward block; ``moe`` counts every expert and the router."""
        d, f = self.hidden_size, self.intermediate_size
        if not moe:
            return (3 if self.gated else 2) * d * f + (f + d if self.bias == "all" else 0)
        experts = self.num_experts + self.num_shared_experts
        return d * self.num_experts + experts * 3 * d * self.moe_intermediate_size

    def embedding_params(self) -> int:
        """Return the parameters outside the layers: tables, head and last norm."""
        tables = self.vocab_size * (1 if self.tied else 2) + self.positions
        return self.hidden_size * (tables + self._norm_rows)

    @property
    def _norm_rows(self) -> int:
        return 2 if self.bias == "all" else 1  # LayerNorm has a bias, RMSNorm has none

    def num_params(self, active: bool = False) -> int:
        """Return the number of parameters; ``active`` counts only the experts that one token uses."""
        moe = self.moe_layers()
        norms = self.num_layers * 2 * self._norm_rows * self.hidden_size
        total = self.num_layers * self.attention_params() + norms + self.embedding_params()
        total += (self.num_layers - moe) * self.mlp_params(False) + moe * (self.mlp_params(True) if moe else 0)
        idle = self.num_experts - self.top_k
        return total - (moe * idle * 3 * self.hidden_size * self.moe_intermediate_size if active else 0)

    def weight_bytes(self, dtype: str = "fp16") -> float:
        """Return the bytes of all parameters in ``dtype``."""
        return self.num_params() * Precision.parse(dtype).weight_bytes


def _llama(name: str, d: int, layers: int, heads: int, kv: int, f: int, vocab: int, src: str, **kw: Any) -> Shape:
    head_dim = kw.pop("head_dim", d // heads)
    return Shape(name, d, layers, heads, kv, head_dim, f, vocab, source=src, **kw)


def _opt(name: str, d: int, layers: int, heads: int, src: str) -> Shape:
    return Shape(
        name, d, layers, heads, heads, d // heads, 4 * d, 50272, tied=True, gated=False, bias="all",
        positions=2050, source=src,
    )  # fmt: skip


def _lab(name: str, d: int, layers: int, heads: int, kv: int, f: int) -> Shape:
    return Shape(name, d, layers, heads, kv, 32, f, 512, tied=True, source="this project's tiny models")


def table() -> dict[str, Shape]:
    """Return every known shape by name. Each names the public ``config.json`` its integers come from."""
    hub = "config.json of "
    shapes = (
        _lab("lab-xs", 96, 3, 3, 1, 256),
        _lab("lab-s", 128, 6, 4, 2, 384),
        _lab("lab-m", 256, 6, 8, 4, 704),
        _lab("lab-l", 320, 7, 10, 2, 896),
        _llama("llama-2-7b", 4096, 32, 32, 32, 11008, 32000, hub + "meta-llama/Llama-2-7b-hf"),
        _llama("llama-2-13b", 5120, 40, 40, 40, 13824, 32000, hub + "meta-llama/Llama-2-13b-hf"),
        _llama("llama-2-70b", 8192, 80, 64, 8, 28672, 32000, hub + "meta-llama/Llama-2-70b-hf"),
        _llama(
            "llama-3.2-1b", 2048, 16, 32, 8, 8192, 128256, hub + "meta-llama/Llama-3.2-1B", head_dim=64, tied=True
        ),
        _llama("llama-3.1-8b", 4096, 32, 32, 8, 14336, 128256, hub + "meta-llama/Llama-3.1-8B"),
        _llama("llama-3.1-70b", 8192, 80, 64, 8, 28672, 128256, hub + "meta-llama/Llama-3.1-70B"),
        _llama("qwen2.5-7b", 3584, 28, 28, 4, 18944, 152064, hub + "Qwen/Qwen2.5-7B", bias="qkv"),
        _llama("qwen2.5-14b", 5120, 48, 40, 8, 13824, 152064, hub + "Qwen/Qwen2.5-14B", bias="qkv"),
        _llama("qwen3-8b", 4096, 36, 32, 8, 12288, 151936, hub + "Qwen/Qwen3-8B", head_dim=128, qk_norm=True),
        _llama(
            "qwen3-30b-a3b", 2048, 48, 32, 4, 6144, 151936, hub + "Qwen/Qwen3-30B-A3B",
            head_dim=128, qk_norm=True, num_experts=128, top_k=8, moe_intermediate_size=768,
        ),
        _llama(
            "mixtral-8x7b", 4096, 32, 32, 8, 14336, 32000, hub + "mistralai/Mixtral-8x7B-v0.1",
            num_experts=8, top_k=2, moe_intermediate_size=14336,
        ),
        _llama(
            "deepseek-v2-lite", 2048, 27, 16, 16, 10944, 102400, hub + "deepseek-ai/DeepSeek-V2-Lite",
            num_experts=64, top_k=6, moe_intermediate_size=1408, num_shared_experts=2, first_dense_layers=1,
            kv_lora_rank=512, rope_head_dim=64,
        ),
        _opt("opt-6.7b", 4096, 32, 32, hub + "facebook/opt-6.7b"),
        _opt("opt-13b", 5120, 40, 40, hub + "facebook/opt-13b"),
        _opt("opt-30b", 7168, 48, 56, hub + "facebook/opt-30b"),
    )  # fmt: skip
    return {shape.name: shape for shape in shapes}


def names() -> list[str]:
    """Return the known names."""
    return list(table())


def _plain(name: str) -> str:
    tail = name.lower().rsplit("/", 1)[-1]
    tail = re.sub(r"(meta|instruct|chat|base|hf|v0\.1|it)(?=$|[-_])", "", tail)
    return re.sub(r"[^a-z0-9.]", "", tail).removesuffix(".")


def get(name: str | Shape) -> Shape:
    """Look up a shape by name, hub id or a looser spelling (``"Llama2 7B"``, ``"Qwen/Qwen3-8B"``).

    Raises :class:`RooflineError` with the nearest names if nothing matches.
    """
    if isinstance(name, Shape):
        return name
    known = table()
    plain = {_plain(key): shape for key, shape in known.items()}
    found = known.get(name) or plain.get(_plain(name))
    if found is None:
        near = ", ".join(nearest(name.lower(), known))
        raise RooflineError(
            f"unknown model shape {name!r}: the nearest names are {near}; "
            "a shape of your own: roofline.Shape(...) or roofline.shapes.from_config(config)"
        )
    return found


_CONFIG_NAMES = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size", "tie_word_embeddings": "tied", "num_experts": "num_experts",
    "num_local_experts": "num_experts", "n_routed_experts": "num_experts", "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "moe_intermediate_size", "n_shared_experts": "num_shared_experts",
    "first_k_dense_replace": "first_dense_layers", "kv_lora_rank": "kv_lora_rank",
    "qk_rope_head_dim": "rope_head_dim", "qk_nope_head_dim": "head_dim", "ffn_dim": "intermediate_size",
}  # fmt: skip


def from_config(config: Mapping[str, Any], name: str = "custom") -> Shape:
    """Build a shape from the mapping in a Hugging Face ``config.json``; a missing size raises and is named."""
    values = {ours: config[theirs] for theirs, ours in _CONFIG_NAMES.items() if config.get(theirs) is not None}
    values.setdefault("num_kv_heads", values.get("num_heads"))
    missing = [f for f in ("hidden_size", "num_layers", "num_heads", "vocab_size") if f not in values]
    if missing:
        raise RooflineError(f"{name}: the configuration lacks {', '.join(missing)}")
    values.setdefault("head_dim", values["hidden_size"] // values["num_heads"])
    if values.get("num_experts"):
        values.setdefault("moe_intermediate_size", values.get("intermediate_size", 0))
    values.update(_family_traits(str(config.get("model_type", ""))))
    known = {f.name for f in fields(Shape)}
    return Shape(name=name, source="given configuration", **{k: v for k, v in values.items() if k in known})


def _family_traits(model_type: str) -> dict[str, Any]:
    """Return what a family fixes without a field in its configuration."""
    if model_type == "opt":
        return {"gated": False, "bias": "all", "positions": 2050, "tied": True}
    if model_type in ("qwen2", "qwen2_moe"):
        return {"bias": "qkv"}
    return {"qk_norm": True} if model_type in ("qwen3", "qwen3_moe") else {}
