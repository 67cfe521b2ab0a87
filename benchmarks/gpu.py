"""What llmlab reaches on the GPU at hand: bandwidth, products, decoding, prefilling, time to first token, beside transformers.

    python benchmarks/gpu.py [--model llama-3.1-8b] [--batches 1 8 32 64 128 256] [--parts machine decode prefill ttft peers] [--json FILE]

    python benchmarks/gpu.py --rehearse     the same script on the CPU, small: to test the script, not to measure anything

One process, random weights, no download. Every decoding row has a floor beside it: the bytes of weights and KV of a step
over the copy bandwidth that this very run measured. The last line is one JSON object with everything printed; where there
is no GPU, the script says so and ends with code 3, having measured nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlab import Engine, SamplingParams
from llmlab.execution.device_line import CudaLine, DeviceLine, HostLine
from llmlab.kernels.dispatch import device_capability
from roofline.memory import weight_bytes
from roofline.precision import Precision

NO_GPU = 3  # exit code
STEPS = 64  # decoding steps that count
PREFILL = ((8, 2048), (1, 8192), (32, 256))  # prompts x tokens


def why_not() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.backends.cuda.is_built():
        return f"this torch ({torch.__version__}) was built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: no card, no driver, or a driver older than this torch needs (nvidia-smi tells)"
    return None


def sync() -> None:
    if torch.cuda.is_available():
        sync()


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


def machine(options: argparse.Namespace, line: DeviceLine, dtype: torch.dtype) -> dict[str, Any]:
    """Copy bandwidth (read + written) and the rate of a large product, on random data."""
    size, side = (64 << 20, 512) if options.rehearse else (min(4 << 30, torch.cuda.mem_get_info()[0] // 4) // 2, 8192)
    source = torch.empty(size // 2, dtype=torch.int16, device=line.device).random_()
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / timed(line, lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=line.device).to(dtype) for _ in range(2))
    rate = 2 * side**3 / timed(line, lambda: a @ b)
    return {"copy GB/s": bandwidth / 1e9, "product TFLOP/s": rate / 1e12}


def engine_for(options: argparse.Namespace, seqs: int, length: int, tokens: int) -> Engine:
    return Engine(model=options.model, random_weights=True, device="cpu" if options.rehearse else "cuda", max_num_seqs=seqs, max_model_len=length,
                  max_num_batched_tokens=tokens, overlap_depth=1, quantization=options.quantization, enable_prefix_caching=False,
                  log_level=1, check_interval=0, gpu_memory=options.gpu_memory)  # fmt: skip


def prompt(generator: np.random.Generator, length: int, vocab: int) -> list[int]:
    return generator.integers(0, vocab - 1, length).tolist()


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def decode(options: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Steady decoding of equal rows behind a prompt of `context` tokens, by batch."""
    rows = []
    for batch in options.batches:
        engine = engine_for(options, batch, options.context + 2 * STEPS, max(8192, batch))
        generator = np.random.default_rng(batch)
        for _ in range(batch):
            engine.add_request(prompt(generator, options.context, engine.model.vocab_size), greedy(STEPS + 24))
        while any(r.num_output_tokens < 8 for r in engine.metrics.requests.values()) or len(engine.metrics.requests) < batch:
            engine.step()
        sync()
        began, steps = time.perf_counter(), engine.metrics.num_steps
        while engine.metrics.num_steps < steps + STEPS:
            engine.step()
        seconds = (time.perf_counter() - began) / STEPS
        idle = [e.measured.parts.get("idle", 0.0) / (e.measured.execute or 1.0) for e in engine.log if type(e).__name__ == "StepFinished"]
        precision = Precision.parse(next(iter(engine.log)).model["precision"])
        shape = engine.model.shape
        moved = weight_bytes(shape, precision) + batch * (options.context + 8 + STEPS / 2) * shape.kv_bytes_per_token(precision.name)
        floor = moved / (facts["copy GB/s"] * 1e9)
        rows.append({"batch": batch, "tokens/s": batch / seconds, "ms/step": seconds * 1e3, "floor ms": floor * 1e3,
                     "of the floor": floor / seconds, "device idle": statistics.median(idle[-STEPS:])})  # fmt: skip
        show(rows[-1], first=len(rows) == 1)
        engine.close()
        del engine
        torch.cuda.empty_cache()
    return rows


