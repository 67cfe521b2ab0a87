"""The kernel set of GPUs: Triton where it gains, torch elsewhere, chosen by `llmlab.kernels.capability`.

What no kernel covers (odd layouts of a cache, caps that SDPA does not know) goes to the reference, call by call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels import triton_attention as attention
from llmlab.kernels import triton_flat as few
from llmlab.kernels import triton_moe as moe
from llmlab.kernels import triton_quant as quant
from llmlab.kernels import triton_rows as rows
from llmlab.kernels import triton_sampling as sampling
from llmlab.kernels.attention_plan import GridPlan, plan_capacity, plan_grid
from llmlab.kernels.capability import Capability, Tile, decode_tile, few_rows, kernel_table, power_of_two, prefill_tile
from llmlab.kernels.dataflow import LIBRARY, Dataflow, DataflowTable
from llmlab.kernels.dispatch import BaseKernels, ExpertsImpl, LinearImpl, TorchLinear
from llmlab.kernels.layout import PLAN_FACTS, AttentionMetadata, AttentionState, KernelChoice, pinned, sent
from llmlab.kernels.quantized import QuantizedTensor, WidenedExperts
from llmlab.kernels.softmax_schemes import BANDS, UnifiedMax
from llmlab.kernels.variants import USUAL, Variants
from llmlab.types import LabError

PLAN_PARTS = ("items", "queue", "starts", "merges")
ALIGNED = 4  # numbers of 32 bits: 16 bytes
FEW_ROWS = 8  # rows of a quantised product that are sums rather than matrix products


class PlanOnDevice(NamedTuple):
    """One class of rows of a step: the tile that runs it, its query tokens, room for partial states (in query
    tokens; 0: no row is divided), and the plan's arrays on the device."""

    tile: Tile
    tokens: int
    partials: int
    items: Tensor
    queue: Tensor
    starts: Tensor
    merges: Tensor


class StepPlans(NamedTuple):
    """All of a step: planned classes, and the rows that go through SDPA (no tensor cores in Triton)."""

    classes: tuple[PlanOnDevice, ...]
    sdpa_rows: tuple[int, ...]


def plan_step(
    cu: np.ndarray, lens: np.ndarray, mask: str, heads: int, group: int, dim: int, window: int | None, capability: Capability,
    number_bytes: int = 2,
) -> tuple[list[tuple[GridPlan, Tile, int]], tuple[int, ...]]:  # fmt: skip
    """(plan, tile, query tokens of a tile) of decoding rows and of prefilling rows; and the rows for SDPA. Pure."""
    query = np.diff(cu)
    small = decode_tile(capability, dim, group, number_bytes)
    few = query <= small.tokens(group)
    classes = [(few, small)]
    if capability.tensor_cores:
        classes.append((~few, prefill_tile(capability, dim, group, number_bytes)))
    planned = []
    for chosen, tile in classes:
        if (query[chosen] > 0).any():
            tokens = tile.tokens(group)
            plan = plan_grid(cu, lens, heads=heads, programs=capability.units * tile.programs, tile=tokens, window=window,
                             causal=mask == "causal", rows=chosen)  # fmt: skip
            planned.append((plan, tile, tokens))
    rest = () if capability.tensor_cores else tuple(int(r) for r in np.flatnonzero(~few))
    return planned, rest


