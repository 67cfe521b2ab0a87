"""How well the simulator predicts the real executor on this CPU: fit on one workload, predict another.

    python benchmarks/fidelity.py                              lab-s and a 28M Llama, 1 thread and all
    python benchmarks/fidelity.py --models lab-s --threads 1 --json out.json
    python benchmarks/fidelity.py --models lab-s --threads 1 --profile p.json     keep (or reuse) the measured profile

For each model and number of threads, in a process of its own:

1. a profile is measured (`llmlab.execution.profiling`), or read from --profile;
2. workload A (uniform lengths, all at once) is really served; the profile is calibrated with its steps;
3. workload B (log-normal lengths, arrivals in bursts) is really served under four scheduler settings, and simulated
   under the same four with the calibrated profile: same arrivals, same lengths, nothing else from B;
4. compared are: the seconds of B's steps (the recorded plans, through the cost model), P50 and P90 of TTFT and E2E under
   each setting, and the order of the four settings by mean E2E.

Aims: median step error at most 10 %, percentiles within 10 %, rank correlation 1. A model that does not ship is filled
with random weights: time does not depend on their values. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("lab-s", "llama-28m")
SETTINGS: dict[str, dict[str, Any]] = {
    "fcfs": {}, "sjf": {"ordering": "sjf_oracle"}, "ljf": {"ordering": "ljf"}, "fcfs, 6 seats": {"max_num_seqs": 6},
}  # fmt: skip
SEATS, BUDGET, BLOCKS = 12, 256, 1024
AIM = 0.10


# -------------------------------------------------------------------------------------- one process
def work(model: str, threads: int, seed: int, seconds: float, load: float, file: str) -> dict[str, Any]:
    """Everything about one model at one number of threads. `seconds`: of each real run; `load`: of the machine in B."""
    import torch

    from llmlab.execution.profiling import observations
    from roofline.profile import ProfileCost, calibrated, write

    with tempfile.TemporaryDirectory() as folder:
        source = model_source(model, Path(folder))
        raw = profile_of(source, threads, file)
        config = {"model": source, "num_threads": threads, "device": "cpu", "dtype": "float32"}
        serve(config, workload_a(raw, seed, 0.3))  # compile, touch all pages
        fitted = serve(config, workload_a(raw, seed, seconds))
        profile = calibrated(raw, observations(fitted.log_events))
        path = write(profile, Path(folder) / "profile.json")
        simulated = {"model": raw.shape.name, "executor": "sim", "hardware": str(path)}
        workload = workload_b(simulated, seed, seconds, load)
        real = {name: serve({**config, **change}, workload) for name, change in SETTINGS.items()}
        sim = {name: serve({**simulated, **change}, workload) for name, change in SETTINGS.items()}
        steps = observations(next(iter(real.values())).log_events)
        efficiency = fit_roofline(raw, observations(fitted.log_events))
        costs = {"roofline": roofline_cost(raw), "roofline, fitted": roofline_cost(raw, efficiency),
                 "profile": ProfileCost(raw), "calibrated": ProfileCost(profile)}  # fmt: skip
        return {
            "model": model, "shipped": source == model, "threads": threads, "seed": seed, "torch": torch.__version__,
            "machine": str(profile.machine), "date": profile.date, "workload": repr(workload), "load": load,
            "steps": {name: step_errors(cost, steps) for name, cost in costs.items()},
            "latency": {name: latencies(real[name], sim[name]) for name in SETTINGS},
            "ranking": ranking({n: r.metrics.e2e.mean for n, r in real.items()}, {n: r.metrics.e2e.mean for n, r in sim.items()}),
            "efficiency": asdict(efficiency), "engine": {"step": profile.engine.step, "row": profile.engine.row},
            "factors": {part: factor(raw, profile, part) for part in ("tokens", "attention", "emit")},
        }  # fmt: skip


def model_source(model: str, folder: Path) -> str:
    """The shipped model's name, or a directory with random weights of the same sizes."""
    from llmlab.models.checkpoint import save_random_model
    from llmlab.models.shapes import from_hf_config
    from llmlab.models.zoo import SHAPES, named_shape, shipped_models
    from roofline import shapes

    if model in shipped_models():
        return model
    if model in SHAPES:
        return str(save_random_model(named_shape(model), folder / model))
    size = shapes.get(model)
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": size.hidden_size, "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads, "num_key_value_heads": size.num_kv_heads, "head_dim": size.head_dim,
        "intermediate_size": size.intermediate_size, "vocab_size": size.vocab_size, "tie_word_embeddings": size.tied,
    }  # fmt: skip
    return str(save_random_model(from_hf_config(config), folder / model))


