"""Checks about who runs next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import llmlab
from llmlab.events.trace import Run
from llmlab.seams import Ordering

PATIENCE, GAIN = 40.0, 0.8


def patient(answer: Callable[[], Ordering]) -> Iterator[str]:
    """`answer()` is an ordering under which a long job in a stream of short ones starts in time, and the mean stays low."""
    stream = _served(answer(), _stream())
    failed = stream.events("PolicyFailed")
    if failed:
        yield f"In a simulated run it failed {len(failed)} times, first: {failed[0].error}."
        return
    long = max(stream.requests.values(), key=lambda r: r.num_prompt_tokens)
    waited = long.queue_time or 0.0
    if waited > PATIENCE:
        yield f"On the stream the long request waited {waited:.0f} s before it started; allowed are {PATIENCE:.0f} s."
    for seed in (0, 1):
        mixed = llmlab.Workload.poisson(rate=2.0, n=80, prompt="lognormal:200,0.8", output="lognormal:60,1.0", seed=seed)
        mine, usual = (_served(policy, mixed).metrics.ttft.mean or 0.0 for policy in (answer(), "fcfs"))
        if mine > GAIN * usual:
            yield (f"On the mixed load (seed {seed}) the mean time to first token is {mine / usual:.2f} times that of first come, "
                   f"first served; wanted is at most {GAIN:g}.")  # fmt: skip


def _served(ordering: Any, work: llmlab.Workload) -> Run:
    config = llmlab.EngineConfig(model="llama-3.1-8b", executor="sim", hardware="a10", ordering=ordering,
                                 max_num_batched_tokens=512, max_num_seqs=4, log_level=1)  # fmt: skip
    return llmlab.run(config, work)


def _stream() -> llmlab.Workload:
    """Short requests at a little more than the device can serve, for a minute, and one long one among them."""
    n, gap = 450, 1 / 7
    times, prompts, outputs = [i * gap for i in range(n)], [60] * n, [20] * n
    prompts[12], outputs[12] = 600, 80
    return llmlab.Workload(tuple(times), tuple(prompts), tuple(outputs))
