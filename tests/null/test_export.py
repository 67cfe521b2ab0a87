"""Timelines of a run: spans cover each request's life exactly, and the Perfetto file obeys the format."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.events.export import (
    _step_ends,
    merge_spans,
    output_tokens,
    perfetto_trace,
    request_spans,
    step_slices,
    write_perfetto,
)
from llmlab.types import SamplingParams, TraceError


def simulate(n: int = 12, rate: float = 3000.0, seed: int = 3, aborts: tuple[int, ...] = (), samples: int = 1, **config):
    """A simulated run of `n` requests that crowd a pool of 20 blocks, so that some are preempted; those in `aborts` are
    aborted, one after every fifth step."""
    fields = {"num_blocks": 20, "max_num_batched_tokens": 64, "log_level": 3, **config}
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", **fields)
    rng, t = random.Random(seed), 0.0
    for _ in range(n):
        t += rng.expovariate(rate)
        prompt = [rng.randrange(5, 200) for _ in range(rng.randrange(8, 120))]
        params = SamplingParams(max_tokens=40, n=samples)
        engine.add_request(prompt, params, metadata={"output_len": rng.randrange(1, 40)}, arrival=t)
    left, steps = list(aborts), 0
    while engine.has_unfinished_requests():
        if left and steps % 5 == 0:
            engine.abort(f"r{left.pop(0) % max(1, n)}")
        engine.step()
        steps += 1
    return llmlab.Run.of(engine.log)


runs = st.builds(
    simulate, n=st.integers(0, 14), rate=st.sampled_from([200.0, 3000.0, 1e9]), seed=st.integers(0, 999),
    aborts=st.lists(st.integers(0, 13), max_size=3).map(tuple), samples=st.sampled_from([1, 1, 2]),
    tiering=st.sampled_from(["recompute", "swap"]), overlap_depth=st.integers(0, 2), log_level=st.integers(0, 4),
)  # fmt: skip


@given(runs)
@settings(max_examples=40, deadline=None)
def test_spans_cover_each_life_without_gap_or_overlap(run):
    spans, end = request_spans(run), run.log_events[-1].t
    assert set(spans) == set(run.requests)
    for name, own in spans.items():
        request = run.requests[name]
        finish = end if request.finished is None else request.finished
        assert all(s.start < s.end for s in own)
        assert all(a.end == b.start for a, b in pairwise(own))
        if request.arrival < finish:
            assert own[0].start == request.arrival and own[-1].end == finish
        else:
            assert not own  # aborted before it arrived


@given(runs)
@settings(max_examples=25, deadline=None)
def test_merging_conserves_time_tokens_and_order(run):
    for own in request_spans(run).values():
        merged = merge_spans(own)
        assert all(a.kind != b.kind for a, b in pairwise(merged))
        assert sum(s.steps for s in merged) == sum(s.steps for s in own)
        for kind in ("waiting", "prefill", "decode"):
            before, after = ([s for s in spans if s.kind == kind] for spans in (own, merged))
            assert sum(s.seconds for s in after) == pytest.approx(sum(s.seconds for s in before))
            assert sum(s.tokens or 0 for s in after) == sum(s.tokens or 0 for s in before)


def test_merging_keeps_spans_of_different_requests_apart():
    spans = request_spans(simulate())
    every = [span for own in spans.values() for span in own]
    assert {s.request for s in merge_spans(every)} == set(spans)
    assert merge_spans([]) == []


def test_merging_does_not_bridge_a_gap():
    work = [s for own in request_spans(simulate(tiering="swap")).values() for s in own if s.kind != "waiting"]
    assert sum(s.seconds for s in merge_spans(work)) == pytest.approx(sum(s.seconds for s in work))


@pytest.mark.parametrize("config", [{}, {"tiering": "swap"}, {"overlap_depth": 1}])
def test_every_computed_token_is_in_exactly_one_span(config):
    run = simulate(**config)
    assert run.metrics.num_preemptions > 0
    told: Counter[str] = Counter()
    for name, own in request_spans(run).items():
        told[name] += sum(s.tokens or 0 for s in own)
    computed: Counter[str] = Counter()
    for step in run.steps:
        for item in step.items:
            computed[item.request] += item.num_tokens
    for piece in step_slices(run):  # an overlapped step may still compute a token of a request that has just ended
        computed.subtract({name: n for name, n in piece.tokens.items() if run.requests[name].finished <= piece.start})
    assert told == computed


def test_each_output_token_but_the_first_is_a_decode_step_unless_recomputed():
    run = simulate(num_blocks=200)
    assert run.metrics.num_preemptions == 0
    for name, own in request_spans(run).items():
        assert sum(s.steps for s in own if s.kind == "decode") == run.requests[name].num_output_tokens - 1


def test_after_a_recompute_comes_prefill_after_a_swap_decode():
    for tiering, back in (("recompute", "prefill"), ("swap", "decode")):
        run = simulate(tiering=tiering)
        preempted = [e for e in run.events("RequestPreempted") if any(
            f.t < e.t for f in run.events("FirstToken", request=e.request))]
        assert preempted
        for event in preempted:
            later = [s for s in request_spans(run)[event.request] if s.start >= event.t and s.kind != "waiting"]
            assert later[0].kind == back


def test_level_one_tells_the_same_story_as_level_two():
    """Without StepPlanned a step's beginning is its end less its measured time: in a simulated run the same instant."""
    one, two = (request_spans(simulate(log_level=level)) for level in (1, 2))
    assert list(one) == list(two)
    for name in one:
        assert [s.kind for s in one[name]] == [s.kind for s in two[name]]
        assert [s.end for s in one[name]] == pytest.approx([s.end for s in two[name]])
        assert all(s.tokens is None for s in one[name] if s.kind != "waiting")


