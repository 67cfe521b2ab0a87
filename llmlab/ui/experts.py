"""Which experts were brought to the device and thrown out again, from ExpertFetched and ExpertEvicted events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.ui.chart import count, data, percent, sentence, setting, title
from llmlab.ui.theme import roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

_CELL = 22


class Traffic(NamedTuple):
    """One expert of one layer: how often it was fetched and evicted, and the bytes that came for it."""

    layer: int
    expert: int
    fetched: int
    evicted: int
    bytes: int


def expert_traffic(run: Run) -> list[Traffic]:
    """By layer and expert; only those that ever moved."""
    found: dict[tuple[int, int], Traffic] = {}
    for e in run.log_events:
        kind = type(e).__name__
        if kind not in ("ExpertFetched", "ExpertEvicted"):
            continue
        key = (int(e.layer), int(e.expert))  # type: ignore[attr-defined]
        now, came = found.get(key, Traffic(*key, 0, 0, 0)), kind == "ExpertFetched"
        found[key] = now._replace(fetched=now.fetched + came, evicted=now.evicted + (not came),
                                  bytes=now.bytes + (int(getattr(e, "bytes", 0)) if came else 0))  # fmt: skip
    return [found[key] for key in sorted(found)]


def expert_heat_map(run: Run) -> Any:
    """How often each expert was brought to the device: a row a layer, a column an expert; the number says how often. The
    more it moved, the more of its cell is filled."""
    traffic = expert_traffic(run)
    if not traffic:
        return sentence("Which experts move: none did", "No expert was fetched or evicted in this run: the model has none, or all "
                        "of them stay on the device, or the log level leaves it out.", setting(run))  # fmt: skip
    import altair as alt

    c, most = roles(), max(t.fetched for t in traffic)
    experts, layers = 1 + max(t.expert for t in traffic), 1 + max(t.layer for t in traffic)
    rows = [{"layer": t.layer, "expert": t.expert, "fetched": t.fetched, "evicted": t.evicted, "mb": t.bytes / 1e6} for t in traffic]
    x = alt.X("expert:O", title="expert", scale=alt.Scale(domain=list(range(experts))), axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y("layer:O", title="layer", scale=alt.Scale(domain=list(range(layers))), axis=alt.Axis(labelOverlap=True))
    heat = alt.Color("fetched:Q", title="times fetched", scale=alt.Scale(domain=[0, most], range=[c.grid, c.transfer]))
    told = [alt.Tooltip("layer:O"), alt.Tooltip("expert:O"), alt.Tooltip("fetched:Q"), alt.Tooltip("evicted:Q"),
            alt.Tooltip("mb:Q", title="MB fetched", format=".3~g")]  # fmt: skip
    base = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=told)
    drawn = [base.mark_rect(stroke=c.paper, strokeWidth=1.5).encode(color=heat)]
    if experts * layers <= 400:
        dark = alt.condition(alt.datum.fetched > most / 2, alt.value(c.owner_ink), alt.value(c.ink))
        drawn.append(base.mark_text(fontSize=11).encode(text="fetched:Q", color=dark))
    width = max(260, min(820, experts * 2 * _CELL))
    notes = [setting(run), "A cell is an expert; the number says how often it was brought to the device"]
    return alt.layer(*drawn).properties(width=width, height=max(80, min(620, layers * _CELL)),
                                        title=title(finding(traffic), *notes, width=max(width, 560)))  # fmt: skip


def finding(traffic: list[Traffic]) -> str:
    """The sentence above the map."""
    fetched = sum(t.fetched for t in traffic)
    busiest = sorted((t.fetched for t in traffic), reverse=True)
    tenth = max(1, len(traffic) // 10)
    share = percent(sum(busiest[:tenth]) / fetched) if fetched else "none"
    who = "the busiest expert takes" if tenth == 1 else f"the busiest {tenth} of {len(traffic)} take"
    moved = sum(t.bytes for t in traffic)
    gigabytes = f", {moved / 1e9:.3g} GB" if moved else ""
    return f"Which experts move: {count(fetched, 'fetch').replace('fetchs', 'fetches')}{gigabytes}; {who} {share} of them"
