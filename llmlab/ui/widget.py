"""The timeline widget: who runs when, who owns the memory, what each step computes, and why. For marimo and Jupyter.

    from llmlab.ui.widget import Timeline
    Timeline(run)                                # a finished run: scrub, play, click a bar
    live = Timeline.live(engine.log)             # a growing log; `live.pull()` shows what is new
    mo.ui.anywidget(Timeline(run))               # in marimo

Keys: arrows step, space plays, home and end, + and - zoom, up and down choose a request. Needs the package anywidget.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anywidget
import traitlets

from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.types import LabError
from llmlab.ui.frames import Frames
from llmlab.ui.inspector import fork_call
from llmlab.ui.offline import answer, opening_step, packed, run_batch, with_words

if TYPE_CHECKING:
    from llmlab.events.log import EventLog

STATIC = Path(__file__).parent / "static"
KEEP = 4000  # steps that a live timeline remembers


class Timeline(anywidget.AnyWidget):  # type: ignore[misc]
    """A run on the screen. Traits: `step` (number of the step shown; -1 is the newest), `selected` (id of a request or
    ""), `theme` ("auto", "light", "dark"), `playing` and `speed` (1 shows the whole run in half a minute)."""

    _esm = STATIC / "timeline.js"
    step = traitlets.Int(-1).tag(sync=True)
    selected = traitlets.Unicode("").tag(sync=True)
    theme = traitlets.Enum(["auto", "light", "dark"], "auto").tag(sync=True)
    playing = traitlets.Bool(False).tag(sync=True)
    speed = traitlets.Float(1.0, min=0.0).tag(sync=True)
    _mode = traitlets.Unicode("static").tag(sync=True)
    _packed = traitlets.Bytes(b"").tag(sync=True)
    _forks = traitlets.Bool(False).tag(sync=True)

    def __init__(self, run: Run | None = None, **traits: Any) -> None:
        """`run`: a finished run. `traits`: first values, for example `theme="dark"` or `selected="r17"`."""
        if run is not None:
            traits = {"step": opening_step(run), "_packed": packed(run_batch(run)), "_forks": run.started.level >= 2, **traits}
        super().__init__(**traits)
        self._run = run
        self._reader: _Reader | None = None
        self.on_msg(self._heard)

    @classmethod
    def live(cls, log: EventLog, keep: int = KEEP, started: ev.RunStarted | None = None, **traits: Any) -> Self:
        """Follow a log from its oldest event on. Nothing happens by itself: call `pull` as often as you want to show
        something. `keep`: steps that are remembered. `started`: the first event, if it fell out of the log's ring."""
        widget = cls(None, **traits)
        widget.follow(log, keep, started)
        return widget

    def follow(self, log: EventLog, keep: int = KEEP, started: ev.RunStarted | None = None, before: Sequence[ev.Event] = ()) -> None:
        """From now on show this log, whatever was shown so far. `before`: what else fell out of the log's ring."""
        self._run, self._reader = None, _Reader(log, keep, started)
        for event in before:
            self._reader.fold.write(event)
        with self.hold_sync():  # the page must learn of it at once
            self._forks, self.selected, self.step, self.playing, self._mode = False, "", -1, True, "live"

    def pull(self) -> int:
        """Read what is new in the log and send it to the page. Returns the number of events that were read; safe to
        call from any thread. 0 for a finished run."""
        if self._reader is None:
            return 0
        with self._reader.lock:
            count, batch = self._reader.read()
            if batch is not None:
                self.send({"type": "batch", "batch": with_words(batch, None)})
        return count

    # -------------------------------------------------------------------------------- from the page
    def _heard(self, widget: Any, message: Any, buffers: Any) -> None:
        """Messages of the page: it was opened (again), or somebody asks why. Anything else is ignored."""
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "hello" and self._reader is not None:
            with self._reader.lock:
                self._reader.read_all()
                self.send({"type": "batch", "batch": with_words(self._reader.fold.all(), None)})
        elif kind == "why":
            self.send(self._answer(str(message.get("request", ""))))
        elif kind == "fork" and self._run is not None:
            self.send({"type": "fork", "key": str(message.get("key", "")), "call": self._call(self._run, message)})

    def _call(self, run: Run, message: Any) -> str:
        try:
            return fork_call(run, int(message["seq"]), str(message["option"]))
        except LabError as error:
            return str(error)

    def _answer(self, request: str) -> dict[str, Any]:
        try:
            if self._run is not None:
                return answer(self._run, request)
            assert self._reader is not None
            return {**answer(Run.of(self._reader.log), request), "growing": True}
        except LabError as error:
            return {"type": "why", "request": request, "headline": str(error), "stretches": [], "growing": True}


class _Reader:
    """A log being read: where we are, and the fold of what was read."""

    def __init__(self, log: EventLog, keep: int, started: ev.RunStarted | None) -> None:
        self.log, self.fold, self.lock = log, Frames(keep), threading.RLock()
        self._cursor = log.cursor(0)
        if started is not None and log.first_seq > 0:
            self.fold.write(started)

    def read_all(self) -> int:
        events = self._cursor.read()
        self.fold.lost = self._cursor.lost
        for event in events:
            self.fold.write(event)
        return len(events)

    def read(self) -> tuple[int, dict[str, Any] | None]:
        """What is new; None if nothing is."""
        count = self.read_all()
        return count, self.fold.take() if count or self.fold.num_batches == 0 else None