def test_level_zero_knows_only_first_tokens():
    run = simulate(log_level=0)
    full = simulate(log_level=2)
    assert step_slices(run) == []
    for name, own in request_spans(run).items():
        assert [s.kind for s in own][:1] == ["waiting"] and own[0].end == full.requests[name].first_token
    assert output_tokens(run) == output_tokens(full) == {n: r.num_output_tokens for n, r in full.requests.items()}


@given(runs)
@settings(max_examples=25, deadline=None)
def test_step_slices_are_disjoint_and_add_up(run):
    slices = step_slices(run)
    assert all(s.start <= s.end for s in slices)
    assert all(a.end <= b.start for a, b in pairwise(slices))
    assert len(slices) == run.metrics.num_steps
    for piece in slices:
        if piece.tokens is not None:
            assert piece.prefill_tokens + piece.decode_tokens == sum(piece.tokens.values()) == piece.num_tokens


# ---------------------------------------------------------------------------------------- Perfetto
def by_track(trace):
    tracks: dict[tuple[int, int], list[dict]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append(event)
    return tracks


@given(runs)
@settings(max_examples=25, deadline=None)
def test_trace_has_integer_times_and_nested_slices(run):
    trace = json.loads(json.dumps(perfetto_trace(run)))
    for event in trace["traceEvents"]:
        assert isinstance(event.get("ts", 0), int) and isinstance(event.get("dur", 0), int)
        assert event.get("dur", 0) >= 0 and event["ph"] in "XCiM"
        assert event["tid"] not in (1, 2, 3)  # a thread with its process's id would be moved to the top
    for events in by_track(trace).values():
        open_ends: list[int] = []
        for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            while open_ends and open_ends[-1] <= event["ts"]:
                open_ends.pop()
            end = event["ts"] + event["dur"]
            assert not open_ends or end <= open_ends[-1]
            open_ends.append(end)


def test_trace_tells_every_request_step_preemption_and_decision():
    run = simulate()
    trace = perfetto_trace(run)
    kinds = Counter((e["ph"], e["pid"]) for e in trace["traceEvents"])
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert [n for n in names if n not in ("steps", "decisions")] == [
        f"{r.request} ({r.num_prompt_tokens} -> {r.num_output_tokens})" for r in run.requests.values()
    ]
    assert kinds["X", 1] == len(run.steps)
    assert kinds["i", 2] == run.metrics.num_preemptions > 0
    assert kinds["i", 1] == len(run.events("Decision"))
    inner = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] in ("waiting", "prefill", "decode")]
    assert len(inner) == sum(len(merge_spans(own)) for own in request_spans(run).values())
    used = [e["args"]["value"] for e in trace["traceEvents"] if e["name"] == "kv_used"]
    assert max(used) == 20 and min(used) >= 0
    assert trace["otherData"]["mode"] == "simulated"


def resource_tracks(run):
    """Slices of each resource's track, in order of the screen, and the instants of all of them."""
    events = [e for e in perfetto_trace(run)["traceEvents"] if e["pid"] == 3]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = {names[tid]: [e for e in events if e["ph"] == "X" and e["tid"] == tid] for tid in sorted(names)}
    return tracks, [e for e in events if e["ph"] == "i"]


