"""A span of layers in one entry of the team: Python is entered once per step, not once per operation.

The arguments of every operation of every layer lie in records that are filled once, when the model is
made; a step writes only what it changes (the number of tokens, addresses) and runs them in a row. The
operations are the very ones that `NumbaKernels` runs one by one, so the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmlab.kernels.attention_plan import AttnPlan, tile_tokens
from llmlab.kernels.dispatch import Common, KVCaches, LayerParts, LinearImpl
from llmlab.kernels.layout import AttentionMetadata
from llmlab.kernels.linear import PLAIN, REGIONS, ROWS, PackedLinear, act_code, address, dense
from llmlab.kernels.norm_rope import ROPE_REGIONS
from llmlab.kernels.numba_attention import REGIONS as ATTENTION_REGIONS
from llmlab.kernels.numba_attention import check_blocks, supports, tile_floats, tree_addresses
from llmlab.kernels.pool import SEQUENCE, Pool
from llmlab.kernels.vector import PANEL
from llmlab.types import LabError

OPERATIONS = ("qkv", "rope", "attention", "output", "gate_up", "down")  # of one layer, in order


def _in_float32(layer: LayerParts) -> LayerParts:
    """The layer with norm weights as the kernels read them."""
    q_norm, k_norm = (None if norm is None else dense(norm) for norm in (layer.q_norm, layer.k_norm))
    return layer._replace(attn_norm=dense(layer.attn_norm), mlp_norm=dense(layer.mlp_norm), q_norm=q_norm, k_norm=k_norm)


class Planner(Protocol):
    """`NumbaKernels.plan`."""

    def __call__(self, meta: AttentionMetadata, heads: int, group: int, window: int | None) -> AttnPlan: ...


def packed(linear: LinearImpl) -> PackedLinear:
    """A layer of a program, which `NumbaKernels.program` has looked at."""
    assert isinstance(linear, PackedLinear)
    return linear


class Program:
    """Runs layers in place on the hidden states. One step at a time: the working memory is the program's own."""

    def __init__(self, pool: Pool, planner: Planner, layers: Sequence[LayerParts], common: Common) -> None:
        self._pool, self._planner, self._common = pool, planner, common
        self._layers = tuple(map(_in_float32, layers))
        self._dtype, n = packed(layers[0].qkv).panels.dtype, len(layers)
        linear = REGIONS[self._dtype]
        regions = (linear, ROPE_REGIONS[self._dtype], ATTENTION_REGIONS[self._dtype], linear, linear, linear)
        self._records = {name: region.records(n) for name, region in zip(OPERATIONS, regions, strict=True)}
        self._calls = np.empty((n, len(OPERATIONS), 2), np.int64)
        for i, (name, region) in enumerate(zip(OPERATIONS, regions, strict=True)):
            self._calls[:, i, 0] = region.address
            self._calls[:, i, 1] = self._records[name].ctypes.data + np.arange(n) * self._records[name].itemsize
        self._fill_linears()
        self._fill_rope()
        self._fill_attention()
        self._steady: dict[str, Any] = {}
        self._length = min(len(rotation.cos) for rotation in common.rotations)
        self._work = torch.empty(0)
        self._caches: KVCaches | None = None
        self._first: Tensor | None = None
        self._num_blocks = 0
        self.windows = {w: [i for i, layer in enumerate(layers) if layer.window == w] for w in {x.window for x in layers}}
        self._views = self._step_views()

    # ------------------------------------------------------------------------------ filled once
    def _fill_linears(self) -> None:
        act = act_code(self._common.act)
        for i, layer in enumerate(self._layers):
            after = self._layers[i + 1].qkv if i + 1 < len(self._layers) else None
            chain = (("qkv", layer.qkv, layer.attn_norm, PLAIN, layer.output), ("output", layer.output, None, PLAIN, layer.gate_up),
                     ("gate_up", layer.gate_up, layer.mlp_norm, act, layer.down), ("down", layer.down, None, PLAIN, after))  # fmt: skip
            for name, plain, norm, code, following in chain:
                lin = packed(plain)
                record = self._records[name][i : i + 1]
                record["k"], record["w"], record["bias"] = lin.in_features, lin.panels.data_ptr(), address(lin.bias)
                record["columns"] = lin.out_features if code == PLAIN else lin.out_features // 2
                record["act"], record["norm_weight"], record["eps"] = code, address(norm), self._common.eps
                if following is not None:
                    panels = packed(following).panels
                    record["next_w"], record["next_panels"], record["next_size"] = panels.data_ptr(), len(panels), panels[0].nbytes

    def _fill_rope(self) -> None:
        common, records = self._common, self._records["rope"]
        records["q_heads"], records["heads"], records["dim"] = common.heads, common.kv_heads, common.head_dim
        records["eps"] = common.eps
        for name in ("q_stride", "k_stride", "v_stride"):
            records[name] = (common.heads + 2 * common.kv_heads) * common.head_dim
        for i, layer in enumerate(self._layers):
            cos, sin = common.rotations[layer.rope]
            records["half"][i], records["cos"][i], records["sin"][i] = cos.shape[1], cos.data_ptr(), sin.data_ptr()
            records["q_norm"][i], records["k_norm"][i] = address(layer.q_norm), address(layer.k_norm)

    def _fill_attention(self) -> None:
        common, records = self._common, self._records["attention"]
        group = common.heads // common.kv_heads
        records["heads"], records["group"], records["dim"] = common.kv_heads, group, common.head_dim
        records["q_stride"] = (common.heads + 2 * common.kv_heads) * common.head_dim
        records["tile_rows"] = tile_tokens(group) * group
        records["scratch_floats"] = tile_floats(tile_tokens(group) * group, common.head_dim)
        records["scale"], records["softcap"] = common.scale, common.softcap or 0.0
        records["window"] = [layer.window or 0 for layer in self._layers]

    def _step_views(self) -> dict[str, list[np.ndarray]]:
        """The columns that a step writes, under one name for each value."""
        r = self._records
        columns = {
            "threads": [r[name]["threads"] for name in OPERATIONS],
            "tokens": [*(r[name]["rows"] for name in ("qkv", "output", "gate_up", "down")), r["rope"]["tokens"]],
            "hidden": [r["qkv"]["x"], r["output"]["residual"], r["output"]["out"], r["gate_up"]["x"], r["down"]["residual"],
                       r["down"]["out"]],
            "positions": [r["rope"]["positions"]], "slots": [r["rope"]["slots"]],
            "tiles": [r[name]["tiles"] for name in ("qkv", "output", "gate_up", "down")],
            "normed": [r[name]["normed"] for name in ("qkv", "gate_up")], "scratch": [r["attention"]["scratch"]],
            "qkv": [r["qkv"]["out"], r["rope"]["q"], r["attention"]["q"]], "k": [r["rope"]["k"]], "v": [r["rope"]["v"]],
            "attended": [r["attention"]["out"], r["output"]["x"]], "lse": [r["attention"]["lse"]],
            "inner": [r["gate_up"]["out"], r["down"]["x"]], "causal": [r["attention"]["causal"]],
            "forks": [r["attention"]["forks"]], "seen": [r["attention"]["seen"]],
            **{name: [r["attention"][name]] for name in ("block_tables", "table_width", "rows", "seq_lens", "cu_seqlens_q")},
            **{name: [r[op][name] for op in ("rope", "attention")] for name in ("block_size", "block_stride", "head_stride")},
        }  # fmt: skip
        return columns

    # ----------------------------------------------------------------- what is known of the step and of the caches
    @property
    def kv_heads(self) -> int:
        return self._common.kv_heads

    @property
    def max_positions(self) -> int:
        return self._length

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_size(self) -> int:
        return int(self._steady["block_size"])

    @property
    def normed(self) -> int:
        """Where the normed inputs of a linear layer lie, once `place` has made room for them."""
        return int(self._steady["normed"])

    @property
    def tiles(self) -> int:
        """Where the threads' tiles lie."""
        return int(self._steady["tiles"])

    # ------------------------------------------------------------------------------- every step
    def set(self, **values: int) -> None:
        """Write the values that differ from the step before."""
        steady, views = self._steady, self._views
        for name, value in values.items():
            if steady.get(name) != value:
                steady[name] = value
                for view in views[name]:
                    view.fill(value)

    def fits(self, kv_caches: KVCaches) -> bool:
        """Whether the records can describe a step on these; caches other than those of the last step are looked at."""
        return (kv_caches is self._caches and kv_caches[0][0] is self._first) or self._bind(kv_caches)

    def _bind(self, kv_caches: KVCaches) -> bool:
        """Remember caches, if there is one for every layer and all look alike."""
        if len(kv_caches) != len(self._layers):
            return False
        pairs = [kv_caches[i] for i in range(len(self._layers))]
        k, common = pairs[0][0], self._common
        alike = all(one.stride() == k.stride() and one.shape == k.shape for pair in pairs for one in pair)
        wanted = (k.shape[1], k.shape[3], k.dtype) == (common.kv_heads, common.head_dim, self._dtype)
        if not alike or not wanted or not supports(*pairs[0]):
            return False
        for name in ("rope", "attention"):
            self._records[name]["k_cache"] = [k.data_ptr() for k, _ in pairs]
            self._records[name]["v_cache"] = [v.data_ptr() for _, v in pairs]
        self.set(block_size=k.shape[2], block_stride=k.stride(0), head_stride=k.stride(1))
        self._caches, self._first, self._num_blocks = kv_caches, k, k.shape[0]
        return True

    def run(self, hidden: Tensor, positions: Tensor, meta: AttentionMetadata, span: range) -> Tensor:
        """Run the layers of `span` on hidden [T, d], which is used up; float32 [T, d], whatever the weights are."""
        hidden, positions = dense(hidden), positions.long()
        tokens, threads = hidden.shape[0], self._pool.num_threads
        if len(positions) != tokens or len(meta.slot_mapping) != tokens:
            raise LabError("positions", tuple(positions.shape), f"do not fit {tokens} tokens", "give one each")
        if tokens and int(positions.numpy().max()) >= self._length:
            raise LabError("positions", int(positions.max()), f"is beyond the model's {self._length} positions")
        check_blocks(self._pool, meta, self._num_blocks, self._steady["block_size"])
        self.place(tokens, threads)
        table, width, rows, lens, cu = meta.addresses
        forks, seen = tree_addresses(meta)
        self.set(threads=threads, tokens=tokens, hidden=hidden.data_ptr(), positions=positions.data_ptr(),
                  slots=meta.slot_mapping.data_ptr(), block_tables=table, table_width=width, rows=rows, seq_lens=lens,
                  cu_seqlens_q=cu, causal=int(meta.mask == "causal"), forks=forks, seen=seen)  # fmt: skip
        self._plan(meta, threads)
        calls = self.calls(span)
        self._pool.run(SEQUENCE.call(threads, len(calls), calls.ctypes.data))
        return hidden

    def calls(self, span: range) -> np.ndarray:
        """What `SEQUENCE` runs for the layers of `span`: [operations, 2] int64, their functions and records."""
        return self._calls[span.start : span.stop].reshape(-1, 2)

    def place(self, tokens: int, threads: int) -> None:
        """Working memory for so many tokens: one buffer, cut by the largest step so far."""
        common, layer = self._common, self._layers[0]
        query = common.heads * common.head_dim
        sizes = {"qkv": layer.qkv.out_features, "attended": query, "lse": common.heads, "inner": layer.down.in_features,
                 "normed": layer.qkv.in_features}  # fmt: skip
        if tokens * sum(sizes.values()) > self._work.numel() or not self._steady.get("qkv"):
            self._work = torch.empty(max(64, tokens) * sum(sizes.values()))
            at = self._work.data_ptr()
            for name, size in sizes.items():
                self.set(**{name: at})
                at += 4 * max(64, tokens) * size
            self.set(k=self._steady["qkv"] + 4 * query, v=self._steady["qkv"] + 4 * (query + common.kv_heads * common.head_dim))
        each = self._records["attention"]["scratch_floats"][0]
        scratch = self._pool.scratch(int(threads * max(2 * ROWS * PANEL, each)))
        self.set(tiles=scratch, scratch=scratch)

    def attend(self, window: int | None, plan: AttnPlan) -> None:
        """Which plan the layers of a window follow. It must outlive the step."""
        records, at = self._records["attention"], self.windows[window]
        records["items"][at], records["starts"][at], records["merges"][at], records["num_merges"][at] = plan.addresses

    def _plan(self, meta: AttentionMetadata, threads: int) -> None:
        """The attention plan of each window, and room for its partial states."""
        common, records = self._common, self._records["attention"]
        for window, at in self.windows.items():
            plan = self._planner(meta, common.kv_heads, common.heads // common.kv_heads, window)
            self.attend(window, plan)
            if plan.num_partials:
                room = torch.empty(plan.num_partials * common.heads * (common.head_dim + 1))
                meta.derived["partials", window] = room
                records["partial_out"][at] = room.data_ptr()
                records["partial_lse"][at] = room.data_ptr() + 4 * plan.num_partials * common.heads * common.head_dim
