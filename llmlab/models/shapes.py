"""The architecture table, and `ModelShape` from and to a Hugging Face `config.json`.

No torch and no numpy here: the simulator and the command line read shapes without loading either.
To add a family that differs from these only in what a `ModelShape` says, add one row to `FAMILIES`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from llmlab.models.model_shape import DTYPE_BYTES, FULL_ATTENTION, ModelShape, RopeShape
from llmlab.types import ModelError

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


Config = Mapping[str, Any]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the architecture table: what tells this family from a Llama.

    `defaults`: values that published configs of this family leave out. `slides(config, layer)`: whether
    the layer has the sliding window, where the config has no `layer_types`. `layout` names the style in
    which transformers stores the weights (see `llmlab.models.weights`).
    """

    name: str
    architecture: str
    model_type: str
    defaults: dict[str, Any] = {}
    slides: Callable[[Config, int], bool] | None = None
    qkv_bias: bool | None = None
    qk_norm: bool = False
    gemma_norms: bool = False
    post_norms: bool = False
    activation: str = ""
    renormalize: bool | None = None
    rope_names: dict[str, str] = {}
    layout: str = "split"


_BASE = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
_GEMMA = {
    **_BASE,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "vocab_size": 256_000,
}
_QWEN = {**_BASE, "max_position_embeddings": 32_768, "use_sliding_window": False, "max_window_layers": 28}


def _every_layer(config: Config, layer: int) -> bool:
    return True


def _late_layers(config: Config, layer: int) -> bool:
    return bool(layer >= config["max_window_layers"])


def _all_but_each_nth(config: Config, layer: int) -> bool:
    return bool((layer + 1) % int(config["sliding_window_pattern"]) != 0)


