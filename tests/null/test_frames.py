"""What the timeline widget is told: time is conserved, batches add up to the whole, sentences name their numbers."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ui import block_runs, simulate

import llmlab
from llmlab.events import catalog as ev
from llmlab.events.export import request_spans, step_slices
from llmlab.ui.frames import FINDABLE, FREE, KINDS, TICKS, Frames, frames, ticks

WORK = {"prefill": ("prefill", "recompute"), "decode": ("decode",)}


def spans_of(request: list[Any]) -> list[tuple[str, int, int, int, int]]:
    flat = request[-1]
    return [(KINDS[flat[i]], *flat[i + 1 : i + 5]) for i in range(0, len(flat), 5)]


def step_columns(batch: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(step, start, end) of each row, from the differences."""
    rows, step, end = [], 0, 0
    for ds, gap, length in zip(*(batch["steps"][k] for k in ("step", "start", "end"))):
        step, start = step + ds, end + gap
        end = start + length
        rows.append((step, start, end))
    return rows


# ----------------------------------------------------------------------------------------- spans
@settings(max_examples=25, deadline=None)
@given(block_runs)
def test_bars_cover_each_life_without_gaps_and_agree_with_the_spans_of_the_run(run):
    batch, spans = frames(run), request_spans(run)
    assert [r[1] for r in sorted(batch["requests"], key=lambda r: r[0])] == [e.spec.id for e in run.events("RequestArrived")]
    for request in batch["requests"]:
        bars, own = spans_of(request), spans[request[1]]
        assert all(a[2] == b[1] and a[0] != b[0] for a, b in pairwise(bars)), "bars touch and differ from their neighbours"
        assert all(start < end for _, start, end, _, _ in bars)
        if bars and request[5] >= 0:
            assert (bars[0][1], bars[-1][2]) == (request[2], request[5])
        for kind, names in WORK.items():
            told = sum(end - start for name, start, end, _, _ in bars if name in names)
            assert told == pytest.approx(sum(s.seconds for s in own if s.kind == kind) * TICKS, abs=2 * len(own) + 2)
            assert sum(t for name, _, _, _, t in bars if name in names) == sum(s.tokens or 0 for s in own if s.kind == kind)


def test_a_preempted_request_has_a_bar_of_its_own_until_it_is_back():
    run = simulate(20, rate=1e9)
    told = {r[1]: spans_of(r) for r in frames(run)["requests"]}
    preempted = run.events("RequestPreempted")
    assert preempted
    for event in preempted:
        back = next(e for e in run.events("RequestAdmitted", request=event.request) if e.seq > event.seq)
        bar = next(s for s in told[event.request] if s[0] == "preempted" and s[1] <= ticks(back.t) - 1 < s[2])
        assert bar[1] == pytest.approx(ticks(event.t), abs=1) and bar[2] == pytest.approx(ticks(back.t), abs=1)


def test_swapped_requests_are_told_apart():
    run = simulate(20, rate=1e9, tiering="swap", num_host_blocks=64)
    swaps = [e for e in run.events("RequestPreempted") if e.mode == "swap"]
    kinds = {s[0] for r in frames(run)["requests"] for s in spans_of(r)}
    assert swaps and "swapped" in kinds and "recompute" not in {s[0] for r in frames(run)["requests"] if r[1] == swaps[0].request for s in spans_of(r)}


# ----------------------------------------------------------------------------------------- steps
@settings(max_examples=15, deadline=None)
@given(block_runs)
def test_steps_are_those_of_the_run(run):
    rows = step_columns(frames(run))
    slices = step_slices(run)
    assert rows == [(s.step, ticks(s.start), ticks(s.end)) for s in slices]
    batch = frames(run)["steps"]
    assert [p + d for p, d in zip(batch["prefill"], batch["decode"])] == [s.num_tokens for s in slices]


