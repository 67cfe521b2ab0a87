"""Figures and reports of a run: what they draw is conserved, what they say is computed, what is missing is said."""

from __future__ import annotations

import base64
import gzip
import html
import json
import random
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.events.export import merge_spans, request_spans, step_slices
from llmlab.events.state import LabState
from llmlab.types import ConfigError, SamplingParams, TraceError
from llmlab.ui import figures, report, theme
from llmlab.ui.blocks import block_rects, merge_rects, share_of_time, usage
from llmlab.ui.chart import log_ticks, percent, unit_for
from llmlab.ui.steps import binned

CHARTS = {
    "timeline": figures.request_timeline, "memory": figures.kv_block_map, "steps": figures.batch_composition,
    "ttft": figures.latency_ecdf, "tpot": lambda run: figures.latency_ecdf(run, "tpot", slo=0.001),
    "e2e": lambda run: figures.latency_ecdf(run, "e2e"), "predicted": figures.predicted_vs_measured,
    "race": lambda run: figures.policy_race(run, run),
}  # fmt: skip


def simulate(n: int = 12, seed: int = 3, rate: float = 3000.0, aborts: tuple[int, ...] = (), samples: int = 1, **config):
    """A simulated run that crowds a pool of 20 blocks, so that some requests are preempted."""
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


