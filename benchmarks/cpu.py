"""llmlab beside its peers on this CPU: same weights, same prompts, same threads, one process tree.

    python benchmarks/cpu.py                          all peers that are installed
    python benchmarks/cpu.py --peers llmlab,hf-static --repeats 5
    python benchmarks/cpu.py --json out.json

Peers: `hf-static` (transformers generate, one padded batch), `hf-continuous` (transformers' continuous batching),
`llama.cpp` (one stream; `pip install "llmlab[bench]"` compiles llama-cpp-python, which takes some minutes), `llmlab`.
Every peer runs in a process of its own, one after the other, `repeats` times interleaved; medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PEERS = ("llmlab", "hf-static", "hf-continuous", "llama.cpp")
STREAM_PROMPT, STREAM_TOKENS = 16, 128


# ------------------------------------------------------------------------------------------ the job
def make_job(folder: Path, seed: int, requests: int) -> dict[str, Any]:
    """A ~28M Llama with random weights (f32) on disk, and ragged prompts and output lengths."""
    from llmlab.models.checkpoint import save_random_model
    from llmlab.models.zoo import named_shape

    model = save_random_model(named_shape("llama-28m"), folder / "model", seed)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 8000, n).tolist() for n in rng.integers(16, 128, requests, endpoint=True)]
    outputs = rng.integers(32, 128, requests, endpoint=True).tolist()
    return {"model": str(model), "prompts": prompts, "outputs": outputs, "seed": seed}


# -------------------------------------------------------------------------------------- the workers
def work_llmlab(job: dict[str, Any]) -> dict[str, Any]:
    """Batch of all requests, then one stream; the floor from the steps that were run."""
    import llmlab

    params = [llmlab.SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in job["outputs"]]
    config = {"model": job["model"], "num_threads": job["threads"], "enable_prefix_caching": False,
              "max_num_batched_tokens": job["budget"], "check_interval": 0, "overlap_depth": job["overlap"]}  # fmt: skip
    llm = llmlab.LLM(**config)
    llm.generate(job["prompts"][:4], params[:4])  # compile, touch all pages
    llm.close()
    llm = llmlab.LLM(**config)
    began = time.perf_counter()
    outs = llm.generate(job["prompts"], params)
    seconds = time.perf_counter() - began
    run = llm.run
    assert [len(o.outputs[0].token_ids) for o in outs] == job["outputs"]
    steps = [(s.predicted.flops, s.predicted.bytes.hbm) for s in run.steps]
    stream = llmlab.SamplingParams(max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True)
    one = llm.generate([job["prompts"][0][:STREAM_PROMPT]], stream)[0].metrics
    parts: dict[str, float] = {}
    for event in run.events("StepFinished"):
        for name, value in event.measured.parts.items():
            parts[name] = parts.get(name, 0.0) + value
    return {"seconds": seconds, "steps": steps, "stream": (STREAM_TOKENS - 1) / (one.last_token - one.first_token),
            "schedule_share": run.metrics.schedule_share, "num_steps": len(steps), "parts": parts,
            "tokens": [list(o.outputs[0].token_ids)[:32] for o in outs]}  # fmt: skip


def _hf(job: dict[str, Any], **more: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, **more).eval()


def work_hf_static(job: dict[str, Any]) -> dict[str, Any]:
    """One left-padded batch, run until the longest output is done; then one stream."""
    import torch

    model = _hf(job)
    width = max(map(len, job["prompts"]))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in job["prompts"]])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in job["prompts"]])
    most = max(job["outputs"])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        model.generate(ids[:4], attention_mask=mask[:4], max_new_tokens=4, **options)
        began = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, **options)
        seconds = time.perf_counter() - began
        one = ids[:1, -STREAM_PROMPT:] if len(job["prompts"][0]) >= STREAM_PROMPT else ids[:1]
        began = time.perf_counter()
        model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=1, **options)
        first = time.perf_counter() - began
        began = time.perf_counter()
        model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=STREAM_TOKENS,
                       min_new_tokens=STREAM_TOKENS, **options)  # fmt: skip
        stream = time.perf_counter() - began - first
    tokens = [row[width : width + 32].tolist() for row in out]
    return {"seconds": seconds, "stream": (STREAM_TOKENS - 1) / stream, "tokens": tokens}


def work_hf_continuous(job: dict[str, Any]) -> dict[str, Any]:
    """transformers' own continuous batching over a paged cache, each request with its own length."""
    from transformers import GenerationConfig

    model = _hf(job)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(job["outputs"]))
    seconds = 0.0
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        for phase, count in (("warm", 2), ("run", len(job["prompts"]))):
            began = time.perf_counter()
            for index in range(count):
                length = 4 if phase == "warm" else job["outputs"][index]
                manager.add_request(job["prompts"][index], request_id=f"{phase}{index}", max_new_tokens=length)
            done = 0
            while done < count:
                result = manager.get_result(timeout=120)
                done += result is not None and result.is_finished()
            seconds = time.perf_counter() - began
    return {"seconds": seconds}