@pytest.mark.parametrize(("config", "resources"), [
    ({}, ["device"]), ({"tiering": "swap"}, ["device", "h2d", "d2h"]),
    ({"placement": "fastdecode", "host": "xeon-6130-2s"}, ["device", "cpu", "h2d", "d2h"]),
])  # fmt: skip
def test_a_level_four_trace_has_a_track_for_each_resource(config, resources):
    run = simulate(log_level=4, **config)
    tracks, instants = resource_tracks(run)
    assert [name for name in tracks if "(" not in name] == resources
    spans = run.events("Span")
    drawn = Counter((name.split(" (")[0], e["name"], e["ts"], e["dur"]) for name, own in tracks.items() for e in own)
    assert drawn == Counter((s.resource, s.op, us(s.start), us(s.end) - us(s.start)) for s in spans)
    assert len(instants) == len(run.events("Idle")) + len(run.events("JoinWait")) > 0
    for own in tracks.values():
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(own))


def us(seconds):
    return round(seconds * 1e6)


def test_what_runs_at_once_on_one_resource_stands_on_two_tracks():
    run = simulate(n=3, log_level=4)
    device = run.events("Span")[0]
    twice = llmlab.Run([*run.log_events, msgspec.structs.replace(device, seq=run.log_events[-1].seq + 1)])
    tracks, _ = resource_tracks(twice)
    assert list(tracks) == ["device", "device (2)"] and [e["name"] for e in tracks["device (2)"]] == [device.op]


@pytest.mark.parametrize("level", range(4))
def test_a_log_without_spans_has_no_resource_tracks(level):
    assert resource_tracks(simulate(n=3, log_level=level)) == ({}, [])


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize("n", [0, 3])
def test_files_at_every_level_also_without_requests(level, n, tmp_path):
    run = simulate(n=n, log_level=level)
    plain = run.to_perfetto(tmp_path / "trace.json")
    packed = write_perfetto(run, tmp_path / "trace.json.gz")
    assert json.loads(plain.read_bytes()) == json.loads(gzip.decompress(packed.read_bytes()))
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TraceError, match="nowhere"):
        write_perfetto(simulate(n=1), tmp_path / "nowhere" / "trace.json")


@pytest.mark.parametrize("seed", range(6))
def test_leaps_of_a_simulation_are_drawn_as_the_steps_that_level_two_records(seed: int) -> None:
    """Below level 2 a simulation logs leaps: as many steps and tokens, and the same requests decode at the same times."""
    def lives(level: int) -> tuple[dict[str, list[tuple[float, float]]], int, int, float]:
        config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="a100", log_level=level, num_blocks=300)
        load = llmlab.Workload.poisson(rate=3, n=12, prompt="lognormal:300,1.0", output="lognormal:100,0.8", seed=seed)
        run = llmlab.run(config, load)
        assert bool(run.events("Leapt")) == (level < 2)
        slices, spans = step_slices(run), {name: merge_spans(own) for name, own in request_spans(run).items()}
        assert all(a.end <= b.start + 1e-12 and a.start < a.end for a, b in pairwise(slices))
        decodes = {name: [(s.start, s.end) for s in own if s.kind == "decode"] for name, own in spans.items()}
        waiting = sum(s.seconds for own in spans.values() for s in own if s.kind == "waiting")
        return decodes, len(slices), sum(s.num_tokens for s in slices), waiting

    (decodes, steps, tokens, waiting), (true_decodes, true_steps, true_tokens, true_waiting) = lives(1), lives(2)
    assert (steps, tokens) == (true_steps, true_tokens)
    assert list(decodes) == list(true_decodes)
    for name, true in true_decodes.items():
        assert [t for pair in decodes[name] for t in pair] == pytest.approx([t for pair in true for t in pair], abs=1e-6)
    assert waiting == pytest.approx(true_waiting, abs=0.1)


@given(st.lists(st.floats(0.0, 10.0), max_size=6), st.integers(1, 20))
def test_ends_of_steps_ascend_and_hold_what_is_known(known: list[float], num_steps: int) -> None:
    ends = _step_ends(0.0, 10.0, known, num_steps)
    inside = sorted({t for t in known if 0 < t < 10})
    assert len(ends) == num_steps and ends[-1] == 10.0 and all(a <= b for a, b in pairwise(ends))
    assert set(inside[: num_steps - 1]) <= set(ends)