def prefill(options: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompts alone, one token each."""
    rows = []
    for count, length in ((2, 64), (1, 128)) if options.rehearse else PREFILL:
        engine = engine_for(options, count, length + 1, 16_384)
        generator, seconds = np.random.default_rng(length), []
        for _ in range(4):
            for _ in range(count):
                engine.add_request(prompt(generator, length, engine.model.vocab_size), greedy(1))
            sync()
            began = time.perf_counter()
            while engine.has_unfinished_requests():
                engine.step()
            seconds.append(time.perf_counter() - began)
        best = statistics.median(seconds[1:])
        flops = 2 * engine.model.shape.num_params() * count * length
        rows.append({"prompts": f"{count} x {length}", "tokens/s": count * length / best, "TFLOP/s": flops / best / 1e12,
                     "of the product's rate": flops / best / 1e12 / facts["product TFLOP/s"]})  # fmt: skip
        show(rows[-1], first=len(rows) == 1)
        engine.close()
        del engine
        torch.cuda.empty_cache()
    return rows


def ttft(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to first token while requests keep coming: half a context asked, an eighth answered."""
    rows = []
    for rate in (200.0,) if options.rehearse else (2.0, 8.0, 16.0):
        engine = engine_for(options, 128, 1024, 4096)
        generator = np.random.default_rng(0)
        at = engine.clock.now() + np.cumsum(generator.exponential(1 / rate, options.requests))
        for arrival in at.tolist():
            engine.add_request(prompt(generator, options.context // 2, engine.model.vocab_size), greedy(options.context // 8), arrival=arrival)
        while engine.has_unfinished_requests():
            engine.step()
        m = engine.metrics.result()
        rows.append({"requests/s": rate, "p50 TTFT ms": m.ttft.p50 * 1e3, "p99 TTFT ms": m.ttft.p99 * 1e3, "p50 TPOT ms": m.tpot.p50 * 1e3})
        show(rows[-1], first=len(rows) == 1)
        engine.close()
        del engine
        torch.cuda.empty_cache()
    return rows


def peers(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Ragged requests (1/8 to 1 context asked, 1/16 to 1/4 answered), all at once: useful tokens per second of llmlab, of
    transformers' padded `generate` and of its continuous batching."""
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

    generator = np.random.default_rng(1)
    count, longest = options.requests, options.context
    lengths, answers = (generator.integers(longest // a, longest // b + 1, count).tolist() for a, b in ((8, 1), (16, 4)))
    engine = engine_for(options, count, 2 * longest, 8 * longest)
    shape = engine.model.shape
    prompts = [prompt(generator, n, shape.vocab_size) for n in lengths]
    rows: list[dict[str, Any]] = []

    def add(name: str, seconds: float) -> None:
        rows.append({"engine": name, "useful tokens/s": sum(answers) / seconds})
        rows[-1]["llmlab is"] = rows[0]["useful tokens/s"] / rows[-1]["useful tokens/s"]
        show(rows[-1], first=len(rows) == 1)

    for turn in range(2):
        for ids, wanted in zip(prompts, answers):
            engine.add_request(ids, greedy(wanted))
        began = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        if turn:
            add("llmlab", time.perf_counter() - began)
    engine.close()
    del engine
    torch.cuda.empty_cache()
    config = LlamaConfig(hidden_size=shape.hidden_size, head_dim=shape.head_dim, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
                         num_key_value_heads=shape.num_kv_heads, intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
                         max_position_embeddings=8192)  # fmt: skip
    device = torch.device("cpu" if options.rehearse else "cuda")
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    longest = max(lengths)
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    for turn in range(2):
        began = time.perf_counter()
        model.generate(padded, attention_mask=mask, max_new_tokens=max(answers) if turn else 4, min_new_tokens=max(answers) if turn else 4,
                       do_sample=False, pad_token_id=0)  # fmt: skip
        sync()
    add("transformers generate, padded", time.perf_counter() - began)
    try:
        for tokens in (2, round(sum(answers) / count)):
            began = time.perf_counter()
            model.generate_batch(inputs=prompts, generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False,
                                                                                    eos_token_id=-1))  # fmt: skip
        add("transformers continuous batching (all answers of the mean length)", time.perf_counter() - began)
    except Exception as error:  # it changes from release to release
        print(f"transformers continuous batching: {type(error).__name__}: {error}", file=sys.stderr)
    return rows


def show(row: dict[str, Any], first: bool) -> None:
    if first:
        print("\n| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
    print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape; random weights")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--quantization", help="int8 or int4")
    parser.add_argument("--gpu-memory", help="imitate a smaller card: t4, 16GB")
    parts = ["machine", "decode", "prefill", "ttft", "peers"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--json", type=Path, help="write the JSON here, too")
    parser.add_argument("--context", type=int, default=1024, help="prompt tokens of a decoding row")
    parser.add_argument("--requests", type=int, default=64, help="requests of the parts ttft and peers")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU and small, to test the script")
    options = parser.parse_args()
    reason = None if options.rehearse else why_not()
    if reason is not None:
        print(f"No GPU to measure: {reason}. Nothing was measured. `llmlab kernels --device t4` prints what a card would get, "
              "`llmlab sim --hardware t4` predicts how long it would take.", file=sys.stderr)  # fmt: skip
        raise SystemExit(NO_GPU)
    print(json.dumps(rehearse(options) if options.rehearse else measure(options, CudaLine(torch.device("cuda")), on_card(options))))


def rehearse(options: argparse.Namespace) -> dict[str, Any]:
    """Every part on the CPU, with the executor that a GPU would have."""
    from llmlab import assembly

    options.model, options.batches, options.context, options.requests = "llama-28m", [1, 2], 64, 4
    assembly.device_line = lambda loaded: HostLine(loaded.device)
    print("REHEARSAL on the CPU: no number below is of a GPU.")
    return measure(options, HostLine(), {"rehearsal": True, "dtype": "torch.float32"})


def on_card(options: argparse.Namespace) -> dict[str, Any]:
    """Where and on what."""
    import triton

    card = device_capability("cuda")
    return {
        "card": card._asdict(), "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "driver": subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                                 text=True, check=False).stdout.strip(),
        "python": platform.python_version(), "model": options.model, "dtype": str(torch.bfloat16 if card.bf16 else torch.float16),
        "quantization": options.quantization,
    }  # fmt: skip


def measure(options: argparse.Namespace, line: DeviceLine, found: dict[str, Any]) -> dict[str, Any]:
    """All parts that were asked for."""
    dtype = getattr(torch, found["dtype"].removeprefix("torch."))
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    found["machine"] = machine(options, line, dtype)
    show(found["machine"], first=True)
    jobs: dict[str, Callable[[], Any]] = {
        "decode": lambda: decode(options, found["machine"]), "prefill": lambda: prefill(options, found["machine"]),
        "ttft": lambda: ttft(options), "peers": lambda: peers(options, dtype),
    }  # fmt: skip
    for part in options.parts:
        if part in jobs:
            print(f"\n### {part}")
            found[part] = jobs[part]()
    if options.json:
        options.json.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
