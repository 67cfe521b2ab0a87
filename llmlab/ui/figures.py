"""All figures of a run, as functions `Run -> altair chart`. Enable a theme first (`llmlab.ui.theme.enable`).

Every title states a finding with numbers computed from the run; every subtitle says whether they were measured or
simulated, on what, with which model and seed. What the log's level does not hold is said in a sentence, never guessed
and never an exception.
"""

from __future__ import annotations

from llmlab.events.export import merge_spans, request_spans
from llmlab.ui.blocks import block_rects, merge_rects
from llmlab.ui.latency import latency_ecdf
from llmlab.ui.memory import kv_block_map
from llmlab.ui.steps import batch_composition, predicted_vs_measured
from llmlab.ui.timeline import policy_race, request_timeline

__all__ = [
    "batch_composition", "block_rects", "kv_block_map", "latency_ecdf", "merge_rects", "merge_spans", "policy_race",
    "predicted_vs_measured", "request_spans", "request_timeline",
]  # fmt: skip
