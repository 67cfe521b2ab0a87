"""Which experts were brought to the device and thrown out again, and which were found there, from the log of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.events import catalog as ev
from llmlab.ui.chart import count, data, percent, sentence, setting, title
from llmlab.ui.theme import roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

_CELL = 22


class Traffic(NamedTuple):
    """One expert of one layer: how often it was fetched because a step needed it (`demand`) or in advance (`prefetch`), how
    often it left again, how often it had come in vain, and the bytes that came for it. Loading at the start counts as
    neither."""

    layer: int
    expert: int
    demand: int = 0
    prefetch: int = 0
    evicted: int = 0
    unused: int = 0
    bytes: int = 0

    @property
    def fetched(self) -> int:
        return self.demand + self.prefetch

    def with_event(self, event: ev.ExpertFetched | ev.ExpertEvicted) -> Traffic:
        if isinstance(event, ev.ExpertEvicted):
            return self._replace(evicted=self.evicted + 1, unused=self.unused + event.unused)
        demand = event.reason == "demand"
        return self._replace(demand=self.demand + demand, prefetch=self.prefetch + (not demand), bytes=self.bytes + event.bytes)


def expert_traffic(run: Run) -> list[Traffic]:
    """By layer and expert; only those that ever moved after the start."""
    found: dict[tuple[int, int], Traffic] = {}
    for event in run.log_events:
        if isinstance(event, ev.ExpertEvicted) or (isinstance(event, ev.ExpertFetched) and event.reason != "initial"):
            key = event.layer, event.expert
            found[key] = found.get(key, Traffic(*key)).with_event(event)
    return [found[key] for key in sorted(found)]


def last_seen_resident(run: Run) -> dict[tuple[int, int], bool]:
    """By layer and expert, of all that were ever wanted: whether it was on the device when it was wanted last."""
    found: dict[tuple[int, int], bool] = {}
    for event in run.events("ExpertsDispatched"):
        found.update({(event.layer, e): False for e in (*event.fetched, *event.cpu, *event.deferred)})
        found.update({(event.layer, e): True for e in event.device})
    return found


def expert_heat_map(run: Run) -> Any:
    """How often each expert was brought to the device: a row a layer, a column an expert; the number says how often. The
    more it moved, the stronger its colour. An outline marks those that were on the device when they were wanted last."""
    traffic, resident = expert_traffic(run), last_seen_resident(run)
    if not traffic:
        why = ("Experts that come and go are recorded from log_level=3 on." if run.started.level < 3 else
               "No expert was fetched or evicted after the start: the model has none, or all of them stay on the device.")  # fmt: skip
        return sentence("Which experts move: nothing to show", why, setting(run))
    import altair as alt

    moved = {(t.layer, t.expert) for t in traffic}
    traffic += [Traffic(*key) for key in sorted(resident) if key not in moved]
    c, most = roles(), max(t.fetched for t in traffic)
    experts, layers = 1 + max(t.expert for t in traffic), 1 + max(t.layer for t in traffic)
    rows = [{"layer": t.layer, "expert": t.expert, "fetched": t.fetched, "demand": t.demand, "evicted": t.evicted,
             "unused": t.unused, "mb": t.bytes / 1e6} for t in traffic]  # fmt: skip
    x = alt.X("expert:O", title="expert", scale=alt.Scale(domain=list(range(experts))), axis=alt.Axis(labelAngle=0, labelOverlap=True))
    y = alt.Y("layer:O", title="layer", scale=alt.Scale(domain=list(range(layers))), axis=alt.Axis(labelOverlap=True))
    heat = alt.Color("fetched:Q", title="times fetched", scale=alt.Scale(domain=[0, most], range=[c.grid, c.transfer]))
    told = [alt.Tooltip("layer:O"), alt.Tooltip("expert:O"), alt.Tooltip("fetched:Q"), alt.Tooltip("demand:Q", title="on demand"),
            alt.Tooltip("evicted:Q"), alt.Tooltip("unused:Q", title="in vain"),
            alt.Tooltip("mb:Q", title="MB fetched", format=".3~g")]  # fmt: skip
    base = alt.Chart(data(rows)).encode(x=x, y=y, tooltip=told)
    drawn = [base.mark_rect(stroke=c.paper, strokeWidth=1.5).encode(color=heat)]
    if experts * layers <= 400:
        dark = alt.condition(alt.datum.fetched > most / 2, alt.value(c.owner_ink), alt.value(c.ink))
        drawn.append(base.mark_text(fontSize=11).encode(text="fetched:Q", color=dark))
    there = [row for row in rows if resident.get((int(row["layer"]), int(row["expert"])))]
    notes = [setting(run), "A cell is an expert; the number says how often it was brought to the device"]
    if there:
        outline = alt.Chart(data(there)).mark_rect(fill=None, stroke=c.ink, strokeWidth=1.6).encode(x=x, y=y)
        drawn.insert(1, outline)
        notes.append("Outlined: it was on the device when it was wanted last")
    width = max(260, min(820, experts * 2 * _CELL))
    return alt.layer(*drawn).properties(width=width, height=max(80, min(620, layers * _CELL)),
                                        title=title(finding(traffic), *notes, width=max(width, 560)))  # fmt: skip


def finding(traffic: list[Traffic]) -> str:
    """The sentence above the map."""
    fetched, demand = sum(t.fetched for t in traffic), sum(t.demand for t in traffic)
    vain = sum(t.unused for t in traffic)
    moved = sum(t.bytes for t in traffic)
    amount, unit = (moved / 1e9, "GB") if moved >= 1e9 else (moved / 1e6, "MB")
    size = f" ({amount:,.0f} {unit})" if amount >= 100 else f" ({amount:.3g} {unit})" if moved else ""
    how = f", {percent(demand / fetched)} of them on demand" if fetched else ""
    return (f"Which experts move: {fetched} fetch{'' if fetched == 1 else 'es'}{size}{how}"
            + (f"; {count(vain, 'expert')} left unused" if vain else ""))  # fmt: skip
