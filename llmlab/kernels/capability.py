"""What a device can do, and which kernels it therefore gets: the one dispatch table. Imports no torch.

    kernel_table(capability_of("t4"), "float16", head_dim=128)

The figures of a compute capability are those of the CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability"; multiprocessors and memory are those of `roofline.hardware`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmlab.kernels.dataflow import Dataflow
from llmlab.kernels.variants import USUAL, Variants
from llmlab.types import ConfigError
from roofline import hardware
from roofline.errors import RooflineError


class Capability(NamedTuple):
    """A device as kernels see it. `sm`: compute capability times ten (75, 86, 90), 0 for a CPU.

    `shared_kib`: the most shared memory of one thread block. `units`: multiprocessors.
    """

    name: str
    sm: int
    shared_kib: int
    units: int
    memory_bytes: float

    @property
    def is_gpu(self) -> bool:
        return self.sm > 0

    @property
    def bf16(self) -> bool:
        """bfloat16 products in hardware: from Ampere on."""
        return self.sm >= 80 or not self.is_gpu

    @property
    def tensor_cores(self) -> bool:
        """Whether Triton's products run on tensor cores: it has no such path below Ampere, where they are
        multiply-adds of the ordinary cores."""
        return self.sm >= 80


class KernelChoice(NamedTuple):
    """One row of the table: which implementation runs an operation, and why."""

    op: str
    implementation: str
    why: str


SHARED_KIB: Mapping[int, int] = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
SM_OF: Mapping[str, int] = {
    "t4": 75, "a10": 86, "a10g": 86, "a40": 86, "a6000": 86, "l4": 89, "rtx-4090": 89, "a100-40gb": 80, "a100-80gb": 80,
    "h100-sxm": 90, "h100-pcie": 90, "h200": 90,
}  # fmt: skip
CPU = Capability("cpu", 0, 0, 1, 0.0)
OLDEST = 75  # Turing: what torch's and Triton's current releases still build for


def of_compute(name: str, sm: int, units: int, memory_bytes: float, oldest: int = OLDEST) -> Capability:
    """The capability of a device with a compute capability of `sm` / 10. Raises ConfigError below `oldest`, Turing."""
    if sm < oldest:
        raise ConfigError("device", name, f"has compute capability {sm // 10}.{sm % 10}; the kernels need 7.5 (Turing) or later",
                          "Use device='cpu', or kernels='torch' if your torch still supports the card.")  # fmt: skip
    known = [shared for at_least, shared in sorted(SHARED_KIB.items()) if at_least <= sm]
    return Capability(name, sm, known[-1] if known else 48, units, memory_bytes)


def capability_of(name: str) -> Capability:
    """A device of the hardware table by any usual spelling ("t4", "A100"), or "cpu". Raises ConfigError."""
    if name == "cpu":
        return CPU
    try:
        device = hardware.get(name)
    except RooflineError as error:
        raise ConfigError("device", name, str(error), f"Known: auto, cpu, cuda, {', '.join(SM_OF)}.") from None
    if device.kind == "cpu":
        return CPU
    return of_compute(device.name, SM_OF[device.name], device.units, device.memory_bytes)


def default_dtype(capability: Capability) -> str:
    """The format that weights and KV take if nobody says: "float32" on a CPU, half precision on a GPU."""
    if not capability.is_gpu:
        return "float32"
    return "bfloat16" if capability.bf16 else "float16"


def check_dtype(capability: Capability, dtype: str) -> None:
    """Raises ConfigError for a format that a device has no unit for."""
    if dtype == "bfloat16" and not capability.bf16:
        raise ConfigError("dtype", dtype, f"{capability.name} (compute capability {capability.sm / 10:.1f}) has no bfloat16 units",
                          "Use dtype='float16', or 'auto', which takes it.")  # fmt: skip


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def chosen_line(capability: Capability, table: Sequence[KernelChoice], dtype: str, weights: str, kv_tokens: int) -> str:
    """What a device got and why, in one line. `weights`: their quantization, or ""; `table`: the kernel set's choices."""
    rows = {row.op: row for row in table}
    whole = rows.get("all")
    attention = [f"{op} by {rows[f'attention, {op}'].implementation}" for op in ("decode", "prefill") if f"attention, {op}" in rows]
    why = rows["attention, prefill"].why if not capability.tensor_cores and "attention, prefill" in rows else ""
    kernels = f"all kernels {whole.implementation}" if whole else f"attention: {', '.join(attention)}{f' ({why})' if why else ''}"
    asked = [f"{op}: {rows[op].implementation}" for op in ("softmax of decoding", "linear, few rows") if op in rows and rows[op].why.startswith("asked for")]
    kernels = "; ".join([kernels, *asked])
    narrow = f", weights in {weights}" if weights else ""
    return (f"{capability.name} (sm_{capability.sm}, {capability.memory_bytes / (1 << 30):.0f} GiB): {dtype} "
            f"({_why_dtype(capability, dtype)}){narrow}; {kernels}; KV for {kv_tokens:,} tokens. `llmlab kernels` tells the rest.")  # fmt: skip


