"""What resources did and when they had nothing to do, as events (level 4), from the spans that an executor reports."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.types import ResourceSpan

WATCHED = ("device", "cpu")  # a link that is not used is nothing to wonder about
SPAN_EVENTS = (ev.Span, ev.Idle, ev.JoinWait)


class SpanLog:
    """Logs spans and the gaps between them, across steps."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._until: dict[str, float] = {}

    def record(self, spans: Sequence[ResourceSpan], cause: int) -> None:
        """Log the spans of one step in the order of their starts, each after the gap that it ends."""
        if not self._log.wants(ev.Span):
            return
        ordered = sorted(spans, key=lambda span: span.start)
        for span in ordered:
            if span.end > span.start:
                self._gap(span, ordered, cause)
                self._log.emit(ev.Span, span.request, cause, resource=span.resource, start=span.start, end=span.end, op=span.op)
                self._until[span.resource] = max(span.end, self._until.get(span.resource, 0.0))

    def _gap(self, span: ResourceSpan, spans: Sequence[ResourceSpan], cause: int) -> None:
        """The resource was idle until `span`: for want of what ended last elsewhere, or of anything to do."""
        since = self._until.get(span.resource, 0.0)
        if span.resource not in WATCHED or span.start <= since:
            return
        ended = [s for s in spans if s.resource != span.resource and since < s.end <= span.start]
        last = max(ended, key=lambda s: s.end, default=None)
        if span.resource == "device" and last is not None and last.op.startswith(("out ", "attention ")):
            self._log.emit(ev.JoinWait, last.request, cause, start=since, end=span.start, op=last.op)
        else:
            why = f"waits for {last.op} ({last.resource})" if last is not None else "nothing to do"
            self._log.emit(ev.Idle, None, cause, resource=span.resource, start=since, end=span.start, why=why)

    def replay(self, event: ev.Event) -> None:
        """Take over a recorded event."""
        self._log.append(msgspec.structs.replace(event, seq=self._log.num_emitted))
        if isinstance(event, ev.Span):
            self._until[event.resource] = max(event.end, self._until.get(event.resource, 0.0))
