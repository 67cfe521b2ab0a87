"""The commands that ask "what if": sim, compare, fork, sweep, check, roofline and profile."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmlab.cli import comparing, loads, roofs, simulating, sweeping
from llmlab.cli.app import app
from llmlab.cli.lenses import FORMS, lens_of
from llmlab.config import EngineConfig
from llmlab.events.trace import Run
from llmlab.runs import Run as ForkableRun
from roofline import CostModel, Rows, hardware, shapes
from roofline.lenses import Case, WeightQuant, compare
from roofline.memory import plan

LAB = ["--model", "lab-s", "--hardware", "cpu-2core"]
LOAD = ["--requests", "16", "--rate", "2000", "--prompt-len", "16,80", "--output-len", "20,60"]
SIM = ["sim", *LAB, *LOAD]
CROWDED = [*SIM, "--num-blocks", "24"]
COMMANDS = ("sim", "compare", "fork", "sweep", "check", "roofline", "profile")
MINE = '''
class ShortestPrompt:
    """Short prompts first."""

    def key(self, request, now):
        return (request.num_prompt_tokens,)


class Demanding:
    def __init__(self, weight):
        self.weight = weight


class Moody:
    def __init__(self):
        self.calls = 0

    def key(self, request, now):
        self.calls += 1
        return (self.calls % 3,)


ready = ShortestPrompt()
'''


def call(*words: object, **env: str):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "140", "NO_COLOR": "1", **env})


def said(result) -> str:
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sim") / "crowded.jsonl.zst"
    result = call(*CROWDED, "--trace", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with policies, in the working directory, importable as a module for this test only."""
    name = f"my_orders_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


