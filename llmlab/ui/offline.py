"""The data of a timeline, packed for a page: the batch of a run, its words and colours, and the answers to `why`."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.why import TITLES
from llmlab.types import TraceError
from llmlab.ui import theme
from llmlab.ui.chart import count, load, seconds
from llmlab.ui.frames import frames

if TYPE_CHECKING:
    from llmlab.events.trace import Run

SCRIPT = Path(__file__).parent / "static" / "timeline.js"
MAX_WHYS = 2000  # requests whose answer a page carries


def run_batch(run: Run) -> dict[str, Any]:
    """All that the timeline of a run draws and says."""
    return with_words(frames(run), run)


def with_words(batch: dict[str, Any], run: Run | None) -> dict[str, Any]:
    """The batch, with the colours of both themes and, for a finished run, its finding."""
    if "meta" in batch:
        meta = batch["meta"]
        meta["colours"] = {name: msgspec.to_builtins(roles) for name, roles in theme.ROLES.items()}
        if run is not None:
            meta |= {"title": finding(run), "facts": f"{load(run)[0].upper()}{load(run)[1:]}."}
    return batch


def finding(run: Run) -> str:
    """What the timeline shows, in one sentence with numbers of the run."""
    late = [(e.t - run.requests[e.request].arrival, e.request) for e in run.events("FirstToken")]
    if not run.requests:
        return "No request arrived in this run"
    if not late:
        return f"None of {count(len(run.requests), 'request')} got a token"
    worst, name = max(late)
    tail = f"; {count(run.metrics.num_preemptions, 'preemption')}" if run.metrics.num_preemptions else ""
    median = sorted(t for t, _ in late)[(len(late) - 1) // 2]
    return f"{name} waits longest for its first token, {seconds(worst)}; half of the requests get theirs within {seconds(median)}{tail}"


def opening_step(run: Run) -> int:
    """The step at which the picture says most: that of the first preemption, or the one with most requests alive."""
    first = next((e.step for e in run.log_events if isinstance(e, ev.RequestPreempted)), None)
    if first is not None:
        return first
    best = max(run.steps, key=lambda s: (s.num_running + s.num_waiting, -s.step), default=None)
    return best.step if best is not None else -1


def answer(run: Run, request: str) -> dict[str, Any]:
    """`run.why(request)` as a message for the page. Raises TraceError for a request that the run does not have."""
    why = run.why(request)
    stretches = [[s.kind, TITLES[s.kind], s.start, s.end, [_said(t) for t in s.sentences]] for s in why.stretches]
    return {"type": "why", "request": request, "headline": _said(why.headline), "stretches": stretches}


def _said(sentence: str) -> str:
    return sentence.replace(" us ", " µs ")


def packed(value: Any) -> bytes:
    """gzip of JSON."""
    return gzip.compress(msgspec.json.encode(value), 6, mtime=0)


def answers(run: Run) -> dict[str, Any]:
    """The answer of every request, without what a message repeats; none for a run of more than MAX_WHYS requests."""
    if len(run.requests) > MAX_WHYS:
        return {}
    found = {}
    for name in run.requests:
        try:
            found[name] = {k: v for k, v in answer(run, name).items() if k in ("headline", "stretches")}
        except TraceError:
            continue
    return found


def timeline_script(run: Run, element: str, theme: str = "auto") -> str:
    """A module for a page: draws the timeline of `run` into the element with this id. Needs nothing from outside."""
    traits = msgspec.json.encode({"step": opening_step(run), "theme": theme}).decode()
    data, whys = (base64.b64encode(packed(value)).decode() for value in (run_batch(run), answers(run)))
    return (f"{SCRIPT.read_text(encoding='utf-8')}\n"
            f"const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));\n"
            f"window.timeline = standalone(document.getElementById({element!r}), bytes('{data}'), bytes('{whys}'), {traits});\n")  # fmt: skip
