"""What drafting was worth: verifications of proposed tokens, from Drafted and Verified events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.events import catalog as ev
from llmlab.ui.chart import WIDTH, count, data, percent, sentence, setting, title
from llmlab.ui.theme import roles

if TYPE_CHECKING:
    from llmlab.events.trace import Run

MAX_COLUMNS = 48
MAX_LANES = 3
_CELL = 18
KINDS = ("accepted", "bonus token", "rejected", "wasted after the first miss")


class Verification(NamedTuple):
    """One verification of one request's draft: tokens that held, that did not, and the one that it yielded itself."""

    request: str
    t: float
    accepted: int
    rejected: int
    bonus: int

    @property
    def yielded(self) -> int:
        return self.accepted + self.bonus


def verifications(run: Run) -> list[Verification]:
    """All verifications in order; empty if nothing was drafted or the log level is below 2."""
    return [Verification(e.request or "", e.t, len(e.accepted), len(e.rejected), int(e.bonus is not None))
            for e in run.log_events if isinstance(e, ev.Verified)]  # fmt: skip


def speculation_strip(run: Run, requests: Sequence[str] | None = None) -> Any:
    """A column a verification: accepted tokens below, the bonus token of the target on top of them, rejected ones above.
    A lane each for `requests`, by default for the three with most verifications. Needs log level 2."""
    found = verifications(run)
    if not found:
        why = "Verifications are recorded from log_level=2 on." if run.started.level < 2 else "No request drafted tokens in this run."
        return sentence("What drafting was worth: nothing was drafted", why, setting(run))
    import altair as alt

    lanes = list(requests) if requests is not None else _most_verified(found)
    own = {name: [v for v in found if v.request == name] for name in lanes}
    tall = max(v.accepted + v.rejected + v.bonus for name in lanes for v in own[name])
    wide = max(min(MAX_COLUMNS, len(own[name])) for name in lanes)
    charts = [_lane(name, own[name], tall, wide, name == lanes[-1]) for name in lanes]
    cut = f"The first {MAX_COLUMNS} verifications of each" if any(len(own[n]) > MAX_COLUMNS for n in lanes) else ""
    notes = [setting(run), "A column is one verification by the target model, its first token at the bottom", cut]
    return alt.vconcat(*charts, spacing=18).resolve_scale(color="shared").properties(title=title(finding(found), *notes))


def finding(found: Sequence[Verification]) -> str:
    """The sentence above the strip."""
    drafted = sum(v.accepted + v.rejected for v in found)
    mean = sum(v.yielded for v in found) / len(found)
    share = percent(sum(v.accepted for v in found) / drafted) if drafted else "none"
    return f"What drafting was worth: {mean:.2f} tokens a verification instead of 1; {share} of {count(drafted, 'drafted token')} held"


def _most_verified(found: Sequence[Verification]) -> list[str]:
    counts: dict[str, int] = {}
    for v in found:
        counts[v.request] = counts.get(v.request, 0) + 1
    return sorted(sorted(counts, key=lambda name: -counts[name])[:MAX_LANES], key=list(counts).index)


def _lane(name: str, own: Sequence[Verification], tall: int, wide: int, named: bool) -> Any:
    import altair as alt

    c = roles()
    cells = [cell for i, v in enumerate(own[:MAX_COLUMNS]) for cell in _cells(i, v)]
    x = alt.X("x0:Q", title="verification" if named else None, scale=alt.Scale(domain=[0, max(wide, 12)], nice=False),
              axis=alt.Axis(grid=False, tickMinStep=1, labels=named, tickCount=10))  # fmt: skip
    y = alt.Y("y0:Q", title=None, scale=alt.Scale(domain=[0, tall], nice=False), axis=alt.Axis(grid=False, tickMinStep=1, tickCount=min(tall, 4)))
    colours = [c.cached, c.transfer, c.rejected, c.grid]
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=list(KINDS), range=colours))
    told = [alt.Tooltip("kind:N"), alt.Tooltip("said:N", title="verification")]
    mean = sum(v.yielded for v in own) / len(own) if own else 0.0
    squares = alt.Chart(data(cells)).mark_rect(cornerRadius=2).encode(x=x, x2="x1:Q", y=y, y2="y1:Q", color=colour, tooltip=told)
    hatch = alt.Chart(data([line for cell in cells if cell["kind"] == KINDS[2] for line in _hatch(cell)])).mark_rule(color=c.paper)
    return (
        alt.layer(squares, hatch.encode(x=x, x2="x1:Q", y=y, y2="y1:Q"))
        .properties(width=WIDTH, height=max(60, tall * _CELL), title=alt.Title(f"{name}: {mean:.2f} tokens a verification", fontSize=13, offset=6))
    )  # fmt: skip


def _hatch(cell: Mapping[str, Any]) -> list[dict[str, float]]:
    """Slanted lines across a square: what was rejected is told by more than its colour."""
    third = (cell["x1"] - cell["x0"]) / 3
    return [{"x0": cell["x0"] + i * third, "x1": cell["x0"] + (i + 1) * third, "y0": cell["y0"], "y1": cell["y1"]} for i in range(3)]


def _cells(index: int, v: Verification) -> list[dict[str, Any]]:
    """One square a token, from the bottom. The first rejected token is the miss; what follows it was never looked at."""
    kinds = [KINDS[0]] * v.accepted + [KINDS[1]] * v.bonus + [KINDS[2]] * min(1, v.rejected) + [KINDS[3]] * max(0, v.rejected - 1)
    said = f"{v.accepted} of {v.accepted + v.rejected} held, {v.yielded} tokens gained"
    return [{"x0": index + 0.06, "x1": index + 0.94, "y0": i + 0.07, "y1": i + 0.93, "kind": kind, "said": said}
            for i, kind in enumerate(kinds)]  # fmt: skip
