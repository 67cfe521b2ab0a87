"""The event log: a bounded ring with levels, cursors and sinks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.clock import RealClock, VirtualClock
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.state import LabState
from llmlab.types import ConfigError


def tokens(log: EventLog, count: int) -> None:
    for i in range(count):
        log.emit(ev.TokensReleased, f"r{i % 3}", cause=i - 1, token_ids=(i,))


def test_events_carry_the_header_of_their_moment() -> None:
    clock = VirtualClock()
    log = EventLog(clock, 2, instance=4)
    log.step = 7
    clock.advance_to(1.5)
    seq = log.emit(ev.TokensReleased, "r1", cause=-1, token_ids=(9,))
    event = log[seq]
    assert (event.seq, event.t, event.step, event.instance, event.request, event.cause) == (0, 1.5, 7, 4, "r1", -1)
    with pytest.raises(AttributeError):
        event.t = 2.0


@pytest.mark.parametrize("level", range(5))
def test_the_short_way_leaves_the_same_event(level: int) -> None:
    logs = [EventLog(VirtualClock(3.0), level, instance=1) for _ in range(2)]
    for log in logs:
        log.step = 4
    a = logs[0].emit(ev.TokensReleased, "r1", 8, token_ids=(1, 2))
    b = logs[1].emit_tokens("r1", 8, (1, 2))
    assert a == b and list(logs[0]) == list(logs[1])


@pytest.mark.parametrize("level", range(5))
def test_a_level_filters_and_causes_skip_what_is_not_recorded(level: int) -> None:
    log = EventLog(VirtualClock(), level)
    cause = log.emit(ev.FirstToken, "r0")
    for kind, fields in ((ev.TokensReleased, {"token_ids": (1,)}), (ev.KVDropped, {"num_tokens": 1}),
                         (ev.BlockCached, {"block_id": 1, "hash": "00"}), (ev.Idle, {"resource": "gpu", "start": 0.0, "end": 1.0})):  # fmt: skip
        assert log.wants(kind) == (level >= kind.LEVEL)
        cause = log.emit(kind, "r0", cause, **fields)
    assert [type(e).LEVEL for e in log] == list(range(level + 1))
    assert [e.cause for e in log] == list(range(-1, level)) and cause == level


def test_every_kind_of_event_has_a_level_and_is_known_by_name() -> None:
    assert all(0 <= kind.LEVEL <= 4 for kind in ev.EVENT_TYPES.values())
    assert set(ev.EVENT_TYPES) == {k.__name__ for k in ev.Event.__subclasses__()}


@given(count=st.integers(0, 60), capacity=st.integers(1, 20))
def test_the_ring_keeps_the_newest_and_hands_over_what_it_drops(count: int, capacity: int) -> None:
    dropped: list[ev.Event] = []
    log = EventLog(VirtualClock(), 2, capacity, on_drop=dropped.append)
    tokens(log, count)
    assert len(log) == min(count, capacity) and log.num_emitted == count
    assert log.first_seq == max(0, count - capacity) == len(dropped)
    assert [e.seq for e in dropped] + [e.seq for e in log] == list(range(count))
    for seq in (-1, log.first_seq - 1, count):
        with pytest.raises(KeyError):
            log[seq]
    for event in log:
        assert log[event.seq] is event
    assert [e.seq for e in log.since(count - 2)] == [e.seq for e in list(log)[-2:]]


@given(chunks=st.lists(st.integers(0, 15), max_size=8), capacity=st.integers(1, 20))
def test_a_cursor_reads_every_event_once_and_counts_what_it_missed(chunks: list[int], capacity: int) -> None:
    log = EventLog(VirtualClock(), 2, capacity)
    cursor, seen = log.cursor(0), []
    late = log.cursor()
    for chunk in chunks:
        tokens(log, chunk)
        seen += [e.seq for e in cursor.read()]
    assert len(seen) + cursor.lost == sum(chunks) and seen == sorted(set(seen))
    assert cursor.read() == [] and len(late.read()) == min(capacity, sum(chunks))


def test_filters_by_kind_request_and_step() -> None:
    log = EventLog(VirtualClock(), 2)
    for step in range(3):
        log.step = step
        tokens(log, 3)
    log.emit(ev.FirstToken, "r1")
    assert len(log.filter(ev.TokensReleased)) == 9 == len(log.filter("TokensReleased"))
    assert len(log.filter(request="r1")) == 4 and len(log.filter(step=2)) == 4
    assert len(log.filter(ev.FirstToken, "TokensReleased", request="r1", step=2)) == 2
    assert log.filter() == list(log)


def test_sinks_see_every_event_in_order_even_if_the_ring_is_small() -> None:
    class Sink:
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.closed = 0

        def write(self, event: ev.Event) -> None:
            self.seen.append(event.seq)

        def close(self) -> None:
            self.closed += 1

    sinks = (Sink(), Sink())
    log = EventLog(VirtualClock(), 2, capacity=3, sinks=sinks)
    tokens(log, 10)
    log.close()
    assert [s.seen for s in sinks] == [list(range(10))] * 2 and [s.closed for s in sinks] == [1, 1]


@pytest.mark.parametrize("fields", [{"level": 5}, {"level": -1}, {"capacity": 0}])
def test_a_log_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="log_"):
        EventLog(VirtualClock(), **fields)


def test_rows_are_plain_and_tables_need_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(VirtualClock(), 2)
    tokens(log, 2)
    row = log.to_rows()[1]
    assert (row["event"], row["seq"], list(row["token_ids"])) == ("TokensReleased", 1, [1])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pandas"):
        log.to_dataframe()


def test_a_default_ring_stays_below_its_promised_size() -> None:
    """About 80 MB for 200,000 events: at most 400 bytes each, with what only they hold."""
    log = EventLog(VirtualClock(), 2)
    tokens(log, 1000)
    sizes = [sys.getsizeof(e) + sys.getsizeof(e.token_ids) + sys.getsizeof(e.t) + 2 * sys.getsizeof(e.seq) for e in log]  # type: ignore[attr-defined]
    assert max(sizes) <= 400


def test_clocks_never_go_back() -> None:
    virtual = VirtualClock(2.0)
    virtual.advance_to(1.0)
    assert virtual.now() == 2.0
    virtual.advance_to(3.5)
    assert virtual.now() == 3.5
    real = RealClock()
    began = real.now()
    real.advance_to(began + 0.002)
    assert real.now() >= began + 0.002
    real.advance_to(0.0)


def test_folding_nothing_is_an_empty_state() -> None:
    state = LabState()
    assert (state.state_hash, state.blocks_hash, state.running, state.waiting, state.block_refs) == (0, 0, [], [], {})
