"""Traces as the time machine and the KV lab show them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llmlab.applab import experts, gallery, kv, pictures, roof, spec, traces
from llmlab.events import catalog as ev
from llmlab.runs import Run
from llmlab.types import Cost, LabError
from llmlab.ui import theme
from llmlab.ui.speculation import verifications


@pytest.fixture(scope="module")
def first_look() -> Run:
    return Run.load(gallery.recorded_runs()["first-look"])


def test_the_shipped_run_is_sound_and_says_something(first_look: Run) -> None:
    assert first_look.verify() == [] and first_look.mode == "measured" and not first_look.cut
    assert first_look.metrics.num_preemptions > 0 and max(r.num_prompt_tokens for r in first_look.requests.values()) > 800


def test_it_can_be_forked_and_both_continuations_are_simulated(first_look: Run) -> None:
    fork = traces.forked(first_look, 100, "ordering", "sjf_oracle")
    assert (fork.as_it_was.mode, fork.changed.mode) == ("simulated", "simulated")
    said = traces.fork_finding(fork)
    ratio = fork.comparison.mean_ratio("ttft")
    assert ratio is not None and f"{abs(ratio - 1):.0%}" in said and "step 100" in said


def test_every_other_choice_of_a_step_can_be_taken_once(first_look: Run) -> None:
    victim = next(e for e in first_look.events("Decision") if e.seam == "victim" and len(e.alternatives) > 2)
    others = traces.others(first_look, victim.step)
    assert len(others) >= 3 and traces.others(first_look, 0) == {}
    words, forced = next(item for item in others.items() if item[0].startswith("victim"))
    fork = traces.forked(first_look, forced.at, forced.seam, forced)
    assert forced.option in words and fork.policy == f"{forced.option} instead"
    lost = [e.request for e in fork.changed.events("RequestPreempted", step=victim.step)]
    assert lost[:1] == [forced.option] != [victim.chosen]


def test_a_history_is_the_same_under_another_cost_model(first_look: Run) -> None:
    def dearer(event: ev.Event) -> ev.Event:
        return msgspec.structs.replace(event, predicted=Cost(9.0)) if isinstance(event, ev.StepPlanned) else event

    assert Run([dearer(e) for e in first_look.log_events]).fork(60).metrics.num_finished == 48


def test_a_history_that_was_decided_otherwise_is_no_history(first_look: Run) -> None:
    def other(event: ev.Event) -> ev.Event:
        return msgspec.structs.replace(event, request="r99") if isinstance(event, ev.RequestAdmitted) else event

    with pytest.raises(LabError, match="cannot be reproduced"):
        Run([other(e) for e in first_look.log_events]).fork(60)


def test_decisions_of_a_step_are_told_with_their_alternatives(first_look: Run) -> None:
    victim = next(e for e in first_look.events("Decision") if e.seam == "victim")
    table = traces.decision_table(first_look, victim.step)
    assert f"victim: {victim.policy}" in table and victim.alternatives[0].option in table and "predicted" in table
    assert "No decision" in traces.decision_table(first_look, 10**6)
    assert traces.finished_step(first_look, -1) == first_look.steps[-1].step
    assert traces.finished_step(first_look, 50) == 50


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("a.jsonl", b"", "empty"), ("a.jsonl", b"\x00\xff", "Line 1"), ("a.jsonl.zst", b"nothing", "damaged"),
     ("a.txt", b"{}", "no trace by its name"), ("a.jsonl", b'{"event":"RunStarted","seq":0,"t":0,"schema":0}\n', "schema 0"),
     ("a.jsonl", b'{"event":"RunStarted","seq":0,"t":0,"schema":1}\n', "no request")],
)  # fmt: skip
def test_what_cannot_be_opened_is_explained(name: str, content: bytes, said: str) -> None:
    found = traces.uploaded(name, content)
    assert found.run is None and said in found.problem


def test_a_cut_trace_opens_with_a_note(first_look: Run, tmp_path: Path) -> None:
    path = first_look.save(tmp_path / "cut.jsonl")
    path.write_bytes(path.read_bytes()[:-200])
    found = traces.opened(path)
    assert found.run is not None and "end is missing" in found.note
    assert str(path.name) in " ".join(traces.traces_here(tmp_path))


def test_the_recorded_drafts_change_no_answer() -> None:
    drafts, plain = (Run.load(gallery.recorded_runs()[name]) for name in ("drafts", "no-drafts"))
    assert spec.same_answers(drafts, plain) and not spec.same_answers(drafts, Run(plain.log_events[:-40]))
    found = verifications(drafts)
    share = sum(v.accepted for v in found) / sum(v.accepted + v.rejected for v in found)
    assert f"{share:.0%} of" in spec.finding(drafts, plain) and "Nothing was drafted" in spec.finding(plain, plain)


# --------------------------------------------------------------------------------- KV and roofline
def test_the_account_of_a_pool_follows_its_knobs() -> None:
    usual, without = kv.account(kv.served(kv.Pool())), kv.account(kv.served(kv.Pool(caching=False)))
    coarse = kv.account(kv.served(kv.Pool(block_size=128)))
    assert without.hit == 0 < usual.hit and coarse.waste > usual.waste > 0 and usual.evicted > 0
    assert "Without a prefix cache" in kv.finding(kv.Pool(caching=False), without)


def test_the_alternatives_of_a_pool() -> None:
    pool = kv.Pool(tokens=1024)
    found = kv.others(pool)
    assert list(found["tokens in a block"]) == ["4", "8", "16", "32", "64", "128"] and "lru" in found["eviction"]
    with theme.enable("dark"):
        text = kv.others_chart(pool, found, kv.served(pool, 1)).to_dict()["title"]["text"]
    best = max(found["tokens in a block"].values(), key=lambda a: a.hit)
    assert f"{best.hit:.0%}" in (text if isinstance(text, str) else " ".join(text))


def test_two_set_ups_side_by_side() -> None:
    a, b = roof.priced("A", roof.SetUp()), roof.priced("B", roof.SetUp(machine="h100", batch=64))
    ratio = b.tokens_per_second / a.tokens_per_second
    assert f"{ratio:.2f} times" in roof.finding(a, b) and "A is bound by memory" in roof.finding(a, b)
    assert "tokens of KV" in roof.table([a, b])
    big = roof.priced("A", roof.SetUp(model="llama-3.1-70b", machine="t4"))
    assert "GiB missing" in big.problem and big.problem[:40] in roof.table([big, b])
    assert "beyond the wall" in str(roof.memory_chart([big, big]).to_dict()["layer"][0]["data"])
    assert len(roof.gains(a, roof.lens_names(a))) == len(roof.lens_names(a)) > 5


def test_more_room_for_experts_is_never_slower_and_the_finding_says_what_was_run() -> None:
    tight, roomy = (experts.served(experts.Offload(fit=fit, batch=1)).metrics.output_throughput for fit in (1, 5))
    assert roomy > tight > 0
    of = experts.Offload("on_demand", batch=1)
    runs = experts.compared(of)
    said = experts.finding(of, runs)
    assert f"{runs['on_demand'].metrics.output_throughput:.3g} tokens" in said and "(1 times" in said
    with theme.enable("dark"):
        assert experts.chart(of, runs).to_dict()["title"]["text"]


def test_charts_above_one_another_fit_a_narrow_page_on_one_scale() -> None:
    parts = [{"width": 820, "height": 60}, {"width": 410}, {"mark": "bar"}]
    fitted = pictures._fitted({"vconcat": parts, "config": {}}, 800)["vconcat"]
    assert fitted[0] == {"width": 690, "height": 60} and fitted[1] == {"width": 345}
    assert fitted[2] == {"mark": "bar"} and parts[0]["width"] == 820
    assert pictures._fitted({"vconcat": [{"width": 300}]}, 1280)["vconcat"] == [{"width": 1170}], "nothing stays empty"
    assert pictures._fitted({"width": 500}, 800)["width"] == "container"
