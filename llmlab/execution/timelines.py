"""Timelines: what occupies which resource when. Pure arithmetic; knows neither plans nor models.

    device  |linear 0||linear 1|....wait....|linear 0'|
    d2h             |q k v|
    cpu                   |attention|
    h2d                             |out|

An `Op` needs one resource for some seconds, once the ops that it waits for have ended. `Timelines.run` is a list
scheduler: whenever a resource could start several ops it takes the one that can start first, and among equals the one
with the most work behind it; nothing that runs is interrupted. So overlap is earned: two ops share an instant only if they need different
resources and neither waits for the other.

Main memory (HBM) is no line of its own: ops on one device run one after the other, and an op's seconds are the longer of
its arithmetic and its bytes over the bandwidth.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from llmlab.types import ResourceSpan

RESOURCES = ("device", "cpu", "h2d", "d2h", "disk", "net")


class Op(NamedTuple):
    """`seconds` of one resource. `after`: indices of ops in the same list, all smaller than its own; `ready`: the earliest
    instant, whatever they do. `num_bytes`: what it moves over a link (0 for arithmetic)."""

    resource: str
    seconds: float
    name: str
    after: tuple[int, ...] = ()
    request: str | None = None
    num_bytes: float = 0.0
    ready: float = 0.0


class Timelines:
    """When each resource is free next. Seconds of the run's clock."""

    def __init__(self, free: Mapping[str, float] | None = None) -> None:
        self.free: dict[str, float] = dict(free or {})

    def place(self, resource: str, ready: float, seconds: float, op: str, request: str | None = None) -> ResourceSpan:
        """Occupy `resource` for `seconds` from `ready` on, or from when it is free."""
        start = max(ready, self.free.get(resource, 0.0))
        end = self.free[resource] = start + seconds
        return ResourceSpan(resource, start, end, op, request)

    def run(self, ops: Sequence[Op], start: float) -> list[ResourceSpan]:
        """Place all `ops`, none before `start`; their spans, in the order of `ops`."""
        spans: list[ResourceSpan | None] = [None] * len(ops)
        ready = [max(start, op.ready) for op in ops]
        missing = [len(op.after) for op in ops]
        followers = _followers(ops)
        behind = _behind(ops, followers)
        heap = [(ready[i], -behind[i], i) for i in range(len(ops)) if not missing[i]]
        heapq.heapify(heap)
        while heap:
            when, _, i = heapq.heappop(heap)
            op = ops[i]
            free = self.free.get(op.resource, 0.0)
            if free > when:  # somebody else got the resource meanwhile: ask again when it is free
                heapq.heappush(heap, (free, -behind[i], i))
                continue
            spans[i] = span = self.place(op.resource, when, op.seconds, op.name, op.request)
            for j in followers[i]:
                ready[j] = max(ready[j], span.end)
                missing[j] -= 1
                if not missing[j]:
                    heapq.heappush(heap, (ready[j], -behind[j], j))
        return [span for span in spans if span is not None]


def _followers(ops: Sequence[Op]) -> list[list[int]]:
    followers: list[list[int]] = [[] for _ in ops]
    for j, op in enumerate(ops):
        for i in op.after:
            if not 0 <= i < j:
                raise ValueError(f"op {j} ({op.name}) waits for op {i}, which does not come before it")
            followers[i].append(j)
    return followers


def _behind(ops: Sequence[Op], followers: Sequence[Sequence[int]]) -> list[float]:
    """Seconds on the longest way from the start of each op to the end of all."""
    behind = [op.seconds for op in ops]
    for i in range(len(ops) - 1, -1, -1):
        behind[i] += max((behind[j] for j in followers[i]), default=0.0)
    return behind


def busy(spans: Iterable[ResourceSpan]) -> dict[str, float]:
    """Seconds of work on each resource."""
    total: dict[str, float] = {}
    for span in spans:
        total[span.resource] = total.get(span.resource, 0.0) + span.end - span.start
    return total


def makespan(ops: Sequence[Op]) -> float:
    """Seconds from the start until the last of `ops` has ended, on resources that are all free."""
    return max((span.end for span in Timelines().run(ops, 0.0)), default=0.0)
