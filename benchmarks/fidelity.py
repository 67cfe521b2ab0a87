"""How well the simulator predicts the real executor on this CPU: fit on one workload, predict another.

    python benchmarks/fidelity.py                              lab-s and a 28M Llama, 1 thread and all
    python benchmarks/fidelity.py --models lab-s --threads 1 --json out.json
    python benchmarks/fidelity.py --models lab-s --threads 1 --keep DIR           keep profile and runs, go on from there

For each model and number of threads, in a process of its own:

1. a profile is measured (`llmlab.execution.profiling`), or read from --keep;
2. workload A (uniform lengths, arrivals in bursts) is really served; the profile is calibrated with its steps;
3. workload B (log-normal lengths, other bursts, half load) is really served, and simulated with the calibrated
   profile: same arrivals, same lengths, nothing else from B. Compared are the seconds of B's steps (the recorded plans,
   through the cost model) and P50 and P90 of TTFT and E2E;
4. workload C (the lengths of B, all at once) is served and simulated under four scheduler settings. Compared is their
   order by mean E2E.

Aims: median step error at most 10 %, percentiles within 10 %, rank correlation 1. A model that does not ship is filled
with random weights: time does not depend on their values. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("lab-s", "llama-28m")
SETTINGS: dict[str, dict[str, Any]] = {
    "fcfs": {}, "sjf": {"ordering": "sjf_oracle"}, "ljf": {"ordering": "ljf"}, "fcfs, 4 seats": {"max_num_seqs": 4},
}  # fmt: skip
SEATS, BUDGET, BLOCKS = 12, 256, 1024
AIM = 0.10


# -------------------------------------------------------------------------------------- one process
def work(model: str, threads: int, seed: int, seconds: float, load: float, keep: str) -> dict[str, Any]:
    """Everything about one model at one number of threads. `seconds`: of each real run; `load`: of the machine in B;
    `keep`: a folder whose profile and runs are taken up again, "" for none."""
    from llmlab.execution.profiling import observations
    from roofline.profile import ProfileCost, calibrated, write

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(keep) / f"{model}-{threads}" if keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = model_source(model, Path(temporary))
        raw = profile_of(source, threads, folder / "measured.json")
        config = {"model": source, "num_threads": threads, "device": "cpu", "dtype": "float32"}
        fitted = served(folder / "a.jsonl.zst", config, workload_a(raw, seed, 2 * seconds), workload_a(raw, seed, 0.3))
        profile = calibrated(raw, observations(fitted.log_events))
        simulated = {
            "model": raw.shape.name,
            "executor": "sim",
            "hardware": str(write(profile, folder / "calibrated.json")),
        }
        warm, b, c = workload_a(raw, seed, 0.3), *workloads_b_c(simulated, seed, seconds, load)
        real, sim = {"B": served(folder / "b.jsonl.zst", config, b, warm)}, {"B": serve(simulated, b)}
        for name, change in SETTINGS.items():
            file = folder / f"c-{name.replace(', ', '-').replace(' ', '-')}.jsonl.zst"
            real[f"C {name}"] = served(file, {**config, **change}, c, warm)
            sim[f"C {name}"] = serve({**simulated, **change}, c)
        efficiency = fit_roofline(raw, observations(fitted.log_events))
        costs = {"roofline": roofline_cost(raw), "roofline, fitted": roofline_cost(raw, efficiency),
                 "profile": ProfileCost(raw), "calibrated": ProfileCost(profile)}  # fmt: skip
        steps = observations(real["B"].log_events)
        means = [{name: runs[f"C {name}"].metrics.e2e.mean for name in SETTINGS} for runs in (real, sim)]
        return {
            **about(raw, profile), "shipped": source == model, "model": model, "seed": seed, "load": load,
            "workloads": [repr(b), repr(c)], "steps": {name: step_errors(cost, steps) for name, cost in costs.items()},
            "latency": {name: latencies(real[name], sim[name]) for name in real},
            "ranking": ranking(*means), "efficiency": asdict(efficiency),
        }  # fmt: skip


def about(raw: Any, profile: Any) -> dict[str, Any]:
    """Where the numbers come from, and what calibration did."""
    return {
        "machine": str(profile.machine), "threads": profile.machine.threads, "date": profile.date,
        "software": dict(profile.software), "engine": asdict(profile.engine),
        "wake": profile.wake, "factors": factors(raw, profile),
    }  # fmt: skip


def served(file: Path, config: dict[str, Any], workload: Any, warm: Any) -> Any:
    """The run of a workload, from its file if there is one; after a short run that compiles and touches all pages."""
    from llmlab.runs import Run

    if not file.exists():
        serve(config, warm)
        serve(config, workload).save(file)
    return Run.load(file)


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


def profile_of(source: str, threads: int, file: Path) -> Any:
    from llmlab.backends import roofline_shape
    from llmlab.config import EngineConfig
    from llmlab.execution.profiling import loaded_for, measure
    from roofline.profile import read, write

    if file.exists():
        return read(file)
    loaded = loaded_for(EngineConfig(model=source, device="cpu", num_threads=threads))
    return read(write(measure(loaded, roofline_shape(loaded), max_tokens=BUDGET), file))


def workload_a(profile: Any, seed: int, seconds: float) -> Any:
    """Requests with uniform lengths that come in bursts for about `seconds`: batches of all sizes, and pauses."""
    from llmlab.workloads.workload import Workload
    from roofline import Rows
    from roofline.profile import ProfileCost

    cost = ProfileCost(profile)
    each = 1.4 * (cost.step(Rows.prefill(144)).seconds + 40 * cost.step(Rows.decode(SEATS, 160)).seconds / SEATS)
    return Workload.gamma(
        0.7 / each, 3.0, max(12, int(0.7 * seconds / each)), prompt=(32, 256), output=(16, 64), seed=seed
    )


def workloads_b_c(simulated: dict[str, Any], seed: int, seconds: float, load: float) -> list[Any]:
    """Log-normal requests in bursts, at `load` times what the simulator says that the machine can serve, for three times
    `seconds`; and a batch of them that takes about `seconds`."""
    from llmlab.workloads.workload import Workload

    lengths = {"prompt": "lognormal:96,0.7", "output": "lognormal:40,0.7"}
    probe = Workload.batch(60, seed=seed + 1, **lengths)
    rate = len(probe) / serve(simulated, probe).metrics.duration
    bursts = Workload.gamma(load * rate, 3.0, max(40, int(3 * load * rate * seconds)), seed=seed + 1, **lengths)
    return [bursts, Workload.batch(max(32, int(rate * seconds)), seed=seed + 2, **lengths)]


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


def factors(raw: Any, profile: Any) -> dict[str, list[float]]:
    """What calibration multiplied the parts with: the layers by tokens, attention, scores, preparing; each at a few points."""
    curves = {"tokens": (raw.tokens, profile.tokens), "emit": (raw.emit, profile.emit),
              "attention": (raw.attention.curves[0], profile.attention.curves[0])}  # fmt: skip
    found = {name: [round(b / a, 2) for a, b in zip(old.seconds, new.seconds)] for name, (old, new) in curves.items()}
    return {**found, "prepare": [round(profile.prepare.at(n, n, n) / raw.prepare.at(n, n, n), 2) for n in (1, 4, 12)]}


# ----------------------------------------------------------------------------------------- the parent
def run_worker(args: argparse.Namespace, model: str, threads: int) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", "--models", model, "--threads", str(threads), "--seed", str(args.seed),
               "--seconds", str(args.seconds), "--load", str(args.load), "--keep", args.keep]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{model}, {threads} threads: failed\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def show(answer: dict[str, Any]) -> None:
    weights = "shipped weights" if answer["shipped"] else "random weights"
    print(f"\n{answer['model']} ({weights}), {answer['threads']} threads; {answer['machine']}; {answer['date']}; torch "
          f"{answer['software']['torch']}, Python {answer['software']['python']}; seed {answer['seed']}")  # fmt: skip
    for name, workload in zip("BC", answer["workloads"]):
        print(f"  {name}: {workload}" + (f", load {answer['load']}" if name == "B" else ""))
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
    print(f"  C by mean E2E: real {' < '.join(ranks['real'])}; simulated {' < '.join(ranks['simulated'])}; "
          f"rank correlation {ranks['correlation']:.2f}")  # fmt: skip
    for sentence in verdicts(answer):
        print("  " + sentence)


def verdicts(answer: dict[str, Any]) -> list[str]:
    """Each aim, met or missed."""
    steps = answer["steps"]["calibrated"]["median"]
    base = answer["latency"]["B"]
    worst = {key: abs(base[key][1] / base[key][0] - 1) for key in ("p50_ttft", "p90_ttft", "p50_e2e", "p90_e2e")}
    name = max(worst, key=lambda key: worst[key])
    return [
        f"{'met   ' if steps <= AIM else 'MISSED'} median step error {steps:.1%} (aim {AIM:.0%})",
        f"{'met   ' if worst[name] <= AIM else 'MISSED'} worst percentile of B: {name} {worst[name]:.1%} (aim {AIM:.0%})",
        f"{'met   ' if answer['ranking']['correlation'] > 0.999 else 'MISSED'} rank correlation (aim 1)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}", help="numbers, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each real run")
    parser.add_argument("--load", type=float, default=0.5, help="of B: arrivals over capacity")
    parser.add_argument("--keep", default="", help="folder for profiles and traces; what is there is taken up again")
    parser.add_argument("--json", default="", help="file for all numbers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    models, threads = args.models.split(","), [int(n) for n in args.threads.split(",")]
    if args.worker:
        print(json.dumps(work(models[0], threads[0], args.seed, args.seconds, args.load, args.keep)))
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
