"""Two runs side by side, request by request, and the first decision where they part."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.metrics import RequestMetrics
from llmlab.events.replay import timeless
from llmlab.events.trace import Run
from llmlab.events.why import describe, seconds
from llmlab.types import TraceError


class Pair(msgspec.Struct, frozen=True):
    """One quantity of one request in both runs; None where it did not happen."""

    a: float | None
    b: float | None

    @property
    def delta(self) -> float | None:
        return None if self.a is None or self.b is None else self.b - self.a


class PairedRequest(msgspec.Struct, frozen=True):
    """One request in both runs. Seconds and tokens."""

    request: str
    ttft: Pair
    tpot: Pair
    e2e: Pair
    preemptions: Pair
    output_tokens: Pair


class Comparison(msgspec.Struct, frozen=True):
    """What `compare` found. Ratios are b over a; `parted` says which decision differed first, and why."""

    modes: tuple[str, str]
    requests: tuple[PairedRequest, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    throughput_ratio: float | None
    parted: str

    def mean_ratio(self, quantity: str) -> float | None:
        """Ratio of the means of `ttft`, `tpot` or `e2e` over the requests that have it in both runs."""
        pairs = [p for r in self.requests if (p := getattr(r, quantity)).delta is not None]
        total = sum(p.a for p in pairs)
        return sum(p.b for p in pairs) / total if total else None

    def better(self, quantity: str) -> int:
        """Number of requests whose `quantity` is smaller in b."""
        return sum(1 for r in self.requests if (d := getattr(r, quantity).delta) is not None and d < 0)

    def __str__(self) -> str:
        lines = [f"{len(self.requests)} requests in both runs (a {self.modes[0]}, b {self.modes[1]})"]
        for name in ("ttft", "tpot", "e2e"):
            ratio = self.mean_ratio(name)
            if ratio is not None:
                lines.append(f"  {name:5} b/a {ratio:.3f}, smaller in b for {self.better(name)}")
        if self.throughput_ratio is not None:
            lines.append(f"  output tokens/s b/a {self.throughput_ratio:.3f}")
        return "\n".join([*lines, f"  {self.parted}"])


def compare(a: Run, b: Run) -> Comparison:
    """Align two runs by request. Raises TraceError if they have no request in common."""
    common = [name for name in a.requests if name in b.requests]
    if not common:
        raise TraceError("compare", list(a.requests)[:3], "the two runs have no request in common",
                         "Compare runs of one workload, or a run and its fork.")  # fmt: skip
    rate = a.metrics.output_throughput
    return Comparison(
        (a.mode, b.mode), tuple(_pair(name, a.requests[name], b.requests[name]) for name in common),
        tuple(n for n in a.requests if n not in b.requests), tuple(n for n in b.requests if n not in a.requests),
        b.metrics.output_throughput / rate if rate else None, _parted(a, b),
    )  # fmt: skip


def _pair(name: str, a: RequestMetrics, b: RequestMetrics) -> PairedRequest:
    def pair(get: Callable[[RequestMetrics], float | None]) -> Pair:
        return Pair(get(a), get(b))

    return PairedRequest(name, pair(lambda m: m.ttft), pair(lambda m: m.tpot), pair(lambda m: m.e2e),
                         pair(lambda m: m.num_preemptions), pair(lambda m: m.num_output_tokens))  # fmt: skip


def _parted(a: Run, b: Run) -> str:
    """The first decision or plan that differs, as a sentence."""
    kinds = (ev.Decision, ev.StepPlanned, ev.RequestPreempted, ev.RequestAdmitted)
    left = [e for e in a.log_events if isinstance(e, kinds)]
    right = [e for e in b.log_events if isinstance(e, kinds)]
    for x, y in zip(left, right):
        if _essence(x) != _essence(y):
            return f"They part at step {x.step}. a: {_tell(x)} b: {_tell(y)}"
    return "They took the same decisions." if len(left) == len(right) else "One goes on where the other ends."


def _essence(event: ev.Event) -> object:
    """What happened, apart from who decided it and what else there was."""
    if isinstance(event, ev.Decision):
        return event.seam, event.chosen
    if isinstance(event, ev.StepPlanned):
        return event.items, event.moves
    return timeless(event)


def _tell(event: ev.Event) -> str:
    if isinstance(event, ev.Decision):
        return describe(event)
    if isinstance(event, ev.StepPlanned):
        work = " ".join(f"{i.request}:{i.num_tokens}" for i in event.items[:8])
        return f"at {seconds(event.t)} the step computes {work or 'nothing'}{' ...' if len(event.items) > 8 else ''}."
    return f"at {seconds(event.t)} {type(event).__name__} of {event.request}."
