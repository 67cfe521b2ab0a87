"""What llmlab reaches on the GPU at hand: bandwidth, products, decoding, prefilling, time to first token, beside transformers.

    python benchmarks/gpu.py [--model llama-3.1-8b] [--batches 1 8 32 64 128 256] [--parts machine decode prefill ttft peers placement dataflow] [--json FILE]
                             [--minutes 20] [--resume] [--kernels triton+one-max] [--quantization int4]

    python benchmarks/gpu.py --rehearse     the same script on the CPU, small: to test the script, not to measure anything

One process, random weights, no download. Every decoding row has a floor beside it: the bytes of weights and KV of a step
over the copy bandwidth that this very run measured. transformers' `generate` and its continuous batching get the same
prompts afterwards. What does not fit says so in its row, and the next one follows. The last line is one JSON object with
everything printed (`--json` also writes it after every row, and `--resume` goes on from there: rows that were measured are
not measured again). With `--minutes` no row is begun after that time. Where there is no GPU, the script says so and ends with code
3, having measured nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from llmlab import Engine, LabError, SamplingParams
from llmlab.execution.device_line import CudaLine, DeviceLine, HostLine
from llmlab.kernels.dataflow import inflections, measured
from llmlab.kernels.dispatch import TorchLinear, device_capability, why_no_cuda
from llmlab.models.loader import shape_of
from roofline.memory import weight_bytes
from roofline.precision import Precision
from roofline.shapes import Shape

NO_GPU = 3  # exit code
PARTS = ("machine", "decode", "prefill", "ttft", "peers", "placement", "dataflow")
PLACEMENTS = ("gpu_only", "neo", "apex")
MEMORY = (torch.OutOfMemoryError, MemoryError, LabError)  # a row that does not fit; the next one may

Row = dict[str, Any]


class Case(NamedTuple):
    """One row of a table: what it is about, and how the rest of it is measured."""

    about: Row
    measure: Callable[[], Row]


class Mix(NamedTuple):
    """Ragged requests: their prompts, and how many tokens each is to be answered with."""

    prompts: list[list[int]]
    answers: list[int]


@dataclass
class Bench:
    """One run: its options, its device, and what was found so far. `found[part]` is a list of rows."""

    options: argparse.Namespace
    line: DeviceLine
    dtype: torch.dtype
    found: dict[str, Any]
    progress: Progress
    ends: float = float("inf")  # no row is begun after this, by `time.monotonic`

    @property
    def device(self) -> str:
        return self.line.device.type

    @property
    def machine(self) -> Row:
        return self.found["machine"][0]

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def run(self, part: str, cases: Sequence[Case]) -> None:
        """Measure a table's rows one after the other; what fails is a row that says why."""
        print(f"\n### {part}")
        rows: list[Row] = self.found.setdefault(part, [])
        rows[:] = [row for row in rows if "failed" not in row]
        task = self.progress.add_task(part, total=len(cases))
        for case in cases:
            if any(case.about.items() <= row.items() for row in rows):
                continue  # measured before
            if time.monotonic() > self.ends:
                print(f"left out, the time is over: {case.about}")
                continue
            self.progress.update(task, description=f"{part}: {', '.join(f'{k} {v}' for k, v in case.about.items())}")
            try:
                rows.append({**case.about, **case.measure()})
            except MEMORY as error:
                rows.append({**case.about, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            except Exception as error:  # whatever a driver, a kernel or a peer's release raises: the others count
                rows.append({**case.about, "failed": f"{type(error).__name__}: {error}"})
            self._let_go()
            show(rows)
            self.progress.advance(task)
            if self.options.json:
                self.options.json.write_text(json.dumps(self.found))

    def _let_go(self) -> None:
        gc.collect()  # an engine is a circle of references, its weights a gigabyte or sixteen
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def row(self, part: str, about: Row) -> Row:
        """A row that was measured before, or nothing."""
        return next((r for r in self.found.get(part, []) if about.items() <= r.items()), {})

    @contextmanager
    def engine(self, seqs: int, length: int, tokens: int) -> Iterator[Engine]:
        """llmlab with room for `seqs` requests of `length` tokens, `tokens` in a step."""
        options = self.options
        engine = Engine(model=options.model, random_weights=True, device=self.device, max_num_seqs=seqs, max_model_len=length,
                        max_num_batched_tokens=tokens, overlap_depth=1, quantization=options.quantization, kernels=options.kernels,
                        enable_prefix_caching=False, log_level=1, check_interval=0, gpu_memory=options.gpu_memory)  # fmt: skip
        try:
            yield engine
        finally:
            engine.close()


# --------------------------------------------------------------------------------------- helpers
def timed(line: DeviceLine, work: Callable[[], object], repeats: int = 10) -> float:
    """Median seconds of a call on the device, by its own marks, after three calls that do not count."""
    for _ in range(3):
        work()
    taken = []
    for _ in range(repeats):
        first = line.mark()
        work()
        last = line.mark()
        last.wait()
        taken.append(last.seconds_after(first))
    return statistics.median(taken)


def prompts_of(seed: int, lengths: Sequence[int], vocab: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab - 1, n).tolist() for n in lengths]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def turn(engine: Engine) -> None:
    """One turn of the loop. Raises RuntimeError if a request failed or nothing is left to do."""
    if not engine.has_unfinished_requests():
        raise RuntimeError("the requests ended before they were measured")
    for output in engine.step():
        for answer in output.outputs:
            if answer.finish_reason == "error":
                detail = next((e.detail for e in reversed(list(engine.log)) if type(e).__name__ == "RequestFinished"), "")
                raise RuntimeError(f"a request failed: {detail}")


def finish(engine: Engine) -> None:
    while engine.has_unfinished_requests():
        turn(engine)


# ---------------------------------------------------------------------------------------- llmlab
def machine(bench: Bench) -> list[Case]:
    """Copy bandwidth (read + written) and the rate of a large product, on random data."""
    def measure() -> Row:
        line, rehearse = bench.line, bench.options.rehearse
        size, side = (64 << 20, 512) if rehearse else (min(4 << 30, torch.cuda.mem_get_info()[0] // 4) // 2, 8192)
        source = torch.empty(size // 2, dtype=torch.int16, device=line.device).random_()
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / timed(line, lambda: target.copy_(source))
        a, b = (torch.randn(side, side, device=line.device).to(bench.dtype) for _ in range(2))
        return {"copy GB/s": bandwidth / 1e9, "product TFLOP/s": 2 * side**3 / timed(line, lambda: a @ b) / 1e12}

    return [Case({}, measure)]


def decode(bench: Bench) -> list[Case]:
    """Steady decoding of equal rows behind a prompt of `context` tokens, by batch."""
    return [Case({"batch": batch}, lambda batch=batch: decode_row(bench, batch)) for batch in bench.options.batches]  # type: ignore[misc]


def decode_row(bench: Bench, batch: int) -> Row:
    options = bench.options
    context, steps, budget = options.context, options.steps, max(8192, 2 * batch)
    prefilling = -(-batch * context // (budget - batch))  # steps in which the first rows decode while the last are prefilled
    answer = 2 * steps + prefilling + 16
    with bench.engine(batch, context + answer, budget) as engine:
        memory = engine.scheduler.memory
        if memory.pool.num_blocks < batch * memory.blocks_for(context + answer):
            raise MemoryError(f"KV of {batch} x {context + answer} tokens does not fit into {memory.pool.num_blocks * memory.block_size} tokens")
        for prompt in prompts_of(batch, [context] * batch, engine.model.vocab_size):
            engine.add_request(prompt, greedy(answer))
        while len(engine.metrics.requests) < batch or any(r.num_output_tokens < 8 for r in engine.metrics.requests.values()):
            turn(engine)
        bench.sync()
        began, first = time.perf_counter(), engine.metrics.num_steps
        while engine.metrics.num_steps < first + steps:
            turn(engine)
        seconds = (time.perf_counter() - began) / steps
        if engine.num_running < batch:
            raise RuntimeError(f"only {engine.num_running} of {batch} requests ran to the end of the measurement")
        floor = floor_of(engine, batch * (context + 8 + prefilling / 2 + steps / 2), bench.machine)
        return {"tokens/s": batch / seconds, "ms/step": seconds * 1e3, "floor ms": floor * 1e3, "MBU": floor / seconds,
                "device idle": idle_share(engine, steps)}  # fmt: skip


def floor_of(engine: Engine, kv_tokens: float, measured: Row) -> float:
    """Seconds to read all weights and the KV of `kv_tokens` tokens once, at the measured bandwidth."""
    precision = Precision.parse(next(iter(engine.log)).model["precision"])  # type: ignore[union-attr]
    shape = engine.model.shape
    moved = weight_bytes(shape, precision) + kv_tokens * shape.kv_bytes_per_token(precision.name)
    return float(moved / (measured["copy GB/s"] * 1e9))


def idle_share(engine: Engine, steps: int) -> float:
    """How long the device stood still before a step, as a share of the step: the median of the last ones."""
    ended = [e.measured for e in engine.log if type(e).__name__ == "StepFinished"]
    return statistics.median(m.parts.get("idle", 0.0) / (m.execute or 1.0) for m in ended[-steps:])


def prefill(bench: Bench) -> list[Case]:
    """Prompts alone, one token each."""
    sizes = ((2, 64), (1, 128)) if bench.options.rehearse else ((8, 2048), (1, 8192), (32, 256))
    return [Case({"prompts": f"{count} x {length}"}, lambda c=count, n=length: prefill_row(bench, c, n))  # type: ignore[misc]
            for count, length in sizes]  # fmt: skip


def prefill_row(bench: Bench, count: int, length: int) -> Row:
    with bench.engine(count, length + 1, 16_384) as engine:
        seconds = []
        for seed in range(4):
            for prompt in prompts_of(seed, [length] * count, engine.model.vocab_size):
                engine.add_request(prompt, greedy(1))
            bench.sync()
            began = time.perf_counter()
            finish(engine)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])
        rate = prefill_flops(engine.model.shape, count, length) / median / 1e12
    return {"tokens/s": count * length / median, "TFLOP/s": rate, "of the product's rate": rate / bench.machine["product TFLOP/s"]}


def prefill_flops(shape: Shape, count: int, length: int) -> float:
    """Operations of `count` prompts: layers for every token, the head for the last of each, half of the square of attention."""
    table = shape.vocab_size * shape.hidden_size
    layers = shape.num_params() - table * (1 if shape.tied else 2)
    attention = 2 * length**2 * shape.num_heads * shape.head_dim * shape.num_layers
    return float(count * (2 * layers * length + 2 * table + attention))


def ttft(bench: Bench) -> list[Case]:
    """Time to first token while requests keep coming: half a context asked, an eighth answered."""
    return [Case({"requests/s": rate}, lambda rate=rate: ttft_row(bench, rate)) for rate in rates(bench)]  # type: ignore[misc]


def rates(bench: Bench) -> tuple[float, ...]:
    return (200.0,) if bench.options.rehearse else (2.0, 8.0, 16.0)


def arrivals(bench: Bench, rate: float) -> list[float]:
    return np.cumsum(np.random.default_rng(0).exponential(1 / rate, bench.options.requests)).tolist()


def ttft_row(bench: Bench, rate: float) -> Row:
    options = bench.options
    with bench.engine(128, options.context, 4096) as engine:
        prompts = prompts_of(0, [options.context // 2] * options.requests, engine.model.vocab_size)
        engine.add_request(prompts[0], greedy(2))
        finish(engine)  # kernels compile with the first steps
        now = engine.clock.now()
        names = [engine.add_request(prompt, greedy(options.context // 8), arrival=now + at)
                 for prompt, at in zip(prompts, arrivals(bench, rate))]  # fmt: skip
        finish(engine)
        waited = [engine.metrics.requests[name].ttft for name in names]
    return {"p50 TTFT ms": float(np.percentile(waited, 50)) * 1e3, "p99 TTFT ms": float(np.percentile(waited, 99)) * 1e3}


def placement(bench: Bench) -> list[Case]:
    """Requests whose KV does not fit on the device, a quarter of it does: waiting, or attended to on the CPU."""
    return [Case({"placement": name}, lambda name=name: placement_row(bench, name)) for name in PLACEMENTS]  # type: ignore[misc]


def placement_row(bench: Bench, name: str) -> Row:
    options = bench.options
    length, count = options.context // 2, options.requests
    blocks = max(2, count // 4) * -(-length // 16)
    with Engine(model=options.model, random_weights=True, device=bench.device, placement=name, num_blocks=blocks,
                num_host_blocks=4 * blocks, max_num_seqs=count, max_model_len=length, max_num_batched_tokens=2048,
                enable_prefix_caching=False, log_level=1, check_interval=0, kernels=options.kernels) as engine:  # fmt: skip
        prompts = prompts_of(2, [length // 2] * count, engine.model.vocab_size)
        answer, seconds = length // 4, 0.0
        for some in (prompts[:2], prompts):  # kernels compile with the first
            for prompt in some:
                engine.add_request(prompt, greedy(answer))
            began = time.perf_counter()
            finish(engine)
            seconds = time.perf_counter() - began
        return {"tokens/s": count * answer / seconds, "KV tokens on the device": blocks * 16}


def dataflow(bench: Bench) -> list[Case]:
    """Microseconds of a linear layer by kernel and rows, for the four shapes of weights of the model, and the bounds that follow."""
    shape = shape_of(bench.options.model)
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    sizes = {"qkv": (heads, shape.hidden_size), "output": (shape.hidden_size, shape.num_heads * shape.head_dim),
             "gate_up": (2 * shape.intermediate_size, shape.hidden_size), "down": (shape.hidden_size, shape.intermediate_size)}  # fmt: skip
    return [Case({"layer": name, "weights": f"{size[0]} x {size[1]}"}, lambda size=size: dataflow_row(bench, size))  # type: ignore[misc]
            for name, size in sizes.items()]  # fmt: skip


def dataflow_row(bench: Bench, size: tuple[int, int]) -> Row:
    weight = torch.randn(size, device=bench.line.device).to(bench.dtype) / size[1] ** 0.5
    linear: Any = TorchLinear(weight)
    kernels: tuple[str, ...] = ("library",)
    if bench.device == "cuda":
        from llmlab.kernels.triton_kernels import TritonLinear

        linear = TritonLinear(weight)
        kernels = ("rows", "flat", "library") if device_capability("cuda").tensor_cores else ("rows", "library")

    def call(kernel: str, rows: int) -> Callable[[], object]:
        x = torch.randn(rows, size[1], device=bench.line.device).to(bench.dtype)
        return (lambda: linear.by(kernel, x)) if len(kernels) > 1 else lambda: linear(x)

    seconds = measured(call, lambda work: timed(bench.line, work), kernels)
    bounds = inflections(seconds)
    times = {f"{kernel} us": ", ".join(f"{rows}: {s * 1e6:.0f}" for rows, s in by.items()) for kernel, by in seconds.items()}
    return {**times, "flat from": bounds.flat_from, "library from": bounds.library_from}


def ragged(bench: Bench) -> list[Case]:
    """Ragged requests (1/8 to 1 context asked, 1/16 to 1/4 answered), all at once: useful tokens per second."""
    return [Case({"engine": "llmlab"}, lambda: ragged_row(bench))]


def mix_of(bench: Bench, vocab: int) -> Mix:
    generator, longest = np.random.default_rng(1), bench.options.context
    lengths, answers = (generator.integers(longest // a, longest // b + 1, bench.options.requests).tolist() for a, b in ((8, 1), (16, 4)))
    return Mix(prompts_of(1, lengths, vocab), answers)


def ragged_row(bench: Bench) -> Row:
    options = bench.options
    with bench.engine(options.requests, 2 * options.context, 8 * options.context) as engine:
        mix, seconds = mix_of(bench, engine.model.vocab_size), 0.0
        for _ in range(2):  # the first time kernels compile and graphs are recorded
            for prompt, answer in zip(*mix):
                engine.add_request(prompt, greedy(answer))
            began = time.perf_counter()
            finish(engine)
            seconds = time.perf_counter() - began
    return {"useful tokens/s": sum(mix.answers) / seconds}


# ---------------------------------------------------------------------------------- transformers
class Peer:
    """The same shape in transformers, its random weights made when first needed."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.shape, self._model = bench, shape_of(bench.options.model), None
        self.vocab = self.shape.vocab_size

    @property
    def model(self) -> Any:
        if self._model is None:
            from transformers import AutoModelForCausalLM, LlamaConfig

            shape = self.shape
            config = LlamaConfig(hidden_size=shape.hidden_size, head_dim=shape.head_dim, num_hidden_layers=shape.num_layers,
                                 num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
                                 intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
                                 max_position_embeddings=16_384)  # fmt: skip
            with self.bench.line.device:
                self._model = AutoModelForCausalLM.from_config(config, dtype=self.bench.dtype).eval()
        return self._model

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds of `generate`, prompts padded on the left."""
        longest, device = max(map(len, prompts)), self.bench.line.device
        padded = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.bench.sync()
        began = time.perf_counter()
        self.model.generate(padded, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        self.bench.sync()
        return time.perf_counter() - began

    def continuous(self, mix: Mix, at: Sequence[float] | None = None) -> tuple[float, list[float]]:
        """(seconds, times to first token) of continuous batching, requests sent at once or at these seconds."""
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=max(mix.answers), do_sample=False, eos_token_id=-1)
        with self.model.continuous_batching_context_manager(generation_config=config, timeout=5) as manager:
            for warm in (True, False):
                prompts, answers = (mix.prompts[:1], mix.answers[:1]) if warm else mix
                began = time.perf_counter()
                for i, (prompt, tokens) in enumerate(zip(prompts, answers)):
                    if at is not None and not warm:
                        time.sleep(max(0.0, began + at[i] - time.perf_counter()))
                    manager.add_request(prompt, f"{warm}{i}", max_new_tokens=tokens, record_timestamps=True, eos_token_id=-1)
                done = [self._next(manager) for _ in prompts]
        if any(len(r.generated_tokens) < 1 or r.error for r in done):
            raise RuntimeError(next((r.error for r in done if r.error), "a request came back empty"))
        return time.perf_counter() - began, [r.timestamps[0] - r.created_time for r in done]

    def _next(self, manager: Any) -> Any:
        while True:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                return result
            if not manager.is_running():
                raise RuntimeError("its generation thread ended")

    # ------------------------------------------------------------------------------------- cases
    def decode_row(self, batch: int) -> Row:
        options = self.bench.options
        prompts = prompts_of(batch, [options.context] * batch, self.vocab)
        self.generate(prompts, 4)
        seconds = (self.generate(prompts, 2 + options.steps) - self.generate(prompts, 2)) / options.steps
        return self._beside("decode", {"batch": batch}, "tokens/s", batch / seconds)

    def prefill_row(self, about: Row) -> Row:
        count, length = map(int, about["prompts"].split(" x "))
        seconds = [self.generate(prompts_of(seed, [length] * count, self.vocab), 1) for seed in range(4)]
        return self._beside("prefill", about, "tokens/s", count * length / statistics.median(seconds[1:]))

    def ttft_row(self, rate: float) -> Row:
        options = self.bench.options
        mix = Mix(prompts_of(0, [options.context // 2] * options.requests, self.vocab), [options.context // 8] * options.requests)
        waited = self.continuous(mix, arrivals(self.bench, rate))[1]
        ours, theirs = self.bench.row("ttft", {"requests/s": rate}).get("p50 TTFT ms"), float(np.percentile(waited, 50)) * 1e3
        return {"p50 TTFT ms": theirs, "p99 TTFT ms": float(np.percentile(waited, 99)) * 1e3,
                "llmlab is x faster": theirs / ours if ours else None}  # fmt: skip

    def ragged_row(self, seconds_of: Callable[[Mix], float]) -> Row:
        mix = mix_of(self.bench, self.vocab)
        return self._beside("ragged", {"engine": "llmlab"}, "useful tokens/s", sum(mix.answers) / seconds_of(mix))

    def padded(self, mix: Mix) -> float:
        self.generate(mix.prompts, 4)
        return self.generate(mix.prompts, max(mix.answers))

    def _beside(self, part: str, about: Row, what: str, value: float) -> Row:
        ours = self.bench.row(part, about).get(what)
        return {what: value, "llmlab is x faster": ours / value if ours else None}


def peers(bench: Bench) -> None:
    """transformers on the prompts of the other parts: `generate` where requests are equal, continuous batching under load."""
    bench.run("ragged", ragged(bench))
    peer, parts = Peer(bench), bench.options.parts
    if "decode" in parts:
        bench.run("decode, transformers generate", [Case({"batch": b}, lambda b=b: peer.decode_row(b)) for b in bench.options.batches])  # type: ignore[misc]
    if "prefill" in parts:
        bench.run("prefill, transformers generate", [Case(c.about, lambda a=c.about: peer.prefill_row(a)) for c in prefill(bench)])  # type: ignore[misc]
    if "ttft" in parts:
        bench.run("ttft, transformers continuous batching", [Case({"requests/s": r}, lambda r=r: peer.ttft_row(r)) for r in rates(bench)])  # type: ignore[misc]
    bench.run("ragged, transformers", [
        Case({"engine": "generate, padded"}, lambda: peer.ragged_row(peer.padded)),
        Case({"engine": "continuous batching"}, lambda: peer.ragged_row(lambda mix: peer.continuous(mix)[0])),
    ])  # fmt: skip


# ------------------------------------------------------------------------------------- the run
def show(rows: Sequence[Row]) -> None:
    """The last row of a table, with a head if its columns are new; a failed row has its reason in place of numbers."""
    row, before = rows[-1], rows[-2] if len(rows) > 1 else {}
    if row.keys() != before.keys() and "failed" not in row:
        print("\n| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
    print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape; random weights")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--quantization", help="int8 or int4")
    parser.add_argument("--gpu-memory", help="imitate a smaller card: t4, 16GB")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the JSON here, too")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of a decoding row")
    parser.add_argument("--requests", type=int, default=64, help="requests of the parts ttft and peers")
    parser.add_argument("--steps", type=int, default=64, help="decoding steps that count")
    parser.add_argument("--kernels", default="auto", help="triton+one-max, triton+rows+flat, ...")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after this time")
    parser.add_argument("--resume", action="store_true", help="go on with the rows of --json")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU and small, to test the script")
    options = parser.parse_args()
    reason = None if options.rehearse else why_no_cuda()
    if reason is not None:
        print(f"No GPU to measure: {reason}. Nothing was measured. `llmlab kernels --device t4` prints what a card would get, "
              "`llmlab sim --hardware t4` predicts how long it would take.", file=sys.stderr)  # fmt: skip
        raise SystemExit(NO_GPU)
    print(json.dumps(rehearse(options) if options.rehearse else measure(options, CudaLine(torch.device("cuda")), on_card(options))))


def rehearse(options: argparse.Namespace) -> dict[str, Any]:
    """Every part on the CPU, with the executor that a GPU would have."""
    from llmlab import executors

    options.model, options.batches, options.context, options.requests, options.steps = "llama-28m", [1, 2], 64, 4, 8
    executors.device_line = lambda loaded: HostLine(loaded.device)
    print("REHEARSAL on the CPU: no number below is of a GPU.")
    return measure(options, HostLine(), {"rehearsal": True, "dtype": "torch.float32"})


def on_card(options: argparse.Namespace) -> dict[str, Any]:
    """Where and on what."""
    import transformers
    import triton

    card = device_capability("cuda")
    return {
        "card": card._asdict(), "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "transformers": transformers.__version__,
        "driver": subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                                 text=True, check=False).stdout.strip(),
        "python": platform.python_version(), "model": options.model, "dtype": str(torch.bfloat16 if card.bf16 else torch.float16),
        "quantization": options.quantization, "kernels": options.kernels, "context": options.context, "requests": options.requests,
    }  # fmt: skip


def measure(options: argparse.Namespace, line: DeviceLine, found: dict[str, Any]) -> dict[str, Any]:
    """All parts that were asked for; the machine always, since the others are held against it."""
    ends = time.monotonic() + 60 * options.minutes
    if options.resume and options.json and options.json.exists():
        found = {**json.loads(options.json.read_text()), **found}
    dtype = getattr(torch, found["dtype"].removeprefix("torch."))
    print(", ".join(f"{name} {value}" for name, value in found.items() if not isinstance(value, list)))
    terminal = sys.stdout.isatty()
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=terminal, redirect_stderr=terminal) as progress:
        bench = Bench(options, line, dtype, found, progress, ends)
        bench.run("machine", machine(bench))
        for part, cases in (("decode", decode), ("prefill", prefill), ("ttft", ttft)):
            if part in options.parts:
                bench.run(part, cases(bench))
        if "peers" in options.parts:
            peers(bench)
        for part, cases in (("placement", placement), ("dataflow", dataflow)):
            if part in options.parts:
                bench.run(part, cases(bench))
    return found


if __name__ == "__main__":
    main()
