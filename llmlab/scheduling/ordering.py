"""Who stands where in the queue (seam A). Smaller keys first; ties fall to (arrival, number)."""

from __future__ import annotations

from typing import Literal

from llmlab.registry import Registry
from llmlab.seams import Key, Ordering, RequestView


class FCFS:
    """First come, first served."""

    name = "fcfs"
    refresh: Literal["arrival", "step"] = "arrival"

    def key(self, request: RequestView, now: float) -> Key:
        return request.arrival


class Priority:
    """Smaller `priority` first (0 before 1), then first come, first served."""

    name = "priority"
    refresh: Literal["arrival", "step"] = "arrival"

    def key(self, request: RequestView, now: float) -> Key:
        return (request.priority, request.arrival)


class ShortestJobFirst:
    """Oracle: the smallest true amount of work first, prompt plus `metadata["output_len"]` (else max_tokens)."""

    name = "sjf_oracle"
    refresh: Literal["arrival", "step"] = "arrival"

    def key(self, request: RequestView, now: float) -> Key:
        return job_length(request)


class LongestJobFirst:
    """Oracle: the largest amount of work first (the mirror image of sjf_oracle, good for makespan)."""

    name = "ljf"
    refresh: Literal["arrival", "step"] = "arrival"

    def key(self, request: RequestView, now: float) -> Key:
        return -job_length(request)


def job_length(request: RequestView) -> float:
    """Tokens still to be computed if the output has its true (or else its largest) length."""
    cap = request.request.max_total_tokens - request.num_prompt_tokens
    output = min(float(request.metadata.get("output_len", cap)), cap)
    return request.num_prompt_tokens + output - request.num_computed_tokens


ORDERINGS: Registry[Ordering] = Registry(
    "ordering", {"fcfs": FCFS, "priority": Priority, "sjf_oracle": ShortestJobFirst, "ljf": LongestJobFirst}
)
