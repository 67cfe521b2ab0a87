"""The event log: bounded in memory, filtered by level, readable while it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import msgspec

from llmlab.clock import Clock
from llmlab.events.catalog import Event, TokensReleased
from llmlab.types import ConfigError

E = TypeVar("E", bound=Event)
# One event takes about 200-400 bytes in memory: the default ring stays below about 80 MB.
DEFAULT_CAPACITY = 200_000
TOKENS_PER_EVENT = 8  # so many tokens with their times take the memory of one event


class Sink(Protocol):
    """Where events go besides the ring, for example a trace file. Must not raise: a sink that cannot
    write any more says so once and drops what follows."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None: ...


class EventLog:
    """Events in order. Keeps the newest `capacity`; older ones are folded away by `on_drop` or lost. `started` is the very
    first one, whatever was dropped.

        dropped          ring (capacity)            next seq
        0 ... first_seq | first_seq ........ next-1 | next

    `emit` returns the event's `seq`, or `cause` when the level filters it out, so that chains of causes
    skip what was not recorded instead of breaking.
    """

    def __init__(self, clock: Clock, level: int = 2, capacity: int = DEFAULT_CAPACITY, instance: int = 0,
                 sinks: tuple[Sink, ...] = (), on_drop: Callable[[Event], None] | None = None) -> None:  # fmt: skip
        if not 0 <= level <= 4:
            raise ConfigError("log_level", level, "must be 0 to 4")
        if capacity < 1:
            raise ConfigError("log_capacity", capacity, "must be at least 1")
        self.level = level
        self.capacity = capacity
        self.step = -1
        self.num_emitted = 0
        self._now = clock.now
        self._instance = instance
        self._sinks = sinks
        self._writes = tuple(sink.write for sink in sinks)
        self._on_drop = on_drop
        self._events: deque[Event] = deque()
        self._extra = 0  # room that events of many tokens take beyond that of one event each
        self.started: Event | None = None

    # -------------------------------------------------------------------------------- writing
    def emit(self, kind: type[Event], request: str | None = None, cause: int = -1, **fields: Any) -> int:
        """Record an event of `kind` unless its level is filtered out."""
        if self.level < kind.LEVEL:
            return cause
        seq = self.num_emitted
        self.append(kind(seq=seq, t=self._now(), step=self.step, instance=self._instance, request=request, cause=cause,
                         **fields))  # fmt: skip
        return seq

    def emit_tokens(self, request: str, cause: int, token_ids: tuple[int, ...], times: tuple[float, ...] = ()) -> int:
        """`emit(TokensReleased, ...)` at half its cost: the one event that each request leaves in each step."""
        if self.level < TokensReleased.LEVEL:
            return cause
        seq = self.num_emitted
        self._extra += len(times) // TOKENS_PER_EVENT
        self.append(TokensReleased(seq=seq, t=self._now(), step=self.step, instance=self._instance, request=request,
                                   cause=cause, token_ids=token_ids, times=times))  # fmt: skip
        return seq

    def wants(self, kind: type[Event]) -> bool:
        """Whether it is worth gathering what this kind of event would say."""
        return self.level >= kind.LEVEL

    def append(self, event: Event) -> None:
        """Record a finished event; its `seq` must be `num_emitted`."""
        self.num_emitted += 1
        events = self._events
        events.append(event)
        for write in self._writes:
            write(event)
        if not event.seq:
            self.started = event
        while len(events) + self._extra > self.capacity and len(events) > 1:
            dropped = events.popleft()
            if type(dropped) is TokensReleased:
                self._extra -= len(dropped.times) // TOKENS_PER_EVENT
            if self._on_drop is not None:
                self._on_drop(dropped)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    # -------------------------------------------------------------------------------- reading
    @property
    def first_seq(self) -> int:
        """`seq` of the oldest event still in the ring (= number of events dropped)."""
        return self.num_emitted - len(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(tuple(self._events))

    def __getitem__(self, seq: int) -> Event:
        """The event with this `seq`. Raises KeyError if it was dropped or does not exist yet."""
        if not self.first_seq <= seq < self.num_emitted:
            raise KeyError(f"event {seq} is not in the ring [{self.first_seq}, {self.num_emitted})")
        return self._events[seq - self.first_seq]

    def since(self, seq: int) -> list[Event]:
        """Events with `seq` or later that are still in the ring."""
        skip = max(0, seq - self.first_seq)
        events = list(self._events)
        return events[skip:]

    def filter(self, *kinds: type[E] | str, request: str | None = None, step: int | None = None) -> list[Any]:
        """Events of the given kinds (classes or names; none = all), of one request, of one step."""
        names = {kind if isinstance(kind, str) else kind.__name__ for kind in kinds}
        return [
            event
            for event in self._events
            if (not names or type(event).__name__ in names)
            and (request is None or event.request == request)
            and (step is None or event.step == step)
        ]

    def cursor(self, seq: int | None = None) -> Cursor:
        """A reader that starts at `seq` (default: with what comes next)."""
        return Cursor(self, self.num_emitted if seq is None else seq)

    def to_rows(self) -> list[dict[str, Any]]:
        """Plain dicts, one an event, ready for a table or a chart."""
        return [{"event": type(event).__name__, **msgspec.to_builtins(event)} for event in self._events]

    def to_dataframe(self) -> Any:
        """A pandas DataFrame. Raises ConfigError if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise ConfigError("to_dataframe", "pandas", "is not installed",
                              "Run `pip install pandas`, or use log.to_rows().") from None  # fmt: skip
        return pandas.DataFrame(self.to_rows())


class Cursor:
    """A place in a log. `read` returns what is new; `lost` counts events that fell out unread."""

    def __init__(self, log: EventLog, seq: int) -> None:
        self._log = log
        self.seq = seq
        self.lost = 0

    def read(self) -> list[Event]:
        self.lost += max(0, self._log.first_seq - self.seq)
        new = self._log.since(self.seq)
        self.seq = self._log.num_emitted
        return new
