"""The one switch: which kernels run. A model calls the methods of `Kernels` and knows no more.

`BaseKernels` states the fused operations by the plain ones, so a kernel set starts as the torch
reference and replaces what it makes faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.capability import OLDEST, Capability, has_triton, of_compute
from llmlab.kernels.layout import AttentionMetadata, AttentionState, KernelChoice
from llmlab.kernels.quantized import QuantizedTensor, WidenedExperts, WidenedLinear
from llmlab.kernels.variants import Variants, parse_kernels
from llmlab.types import ConfigError, LabError

KVCaches = Sequence[tuple[Tensor, Tensor]] | Mapping[int, tuple[Tensor, Tensor]]
COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LinearImpl(Protocol):
    """A linear layer, packed once at load for the kernels of its set."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias` for dense x [T, in_features]; returns [T, out_features]."""


class ExpertsImpl(Protocol):
    """The gated MLPs of a mixture, packed once at load for the kernels of its set."""

    def __call__(
        self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu"
    ) -> Tensor:
        """`reference.moe` of these experts; x [T, d] -> [T, d]."""


class LayerParts(NamedTuple):
    """A plain dense layer: norm, attention, sum, norm, gated MLP, sum; norm weights of any dtype."""

    attn_norm: Tensor
    qkv: LinearImpl
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: LinearImpl
    mlp_norm: Tensor
    gate_up: LinearImpl
    down: LinearImpl
    window: int | None
    rope: int


class Rotations(NamedTuple):
    """cos and sin of every position, [max_model_len, rotary_dim / 2] float32."""

    cos: Tensor
    sin: Tensor


class Common(NamedTuple):
    """What all layers share. `scale` multiplies the scores, `softcap` bounds them."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    act: str
    scale: float
    softcap: float | None
    rotations: tuple[Rotations, ...]


class ChainEnds(NamedTuple):
    """What stands before and behind the layers: `embedding [V, d]`, multiplied by `scale`; a norm and the output layer."""

    embedding: Tensor
    scale: float
    norm: Tensor
    head: LinearImpl
    eps: float


class GreedyChain(Protocol):
    """Tokens that follow one another, chosen greedily, as one call."""

    def fits(self, kv_caches: KVCaches) -> bool:
        """Whether it can run on these; binds them."""

    def run(self, texts: Sequence[Sequence[int]], starts: Sequence[int], block_tables: Sequence[Sequence[int]], counts: Sequence[int],
            span: range) -> np.ndarray:  # fmt: skip
        """`counts[r]` tokens behind each of R texts, whose KV is there up to position `starts[r]`: [R, max(text and count)] int64,
        each row its text `texts[r]` from there on (one token or more), what was chosen, and -1; a row also ends before a
        token whose logits have no finite largest one. KV of all tokens but the last goes into the caches by `block_tables`. `span`: the
        layers that run. A text is read token by token, so it should be short."""


class LayerProgram(Protocol):
    """Layers that run as one call."""

    def fits(self, kv_caches: KVCaches) -> bool:
        """Whether a step on these can run here; else it runs operation by operation."""

    def run(self, hidden: Tensor, positions: Tensor, meta: AttentionMetadata, span: range) -> Tensor:
        """The layers of `span` on hidden [T, d], which is used up; what is behind them, [T, d] float32."""


class Kernels(Protocol):
    """The operations of a transformer, over ragged token batches [T, ...].

    Shapes and meaning are those of the functions of the same name in `llmlab.kernels.reference`,
    where each is defined. Outputs are fresh tensors unless stated.
    """

    name: str

    def linear(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> LinearImpl: ...

    def experts(self, w_gate_up: Tensor | QuantizedTensor, w_down: Tensor | QuantizedTensor) -> ExpertsImpl:
        """Pack [E, 2F, d] and [E, d, F]; `moe` takes the weights as they are."""

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, lin: LinearImpl, weight_offset: float = 0.0
    ) -> Tensor:
        """`lin(rms_norm(x))`."""

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        """`residual + lin(x)`; may write into residual, which the caller gives up."""

    def gated_mlp(
        self,
        x: Tensor,
        lin_gate_up: LinearImpl,
        act: str = "silu",
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> Tensor:
        """`gated_act(lin_gate_up(x), act)`, of `rms_norm(x)` if norm_weight is given; [T, F]."""

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> AttentionState: ...

    def merge_states(self, a: AttentionState, b: AttentionState) -> AttentionState: ...

    def store_kv(
        self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
    ) -> None: ...

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
    ) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor: ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]: ...

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor: ...

    def copy_blocks(self, src: Tensor, dst: Tensor, pairs: Tensor) -> None: ...

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        top_k: int,
        renormalize: bool,
        act: str = "silu",
    ) -> Tensor: ...

    def program(self, layers: Sequence[LayerParts], common: Common) -> LayerProgram | None:
        """Plain layers compiled to one call with the same results; None where this set has nothing to gain."""

    def chain(self, layers: Sequence[LayerParts], common: Common, ends: ChainEnds) -> GreedyChain | None:
        """Plain layers over and over, with all that lies between two tokens; None where this set has nothing to gain."""

    def argmax(self, logits: Tensor) -> Tensor:
        """The lowest id of the largest logit of each row [n] int64, -1 where that is not finite."""

    def draw(
        self, logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
    ) -> Tensor:
        """`reference.draw`; -1 for rows whose largest logit is not finite."""

    def decode_plans(
        self, rows: int, heads: int, group: int, dim: int, windows: Sequence[int | None], device: torch.device
    ) -> StepBuffers | None:
        """Room for what attention derives from a step of `rows` decoding rows; None if it derives nothing
        that a captured graph would have to read."""

    def describe(self) -> list[KernelChoice]:
        """Which implementation runs each operation, and why."""


class StepBuffers(Protocol):
    """What a kernel set derives from the lengths of a step, kept at fixed addresses."""

    entries: dict[Any, Any]  # for `AttentionMetadata.derived`

    def fill(self, seq_lens: np.ndarray) -> Sequence[Any]:
        """Derive it anew for seq_lens [rows]."""


class TorchLinear:
    """`torch.nn.functional.linear` on the weight as it is, any device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return reference.linear(x, self.weight, self.bias)


