"""What a step costs the core: `schedule` plus `commit`, by running and by waiting requests, at log levels 0, 2 and 3.

    python benchmarks/scheduler.py [--steps 300] [--profile]

The steps are steady ones: every running request decodes one token. The executor is the simulated one, and its own
arithmetic is not counted; the cost model's is, because predicting a step's cost is part of planning it. Aims: at most
100 us + 4 us for each running request at level 2, and 10,000 waiting requests cost at most 1.5 times as much as 100.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from llmlab.engine import Engine
from llmlab.types import SamplingParams

RUNNING = (1, 8, 32, 64, 256)
WAITING = (0, 100, 10_000)
LEVELS = (0, 2, 3)


class StepCost(NamedTuple):
    """Medians over the steps, in microseconds."""

    schedule: float
    commit: float

    @property
    def total(self) -> float:
        return self.schedule + self.commit


def engine_with(running: int, waiting: int, log_level: int, num_steps: int) -> Engine:
    """An engine in which `running` requests decode and `waiting` ones stand in the queue."""
    prompt, output = 256, 2 * num_steps + 64
    blocks = -(-(prompt + output) // 16) * running + 8
    engine = Engine(
        model="llama-3.1-8b", executor="sim", hardware="h200", block_size=16, num_blocks=blocks, log_level=log_level,
        max_num_seqs=running, max_num_batched_tokens=max(running, 8192), check_interval=0, enable_prefix_caching=True,
    )  # fmt: skip
    for i in range(running + waiting):
        ids = [(i * 7919 + j) % 100_000 for j in range(prompt)]
        engine.add_request(ids, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True))
    while any(seq.num_output_tokens < 2 for seq in engine.scheduler.running.values()) or engine.num_running < running:
        engine.step()
    return engine


def steps(engine: Engine, count: int) -> Iterator[StepCost]:
    """Drive `count` steps by hand and time the scheduler's share of each."""
    scheduler, now = engine.scheduler, time.perf_counter
    for _ in range(count):
        began = now()
        plan = scheduler.schedule(engine.clock.now())
        planned = now()
        assert plan is not None
        result = engine.executor.submit(engine.batch_of(plan)).result()
        submitted = now()
        scheduler.commit(result)
        yield StepCost(1e6 * (planned - began), 1e6 * (now() - submitted))


def measure(running: int, waiting: int, log_level: int, num_steps: int) -> StepCost:
    engine = engine_with(running, waiting, log_level, num_steps)
    gc.collect()
    costs = list(steps(engine, num_steps))
    return StepCost(*(statistics.median(column) for column in zip(*costs)))


def show(running: int, waiting: int, level: int, cost: StepCost) -> None:
    print(f"{running:8} {waiting:8} {level:6} {cost.schedule:10.1f} {cost.commit:8.1f} {cost.total:8.1f} "
          f"{cost.total / running:12.2f} {100 + 4 * running:8}")  # fmt: skip


def profile(num_steps: int) -> None:
    """Where the time goes with 64 running requests at level 2."""
    engine = engine_with(64, 100, 2, num_steps)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in steps(engine, num_steps):
        pass
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(28)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps to take the median of")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    args = parser.parse_args()
    if args.profile:
        return profile(args.steps)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
          f"microseconds, medians of {args.steps} steps")  # fmt: skip
    print(" running  waiting  level   schedule   commit    total  per request      aim")
    for level in LEVELS:
        for running in RUNNING:
            show(running, 0, level, measure(running, 0, level, args.steps))
    queue = {waiting: measure(64, waiting, 2, args.steps) for waiting in WAITING}
    for waiting, cost in queue.items():
        show(64, waiting, 2, cost)
    print(f"10,000 waiting cost {queue[10_000].total / queue[100].total:.2f} times as much as 100 (aim: at most 1.5)")


if __name__ == "__main__":
    main()