block_runs = st.builds(
    simulate, n=st.integers(0, 12), rate=st.sampled_from([300.0, 3000.0, 1e9]), seed=st.integers(0, 999),
    aborts=st.lists(st.integers(0, 11), max_size=2).map(tuple), samples=st.sampled_from([1, 2]),
    tiering=st.sampled_from(["recompute", "swap"]), overlap_depth=st.integers(0, 1),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- blocks
@given(block_runs)
@settings(max_examples=30, deadline=None)
def test_block_rectangles_conserve_block_seconds(run):
    """Against the reducer: the block tables of all requests, integrated over time."""
    state, owned, used = LabState(), 0.0, 0.0
    for event, following in pairwise(run.log_events):
        state.apply(event)
        lasts = following.t - event.t
        owned += lasts * sum(len(r.block_ids) for r in state.requests.values())
        used += lasts * len(state.block_refs)
    rects = block_rects(run)
    assert sum(r.block_seconds * len(r.owners) for r in rects) == pytest.approx(owned)
    assert sum(r.block_seconds for r in rects if r.owners) == pytest.approx(used)
    merged = merge_rects(rects)
    assert sum(r.block_seconds * len(r.owners) for r in merged) == pytest.approx(owned)
    assert len(merged) <= len(rects)


@given(block_runs)
@settings(max_examples=20, deadline=None)
def test_rectangles_of_a_block_are_disjoint_and_inside_the_pool(run):
    by_block: dict[int, list] = {}
    for rect in block_rects(run):
        assert 0 <= rect.first < rect.stop <= 20 and rect.start < rect.end
        by_block.setdefault(rect.first, []).append(rect)
    for rects in by_block.values():
        assert all(a.end <= b.start for a, b in pairwise(rects))


def test_usage_agrees_between_levels():
    full, two, one = (simulate(log_level=level) for level in (3, 2, 1))
    assert max(p.blocks for p in usage(full)) == max(p.blocks for p in usage(two)) == 20
    assert share_of_time(usage(full), 19) == pytest.approx(share_of_time(usage(two), 19), abs=1e-6)
    assert max(p.blocks for p in usage(one)) <= 20 and usage(simulate(log_level=0)) == []


def test_the_block_map_is_cut_around_the_fullest_moment_when_it_is_too_large():
    run = simulate(n=40, num_blocks=40)
    spec = figures.kv_block_map(run, max_rects=50).to_dict()
    marks = [row for rows in spec["datasets"].values() for row in rows if "owner" in row]
    assert 0 < len(marks) <= 50 and "around the fullest moment" in words(spec)
    fullest = max(usage(run), key=lambda p: p.blocks).t * 1e3
    assert min(r["t0"] for r in marks) <= fullest <= max(r["t1"] for r in marks)


# ---------------------------------------------------------------------------------------- charts
def words(spec) -> str:
    """Title and subtitle of a spec."""
    heading = spec["title"]
    parts = [heading.get("text", ""), heading.get("subtitle", "")]
    return " ".join(p if isinstance(p, str) else " ".join(p) for p in parts)


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("kind", [{}, {"tiering": "swap"}, {"n": 0}, {"aborts": (2, 5, 11)}])
def test_every_chart_validates_and_names_its_setting(level, kind):
    run = simulate(log_level=level, **kind)
    for chart in CHARTS.values():
        with theme.enable("light"):
            spec = chart(run).to_dict()
        assert "Simulated on t4, lab-s, seed 0" in words(spec)


@pytest.mark.parametrize("name", CHARTS)
def test_charts_render_and_the_dark_theme_is_the_recoloured_light_one(name):
    import vl_convert

    run = simulate()
    specs = {}
    for one in theme.ROLES:
        with theme.enable(one):
            specs[one] = CHARTS[name](run).to_dict()
    assert theme.recoloured(specs["light"], "light", "dark") == specs["dark"] != specs["light"]
    assert vl_convert.vegalite_to_png(specs["light"])[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["memory", "steps", "ttft", "tpot", "predicted"])
def test_a_missing_level_is_a_sentence_that_names_the_level(name):
    spec = CHARTS[name](simulate(log_level=0)).to_dict()
    assert re.search(r"log_level=[123]|Log level 0", spec["usermeta"]["sentence"])


def test_levels_between_say_what_they_do_not_hold():
    one = simulate(log_level=1)
    assert "log_level=3" in words(figures.kv_block_map(one).to_dict())
    assert "log_level=2" in words(figures.batch_composition(one).to_dict())
    assert "log_level=2" in figures.predicted_vs_measured(one).to_dict()["usermeta"]["sentence"]
    assert "log_level=1" in words(figures.request_timeline(simulate(log_level=0)).to_dict())


def test_titles_are_computed_from_the_run():
    run = simulate()
    spans = [s for own in request_spans(run).values() for s in own]
    waiting = sum(s.seconds for s in spans if s.kind == "waiting") / sum(s.seconds for s in spans)
    worst = max(run.requests.values(), key=lambda r: r.ttft)
    said = words(figures.request_timeline(run).to_dict())
    assert f"{waiting:.0%} of their time waiting; {worst.request} waits longest" in said
    assert f"{worst.ttft * 1e3:.3g} ms" in said and f"({run.metrics.num_preemptions} in all)" in said
    tokens = sum(s.num_tokens for s in step_slices(run))
    said = words(figures.batch_composition(run).to_dict())
    assert f"{tokens / len(run.steps):.1f} tokens on average" in said
    assert f"{1 - tokens / (64 * len(run.steps)):.0%} of the token budget" in said
    slo = run.metrics.ttft.p50
    met = sum(r.ttft <= slo for r in run.requests.values()) / len(run.requests)
    assert f"{met:.0%}" in words(figures.latency_ecdf(run, slo=slo).to_dict())
    assert "1.00x the simulated one" in words(figures.predicted_vs_measured(run).to_dict())


def test_timeline_draws_every_span_once():
    run = simulate()
    spec = figures.request_timeline(run).to_dict()
    bars = [row for rows in spec["datasets"].values() for row in rows if "lasts" in row]
    merged = [s for own in request_spans(run).values() for s in merge_spans(own)]
    assert len(bars) == len(merged)
    assert sum(b["t1"] - b["t0"] for b in bars) == pytest.approx(1e3 * sum(s.seconds for s in merged))


def test_a_long_timeline_shows_the_rows_around_the_latest_request():
    run = simulate(n=40)
    spec = figures.request_timeline(run, max_rows=10).to_dict()
    rows = {row["request"] for data in spec["datasets"].values() for row in data if "request" in row}
    latest = max(run.requests.values(), key=lambda r: r.ttft).request
    assert len(rows) == 10 and latest in rows and "10 of 40 requests" in words(spec)


@given(st.integers(0, 999), st.integers(2, 60))
@settings(max_examples=20, deadline=None)
def test_bins_conserve_token_seconds(seed, num_bins):
    slices = step_slices(simulate(seed=seed, rate=500.0))
    bins = binned(slices, num_bins)
    assert sum(b.tokens * (b.end - b.start) for b in bins) == pytest.approx(sum(s.num_tokens * (s.end - s.start) for s in slices))


def test_race_names_the_difference_and_its_sign():
    wide, narrow = simulate(n=16), simulate(n=16, max_num_batched_tokens=16)
    slower = narrow.metrics.ttft.mean / wide.metrics.ttft.mean - 1
    assert slower > 0
    said = words(figures.policy_race(wide, narrow).to_dict())
    assert f"max_num_batched_tokens 16 lengthens the mean time to first token by {percent(slower)}" in said
    assert "cuts the mean time to first token" in words(figures.policy_race(narrow, wide).to_dict())
    assert "slow lengthens" in words(figures.policy_race(wide, narrow, names=("fast", "slow")).to_dict())
    assert "share no request" in words(figures.policy_race(wide, simulate(n=0)).to_dict())


def test_several_runs_share_one_latency_chart():
    spec = figures.latency_ecdf({"wide": simulate(), "narrow": simulate(max_num_batched_tokens=16)}).to_dict()
    assert "with wide" in words(spec) and "with narrow" in words(spec)
    with pytest.raises(ConfigError, match="ttft, e2e, tpot"):
        figures.latency_ecdf(simulate(), "speed")


# ----------------------------------------------------------------------------------------- theme
def test_roles_are_the_agreed_colours_and_no_two_share_one():
    assert theme.LIGHT.phases == {"waiting": "#C9CED6", "prefill": "#E69F00", "decode": "#0072B2"}
    assert (theme.LIGHT.preempted, theme.LIGHT.cached, theme.LIGHT.rejected, theme.LIGHT.transfer) == (
        "#D55E00", "#009E73", "#CC79A7", "#56B4E9")  # fmt: skip
    assert theme.DARK.decode == "#3D9BD9"
    for roles in theme.ROLES.values():
        colours = theme._colours(roles)
        assert len(set(colours)) == len(colours)


def contrast(a: str, b: str) -> float:
    """WCAG contrast of two colours."""
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read():
    for roles in theme.ROLES.values():
        assert min(contrast(colour, roles.paper) for colour in (roles.ink, roles.mute, roles.decode)) >= 4.5
        assert min(contrast(colour, roles.paper) for colour in (roles.preempted, roles.cached)) >= 3  # bold or large only
        assert min(contrast(roles.owner_ink, colour) for colour in roles.owners) >= 4.5


def test_themes_are_registered_only_on_request_and_left_again():
    code = ("import llmlab.ui.figures, llmlab.ui.report, sys; assert 'altair' not in sys.modules, 'altair'; "
            "assert 'torch' not in sys.modules, 'torch'; import altair; assert 'llmlab_dark' not in altair.theme.names()")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    import altair as alt

    before = alt.theme.active
    with theme.enable("dark"):
        assert theme.roles() is theme.DARK and alt.theme.active == "llmlab_dark"
    assert alt.theme.active == before
    with pytest.raises(ConfigError, match="light, dark"):
        theme.enable("blue")


# ----------------------------------------------------------------------------------------- words
@given(st.floats(1e-6, 1e4), st.floats(1.03, 1e7))
def test_log_ticks_are_few_and_inside(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 12 and ticks == sorted(ticks)
    assert all(low * 0.999 <= t <= low * ratio * 1.001 for t in ticks)


def test_small_words():
    assert [percent(v) for v in (0, 0.001, 0.25, 0.999, 1)] == ["0%", "under 1%", "25%", "over 99%", "100%"]
    assert [unit_for(v).name for v in (3.0, 0.5, 1e-4)] == ["s", "ms", "µs"]


# ---------------------------------------------------------------------------------------- report
def test_report_is_one_offline_file(tmp_path):
    run = simulate()
    before = __import__("altair").theme.active
    path = report.write_report(run, tmp_path / "report.html")
    page = path.read_text()
    assert path.stat().st_size < 3e6 and __import__("altair").theme.active == before
    assert "default-src 'none'" in page
    outside_script = re.sub(r"<script\b.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(?!#)\w+:|@import|url\(", outside_script)
    assert page.count("<script") == page.count("</script>") == 4
    text = html.unescape(re.sub(r"<[^>]+>", " ", outside_script))
    for name, request in run.requests.items():
        assert re.search(rf"\b{name}\b", text)
        assert f"{request.num_prompt_tokens} → {request.num_output_tokens}" in text
    assert "simulated" in text and "run.why" in text and "Perfetto" in text


def carried(page: str, element: str) -> bytes:
    """What a page carries, zipped, in a script element."""
    return gzip.decompress(base64.b64decode(re.search(rf"id={element}>([^<]+)<", page).group(1)))


def test_report_carries_its_figures_and_its_trace(tmp_path):
    page = report.write_report(simulate(), tmp_path / "report.html").read_text()
    drawn = json.loads(carried(page, "figures"))
    assert b"vegaEmbed" in carried(page, "vega")
    assert set(drawn) == set(re.findall(r'data-figure="(\w+)"', page)) == {"timeline", "memory", "steps", "ttft", "predicted"}
    assert all(set(f["specs"]) == {"light", "dark"} and f["datasets"] for f in drawn.values())
    packed = re.search(r'data-trace="([^"]+)"', page).group(1)
    assert json.loads(gzip.decompress(base64.b64decode(packed)))["traceEvents"]


def test_report_carries_its_timeline_and_an_answer_for_every_request(tmp_path):
    run = simulate()
    page = run.to_html(tmp_path / "run.html").read_text()
    data, whys = (json.loads(gzip.decompress(base64.b64decode(text))) for text in re.findall(r"bytes\('([^']+)'\)", page))
    assert [r[1] for r in data["requests"]] == list(run.requests) == list(whys)
    assert data["meta"]["title"].startswith(max(run.requests.values(), key=lambda r: r.ttft or 0).request)
    for name in run.requests:
        assert whys[name]["headline"].split(" us")[0] in str(run.why(name)).replace(" us ", " µs ")
    assert set(data["meta"]["colours"]) == {"light", "dark"} and data["meta"]["colours"]["dark"]["decode"] == theme.DARK.decode


def test_a_page_of_a_thousand_requests_stays_below_two_megabytes(tmp_path):
    run = simulate(n=1000, rate=3000.0, num_blocks=200)
    assert run.to_html(tmp_path / "run.html").stat().st_size < 2e6


def test_report_shows_texts_and_escapes_them(tmp_path):
    evil = "<script>alert('x')</script>\u2028 & </td>"
    run = simulate(n=3)
    page = report.write_report(run, tmp_path / "r.html", {"r0": evil, "r1": "fine"}, why=[evil], theme="dark",
                               prompts={"r0": evil}, verdicts={"r0": True, "r1": False}).read_text()  # fmt: skip
    assert "<script>alert" not in page and page.count(html.escape(evil)) == 3
    assert "1 of 2 answers were verified as right" in page and 'data-theme="dark"' in page
    assert ">right<" in page and ">wrong<" in page


def test_report_tells_preemptions_with_their_alternatives(tmp_path):
    run = simulate()
    page = report.write_report(run, tmp_path / "r.html").read_text()
    section = page[page.index("<section id=decisions>") : page.index("<section id=trace>")]
    events = run.events("RequestPreempted")
    assert 0 < len(events) <= 10 and section.count("<tr>") == 1 + len(events) + 1 + len({d.seam for d in run.events("Decision")})
    victim = run.event(events[-1].cause)
    assert f"<b>{victim.chosen}</b> ({report_seconds(victim.predicted.seconds)})" in section
    for option in victim.alternatives:
        assert f"{option.option} ({report_seconds(option.predicted.seconds)})" in section
    assert "swap (" in section  # what else the tiering seam could have done


def report_seconds(value: float) -> str:
    from llmlab.ui.chart import seconds

    return seconds(value)


@pytest.mark.parametrize("kind", [{"log_level": 0}, {"log_level": 1}, {"log_level": 2}, {"n": 0}, {"tiering": "swap"},
                                  {"aborts": (0, 4)}, {"n": 0, "log_level": 0}])  # fmt: skip
def test_report_of_any_run(kind, tmp_path):
    run = simulate(**kind)
    page = report.write_report(run, tmp_path / "r.html").read_text()
    assert f"{len(run.requests)} requests on lab-s, simulated on t4" in page
    if run.started.level < 2:
        assert f"Log level {run.started.level} does not hold everything" in page


def test_report_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ConfigError, match="auto"):
        report.write_report(simulate(n=1), tmp_path / "r.html", theme="blue")
    with pytest.raises(TraceError, match="nowhere"):
        report.write_report(simulate(n=1), tmp_path / "nowhere" / "r.html")