def profile_of(source: str, threads: int, file: str) -> Any:
    from llmlab.assembly import roofline_shape
    from llmlab.config import EngineConfig
    from llmlab.execution.profiling import loaded_for, measure
    from roofline.profile import read, write

    if file and Path(file).exists():
        return read(file)
    loaded = loaded_for(EngineConfig(model=source, device="cpu", num_threads=threads))
    profile = measure(loaded, roofline_shape(loaded), max_tokens=BUDGET)
    if file:
        write(profile, file)
    return profile


def workload_a(profile: Any, seed: int, seconds: float) -> Any:
    """A batch of requests with uniform lengths that takes about `seconds`."""
    from llmlab.workloads.workload import Workload
    from roofline import Rows
    from roofline.profile import ProfileCost

    cost = ProfileCost(profile)
    each = cost.step(Rows.prefill(144)).seconds + 40 * cost.step(Rows.decode(SEATS, 160)).seconds / SEATS
    count = max(8, int(seconds / each / 1.3))  # some 30 % more for the engine itself
    return Workload.batch(count, prompt=(32, 256), output=(16, 64), seed=seed)


def workload_b(simulated: dict[str, Any], seed: int, seconds: float, load: float) -> Any:
    """Bursts of log-normal requests at `load` times what the simulator says that the machine can serve."""
    from llmlab.workloads.workload import Workload

    lengths = {"prompt": "lognormal:96,0.7", "output": "lognormal:40,0.7", "seed": seed + 1}
    probe = Workload.batch(60, **lengths)
    rate = load * len(probe) / serve(simulated, probe).metrics.duration
    return Workload.gamma(rate, 4.0, max(24, int(rate * seconds)), **lengths)


def serve(fields: dict[str, Any], workload: Any) -> Any:
    """The run of a workload; its arrivals count from when the engine is ready."""
    from llmlab.config import EngineConfig
    from llmlab.engine import Engine
    from llmlab.running import serve as feed
    from llmlab.runs import Run

    common = {"max_num_seqs": SEATS, "max_num_batched_tokens": BUDGET, "num_blocks": BLOCKS, "enable_prefix_caching": False,
              "max_model_len": 1024}  # fmt: skip
    gc.collect()
    with Engine(EngineConfig(**{**common, **fields})) as engine:
        begin = engine.clock.now() + 0.05
        feed(engine, replace(workload, arrivals=tuple(begin + t for t in workload.arrivals)))
        return Run.of(engine.log)


def roofline_cost(profile: Any, efficiency: Any = None) -> Any:
    """What the simulator would have said without a profile, or the roofline with other efficiencies."""
    from llmlab.execution.cost import RooflineCost
    from roofline import CostModel

    if efficiency is None:
        return RooflineCost(profile.shape, "cpu-2core", profile.block_size, profile.dtype).model
    return CostModel(profile.shape, "cpu-2core", profile.dtype, efficiency=efficiency)