# ---------------------------------------------------------------------------------- tiles of attention
class Tile(NamedTuple):
    """How one class of attention rows runs: rows (query tokens x query heads of a KV head) and KV positions of a
    tile, warps, stages of loading ahead, programs per multiprocessor (as many as are resident at once: a queue
    that waits for a place is balanced with nobody), and what multiplies."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int
    tensor_cores: bool

    def tokens(self, group: int) -> int:
        """Query tokens of a tile."""
        return max(1, self.block_m // group)


SMALL_ROWS = 16  # rows of the smallest product of a tensor core
WIDE_POSITIONS = 32  # of a tile in float32: such products are no tensor core's, and larger ones spill by the kilobyte
LOW_REGISTERS = 8192  # elements of a product held in registers where there are no tensor cores; twice as many spill


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def decode_tile(capability: Capability, head_dim: int, group: int, number_bytes: int = 2) -> Tile:
    """Rows of few query tokens: bound by reading KV, so many programs with several tiles in flight. `number_bytes`: of a number
    of the cache."""
    width = power_of_two(head_dim)
    if not capability.tensor_cores:
        rows = power_of_two(group)
        positions = max(8, min(64, LOW_REGISTERS // (rows * width)))
        return Tile(rows, positions, 4, 1, 2, False)
    rows = max(SMALL_ROWS, power_of_two(group))
    if number_bytes > 2:
        return Tile(rows, WIDE_POSITIONS, 4, 1, 2, True)
    return Tile(rows, 64, 4, 3 if capability.shared_kib > 128 else 2, 2, True)


def prefill_tile(capability: Capability, head_dim: int, group: int, number_bytes: int = 2) -> Tile:
    """Rows of many query tokens: bound by arithmetic, so large tiles."""
    if number_bytes > 2:
        return Tile(max(2 * SMALL_ROWS, power_of_two(group)), WIDE_POSITIONS, 4, 1, 2, True)
    large = capability.shared_kib > 128
    rows = max(64, power_of_two(group))
    if large and head_dim <= 128:
        return Tile(max(128, rows), 64, 8, 3, 1, True)
    return Tile(rows, 64 if head_dim <= 64 else 32, 4, 2, 2, True)  # 64 positions of 128 would spill


# -------------------------------------------------------------------------------------- the table
def kernel_table(capability: Capability, dtype: str, head_dim: int = 128, group: int = 4, variants: Variants = USUAL) -> list[KernelChoice]:
    """Which implementation runs each operation on a device, and why. CPU tables come from the kernel set itself."""
    sm = f"sm_{capability.sm}"
    chosen = [
        KernelChoice("dtype", dtype, _why_dtype(capability, dtype)),
        KernelChoice("linear", "torch (cuBLAS)", "the library chooses per shape; the residual is added in the product"),
    ]  # fmt: skip
    return [*chosen, *_attention_choices(capability, sm, head_dim, group, 4 if dtype == "float32" else 2), *_variant_choices(capability, sm, variants),
            *_row_choices(), *_quantised_choices(capability, sm)]


def _why_dtype(capability: Capability, dtype: str) -> str:
    if dtype != default_dtype(capability):
        return "asked for"
    return "the range of float32 in half the bytes" if capability.bf16 else "the card has no bfloat16 units"


def _attention_choices(capability: Capability, sm: str, head_dim: int, group: int, number_bytes: int) -> list[KernelChoice]:
    decode = decode_tile(capability, head_dim, group, number_bytes)
    programs = capability.units * decode.programs
    split = f"{programs} programs take what the plan of the step deals them; divided rows merge by their log-sum-exp"
    if not capability.tensor_cores:
        return [
            KernelChoice("attention, decode", f"triton, sums in registers {decode.block_m} x {decode.block_n}",
                   f"{sm} has no tensor-core products in Triton, and one query needs none: reading KV takes longer; {split}"),
            KernelChoice("attention, prefill", "torch SDPA, row by row",
                   f"{sm}: a Triton product would run on ordinary cores; SDPA has its own kernels for this card"),
        ]  # fmt: skip
    prefill = prefill_tile(capability, head_dim, group, number_bytes)
    return [
        KernelChoice("attention, decode", f"triton, tile {decode.block_m} x {decode.block_n}, {decode.stages} stages", split),
        KernelChoice("attention, prefill", f"triton, tile {prefill.block_m} x {prefill.block_n}, {prefill.stages} stages",
               f"{sm}: products on tensor cores; fits {capability.shared_kib} KiB of shared memory"),
    ]  # fmt: skip


def few_rows(capability: Capability, variants: Variants) -> Dataflow:
    """Who multiplies few rows: as asked for, but no flat products where they have no tensor cores."""
    asked = variants.few_rows
    return asked if capability.tensor_cores else Dataflow(asked.flat_from, asked.flat_from)


def _variant_choices(capability: Capability, sm: str, variants: Variants) -> list[KernelChoice]:
    """What `llmlab.kernels.variants` chooses."""
    softmax = KernelChoice("softmax of decoding", "online maximum", "holds for any scores; one maximum for all (kernels='triton+one-max') "
                           "is built, and nobody has measured it on a GPU")  # fmt: skip
    if variants.phi is not None:
        softmax = KernelChoice("softmax of decoding", f"one maximum, {variants.phi:g}", "asked for; units it does not suit are computed again") \
            if capability.tensor_cores else \
            softmax._replace(why=f"one maximum was asked for; on {sm}, without tensor cores, its second loop would spill registers")
    linear = KernelChoice("linear, few rows", "torch (cuBLAS)", "sums in registers and flat products (kernels='triton+rows+flat') are built, and "
                          "nobody has measured them on a GPU")  # fmt: skip
    few = few_rows(capability, variants)
    if few.library_from > 1:
        parts = [f"sums in registers up to {few.flat_from - 1} rows"] if few.flat_from > 1 else []
        parts += [f"flat products up to {few.library_from - 1}"] if few.library_from > few.flat_from else []
        linear = KernelChoice("linear, few rows", f"triton, {', '.join(parts)}", "asked for; beyond, torch (cuBLAS)")
    elif variants.few_rows.library_from > 1:
        linear = linear._replace(why=f"flat products were asked for; {sm} has no tensor cores in Triton")
    return [softmax, linear]


def _row_choices() -> list[KernelChoice]:
    return [
        KernelChoice("rms_norm, add_rms_norm", "triton", "one pass instead of five operators"),
        KernelChoice("rope_store", "triton, one program per token", "norm, rotation and KV write in one launch"),
        KernelChoice("gated_act", "triton", "one pass instead of three operators"),
        KernelChoice("experts", "triton, grouped products", "tokens sorted by expert on the device; no count comes to the host"),
        KernelChoice("sampling", "triton", "argmax, top-k and top-p without sorting: thresholds found by bisection; tokens stay on the device"),
        KernelChoice("copy_blocks", "triton, staged by torch within one pool", "all sources are read before the first write"),
        KernelChoice("merge_states", "torch", "rare; not on the path of a token"),
    ]


def _quantised_choices(capability: Capability, sm: str) -> list[KernelChoice]:
    large = KernelChoice("int8/int4 linear, many rows", "triton, widened in the product", "the weights are read once, narrow")
    if not capability.tensor_cores:
        large = KernelChoice("int8/int4 linear, many rows", "triton widens, torch multiplies",
                       f"{sm} has tensor cores for torch's product, not for Triton's")  # fmt: skip
    return [KernelChoice("int8/int4 linear, few rows", "triton, dot products", "bound by reading the narrow weights"), large]
