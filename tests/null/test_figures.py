"""The figures beside the report's: what they draw is conserved, what their titles say is computed, a fork call works."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ui import simulate, words

import llmlab
from llmlab.events import catalog as ev
from llmlab.types import ConfigError, TraceError
from llmlab.ui import figures, theme
from llmlab.ui.experts import expert_traffic
from llmlab.ui.inspector import card_finding, choices
from llmlab.ui.resources import Work, busy, hidden, merge_work, work_of
from llmlab.ui.speculation import verifications
from llmlab.ui.tradeoffs import frontier_points, roofline_dots
from roofline import hardware


def with_events(run: llmlab.Run, extra: list[Any]) -> llmlab.Run:
    """The run, with events that it did not log."""
    first = len(run.log_events)
    return llmlab.Run([*run.log_events, *(msgspec.structs.replace(e, seq=first + i) for i, e in enumerate(extra))])


def drafted(run: llmlab.Run) -> llmlab.Run:
    rng, t = random.Random(0), run.log_events[-1].t
    return with_events(run, [ev.Verified(seq=0, t=t, request=f"r{i % 4}", accepted=tuple(range(n)), rejected=tuple(range(5 - n)), bonus=1)
                             for i, n in enumerate(rng.randrange(6) for _ in range(60))])  # fmt: skip


def spans(run: llmlab.Run) -> llmlab.Run:
    """Hand-made spans: copies under and beside the device's work, attention on the CPU, and the gap that it leaves."""
    def span(resource: str, start: float, end: float, op: str) -> ev.Span:
        return ev.Span(seq=0, t=9.0, step=1, resource=resource, start=start, end=end, op=op)

    return with_events(run, [span("device", 0.0, 1.0, "layer 0"), span("device", 1.0, 2.0, "layer 1"), span("d2h", 0.5, 1.0, "q k v"),
                             span("cpu", 1.0, 2.5, "attention"), ev.JoinWait(seq=0, t=9.0, step=1, start=2.0, end=3.0, op="attention"),
                             span("device", 3.0, 4.0, "layer 2")])  # fmt: skip


@pytest.fixture(scope="module")
def run() -> llmlab.Run:
    return simulate(20, rate=1e9)


def charts(run: llmlab.Run) -> dict[str, Any]:
    victim = next(e.seq for e in run.events("Decision") if e.seam == "victim")
    moved = [ev.ExpertFetched(seq=0, t=1.0, layer=i % 3, expert=i % 5, bytes=1000, reason="demand") for i in range(30)]
    return {
        "gantt": lambda: figures.resource_gantt(spans(run)), "gantt of a run": lambda: figures.resource_gantt(simulate(log_level=4, tiering="swap")),
        "speculation": lambda: figures.speculation_strip(drafted(run)), "experts": lambda: figures.expert_heat_map(with_events(run, moved)),
        "frontier": lambda: figures.frontier({b: simulate(max_num_batched_tokens=b) for b in (32, 64, 128)}, "budget"),
        "roofline": lambda: figures.roofline_steps(run), "inspector": lambda: figures.event_inspector(run),
        "card": lambda: figures.decision_card(run, victim),
    }  # fmt: skip


NAMES = ("gantt", "gantt of a run", "speculation", "experts", "frontier", "roofline", "inspector", "card")


def plain(spec: Any) -> Any:
    """Without the numbers that altair gives to views."""
    return json.loads(re.sub(r"view\w+", "view", json.dumps(spec)))


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_validates_names_its_setting_and_recolours(name: str, run: llmlab.Run) -> None:
    draw = charts(run)[name]
    with theme.enable("light"):
        light = draw().to_dict(validate=True)
    with theme.enable("dark"):
        dark = draw().to_dict(validate=True)
    assert all(word in words(light) for word in ("Simulated on t4", "lab-s", "seed 0", "request"))
    assert plain(theme.recoloured(light, "light", "dark")) == plain(dark)
    assert len(json.dumps(light)) < 600_000


@pytest.mark.parametrize("name", ["resource_gantt", "speculation_strip", "expert_heat_map", "roofline_steps", "event_inspector"])
@pytest.mark.parametrize("kind", [{"log_level": 0}, {"log_level": 1}, {"n": 0}])
def test_what_was_not_recorded_is_a_sentence(name: str, kind: dict[str, int]) -> None:
    if name == "event_inspector" and kind.get("log_level") == 1:
        pytest.skip("it has steps and sentences")
    spec = getattr(figures, name)(simulate(**kind)).to_dict()
    assert spec["usermeta"]["sentence"].endswith(".")


