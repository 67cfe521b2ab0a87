"""Checks about who gives way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import llmlab
from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.events.why import count
from llmlab.seams import Victim


def fair_victim(answer: Callable[[], Victim]) -> Iterator[str]:
    """`answer()` is a victim policy: whoever was preempted least often gives way; among equals, the last come."""
    for seed in (0, 1):
        run = _served(answer(), seed)
        failed = run.events("PolicyFailed")
        if failed:
            yield f"In a simulated run it failed {len(failed)} times, first: {failed[0].error}."
            return
        wrong = next(_unfair(run), "")
        if wrong:
            yield wrong


def _served(victim: Victim, seed: int) -> Run:
    config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="t4", victim=victim, num_blocks=80,
                                 num_alternatives=64, enable_prefix_caching=False)  # fmt: skip
    load = llmlab.Workload.poisson(rate=1.5, n=24, prompt="uniform:16,120", output="uniform:80,160", seed=seed)
    return llmlab.run(config, load)


def _unfair(run: Run) -> Iterator[str]:
    """Every victim against all who could have given way in its place, by the log."""
    hits: dict[str, int] = {}
    for event in run.log_events:
        if isinstance(event, ev.Decision) and event.seam == "victim":
            order = {name: (hits.get(name, 0), -run.requests[name].arrival) for name in [event.chosen, *(a.option for a in event.alternatives)]}
            better = min(order, key=lambda name: order[name])
            if order[better] < order[event.chosen]:
                yield _sentence(event, better, hits)
        elif isinstance(event, ev.RequestPreempted) and event.request is not None:
            hits[event.request] = hits.get(event.request, 0) + 1


def _sentence(event: ev.Decision, better: str, hits: dict[str, int]) -> str:
    chosen, spared = hits.get(event.chosen, 0), hits.get(better, 0)
    if chosen == spared:
        return f"At step {event.step} it chose {event.chosen}, but {better} was preempted as often and came later."
    return f"At step {event.step} it chose {event.chosen}, preempted {count(chosen, 'time')} before, although {better} was hit {count(spared, 'time')}."
