"""What the timeline widget draws, as plain data: a fold of events into spans, steps, memory and sentences.

    frames(run)                    one batch with all of a run
    f = Frames(); f.write(event)   the same while the run grows; f.take() is what is new, f.all() everything kept

A batch is a dict for JSON. Times are whole ticks of 0.1 µs of the run's clock; requests are numbered by arrival. What
touches is merged before it is drawn: a request's thousand decode steps are one bar. Columns of steps are differences,
which are small and compress well: `step` to the step before, `start` to its end, `end` to the start, `predicted` to the
time that the step took (null: not known).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmlab.events import catalog as ev
from llmlab.events.export import StepFold, StepSlice
from llmlab.ui.notes import Note, Notes

if TYPE_CHECKING:
    from llmlab.events.trace import Run

VERSION = 1
TICKS = 1e7  # per second
KINDS = ("queued", "prefill", "decode", "preempted", "swapped", "recompute", "held")
FREE, FINDABLE = -1, -2  # owners of a block besides requests; otherwise 2 * request + (1 if it is shared)
_QUEUED, _PREFILL, _DECODE, _PREEMPTED, _SWAPPED, _RECOMPUTE, _HELD = range(len(KINDS))
MAX_BUDGETS = 100
Wall = Literal["blocks", "holds", "count", "none"]


def ticks(seconds: float) -> int:
    return round(seconds * TICKS)


def frames(source: Run | Iterable[ev.Event]) -> dict[str, Any]:
    """All of a run, or of its events, as one batch."""
    fold = Frames()
    events: Iterable[ev.Event] = source.log_events if hasattr(source, "log_events") else source
    for event in events:
        fold.write(event)
    return fold.all()


# ------------------------------------------------------------------------------------ one request
@dataclass
class _Bar:
    """A request while its spans are being collected: covered up to `at`. A span is [kind, start, end, steps, tokens]."""

    index: int
    name: str
    arrival: float
    num_prompt_tokens: int
    at: float
    status: int = _QUEUED
    last_row: int = -2
    num_admissions: int = 0
    first_token: float | None = None
    end: float | None = None
    reason: str = ""
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_blocks: int = 0
    spans: list[list[int]] = field(default_factory=list)
    sent: int = 0  # spans that are known outside; the last of them may have grown since

    def cover(self, kind: int, end: float, steps: int = 0, tokens: int | None = 0) -> None:
        """The time up to `end` was spent on `kind`."""
        if end <= self.at:
            return
        last = self.spans[-1] if self.spans else None
        if last is not None and last[0] == kind and last[2] == ticks(self.at):
            last[2], last[3] = ticks(end), last[3] + steps
            last[4] = -1 if tokens is None or last[4] < 0 else last[4] + tokens
        else:
            self.spans.append([kind, ticks(self.at), ticks(end), steps, -1 if tokens is None else tokens])
        self.at = end

    def change(self, status: int, t: float) -> None:
        """Into or out of the queue. Between a step and a preemption right after it nothing was waited for."""
        self.cover(self.status, t)
        self.status = status

    def take_part(self, piece: StepSlice, row: int) -> None:
        """The request was in this step. The moment between two steps in a row belongs to the second one."""
        if self.end is not None and self.end <= piece.start:
            return  # it was aborted while the step was in flight
        if self.last_row != row - 1:
            self.cover(self.status, piece.start)
        kind = _DECODE if piece.kinds[self.name] == "decode" else _PREFILL if self.num_admissions <= 1 else _RECOMPUTE
        end = piece.end if self.end is None else min(piece.end, self.end)
        self.cover(kind, end, 1, None if piece.tokens is None else piece.tokens.get(self.name, 0))
        self.last_row = row

    def close(self, t: float, reason: str, num_output_tokens: int) -> None:
        """At its end. Without steps (log level 0) only the first token divides its life."""
        self.end, self.reason, self.num_output_tokens = t, reason, num_output_tokens

    def close_without_steps(self) -> None:
        if self.first_token is not None and self.end is not None:
            self.cover(_QUEUED, self.first_token)
            self.cover(_DECODE, self.end, 0, None)

    def message(self, whole: bool) -> list[Any]:
        """What is new: spans from the last one on that was known."""
        first = 0 if whole else max(0, self.sent - 1)
        if not whole:
            self.sent = len(self.spans)
        return [
            self.index, self.name, ticks(self.arrival), self.num_prompt_tokens,
            -1 if self.first_token is None else ticks(self.first_token), -1 if self.end is None else ticks(self.end),
            self.reason, self.num_output_tokens, self.num_cached_tokens, self.status, first,
            [n for span in self.spans[first:] for n in span],
        ]  # fmt: skip


# ----------------------------------------------------------------------------------------- memory
class _Blocks:
    """Owners of blocks (log level 3): what changed since the last step was planned."""

    def __init__(self) -> None:
        self._owners: dict[int, list[int]] = {}
        self._findable: set[int] = set()
        self._changed: dict[int, None] = {}

    def add(self, owner: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._owners.setdefault(block, []).append(owner)
            self._changed[block] = None

    def remove(self, owner: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            if owner in self._owners.get(block, ()):
                self._owners[block].remove(owner)
            self._changed[block] = None

    def find(self, block: int, findable: bool) -> None:
        (self._findable.add if findable else self._findable.discard)(block)
        self._changed[block] = None

    def value(self, block: int) -> int:
        owners = self._owners.get(block)
        if owners:
            return 2 * owners[0] + (len(owners) > 1)
        return FINDABLE if block in self._findable else FREE

    def take(self) -> list[int]:
        """[block, value, block, value, ...] of what changed."""
        changed, self._changed = self._changed, {}
        return [n for block in changed for n in (block, self.value(block))]


# ---------------------------------------------------------------------------------------- steps
class _Row(NamedTuple):
    """One finished step. Times in ticks; -1 prefill tokens: not told apart from decode."""

    step: int
    start: int
    end: int
    prefill: int
    decode: int
    running: int
    waiting: int
    used: int
    predicted: int | None


def _columns(rows: Sequence[_Row]) -> dict[str, list[Any]]:
    """The rows as columns of differences; the first row of a batch differs from zero."""
    before = [_Row(0, 0, 0, 0, 0, 0, 0, 0, None), *rows[:-1]]
    known: dict[str, list[Any]] = {
        "step": [r.step - b.step for r, b in zip(rows, before)], "start": [r.start - b.end for r, b in zip(rows, before)],
        "end": [r.end - r.start for r in rows],
        "predicted": [None if r.predicted is None else r.predicted - (r.end - r.start) for r in rows],
    }  # fmt: skip
    return known | {name: [getattr(r, name) for r in rows] for name in ("prefill", "decode", "running", "waiting", "used")}


def _turned(known: list[tuple[int, int]], t: int, value: int) -> list[tuple[int, int]]:
    """The values that a setting had, and from when; the first one holds for ever."""
    if known and known[-1][1] == value:
        return known
    return [*known[:1], *known[1:][-MAX_BUDGETS:], (t, value)]


# ------------------------------------------------------------------------------------------- fold
class Frames:
    """Folds events into what the widget draws. `keep`: with more steps than that, the oldest are forgotten, with the
    requests that ended before them, so that a live run may last for days."""

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self.num_batches = 0
        self.lost = 0  # events that fell out of the log's ring unread; whoever reads the log sets it
        self._started: ev.RunStarted | None = None
        self._config: dict[str, Any] = {}
        self._pools: list[tuple[int, int]] = []  # (from when, blocks in service)
        self._budgets: list[tuple[int, int]] = []  # (from when, tokens a step may have): it changes while a run goes on
        self._now = 0.0
        self._bars: dict[str, _Bar] = {}
        self._num_requests = 0
        self._fold, self._notes_fold, self._blocks = StepFold(), Notes(), _Blocks()
        self._plans: dict[int, list[int]] = {}
        self._changes: list[int] = []
        self._base: dict[int, int] = {}  # the wall before the first step that is kept
        self._rows: list[_Row] = []
        self._walls: list[list[int]] = []
        self._first_row = self._sent_rows = 0
        self._notes: list[Note] = []
        self._first_note = self._sent_notes = 0
        self._dirty: dict[str, None] = {}
        self._meta_sent = False

    # ----------------------------------------------------------------------------------- folding
    def write(self, event: ev.Event) -> None:
        """Take in one event."""
        self._now = max(self._now, event.t)
        pieces = self._fold.write(event)
        self._notes += self._notes_fold.write(event)
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event)
        for piece in pieces:
            self._finish(piece, event)
        self._fold.slices.clear()

    def close(self) -> None:
        pass

    @property
    def _level(self) -> int:
        return self._started.level if self._started is not None else 2

    @property
    def wall(self) -> Wall:
        """What is known of the memory: owners of blocks, blocks held by each request, their number, or nothing."""
        walls: tuple[Wall, ...] = ("none", "count", "holds", "blocks")
        return walls[min(3, self._level)]

    def _bar(self, event: ev.Event) -> _Bar | None:
        """The request of an event; None if its arrival fell out of the log."""
        name = event.request or ""
        bar = self._bars.get(name)
        if bar is not None:
            self._dirty[name] = None
        return bar

    def _run_started(self, event: ev.RunStarted) -> None:
        self._started, self._meta_sent = event, False
        self._set(event.t, event.config)

    def _reconfigured(self, event: ev.Reconfigured) -> None:
        self._meta_sent = False
        self._set(event.t, event.changes)

    def _set(self, t: float, config: Mapping[str, Any]) -> None:
        self._config |= config
        self._budgets = _turned(self._budgets, ticks(t), int(self._config.get("max_num_batched_tokens") or 0))
        self._pools = _turned(self._pools, ticks(t), int(self._config.get("num_blocks") or 0))

    def _arrived(self, event: ev.RequestArrived) -> None:
        spec = event.spec
        begin = min(spec.arrival, event.t)
        self._bars[spec.id] = _Bar(self._num_requests, spec.id, begin, len(spec.prompt_token_ids), begin)
        self._num_requests += 1
        self._dirty[spec.id] = None

    def _admitted(self, event: ev.RequestAdmitted) -> None:
        bar = self._bar(event)
        if bar is not None:
            bar.change(_HELD, event.t)
            bar.num_admissions += 1
            bar.num_cached_tokens += event.num_cached_tokens
            self._hold(bar, event.num_tokens)

    def _resumed(self, event: ev.RequestResumed) -> None:
        bar = self._bar(event)
        if bar is not None:
            bar.change(_HELD, event.t)
            self._hold(bar, event.num_tokens)

    def _preempted(self, event: ev.RequestPreempted) -> None:
        bar = self._bar(event)
        if bar is not None:
            bar.change(_SWAPPED if event.mode == "swap" else _PREEMPTED, event.t)
            self._hold(bar, 0)

    def _first_token(self, event: ev.FirstToken) -> None:
        bar = self._bar(event)
        if bar is not None:
            bar.first_token = event.t

    def _tokens(self, event: ev.TokensReleased) -> None:
        bar = self._bar(event)
        if bar is not None:
            bar.num_output_tokens += len(event.token_ids)

    def _finished(self, event: ev.RequestFinished) -> None:
        bar = self._bar(event)
        if bar is not None:
            if bar.last_row < 0 and bar.status == _QUEUED:
                bar.end = event.t
                bar.close_without_steps()
                bar.cover(_QUEUED, event.t)
            elif bar.status in (_PREEMPTED, _SWAPPED):
                bar.cover(bar.status, event.t)
            bar.close(event.t, event.reason, event.num_output_tokens)
            self._hold(bar, 0)

    def _reserved(self, event: ev.BlocksReserved) -> None:
        bar = self._bar(event)
        if bar is not None:
            self._blocks.add(bar.index, event.block_ids)

    def _released(self, event: ev.BlocksReleased) -> None:
        bar = self._bar(event)
        if bar is not None:
            self._blocks.remove(bar.index, event.block_ids)

    def _replaced(self, event: ev.BlockReplaced) -> None:
        bar = self._bar(event)
        if bar is not None:
            self._blocks.remove(bar.index, (event.old,))
            self._blocks.add(bar.index, (event.new,))

    def _cached(self, event: ev.BlockCached | ev.BlockEvicted) -> None:
        self._blocks.find(event.block_id, isinstance(event, ev.BlockCached))

    def _hold(self, bar: _Bar, num_tokens: int) -> None:
        """Below level 3: how many blocks the computed tokens of a request fill."""
        size = int(self._config.get("block_size") or 0)
        blocks = -(-num_tokens // size) if size else 0
        if self.wall == "holds" and blocks != bar.num_blocks:
            bar.num_blocks = blocks
            self._changes += (bar.index, blocks)

    def _planned(self, event: ev.StepPlanned) -> None:
        """The wall of a step is what stands when it is planned: after its reservations."""
        if not (event.items or event.moves):
            return
        for item in event.items if self.wall == "holds" else ():
            bar = self._bars.get(item.request)
            if bar is not None:
                self._hold(bar, item.tokens[1])
        self._plans[event.seq] = self._take_changes()

    def _take_changes(self) -> list[int]:
        if self.wall == "blocks":
            return self._blocks.take()
        changes, self._changes = self._changes, []
        return changes

    def _finish(self, piece: StepSlice, event: ev.Event) -> None:
        row = self._first_row + len(self._rows)
        for name in piece.kinds:
            bar = self._bars.get(name)
            if bar is not None:
                bar.take_part(piece, row)
                self._dirty[name] = None
        used = piece.used_blocks if piece.planned_blocks is None else piece.planned_blocks
        running = piece.num_running if piece.planned_running is None else piece.planned_running
        waiting = piece.num_waiting if piece.planned_waiting is None else piece.planned_waiting
        prefill = -1 if piece.prefill_tokens is None else piece.prefill_tokens
        decode = piece.num_tokens if piece.decode_tokens is None else piece.decode_tokens
        predicted = None if piece.predicted is None else ticks(piece.predicted)
        self._rows.append(_Row(piece.step, ticks(piece.start), ticks(piece.end), prefill, decode, running, waiting, used, predicted))
        self._walls.append(self._plans.pop(event.plan, []) if isinstance(event, ev.StepFinished) else [])
        if self.keep is not None and len(self._rows) > self.keep + self.keep // 4:
            self._forget(len(self._rows) - self.keep)

    def _forget(self, count: int) -> None:
        """Drop the oldest rows and whatever ended before the first one that stays."""
        for changes in self._walls[:count]:
            self._base |= zip(changes[::2], changes[1::2])
        del self._rows[:count], self._walls[:count]
        self._first_row += count
        self._sent_rows = max(0, self._sent_rows - count)
        step, start = self._rows[0].step, self._rows[0].start / TICKS
        old = sum(1 for note in self._notes if note.step < step)
        self._notes, self._sent_notes = [n for n in self._notes if n.step >= step], max(0, self._sent_notes - old)
        self._first_note += old
        self._bars = {name: b for name, b in self._bars.items() if b.end is None or b.end >= start}
        self._dirty = {name: None for name in self._dirty if name in self._bars}
        alive = {b.index for b in self._bars.values()}
        if self.wall == "holds":
            self._base = {index: blocks for index, blocks in self._base.items() if index in alive}

    # ----------------------------------------------------------------------------------- batches
    def take(self) -> dict[str, Any]:
        """What is new since the last `take`."""
        batch = self._batch(False, list(self._dirty), self._sent_rows, self._sent_notes)
        self._dirty.clear()
        self._sent_rows, self._sent_notes, self._meta_sent = len(self._rows), len(self._notes), True
        return batch

    def all(self) -> dict[str, Any]:
        """Everything that is kept. What is new for `take` stays new."""
        batch = self._batch(True, list(self._bars), 0, 0)
        batch["wall0"] = [n for pair in self._base.items() for n in pair]
        return batch

    def _batch(self, whole: bool, names: list[str], row: int, note: int) -> dict[str, Any]:
        self.num_batches += not whole
        rows = self._rows[row:]
        batch: dict[str, Any] = {
            "version": VERSION, "number": self.num_batches, "whole": whole, "now": ticks(self._now),
            "requests": [self._bars[name].message(whole) for name in names],
            "row": self._first_row + row,
            "steps": _columns(rows),
            "walls": [[self._first_row + row + i, changes] for i, changes in enumerate(self._walls[row:]) if changes],
            "note": self._first_note + note,
            "notes": [self._note(n) for n in self._notes[note:]],
            "lost": self.lost,
        }  # fmt: skip
        if whole or not self._meta_sent:
            batch["meta"] = self.meta()
        return batch

    def _note(self, note: Note) -> list[Any]:
        bar = self._bars.get(note.request or "")
        options = [[o.option, o.score, -1 if o.cost is None else ticks(o.cost), int(o.feasible), o.why_not] for o in note.options]
        return [note.step, ticks(note.t), note.kind, bar.index if bar is not None else -1, note.text,
                -1 if note.cost is None else ticks(note.cost), options, note.seq]  # fmt: skip

    def meta(self) -> dict[str, Any]:
        """Where the numbers come from, and the frame of the pictures."""
        started = self._started
        config = self._config
        return {
            "ticks": TICKS, "kinds": KINDS, "wall": self.wall, "keep": self.keep or 0, "level": self._level,
            "mode": started.mode if started is not None else "", "seed": started.seed if started is not None else None,
            "model": str(started.model.get("name", "?")) if started is not None else "?",
            "hardware": str(started.hardware.get("name", "?")) if started is not None else "?",
            "budgets": self._budgets, "pools": self._pools,
            "num_blocks": max((blocks for _, blocks in self._pools), default=0),
            "block_size": int(config.get("block_size") or 0),
            "policies": {k: str(config[k]) for k in ("ordering", "composer", "victim", "tiering", "speculation") if config.get(k)},
        }  # fmt: skip


_HANDLERS: dict[type[ev.Event], Any] = {
    ev.RunStarted: Frames._run_started,
    ev.Reconfigured: Frames._reconfigured,
    ev.RequestArrived: Frames._arrived,
    ev.RequestAdmitted: Frames._admitted,
    ev.RequestResumed: Frames._resumed,
    ev.RequestPreempted: Frames._preempted,
    ev.FirstToken: Frames._first_token,
    ev.TokensReleased: Frames._tokens,
    ev.RequestFinished: Frames._finished,
    ev.BlocksReserved: Frames._reserved,
    ev.BlocksReleased: Frames._released,
    ev.BlockReplaced: Frames._replaced,
    ev.BlockCached: Frames._cached,
    ev.BlockEvicted: Frames._cached,
    ev.StepPlanned: Frames._planned,
}
