"""The engine behind the pages: knobs between steps, slow motion that leaves times measured, nobody watching, bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from llmlab.applab import live as module
from llmlab.applab.live import LIVE, LiveEngine

SMALL = msgspec.structs.replace(LIVE, model="lab-xs", kernels="torch", log_capacity=2000)


def eventually(what: Callable[[], bool], seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def live() -> Iterator[LiveEngine]:
    engine = LiveEngine(SMALL, rate=40.0, speed=1.0)
    assert engine.wait_until_ready(60), engine.state
    yield engine
    engine.close()


def test_it_runs_only_while_somebody_watches(live: LiveEngine) -> None:
    assert eventually(lambda: live.state == "standing still") and live.vitals.step == 0
    with live.watching(), live.watching():
        assert live.num_watchers == 2
        assert eventually(lambda: live.vitals.num_finished > 3), live.state
    assert eventually(lambda: live.state == "standing still")
    step, t = live.vitals.step, live.engine.clock.now() if live.engine else 0.0
    time.sleep(0.3)
    assert live.vitals.step == step and live.engine is not None
    assert live.engine.clock.now() - t < 1.3, "time in which it stands still does not count, but for the last nap"


def test_knobs_hold_from_the_next_step_on_and_wrong_ones_are_noted(live: LiveEngine) -> None:
    with live.watching():
        live.turn_to(ordering="sjf_oracle", max_num_batched_tokens=16, num_blocks=120)
        live.turn(ordering="nobody")
        assert eventually(lambda: live.vitals.num_blocks == 120 and bool(live.notes))
        assert live.settings()["ordering"] == "sjf_oracle" and "nobody" in live.notes[-1]
        seen = live.vitals.step
        assert eventually(lambda: live.vitals.step > seen + 20)
    run = live.window()
    assert run is not None and live.state in ("running", "standing still")
    assert max(step.num_tokens for step in run.steps if step.step > seen) <= 16


def test_drafts_come_and_go_while_it_runs(live: LiveEngine) -> None:
    assert live.drafts() is None
    with live.watching():
        for source in ("ngram", "lab-xs"):
            live.turn_to(speculation=source)
            assert eventually(lambda s=source: (d := live.drafts()) is not None and d.source == s and d.held > 0), live.notes
        live.turn_to(speculation=None)
        assert eventually(lambda: live.drafts() is None)
        seen = live.vitals.num_finished
        assert eventually(lambda: live.vitals.num_finished > seen), live.state
    assert not live.notes and live.engine is not None and live.engine.scheduler.problems() == []


def test_a_prompt_of_ones_own_and_a_long_one(live: LiveEngine) -> None:
    with live.watching():
        mine, long = live.send("<slow>12*34?"), live.drop_long_prompt()
        assert eventually(lambda: {mine, long} <= {n for n, one in live.letters.items() if one.finished})
    run = live.window()
    assert run is not None and run.requests[long].num_prompt_tokens > 600
    assert live.letters[mine].text and live.letters[mine].right is None
    assert mine in run.why(mine).headline


def test_a_prompt_that_is_too_long_is_refused_and_the_engine_goes_on(live: LiveEngine) -> None:
    with live.watching():
        name = live.send("9" * 9000)
        assert eventually(lambda: bool(live.notes))
        assert live.letters[name].finished and live.letters[name].text == live.notes[-1]
        seen = live.vitals.num_finished
        assert eventually(lambda: live.vitals.num_finished > seen)


def test_slow_motion_does_not_stretch_measured_times(live: LiveEngine) -> None:
    live.speed = 0.1
    with live.watching():
        assert eventually(lambda: live.vitals.step > 3)
        first, began = live.vitals.t, time.monotonic()
        time.sleep(1.0)
        share = (live.vitals.t - first) / (time.monotonic() - began)
    assert share < 0.4, f"the run's clock went at {share:.2f} of real time"


def test_what_it_remembers_is_bounded(live: LiveEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 10)
    live.rate = 300.0
    with live.watching():
        assert eventually(lambda: live.vitals.num_finished > 60)
    assert live.engine is not None and len(live.engine.log) <= 2000
    unfinished = sum(not one.finished for one in live.letters.values())
    assert len(live.letters) <= 10 + unfinished + 1
    assert len(live.engine.metrics.requests) <= len(live.letters) + 1


def test_a_model_that_is_not_there_is_said_and_the_thread_ends() -> None:
    engine = LiveEngine(msgspec.structs.replace(SMALL, model="lab-zz"))
    assert engine.wait_until_ready(30) and engine.state.startswith("stopped: ") and "lab-zz" in engine.state
    engine.close()
    assert "llmlab-live-engine" not in [t.name for t in threading.enumerate() if t is engine._thread]


def test_a_pump_ends_when_nobody_holds_it_any_more(live: LiveEngine) -> None:
    pytest.importorskip("anywidget", reason='anywidget is not installed: pip install "llmlab[apps]"')
    from llmlab.applab.timeline import LiveTimeline, Pump

    timeline = LiveTimeline(live)
    timeline.go_live()
    pump = Pump(live, timeline)
    assert eventually(lambda: live.num_watchers == 1 and live.vitals.step > 5)
    del pump
    assert eventually(lambda: live.num_watchers == 0)


def test_the_last_answer_about_a_request_knows_its_end(live: LiveEngine) -> None:
    pytest.importorskip("anywidget", reason='anywidget is not installed: pip install "llmlab[apps]"')
    from llmlab.applab.timeline import LiveTimeline

    timeline, sent = LiveTimeline(live), []
    timeline.go_live()
    timeline.send = sent.append
    name = live.ask("37*46")
    timeline.selected = name
    assert " ended (" not in timeline._answer(name)["headline"]
    with live.watching():
        assert eventually(lambda: name in live.letters and live.letters[name].finished)
    timeline.answer_again()
    assert len(sent) == 1 and " ended (" in sent[0]["headline"]
    timeline.answer_again()
    assert len(sent) == 1, "nothing is new"


def test_a_page_that_comes_late_is_told_what_was_turned_before(live: LiveEngine) -> None:
    with live.watching():
        live.turn(max_num_batched_tokens=48, num_blocks=100)
        assert eventually(lambda: live.engine is not None and live.engine.log.first_seq > 100)
    assert live.engine is not None
    first = live.engine.log[live.engine.log.first_seq]
    told = live.opening(first)
    assert [type(event).__name__ for event in told] == ["RunStarted", "Reconfigured"]
    assert told[1].changes == {"max_num_batched_tokens": 48, "num_blocks": 100}
    assert live.opening(live.started)[1:] == []
