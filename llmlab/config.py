"""The engine's configuration: one frozen struct, checked on construction."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import msgspec

from llmlab.registry import policy_name
from llmlab.types import MAX_NODES, ConfigError, unknown_name

SEAM_FIELDS = ("ordering", "admission", "composer", "victim", "placement", "eviction", "tiering", "decoding", "draft_policy")
DRAFT_FIELDS = ("speculation", "num_speculative_tokens", "draft_tree", "acceptance", "draft_policy")
KERNEL_SETS = ("auto", "torch", "numba", "triton")
PLUG_IN_FIELDS = (*SEAM_FIELDS, "weights")  # take a name or an object; the seams among them may change while a run goes on


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that shapes a run. A seam takes a registered name or the plug-in object itself.

    Sizes are in tokens, blocks or requests; times in seconds. `num_blocks=None` sizes the KV pool from
    memory; `num_host_blocks=None` makes the host tier as large as the pool. `overlap_depth=1` plans the next
    step while the previous one runs. `weights` places the experts of a mixture of which only `num_expert_slots` (over all
    layers; None: a quarter) fit on the device; the simulator takes who wants which expert from the trace `routing`;
    `layer_window` keeps only so many layers of a model in memory and reads the
    others from disk as they come round. `host` names the CPU beside the device, for the cost of what is placed there
    ("8%": one that attends at 8 % of the device's speed).
    `kernels`: "auto", "torch", "numba" or "triton", the last with variants ("triton+one-max+flat", see `llmlab.kernels.variants`).
    `quantization`: "int8" or "int4" weights ("int4-g32-sym": group and zero, too). `gpu_memory`: what the engine may
    take of the device, in bytes, as "16GB", or as the device that it stands for ("t4"). `speculation` is where drafts come
    from: a registered source ("ngram", "suffix"), the name of a draft model, or an object (`seams.DraftSource`); None
    drafts nothing. `draft_tree`: drafts are a tree, "2x2x1" has two first tokens, two behind each, one behind each of those; its
    nodes take the place of `num_speculative_tokens`. `acceptance`: a draft of a sampled request holds if it is the token that
    plain decoding draws ("keyed"), or by rejection sampling, which accepts more where the models rank tokens differently and makes
    answers depend on the drafts, but not their distribution. `fixed_rows`: tokens in a pass with fixed numerics, for requests that must be
    deterministic.
    `attention_plan`: what predictions charge for attention on a GPU, see docs/gpu.md. `tensor_parallel_size`: simulated
    devices side by side that share every layer (docs/simulator.md); `gpu_memory` is then that of each. `on_device_loss`: what
    follows if a GPU stops answering: every request ends with the reason, or all go on on the CPU. Raises ConfigError.
    """

    model: str = "lab-s"
    executor: Literal["torch", "sim"] = "torch"
    hardware: str | None = None
    host: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kernels: str = "auto"
    num_threads: int | None = None
    random_weights: bool = False
    quantization: str | None = None
    gpu_memory: str | int | None = None
    attention_plan: Literal["ideal", "balanced", "per_row"] = "ideal"
    tensor_parallel_size: int = 1
    on_device_loss: Literal["fail", "cpu"] = "fail"

    block_size: int = 16
    num_blocks: int | None = None
    num_host_blocks: int | None = None
    enable_prefix_caching: bool = True

    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    max_model_len: int | None = None
    overlap_depth: int = 0

    ordering: Any = "fcfs"
    admission: Any = "prompt_fits"
    composer: Any = "chunked"
    victim: Any = "last_come"
    placement: Any = "device_only"
    eviction: Any = "lru"
    tiering: Any = "recompute"
    decoding: Any = "autoregressive"
    weights: Any = "resident"
    num_expert_slots: int | None = None
    routing: str = "lab-moe"
    layer_window: int | None = None

    fixed_rows: int = 64
    speculation: Any = None
    num_speculative_tokens: int = 4
    draft_tree: str | None = None
    acceptance: Literal["keyed", "rejection"] = "keyed"
    draft_policy: Any = "fixed"

    seed: int = 0
    log_level: int = 2
    log_capacity: int = 200_000
    trace: str | None = None
    check_interval: int = 64
    policy_timeout: float = 0.25
    num_alternatives: int = 4
    view_cap: int = 64

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_batched_tokens", "max_num_seqs", "log_capacity", "view_cap",
                     "fixed_rows", "tensor_parallel_size"):  # fmt: skip
            self._at_least(name, 1)
        self._at_least("num_speculative_tokens", 1, "To draft nothing, leave speculation out.")
        for name in ("overlap_depth", "check_interval", "num_alternatives"):
            self._at_least(name, 0)
        for name, low in (("num_blocks", 1), ("num_host_blocks", 0), ("max_model_len", 1), ("num_threads", 1),
                          ("num_expert_slots", 1), ("layer_window", 2)):
            if getattr(self, name) is not None:
                self._at_least(name, low)
        self._one_of("acceptance", ("keyed", "rejection"))
        self._check_tree()
        self._one_of("executor", ("torch", "sim"))
        self._one_of("device", ("auto", "cpu", "cuda"))
        self._one_of("dtype", ("auto", "float32", "bfloat16", "float16"))
        self._one_of("attention_plan", ("ideal", "balanced", "per_row"))
        self._one_of("on_device_loss", ("fail", "cpu"))
        if str(self.kernels).partition("+")[0] not in KERNEL_SETS:  # variants behind it: `llmlab.kernels.variants`
            raise unknown_name("kernels", self.kernels, KERNEL_SETS)
        self._check_rest()

    def _check_rest(self) -> None:
        if not 0 <= self.log_level <= 4:
            raise ConfigError("log_level", self.log_level, "must be 0 to 4",
                              "0 metrics, 1 lifecycle, 2 decisions, 3 blocks, 4 kernels.")  # fmt: skip
        timeout = self.policy_timeout
        if not isinstance(timeout, (int, float)) or math.isnan(timeout) or timeout <= 0:
            raise ConfigError("policy_timeout", self.policy_timeout, "must be a positive number of seconds")
        if not isinstance(self.seed, int):
            raise ConfigError("seed", self.seed, "must be an integer")
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError("model", self.model, "must be a name or a directory",
                              "`llmlab models` lists the shipped ones.")  # fmt: skip

    def _check_tree(self) -> None:
        if self.draft_tree is None:
            return
        tree_shape(self.draft_tree)
        if self.speculation is None:
            raise ConfigError("draft_tree", self.draft_tree, "needs somebody who drafts", "Name a draft model as speculation.")

    @property
    def branches(self) -> tuple[int, ...]:
        """The children of each node of a draft tree, by depth; none for chains."""
        return () if self.draft_tree is None else tree_shape(self.draft_tree)

    @property
    def num_drafts(self) -> int:
        """Drafts of a request at most."""
        return self.num_speculative_tokens if self.draft_tree is None else num_nodes(self.branches)

    def _at_least(self, name: str, low: int, way_out: str = "") -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(name, value, f"must be an integer of at least {low}", way_out)

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise unknown_name(name, getattr(self, name), allowed)

    def describe(self) -> dict[str, Any]:
        """Plain data for the first event of a run; plug-in objects appear under their names."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        for name in (*PLUG_IN_FIELDS, "speculation"):
            choice = values[name]
            values[name] = choice if isinstance(choice, str) or choice is None else policy_name(choice)
        return values


def tree_shape(text: str) -> tuple[int, ...]:
    """The children of each node of a draft tree, by depth: (2, 2, 1) for "2x2x1". Raises ConfigError."""
    way_out = 'Write the children of a node at each depth, such as "2x2x1".'
    parts = text.lower().split("x") if isinstance(text, str) else []
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError("draft_tree", text, "is no form of a tree", way_out)
    shape = tuple([int(part) for part in parts])
    if len(shape) > MAX_NODES or num_nodes(shape) > MAX_NODES:
        raise ConfigError("draft_tree", text, f"has more than {MAX_NODES} nodes", way_out)
    return shape


def num_nodes(shape: Sequence[int]) -> int:
    """Nodes of a tree with `shape[d]` children of each node at depth d."""
    return sum(accumulate(shape, operator.mul))


def engine_config(**fields: Any) -> EngineConfig:
    """An EngineConfig from keywords; unknown names are answered with the nearest known ones."""
    for name in fields:
        if name not in EngineConfig.__struct_fields__:
            raise unknown_name("EngineConfig field", name, EngineConfig.__struct_fields__)
    return EngineConfig(**fields)
