"""Plain torch definition of every kernel: slow, short, on any device and dtype; the living definition.

Scores, sums and norms are computed in float32 whatever the dtype of the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.kernels.layout import AttentionMetadata, AttentionState
from llmlab.types import MAX_NODES, LabError

ACTIVATIONS = ("silu", "gelu_tanh")


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last axis; offset 1 for Gemma."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (weight.float() + weight_offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`: the sum is the new residual stream."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset), total


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [T, H, D] with cos, sin [T, rot/2]; dimensions from rot on pass.

    Dimension i turns together with dimension i + rot/2 (the layout of Llama checkpoints at Hugging Face).
    """
    half = cos.shape[-1]
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((low * c - high * s, high * c + low * s), -1).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), -1)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k, v [T, Hkv, D] into caches [num_blocks, Hkv, block_size, D]; slot -1 is skipped."""
    keep = slot_mapping >= 0
    slots, block_size = slot_mapping[keep], k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k[keep].to(k_cache.dtype)
    v_cache[block, :, offset] = v[keep].to(v_cache.dtype)


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> Tensor:
    """Norm per head (if given), rotate q and k, write k and v into the cache; returns the rotated q.

    q [T, Hq, D], k and v [T, Hkv, D] may be views of one qkv tensor (only the last two axes need to be
    dense), which the caller gives up: a fast kernel works in place and returns q itself. q_norm, k_norm [D]; cos, sin [T, rot/2]
    with rot <= D (rot = 0: no positions).
    """
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, weight_offset)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, weight_offset)
    store_kv(rotate_half(k, cos, sin), v, k_cache, v_cache, slot_mapping)
    return rotate_half(q, cos, sin)


def gather_kv(cache: Tensor, block_table: Tensor, seq_len: int) -> Tensor:
    """The first `seq_len` positions of a row as [seq_len, Hkv, D], copied out of its blocks."""
    num_blocks = -(-seq_len // cache.shape[2])
    blocks = cache[block_table[:num_blocks].long()]
    return blocks.transpose(1, 2).flatten(0, 1)[:seq_len]


def visible(q_len: int, kv_len: int, mask: str, sliding_window: int | None, device: torch.device) -> Tensor:
    """Bool [q_len, kv_len]: which key each query sees; the queries are the last positions of the row."""
    own = torch.arange(kv_len - q_len, kv_len, device=device).unsqueeze(1)
    key = torch.arange(kv_len, device=device).unsqueeze(0)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=device) if mask == "full" else key <= own
    return seen if sliding_window is None else seen & (key > own - sliding_window)


def tree_visible(seen: Tensor, forks: Tensor, nodes: Tensor, sliding_window: int | None) -> Tensor:
    """`visible` [q_len, kv_len] with the rows of tree nodes as `TreeMask` tells: `forks`, `nodes` [q_len] int64."""
    seen, key = seen.clone(), torch.arange(seen.shape[1], device=seen.device)
    for i in nodes.nonzero().flatten().tolist():
        fork, bits = int(forks[i]), int(nodes[i])
        place = key - fork
        own = (place >= 0) & (torch.tensor(bits, device=key.device) >> place.clamp(0, MAX_NODES) & 1).bool()
        position = torch.where(place < 0, key, fork - 1 + own.cumsum(0))  # of an ancestor: the fork and its depth
        last = fork - 1 + bits.bit_count()
        seen[i] = (own | (place < 0)) & (position > last - (sliding_window or len(key) + 1))
    return seen


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> AttentionState:
    """Dense attention of one row: q [q_len, Hq, D], k and v [kv_len, Hkv, D], seen [q_len, kv_len].

    Positions that no query sees may hold anything: a sliding window frees their blocks.
    """
    group, unseen = q.shape[1] // k.shape[1], ~seen.any(0)
    k, v = (t.float().masked_fill(unseen[:, None, None], 0.0).repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->qhk", q.float(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen.unsqueeze(1), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1))
    return AttentionState(torch.einsum("qhk,khd->qhd", weights, v).to(q.dtype), lse)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> AttentionState:
    """Attention of ragged queries q [T, Hq, D] over block tables; Hq is a multiple of Hkv.

    A query sees the positions that `meta.mask` allows, of those only the last `sliding_window`
    (its own included); `softcap` bounds the scores as Gemma 2 does. Nodes of a tree see what `meta.tree` says.
    """
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    starts, lens = meta.cu_seqlens_q.tolist(), meta.seq_lens.tolist()
    for row, kv_len in enumerate(lens):
        first, last = starts[row], starts[row + 1]
        if first == last or kv_len == 0:
            continue
        k, v = (gather_kv(cache, meta.block_tables[row], kv_len) for cache in (k_cache, v_cache))
        seen = visible(last - first, kv_len, meta.mask, sliding_window, q.device)
        if meta.tree is not None:
            seen = tree_visible(seen, meta.tree.forks[first:last], meta.tree.seen[first:last], sliding_window)
        state = attend(q[first:last], k, v, seen, scale, softcap)
        out[first:last], lse[first:last] = state.out, state.lse
    return AttentionState(out, lse)


def merge_states(a: AttentionState, b: AttentionState) -> AttentionState:
    """Attention over the union of two disjoint sets of keys; associative, commutative, (0, -inf) neutral.

    Source: FlashInfer, arXiv 2501.01005, section 2.2.
    """
    lse = torch.logaddexp(a.lse, b.lse)
    shift = lse.masked_fill(lse.isinf(), 0.0)
    weight_a = torch.exp(a.lse - shift).unsqueeze(-1)
    weight_b = torch.exp(b.lse - shift).unsqueeze(-1)
    return AttentionState((weight_a * a.out.float() + weight_b * b.out.float()).to(a.out.dtype), lse)


def activation(gate: Tensor, act: str) -> Tensor:
    """One of ACTIVATIONS, in float32."""
    if act == "silu":
        return F.silu(gate.float())
    if act == "gelu_tanh":
        return F.gelu(gate.float(), approximate="tanh")
    raise LabError("act", act, "is not an activation", f"choose one of {', '.join(ACTIVATIONS)}")


def gated_act(gate_up: Tensor, act: str = "silu") -> Tensor:
    """`act(gate) * up` for gate_up [T, 2F], gate first; returns [T, F]."""
    gate, up = gate_up.chunk(2, -1)
    return (activation(gate, act) * up.float()).to(gate_up.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x [T, in], weight [out, in], bias [out]."""
    return F.linear(x, weight, bias)


