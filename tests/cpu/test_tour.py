"""The tour on the real engine: a small model and a handful of requests, from the first line to the files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from llmlab import tasks, tour
from llmlab.cli.app import app
from llmlab.config import EngineConfig
from llmlab.events.trace import Run
from llmlab.tasks.arith import parse
from llmlab.training import lab_tokenizer
from llmlab.types import ModelError

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "vocab_size": 512,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
REQUESTS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with the labs' tokenizer and no weights."""
    directory = tmp_path_factory.mktemp("model") / "lab-tiny"
    lab_tokenizer.save(directory)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    return directory


def call(*words: object, **env: str) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100", "NO_COLOR": "1", **env})


def on(model: Path) -> list[object]:
    return ["--model", model, "--random-weights", "--threads", 1]


@pytest.fixture(scope="module")
def taken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("tour") / "a tour"
    return call("tour", *on(model), "--requests", REQUESTS, "--out", out), out


def commands(result: Result) -> list[list[str]]:
    """The commands of "Your turn", as a shell would read them."""
    turn = result.output[result.output.index("Your turn") :]
    lines = [line.strip() for line in turn.splitlines() if line.strip().startswith(("llmlab ", "python -m llmlab.cli "))]
    return [shlex.split(line.replace("python -m llmlab.cli", "llmlab"))[1:] for line in lines]


def test_the_tour_tells_everything_it_promises(taken: tuple[Result, Path]) -> None:
    result = taken[0]
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for title in ("What runs where", "Serving", "Answers", "Timeline", "Metrics, measured on this machine", "Why was r", "Replay", "Your turn"):
        assert title in said
    assert f"of {REQUESTS} verified as right" in said
    assert "every state hash and every decision agrees" in said
    assert len(re.findall(r"^r\d+ .*[✓✗]", result.output, re.M)) == REQUESTS
    assert "random weights" in said


def test_memory_runs_out_and_the_numbers_are_those_of_the_trace(taken: tuple[Result, Path]) -> None:
    result, out = taken
    run = Run.load(out / tour.TRACE_FILE)
    assert run.metrics.num_preemptions > 0
    assert run.metrics.max_kv_blocks == run.started.config["num_blocks"]
    assert f"{run.metrics.num_preemptions} preemptions." in result.output
    assert f"{len(run.log_events):,} events and {run.metrics.num_steps:,} steps" in " ".join(result.output.split())
    late = tour.lateness(run)
    assert f"Why was {late[0]} late?" in result.output
    assert run.requests[late[0]].num_preemptions > 0


def test_the_report_is_a_page_with_the_answers_verdicts(taken: tuple[Result, Path]) -> None:
    page = (taken[1] / tour.REPORT_FILE).read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html")
    assert len(page) > 100_000


def test_the_printed_commands_work_as_printed(taken: tuple[Result, Path]) -> None:
    why, replay, again = commands(taken[0])
    assert call(*why).output.startswith(why[2])
    replayed = call(*replay)
    assert replayed.exit_code == 0, replayed.output
    assert "victim=most_blocks" in replayed.output
    second = call(*again, "--no-report")
    assert second.exit_code == 0, second.output
    first, other = (Run.load(Path(out) / tour.TRACE_FILE) for out in (taken[1], again[again.index("--out") + 1]))
    assert other.started.config["victim"] == "most_blocks"
    assert other.started.config["num_blocks"] == first.started.config["num_blocks"]
    asked = [[e.spec.prompt_token_ids for e in run.events("RequestArrived")] for run in (first, other)]
    assert asked[0] == asked[1]


