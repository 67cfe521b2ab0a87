"""Compile the GPU kernels for a card that is not there: the host code runs, its launches are compiled instead.

    for built in compiled(capability_of("t4"), head_dim=128, group=4, block_size=16):
        print(built.kernel, built.shared)

What is compiled is what would run: the tensors' dtypes, the sizes and the tile shapes come from the very
calls of `TritonKernels`. Nothing is computed. Needs Triton, its interpreter switched off.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from llmlab.kernels.capability import Capability
from llmlab.kernels.layout import AttentionMetadata
from llmlab.kernels.quantized import QuantSpec, quantize_tensor
from llmlab.kernels.softmax_schemes import UnifiedMax
from llmlab.kernels.triton_kernels import FEW_ROWS, TritonKernels, TritonLinear

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


class Built(NamedTuple):
    """One compiled launch: the kernel, bytes of shared memory, whether its code multiplies on tensor cores; registers of
    a thread, and bytes that did not fit into them."""

    kernel: str
    shared: int
    tensor_cores: bool
    registers: int
    spilled: int
    sizes: dict[str, Any]


def source_of(function: Any, arguments: dict[str, Any]) -> ASTSource:
    """A launch as Triton's own launcher would specialise it: ones are constants, sixteens are known, unless a kernel says no."""
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        value = arguments[name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1 and not isinstance(value, bool)):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:  # storages themselves begin at multiples of 256 bytes
                hints[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, hints)


class Usage(NamedTuple):
    """Registers of a thread, and bytes of its stack: what spilled."""

    registers: int
    spilled: int


def usage(cubin: bytes) -> Usage:
    """What the machine code of a kernel takes, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return Usage(int(found["REG"]), int(found["STACK"]))


@contextmanager
def _launches(compile_one: Callable[[Any, dict[str, Any], dict[str, Any]], None]) -> Iterator[None]:
    """While it lasts, launching a kernel hands it to `compile_one` and runs nothing."""
    original = JITFunction.run

    def run(self, *values, grid, warmup, **named):
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        compile_one(self, dict(zip(self.arg_names, values)) | named, options)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def compiled(capability: Capability, head_dim: int = 128, group: int = 4, block_size: int = 16,
             launch: Callable[..., None] | None = None, dtype: torch.dtype | None = None) -> list[Built]:  # fmt: skip
    """What `launch` launches (`launch_all`: every kernel) for a GPU and these sizes, in `dtype` (None: what the card prefers).
    Raises what Triton raises."""
    target, built = GPUTarget("cuda", capability.sm, 32), {}

    def compile_one(function: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        source = source_of(function, arguments)
        key = (function.__name__, source.hash(), tuple(options.items()))
        if key not in built:
            done = triton.compile(source, target=target, options=options)
            sizes = {p.name: arguments[p.name] for p in function.params if p.is_constexpr}
            code = done.asm["ptx"]
            built[key] = Built(function.__name__, done.metadata.shared, "mma" in code, *usage(done.asm["cubin"]), sizes)

    dtype = dtype or (torch.bfloat16 if capability.bf16 else torch.float16)
    with _launches(compile_one):
        (launch or launch_all)(TritonKernels(capability, dtype), dtype, head_dim, group, block_size)
    return list(built.values())


def launch_all(kernels: TritonKernels, dtype: torch.dtype, head_dim: int, group: int, block_size: int) -> None:
    """Call every operation once per variant: decoding, prefilling, windows, caps, norms, both widths of weights."""
    width = 256
    launch_attention(kernels, dtype, head_dim, group, block_size)
    tokens, x = 40, torch.zeros(40, width, dtype=dtype)
    weight = torch.ones(width, dtype=dtype)
    kernels.rms_norm(x, weight, 1e-6)
    kernels.add_rms_norm(x, x, weight, 1e-6)
    for act in ("silu", "gelu_tanh"):
        kernels.gated_act(torch.zeros(tokens, 2 * width, dtype=dtype), act)
    kernels.copy_blocks(torch.zeros(8, 512, dtype=dtype), torch.zeros(8, 512, dtype=dtype), torch.zeros(2, 2, dtype=torch.int64))
    experts = torch.zeros(8, 2 * width, width, dtype=dtype), torch.zeros(8, width, width, dtype=dtype)
    kernels.experts(*experts)(x, torch.zeros(tokens, 8, dtype=dtype), 2, True)
    logits, ones = torch.zeros(2, 1024), torch.ones(2)
    kernels.draw(logits, ones, ones * 0, torch.full((2,), 5), ones * 0.9, ones.double() * 0.5)
    launch_few_rows(kernels, dtype)
    for bits in (8, 4):
        linear = kernels.linear(quantize_tensor(torch.zeros(width, width, dtype=dtype), QuantSpec(bits)))
        for rows in (1, FEW_ROWS, tokens):
            linear(x[:rows])


def launch_few_rows(kernels: TritonKernels, dtype: torch.dtype) -> None:
    """The products of `dataflow`, for weights of a few and of many outputs; flat ones only where they have tensor cores."""
    for outputs in (256, 8192):
        wide = TritonLinear(torch.zeros(outputs, 512, dtype=dtype), torch.zeros(outputs, dtype=dtype))
        for rows in (1, 4, 16):
            wide.by("rows", torch.zeros(rows, 512, dtype=dtype))
        for rows in (3, 64) if kernels.capability.tensor_cores else ():
            wide.by("flat", torch.zeros(rows, 512, dtype=dtype))


def launch_attention(kernels: TritonKernels, dtype: torch.dtype, dim: int, group: int, block_size: int) -> None:
    """One step that decodes a long row and prefills a prompt, then the same with a window and a cap."""
    heads = 2
    lens = (4096, 300)
    tables = [list(range(-(-n // block_size))) for n in lens]
    keys = torch.zeros(len(tables[0]), heads, block_size, dim, dtype=dtype)
    values = torch.zeros_like(keys)
    new = (1, 300)
    q, k = torch.zeros(sum(new), heads * group, dim, dtype=dtype), torch.zeros(sum(new), heads, dim, dtype=dtype)
    turn, norm = torch.zeros(sum(new), dim // 2), torch.ones(dim, dtype=dtype)
    around_one = TritonKernels(kernels.capability, dtype, UnifiedMax(4.0, 2.0, 11.0))
    for window, cap in ((None, None), (512, 30.0)):
        meta = AttentionMetadata.build(new, lens, tables, block_size)
        kernels.paged_attention(q, keys, values, meta, 0.1, window, cap)
        around_one.paged_attention(q, keys, values, meta, 0.1, window, cap)
    kernels.rope_store(q, k, k, turn, turn, keys, values, meta.slot_mapping)
    kernels.rope_store(q, k, k, turn, turn, keys, values, meta.slot_mapping, q_norm=norm, k_norm=norm)
    kernels.store_kv(k, k, keys, values, meta.slot_mapping)