# ------------------------------------------------------------------------------------- resources
works = st.lists(st.tuples(st.sampled_from(["device", "cpu", "h2d"]), st.integers(0, 60), st.integers(1, 12)), max_size=30).map(
    lambda rows: sorted((Work(r, s, s + n, "decode", ("x",), None) for r, s, n in rows), key=lambda w: (w.start, w.end)))  # fmt: skip


@given(works)
def test_overlap_is_the_time_that_both_were_busy(work: list[Work]) -> None:
    ticks = {name: {t for w in work if w.resource == name for t in range(int(w.start), int(w.end))} for name in ("device", "cpu", "h2d")}
    assert busy(work, "cpu") == len(ticks["cpu"])
    assert hidden(work, ["cpu"]) == len(ticks["cpu"] & ticks["device"])
    assert hidden(work, ["cpu", "h2d"]) == len((ticks["cpu"] | ticks["h2d"]) & ticks["device"])


@given(works, st.integers(0, 5))
def test_merged_work_covers_the_same_time_with_fewer_bars(work: list[Work], apart: int) -> None:
    merged = merge_work(work, apart)
    assert len(merged) <= len(work) and sum(len(w.ops) for w in merged) == len(work)
    for name in ("device", "cpu", "h2d"):
        own = [w for w in merged if w.resource == name]
        assert all(b.start - a.end >= apart for a, b in pairwise(own))
        assert busy(merged, name) >= busy(work, name)
        if apart == 0:
            assert busy(merged, name) == busy(work, name)


def test_the_gantt_says_what_hides_and_why_the_device_idles(run: llmlab.Run) -> None:
    chart = figures.resource_gantt(spans(run))
    text = words(chart.to_dict())
    assert "75% of what the CPU and link do hides" in text and "busy 75% of the time" in text  # 1.5 of 2 s, 3 of 4 s
    assert "waits for attention of the host" in json.dumps(chart.to_dict())
    measured = simulate(log_level=4, tiering="swap", num_host_blocks=64, rate=1e9)
    assert {w.resource for w in work_of(measured)} >= {"device", "h2d", "d2h"}


# ----------------------------------------------------------------------------------- speculation
def test_speculation_counts_tokens(run: llmlab.Run) -> None:
    found = verifications(drafted(run))
    mean = sum(v.accepted + 1 for v in found) / 60
    assert f"{mean:.2f} tokens a verification" in words(figures.speculation_strip(drafted(run)).to_dict())
    drawn = [row for rows in figures.speculation_strip(drafted(run), ["r1"]).to_dict()["datasets"].values() for row in rows]
    cells = [row for row in drawn if "kind" in row]
    own = [v for v in found if v.request == "r1"]
    assert sum(c["kind"] == "accepted" for c in cells) == sum(v.accepted for v in own)
    assert len(cells) == sum(v.accepted + v.rejected + v.bonus for v in own)
    assert len(drawn) - len(cells) == 3 * sum(c["kind"] == "rejected" for c in cells)  # hatched


def test_expert_traffic_is_counted_by_layer_and_expert(run: llmlab.Run) -> None:
    def came(layer: int, expert: int, reason: str) -> ev.ExpertFetched:
        return ev.ExpertFetched(seq=0, t=1.0, layer=layer, expert=expert, bytes=10, reason=reason)

    extra = [came(1, 2, "initial"), came(1, 2, "demand"), ev.ExpertEvicted(seq=0, t=1.0, layer=1, expert=2, unused=True),
             came(1, 2, "prefetch"), came(0, 3, "demand"), came(2, 2, "initial")]  # fmt: skip
    assert [tuple(t) for t in expert_traffic(with_events(run, extra))] == [(0, 3, 1, 0, 0, 0, 10), (1, 2, 1, 1, 1, 1, 20)]
    text = words(figures.expert_heat_map(with_events(run, extra)).to_dict())
    assert "3 fetches" in text and "67% of them on demand" in text and "1 expert left unused" in text


# ------------------------------------------------------------------------------------- tradeoffs
def test_a_point_is_on_the_frontier_unless_another_is_as_good_in_both() -> None:
    runs = {b: simulate(20, rate=1e9, max_num_batched_tokens=b) for b in (16, 32, 64, 128)}
    points = frontier_points(runs, "p99_itl", "p90_ttft")
    for p, (budget, one) in zip(points, runs.items()):
        assert (p.label, p.x, p.y) == (str(budget), one.metrics.itl.p99, one.metrics.ttft.p90)
        better = [q for q in points if q is not p and q.x <= p.x and q.y <= p.y and (q.x, q.y) != (p.x, p.y)]
        assert p.on_frontier == (not better)
    assert any(p.on_frontier for p in points)
    for wrong in ("ttft", "p95_ttft", "p90_speed"):
        with pytest.raises(ConfigError, match="p90_ttft"):
            figures.frontier(runs, x=wrong)
    with pytest.raises(ConfigError, match="at least one run"):
        figures.frontier({})