class TorchExperts:
    """`reference.moe` on the weights as they are."""

    def __init__(self, w_gate_up: Tensor, w_down: Tensor) -> None:
        self.w_gate_up, self.w_down = w_gate_up, w_down

    def __call__(
        self, x: Tensor, router_logits: Tensor, top_k: int, renormalize: bool, act: str = "silu"
    ) -> Tensor:
        return reference.moe(x, router_logits, self.w_gate_up, self.w_down, top_k, renormalize, act)


class BaseKernels:
    """Every operation by the torch reference, the fused ones composed from the plain ones."""

    name = "torch"

    paged_attention = staticmethod(reference.paged_attention)
    merge_states = staticmethod(reference.merge_states)
    store_kv = staticmethod(reference.store_kv)
    rope_store = staticmethod(reference.rope_store)
    rms_norm = staticmethod(reference.rms_norm)
    add_rms_norm = staticmethod(reference.add_rms_norm)
    gated_act = staticmethod(reference.gated_act)
    copy_blocks = staticmethod(reference.copy_blocks)
    moe = staticmethod(reference.moe)

    def linear(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> LinearImpl:
        return WidenedLinear(weight, bias) if isinstance(weight, QuantizedTensor) else TorchLinear(weight, bias)

    def experts(self, w_gate_up: Tensor | QuantizedTensor, w_down: Tensor | QuantizedTensor) -> ExpertsImpl:
        if isinstance(w_gate_up, QuantizedTensor) and isinstance(w_down, QuantizedTensor):
            return WidenedExperts(w_gate_up, w_down)
        assert isinstance(w_gate_up, Tensor) and isinstance(w_down, Tensor)
        return TorchExperts(w_gate_up, w_down)

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, eps: float, lin: LinearImpl, weight_offset: float = 0.0
    ) -> Tensor:
        return lin(self.rms_norm(x, norm_weight, eps, weight_offset))

    def linear_add(self, x: Tensor, lin: LinearImpl, residual: Tensor) -> Tensor:
        return residual + lin(x)

    def gated_mlp(
        self,
        x: Tensor,
        lin_gate_up: LinearImpl,
        act: str = "silu",
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        weight_offset: float = 0.0,
    ) -> Tensor:
        if norm_weight is not None:
            x = self.rms_norm(x, norm_weight, eps, weight_offset)
        return self.gated_act(lin_gate_up(x), act)

    def program(self, layers: Sequence[LayerParts], common: Common) -> LayerProgram | None:
        return None

    def chain(self, layers: Sequence[LayerParts], common: Common, ends: ChainEnds) -> GreedyChain | None:
        return None

    def argmax(self, logits: Tensor) -> Tensor:
        values, ids = logits.max(-1)
        return torch.where(values.isfinite(), ids, -1)

    def draw(
        self, logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
    ) -> Tensor:
        finite = logits.amax(-1).isfinite()
        tokens = reference.draw(logits, temperature, min_p, top_k, top_p, uniform)
        return torch.where(finite, tokens, -1)

    def decode_plans(
        self, rows: int, heads: int, group: int, dim: int, windows: Sequence[int | None], device: torch.device
    ) -> StepBuffers | None:
        return None

    def describe(self) -> list[KernelChoice]:
        return [KernelChoice("all", "torch", "the reference: any device and dtype, no compilation")]


