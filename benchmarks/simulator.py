"""How fast the simulator is, and that its memory stays flat: Llama-2-7B on an A100-80G, Azure-conversation lengths, 4 req/s.

    python benchmarks/simulator.py                     requests a second at log levels 1 and 2, with and without leaps
    python benchmarks/simulator.py --cold              from a new process to the first result
    python benchmarks/simulator.py --memory 100000     resident memory while so many requests pass

One process, one core. Requests are drawn from the figures fitted to the public trace (`azure-conv-2023`), and drawing them is
part of the time. Aims: at least 1,400 requests a second at level 1, 300 at level 2, below 3 s from a cold process.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

FIRST = """
import llmlab
config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="a100")
run = llmlab.run(config, llmlab.Workload.like("azure-conv-2023", rate=4.0, n=100, seed=0))
print(f"{run.metrics.e2e.p90:.3f}")
"""


class Speed(NamedTuple):
    """One run: processor seconds, requests, steps and events."""

    seconds: float
    requests: int
    steps: int
    events: int


def speed(level: int, count: int, leaping: bool, budget: int) -> Speed:
    """Serve `count` requests. Without leaps every step is taken by itself."""
    from llmlab.config import EngineConfig
    from llmlab.engine import Engine
    from llmlab.running import serve
    from llmlab.workloads.workload import Workload

    load = Workload.like("azure-conv-2023", rate=4.0, n=count, seed=0)
    config = EngineConfig(model="llama-2-7b", executor="sim", hardware="a100", log_level=level, max_num_batched_tokens=budget)
    with Engine(config) as engine:
        began = time.process_time()
        serve(engine, load, None if leaping else lambda output: None)
        return Speed(time.process_time() - began, count, engine.scheduler.next_step, engine.log.num_emitted)


def show_speeds(count: int) -> None:
    print("level  leaps  budget  requests/s    us/request  steps  events a request")
    for level, leaping, budget in ((1, True, 512), (2, True, 512), (1, True, 2048), (1, False, 512), (2, False, 512)):
        many = count if leaping else max(1, count // 3)
        best = min((speed(level, many, leaping, budget) for _ in range(3)), key=lambda s: s.seconds)
        print(f"{level:5} {'yes' if leaping else 'no':>6} {budget:7} {best.requests / best.seconds:11.0f} "
              f"{1e6 * best.seconds / best.requests:13.0f} {best.steps:6} {best.events / best.requests:17.1f}", flush=True)  # fmt: skip


def show_cold() -> None:
    for turn in range(3):
        began = time.perf_counter()
        found = subprocess.run([sys.executable, "-c", FIRST], check=True, capture_output=True, text=True)
        print(f"cold start {turn + 1}: {time.perf_counter() - began:.2f} s to 100 requests (P90 E2E {found.stdout.strip()} s)")


def show_memory(count: int) -> None:
    """Resident memory at each fifth of the run."""
    from llmlab.config import EngineConfig
    from llmlab.engine import Engine
    from llmlab.running import Feed
    from llmlab.workloads.workload import Workload

    load = Workload.like("azure-conv-2023", rate=4.0, n=count, seed=0)
    config = EngineConfig(model="llama-2-7b", executor="sim", hardware="a100", log_level=1)
    began, done = time.process_time(), 0
    with Engine(config) as engine:
        feed = Feed(engine, load.source(engine.model.vocab_size))
        while feed.pour():
            for output in engine.leap():
                feed.take(output)
                done += output.finished
                if output.finished and done % (count // 10) == 0:
                    print(f"{done:8} requests: {resident():6.0f} MB resident, {done / (time.process_time() - began):6.0f} requests/s",
                          flush=True)  # fmt: skip
        print(engine.metrics.result().e2e)


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--memory", type=int, default=0, metavar="N")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
          "processor time of one process")  # fmt: skip
    if args.cold:
        show_cold()
    elif args.memory:
        show_memory(args.memory)
    else:
        show_speeds(args.requests)


if __name__ == "__main__":
    main()