def test_no_simulated_step_is_above_the_roof(run: llmlab.Run) -> None:
    device, dots = hardware.get("t4"), roofline_dots(run)
    assert len(dots) == len(run.steps)
    assert all(d.rate <= 1.001 * min(max(device.peak.values()), d.intensity * device.bandwidth) for d in dots)
    ridge = device.peak["fp16"] / device.bandwidth
    share = sum(d.seconds for d in dots if d.intensity < ridge) / sum(d.seconds for d in dots)
    assert f"memory limits {figures_percent(share)} of their time" in words(figures.roofline_steps(run).to_dict())


def figures_percent(share: float) -> str:
    from llmlab.ui.chart import percent

    return percent(share)


# ------------------------------------------------------------------------------------- decisions
def test_a_card_shows_every_option_with_its_cost(run: llmlab.Run) -> None:
    for decision in (e for e in run.events("Decision") if e.seam in ("victim", "tiering")):
        options = choices(run, decision)
        assert [o.option for o in options] == [decision.chosen, *(a.option for a in decision.alternatives)]
        spec = figures.decision_card(run, decision.seq).to_dict()
        assert card_finding(run, decision) in words(spec)
        rows = [row for rows in spec["datasets"].values() for row in rows]
        assert {r["option"] for r in rows} == {o.option[:60] for o in options}
    with pytest.raises(TraceError, match="not a Decision"):
        figures.decision_card(run, 0)


def called(run: llmlab.Run, code: str) -> llmlab.Run:
    scope: dict[str, Any] = {"run": run}
    first, second = code.splitlines()
    exec(first, scope)
    forked = eval(second, scope)
    assert isinstance(forked, llmlab.Run)
    return forked


def test_the_printed_fork_takes_the_other_victim_and_only_that(run: llmlab.Run) -> None:
    decisions = [e for e in run.events("Decision") if e.seam == "victim" and e.alternatives]
    decision = next(e for e, before in zip(decisions[1:], decisions) if before.step < e.step)
    other = decision.alternatives[0].option
    forked = called(run, figures.fork_call(run, decision.seq, other))
    assert forked.log_events[1 : decision.seq] == run.log_events[1 : decision.seq], "the same history up to the decision"
    taken = [e for e in forked.events("Decision", step=decision.step) if e.seam == "victim"]
    assert taken[0].chosen == other and taken[0].seq == decision.seq
    later = [e.policy for e in forked.events("Decision") if e.seam == "victim" and e.step > decision.step]
    assert forked.metrics.num_finished == run.metrics.num_finished and all(p == f"{other} instead" for p in later)


def test_the_printed_fork_swaps_where_the_run_dropped() -> None:
    run = simulate(20, rate=1e9, num_host_blocks=64)
    decision = next(e for e in run.events("Decision") if e.seam == "tiering")
    forked = called(run, figures.fork_call(run, decision.seq, "swap"))
    modes = [e.mode for e in forked.events("RequestPreempted")]
    assert modes[0] == "swap" and run.events("RequestPreempted")[0].mode == "recompute"
    assert set(modes[1:]) <= {"recompute"}


def test_a_fork_that_cannot_be_forced_is_refused_with_the_way_out(run: llmlab.Run) -> None:
    seqs = {e.seam: e.seq for e in run.events("Decision")}
    with pytest.raises(TraceError, match="under another policy"):
        figures.fork_call(run, seqs["composer"], "decodes alone")
    with pytest.raises(TraceError, match="is not an alternative"):
        figures.fork_call(run, seqs["victim"], "nobody")


def test_the_inspector_carries_the_sentences_and_filters_by_the_field_of_the_brush(run: llmlab.Run) -> None:
    spec = figures.event_inspector(run).to_dict()
    text = json.dumps(spec)
    assert re.search(r'"param": "window"', text)
    victims = [e for e in run.events("Decision") if e.seam == "victim"]
    rows = [row for rows in spec["datasets"].values() for row in rows]
    assert sum(r.get("kind") == "victim" for r in rows) == len(victims)
    assert all("t0" in row for row in rows), "a brush filters by the field that it was drawn on"

def test_charts_of_the_roofline_find_their_styles_in_the_themes_of_the_lab() -> None:
    from llmlab.ui import theme
    from roofline import charts

    for name, dark in (("light", False), ("dark", True)):
        assert set(charts.theme_config(dark)["style"]) <= set(theme.config(name)["style"])
