"""What the CPU kernels reach on this machine, beside torch's: bandwidth, linear layers, attention, a whole model.

    python benchmarks/kernels_cpu.py [machine pools linear model attention cold] [--threads N]

Every contender of a line takes turns with the others and the best time of each counts, so that a noisy
neighbour harms none of them alone. Weights and KV are laid out so that they exceed the caches. The last
line is one JSON object with everything printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmlab.kernels import reference
from llmlab.kernels.dispatch import Kernels, LinearImpl, TorchLinear, make_kernels, set_num_threads
from llmlab.kernels.layout import AttentionMetadata

Shape = tuple[int, int]
# A Llama of 28M parameters: qkv, output, gate and up, down of one layer; the output head. (out, in)
LAYER: dict[str, Shape] = {
    "qkv": (1024, 512),
    "output": (512, 512),
    "gate_up": (2816, 512),
    "down": (512, 1408),
}
HEAD: Shape = (8192, 512)
LAYERS = 8
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
FAR_MORE_THAN_CACHE = 96 * 2**20


def race(contenders: Mapping[str, Callable[[], object]], seconds: float = 0.25) -> dict[str, float]:
    """Best seconds of each; all run in turn until each has had `seconds` (at least three times)."""
    best = dict.fromkeys(contenders, float("inf"))
    for call in contenders.values():
        call()
    spent, rounds = 0.0, 0
    while rounds < 3 or spent < seconds * len(contenders):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            taken = time.perf_counter() - start
            best[name], spent = min(best[name], taken), spent + taken
        rounds += 1
    return best


class Report:
    """Rows of tables, printed as Markdown while they come, and kept for the JSON line."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self._head: tuple[str, ...] = ()

    def title(self, text: str) -> None:
        print(f"\n### {text}\n")
        self._section, self._head = text, ()

    def row(self, **cells: object) -> None:
        if tuple(cells) != self._head:
            self._head = tuple(cells)
            print("| " + " | ".join(cells) + " |\n|" + " --- |" * len(cells))
        print(
            "| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells.values()) + " |",
            flush=True,
        )
        self.rows.append({"section": self._section, **cells})


@dataclass(frozen=True)
class Machine:
    """What the floors are made of: bytes per second read, floating-point operations per second."""

    read: float
    flops: float


def versions() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    cores = len(os.sched_getaffinity(0))
    return {
        "cpu": model,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
    }


