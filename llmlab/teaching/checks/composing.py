"""Checks about what a step contains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import llmlab
from llmlab.events.trace import Run
from llmlab.events.why import count
from llmlab.seams import Composer

LIMIT, BUDGET = 96, 512


def considerate(answer: Callable[[int], Composer]) -> Iterator[str]:
    """`answer(most)` is a composer: decodes first, at most `most` prompt tokens beside them, else the whole budget."""
    run = _served(answer(LIMIT))
    failed = run.events("PolicyFailed")
    if failed:
        yield f"In a simulated run it failed {len(failed)} times, first: {failed[0].error}."
        return
    yield from _left_out(run)
    yield from _too_much(run)
    alone = max((s.num_tokens for s in run.steps if not _decodes(s)), default=0)
    if alone < BUDGET:
        yield f"When nobody decodes, a step may use the whole budget of {BUDGET} tokens; yours used at most {alone}."
    mixed = [s for s in run.steps if _decodes(s) and s.num_tokens > len(_decodes(s))]
    if not mixed:
        yield "No step has both decodes and prompts: whoever writes and whoever reads should share steps."


def _served(composer: Composer) -> Run:
    config = llmlab.EngineConfig(model="lab-s", executor="sim", hardware="t4", composer=composer, num_blocks=2048,
                                 max_num_batched_tokens=BUDGET, max_num_seqs=24, enable_prefix_caching=False)  # fmt: skip
    load = llmlab.Workload.poisson(rate=60.0, n=60, prompt="uniform:20,1200", output="uniform:5,60", seed=3)
    return llmlab.run(config, load)


def _decodes(step: Any) -> list[Any]:
    return [item for item in step.items if item.num_tokens == 1]


def _left_out(run: Run) -> Iterator[str]:
    """Who decoded in one step and was not done must be in the next."""
    ends = {e.request: e.step for e in run.events("RequestFinished")}
    for before, after in zip(run.steps, run.steps[1:]):
        there = {item.request for item in after.items}
        missing = [i.request for i in before.items if i.emit == "sample" and ends[i.request] > before.step and i.request not in there]
        if missing:
            yield (f"Step {after.step} leaves out {missing[0]}, which was writing and not done: decodes go first, "
                   "whatever else there is.")  # fmt: skip
            return


def _too_much(run: Run) -> Iterator[str]:
    for step in run.steps:
        decodes = len(_decodes(step))
        prompt = step.num_tokens - decodes
        if decodes and prompt > LIMIT:
            yield f"Step {step.step} has {count(decodes, 'decode')} and {prompt} prompt tokens beside; {LIMIT} were promised."
            return
