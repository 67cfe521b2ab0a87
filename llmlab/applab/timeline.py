"""The timeline of an engine that never ends, and the thread that keeps it fresh. Needs the package anywidget."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from llmlab.applab.live import LiveEngine
from llmlab.runs import Run
from llmlab.types import LabError
from llmlab.ui.offline import answer
from llmlab.ui.widget import Timeline

BEAT = 0.037  # seconds between two batches of events: up to 27 a second
BEATS_PER_ANSWER = 20  # while somebody reads why an unfinished request is late
KEPT_STEPS = 1500  # that a page can scroll back


class LiveTimeline(Timeline):
    """A recorded run until `go_live`, then the newest part of the engine's log; `why` is answered from it, too."""

    def __init__(self, live: LiveEngine, run: Run | None = None, **traits: Any) -> None:
        super().__init__(run, **traits)
        self._engine = live
        self._unfinished = ""  # the request about which the last answer was not the last word

    def go_live(self) -> None:
        """Show the engine, which is loaded. One widget for both: its script is fetched once, however late it comes."""
        live = self._engine
        assert live.engine is not None and live.started is not None, "wait_until_ready comes first"
        log = live.engine.log
        self.follow(log, KEPT_STEPS, live.started, live.opening(next(iter(log)))[1:] if log.first_seq > 0 else ())

    def answer_again(self) -> None:
        """Bring the answer on the page up to date, if it was given before its request had finished."""
        letter = self._engine.letters.get(self.selected)
        if letter is not None and (not letter.finished or self.selected == self._unfinished):
            self.send(self._answer(self.selected))

    def _answer(self, request: str) -> dict[str, Any]:
        if self._run is not None:
            return super()._answer(request)
        letter = self._engine.letters.get(request)
        self._unfinished = request if letter is None or not letter.finished else ""
        try:
            window = self._engine.window()
            assert window is not None
            return {**answer(window, request), "growing": True}
        except LabError as error:
            waiting = request in self._engine.letters and not self._engine.letters[request].finished
            said = f"{request} has not been seen by the scheduler yet." if waiting else str(error)
            return {"type": "why", "request": request, "headline": said, "stretches": [], "growing": True}


class Pump:
    """Keeps a timeline fresh, and its engine awake, for as long as somebody holds this object. A page holds it in a
    variable of a cell: marimo lets go of those when the page is closed or the cell runs again."""

    def __init__(self, live: LiveEngine, timeline: LiveTimeline) -> None:
        stop = threading.Event()
        weakref.finalize(self, stop.set)
        threading.Thread(target=_keep_fresh, args=(live, timeline, stop), name="llmlab-pump", daemon=True).start()


def _keep_fresh(live: LiveEngine, timeline: LiveTimeline, stop: threading.Event) -> None:
    beats = 0
    with live.watching():
        while not stop.wait(BEAT) and not live.ended:
            timeline.pull()
            beats += 1
            if beats % BEATS_PER_ANSWER == 0:
                timeline.answer_again()
