"""All figures of a run, as functions `Run -> altair chart`. Enable a theme first (`llmlab.ui.theme.enable`).

Every title states a finding with numbers computed from the run; every subtitle says whether they were measured or
simulated, on what, with which model and seed. What the log's level does not hold is said in a sentence, never guessed
and never an exception.
"""

from __future__ import annotations

from llmlab.events.export import merge_spans, request_spans
from llmlab.ui.blocks import block_rects, merge_rects
from llmlab.ui.experts import expert_heat_map
from llmlab.ui.inspector import decision_card, event_inspector, fork_call
from llmlab.ui.latency import latency_ecdf
from llmlab.ui.memory import kv_block_map
from llmlab.ui.resources import merge_work, resource_gantt, work_of
from llmlab.ui.speculation import speculation_strip
from llmlab.ui.steps import batch_composition, predicted_vs_measured
from llmlab.ui.timeline import policy_race, request_timeline
from llmlab.ui.tradeoffs import frontier, roofline_steps

__all__ = [
    "batch_composition", "block_rects", "decision_card", "event_inspector", "expert_heat_map", "fork_call", "frontier",
    "kv_block_map", "latency_ecdf", "merge_rects", "merge_spans", "merge_work", "policy_race", "predicted_vs_measured",
    "request_spans", "request_timeline", "resource_gantt", "roofline_steps", "speculation_strip", "work_of",
]  # fmt: skip