# ------------------------------------------------------------------------------------------ wall
@settings(max_examples=15, deadline=None)
@given(block_runs)
def test_the_wall_shows_the_owners_at_each_planned_step(run):
    batch, wall, state = frames(run), {}, llmlab.events.state.LabState()
    changes = dict(batch["walls"])
    number = {r[1]: r[0] for r in batch["requests"]}
    plans = {e.plan: i for i, e in enumerate(run.events("StepFinished"))}
    for event in run.log_events:
        state.apply(event)
        row = plans.get(event.seq) if isinstance(event, ev.StepPlanned) else None
        if row is None:
            continue
        wall |= zip(changes.get(row, [])[::2], changes.get(row, [])[1::2])
        refs = state.block_refs
        for block in range(run.started.config["num_blocks"]):
            value, owners = wall.get(block, FREE), [r for r in state.requests.values() if block in r.block_ids]
            if block in refs:
                assert value // 2 in [number[r.id] for r in owners] and value % 2 == (refs[block] > 1)
            else:
                assert value == (FINDABLE if block in state.cached else FREE)


def test_below_the_block_level_the_wall_counts_and_says_so():
    walls = [frames(simulate(8, log_level=level))["meta"]["wall"] for level in range(4)]
    assert walls == ["none", "count", "holds", "blocks"]
    run = simulate(12, rate=1e9, log_level=2)
    held, batch = {}, frames(run)
    used = batch["steps"]["used"]
    for row, flat in batch["walls"]:
        held |= zip(flat[::2], flat[1::2])
        assert sum(held.values()) >= used[row] - 1, "computed tokens fill at least the blocks that are in use, but for shared ones"


@pytest.mark.parametrize("level", range(4))
def test_every_level_gives_a_batch_of_plain_json(level):
    batch = frames(simulate(6, log_level=level))
    assert json.loads(msgspec.json.encode(batch))["meta"]["level"] == level
    assert len(batch["requests"]) == 6 and all(spans_of(r) for r in batch["requests"])
    assert bool(batch["steps"]["step"]) == (level > 0)


# --------------------------------------------------------------------------------------- batches
class Page:
    """What the page makes of batches, in Python: the living definition of `Book` in timeline.js."""

    def __init__(self) -> None:
        self.number, self.base, self.note = 0, 0, 0
        self.requests: dict[int, list[Any]] = {}
        self.steps: list[tuple[int, ...]] = []
        self.walls: dict[int, list[int]] = {}
        self.notes: list[list[Any]] = []

    def add(self, batch: dict[str, Any]) -> None:
        if batch["whole"]:
            self.__init__()
            self.base, self.note = batch["row"], batch["note"]
        else:
            assert batch["number"] == self.number + 1
        self.number = batch["number"]
        self.steps += step_columns(batch)[self.base + len(self.steps) - batch["row"] :]
        self.walls |= dict(batch["walls"])
        fresh = batch["notes"][self.note - batch["note"] :]
        self.notes += fresh
        self.note += len(fresh)
        for index, *facts, first, flat in batch["requests"]:
            known = self.requests.get(index, [[]])[-1][: 5 * first]
            self.requests[index] = [index, *facts, 0, [*known, *flat]]

    def same_as(self, batch: dict[str, Any]) -> bool:
        requests = {r[0]: r for r in batch["requests"]}
        return (self.requests == requests and self.steps == step_columns(batch) and self.walls == dict(batch["walls"])
                and self.notes == batch["notes"])  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(block_runs, st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 5))
def test_batches_add_up_to_the_whole_also_after_a_late_hello(run, sizes, hello):
    fold, page, at, turn = Frames(), Page(), 0, 0
    while at < len(run.log_events):
        size = sizes[turn % len(sizes)]
        for event in run.log_events[at : at + size]:
            fold.write(event)
        at, turn = at + size, turn + 1
        if turn == hello:
            page.add(fold.all())  # a page was opened between two batches: nothing may be counted twice
        else:
            page.add(fold.take())
    page.add(fold.take())
    assert page.same_as(frames(run))


def test_a_live_fold_forgets_what_is_old_and_keeps_what_runs():
    run, fold = simulate(60, rate=500.0), Frames(keep=40)
    most = 0
    for event in run.log_events:
        fold.write(event)
        fold.take()
        most = max(most, len(fold.all()["steps"]["step"]))
    batch = fold.all()
    assert most <= 50 and len(batch["steps"]["step"]) <= 50 < run.metrics.num_steps
    assert step_columns(batch) == [(s.step, ticks(s.start), ticks(s.end)) for s in step_slices(run)][-len(batch["steps"]["step"]) :]
    assert 0 < len(batch["requests"]) < 60
    wall = dict(zip(batch["wall0"][::2], batch["wall0"][1::2]))
    for _, flat in batch["walls"]:
        wall |= zip(flat[::2], flat[1::2])
    whole: dict[int, int] = {}
    for _, flat in frames(run)["walls"]:
        whole |= zip(flat[::2], flat[1::2])
    assert wall == whole


