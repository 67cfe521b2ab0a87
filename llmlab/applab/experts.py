"""A mixture whose experts do not all fit: where to put them, simulated. The routing is a recorded one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from llmlab.config import EngineConfig
from llmlab.events.trace import Run
from llmlab.running import run
from llmlab.ui.chart import WIDTH, data, setting, title
from llmlab.ui.theme import roles
from llmlab.workloads.workload import Workload

MODEL, LAYERS, EXPERTS = "mixtral-8x7b", 32, 8
COMPARED = ("on_demand", "lru", "lfu", "cpu_experts", "balanced")


class Offload(msgspec.Struct, frozen=True):
    """Who decides, how many of a layer's eight experts fit on the device, on what, and how many requests at once."""

    policy: str = "lru"
    fit: int = 2
    machine: str = "a10"
    batch: int = 4


def served(of: Offload, level: int = 1) -> Run:
    """A batch of short requests. Raises LabError."""
    config = EngineConfig(model=MODEL, executor="sim", hardware=of.machine, weights=of.policy, num_blocks=300,
                          num_expert_slots=of.fit * LAYERS, max_num_seqs=of.batch, log_level=level)  # fmt: skip
    return run(config, Workload.batch(of.batch, prompt=(50, 100), output=(16, 24), seed=1))


def compared(of: Offload) -> dict[str, Run]:
    """The same under each policy of a short list, and the chosen one."""
    names = [*COMPARED, *([of.policy] if of.policy not in COMPARED else [])]
    return {name: served(msgspec.structs.replace(of, policy=name)) for name in names}


def finding(of: Offload, runs: Mapping[str, Run]) -> str:
    """The chosen policy beside the best and the floor, in one sentence."""
    rates = {name: one.metrics.output_throughput for name, one in runs.items()}
    best = max(rates, key=lambda name: rates[name])
    floor = rates[of.policy] / rates["on_demand"] if rates["on_demand"] else 0.0
    told = "the fastest here" if best == of.policy else f"{best} reaches {rates[best]:.3g}"
    return (f"With room for {of.fit} of {EXPERTS} experts a layer, {of.policy} makes {rates[of.policy]:.3g} tokens a second "
            f"({floor:.2g} times those of fetching every expert when it is needed); {told}")  # fmt: skip


def chart(of: Offload, runs: Mapping[str, Run]) -> Any:
    """Tokens a second by policy, the fastest on top; the chosen one stands out."""
    import altair as alt

    c = roles()
    rates = sorted(((one.metrics.output_throughput, name) for name, one in runs.items()), reverse=True)
    rows = [{"policy": name, "x": rate, "label": f"{rate:.3g}", "now": name == of.policy} for rate, name in rates]
    y = alt.Y("policy:N", sort=[name for _, name in rates], title=None, axis=alt.Axis(labelFontSize=13, grid=False, labelLimit=200))
    x = alt.X("x:Q", title="output tokens per second", axis=alt.Axis(tickCount=8))
    faint = alt.condition("datum.now", alt.value(1.0), alt.value(0.4))
    bars = alt.Chart(data(rows)).mark_bar(color=c.decode, cornerRadiusEnd=3).encode(x=x, y=y, opacity=faint)
    text = alt.Chart(data(rows)).mark_text(align="left", dx=6).encode(x=x, y=y, text="label:N")
    first = next(iter(runs.values()))
    return alt.layer(bars, text).properties(
        width=WIDTH, height=36 * len(rows), title=title(finding(of, runs), setting(first), f"{of.batch} requests at once"))  # fmt: skip