FAMILIES: tuple[Family, ...] = (
    Family(name="llama", architecture="LlamaForCausalLM", model_type="llama", defaults=_BASE),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        model_type="mistral",
        defaults={
            **_BASE,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
        },
        slides=_every_layer,
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        defaults={
            **_BASE,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131_072,
        },
        slides=_every_layer,
        renormalize=True,
        layout="mixtral",
    ),
    Family(
        name="qwen2",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        defaults=_QWEN,
        slides=_late_layers,
        qkv_bias=True,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        defaults={**_QWEN, "head_dim": 128},
        slides=_late_layers,
        qk_norm=True,
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        slides=_every_layer,
        qk_norm=True,
    ),
    Family(
        name="gemma",
        architecture="GemmaForCausalLM",
        model_type="gemma",
        defaults=_GEMMA,
        gemma_norms=True,
        activation="gelu_tanh",  # early configs say "gelu" and mean the tanh form
    ),
    Family(
        name="gemma2",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        defaults={
            **_GEMMA,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
        slides=_all_but_each_nth,
        gemma_norms=True,
        post_norms=True,
    ),
    Family(
        name="gemma3",
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        defaults={
            **_GEMMA,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        slides=_all_but_each_nth,
        qk_norm=True,
        gemma_norms=True,
        post_norms=True,
    ),
    Family(
        name="phi3",
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        defaults={**_BASE, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        slides=_every_layer,
        rope_names={"su": "longrope", "yarn": "longrope"},  # what early files called it
        layout="fused",
    ),
)


def family_of(config: Config) -> Family:
    """The row of the table for a config: by `architectures[0]`, or by `model_type` where that is missing."""
    named = list(config.get("architectures") or [])
    for family in FAMILIES:
        if family.architecture in named[:1] or (not named and family.model_type == config.get("model_type")):
            return family
    field, value = ("architectures", named[0]) if named else ("model_type", config.get("model_type"))
    known = [f.architecture if named else f.model_type for f in FAMILIES]
    near = difflib.get_close_matches(str(value), known, 1, 0.0)[0]
    raise ModelError(
        f"config.json: {field}",
        value,
        f"unsupported architecture; the nearest supported one is {near!r}",
        f"Supported: {', '.join(known)}. Another family is one row of FAMILIES in llmlab/models/shapes.py.",
    )


def _config_error(field: str, value: object, problem: str, way_out: str) -> ModelError:
    return ModelError(f"config.json: {field}", value, problem, way_out)


def _positive(config: Config, *names: str) -> int:
    """The first of `names` that the config has, as a positive int."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _config_error(name, value, "not a positive integer", "Mend the file or fetch it again.")
        return value
    raise _config_error(names[0], None, "the field is missing", "The model cannot be built without it.")


def _rope_dict(config: Config, layer_type: str) -> dict[str, Any]:
    """RoPE parameters of one layer type, from `rope_parameters` or the older `rope_theta`, `rope_scaling`."""
    given = dict(config.get("rope_parameters") or {})
    nested = given.get(layer_type)
    if isinstance(nested, dict):
        return {"rope_theta": _theta(config, layer_type), **nested}
    if given and not any(isinstance(v, dict) for v in given.values()):
        return {"rope_theta": _theta(config, layer_type), **given}
    local = layer_type == "sliding_attention" and "rope_local_base_freq" in config
    scaling = {} if local else dict(config.get("rope_scaling") or {})
    return {"rope_theta": _theta(config, layer_type), **scaling}


def _theta(config: Config, layer_type: str) -> float:
    local = config.get("rope_local_base_freq") if layer_type == "sliding_attention" else None
    return float(local or config["rope_theta"])


def _rope(config: Config, family: Family, layer_type: str, head_dim: int) -> RopeShape:
    raw = _rope_dict(config, layer_type)
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    kind = family.rope_names.get(kind, kind)
    partial = float(raw.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2:
        problem = f"of head_dim {head_dim} this turns {rotary_dim} dimensions, but they turn in pairs"
        raise _config_error("partial_rotary_factor", partial, problem, "Mend the file or fetch it again.")
    base = RopeShape(theta=float(raw["rope_theta"]), rotary_dim=rotary_dim, kind=kind)
    if kind == "default":
        return base
    if kind not in _SCALINGS:
        raise _unknown_rope(kind)
    longest = config["max_position_embeddings"]
    original = int(
        raw.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or longest
    )
    fields = _SCALINGS[kind]({**raw, "max_position": longest, "original": original})
    return msgspec.structs.replace(base, original_max_position=original, **fields)


def _unknown_rope(kind: str) -> ModelError:
    why = (
        "it changes the angles of keys that are already in the cache as a sequence grows"
        if kind == "dynamic"
        else "it is unknown"
    )
    way_out = (
        f"Supported: default, {', '.join(_SCALINGS)}. Without rope_scaling the model works up to its "
        "original length; 'yarn' extends it statically."
    )
    return _config_error("rope_type", kind, f"not supported: {why}", way_out)


def _needed(raw: Config, name: str) -> Any:
    if raw.get(name) is None:
        problem = f"the field is missing for rope_type {raw.get('rope_type') or raw.get('type')!r}"
        raise _config_error(f"rope_parameters.{name}", None, problem, "Add it or fetch the file again.")
    return raw[name]


def _linear_rope(raw: Config) -> dict[str, Any]:
    return {"factor": float(_needed(raw, "factor"))}


def _llama3_rope(raw: Config) -> dict[str, Any]:
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {name: float(_needed(raw, name)) for name in names}


def _yarn_rope(raw: Config) -> dict[str, Any]:
    factor = float(raw.get("factor") or raw["max_position"] / raw["original"])
    scale, scale_all = raw.get("mscale"), raw.get("mscale_all_dim")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    inferred = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
    return {
        "factor": factor,
        "beta_fast": float(raw.get("beta_fast") or 32.0),
        "beta_slow": float(raw.get("beta_slow") or 1.0),
        "truncate": bool(raw.get("truncate", True)),
        "attention_factor": float(raw.get("attention_factor") or inferred),
    }


def _longrope(raw: Config) -> dict[str, Any]:
    factor = float(raw.get("factor") or raw["max_position"] / raw["original"])
    inferred = math.sqrt(1 + math.log(factor) / math.log(raw["original"])) if factor > 1 else 1.0
    return {
        "factor": factor,
        "attention_factor": float(raw.get("attention_factor") or inferred),
        "short_factor": tuple(float(x) for x in _needed(raw, "short_factor")),
        "long_factor": tuple(float(x) for x in _needed(raw, "long_factor")),
    }


_SCALINGS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "linear": _linear_rope,
    "llama3": _llama3_rope,
    "yarn": _yarn_rope,
    "longrope": _longrope,
}


def _layer_types(config: Config, family: Family, num_layers: int) -> list[str]:
    """ "full_attention" or "sliding_attention" of every layer."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if family.slides is None or not window:
        return ["full_attention"] * num_layers
    types = config.get("layer_types")
    if types is None:
        slides = family.slides
        return ["sliding_attention" if slides(config, i) else "full_attention" for i in range(num_layers)]
    odd = [t for t in types if t not in ("full_attention", "sliding_attention")]
    if odd or len(types) != num_layers:
        expected = f"expected {num_layers} entries of 'full_attention' or 'sliding_attention'"
        raise _config_error("layer_types", odd or types, expected, "Other kinds of layers are not supported.")
    return list(types)


def _moe_fields(config: Config, family: Family, num_layers: int) -> dict[str, Any]:
    if not (config.get("num_local_experts") or config.get("num_experts")):
        return {}
    experts, top_k = (
        _positive(config, "num_local_experts", "num_experts"),
        _positive(config, "num_experts_per_tok"),
    )
    if top_k > experts:
        raise _config_error(
            "num_experts_per_tok", top_k, f"more than the {experts} experts", "Mend the file."
        )
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return {
        "num_experts": experts,
        "top_k": top_k,
        "moe_intermediate_size": _positive(config, "moe_intermediate_size", "intermediate_size"),
        "renormalize": bool(
            config.get("norm_topk_prob") if family.renormalize is None else family.renormalize
        ),
        "moe_layers": tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers)),
    }