def test_events_of_requests_that_fell_out_of_the_log_are_survived():
    run = simulate(20, rate=1e9)
    fold = Frames()
    for event in run.log_events[len(run.log_events) // 3 :]:
        fold.write(event)
    batch = fold.all()
    assert batch["meta"]["mode"] == "" and len(batch["steps"]["step"]) > 0


# --------------------------------------------------------------------------------------- sentences
def test_decisions_become_sentences_with_alternatives_and_predicted_cost():
    run = simulate(20, rate=1e9)
    notes = frames(run)["notes"]
    kinds = {note[2] for note in notes}
    assert {"admit", "finish", "preempt", "victim", "memory", "batch"} <= kinds
    victims = [n for n in notes if n[2] == "victim"]
    decisions = [e for e in run.events("Decision") if e.seam == "victim"]
    assert [n[7] for n in victims] == [e.seq for e in decisions]
    for note, event in zip(victims, decisions):
        assert [o[0] for o in note[6]] == [a.option for a in event.alternatives[:6]]
        assert [o[2] for o in note[6]] == [-1 if a.predicted is None else ticks(a.predicted.seconds) for a in event.alternatives[:6]]
    assert any(o[2] > 0 for n in victims for o in n[6]), "an alternative has a predicted cost"


def test_evictions_of_a_step_are_one_sentence():
    run = simulate(30, rate=1e9)
    evictions = [e for e in run.events("Decision") if e.seam == "eviction"]
    said = [n for n in frames(run)["notes"] if n[2] == "evict"]
    assert len(evictions) > len(said) > 0
    assert sum(int(n[4].split("gave away ")[1].split()[0]) for n in said) == len(evictions)


# ---------------------------------------------------------------------------------------- widget
def messages(widget: Any) -> list[Any]:
    """What a widget sends from now on."""
    sent: list[Any] = []
    widget.send = lambda content, buffers=None: sent.append(json.loads(msgspec.json.encode(content)))
    return sent


def test_the_widget_of_a_run_carries_its_batch_and_answers_why():
    timeline = pytest.importorskip("llmlab.ui.widget").Timeline
    run = simulate(20, rate=1e9)
    widget = timeline(run, theme="dark")
    batch = json.loads(gzip.decompress(widget._packed))
    assert batch["requests"] == json.loads(msgspec.json.encode(frames(run)["requests"]))
    assert widget.step == run.events("RequestPreempted")[0].step and widget.pull() == 0
    sent = messages(widget)
    widget._heard(widget, {"type": "why", "request": "r3"}, None)
    widget._heard(widget, {"type": "why", "request": "nobody"}, None)
    widget._heard(widget, "nonsense", None)
    assert len(sent) == 2 and sent[0]["headline"] == run.why("r3").headline.replace(" us ", " µs ")
    assert [s[3] - s[2] for s in sent[0]["stretches"]] == pytest.approx([s.seconds for s in run.why("r3").stretches])
    assert "is not in this run" in sent[1]["headline"]


def test_a_live_widget_sends_what_is_new_and_everything_to_a_page_that_says_hello():
    timeline = pytest.importorskip("llmlab.ui.widget").Timeline
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, log_level=3)
    widget, page = timeline.live(engine.log), Page()
    sent = messages(widget)
    for i in range(12):
        engine.add_request([5 + i] * 30, llmlab.SamplingParams(max_tokens=20))
    read = 0
    while engine.has_unfinished_requests():
        engine.step()
        read += widget.pull()
    widget._heard(widget, {"type": "hello"}, None)
    read += widget.pull()
    for message in sent:
        page.add(message["batch"])
    assert read == engine.log.num_emitted and widget.pull() == 0
    assert page.same_as(json.loads(msgspec.json.encode(frames(llmlab.Run.of(engine.log)))))
    widget._heard(widget, {"type": "why", "request": "r11"}, None)
    assert sent[-1]["headline"].startswith("r11 ended")