# ------------------------------------------------------------------------------------------- the help
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_examples(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"llmlab {command}" in result.output.partition("Examples")[2]


@pytest.mark.parametrize("command", ["sim", "roofline", "profile"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (f"import sys; sys.argv = ['llmlab', '{command}', '--help']\nfrom llmlab.cli import main\n"
            "try: main()\nexcept SystemExit: pass\n"
            "print('LOADED', [m for m in ('torch', 'numba', 'numpy', 'altair', 'transformers', 'pandas', 'llmlab.engine',"
            " 'roofline.cost') if m in sys.modules])")  # fmt: skip
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().splitlines()[-1] == "LOADED []"


def test_the_help_shows_the_defaults_of_the_command() -> None:
    assert "[default: llama-2-7b]" in call("sim", "--help").output
    assert "[default: lab-s]" in call("run", "--help").output


# ------------------------------------------------------------------------------------------------ sim
def test_sim_says_what_it_simulated_and_why_the_worst_was_late(trace: Path) -> None:
    result = call(*CROWDED)
    assert result.exit_code == 0, result.output
    run = Run.load(trace)
    worst = max(run.requests.values(), key=lambda m: m.ttft or 0.0).request
    assert "simulated: lab-s on cpu-2core, nothing was measured" in result.output
    assert "16 of 16 requests finished" in result.output
    assert f"The latest first token: {worst}," in result.output
    assert run.why(worst).headline in said(result)
    assert re.search(rf"preemptions\s+{run.metrics.num_preemptions}\b", result.output)
    assert run.metrics.num_preemptions > 0


def test_the_commands_that_sim_suggests_can_be_run(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    suggested: list[list[str]] = []
    for words in (CROWDED, [*CROWDED, "--trace", tmp_path / "t.jsonl.zst"]):
        lines = call(*words).output.partition("What to try next")[2].splitlines()
        commands = [line.strip().partition("   ")[0].replace("python -m llmlab.cli", "llmlab") for line in lines]
        suggested += [shlex.split(command)[1:] for command in commands if command.startswith("llmlab ")]
    assert {words[0] for words in suggested} >= {"sim", "why", "fork", "sweep"}
    for words in suggested:
        few = ["--seeds", "1", "-n", "3", "--backend", "inline"] if words[0] == "sweep" else []
        assert call(*words, *few).exit_code == 0, words
    assert Run.load(tmp_path / "sim.jsonl.zst").metrics == Run.load(trace).metrics  # the same run again, kept


def test_without_options_it_is_llama_2_7b_on_a_t4() -> None:
    result = call("sim", "-n", "3", "--output-len", "4")
    assert "simulated: llama-2-7b on t4" in result.output
    assert "What to try next" in result.output


@pytest.mark.parametrize("level", [0, 1])
def test_low_log_levels_say_what_they_lack(level: int, tmp_path: Path) -> None:
    result = call(*CROWDED, "--log-level", level, "--trace", tmp_path / "t.jsonl")
    assert result.exit_code == 0, result.output
    assert "fork" not in result.output.partition("What to try next")[2].replace("fork and replay need", "")
    assert "--log-level" in result.output
    assert ("keeps no tokens" in result.output) is (level == 0)


def test_sim_as_json_agrees_with_its_trace(trace: Path) -> None:
    value = json.loads(call(*CROWDED, "--json").output.splitlines()[0])
    run = Run.load(trace)
    assert value["mode"] == "simulated"
    assert (value["config"]["model"], value["num_blocks"]) == ("lab-s", 24)
    assert value["metrics"] == json.loads(json.dumps(dict(run.metrics.rows())))
    assert [(r["id"], r["ttft"]) for r in value["requests"]] == [(n, m.ttft) for n, m in run.requests.items()]


def test_sim_options_reach_engine_and_workload(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    result = call(*SIM, "--num-blocks", "64", "--ordering", "ljf", "--overlap", "1", "--seed", "5", "--shared-prefix", "16", "--trace", path)
    assert result.exit_code == 0, result.output
    run = Run.load(path)
    assert (run.started.config["ordering"], run.started.config["overlap_depth"], run.started.seed) == ("ljf", 1, 5)
    prompts = [event.spec.prompt_token_ids for event in run.events("RequestArrived")]
    assert len({prompt[:16] for prompt in prompts}) == 1
    assert len({prompt[:17] for prompt in prompts if len(prompt) > 16}) > 1


def test_sim_like_a_public_trace_and_from_a_file(tmp_path: Path) -> None:
    result = call("sim", *LAB, "--like", "azure-conv-2023", "--rate", "50", "-n", "5")
    assert "like azure-conv-2023: 5 requests" in result.output
    azure, burst, mooncake = tmp_path / "azure.csv", tmp_path / "burst.csv", tmp_path / "mooncake.jsonl"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,40,5\n2023-11-16 18:15:48.0,20,3\n")
    burst.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n0,GPT-4,40,5,45,API log\n2,GPT-4,9,3,12,API log\n")
    mooncake.write_text('{"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]}\n')
    for path, count, output in ((azure, 2, 8), (burst, 2, 8), (mooncake, 1, 4)):
        value = json.loads(call("sim", *LAB, "--workload-file", path, "--json").output.splitlines()[0])
        assert (value["metrics"]["num_finished"], value["metrics"]["output_tokens"]) == (count, output), path.name
    arrivals = loads.LoadChoice(rate=4.0, workload_file=azure).draw(0).arrivals
    assert arrivals == (0.0, 0.25)


def test_sim_writes_a_report(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    assert call(*CROWDED, "--report", path).exit_code == 0
    assert "simulated on cpu-2core" in path.read_text(encoding="utf-8")


def test_a_log_too_small_for_why_says_so(tmp_path: Path) -> None:
    result = call(*CROWDED, "--log-capacity", "50")
    assert result.exit_code == 0, result.output
    assert "--trace FILE keeps every event" in result.output
    assert "16 of 16 requests finished" in result.output
    assert "had to wait" not in result.output
    kept = call(*CROWDED, "--log-capacity", "50", "--trace", tmp_path / "t.jsonl")
    assert "keeps every event" not in kept.output
    assert "in the queue" in kept.output


def test_an_interrupted_simulation_prints_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab.cli import console

    class Pressed(console.Interrupt):
        looks = 0

        @property
        def pressed(self) -> bool:  # type: ignore[override]
            Pressed.looks += 1
            return Pressed.looks > 5  # it looks whenever a request ends

        @pressed.setter
        def pressed(self, value: bool) -> None:
            pass

    monkeypatch.setattr(console, "Interrupt", Pressed)
    result = call(*CROWDED)
    assert result.exit_code == 130
    finished = int(re.search(r"(\d+) of \d+ requests finished", result.output).group(1))
    assert finished < 16


# ------------------------------------------------------------------------------------ compare and fork
def test_a_run_compared_with_itself_is_the_same(trace: Path) -> None:
    result = call("compare", trace, trace)
    assert result.exit_code == 0, result.output
    assert "They took the same decisions." in result.output
    assert re.search(r"TTFT .* 1\.000 +0 +0 +16\b", result.output)
    assert "changed most" not in result.output


def test_compare_counts_and_names_what_changed(trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "sjf.jsonl"
    call(*CROWDED, "--ordering", "sjf_oracle", "--trace", other)
    a, b = Run.load(trace), Run.load(other)
    result = call("compare", trace, other)
    better = sum(b.requests[n].e2e < a.requests[n].e2e - 1e-9 for n in a.requests)
    worse = sum(b.requests[n].e2e > a.requests[n].e2e + 1e-9 for n in a.requests)
    assert 0 < better < 16
    mean = sum(m.e2e for m in b.requests.values()) / sum(m.e2e for m in a.requests.values())
    assert re.search(rf"E2E .* {mean:.3f} +{better} +{worse} +{16 - better - worse}\b", result.output)
    most = min(a.requests, key=lambda n: b.requests[n].e2e - a.requests[n].e2e)
    assert re.search(rf"changed most.*\n.*\n{most}\b", result.output)
    assert "They part at step" in result.output
    value = json.loads(call("compare", trace, other, "--json").output)
    assert value["counts"]["e2e"] == {"better": better, "worse": worse, "equal": 16 - better - worse}
    assert value["ratios"]["e2e"] == pytest.approx(mean)


def test_compare_needs_common_requests(trace: Path, tmp_path: Path) -> None:
    none = tmp_path / "none.jsonl"
    run = Run.load(trace)
    Run(run.log_events[:1]).save(none)
    result = call("compare", trace, none)
    assert result.exit_code == 2
    assert "no request in common" in said(result)


def mean_rows(output: str) -> list[list[str]]:
    """The first rows of the table of means, word by word: its columns are as wide as the names of the files."""
    return [line.split() for line in output.partition("mean")[2].splitlines()[1:5]]


def test_fork_writes_the_trace_that_it_compares(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl.zst"
    Run.load(trace).save(path)
    step = Run.load(path).events("RequestPreempted")[0].step - 1
    result = call("fork", path, "--at", step, "--victim", "most_blocks", "--report", tmp_path / "f.html")
    assert result.exit_code == 0, result.output
    written = tmp_path / f"own-fork-{step}-most_blocks.jsonl.zst"
    assert written.name in result.output
    forked = Run.load(written)
    assert forked.started.config["victim"] == "most_blocks"
    expected = ForkableRun.load(path).fork(step, victim="most_blocks")
    assert [e.e2e for e in forked.requests.values()] == [e.e2e for e in expected.requests.values()]
    assert forked.verify() == []
    shown = call("compare", path, written).output
    assert mean_rows(shown) == mean_rows(result.output)
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert {"recorded against fork", "default-src 'none'"} <= set(re.findall(r"recorded against fork|default-src 'none'", page))
    assert "Policy race" in page


def test_a_fork_under_the_same_policies_changes_nothing(trace: Path, tmp_path: Path) -> None:
    result = call("fork", trace, "--at", "10", "-o", tmp_path / "same.jsonl")
    assert result.exit_code == 0, result.output
    assert re.search(r"E2E .* 1\.000 +0 +0 +16\b", result.output)


@pytest.mark.parametrize(("words", "wrong"), [
    (["--at", "999999"], "at=999999"), (["--at", "3", "--victim", "most_block"], "Did you mean 'most_blocks'"),
    (["--at", "3", "-o", "/nowhere/t.jsonl"], "/nowhere"), ([], "Missing option"),
])  # fmt: skip
def test_forks_that_cannot_be(trace: Path, words: list[str], wrong: str) -> None:
    result = call("fork", trace, *words)
    assert result.exit_code == 2, result.output
    assert wrong in said(result)


def test_names_tell_two_files_apart() -> None:
    assert comparing._names(Path("x/a.jsonl.zst"), Path("y/b.jsonl")) == ("a", "b")
    assert comparing._names(Path("x/t.jsonl"), Path("y/t.jsonl")) == ("x", "y")
    assert comparing.Names("short", "a-name-that-is-rather-long").heads == ("a", "b")


# ---------------------------------------------------------------------------------------------- sweep
GRID = ["sweep", *LAB, "-n", "6", "--rate", "50", "--output-len", "3,9", "--prompt-len", "16,80", "--backend", "inline"]


def test_sweep_prints_a_line_for_each_setting_and_goes_on_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    words = [*GRID, "--set", "max_num_batched_tokens=32,64", "--seeds", "2", "-o", file]
    result = call(*words, "--set", "ordering=fcfs,sjf_oracle")
    assert result.exit_code == 0, result.output
    assert "8 runs, simulated, means of 2 seeds" in result.output
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["ordering"], r["max_num_batched_tokens"], r["workload_seed"]) for r in rows} == {
        (o, b, s) for o in ("fcfs", "sjf_oracle") for b in (32, 64) for s in (0, 1)
    }
    for ordering in ("fcfs", "sjf_oracle"):
        for budget in (32, 64):
            mean = sum(r["output_throughput"] for r in rows if (r["ordering"], r["max_num_batched_tokens"]) == (ordering, budget)) / 2
            assert re.search(rf"{budget} +{ordering} .* {sweeping._number(mean)} ±", result.output)
    again = call(*words, "--set", "ordering=fcfs,sjf_oracle,ljf")
    assert "12 points, 8 of them were in" in again.output
    assert len(file.read_text().splitlines()) == 12


def test_sweep_over_the_workload(tmp_path: Path) -> None:
    result = call(*GRID, "--set", "rate=50,5000", "--json")
    rows = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [row["workload"] for row in rows] == ["rate=50.0", "rate=5000.0"]
    assert rows[0]["duration"] > 2 * rows[1]["duration"]
    assert "rate" in call(*GRID, "--set", "rate=50,5000").output


def test_values_with_commas_stand_in_quotes_and_a_flag_may_come_again() -> None:
    axes = sweeping.axes_of(['prompt_len="lognormal:102,1.1", "16, 64",40', "rate=5", "output-len=3", "rate=7,9"])
    assert axes.loads == {"prompt_len": ["lognormal:102,1.1", "16,64", "40"], "output_len": ["3"], "rate": [5.0, 7.0, 9.0]}
    words = [word for word in GRID if word not in ("--prompt-len", "16,80")]
    result = call(*words, "--set", 'prompt_len="uniform:16,17","80,81"', "--set", "prompt_len=40", "--json")
    rows = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [row["workload"] for row in rows] == ["prompt_len=uniform:16,17", "prompt_len=80,81", "prompt_len=40"]
    assert rows[0]["prompt_tokens"] < rows[2]["prompt_tokens"] < rows[1]["prompt_tokens"]
    table = call(*words, "--set", 'prompt_len="uniform:16,17",40').output
    assert re.search(r"^uniform:16,17 ", table, re.MULTILINE) and re.search("^40 ", table, re.MULTILINE)


@pytest.mark.parametrize(("text", "message"), [
    ("prompt_len=lognormal:1020,1.1", """prompt_len="lognormal:1020,1.1","uniform:16,128\""""),
    ('prompt_len="lognormal:1020,1.1', "quotation mark"),
    ('output_len="3,x"', "stands in quotes"),
])  # fmt: skip
def test_lengths_that_cannot_be_read_are_told_at_once(text: str, message: str) -> None:
    result = call(*GRID[:-6], "--set", text)
    assert result.exit_code == 2 and message in re.sub(r"\s*\n\s*", "", said(result)).replace("│", ""), said(result)


def test_refused_requests_get_a_column() -> None:
    head = call(*GRID, "--set", "ordering=fcfs,ljf").stdout.splitlines()[1]
    assert "preempted" in head
    assert "refused" not in head
    result = call(*GRID, "--set", "num_blocks=4,64", "--prompt-len", "40,80")
    refused = [re.split(r"\s{2,}", line.strip())[5] for line in result.stdout.splitlines()[1:4]]
    assert (refused[0], int(refused[1]) > 0, refused[2]) == ("refused", True, "0")


def test_a_point_that_fails_is_told_and_the_others_are_kept() -> None:
    result = call(*GRID, "--set", "num_blocks=2,64")
    assert result.exit_code == 1
    assert "failed: num_blocks=2" in said(result)
    assert re.search(r"^64 .* tok|^64 +\S+ ms", result.output, re.MULTILINE)


def test_sweep_in_processes_with_a_policy_of_ones_own(mine: str) -> None:
    words = [word for word in GRID if word not in ("--backend", "inline")]
    result = call(*words, "--set", f"ordering=fcfs,{mine}:ShortestPrompt", "--jobs", "1", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [row["ordering"] for row in rows] == ["fcfs", "ShortestPrompt"]
    assert [row["num_finished"] for row in rows] == [6, 6]


def test_values_take_the_type_of_their_field() -> None:
    axes = sweeping.axes_of(["num_blocks=8,none", "enable-prefix-caching=true,false", "rate=1,2.5", "like=azure-conv-2023"])
    assert axes.fields == {"num_blocks": [8, None], "enable_prefix_caching": [True, False]}
    assert axes.loads == {"rate": [1.0, 2.5], "like": ["azure-conv-2023"]}


def test_narrow_tables_keep_the_settings_and_drop_the_last_metrics() -> None:
    lines = [["ordering", *(title for _, title, _ in sweeping.COLUMNS)], ["fcfs", *["123 ms"] * len(sweeping.COLUMNS)]]
    assert sweeping._narrowed(lines, 1, 400) == lines
    for width in (5, 30, 50):
        cut = sweeping._narrowed(lines, 1, width)
        assert cut[0] == lines[0][: len(cut[0])]
        assert 2 <= len(cut[0]) < len(lines[0])


# ---------------------------------------------------------------------------------------------- check
def test_check_of_a_good_policy_of_ones_own_and_of_a_name(mine: str) -> None:
    result = call("check", f"{mine}:ready", "--patience", "inf")
    assert result.exit_code == 0, result.output
    assert "ShortestPrompt as ordering: ok" in said(result)
    assert "lru as eviction: ok" in said(call("check", "lru"))


def test_check_of_a_bad_policy_ends_with_1(mine: str) -> None:
    result = call("check", f"{mine}:Moody", "--json", "--patience", "inf")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert (report["policy"], report["seam"], report["ok"]) == ("Moody", "ordering", False)
    assert report["failures"]


def test_sim_takes_a_policy_of_ones_own(mine: str) -> None:
    result = call(*CROWDED, "--ordering", f"{mine}.py:ShortestPrompt", "--json")
    assert json.loads(result.output.splitlines()[0])["config"]["ordering"] == "ShortestPrompt"


@pytest.mark.parametrize(("policy", "wrong"), [
    ("{}:Nobody", "has no 'Nobody'"), ("{}:Demanding", "cannot be made without arguments"), ("no_such_module:X", "cannot be loaded"),
    ("nowhere.py:X", "no such file"), ("fcsf", "Did you mean 'fcfs'"),
])  # fmt: skip
def test_policies_that_cannot_be_loaded(mine: str, policy: str, wrong: str) -> None:
    result = call("check", policy.format(mine))
    assert result.exit_code == 2, result.output
    assert wrong in said(result)


# -------------------------------------------------------------------------------------------- roofline
def test_roofline_ops_add_up_to_the_step() -> None:
    value = json.loads(call("roofline", "llama-2-7b", "a100-40gb", "--batch", "8", "--context", "512", "--json").output)
    step = CostModel("llama-2-7b", "a100-40gb").step(Rows.decode(8, 512))
    assert value["step"]["seconds"] == pytest.approx(step.seconds)
    for name, total in (("flops", step.flops), ("bytes", step.bytes_hbm), ("seconds", step.seconds)):
        assert sum(op[name] for op in value["ops"]) == pytest.approx(total)
    assert value["step"]["tokens_per_second"] == pytest.approx(8 / step.seconds)
    assert value["joules_per_token"] == pytest.approx(step.joules / 8)
    assert value["memory"]["tokens"] == plan("llama-2-7b", "a100-40gb").tokens


def test_roofline_of_experts_and_several_devices_adds_up() -> None:
    value = json.loads(call("roofline", "deepseek-v2-lite", "h100", "--tp", "2", "--prefill", "300", "--json").output)
    step = CostModel("deepseek-v2-lite", "h100", tp=2).step(Rows.prefill(300))
    assert 2 * sum(op["flops"] for op in value["ops"]) == pytest.approx(step.flops)
    assert sum(op["seconds"] for op in value["ops"]) == pytest.approx(step.seconds)
    assert value["step"]["tokens"] == 300


def test_roofline_prints_ops_totals_and_techniques() -> None:
    result = call("roofline", "llama-2-7b", "a100", "--batch", "4", "--lens", "int4", "--lens", "kv8")
    assert result.exit_code == 0, result.output
    step = CostModel("llama-2-7b", "a100").step(Rows.decode(4, 1024))
    for op in step.per_op():
        assert re.search(rf"^{op.op.name} .* {op.bound} ", result.output, re.MULTILINE)
    quant = compare(WeightQuant(4), Case.of("llama-2-7b", "a100", Rows.decode(4, 1024)))
    assert re.search(rf"4-bit weights .* x{quant.speedup:.2f} ", result.output)
    assert re.search(r"all together .* x", result.output)
    assert f"{plan('llama-2-7b', 'a100').tokens:,} tokens fit" in result.output


def test_a_model_that_does_not_fit_is_priced_and_said() -> None:
    result = call("roofline", "llama-2-70b", "t4")
    assert result.exit_code == 0
    assert "does not fit on 1 x t4" in said(result)
    assert "GiB missing" in said(result)
    assert "gate_up_proj" in result.output


def test_a_price_per_hour_becomes_one_per_token() -> None:
    words = ("roofline", "llama-2-7b", "a100", "--tp", "2", "--batch", "4")
    value = json.loads(call(*words, "--price", "1.5", "--json").output)
    assert value["price_per_token"] == pytest.approx(2 * 1.5 / 3600 * value["step"]["seconds"] / 4)
    shown = call(*words, "--price", "1.5").output
    assert f"{1e6 * value['price_per_token']:.3g}" in shown and "2 devices at 1.5 an hour" in shown
    assert json.loads(call(*words, "--json").output)["price_per_token"] is None
    assert "price" not in call(*words).output


def test_a_cache_that_does_not_fit_is_drawn_and_said(tmp_path: Path) -> None:
    path = tmp_path / "roof.html"
    result = call("roofline", "llama-2-7b", "t4", "--batch", "8", "--context", "2048", "--report", path)
    assert "6.31 GiB missing" in said(result) and "contexts of 433 tokens" in said(result)
    page = path.read_text(encoding="utf-8")
    drawn = json.loads(gzip.decompress(base64.b64decode(re.search(r"id=figures>([^<]+)<", page).group(1))))
    assert "GiB too much" in json.dumps(drawn["memory"])


@pytest.mark.parametrize("name", FORMS)
def test_every_lens_can_be_written(name: str) -> None:
    case = Case.of("llama-2-7b", "a100", Rows.decode(4, 1024))
    found = compare(lens_of({"skip": "skip:16"}.get(name, name), case), case)
    assert found.after.seconds > 0
    assert found.name


def test_numbers_reach_their_lens() -> None:
    case = Case.of("llama-2-7b", "a100", Rows.decode(4, 1024))
    assert lens_of("gqa:8", case).kv_heads == 8
    assert (lens_of("spec:3,0.5", case).k, lens_of("spec:3,0.5", case).acceptance) == (3, 0.5)
    assert lens_of("tp:4", case).devices == 4
    assert lens_of("batch:16", case).factor == 16
    assert lens_of("prune:0.25", case).keep == 0.25


def test_the_list_names_all_devices_models_and_lenses() -> None:
    shown = call("roofline", "--list").output
    for name in (*hardware.names(), *shapes.names(), *FORMS):
        assert re.search(rf"^{re.escape(name)}\b", shown, re.MULTILINE), name


def test_the_roofline_page_is_whole_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    path = tmp_path / "roof.html"
    result = call("roofline", "llama-2-7b", "t4", "--lens", "int4", "--report", path)
    assert result.exit_code == 0, result.output
    page = path.read_text(encoding="utf-8")
    drawn = json.loads(gzip.decompress(base64.b64decode(re.search(r"id=figures>([^<]+)<", page).group(1))))
    assert set(drawn) == {"roofline", "time", "energy", "memory", "techniques"}
    for figure in drawn.values():
        assert set(figure["specs"]) == {"light", "dark"}
        assert figure["specs"]["light"]["config"]["background"] != figure["specs"]["dark"]["config"]["background"]
    assert all(f'data-figure="{name}"' in page for name in drawn)
    assert "default-src 'none'" in page
    assert "vegaEmbed" in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page.partition("<script>")[0])
    assert "gate_up_proj" in page


@pytest.mark.parametrize("value", [0.0, 1.0, 999.6, 1000.0, 13.2e9, 9.999e11, 3e15])
def test_quantities_have_a_prefix_and_three_digits(value: float) -> None:
    number, _, unit = roofs.quantity(value, "B").partition(" ")
    factor = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit.removesuffix("B")]
    assert float(number.replace(",", "")) * factor == pytest.approx(value, rel=0.006)
    assert "e" not in number


# -------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(("words", "wrong"), [
    ([*SIM, "--victim", "most_block"], "Did you mean 'most_blocks'"),
    ([*SIM[:5], "--rate", "-1"], "rate=-1.0"),
    ([*SIM[:5], "--cv", "-1"], "cv=-1.0"),
    ([*SIM[:5], "-n", "0"], "n=0"),
    ([*SIM[:5], "--prompt-len", "gauss:1,2"], "is not a length model"),
    ([*SIM[:5], "--like", "azure"], "azure-conv-2023"),
    ([*SIM, "--like", "azure-conv-2023"], "Leave --prompt-len or --like out"),
    ([*SIM[:5], "--workload-file", "/nowhere/t.csv"], "cannot be read"),
    ([*SIM[:5], "--workload-file", __file__], "is the beginning of no format"),
    ([*SIM, "--trace", "/nowhere/t.jsonl"], "cannot be written"),
    ([*SIM, "--report", "/nowhere/r.html"], "cannot be written"),
    (["sim", "--model", "llama-2-70b"], "its weights need"),
    (["sim", "--model", "lama-2-7b", "-n", "1"], "llama-2-7b"),
    (["sim", "--hardware", "h300", "-n", "1"], "hardware='h300'"),
    (["sim", "--hardware", "nowhere.json", "-n", "1"], "no such profile"),
    (["compare", "/nowhere/a.jsonl", "/nowhere/b.jsonl"], "does not exist"),
    ([*GRID, "--set", "ordering"], "is not NAME=A,B"),
    ([*GRID, "--set", "odering=fcfs"], "Did you mean 'ordering'"),
    ([*GRID, "--set", "num_blocks=many"], "must be a number (int)"),
    ([*GRID, "--backend", "clouds"], "backend='clouds'"),
    ([*GRID, "--jobs", "0"], "workers=0"),
    ([*GRID, "--set", "trace=a.jsonl"], "set='trace'"),
    (["roofline", "lama", "t4"], "unknown model shape 'lama'"),
    (["roofline", "llama-2-7b", "h300"], "unknown hardware 'h300'"),
    (["sim", "-n", "2", "--speculate", "0.8,x"], "speculation='0.8,x': are no numbers"),
    (["sim", "-n", "2", "--speculate", "1.5"], "must be probabilities"),
    (["sim", "-n", "2", "--speculate", "0.8@lama-9b"], "speculation='lama-9b'"),
    (["sim", "-n", "2", "--speculate", "llama-3.2-1b"], "--speculate 0.8,0.7@llama-3.2-1b"),
    (["roofline", "--batch", "0"], "batch=0"),
    (["roofline", "--price", "-1"], "price_per_hour must be a finite number of at least 0, got -1.0"),
    (["roofline", "--dtype", "fp8", "llama-2-7b", "t4"], "has no fp8 unit"),
    (["roofline", "--lens", "int5"], "Did you mean 'int8' or 'int4'"),
    (["roofline", "--lens", "skip"], "Write skip:LAYERS"),
    (["roofline", "--lens", "gqa:x"], "needs numbers"),
    (["roofline", "--lens", "skip:99"], "1..32"),
    (["profile", "-o", "p.txt"], "a profile is a .json file"),
    (["profile", "-o", "/nowhere/p.json"], "cannot be written"),
    (["profile", "--kernels", "fast"], "kernels='fast'"),
], ids=str)  # fmt: skip
def test_mistakes_end_with_a_sentence_and_exit_code_2(words: list[str], wrong: str) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert wrong in said(result)
    assert "Traceback" not in result.output


def test_drafts_of_a_simulation_hold_as_often_as_they_are_said_to() -> None:
    def metrics(*words: str) -> dict[str, float]:
        return json.loads(call("sim", "-n", "8", "--hardware", "a100", "--json", *words).output)["metrics"]

    plain, drafted, never = metrics(), metrics("--speculate", "1,1@llama-3.2-1b"), metrics("--speculate", "0@llama-3.2-1b")
    assert 2 * drafted["num_steps"] < plain["num_steps"] and (drafted["acceptance_rate"], never["acceptance_rate"]) == (1, 0)
    assert drafted["mean_tpot"] < plain["mean_tpot"] < never["mean_tpot"]


def test_every_field_that_shapes_a_simulation_is_an_option() -> None:
    of_real_runs = {"executor", "device", "kernels", "num_threads", "random_weights", "trace", "layer_window", "acceptance",
                    "on_device_loss"}  # fmt: skip
    assert set(simulating.FIELDS) == set(EngineConfig.__struct_fields__) - of_real_runs


# -------------------------------------------------------------------------------------------- profile
def test_a_profile_is_measured_and_simulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from llmlab.execution import profiling
    from llmlab.models.checkpoint import save_random_model
    from llmlab.models.shapes import from_hf_config

    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 96, "max_position_embeddings": 256,
              "tie_word_embeddings": True}  # fmt: skip
    fewer = {"POINT_SECONDS": 0.002, "MIN_REPEATS": 2, "TOKENS": (1, 4, 64), "QUERIES": (1, 8), "CONTEXTS": (0, 64), "EMITS": (1, 8),
             "DECODE_CONTEXTS": (0, 64), "PRODUCT_ROWS": (1, 16), "PRODUCTS": ((64, 64), (64, 256)), "MOVED_BLOCKS": (1, 8)}  # fmt: skip
    for name, value in fewer.items():
        monkeypatch.setattr(profiling, name, value)
    probe = profiling.probe
    monkeypatch.setattr(profiling, "probe", lambda profile: probe(profile, 0.05))
    model, threads = save_random_model(from_hf_config(config), tmp_path / "tiny"), torch.get_num_threads()
    try:
        result = call("profile", "--device", "cpu", "--model", model, "--threads", "1", "--kernels", "torch", "-o", tmp_path / "p.json")
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "Measured on this machine" in result.output
    assert "tiny, fp32, kernels torch" in result.output
    shown = call("sim", "--hardware", tmp_path / "p.json", "--model", "tiny", "-n", "3", "--prompt-len", "9", "--output-len", "3", "--num-blocks", "64")
    assert shown.exit_code == 0, shown.output
    assert "p.json, nothing was measured" in said(shown)