def _activation(config: Config, family: Family) -> str:
    name = family.activation or config.get("hidden_activation") or config["hidden_act"]
    if name not in ACTIVATIONS:
        raise _config_error("hidden_act", name, "not supported", f"Supported: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _dtype(config: Config) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"


def _attention_fields(config: Config, family: Family, num_layers: int) -> dict[str, Any]:
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", "num_attention_heads")
    if heads % kv_heads:
        problem = f"does not divide num_attention_heads {heads}"
        raise _config_error("num_key_value_heads", kv_heads, problem, "Mend the file or fetch it again.")
    head_dim = _positive({**config, "derived": hidden // heads}, "head_dim", "derived")
    types = _layer_types(config, family, num_layers)
    rope_of = {kind: _rope(config, family, kind, head_dim) for kind in sorted(set(types))}
    ropes = list(dict.fromkeys(rope_of.values()))
    bias = bool(config.get("attention_bias", False))
    return {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ropes": tuple(ropes),
        "layer_ropes": tuple(ropes.index(rope_of[t]) for t in types),
        "layer_windows": tuple(
            config["sliding_window"] if t == "sliding_attention" else FULL_ATTENTION for t in types
        ),
        "query_scale": float(config.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        "attn_softcap": config.get("attn_logit_softcapping"),
        "qk_norm": family.qk_norm,
        "qkv_bias": bias if family.qkv_bias is None else family.qkv_bias,
        "output_bias": bias,
    }


def from_hf_config(config: Config) -> ModelShape:
    """Read a `config.json` (of transformers 4 or 5). Raises ModelError naming the field and the value."""
    family = family_of(config)
    full = {**family.defaults, **config}
    if full.get("quantization_config"):
        method = full["quantization_config"].get("quant_method")
        way_out = "Take the checkpoint in float32, bfloat16 or float16 that they were made from."
        raise _config_error("quantization_config", method, "quantized weights are not supported", way_out)
    num_layers, hidden = _positive(full, "num_hidden_layers"), _positive(full, "hidden_size")
    return ModelShape(
        family=family.name,
        architecture=family.architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        intermediate_size=_positive(full, "intermediate_size"),
        vocab_size=_positive(full, "vocab_size"),
        max_position=_positive(full, "max_position_embeddings"),
        tie_word_embeddings=bool(full["tie_word_embeddings"]),
        rms_norm_eps=float(full["rms_norm_eps"]),
        activation=_activation(full, family),
        mlp_bias=bool(full.get("mlp_bias", False)),
        norm_offset=1.0 if family.gemma_norms else 0.0,
        embedding_scale=math.sqrt(hidden) if family.gemma_norms else 1.0,
        post_norms=family.post_norms,
        final_softcap=full.get("final_logit_softcapping"),
        dtype=_dtype(full),
        **_attention_fields(full, family, num_layers),
        **_moe_fields(full, family, num_layers),
    )


def _rope_scaling(rope: RopeShape) -> dict[str, Any]:
    """The `rope_scaling` entry that reads back as this rope."""
    neutral = RopeShape(theta=rope.theta, rotary_dim=rope.rotary_dim)
    fields = msgspec.structs.asdict(rope)
    changed = {k: v for k, v in fields.items() if v != getattr(neutral, k) and k not in ("kind", "factor")}
    changed["original_max_position_embeddings"] = changed.pop("original_max_position")
    if rope.kind == "llama3":
        changed |= {k: fields[k] for k in ("low_freq_factor", "high_freq_factor")}
    if rope.kind in ("yarn", "longrope"):
        changed["attention_factor"] = rope.attention_factor
    return {"rope_type": rope.kind, "factor": rope.factor, **changed}


def _rope_fields(shape: ModelShape, family: Family) -> dict[str, Any]:
    of_window = {bool(w): shape.ropes[r] for w, r in zip(shape.layer_windows, shape.layer_ropes, strict=True)}
    rope = of_window.get(False, shape.ropes[0])
    fields: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.kind != "default":
        fields["rope_scaling"] = _rope_scaling(rope)
        fields["original_max_position_embeddings"] = rope.original_max_position
    if rope.rotary_dim != shape.head_dim:
        fields["partial_rotary_factor"] = rope.rotary_dim / shape.head_dim
    if "rope_local_base_freq" in family.defaults:
        fields["rope_local_base_freq"] = of_window.get(True, rope).theta
    return fields


def _window_fields(shape: ModelShape) -> dict[str, Any]:
    window = max(shape.layer_windows) or None
    types = ["sliding_attention" if w else "full_attention" for w in shape.layer_windows]
    fields: dict[str, Any] = {"sliding_window": window, "use_sliding_window": window is not None}
    return {**fields, "layer_types": types} if len(set(types)) == 2 else fields


def _moe_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_local_experts": shape.num_experts,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "norm_topk_prob": shape.renormalize,
        "mlp_only_layers": [i for i, moe in enumerate(shape.moe_layers) if not moe],
    }


def to_hf_config(shape: ModelShape) -> dict[str, Any]:
    """A `config.json` that this module, transformers 4 and 5, and llama.cpp's converter read as this shape."""
    family = next(f for f in FAMILIES if f.name == shape.family)
    activation = "gelu_pytorch_tanh" if shape.activation == "gelu_tanh" else shape.activation
    return {
        "architectures": [shape.architecture],
        "model_type": family.model_type,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": shape.output_bias,
        "mlp_bias": shape.mlp_bias,
        "query_pre_attn_scalar": round(shape.query_scale**-2),
        "attn_logit_softcapping": shape.attn_softcap,
        "final_logit_softcapping": shape.final_softcap,
        "torch_dtype": shape.dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **_rope_fields(shape, family),
        **_window_fields(shape),
        **(_moe_config(shape) if shape.num_experts else {}),
    }