class TritonLinear(TorchLinear):
    """cuBLAS, with the residual added in the product; or, for few rows, what was measured to be faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dataflow: Dataflow = LIBRARY) -> None:
        super().__init__(weight, bias)
        self._dataflow = dataflow

    def __call__(self, x: Tensor) -> Tensor:
        return self.by(self._dataflow.pick(len(x)), x)

    def by(self, kernel: str, x: Tensor) -> Tensor:
        """The product by one of the kernels of `dataflow`."""
        if kernel == "library" or not len(x):
            return super().__call__(x)
        return self._rows(x.contiguous()) if kernel == "rows" else self._flat(x.contiguous())

    def _rows(self, x: Tensor) -> Tensor:
        count = power_of_two(len(x))
        padded = x if count == len(x) else F.pad(x, (0, 0, 0, count - len(x)))
        y, block_n = x.new_empty(count, self.out_features), max(1, 16 // count)
        few.row_linear[(-(-self.out_features // block_n),)](
            padded, self.weight, x if self.bias is None else self.bias, y, self.out_features, self.in_features,
            HAS_BIAS=self.bias is not None, ROWS=count, BLOCK_N=block_n, BLOCK_K=256, num_warps=4)  # fmt: skip
        return y[: len(x)]

    def _flat(self, x: Tensor) -> Tensor:
        y, block_n = x.new_empty(len(x), self.out_features), 64 if self.out_features >= 8192 else 32
        few.flat_linear[(-(-self.out_features // block_n),)](
            x, self.weight, x if self.bias is None else self.bias, y, len(x), self.out_features, self.in_features,
            HAS_BIAS=self.bias is not None, BLOCK_M=max(16, power_of_two(len(x))), BLOCK_N=block_n, BLOCK_K=128, num_warps=4,
            num_stages=2)  # fmt: skip
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.bias is not None or self._dataflow.pick(len(x)) != "library":
            return residual + self(x)
        return torch.addmm(residual, x, self.weight.t())


class TritonQuantLinear:
    """A linear layer with int8 or int4 weights: see `triton_quant`."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, capability: Capability) -> None:
        self.weight, self.bias, self._capability = weight, bias, capability
        self.out_features, self.in_features = weight.shape
        full = torch.full_like(weight.scales, 1 << (weight.bits - 1), dtype=torch.uint8)
        self._zeros = full if weight.zeros is None else weight.zeros

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if 0 < len(x) <= FEW_ROWS:
            return self._few(x)
        if not self._capability.tensor_cores:
            return F.linear(x, self.widened(x.dtype), self.bias)
        y, w = x.new_empty(len(x), self.out_features), self.weight
        block_m = 64 if len(x) > 32 else 32 if len(x) > 16 else 16
        grid = (-(-self.out_features // 64), -(-len(x) // block_m))
        if len(x):
            quant.quant_gemm[grid](
                x, w.codes, w.scales, self._zeros, self._bias(x), y, len(x), self.out_features, self.in_features, BITS=w.bits,
                GROUP=w.group, HAS_BIAS=self.bias is not None, BLOCK_M=block_m, BLOCK_N=64, num_warps=4, num_stages=2)  # fmt: skip
        return y

    def _bias(self, x: Tensor) -> Tensor:
        return x if self.bias is None else self.bias

    def _few(self, x: Tensor) -> Tensor:
        count = power_of_two(len(x))
        padded = x if count == len(x) else F.pad(x, (0, 0, 0, count - len(x)))
        y, w = x.new_empty(count, self.out_features), self.weight
        block_n = max(2, 16 // count)
        quant.quant_gemv[(-(-self.out_features // block_n),)](
            padded, w.codes, w.scales, self._zeros, self._bias(x), y, self.out_features, self.in_features, BITS=w.bits,
            GROUP=w.group, HAS_BIAS=self.bias is not None, ROWS=count, BLOCK_N=block_n, num_warps=4)  # fmt: skip
        return y[: len(x)]

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights in `dtype`, by the kernel."""
        w = self.weight
        wide = torch.empty(w.shape, dtype=dtype, device=w.device)
        quant.widen[(self.out_features, self.in_features // w.group)](
            w.codes, w.scales, self._zeros, wide, self.in_features, BITS=w.bits, GROUP=w.group, num_warps=1)  # fmt: skip
        return wide


class TritonExperts:
    """The gated MLPs of a mixture as two grouped products: see `triton_moe`. No count comes to the host."""

    def __init__(self, w_gate_up: Tensor, w_down: Tensor, kernels: TritonKernels) -> None:
        self.w_gate_up, self.w_down, self._kernels = w_gate_up.contiguous(), w_down.contiguous(), kernels

    def __call__(self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu") -> Tensor:
        weights, experts = reference.route(router_logits, top_k, renormalize)
        pairs = sort_pairs(experts, self.w_down.shape[0], block=16 if experts.numel() <= 512 else 64)
        inner = self._product(x.contiguous(), self.w_gate_up, pairs, top_k)
        outer = self._product(self._kernels.gated_act(inner, act), self.w_down, pairs, 0)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        columns, block = x.shape[1], min(1024, power_of_two(x.shape[1]))
        if len(x):
            moe.combine_pairs[(len(x), -(-columns // block))](
                outer, pairs.places, weights.contiguous(), out, columns, TOP_K=top_k, BLOCK=block)  # fmt: skip
        return out

    def _product(self, x: Tensor, w: Tensor, pairs: Pairs, top_k: int) -> Tensor:
        experts, rows_out, depth = w.shape
        y = x.new_empty(len(pairs.order), rows_out)
        tiles = -(-len(pairs.order) // pairs.block) + experts
        moe.grouped_linear[(tiles, -(-rows_out // 64))](
            x, w, y, pairs.order, pairs.offsets, pairs.first_tiles, rows_out, depth, w.stride(0), NUM_EXPERTS=experts,
            EXPERTS_PAD=power_of_two(experts), TOP_K=top_k, BLOCK_M=pairs.block, BLOCK_N=64, BLOCK_K=32, num_warps=4)  # fmt: skip
        return y


class Pairs(NamedTuple):
    """(token, choice) pairs sorted by expert. `order [P]`: the pair at each place; `places [T, k]`: its inverse;
    `offsets`, `first_tiles` [E + 1] int32: where an expert's pairs and its row tiles of `block` begin."""

    order: Tensor
    places: Tensor
    offsets: Tensor
    first_tiles: Tensor
    block: int


def sort_pairs(experts: Tensor, num_experts: int, block: int) -> Pairs:
    """Sort without a count on the host: every shape follows from that of `experts` [T, k]."""
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))

    def ends(sizes: Tensor) -> Tensor:
        return F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)

    return Pairs(order, places.view_as(experts), ends(counts), ends((counts + block - 1) // block), block)


class TritonKernels(BaseKernels):
    """See `dispatch.Kernels`."""

    name = "triton"

    def __init__(self, capability: Capability, dtype: torch.dtype = torch.float16, unified: UnifiedMax | None = None,
                 dataflow: DataflowTable | None = None) -> None:  # fmt: skip
        """`unified`: decoding rows are attended to around one maximum, on tensor cores; `dataflow`: kernels of linear layers by rows, as
        measured. Neither by default: nobody has measured what they gain."""
        self.capability, self._dtype, self._dataflow = capability, dtype, dataflow or {}
        self._unified = unified if capability.tensor_cores else None  # sums in registers leave none for a second loop: they spill
        self._variants = USUAL
        self.repaired: Tensor | None = None  # units of the last attention that the one maximum did not suit, by program

    @classmethod
    def asked(cls, capability: Capability, dtype: torch.dtype, variants: Variants) -> TritonKernels:
        """The kernels with the variants that a configuration names, as far as the card has units for them."""
        name = str(dtype).removeprefix("torch.")
        made = cls(capability, dtype, None if variants.phi is None else UnifiedMax(variants.phi, *BANDS[name]))
        made._variants = variants
        return made

    # -------------------------------------------------------------------------------- linear layers
    def linear(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> LinearImpl:
        if isinstance(weight, QuantizedTensor):
            return TritonQuantLinear(weight, bias, self.capability)
        few = few_rows(self.capability, self._variants)
        return TritonLinear(weight, bias, self._dataflow.get((weight.shape[0], weight.shape[1]), few))

    def experts(self, w_gate_up: Tensor | QuantizedTensor, w_down: Tensor | QuantizedTensor) -> ExpertsImpl:
        if isinstance(w_gate_up, QuantizedTensor) and isinstance(w_down, QuantizedTensor):
            return WidenedExperts(w_gate_up, w_down)
        assert isinstance(w_gate_up, Tensor) and isinstance(w_down, Tensor)
        return TritonExperts(w_gate_up, w_down, self)

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        return lin.add(x, residual) if isinstance(lin, TritonLinear) else residual + lin(x)

    # ------------------------------------------------------------------------------------ attention
    def plans(self, meta: AttentionMetadata, heads: int, group: int, dim: int, window: int | None) -> StepPlans:
        """The plans of the current step, made at their first use and shared by all layers."""
        key = ("grid", heads, group, dim, window)
        if key not in meta.derived:
            planned, rest = plan_step(*meta.host_lengths(), meta.mask, heads, group, dim, window, self.capability, self._dtype.itemsize)
            device = meta.seq_lens.device
            classes = tuple(
                PlanOnDevice(tile, tokens, plan.num_partials, *on_device(plan, device)) for plan, tile, tokens in planned
            )
            meta.derived[key] = StepPlans(classes, rest)
            meta.derived.setdefault(PLAN_FACTS, []).extend(plan.facts() for plan, _, _ in planned)
        plans: StepPlans = meta.derived[key]
        return plans

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> AttentionState:
        """As the reference, except that rows which go through SDPA have NaN in `lse`: it returns none."""
        (tokens, hq, dim), heads = q.shape, k_cache.shape[1]
        if hq % heads or k_cache.shape[3] != dim:
            raise LabError("q", tuple(q.shape), f"does not fit a KV cache of {tuple(k_cache.shape)}")
        if not (_lines_dense(k_cache) and _lines_dense(v_cache)) or meta.tree is not None:
            return reference.paged_attention(q, k_cache, v_cache, meta, scale, sliding_window, softcap)
        q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
        state = AttentionState(q.new_zeros(tokens, hq, dim), q.new_full((tokens, hq), float("-inf"), dtype=torch.float32))
        plans = self.plans(meta, heads, hq // heads, dim, sliding_window)
        decode = decode_tile(self.capability, dim, hq // heads, self._dtype.itemsize)
        for planned in plans.classes:
            scheme = self._unified if planned.tile == decode else None
            repaired = _attend(planned, state, q, k_cache, v_cache, meta, scale, sliding_window, softcap, scheme)
            self.repaired = repaired if scheme is not None else self.repaired
        for row in plans.sdpa_rows:
            _sdpa_row(row, state, q, k_cache, v_cache, meta, scale, sliding_window, softcap)
        return state

    def decode_plans(self, rows: int, heads: int, group: int, dim: int, windows: Sequence[int | None],
                     device: torch.device) -> DecodePlans:  # fmt: skip
        return DecodePlans(self.capability, rows, heads, group, dim, windows, device, self._dtype.itemsize)

    # ------------------------------------------------------------------------------------ row kernels
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        return _norm(x, None, weight, eps, weight_offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return _norm(x, residual, weight, eps, weight_offset)

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor:
        if act not in reference.ACTIVATIONS:
            raise LabError("act", act, "is not an activation", f"choose one of {', '.join(reference.ACTIVATIONS)}")
        gate_up, columns = gate_up.contiguous(), gate_up.shape[1] // 2
        out, block = gate_up.new_empty(len(gate_up), columns), min(1024, power_of_two(columns))
        if len(gate_up):
            rows.gate_rows[(len(gate_up), -(-columns // block))](gate_up, out, columns, GELU=act == "gelu_tanh", BLOCK=block)
        return out

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
        none = k.new_empty(len(k), 0)
        self.rope_store(k[:, :0], k, v, none, none, k_cache, v_cache, slot_mapping)

    def rope_store(
        self,
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
        (tokens, hq, dim), heads = q.shape, k.shape[1]
        if not (_lines_dense(k_cache) and _lines_dense(v_cache)) or (q_norm is None) != (k_norm is None):
            return reference.rope_store(q, k, v, cos, sin, k_cache, v_cache, slot_mapping, q_norm=q_norm, k_norm=k_norm,
                                        eps=eps, weight_offset=weight_offset)  # fmt: skip
        q, k, v = (t if t.stride()[1:] == (dim, 1) else t.contiguous() for t in (q, k, v))
        turned = q.new_empty(tokens, hq, dim)
        pads = {"HQ_PAD": power_of_two(max(1, hq)), "HKV_PAD": power_of_two(heads), "D_PAD": power_of_two(dim)}
        weights = (k, k) if q_norm is None or k_norm is None else (q_norm, k_norm)  # never read without a norm
        if tokens:
            rows.rope_store[(tokens,)](
                q, k, v, turned, cos.contiguous(), sin.contiguous(), *weights, k_cache, v_cache, slot_mapping, eps,
                weight_offset, q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0),
                v_cache.stride(1), HQ=hq, HKV=heads, D=dim, HALF=cos.shape[1], BLOCK_SIZE=k_cache.shape[2],
                NORM=q_norm is not None, **pads, num_warps=4 if pads["HQ_PAD"] * pads["D_PAD"] <= 4096 else 8)  # fmt: skip
        return turned

    # --------------------------------------------------------------------------- copies and sampling
    def copy_blocks(self, src: Tensor, dst: Tensor, pairs: Tensor) -> None:
        if not len(pairs):
            return
        if src.data_ptr() == dst.data_ptr() or not (src.device == dst.device and src[0].is_contiguous() and dst[0].is_contiguous()):
            reference.copy_blocks(src, dst, pairs.to(dst.device) if src.device == dst.device else pairs.cpu())
            return
        size = src[0].numel()
        rows.copy_pool_blocks[(len(pairs), -(-size // 1024))](
            src, dst, pairs.to(src.device), src.stride(0), dst.stride(0), size, BLOCK=1024)  # fmt: skip

    def argmax(self, logits: Tensor) -> Tensor:
        """The lowest id of the largest logit of each row [n] int64, -1 where that is not finite."""
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        if len(logits):
            sampling.argmax_rows[(len(logits),)](logits, tokens, logits.shape[1], logits.stride(0), BLOCK=1024)
        return tokens

    def draw(self, logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
        """`reference.draw`; -1 for rows whose largest logit is not finite."""
        tokens, vocab = self.argmax(logits), logits.shape[1]
        shapes = torch.stack((temperature, min_p), 1).float().contiguous()
        limits = torch.stack((top_p, uniform), 1).double().contiguous()
        if len(logits):
            sampling.draw_rows[(len(logits),)](
                logits, shapes, limits, top_k.to(torch.int32), tokens, vocab, logits.stride(0),
                BITS=2.0 ** reference.weight_bits(vocab), BLOCK=min(2048, power_of_two(vocab)), num_warps=8)  # fmt: skip
        return tokens

    def describe(self) -> list[KernelChoice]:
        return kernel_table(self.capability, str(self._dtype).removeprefix("torch."), variants=self._variants)


class DecodePlans:
    """Plans of steps of `rows` decoding rows, at fixed addresses, so that a captured graph can be replayed.

    `fill` makes the plan of a step and copies it there; `entries` go into `AttentionMetadata.derived`.
    """

    def __init__(self, capability: Capability, rows: int, heads: int, group: int, dim: int, windows: Sequence[int | None],
                 device: torch.device, number_bytes: int = 2) -> None:  # fmt: skip
        self._rows, self._heads, self._device = rows, heads, device
        self._tile = decode_tile(capability, dim, group, number_bytes)
        self._programs = capability.units * self._tile.programs
        room = plan_capacity(rows, heads, self._programs)
        sizes = {"items": room.items * 6, "queue": room.units, "starts": self._programs + 1, "merges": rows * 3}
        self._offsets, self._size = places_of(sizes)
        tokens = self._tile.tokens(group)
        self._tokens, self._arrays, self.entries = tokens, {}, {}
        for window in dict.fromkeys(windows):
            flat = torch.zeros(self._size, dtype=torch.int32, device=device)
            items, queue, starts, merges = (flat[self._offsets[name] : self._offsets[name] + size] for name, size in sizes.items())
            plan = PlanOnDevice(self._tile, tokens, room.partials, items.view(-1, 6), queue, starts, merges.view(-1, 3))
            self._arrays[window] = flat
            self.entries["grid", heads, group, dim, window] = StepPlans((plan,), ())

    def fill(self, seq_lens: np.ndarray) -> list[GridPlan]:
        """Plan a step: seq_lens [rows]. Returns the plans, one for each window."""
        plans = []
        for window, flat in self._arrays.items():
            plan = plan_grid(np.arange(self._rows + 1), seq_lens, heads=self._heads, programs=self._programs,
                             tile=self._tokens, window=window)  # fmt: skip
            array = np.zeros(self._size, np.int32)
            for name, offset in self._offsets.items():
                part = getattr(plan, name).reshape(-1)
                array[offset : offset + part.size] = part
            flat.copy_(pinned(array, self._device), non_blocking=True)
            plans.append(plan)
        return plans


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum); the sum is x itself without a residual."""
    width, x = x.shape[-1], x.contiguous()
    out, total = torch.empty_like(x), x if residual is None else torch.empty_like(x)
    other = x if residual is None else residual.contiguous()
    if x.numel():
        rows.norm_rows[(x.numel() // width,)](
            x, other, weight, out, total, eps, offset, K=width, K_PAD=power_of_two(width), ADD=residual is not None,
            num_warps=8 if width > 2048 else 4)  # fmt: skip
    return out, total


def on_device(plan: GridPlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items, queue, starts and merges of a plan in one copy."""
    parts = {name: getattr(plan, name) for name in PLAN_PARTS}
    offsets, size = places_of({name: part.size for name, part in parts.items()})
    host = np.zeros(size, np.int32)
    for name, part in parts.items():
        host[offsets[name] : offsets[name] + part.size] = part.reshape(-1)
    flat = sent(host, device)
    items, queue, starts, merges = (flat[offsets[name] : offsets[name] + part.size] for name, part in parts.items())
    return items.view(-1, 6), queue, starts, merges.view(-1, 3)


def places_of(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where arrays of these many numbers lie one behind the other, and the size of all. Each begins where Triton expects a
    pointer to begin: it compiles a kernel anew for every other alignment of its arguments."""
    room = [-(-size // ALIGNED) * ALIGNED for size in sizes.values()]
    return dict(zip(sizes, np.cumsum([0, *room])[:-1].tolist(), strict=True)), sum(room)


def _lines_dense(cache: Tensor) -> bool:
    """Whether the slots of one block and head lie one behind the other."""
    return cache.stride()[2:] == (cache.shape[3], 1)


def _attend(planned: PlanOnDevice, state: AttentionState, q: Tensor, k_cache: Tensor, v_cache: Tensor,
            meta: AttentionMetadata, scale: float, window: int | None, softcap: float | None, unified: UnifiedMax | None
            ) -> Tensor:  # fmt: skip
    """Returns how many units each program computed twice; without `unified`, nothing that was written."""
    (tokens, hq, dim), heads, tile = q.shape, k_cache.shape[1], planned.tile
    width, partials = power_of_two(dim), max(1, planned.partials)
    part_out = torch.empty(partials, hq, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(partials, hq, dtype=torch.float32, device=q.device)
    sizes: dict[str, Any] = {"HEADS": heads, "GROUP": hq // heads, "D": dim, "D_PAD": width, "BLOCK_SIZE": k_cache.shape[2]}
    repaired = planned.starts if unified is None else torch.empty_like(planned.starts[1:])
    around = (0.0, 0.0, 0.0) if unified is None else (unified.phi / math.log(2), math.exp(unified.low), math.exp(unified.high))
    attention.attend[(len(planned.starts) - 1,)](
        q, k_cache, v_cache, meta.block_tables, meta.seq_lens, meta.cu_seqlens_q, planned.items, planned.queue, planned.starts,
        state.out, state.lse, part_out, part_lse, repaired, q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1),
        v_cache.stride(0), v_cache.stride(1), meta.block_tables.stride(0), scale, softcap or 1.0, *around, **sizes, WINDOW=window or 0,
        CAUSAL=meta.mask == "causal", SOFTCAP=softcap is not None, TILE=planned.tokens, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        TENSOR_CORES=tile.tensor_cores, UNIFIED=unified is not None, num_warps=tile.warps, num_stages=tile.stages)  # fmt: skip
    if planned.partials:
        attention.merge_partials[(tokens, hq)](part_out, part_lse, planned.merges, state.out, state.lse, HEADS_Q=hq, D=dim,
                                               D_PAD=width, num_warps=1)  # fmt: skip
    return repaired


def _sdpa_row(row: int, state: AttentionState, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata,
              scale: float, window: int | None, softcap: float | None) -> None:  # fmt: skip
    cu, lens = meta.host_lengths()
    first, last, length = int(cu[row]), int(cu[row + 1]), int(lens[row])
    k, v = (reference.gather_kv(cache, meta.block_tables[row], length) for cache in (k_cache, v_cache))
    seen = reference.visible(last - first, length, meta.mask, window, q.device)
    if softcap is not None or not length:
        one = reference.attend(q[first:last], k, v, seen, scale, softcap)
        state.out[first:last], state.lse[first:last] = one.out, one.lse
        return
    k, v = (t.masked_fill(~seen.any(0)[:, None, None], 0.0).to(q.dtype) for t in (k, v))  # freed by a window: anything
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))  # torch's kernel for such cards knows no groups
    x, k, v = (t.transpose(0, 1)[None] for t in (q[first:last], k, v))
    out = F.scaled_dot_product_attention(x, k, v, attn_mask=seen, scale=scale)
    state.out[first:last], state.lse[first:last] = out[0].transpose(0, 1), float("nan")
