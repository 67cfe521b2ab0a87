"""The command line on the simulated executor: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import llmlab
from llmlab.cli import jobs, options, timeline
from llmlab.cli.answers import Asked, JsonAnswers, TextAnswers
from llmlab.cli.app import app
from llmlab.cli.replays import first_divergence
from llmlab.config import EngineConfig
from llmlab.events.trace import Run
from llmlab.events.why import Stretch
from llmlab.outputs import CompletionOutput, RequestOutput
from llmlab.plugins import REGISTRIES

SIM = ["run", "--executor", "sim", "--model", "lab-s", "--hardware", "cpu-2core"]
CROWDED = [*SIM, "--requests", "12", "--prompt-len", "16,80", "--output-len", "20,60", "--num-blocks", "24", "--log-level", "3"]
COMMANDS = (["tour"], ["run"], ["why"], ["trace"], ["trace", "info"], ["trace", "replay"], ["trace", "export"], ["models"],
            ["policies"], ["kernels"], ["lessons"])  # fmt: skip


def call(*words: object, **env: str):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120", "NO_COLOR": "1", **env})


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "crowded.jsonl.zst"
    result = call(*CROWDED, "--trace", path)
    assert result.exit_code == 0, result.output
    return path


def victim_of(run: Run) -> str:
    return run.events("RequestPreempted")[0].request


# ------------------------------------------------------------------------------------------- the help
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_help(command: list[str]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", [["tour"], ["run"], ["why"], ["trace", "replay"], ["trace", "export"]], ids=" ".join)
def test_helps_show_examples(command: list[str]) -> None:
    assert f"llmlab {' '.join(command)} " in call(*command, "--help").output


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; sys.argv = ['llmlab', 'run', '--help']\n"
            "from llmlab.cli import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print('LOADED', [m for m in ('torch', 'numba', 'numpy', 'altair', 'marimo', 'transformers', 'pandas',"
            " 'msgspec') if m in sys.modules])")  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().splitlines()[-1] == "LOADED ['msgspec']"


def test_version() -> None:
    assert call("--version").output.strip() == f"llmlab {llmlab.__version__}"


def test_every_field_of_the_configuration_is_an_option() -> None:
    shown = call("run", "--help", COLUMNS="200").output
    for name in EngineConfig.__struct_fields__:
        if name not in options.HIDDEN_FIELDS:
            assert options._option_names(name)[0].split("/")[0] in shown, name


def test_words_give_the_fields_they_came_from() -> None:
    chosen = {"num_blocks": 7, "enable_prefix_caching": False, "victim": "most_blocks", "random_weights": True}
    assert options.as_words(chosen) == ["--num-blocks", "7", "--no-prefix-caching", "--victim", "most_blocks", "--random-weights"]


# ------------------------------------------------------------------------------------------------ run
def test_a_drawn_workload_prints_its_metrics(trace: Path) -> None:
    result = call(*CROWDED)
    assert "simulated on cpu-2core, nothing was measured" in result.output
    assert "12 of 12 requests finished" in result.output
    assert "12 requests, " in result.output  # the summary on stderr
    assert f"of {24}" in result.output


def test_every_option_reaches_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    result = call(*SIM, "--requests", "2", "--num-blocks", "64", "--block-size", "8", "--victim", "most_blocks", "--composer",
                  "prefill_first", "--no-prefix-caching", "--overlap", "1", "--seed", "5", "--trace", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    config = Run.load(path).started.config
    assert (config["num_blocks"], config["block_size"], config["victim"], config["composer"]) == (64, 8, "most_blocks", "prefill_first")
    assert (config["enable_prefix_caching"], config["overlap_depth"], config["seed"]) == (False, 1, 5)


def test_drawn_requests_that_can_never_fit_are_left_out() -> None:
    result = call(*SIM, "--requests", "20", "--prompt-len", "10,200", "--output-len", "2", "--num-blocks", "8")
    assert result.exit_code == 0, result.output
    refused = int(re.search(r"(\d+) refused", result.output).group(1))
    assert result.output.count("left out: request ") == refused > 0
    assert f"{20 - refused} of {20 - refused} requests finished" in result.output


def test_json_lines_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2, 3], "max_tokens": 9}\n\n{"prompt_token_ids": [4], "max_tokens": 2}\n')
    result = CliRunner().invoke(app, [*SIM, "--file", str(prompts), "--json", "--ignore-eos"])
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [line["id"] for line in lines] == ["r0", "r1"]
    assert [len(line["token_ids"]) for line in lines] == [9, 2]
    assert lines[0]["finish_reason"] == "length"
    assert lines[0]["metrics"]["num_prompt_tokens"] == 3


def test_stdin_is_read_and_token_ids_are_shown_without_a_tokenizer() -> None:
    result = CliRunner().invoke(app, [*SIM, "--file", "-", "--max-tokens", "3"], input='{"prompt_token_ids": [1, 2]}\n')
    assert re.match(r"\d+ \d+ \d+\n", result.output)


def test_streamed_json_adds_up(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*SIM, "-F", "-", "--max-tokens", "4", "--json", "--stream"], input='{"prompt_token_ids": [9]}\n')
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    whole = lines.pop()
    assert "".join(line["delta"] for line in lines) == " ".join(map(str, whole["token_ids"]))
    assert len(lines) == 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=40), st.booleans())
def test_text_answers_are_in_order_whatever_finishes_first(steps: list[tuple[int, int]], stream: bool) -> None:
    out = io.StringIO()
    answers = TextAnswers([Asked(f"r{i}", "") for i in range(4)], out, stream, titles=False)
    outputs = [RequestOutput(f"r{i}", None, (), [CompletionOutput(0)]) for i in range(4)]
    for index, length in steps:
        if not outputs[index].finished:
            outputs[index].outputs[0].text += "abcd"[index] * length
            answers.update(outputs[index])
    for output in reversed(outputs):
        output.finished = True
        answers.update(output)
    assert out.getvalue() == "".join(output.outputs[0].text + "\n" for output in outputs)


@pytest.mark.parametrize("as_json", [False, True])
def test_unfinished_answers_are_not_lost(as_json: bool) -> None:
    asked, out = [Asked("r0", "one"), Asked("r1", "two")], io.StringIO()
    answers = JsonAnswers(asked, out, False) if as_json else TextAnswers(asked, out, False, titles=True)
    for name, text in (("r1", "second"), ("r0", "first")):
        answers.update(RequestOutput(name, None, (), [CompletionOutput(0, text)]))
    assert not out.getvalue()
    answers.close()
    assert 0 < out.getvalue().index("first") < out.getvalue().index("second")


def test_length_models_as_they_are_typed() -> None:
    assert jobs.length_model("128") == 128
    assert jobs.length_model("16,128") == (16, 128)
    assert jobs.length_model("lognormal:256,1.0") == "lognormal:256,1.0"


def test_ctrl_c_aborts_and_leaves_a_whole_trace(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    words = [*SIM, "--requests", "4", "--prompt-len", "100", "--output-len", "1000000", "--max-model-len", "2000000", "--num-blocks",
             "300000", "--trace", str(path)]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "llmlab.cli", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while (not path.exists() or path.stat().st_size == 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    run = Run.load(path)
    assert not run.cut
    assert {m.finish_reason for m in run.requests.values()} == {"abort"}
    assert run.verify() == []


# --------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(("words", "said"), [
    ([*SIM, "--requests", "3", "--victim", "most_block"], "Did you mean 'most_blocks'"),
    ([*SIM, "--requests", "3", "--num-blocks", "-3"], "num_blocks=-3: must be an integer of at least 1"),
    ([*SIM, "--requests", "0"], "n=0"),
    ([*SIM, "--requests", "3", "--rate", "-1"], "rate=-1.0"),
    ([*SIM, "--requests", "3", "--prompt-len", "gauss:1,2"], "is not a length model"),
    ([*SIM, "--requests", "3", "a prompt"], "prompts were given too"),
    ([*SIM, "a prompt"], "--requests N"),
    ([*SIM], "there is nothing to run"),
    ([*SIM, "--temperature", "-1", "x"], "temperature=-1.0"),
    ([*SIM, "--executor", "simulated", "x"], "Did you mean 'sim'"),
    ([*SIM, "--hardware", "h300", "--requests", "1"], "hardware='h300'"),
    ([*SIM, "--file", "/nowhere/p.txt"], "cannot be read"),
    ([*SIM, "--requests", "1", "--trace", "/nowhere/t.jsonl"], "cannot be written"),
    (["why", "/nowhere/t.jsonl", "r1"], "does not exist"),
    (["bench", "nonsense"], "benchmark"),
], ids=str)  # fmt: skip
def test_mistakes_end_with_a_sentence_and_exit_code_2(words: list[str], said: str) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("line", "said"), [
    ("{", "is not JSON"), ('{"max_tokens": 3}', "needs one of"), ("[1]", "needs one of"),
    ('{"prompt": "a", "prompt_token_ids": [1]}', "needs one of"),
    ('{"prompt_token_ids": [1], "max_token": 3}', "is not a sampling parameter"),
    ('{"prompt_token_ids": [1], "max_tokens": -3}', "must be at least 1"),
    ('{"prompt_token_ids": [1, 99999999]}', "p.jsonl line 2"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt_token_ids": [1]}\n' + line + "\n")
    result = call(*SIM, "--file", path)
    assert result.exit_code == 2
    assert "line 2" in result.output
    assert said in " ".join(result.output.split())


def test_unknown_options_are_usage_errors() -> None:
    assert call("run", "--bogus").exit_code == 2
    assert call("nonsense").exit_code == 2


# -------------------------------------------------------------------------------------------------- why
def test_why_tells_of_the_preemption(trace: Path) -> None:
    name = victim_of(Run.load(trace))
    said = " ".join(call("why", trace, name).output.split())
    assert said.startswith(f"{name} ended")
    assert "The victim policy last_come chose" in said
    assert "predicted" in said


def test_why_at_a_moment(trace: Path) -> None:
    run = Run.load(trace)
    name = victim_of(run)
    moment = run.events("RequestPreempted", request=name)[0].t + 1e-9
    shown = call("why", trace, name, "--at", moment).output
    assert "preempted" in shown
    assert "computing its prompt" not in shown
    assert call("why", trace, name, "--at", "1e9").exit_code == 2


def test_why_of_an_unknown_request(trace: Path) -> None:
    result = call("why", trace, "r999")
    assert result.exit_code == 2
    assert "r999" in result.output
    assert "r0" in result.output


# ------------------------------------------------------------------------------------------------ trace
def test_info_counts_every_event(trace: Path) -> None:
    run = Run.load(trace)
    shown = call("trace", "info", trace).output
    assert f"{len(run.log_events):,} events" in shown
    assert re.search(rf"RequestPreempted\s+{len(run.events('RequestPreempted'))}\b", shown)
    value = json.loads(call("trace", "info", trace, "--json").output)
    assert sum(value["events"].values()) == len(run.log_events)
    assert value["metrics"]["num_preemptions"] == run.metrics.num_preemptions


def test_the_command_that_info_suggests_works(trace: Path) -> None:
    suggested = call("trace", "info", trace, COLUMNS="80").output.rpartition("Ask why: ")[2]
    result = call(*shlex.split(suggested.replace("python -m llmlab.cli", "llmlab"))[1:])
    assert result.exit_code == 0, result.output


def test_a_damaged_tail_is_said_and_the_rest_is_used(trace: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    Run.load(trace).save(whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:200]) + lines[200][:20])
    result = call("trace", "info", tmp_path / "cut.jsonl")
    assert result.exit_code == 0, result.output
    assert "The end of" in result.output
    assert "200 events" in result.output


def test_replay_agrees_with_its_own_recording(trace: Path) -> None:
    result = call("trace", "replay", trace)
    assert result.exit_code == 0, result.output
    assert "every state hash and every decision agrees" in " ".join(result.output.split())


def _changed(trace: Path, path: Path, old: str, new: str) -> Path:
    """A copy of the trace with the first `old` replaced in the events behind the first."""
    Run.load(trace).save(path)
    first, rest = path.read_text().split("\n", 1)
    assert old in rest
    path.write_text(f"{first}\n{rest.replace(old, new, 1)}")
    return path


def test_a_changed_decision_is_found(trace: Path, tmp_path: Path) -> None:
    run = Run.load(trace)
    name = victim_of(run)
    other = next(request for request in run.requests if request != name)
    changed = _changed(trace, tmp_path / "t.jsonl", f'"seam":"victim","policy":"last_come","chosen":"{name}"',
                       f'"seam":"victim","policy":"last_come","chosen":"{other}"')  # fmt: skip
    result = call("trace", "replay", changed)
    assert result.exit_code == 1, result.output
    assert f"chose {other}" in result.output
    assert f"chose {name}" in result.output


def test_a_changed_hash_is_found(trace: Path, tmp_path: Path) -> None:
    recorded = next(e for e in Run.load(trace).log_events if type(e).__name__ == "StepFinished")
    changed = _changed(trace, tmp_path / "t.jsonl", f'"state_hash":{recorded.state_hash}', '"state_hash":1')
    result = call("trace", "replay", changed)
    assert result.exit_code == 1
    assert "View replay differs (1 times)" in result.output


@pytest.mark.parametrize(("option", "value"), [("--victim", "most_blocks"), ("--ordering", "ljf"), ("--composer", "decode_first"),
                                               ("--tiering", "swap"), ("--admission", "worst_case"), ("--max-num-seqs", "2"),
                                               ("--num-blocks", "28")])  # fmt: skip
def test_another_policy_parts_ways_somewhere(trace: Path, option: str, value: str) -> None:
    result = call("trace", "replay", trace, option, value)
    assert result.exit_code == 0, result.output
    assert "First difference in step" in result.output
    assert value in result.output


@pytest.mark.parametrize("words", [("--victim", "last_come"), ("--num-blocks", "24"), ("--composer", "chunked", "--ordering", "fcfs")])
def test_the_same_policy_decides_the_same(trace: Path, words: tuple[str, ...]) -> None:
    assert "the same would have been decided" in call("trace", "replay", trace, *words).output


@pytest.mark.parametrize("replaced", [{"num_blocks": 13}, {"admission": "worst_case"}, {"admission": "optimistic"}], ids=str)
def test_another_reason_for_the_same_wait_is_no_difference(tmp_path: Path, replaced: dict[str, object]) -> None:
    path = tmp_path / "queued.jsonl"
    call(*SIM, "--requests", "12", "--num-blocks", "12", "--prompt-len", "40,80", "--output-len", "3,6", "--log-level", "3", "--trace", path)
    found = first_divergence(Run.load(path), **replaced)
    assert found is not None
    assert "RequestWaiting" not in (type(found.recorded.event).__name__, type(found.replayed.event).__name__)
    assert found.step > 0


def test_in_a_roomy_pool_admission_and_size_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "roomy.jsonl"
    call(*SIM, "--requests", "4", "--num-blocks", "500", "--log-level", "3", "--prompt-len", "20", "--output-len", "5", "--trace", path)
    for replaced in (("--num-blocks", "900"), ("--admission", "worst_case"), ("--victim", "most_blocks"), ("--eviction", "lfu")):
        assert "the same would have been decided" in call("trace", "replay", path, *replaced).output


def test_replay_needs_decisions(tmp_path: Path) -> None:
    path = tmp_path / "level1.jsonl"
    call(*SIM, "--requests", "2", "--log-level", "1", "--trace", path)
    result = call("trace", "replay", path)
    assert result.exit_code == 2
    assert "log_level=1" in result.output


def test_export_to_csv_perfetto_and_traces(trace: Path, tmp_path: Path) -> None:
    run = Run.load(trace)
    for name in ("events.csv", "run.pftrace.json", "copy.jsonl", "copy.jsonl.gz"):
        result = call("trace", "export", trace, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
    with (tmp_path / "events.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["seq"]) for row in rows] == [event.seq for event in run.log_events]
    assert json.loads(rows[1]["details"])["spec"]["id"] == rows[1]["request"]
    assert json.loads((tmp_path / "run.pftrace.json").read_text())
    assert Run.load(tmp_path / "copy.jsonl").log_events == run.log_events
    assert Run.load(tmp_path / "copy.jsonl.gz").log_events == run.log_events
    assert call("trace", "export", trace, "-o", tmp_path / "x.docx").exit_code == 2
    assert call("trace", "export", trace, "-o", tmp_path / "missing" / "x.csv").exit_code == 2


# -------------------------------------------------------------------------------------------- listings
def test_policies_lists_every_plug_in() -> None:
    shown = call("policies").output
    value = json.loads(call("policies", "--json").output)
    for seam, registry in REGISTRIES.items():
        assert sorted(value[seam]) == registry.names()
        for name in registry.names():
            assert name in shown
    assert "fcfs *" in shown


def test_models_shows_cards_with_their_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab.models import zoo
    from llmlab.training.cards import Card, Gate, save_card

    for name in ("bare", "carded", "torn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    gate = Gate("arith", 2, "slow", "greedy", 200, 130, 0.58, 0.71, 0.5)
    save_card(Card("carded", "a test", 1_500_000, {}, 0, 10, 2_000_000, 1_000_000, 1.0, 0.5, "here", "", [], {}, True, [gate]), tmp_path / "carded")
    (tmp_path / "torn" / "card.json").write_text('{"name": "torn"')
    monkeypatch.setattr(zoo, "model_roots", lambda: [tmp_path])
    shown = call("models").output
    assert re.search(r"carded 1\.50 M parameters, trained on 2\.00 M\s+tokens, \S+ MB", shown)
    assert re.search(r"arith-2 slow greedy\s+65\.0%\s+58\.0% \.\. 71\.0%\s+200\s+✓ 50%", shown)
    assert re.search(r"bare \S+ MB, without a readable card\s+gate[^\n]+\n\s+not measured", shown)
    assert re.search(r"torn \S+ MB, without a readable card: \w+=\S*card\.json", shown.replace("\n", ""))
    entries = json.loads(call("models", "--json").output)
    carded, = (entry for entry in entries if entry["name"] == "carded")
    assert carded["gates"][0]["right"] == 130


def test_bench_of_an_installed_wheel_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmlab, "__path__", [str(tmp_path / "llmlab")])
    result = call("bench", "cpu")
    assert result.exit_code == 2
    assert "Clone the repository" in " ".join(result.output.split())


def test_bench_passes_options_and_exit_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "toll.py").write_text('"""Counts\n\nmore"""\nimport sys\nsys.exit(len(sys.argv))\n')
    monkeypatch.setattr(llmlab, "__path__", [str(tmp_path / "llmlab")])
    assert re.search(r"toll\s+Counts", call("bench").output)
    assert call("bench", "toll", "--flag", "-x", "3").exit_code == 4
    assert call("bench", "to").exit_code == 1


# ------------------------------------------------------------------------------------ colours, timelines
def test_no_color_is_respected(trace: Path) -> None:
    def colours(**env: str) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | env
        shown = subprocess.run([sys.executable, "-m", "llmlab.cli", "trace", "info", str(trace)], capture_output=True, text=True,
                               check=True, env=environment | {"TERM": "xterm-256color"}).stdout  # fmt: skip
        return re.findall(r"\x1b\[(?:[\d;]*;)?3[0-7]m", shown)

    assert colours(FORCE_COLOR="1")
    assert not colours(FORCE_COLOR="1", NO_COLOR="1")
    assert not colours()


def test_a_terminal_without_unicode_is_served(trace: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    shown = subprocess.run([sys.executable, "-m", "llmlab.cli", "trace", "info", str(trace)], capture_output=True, check=True,
                           env=environment).stdout.decode("ascii")  # fmt: skip
    assert re.search(r"^r0 .*=", shown, re.M)


KINDS = ("queued", "prompt", "decode", "preempted", "recompute")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.floats(0, 10)), min_size=1, max_size=12), st.integers(20, 100), st.floats(0, 50))
def test_a_timeline_shows_every_stretch_in_order(parts: list[tuple[str, float]], width: int, begin: float) -> None:
    stretches, t = [], begin
    for kind, length in parts:
        stretches.append(Stretch(kind, t, t + length, -1))
        t += length
    end = begin + (t - begin + 0.001) * width / (width - len(parts) - 1)  # columns to spare for stretches of no length
    drawn = timeline.cells(stretches, begin, end, width)
    assert len(drawn) == width
    shown = [kind for i, kind in enumerate(drawn) if kind and (i == 0 or drawn[i - 1] != kind)]
    merged = [kind for i, (kind, _) in enumerate(parts) if i == 0 or parts[i - 1][0] != kind]
    assert shown == merged


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 3), st.integers(0, 50)), max_size=20), st.integers(1, 40))
def test_peaks_miss_nothing(uses: list[tuple[float, float, int]], width: int) -> None:
    found = timeline.peaks([timeline.Use(s, s + d, blocks) for s, d, blocks in uses], 0.0, 12.0, width)
    assert max(found, default=0) == max((blocks for _, _, blocks in uses), default=0)


def test_a_timeline_is_as_wide_as_the_terminal_and_speaks_ascii(trace: Path) -> None:
    from rich.console import Console

    run = Run.load(trace)
    for width, encoding in ((60, "utf-8"), (140, "utf-8"), (80, "ascii")):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        Console(file=file, width=width, no_color=True).print(timeline.Timeline.of(run))
        file.flush()
        lines = file.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        rows = [line for line in lines if re.match(r"r\d+ ", line)]
        assert len(rows) == len(run.requests)
        mark = timeline.MARKS["preempted"]
        assert any((mark.ascii if encoding == "ascii" else mark.char) in row for row in rows)
