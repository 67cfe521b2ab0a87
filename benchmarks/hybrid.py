"""CPU and GPU in parallel, measured: a capped KV pool under `gpu_only`, `neo` and `apex` on the GPU at hand.

    python benchmarks/hybrid.py [--model llama-3.1-8b] [--kv-tokens 26400] [--clients 260] [--requests 420] [--json FILE]

    python benchmarks/hybrid.py --rehearse     the same script on the CPU, small: to test the script, not to measure anything

The pool is capped to imitate a small card; the load decodes far more than it prefills, in a closed loop. Each placement serves the
same requests (random weights, seed 1) after one short run that compiles its kernels. The rate is that between 30 and 70 % of all
tokens. `waited` is the share of the time in which the device waited for the host, `beside` that of the host's attention that lay within
steps without such a wait: what was hidden. The last line is one JSON object; without a GPU the script says so and ends with code 3.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llmlab
from llmlab.events import catalog as ev
from llmlab.kernels.dispatch import why_no_cuda
from llmlab.papers.apex import window_rate
from llmlab.runs import Run

PLACEMENTS = ("gpu_only", "neo", "apex")
AIM = 1.3  # apex over gpu_only, output tokens/s


class Load(NamedTuple):
    """Requests in all, clients that ask again when answered, tokens of prompts and answers (low, high)."""

    requests: int
    clients: int
    prompt: tuple[int, int]
    output: tuple[int, int]

    def workload(self) -> Any:
        load = llmlab.Workload.poisson(rate=1e6, n=self.requests, prompt=self.prompt, output=self.output, seed=1)
        return load.closed_loop(self.clients)


class Row(NamedTuple):
    """What a placement made of the load. Seconds and shares; `modes`: how often each was chosen."""

    placement: str
    rate: float
    seconds: float
    waited: float
    beside: float
    modes: dict[str, int]


def config_of(placement: str, options: argparse.Namespace) -> llmlab.EngineConfig:
    """The same engine for all. The GPU alone swaps or recomputes, whichever is predicted to be cheaper."""
    return llmlab.EngineConfig(
        model=options.model, random_weights=not options.rehearse, device="cpu" if options.rehearse else "cuda",
        num_blocks=options.kv_tokens // 16, num_host_blocks=options.host_tokens // 16, max_num_seqs=384, tiering="cheapest",
        placement=placement, enable_prefix_caching=False, check_interval=0, log_level=4, log_capacity=4_000_000,
        policy_timeout=5.0,
    )  # fmt: skip


def measured(placement: str, options: argparse.Namespace, load: Load) -> Row:
    """One run, behind a short one."""
    llmlab.run(config_of(placement, options), load._replace(requests=4, clients=4).workload())
    return row_of(placement, llmlab.run(config_of(placement, options), load.workload()))


def row_of(placement: str, run: Run) -> Row:
    steps = [event.measured for event in run.events("StepFinished")]
    seconds = sum(step.execute for step in steps)
    waited = [step.parts.get("join_wait", 0.0) for step in steps]
    cpu = [step.parts.get("cpu", 0.0) for step in steps]
    hidden = sum(max(0.0, busy - wait) for busy, wait in zip(cpu, waited, strict=True))
    modes: dict[str, int] = {}
    for decision in run.events("Decision"):
        if isinstance(decision, ev.Decision) and decision.seam == "placement":
            modes[decision.chosen] = modes.get(decision.chosen, 0) + 1
    return Row(placement, window_rate(run), seconds, sum(waited) / seconds, hidden / sum(cpu) if sum(cpu) else 0.0, modes)


def told(rows: Sequence[Row], options: argparse.Namespace) -> dict[str, Any]:
    """Print the table; everything in it as plain data."""
    rates = {row.placement: row.rate for row in rows}
    print(f"{'placement':<10} {'tokens/s':>10} {'seconds':>8} {'waited':>7} {'beside':>7}  modes")
    for row in rows:
        print(f"{row.placement:<10} {row.rate:10.1f} {row.seconds:8.1f} {row.waited:7.1%} {row.beside:7.1%}  {row.modes}")
    ratio = rates["apex"] / rates["gpu_only"]
    verdict = "a rehearsal: the numbers mean nothing" if options.rehearse else f"aim {AIM}: {'reached' if ratio >= AIM else 'missed'}"
    print(f"apex / gpu_only {ratio:.2f}, apex / neo {rates['apex'] / rates['neo']:.2f} ({verdict})")
    return {"options": vars(options), "apex_over_gpu_only": ratio, "measured": not options.rehearse, "rows": [row._asdict() for row in rows]}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU and GPU in parallel, measured with a capped KV pool.")
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape (random weights) or a model")
    parser.add_argument("--kv-tokens", type=int, default=26_400, help="KV tokens in the GPU's memory")
    parser.add_argument("--host-tokens", type=int, default=400_000, help="KV tokens in the host's memory")
    parser.add_argument("--clients", type=int, default=260)
    parser.add_argument("--requests", type=int, default=420)
    parser.add_argument("--prompt", type=int, nargs=2, default=(200, 400), metavar=("LOW", "HIGH"), help="tokens")
    parser.add_argument("--output", type=int, nargs=2, default=(400, 600), metavar=("LOW", "HIGH"), help="tokens")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU and small, to test the script")
    options = parser.parse_args(arguments)
    if options.rehearse:
        options.model, options.kv_tokens, options.host_tokens = "lab-s", 640, 16_000
        options.clients, options.requests, options.prompt, options.output = 12, 20, (60, 100), (16, 24)
    return options


def main() -> None:
    """The command line."""
    options = parsed()
    reason = None if options.rehearse else why_no_cuda()
    if reason is not None:
        print(f"nothing measured: {reason}", file=sys.stderr)
        raise SystemExit(3)
    load = Load(options.requests, options.clients, tuple(options.prompt), tuple(options.output))
    line = json.dumps(told([measured(name, options, load) for name in PLACEMENTS], options), default=str)
    if options.json is not None:
        options.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
