"""Numbers and sentences as the apps show them."""

from __future__ import annotations

from typing import Any

from llmlab.applab.live import LiveEngine
from llmlab.ui.chart import seconds


def numbers(live: LiveEngine, beat: object = None) -> Any:
    """The engine's vitals as a row of numbers; `beat` is what makes a page ask again."""
    import marimo as mo

    v = live.vitals
    shown = {
        "mean time to first token": "-" if v.mean_ttft is None else seconds(v.mean_ttft),
        "mean latency": "-" if v.mean_e2e is None else seconds(v.mean_e2e),
        "running": str(v.num_running), "waiting": str(v.num_waiting),
        "KV blocks in use": f"{v.used_blocks} of {v.num_blocks}",
        "right answers": f"{v.right} of {v.judged}", "step": str(v.step),
    }  # fmt: skip
    return mo.hstack([mo.stat(value, label=name) for name, value in shown.items()], justify="start", gap=0, wrap=True)