class TorchKernels(BaseKernels):
    """The reference as a kernel set."""


def set_num_threads(num_threads: int) -> None:
    """Threads of torch's operators and of the compiled kernels alike: they are one team.

    Never more than there are free cores: a step waits for its slowest thread.
    """
    if num_threads < 1:
        raise LabError("num_threads", num_threads, "is less than one thread", "give 1 or more, or None")
    torch.set_num_threads(num_threads)


def _torch_kernels(device: torch.device, dtype: torch.dtype, variants: Variants) -> Kernels:
    return TorchKernels()


def _numba_kernels(device: torch.device, dtype: torch.dtype, variants: Variants) -> Kernels:
    from llmlab.kernels.numba_kernels import NumbaKernels

    if device.type != "cpu":
        raise LabError("kernels", "numba", f"runs on the CPU only, not on {device}", "choose 'auto'")
    return NumbaKernels()


def _triton_kernels(device: torch.device, dtype: torch.dtype, variants: Variants) -> Kernels:
    if not has_triton():
        raise LabError("kernels", "triton", "Triton is not installed", "pip install 'llmlab[gpu]', or choose 'torch'")
    if device.type != "cuda":
        raise LabError("kernels", "triton", f"runs on CUDA devices only, not on {device}", "choose 'auto'")
    from llmlab.kernels.triton_kernels import TritonKernels

    return TritonKernels.asked(device_capability(device), dtype, variants)


def device_capability(device: torch.device | str, oldest: int = OLDEST) -> Capability:
    """What a CUDA device of this machine can do. Raises ConfigError below `oldest`, Turing, and for a driver that fails."""
    try:
        found = torch.cuda.get_device_properties(torch.device(device))
    except RuntimeError as error:
        raise ConfigError("device", str(device), f"cannot be asked what it can do: {first_line(error)}",
                          "Mend the driver, or use device='cpu'.") from None  # fmt: skip
    return of_compute(found.name, found.major * 10 + found.minor, found.multi_processor_count, float(found.total_memory), oldest)


def why_no_cuda() -> str | None:
    """Why torch cannot use a CUDA device of this machine, as it tells itself; None if it can."""
    if torch.cuda.is_available():
        return None
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) was built without CUDA, install a CUDA build"
    try:
        torch.cuda.init()
    except Exception as error:  # no driver, one that is too old, a device that is hidden or broken
        return first_line(error)
    return "torch sees no CUDA device here (nvidia-smi tells more)"


def first_line(error: BaseException) -> str:
    """What an error says, without the advice behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def host_kernels(device: Kernels, on_cpu: bool) -> Kernels:
    """Kernels for the thread that attends to host KV beside `device`'s: the same arithmetic where both are CPUs, then on
    one thread, since the device has the team."""
    from llmlab.kernels.numba_kernels import NumbaKernels
    from llmlab.kernels.pool import Pool

    return NumbaKernels(Pool(alone=on_cpu)) if not on_cpu or isinstance(device, NumbaKernels) else TorchKernels()


SETS: Mapping[str, Callable[[torch.device, torch.dtype, Variants], Kernels]] = {
    "torch": _torch_kernels,
    "numba": _numba_kernels,
    "triton": _triton_kernels,
}


def make_kernels(
    name: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_threads: int | None = None,
) -> Kernels:
    """The kernel set `name` ("torch", "numba", "triton", with variants, or "auto") for a device and the dtype of a model.

    "auto" obeys the environment variable LLMLAB_KERNELS; unset, it takes numba on a CPU with one of
    the dtypes that its kernels read, triton on CUDA where it is installed, and torch elsewhere.
    `num_threads`: see `set_num_threads`; None leaves what torch has chosen.
    """
    if num_threads is not None:
        set_num_threads(num_threads)
    if name == "auto":
        name = os.environ.get("LLMLAB_KERNELS", "auto")
    device, (name, variants) = torch.device(device), parse_kernels(name)
    if name == "auto" and dtype in COMPILED_DTYPES:
        name = "numba" if device.type == "cpu" else "triton" if device.type == "cuda" and has_triton() else "torch"
    elif name == "auto":
        name = "torch"
    return SETS[name](device, dtype, variants)
