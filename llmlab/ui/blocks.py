"""Who owns which KV block when: block events (log level 3) folded into rectangles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from llmlab.events import catalog as ev

if TYPE_CHECKING:
    from llmlab.events.trace import Run


class BlockRect(NamedTuple):
    """Blocks [first, stop) between two instants (seconds): owned by `owners` (several share them), or, with no owner,
    free but still findable by its content (prefix cache)."""

    first: int
    stop: int
    start: float
    end: float
    owners: tuple[str, ...]

    @property
    def block_seconds(self) -> float:
        return (self.stop - self.first) * (self.end - self.start)


@dataclass
class _Block:
    """One physical block while the events pass by; unchanged since `since`."""

    number: int
    since: float = 0.0
    owners: tuple[str, ...] = ()
    cached: bool = False
    rects: list[BlockRect] = field(default_factory=list)

    def change(self, t: float, owners: tuple[str, ...], cached: bool) -> None:
        if (self.owners or self.cached) and t > self.since:
            self.rects.append(BlockRect(self.number, self.number + 1, self.since, t, self.owners))
        self.since, self.owners, self.cached = t, owners, cached

    def add(self, t: float, owner: str) -> None:
        self.change(t, (*self.owners, owner), self.cached)

    def remove(self, t: float, owner: str) -> None:
        self.change(t, tuple(o for o in self.owners if o != owner), self.cached)


def block_rects(run: Run) -> list[BlockRect]:
    """One rectangle per block, set of owners and interval, by block and time; disjoint. Empty below log level 3.
    A block that waits for a step in flight before it is free (quarantine) counts as released."""
    blocks: dict[int, _Block] = {}

    def block(number: int) -> _Block:
        return blocks.setdefault(number, _Block(number))

    for event in run.log_events:
        owner = event.request or ""
        if isinstance(event, ev.BlocksReserved):
            for number in event.block_ids:
                block(number).add(event.t, owner)
        elif isinstance(event, ev.BlocksReleased):
            for number in event.block_ids:
                block(number).remove(event.t, owner)
        elif isinstance(event, ev.BlockReplaced):
            block(event.old).remove(event.t, owner)
            block(event.new).add(event.t, owner)
        elif isinstance(event, (ev.BlockCached, ev.BlockEvicted)):
            one = block(event.block_id)
            one.change(event.t, one.owners, isinstance(event, ev.BlockCached))
    end = run.log_events[-1].t
    for one in blocks.values():
        one.change(end, (), False)
    return joined(rect for number in sorted(blocks) for rect in blocks[number].rects)


def joined(rects: Iterable[BlockRect]) -> list[BlockRect]:
    """The same rectangles, of one block each and in order of time, where consecutive ones of the same owners touch."""
    out: list[BlockRect] = []
    for rect in rects:
        last = out[-1] if out else None
        same = last is not None and (last.first, last.owners, last.end) == (rect.first, rect.owners, rect.start)
        if last is not None and same:
            out[-1] = last._replace(end=rect.end)
        else:
            out.append(rect)
    return out


def merge_rects(rects: Iterable[BlockRect]) -> list[BlockRect]:
    """The same block-seconds with fewer rectangles: neighbours of one owner and interval become one tall one."""
    tall: dict[tuple[float, float, tuple[str, ...]], list[BlockRect]] = {}
    for rect in sorted(rects, key=lambda r: r.first):
        pile = tall.setdefault((rect.start, rect.end, rect.owners), [])
        if pile and pile[-1].stop == rect.first:
            pile[-1] = pile[-1]._replace(stop=rect.stop)
        else:
            pile.append(rect)
    return [rect for pile in tall.values() for rect in pile]


class Usage(NamedTuple):
    """From `t` on, `blocks` physical blocks are in use."""

    t: float
    blocks: int


def usage(run: Run) -> list[Usage]:
    """Blocks in use as steps over time. Level 3: at every change; level 2: at the beginning and end of every step;
    level 1: at its end only, when the blocks of those that just finished are free again; empty at level 0."""
    if run.started.level < 3:
        return _usage_of_steps(run)
    changes: dict[float, int] = {}
    for rect in block_rects(run):
        if rect.owners:
            changes[rect.start] = changes.get(rect.start, 0) + rect.stop - rect.first
            changes[rect.end] = changes.get(rect.end, 0) - rect.stop + rect.first
    level, points = 0, []
    for t in sorted(changes):
        level += changes[t]
        points.append(Usage(t, level))
    return points


def _usage_of_steps(run: Run) -> list[Usage]:
    total = int(run.started.config.get("num_blocks") or 0)
    points = []
    for event in run.events(ev.StepPlanned, ev.StepFinished, ev.Leapt, ev.Reconfigured):
        if isinstance(event, ev.Reconfigured):
            total = int(event.changes.get("num_blocks") or total)
        elif isinstance(event, (ev.StepFinished, ev.Leapt)):
            points.append(Usage(event.t, event.used_blocks))
        elif total and event.items:
            points.append(Usage(event.t, total - event.free_blocks))
    return points


def share_of_time(points: list[Usage], at_least: float) -> float:
    """The share of the time between the first and the last point with `at_least` blocks in use."""
    whole = points[-1].t - points[0].t if points else 0.0
    full = sum(b.t - a.t for a, b in pairwise(points) if a.blocks >= at_least)
    return full / whole if whole else 0.0