def copy_blocks(src: Tensor, dst: Tensor, pairs: Tensor) -> None:
    """`dst[pairs[i, 1]] = src[pairs[i, 0]]` for pools [num_blocks, ...]; src and dst may be one pool.

    They may lie on different devices. All sources are read before the first write. No destination may appear twice.
    """
    dst[pairs[:, 1].long()] = src[pairs[:, 0].long()].to(dst.device, dst.dtype)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of each token and their weights, both [T, top_k]: softmax first, then top-k.

    `renormalize` makes the kept weights sum to 1 (Mixtral always, Qwen3-MoE if `norm_topk_prob`).
    """
    weights, experts = torch.topk(torch.softmax(router_logits.float(), -1), top_k, -1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), experts


def moe(
    x: Tensor,
    router_logits: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    top_k: int,
    renormalize: bool,
    act: str = "silu",
) -> Tensor:
    """Mixture of gated MLPs: x [T, d], router_logits [T, E], w_gate_up [E, 2F, d], w_down [E, d, F]."""
    weights, experts = route(router_logits, top_k, renormalize)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in sorted(set(experts.flatten().tolist())):
        token, choice = torch.where(experts == expert)
        hidden = gated_act(linear(x[token], w_gate_up[expert]), act)
        y.index_add_(0, token, linear(hidden, w_down[expert]).float() * weights[token, choice, None])
    return y.to(x.dtype)


def draw(
    logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
) -> Tensor:
    """Tokens [n] int64 of logits [n, vocab] float32, one draw `uniform` [n] float64 in [0, 1) each.

    Inverse CDF over what temperature (0: the largest logit), min_p, top_k (<= 0: off; ties with the k-th
    stay) and top_p (1: off) keep, most likely token first, then by id. Probabilities are integer weights,
    floor(2**bits * exp((logit - max) / temperature)), as in `llmlab.decoding.sampler`.
    """
    values, ids = torch.sort(logits + 0.0, dim=-1, descending=True, stable=True)
    greedy = temperature <= 0
    heat = torch.where(greedy, 1.0, temperature)[:, None]
    ratio = ((values - values[:, :1]) / heat).exp()
    weights = (torch.where(ratio >= min_p[:, None], ratio, 0.0) * 2.0 ** weight_bits(logits.shape[1])).long()
    upto = weights.cumsum(1)
    last = (top_k.clamp(1, logits.shape[1]) - 1).long()[:, None]
    stays = (top_k <= 0)[:, None] | (values >= values.gather(1, last))
    mass = torch.where(stays, weights, 0).sum(1)
    inside = (upto - weights) < (top_p * mass)[:, None]
    kept = torch.where(top_p < 1, torch.where(inside, weights, 0).sum(1), mass)
    place = (upto <= torch.minimum((uniform * kept).long(), kept - 1)[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
    return ids.gather(1, torch.where(greedy, 0, place)[:, None])[:, 0]


def weight_bits(vocab: int) -> int:
    """The weight of the most likely token is 2**this: as large as a sum over the vocabulary in int64 allows."""
    return 62 - vocab.bit_length()
