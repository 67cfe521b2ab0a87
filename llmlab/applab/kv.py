"""What a KV pool saves and wastes: one simulated load, and the same with another block size or another eviction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmlab.config import EngineConfig
from llmlab.events.trace import Run
from llmlab.memory.eviction import EVICTIONS
from llmlab.running import run
from llmlab.ui.chart import WIDTH, data, percent, seconds, setting, title
from llmlab.ui.theme import roles
from llmlab.workloads.workload import Workload

BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
REQUESTS = 48


class Pool(msgspec.Struct, frozen=True):
    """A KV pool of `tokens` tokens, and prompts that share their first `shared` tokens within one of `families`."""

    block_size: int = 16
    tokens: int = 1536
    eviction: str = "lru"
    caching: bool = True
    shared: int = 256
    families: int = 6
    rate: float = 2.0


class Account(msgspec.Struct, frozen=True):
    """What became of the tokens of a run. `hit`: share of prompt tokens that were found; `waste`: mean share of the used
    blocks that holds no token."""

    hit: float
    waste: float
    evicted: int
    preempted: int
    mean_ttft: float


def served(pool: Pool, level: int = 3) -> Run:
    """The load on this pool, simulated on an A10 with a 7B model."""
    config = EngineConfig(model="llama-2-7b", executor="sim", hardware="a10", block_size=pool.block_size,
                          num_blocks=max(1, pool.tokens // pool.block_size), eviction=pool.eviction,
                          enable_prefix_caching=pool.caching, log_level=level)  # fmt: skip
    load = Workload.poisson(pool.rate, REQUESTS, prompt=(pool.shared + 16, pool.shared + 160), output="lognormal:40,0.6",
                            shared_prefix=pool.shared, families=pool.families, family_skew=0.7, seed=1)  # fmt: skip
    return run(config, load)


def account(of: Run) -> Account:
    """Read from the events."""
    metrics = of.metrics
    prompts = sum(r.num_prompt_tokens for r in of.requests.values())
    return Account(metrics.cached_tokens / prompts if prompts else 0.0, _waste(of), len(of.events("BlockEvicted")),
                   metrics.num_preemptions, metrics.ttft.mean or 0.0)  # fmt: skip


def _waste(of: Run) -> float:
    """Each request's last block is half empty on average: tokens held over room in its blocks, over all steps."""
    size = int(of.started.config["block_size"])
    held = room = 0
    for step in of.steps:
        for item in step.items:
            held += item.tokens[1]
            room += -(-item.tokens[1] // size) * size
    return 1 - held / room if room else 0.0


def finding(pool: Pool, found: Account) -> str:
    """The account in one sentence."""
    saved = (f"The prefix cache saves {percent(found.hit)} of the prompt tokens" if pool.caching
             else "Without a prefix cache every prompt token is computed")  # fmt: skip
    cost = f"{found.evicted} cached blocks had to go" if found.evicted else "no cached block had to go"
    lost = f", {found.preempted} requests were preempted" if found.preempted else ""
    return (f"{saved}; blocks of {pool.block_size} tokens stay {percent(found.waste)} empty; {cost}{lost}; mean time to "
            f"first token {seconds(found.mean_ttft)}")  # fmt: skip


def others(pool: Pool) -> dict[str, dict[str, Account]]:
    """The same load with each block size, and with each eviction policy."""
    def tried(**change: Any) -> Account:
        return account(served(msgspec.structs.replace(pool, **change)))

    return {
        "tokens in a block": {str(size): tried(block_size=size) for size in BLOCK_SIZES if size <= pool.tokens // 8},
        "eviction": {name: tried(eviction=name) for name in EVICTIONS.names()},
    }


def others_chart(pool: Pool, found: Mapping[str, Mapping[str, Account]], like: Run) -> Any:
    """Saved and empty shares by block size, and saved shares by eviction; what is chosen now stands out."""
    import altair as alt

    c, panels = roles(), []
    chosen = {"tokens in a block": str(pool.block_size), "eviction": pool.eviction}
    for knob, accounts in found.items():
        rows = [{"choice": name, "share": getattr(one, kind), "kind": word, "now": name == chosen[knob]}
                for name, one in accounts.items() for kind, word in _KINDS if kind == "hit" or knob != "eviction"]  # fmt: skip
        x = alt.X("choice:N", sort=list(accounts), title=knob, axis=alt.Axis(labelAngle=0, grid=False))
        y = alt.Y("share:Q", title="share of tokens", axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(domain=[0, 1]))
        legend = None if knob == "eviction" else alt.Legend(orient="bottom")
        colour = alt.Color("kind:N", title=None, legend=legend, scale=alt.Scale(domain=[w for _, w in _KINDS], range=[c.cached, c.waiting]))
        faint = alt.condition("datum.now", alt.value(1.0), alt.value(0.45))
        bars = alt.Chart(data(rows)).mark_bar().encode(x=x, y=y, xOffset="kind:N", color=colour, opacity=faint)
        text = alt.Chart(data(rows)).mark_text(dy=-7, fontSize=11).encode(
            x=x, y=y, xOffset="kind:N", text=alt.Text("share:Q", format=".0%"))  # fmt: skip
        panels.append(alt.layer(bars, text).properties(width=(WIDTH - 160) * len(accounts) // 9, height=190))
    return alt.hconcat(*panels, spacing=50).properties(title=title(_others_finding(found), setting(like), "The same load each time; what is chosen now stands out"))


_KINDS: Sequence[tuple[str, str]] = (("hit", "found in the prefix cache"), ("waste", "empty room in blocks"))


def _others_finding(found: Mapping[str, Mapping[str, Account]]) -> str:
    sizes, evictions = found["tokens in a block"], found["eviction"]
    best = max(sizes, key=lambda name: sizes[name].hit)
    worst = max(sizes, key=lambda name: sizes[name].waste)
    spread = max(a.hit for a in evictions.values()) - min(a.hit for a in evictions.values())
    told = "the eviction policy makes no difference" if spread < 0.005 else f"between the eviction policies lie {spread * 100:.0f} percentage points"
    return (f"Blocks of {best} tokens find most ({percent(sizes[best].hit)}), those of {worst} waste most "
            f"({percent(sizes[worst].waste)}); {told}")  # fmt: skip
