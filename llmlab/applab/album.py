"""Every picture of a recorded run, by the words of a menu. What a run does not hold is said in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmlab.events.trace import Run
from llmlab.ui import figures
from llmlab.ui.chart import sentence, setting

LIMITS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)  # milliseconds


class Look(NamedTuple):
    """What a picture may ask of the page: the step that is shown, and a limit on latencies [s]."""

    step: int
    limit: float


def pictures() -> Mapping[str, Callable[[Run, Look], Any]]:
    """What draws each picture under the theme in force."""
    return {
        "time to first token": lambda run, look: figures.latency_ecdf(run, "ttft", look.limit),
        "end-to-end latency": lambda run, look: figures.latency_ecdf(run, "e2e", look.limit),
        "what each step computes": lambda run, look: figures.batch_composition(run),
        "who owns the KV memory": lambda run, look: figures.kv_block_map(run),
        "the decision of this step": lambda run, look: _card(run, look.step),
        "everything in a window of time": lambda run, look: figures.event_inspector(run),
        "steps under the roofline": lambda run, look: figures.roofline_steps(run),
        "predicted and actual step time": lambda run, look: figures.predicted_vs_measured(run),
        "which resource works when": lambda run, look: figures.resource_gantt(run),
        "drafts": lambda run, look: figures.speculation_strip(run),
        "experts": lambda run, look: figures.expert_heat_map(run),
    }


def has_limit(name: str) -> bool:
    """Whether a limit changes this picture."""
    return name in ("time to first token", "end-to-end latency")


def _card(run: Run, step: int) -> Any:
    """The decision of this step, or of the last step before it, that had most alternatives."""
    known = [one for one in run.events("Decision") if one.step <= step and one.seam != "eviction"]
    if not known:
        return sentence("Nothing was decided yet", "Decisions are recorded from log_level=2 on.", setting(run))
    last = known[-1].step
    return figures.decision_card(run, max((one for one in known if one.step == last), key=lambda one: (len(one.alternatives), one.seq)).seq)