def test_the_tour_obeys_its_options(model: Path, tmp_path: Path) -> None:
    result = call("tour", *on(model), "--requests", 3, "--num-blocks", 40, "--overlap", 1, "--composer", "prefill_first", "--seed", 3,
                  "--no-report", "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    config = Run.load(tmp_path / tour.TRACE_FILE).started.config
    assert [config[name] for name in ("num_blocks", "overlap_depth", "composer", "seed")] == [40, 1, "prefill_first", 3]
    assert not (tmp_path / tour.REPORT_FILE).exists()
    assert "as asked for" in result.output


@pytest.mark.parametrize(("words", "said"), [(["--num-blocks", 1], "prompt"), (["--model", "lab-nothing"], "unknown model"),
                                             (["--victim", "nobody"], "victim='nobody'")])  # fmt: skip
def test_a_tour_that_cannot_start_says_why(model: Path, tmp_path: Path, words: list[object], said: str) -> None:
    result = call("tour", *on(model), "--out", tmp_path / "t", *words)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_bad_card_is_named(model: Path, tmp_path: Path) -> None:
    carded = shutil.copytree(model, tmp_path / "model")
    assert tour._card_note(EngineConfig(model=str(carded))) == ""
    (carded / "card.json").write_text("{")
    with pytest.raises(ModelError, match=r"card\.json"):
        tour._card_note(EngineConfig(model=str(carded)))


def test_the_rehearsal_is_monotone_enough_to_find_a_pool(model: Path) -> None:
    config = EngineConfig(model=str(model))
    guests = tour.invite(config, 12)
    pool = tour.pool_for(config, guests)
    assert pool.rehearsed_preemptions == tour.rehearse(config, guests, pool.num_blocks) >= 3
    roomy = sum(-(-(len(g.prompt_token_ids) + g.expected_tokens) // 16) for g in guests) + len(guests)
    assert tour.rehearse(config, guests, roomy) == 0
    assert tour.pool_for(config, tour.invite(config, 12)) == pool  # the same seed, the same pool


def test_a_right_answer_gets_a_tick_and_a_wrong_one_the_truth() -> None:
    problem = parse("37*46-23*58?")
    right, wrong = tour.Answer("r0", problem, "37*46=1702;...#368", True), tour.Answer("r1", problem, "...#369", False)
    assert tour.answered(right) == "368"
    assert tour.answered(wrong) == "369, not 368"
    assert tour.score_line([right, wrong]) == "1 of 2 verified as right (sums 1/2)."
    assert tasks.verify(problem, right.text)
    assert not tasks.verify(problem, wrong.text)


def test_run_with_the_real_engine(model: Path, tmp_path: Path) -> None:
    args = ["run", *on(model), "--max-tokens", 5, "--ignore-eos", "--trace", tmp_path / "t.jsonl.zst", "--report", tmp_path / "r.html"]
    result = call(*args, "--json", "3*4?", "tell me about the river")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    assert [r["prompt"] for r in records] == ["3*4?", "tell me about the river"]
    assert [len(r["token_ids"]) for r in records] == [5, 5]
    assert "(measured)" in result.output
    assert (tmp_path / "r.html").stat().st_size > 100_000
    assert Run.load(tmp_path / "t.jsonl.zst").verify() == []
    plain = call("run", *on(model), "--max-tokens", 5, "--ignore-eos", "3*4?").output.splitlines()
    assert plain[0] == records[0]["text"]


def test_chat_uses_the_models_template(model: Path) -> None:
    result = call("run", *on(model), "--max-tokens", 2, "--ignore-eos", "--json", "--chat", "hello")
    record = json.loads(next(line for line in result.output.splitlines() if line.startswith("{")))
    assert record["metrics"]["num_prompt_tokens"] == 4  # <bos><chat>hello<ans>


def test_export_writes_a_report(taken: tuple[Result, Path], tmp_path: Path) -> None:
    result = call("trace", "export", taken[1] / tour.TRACE_FILE, "-o", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "r.html").stat().st_size > 100_000


def test_kernels_says_what_runs_here() -> None:
    assert "implementation" in call("kernels").output
    value = json.loads(call("kernels", "--kernels", "torch", "--json").output)
    assert value[0]["implementation"] == "torch"
    assert call("kernels", "--kernels", "magic").exit_code == 2


def test_the_setup_names_model_machine_and_pool(taken: tuple[Result, Path]) -> None:
    said = " ".join(taken[0].output.split())
    blocks = Run.load(taken[1] / tour.TRACE_FILE).started.config["num_blocks"]
    assert f"{blocks} blocks x 16 = {blocks * 16:,} tokens" in said
    assert "lab-tiny" in said
    assert "1 thread on" in said


def test_a_narrow_or_plain_terminal_gets_a_table_that_fits(taken: tuple[Result, Path]) -> None:
    import io

    run = Run.load(taken[1] / tour.TRACE_FILE)
    problems = tasks.tour_problems(0, REQUESTS)
    answers = [tour.Answer(name, p, "#1", False) for name, p in zip(run.requests, problems, strict=True)]
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(file=file, width=80)
    console.print(tour.answer_table(run, answers, console))
    file.flush()
    lines = file.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert len(lines) == REQUESTS + 1
