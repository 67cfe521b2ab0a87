"""All that waits for a GPU, the most telling first: kernels and engine against references, speed, peers, tiers, a long run.

    python benchmarks/gpu_day.py --minutes 25 --out DIR      again with the same DIR: goes on where it ended
    python benchmarks/gpu_day.py --rehearse --out DIR        the same on a CPU, small: to test the commands, not to measure

Every step is a process of its own with a time of its own; one that crashes or takes too long leaves the others alone, and what it
has measured so far is in DIR. `day.json` says how each step went, `day.log` holds all that was printed. Steps that never ran come
before those that failed. Ends with code 1 if a step did not go well, 3 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = 3  # exit code, as of `benchmarks/gpu.py`
LEAST = 20.0  # seconds: a step is not begun with less


class Step(NamedTuple):
    """One thing to be done: a command behind `python`, and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    seconds: float


class Outcome(NamedTuple):
    """How a step went: "ok", "failed" or "too long", and in how many seconds."""

    how: str
    seconds: float


def steps(out: Path, rehearse: bool) -> tuple[Step, ...]:
    """In the order of their worth. Each benchmark goes on with the rows of its file."""
    small = ("--rehearse",) if rehearse else ()

    def bench(name: str, file: str, seconds: float, *options: str) -> Step:
        minutes = f"{(seconds - 15) / 60:.1f}"
        return Step(name, ("benchmarks/gpu.py", "--json", str(out / file), "--resume", "--minutes", minutes, *options, *small), seconds)

    def test(name: str, seconds: float, *options: str) -> Step:
        return Step(name, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", "--tb=short", *options), seconds)

    profile = ("-m", "llmlab.cli", "profile", "--device", "cpu" if rehearse else "cuda", "--model", "lab-xs" if rehearse else "llama-3.1-8b",
               "--random-weights", "-o", str(out / "profile.json"))  # fmt: skip
    return (
        test("kernels", 240, "tests/gpu/test_gpu_kernels.py"),
        test("engine", 240, "tests/gpu/test_gpu_engine.py", "-m", "not slow"),
        bench("decode", "gpu.json", 240, "--parts", "machine", "decode"),
        bench("prefill", "gpu.json", 120, "--parts", "prefill"),
        bench("peers", "gpu.json", 300, "--parts", "decode", "prefill", "peers"),
        bench("time to first token", "gpu.json", 240, "--parts", "ttft", "peers"),
        bench("tiers", "gpu.json", 180, "--parts", "placement"),
        bench("int4", "gpu-int4.json", 120, "--parts", "machine", "decode", "--quantization", "int4", "--batches", "1", "8", "64"),
        bench("variants", "gpu-variants.json", 180, "--parts", "machine", "dataflow", "decode", "--batches", "1", "8", "64",
              *(() if rehearse else ("--kernels", "triton+one-max+rows+flat"))),
        test("long run", 180, "tests/gpu/test_gpu_engine.py", "-m", "slow"),
        Step("profile", profile, 240),
    )  # fmt: skip


def in_turn(all_steps: Sequence[Step], done: dict[str, Outcome]) -> list[Step]:
    """What is left: steps that never ran, then those that did not go well."""
    return [s for s in all_steps if s.name not in done] + [s for s in all_steps if s.name in done and done[s.name].how != "ok"]


def run(step: Step, seconds: float, log: Path) -> Outcome:
    """One step with all of its output in the log; a step that takes longer than `seconds` is ended with its children."""
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {step.name}: python {' '.join(step.command)}\n")
        file.flush()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([sys.executable, *step.command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            how = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            how = "too long"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(how, round(time.monotonic() - began, 1))


def read(path: Path) -> dict[str, Outcome]:
    return {name: Outcome(*found) for name, found in json.loads(path.read_text()).items()} if path.exists() else {}


def tail(log: Path, began: int, lines: int = 12) -> str:
    """The last lines that were written behind byte `began`."""
    with log.open("rb") as file:
        file.seek(began)
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def day(all_steps: Sequence[Step], out: Path, minutes: float) -> dict[str, Outcome]:
    """Run what is left of the steps within the time, and write down how each went at once."""
    ends, state, log = time.monotonic() + 60 * minutes, out / "day.json", out / "day.log"
    done = read(state)
    for step in in_turn(all_steps, done):
        left = ends - time.monotonic()
        if left < LEAST:
            print(f"left for another time: {step.name}", flush=True)
            continue
        print(f"\n===== {step.name}, at most {min(left, step.seconds):.0f} s", flush=True)
        size = log.stat().st_size if log.exists() else 0
        done[step.name] = run(step, min(left, step.seconds), log)
        print(tail(log, size), flush=True)
        print(f"===== {step.name}: {done[step.name].how}, {done[step.name].seconds} s", flush=True)
        state.write_text(json.dumps(done))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for results; made if it is not there")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all steps of this call")
    parser.add_argument("--only", nargs="+", help="these steps alone, by name")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU and small")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    chosen = [s for s in steps(out, options.rehearse) if options.only is None or s.name in options.only]
    if options.only and len(chosen) < len(set(options.only)):
        parser.error(f"--only: the steps are {', '.join(repr(s.name) for s in steps(out, False))}")
    if not options.rehearse and (reason := no_gpu()) is not None:
        print(f"No GPU: {reason}. Nothing was run; --rehearse tries the commands on a CPU.", file=sys.stderr)
        raise SystemExit(NO_GPU)
    done = day(chosen, out, options.minutes)
    for step in chosen:
        print(f"{step.name:24} {f'{done[step.name].how}, {done[step.name].seconds} s' if step.name in done else 'not run'}")
    raise SystemExit(0 if all(done.get(s.name, Outcome("", 0)).how == "ok" for s in chosen) else 1)


def no_gpu() -> str | None:
    sys.path.insert(0, str(ROOT))
    from llmlab.kernels.dispatch import why_no_cuda

    return why_no_cuda()


if __name__ == "__main__":
    main()
