"""A run without its beginning: the part of an endless run that its log still holds."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.events import catalog as ev
from llmlab.runs import Run


class Window(Run):
    """The newest events of a log, without those of requests whose arrival fell out of it. Everything that `Run` answers
    from events alone works, `why` included; a chain of causes ends where the window begins."""

    def __init__(self, opening: Sequence[ev.Event], events: Sequence[ev.Event], newest: int | None = None) -> None:
        """`opening`: RunStarted, and what else must be told before the first of `events`."""
        arrived = [event.request for event in events if isinstance(event, ev.RequestArrived)]
        known = set(arrived if newest is None else arrived[-newest:])
        kept = [_trimmed(event, known) for event in events if event.request is None or event.request in known]
        super().__init__([*opening, *(event for event in kept if event is not opening[0])])
        self._by_seq = {event.seq: event for event in self.log_events}

    @property
    def started(self) -> ev.RunStarted:  # type: ignore[override]
        first = self.log_events[0]
        assert isinstance(first, ev.RunStarted)
        return first

    def event(self, seq: int) -> ev.Event:
        """The event with this `seq`; one that fell out is answered with the run's first, which has no cause."""
        return self._by_seq.get(seq, self.log_events[0])


def _trimmed(event: ev.Event, known: set[str | None]) -> ev.Event:
    """A step without the items of requests that the window does not know."""
    if isinstance(event, ev.StepPlanned) and any(item.request not in known for item in event.items):
        import msgspec

        return msgspec.structs.replace(event, items=tuple(i for i in event.items if i.request in known))
    return event