def work_llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp, f32, one stream, through llama-cpp-python."""
    from llama_cpp import Llama

    path = Path(job["model"]) / "model.gguf"
    if not path.exists():
        write_gguf(Path(job["model"]), path)
    llm = Llama(str(path), n_ctx=512, n_threads=job["threads"], n_threads_batch=job["threads"], verbose=False)
    prompt = job["prompts"][0][:STREAM_PROMPT]
    times: list[float] = []
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        times.append(time.perf_counter())
        if len(times) == STREAM_TOKENS:
            break
        del token
    return {"stream": (STREAM_TOKENS - 1) / (times[-1] - times[0])}


def write_gguf(folder: Path, path: Path) -> None:
    """The same weights as GGUF, f32, without a vocabulary (token ids go in and out)."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), _rotated(name, tensor, heads, kv))
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        part()


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    table = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "model.layers": "blk"}  # fmt: skip
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def _rotated(name: str, tensor: np.ndarray, heads: int, kv: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, Hugging Face the two halves: permute the rows of q and k."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    count = heads if "q_proj" in name else kv
    return tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def measure_limits(job: dict[str, Any]) -> dict[str, float]:
    """What the machine can do: the f32 GEMM rate (the faster of torch and our own kernel), and the bytes per second
    of reading (a sum) and of copying."""
    import torch

    from llmlab.kernels.dispatch import make_kernels

    torch.set_num_threads(job["threads"])
    ours = make_kernels("auto", "cpu", torch.float32, job["threads"]).linear(torch.randn(2048, 2048))
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    big = torch.randn(64 << 20)  # 256 MB: larger than any cache here
    target = torch.empty_like(big)
    flops = 2 * 2048**3
    rates = {"gemm_torch": flops / best(lambda: torch.mm(a, b), 12), "gemm_ours": flops / best(lambda: ours(a), 12)}
    return {**rates, "gemm_flops": max(rates.values()), "read_bytes": 4 * big.numel() / best(lambda: big.sum(), 8),
            "copy_bytes": 8 * big.numel() / best(lambda: target.copy_(big), 8)}  # fmt: skip


def best(call: Any, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


WORKERS = {"llmlab": work_llmlab, "hf-static": work_hf_static, "hf-continuous": work_hf_continuous,
           "llama.cpp": work_llama_cpp, "limits": measure_limits}  # fmt: skip


# -------------------------------------------------------------------------------------- the parent
def run_worker(name: str, spec: Path, threads: int) -> dict[str, Any]:
    """The worker's answer, or {"error": why}."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads),
           "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    command = [sys.executable, __file__, "--worker", name, "--spec", str(spec)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def floor_seconds(steps: list[list[float]], limits: dict[str, float]) -> float:
    """Per step the larger of flops over the GEMM rate and bytes over the bandwidth; summed."""
    bandwidth = max(limits["read_bytes"], limits["copy_bytes"])
    return sum(max(flops / limits["gemm_flops"], size / bandwidth) for flops, size in steps)


def median_of(answers: list[dict[str, Any]], key: str) -> float | None:
    values = [a[key] for a in answers if key in a]
    return statistics.median(values) if values else None


def agreement(answers: dict[str, list[dict[str, Any]]]) -> str:
    """How many requests got the same first 32 greedy tokens as from transformers."""
    ours = next((a["tokens"] for a in answers.get("llmlab", []) if "tokens" in a), None)
    theirs = next((a["tokens"] for a in answers.get("hf-static", []) if "tokens" in a), None)
    if ours is None or theirs is None:
        return "not compared"
    same = sum(a[: len(b)] == b[: len(a)] for a, b in zip(ours, theirs))
    return f"{same} of {len(ours)} requests have the same greedy tokens as transformers"


def table(answers: dict[str, list[dict[str, Any]]], useful: int) -> list[str]:
    """Markdown rows: useful tokens per second of the batch and of one stream, with ratios."""
    ours, mine = median_of(answers["llmlab"], "seconds"), median_of(answers["llmlab"], "stream")
    rows = ["| engine | 32 requests, useful tok/s | llmlab is | one stream, tok/s | llmlab is |", "|---|---|---|---|---|"]
    for name, found in answers.items():
        errors = [a["error"] for a in found if "error" in a]
        seconds, stream = median_of(found, "seconds"), median_of(found, "stream")
        if errors and seconds is None and stream is None:
            rows.append(f"| {name} | failed: {errors[0]} | | | |")
            continue
        batch = f"{useful / seconds:.0f} | {seconds / ours:.2f}x" if seconds and ours else "- | -"
        single = f"{stream:.0f} | {mine / stream:.2f}x" if stream and mine else "- | -"
        rows.append(f"| {name} | {batch} | {single} |")
    return rows


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe(job: dict[str, Any]) -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()  # fmt: skip
    packages = ", ".join(f"{p} {installed(p)}" for p in ("torch", "transformers", "numba", "llama-cpp-python"))
    return (f"host: {cpu}, {os.cpu_count()} cores; {job['threads']} threads; Python {platform.python_version()}; {packages}; "
            f"seed {job['seed']}; model: Llama, 28M parameters, f32, random weights; {len(job['prompts'])} requests")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=512, help="max_num_batched_tokens of llmlab")
    parser.add_argument("--overlap", type=int, default=0, help="overlap_depth of llmlab")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](json.loads(args.spec.read_text()))))
        return
    peers = [p for p in args.peers.split(",") if p]
    unknown = [p for p in peers if p not in PEERS]
    if unknown:
        parser.error(f"--peers: {unknown[0]!r} is unknown; choose from {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory() as folder:
        report(args, peers, Path(folder))


def report(args: argparse.Namespace, peers: list[str], folder: Path) -> None:
    job = {**make_job(folder, args.seed, args.requests), "threads": args.threads, "budget": args.budget,
           "overlap": args.overlap}  # fmt: skip
    spec = folder / "job.json"
    spec.write_text(json.dumps(job))
    print(describe(job), file=sys.stderr)
    answers: dict[str, list[dict[str, Any]]] = {p: [] for p in peers}
    limits: list[dict[str, Any]] = []
    for turn in range(args.repeats):
        for name in ("limits", *peers):
            print(f"  {turn + 1}/{args.repeats} {name}", file=sys.stderr, flush=True)
            (limits if name == "limits" else answers[name]).append(run_worker(name, spec, args.threads))
    peak = {key: max(found[key] for found in limits) for key in limits[0]}
    print_report(job, answers, peak, args.json)


def print_report(job: dict[str, Any], answers: dict[str, list[dict[str, Any]]], peak: dict[str, float],
                 path: Path | None) -> None:  # fmt: skip
    useful = sum(job["outputs"])
    print(describe(job) + "\n")
    print("\n".join(table(answers, useful)))
    good = [a for a in answers.get("llmlab", []) if "seconds" in a]
    facts: dict[str, Any] = {"limits": peak, "useful_tokens": useful}
    if good:
        seconds = statistics.median(a["seconds"] for a in good)
        facts["floor_seconds"] = floor_seconds(good[0]["steps"], peak)
        facts["share_of_floor"] = facts["floor_seconds"] / seconds
        facts["schedule_share"] = statistics.median(a["schedule_share"] for a in good)
        facts["parts"] = good[0]["parts"]
        print(f"\nlimits: GEMM {peak['gemm_flops'] / 1e9:.0f} GFLOP/s (torch {peak['gemm_torch'] / 1e9:.0f}), read {peak['read_bytes'] / 1e9:.0f} GB/s, "
              f"copy {peak['copy_bytes'] / 1e9:.0f} GB/s")  # fmt: skip
        print(f"floor: {facts['floor_seconds']:.3f} s, llmlab {seconds:.3f} s: {facts['share_of_floor']:.0%} of the floor's speed")
        print(f"scheduler and log (level 2): {facts['schedule_share']:.2%} of the step time; {agreement(answers)}")
    if path is not None:
        for found in answers.values():
            for answer in found:
                answer.pop("steps", None)
                answer.pop("tokens", None)
        path.write_text(json.dumps({"about": describe(job), **facts, "answers": answers}, indent=1))


if __name__ == "__main__":
    main()