def fit_roofline(profile: Any, steps: list[Any]) -> Any:
    """Efficiencies of `cpu-2core` that tell whole steps of A best: coordinate search, mean absolute log ratio."""
    from roofline import Efficiency

    chosen = steps[:: max(1, len(steps) // 120)]
    measured = np.array([s.seconds for s in chosen])
    ranges = {"step": (0.0, 4e-4), "launch": (0.0, 2e-5), "linear_memory": (0.05, 1.0), "linear_compute": (0.1, 1.0),
              "attention_memory": (0.02, 1.0), "attention_compute": (0.02, 1.0)}  # fmt: skip

    def loss(trial: Any) -> float:
        cost = roofline_cost(profile, trial)
        return float(np.mean(np.abs(np.log([cost.step(s.rows).seconds for s in chosen] / measured))))

    best = Efficiency(tile_side=0.0)
    least = loss(best)
    for width in (1.0, 0.3, 0.1):
        for name, (low, high) in ranges.items():
            middle, reach = getattr(best, name), width * (high - low) / 2
            span = (low, high) if width == 1.0 else (max(low, middle - reach), min(high, middle + reach))
            trials = [replace(best, **{name: float(value)}) for value in np.linspace(*span, 9)]
            losses = [loss(trial) for trial in trials]
            if min(losses) < least:
                least, best = min(losses), trials[losses.index(min(losses))]
    return best


def step_errors(cost: Any, steps: list[Any]) -> dict[str, float]:
    """|predicted - measured| / measured over steps, and predicted over measured in all."""
    predicted = np.array([cost.step(s.rows).seconds for s in steps])
    measured = np.array([s.seconds for s in steps])
    wrong = np.abs(predicted / measured - 1)
    return {"count": len(steps), "median": float(np.median(wrong)), "p90": float(np.quantile(wrong, 0.9)),
            "total": float(predicted.sum() / measured.sum())}  # fmt: skip


def latencies(real: Any, sim: Any) -> dict[str, Any]:
    """Seconds, real and simulated, of each percentile."""
    found: dict[str, Any] = {"requests": real.metrics.num_finished, "mean_batch": real.metrics.mean_batch}
    for name in ("ttft", "e2e"):
        for stat in ("p50", "p90", "mean"):
            found[f"{stat}_{name}"] = [getattr(getattr(run.metrics, name), stat) for run in (real, sim)]
    return found


def ranking(real: dict[str, float], sim: dict[str, float]) -> dict[str, Any]:
    """The settings by mean E2E in both, and Spearman's rank correlation."""
    orders = [sorted(found, key=lambda name: found[name]) for found in (real, sim)]
    ranks = np.array([[order.index(name) for name in real] for order in orders])
    return {"real": orders[0], "simulated": orders[1], "correlation": float(np.corrcoef(ranks)[0, 1])}


def factor(raw: Any, profile: Any, part: str) -> float:
    """What calibration multiplied a part with."""
    before, after = (
        (getattr(p, part) if part != "attention" else p.attention.curves[0]).seconds[0] for p in (raw, profile)
    )
    return float(after / before)


# ----------------------------------------------------------------------------------------- the parent
def run_worker(args: argparse.Namespace, model: str, threads: int) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", "--models", model, "--threads", str(threads), "--seed", str(args.seed),
               "--seconds", str(args.seconds), "--load", str(args.load), "--profile", args.profile]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{model}, {threads} threads: failed\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def show(answer: dict[str, Any]) -> None:
    weights = "shipped weights" if answer["shipped"] else "random weights"
    print(f"\n{answer['model']} ({weights}), {answer['threads']} threads; {answer['machine']}; {answer['date']}; torch "
          f"{answer['torch']}, Python {platform.python_version()}; seed {answer['seed']}")  # fmt: skip
    print(f"  B: {answer['workload']}, load {answer['load']}")
    for name, error in answer["steps"].items():
        print(f"  steps of B by {name:<16} median error {error['median']:6.1%}   P90 {error['p90']:6.1%}   "
              f"sum predicted / measured {error['total']:.3f}   ({error['count']} steps)")  # fmt: skip
    print(
        "  setting          " + "".join(f"{k:>28}" for k in ("p50_ttft", "p90_ttft", "p50_e2e", "p90_e2e", "mean_e2e"))
    )
    for name, found in answer["latency"].items():
        cells = ""
        for key in ("p50_ttft", "p90_ttft", "p50_e2e", "p90_e2e", "mean_e2e"):
            real, sim = found[key]
            cells += f"{1e3 * real:10.1f} {1e3 * sim:8.1f} {sim / real - 1:+7.1%}"
        print(f"  {name:<16}{cells}   (ms: real, simulated)")
    ranks = answer["ranking"]
    print(f"  by mean E2E: real {' < '.join(ranks['real'])}; simulated {' < '.join(ranks['simulated'])}; "
          f"rank correlation {ranks['correlation']:.2f}")  # fmt: skip
    for sentence in verdicts(answer):
        print("  " + sentence)


def verdicts(answer: dict[str, Any]) -> list[str]:
    """Each aim, met or missed."""
    steps = answer["steps"]["calibrated"]["median"]
    base = answer["latency"][next(iter(SETTINGS))]
    worst = {key: abs(base[key][1] / base[key][0] - 1) for key in ("p50_ttft", "p90_ttft", "p50_e2e", "p90_e2e")}
    name = max(worst, key=lambda key: worst[key])
    return [
        f"{'met   ' if steps <= AIM else 'MISSED'} median step error {steps:.1%} (aim {AIM:.0%})",
        f"{'met   ' if worst[name] <= AIM else 'MISSED'} worst percentile under fcfs: {name} {worst[name]:.1%} (aim {AIM:.0%})",
        f"{'met   ' if answer['ranking']['correlation'] > 0.999 else 'MISSED'} rank correlation (aim 1)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each real run")
    parser.add_argument("--load", type=float, default=0.5, help="of B: arrivals over capacity")
    parser.add_argument("--profile", default="", help="file: read if it exists, else written")
    parser.add_argument("--json", default="", help="file for all numbers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    models, threads = args.models.split(","), [int(n) for n in args.threads.split(",")]
    if args.worker:
        print(json.dumps(work(models[0], threads[0], args.seed, args.seconds, args.load, args.profile)))
        return
    answers = []
    for model in models:
        for count in dict.fromkeys(threads):
            answers.append(run_worker(args, model, count))
            show(answers[-1])
    if args.json:
        Path(args.json).write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