# ------------------------------------------------------------------------------------------ machine
def measure_machine(kernels: Kernels, report: Report) -> Machine:
    report.title("Machine")
    n = 2048
    a, b, c = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    source, target = torch.ones(FAR_MORE_THAN_CACHE // 4), torch.empty(FAR_MORE_THAN_CACHE // 4)
    square = kernels.linear(b)
    best = race(
        {
            "copy": lambda: target.copy_(source),
            "read": lambda: source.sum(),
            "torch": lambda: torch.mm(a, b, out=c),
            "llmlab": lambda: square(a),
        },
        0.5,
    )
    size, flops = float(FAR_MORE_THAN_CACHE), 2.0 * n**3
    report.row(what="copy, read + written", value=2 * size / best["copy"] / 1e9, unit="GB/s")
    report.row(what="read (torch.sum)", value=size / best["read"] / 1e9, unit="GB/s")
    for name in ("torch", "llmlab"):
        report.row(what=f"product 2048^3, {name}", value=flops / best[name] / 1e9, unit="GFLOP/s")
    return Machine(size / best["read"], flops / min(best["torch"], best["llmlab"]))


def measure_pools(kernels: Kernels, report: Report) -> None:
    """Why one team: the same work in numba's own pool, alone and next to a torch operator."""
    report.title("Two pools of threads or one")

    @numba.njit(parallel=True, fastmath=True)
    def product(x, weight, y):  # type: ignore[no-untyped-def]
        for i in numba.prange(weight.shape[0]):
            total = np.float32(0.0)
            for j in range(weight.shape[1]):
                total += weight[i, j] * x[j]
            y[i] = total

    weight, row, out = torch.randn(1024, 512), torch.randn(1, 512), torch.empty(1024)
    small, square = torch.randn(64, 512), torch.randn(512, 512)
    linear = kernels.linear(weight)

    def hundred(*calls: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                for call in calls:
                    call()

        return run

    def prange() -> None:
        product(row.numpy()[0], weight.numpy(), out.numpy())

    calls: dict[str, tuple[Callable[[], object], ...]] = {
        "linear 1024 x 512, 1 row: llmlab": (lambda: linear(row),),
        "the same as a numba prange, its own pool": (prange,),
        "torch.mm 64 x 512 x 512": (lambda: torch.mm(small, square),),
        "torch.mm, then llmlab": (lambda: torch.mm(small, square), lambda: linear(row)),
        "torch.mm, then the prange": (lambda: torch.mm(small, square), prange),
    }
    for name, steps in calls.items():
        report.row(what=name, microseconds=race({name: hundred(*steps)})[name] * 1e4)
    report.row(what=f"(threading layer of numba: {numba.threading_layer()})", microseconds="")


# ------------------------------------------------------------------------------------------- linear
class MkldnnLinear:
    """oneDNN with weights reordered once for a batch size: the best that torch offers."""

    def __init__(self, weight: Tensor, batch: int) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, batch)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return y


def all_layers(layers: list[LinearImpl], inputs: dict[int, Tensor]) -> Callable[[], None]:
    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return run


class LinearRace:
    """The same weights in three packings; all but oneDNN's serve every batch size."""

    def __init__(self, kernels: Kernels, weights: list[Tensor]) -> None:
        self._weights = weights
        self._torch: list[LinearImpl] = [TorchLinear(weight) for weight in weights]
        self._llmlab = [kernels.linear(weight) for weight in weights]
        self.bytes = sum(4.0 * weight.numel() for weight in weights)

    def __call__(self, batch: int, seconds: float) -> dict[str, float]:
        """Best seconds for all weights once, per implementation."""
        inputs = {weight.shape[1]: torch.randn(batch, weight.shape[1]) for weight in self._weights}
        mkldnn: list[LinearImpl] = [MkldnnLinear(weight, batch) for weight in self._weights]
        sets = {"torch": self._torch, "mkldnn": mkldnn, "llmlab": self._llmlab}
        return race({name: all_layers(layers, inputs) for name, layers in sets.items()}, seconds)


def measure_linear(kernels: Kernels, report: Report) -> None:
    report.title("Linear layers, weights read from memory (GB/s of weights, GFLOP/s)")
    for name, shape in {**LAYER, "head": HEAD}.items():
        count = -(-FAR_MORE_THAN_CACHE // (4 * shape[0] * shape[1]))
        contest = LinearRace(kernels, [torch.randn(shape) for _ in range(count)])
        for batch in BATCHES:
            best = contest(batch, 0.06)
            cells: dict[str, object] = {"layer": f"{name} {shape[0]} x {shape[1]}", "batch": batch}
            for contender, seconds in best.items():
                cells[f"{contender} GB/s"] = contest.bytes / seconds / 1e9
                cells[f"{contender} GFLOP/s"] = contest.bytes / 2 * batch / seconds / 1e9
            report.row(**cells)


def measure_model(kernels: Kernels, report: Report) -> None:
    machine = measure_machine(kernels, report)
    report.title(f"All linear layers of the 28M model ({LAYERS} layers and the head), in order")
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in LAYER.values()] + [torch.randn(HEAD)]
    contest = LinearRace(kernels, weights)
    for batch in (1, 4, 8, 16, 32, 64, 512):
        best = contest(batch, 0.4)
        floor = max(contest.bytes / machine.read, contest.bytes / 2 * batch / machine.flops)
        cells: dict[str, object] = {"batch": batch, "floor ms": floor * 1e3}
        for name, seconds in best.items():
            cells |= {f"{name} ms": seconds * 1e3, f"{name} % of floor": 100 * floor / seconds}
        report.row(**cells)


# ---------------------------------------------------------------------------------------- attention
def attention_line(
    kernels: Kernels, report: Report, name: str, new: list[int], lens: list[int], heads: Shape, dim: int = 64
) -> None:
    """Ours over blocks of 16 in random order; torch SDPA over each row's KV laid out contiguously."""
    hq, hkv = heads
    size = 8.0 * sum(lens) * hkv * dim
    layers = max(1, min(64, int(FAR_MORE_THAN_CACHE / size)))
    order = torch.randperm(sum(-(-n // 16) for n in lens)).tolist()
    tables = [[order.pop() for _ in range(-(-n // 16))] for n in lens]
    meta = AttentionMetadata.build(new, lens, tables, 16)
    caches = [torch.randn(2, sum(map(len, tables)), hkv, 16, dim) for _ in range(layers)]
    rows = [[torch.randn(2, 1, hkv, n, dim) for n in lens] for _ in range(layers)]
    q = torch.randn(sum(new), hq, dim)
    queries = [part.transpose(0, 1).unsqueeze(0).contiguous() for part in q.split(new)]
    masks = [
        None if n == 1 else reference.visible(n, length, "causal", None, q.device)
        for n, length in zip(new, lens, strict=True)
    ]

    def paged() -> None:
        for cache in caches:
            kernels.paged_attention(q, cache[0], cache[1], meta, dim**-0.5)

    def contiguous() -> None:
        for layer in rows:
            for query, (k, v), mask in zip(queries, layer, masks, strict=True):
                F.scaled_dot_product_attention(query, k, v, attn_mask=mask, enable_gqa=hq != hkv)

    best = race({"paged": paged, "sdpa": contiguous}, 0.6)
    flops = sum(4.0 * hq * dim * (n * length - n * (n - 1) / 2) for n, length in zip(new, lens, strict=True))
    report.row(
        case=name,
        paged_ms=best["paged"] / layers * 1e3,
        sdpa_ms=best["sdpa"] / layers * 1e3,
        times=best["sdpa"] / best["paged"],
        paged_GB_s=size * layers / best["paged"] / 1e9,
        sdpa_GB_s=size * layers / best["sdpa"] / 1e9,
        paged_GFLOP_s=flops * layers / best["paged"] / 1e9,
    )


def measure_attention(kernels: Kernels, report: Report) -> None:
    report.title("Attention: paged over scattered blocks, torch SDPA row by row over contiguous KV")
    generator = np.random.default_rng(0)
    lens = np.clip(generator.lognormal(6, 0.7, 32), 50, 2000).astype(int).tolist()
    line = lambda *args: attention_line(kernels, report, *args)  # noqa: E731
    line("32 rows decode, GQA 8/4 heads", [1] * 32, lens, (8, 4))
    line("32 rows decode, MHA 8/8 heads", [1] * 32, lens, (8, 8))
    line("32 rows decode, GQA 32/8 heads of 128", [1] * 32, lens, (32, 8), 128)
    line("1 row of 512", [1], [512], (8, 4))
    line("1 row of 8192", [1], [8192], (8, 4))
    line("1 row of 8192, MQA 8/1 heads", [1], [8192], (8, 1))
    line("chunk of 512 behind 1536", [512], [2048], (8, 4))
    line("8 prompts of 256", [256] * 8, [256] * 8, (8, 4))
    line("chunk of 256, and 31 rows decode", [256] + [1] * 31, [256] + lens[:31], (8, 4))


# --------------------------------------------------------------------------------------------- cold
COLD = """
import time; start = time.perf_counter()
import torch; after_torch = time.perf_counter()
from llmlab.kernels.dispatch import make_kernels
from llmlab.kernels.layout import AttentionMetadata
kernels = make_kernels("numba"); after_import = time.perf_counter()
q, cache = torch.randn(1, 2, 64), torch.randn(2, 1, 1, 8, 64)
meta = AttentionMetadata.build([1], [1], [[0]], 8)
y = kernels.norm_linear(torch.randn(1, 64), torch.ones(64), 1e-5, kernels.linear(torch.randn(256, 64)))
linear = time.perf_counter()
kernels.rope_store(q, q[:, :1], q[:, :1], q[:, 0, :32], q[:, 0, :32], cache[0], cache[1], meta.slot_mapping)
rope = time.perf_counter()
kernels.paged_attention(q, cache[0], cache[1], meta, 1.0); attention = time.perf_counter()
print(after_torch - start, after_import - after_torch, linear - after_import, rope - linear, attention - rope)
"""


def measure_cold(report: Report) -> None:
    report.title("First call in a new process (seconds)")
    root = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": root}
        for state in ("nothing compiled yet", "machine code cached"):
            run = [sys.executable, "-c", COLD]
            out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
            parts = [float(x) for x in out.split()]
            report.row(
                state=state,
                import_torch=parts[0],
                import_kernels=parts[1],
                linear=parts[2],
                rope=parts[3],
                attention=parts[4],
                kernels_total=sum(parts[1:]),
            )


def main() -> None:
    sections = ("machine", "pools", "linear", "model", "attention", "cold")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", default=sections, help=f"of {', '.join(sections)}")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        set_num_threads(arguments.threads)
    torch.manual_seed(0)
    report, kernels, facts = Report(), make_kernels("numba"), versions()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    measures: dict[str, Callable[[], object]] = {
        "machine": lambda: measure_machine(kernels, report),
        "pools": lambda: measure_pools(kernels, report),
        "linear": lambda: measure_linear(kernels, report),
        "model": lambda: measure_model(kernels, report),
        "attention": lambda: measure_attention(kernels, report),
        "cold": lambda: measure_cold(report),
    }
    for section in arguments.sections:
        measures[section]()
    print(json.dumps({"facts": facts, "rows": report.rows}))


if __name__ == "__main__":
    main()
