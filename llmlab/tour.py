"""The tour: mixed requests through the real engine and a KV pool that is too small, told as it happens.

    problems -> rehearsal (simulated, chooses the pool) -> engine -> trace file -> everything that is said

What is said after the run is read back from the trace file: answers, timeline, metrics, `why`, replay.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llmlab import tasks
from llmlab.cli import tables
from llmlab.cli.console import command_line, listening, shortened, working
from llmlab.cli.options import as_words
from llmlab.cli.progress import following
from llmlab.cli.timeline import Timeline
from llmlab.config import EngineConfig, engine_config
from llmlab.engine import Engine
from llmlab.events.why import count, seconds
from llmlab.tasks.base import Problem, answer_part
from llmlab.types import SamplingParams

if TYPE_CHECKING:
    from llmlab.events.trace import Run

REQUESTS_A_PREEMPTION = 4  # six preemptions for 24 requests: several, but few enough to read about
TRACE_FILE, REPORT_FILE = "trace.jsonl.zst", "report.html"
CONTROL_WORDS = ("<fast>", "<slow>", "<think>", "<chat>", "<doc>", "<ans>")


class Choices(NamedTuple):
    """What the visitor chose. `engine`: the fields of EngineConfig that were given."""

    requests: int = 24
    out: Path = Path("llmlab-tour")
    report: bool = True
    engine: Mapping[str, Any] = {}

    @property
    def trace(self) -> Path:
        return self.out / TRACE_FILE


class Guest(NamedTuple):
    """One request of the tour: what it asks, its tokens, the longest answer it may give, and the length of a
    teacher's answer (tokens), which is what the rehearsal expects."""

    problem: Problem
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    expected_tokens: int


class Pool(NamedTuple):
    """A KV pool: its size, and what the rehearsal predicts for it (None: no rehearsal chose it)."""

    num_blocks: int
    block_size: int
    rehearsed_preemptions: int | None


class Answer(NamedTuple):
    """What a request came to."""

    request: str
    problem: Problem
    text: str
    right: bool


def take_tour(choices: Choices, console: Console) -> bool:
    """The whole tour, printed to `console`; trace and report go to `choices.out`. False if Ctrl-C ended it.

    Raises ConfigError, ModelError, RequestError, OSError.
    """
    config = engine_config(**{"log_level": 3, **choices.engine})
    console.print(f"\n[bold]llmlab[/bold]: {count(choices.requests, 'request')}, one engine, a small KV pool", style="cyan")
    with working(f"Loading {config.model} (kernels are compiled the first time)"):
        guests = invite(config, choices.requests)
        pool = pool_for(config, guests)
        choices.out.mkdir(parents=True, exist_ok=True)
        warm_up(config)
        engine = Engine(_tour_config(config, pool, choices.trace))
    with engine:
        _heading(console, 1, "What runs where")
        console.print(tables.facts_table(setup_facts(engine, guests, pool)))
        _heading(console, 2, "Serving")
        texts = serve(engine, guests, console)
    if texts is None:
        return False
    _tell(choices, console, [Answer(name, guest.problem, text, tasks.verify(guest.problem, text))
                             for guest, (name, text) in zip(guests, texts.items(), strict=True)])  # fmt: skip
    return True


def _tour_config(config: EngineConfig, pool: Pool, trace: Path) -> EngineConfig:
    return msgspec.structs.replace(config, num_blocks=pool.num_blocks, trace=str(trace))


def warm_up(config: EngineConfig) -> None:
    """Serve two short requests that nobody sees: kernels are compiled in the first step of a process, and that
    would be blamed on the first guests."""
    blocks = -(-64 // config.block_size) + 1
    with Engine(msgspec.structs.replace(config, num_blocks=blocks, max_model_len=None, log_level=0)) as engine:
        for length in (5, 40):
            engine.add_request({"prompt_token_ids": [1] * length}, SamplingParams(max_tokens=4, temperature=0.0))
        while engine.has_unfinished_requests():
            engine.step()


# --------------------------------------------------------------------------------------- the requests
def invite(config: EngineConfig, num_requests: int) -> list[Guest]:
    """The requests of a seed, in the model's tokens. Raises ModelError if the model has no tokenizer."""
    tokenizer = _tokenizer(config.model)
    guests = []
    for index, problem in enumerate(tasks.tour_problems(config.seed, num_requests)):
        teacher = tasks.suite(problem.suite).demonstrate(problem, random.Random(f"tour-{config.seed}-{index}"))
        most = longest_answer(problem)
        expected = min(most, len(tokenizer.encode(answer_part(teacher.completion), add_special_tokens=False)) + 1)
        guests.append(Guest(problem, tuple(tokenizer.encode(problem.prompt)), most, expected))
    return guests


def _tokenizer(model: str) -> Any:
    from llmlab.models.tokenizer import NoTokenizer, load_tokenizer
    from llmlab.models.zoo import resolve

    found = resolve(model)
    if found.hub_id is not None:
        from llmlab.models.hub import fetch

        return load_tokenizer(fetch(found.hub_id))
    return NoTokenizer(model) if found.directory is None else load_tokenizer(found.directory)


def longest_answer(problem: Problem) -> int:
    """Tokens that an answer to this problem may take: well above what a teacher needs."""
    k, style = int(problem.meta.get("k", 1)), problem.meta.get("style")
    if problem.suite == "doc":
        return 16 * k
    if problem.suite == "chat":
        return 400
    return {"fast": 32, "slow": 80, "think": 180}.get(str(style), 80) * k


# --------------------------------------------------------------------------------------- the rehearsal
def pool_for(config: EngineConfig, guests: Sequence[Guest]) -> Pool:
    """The pool that was asked for, or else the largest one that a rehearsal predicts enough preemptions for.

    The rehearsal is the same scheduler, with its default policies, on the simulated executor; it expects answers
    as long as a teacher's. Larger pools preempt less, so the search halves the range.
    """
    size = config.block_size
    if config.num_blocks is not None:
        return Pool(config.num_blocks, size, None)
    low = max(-(-(len(g.prompt_token_ids) + g.max_tokens) // size) for g in guests) + 1
    high = max(low, sum(-(-(len(g.prompt_token_ids) + g.expected_tokens) // size) for g in guests))
    enough = max(1, len(guests) // REQUESTS_A_PREEMPTION)
    found = Pool(low, size, rehearse(config, guests, low))
    while low < high:
        middle = (low + high + 1) // 2
        preemptions = rehearse(config, guests, middle)
        if preemptions >= enough:
            low, found = middle, Pool(middle, size, preemptions)
        else:
            high = middle - 1
    return found


def rehearse(config: EngineConfig, guests: Sequence[Guest], num_blocks: int) -> int:
    """Preemptions with a pool of `num_blocks` if every answer were as long as a teacher's."""
    plain = EngineConfig(model="lab-s", executor="sim", hardware="cpu-2core", num_blocks=num_blocks, log_level=1,
                         block_size=config.block_size, max_num_batched_tokens=config.max_num_batched_tokens,
                         max_num_seqs=config.max_num_seqs, check_interval=0)  # fmt: skip
    with Engine(plain) as engine:
        for guest in guests:
            ids = [token % engine.model.vocab_size for token in guest.prompt_token_ids]
            engine.add_request({"prompt_token_ids": ids}, SamplingParams(max_tokens=guest.max_tokens, temperature=0.0),
                               metadata={"output_len": guest.expected_tokens})  # fmt: skip
        while engine.has_unfinished_requests():
            engine.step()
        return engine.metrics.result().num_preemptions


# ----------------------------------------------------------------------------------- 1 and 2: serving
def setup_facts(engine: Engine, guests: Sequence[Guest], pool: Pool) -> list[tables.Fact]:
    """What runs where, in a few lines."""
    Fact = tables.Fact
    where = engine.executor.describe()
    kinds = Counter(_KINDS[guest.problem.suite] for guest in guests)
    wanted = sum(len(g.prompt_token_ids) + g.expected_tokens for g in guests)
    chosen = "as asked for" if pool.rehearsed_preemptions is None else \
        f"chosen by a simulated rehearsal that expects {count(pool.rehearsed_preemptions, 'preemption')}"
    config = engine.config
    return [
        Fact("model", f"{engine.model.name}, {engine.model.shape.num_params():,} parameters in "
                      f"{engine.model.shape.num_layers} layers{_card_note(config)}"),
        Fact("machine", f"{where['device']}, {count(where['threads'], 'thread')} on {count(where['cores'], 'core')}, "
                        f"{where['dtype']}, torch {where['torch']}"),
        Fact("kernels", _kernels_line(engine)),
        Fact("requests", ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in kinds.items()) + ", all at once"),
        Fact("KV pool", f"{pool.num_blocks} blocks x {pool.block_size} = {pool.num_blocks * pool.block_size:,} tokens "
                        f"for about {wanted:,} tokens wanted; {chosen}"),
        Fact("policies", tables.policies_line(config.describe())),
    ]  # fmt: skip


_KINDS = {"arith": "sum", "chat": "chat", "doc": "document"}


def _card_note(config: EngineConfig) -> str:
    """What the model's card says about its training, if it has one and its weights are in use."""
    from llmlab.models.zoo import resolve
    from llmlab.training.cards import load_card

    directory = resolve(config.model).directory
    if config.random_weights:
        return ", random weights"
    if directory is None or not (directory / "card.json").exists():
        return ""
    return f", trained on {load_card(directory).tokens / 1e6:,.0f} M tokens"


def _kernels_line(engine: Engine) -> str:
    described = engine.executor.describe()["kernels"]
    chosen = described if isinstance(described, str) else ", ".join(map(str, described))
    return engine.chosen or f"{chosen} (`{command_line('kernels')}` says why)"


def serve(engine: Engine, guests: Sequence[Guest], console: Console) -> dict[str, str] | None:
    """Answers by request id, in the order of the guests; None after Ctrl-C, when everything was aborted."""
    texts = {_ask(engine, guest): "" for guest in guests}
    finished = 0
    with listening() as interrupt, following(engine, len(guests), console, plain=True) as progress:
        while engine.has_unfinished_requests():
            if interrupt.pressed:
                _abort(engine, texts)
                return None
            for output in engine.step():
                texts[output.request_id] = output.outputs[0].text
                finished += output.finished
            progress.step(finished)
    m = engine.metrics.result()
    console.print(f"{count(m.num_finished, 'request')} and {m.output_tokens:,} tokens of answers in {seconds(m.duration)} and "
                  f"{count(m.num_steps, 'step')}; {count(m.num_preemptions, 'preemption')}.")  # fmt: skip
    return texts


def _ask(engine: Engine, guest: Guest) -> str:
    return engine.add_request({"prompt_token_ids": guest.prompt_token_ids}, SamplingParams(max_tokens=guest.max_tokens, temperature=0.0))


def _abort(engine: Engine, names: Iterable[str]) -> None:
    """End everything, and collect what is still in flight."""
    for name in names:
        engine.abort(name)
    while engine.has_unfinished_requests():
        engine.step()


# ------------------------------------------------------------------------------ 3 to 8: what happened
def _tell(choices: Choices, console: Console, answers: Sequence[Answer]) -> None:
    from llmlab.events.trace import Run

    with working("Reading the trace back"):
        run = Run.load(choices.trace)
    late = lateness(run)
    _heading(console, 3, "Answers")
    console.print(answer_table(run, answers, console))
    console.print(score_line(answers))
    _heading(console, 4, "Timeline")
    console.print(Timeline.of(run))
    _heading(console, 5, f"Metrics, {tables.measured_or_simulated(run)}")
    console.print(tables.metrics_and_latencies(run, console.width))
    _heading(console, 6, f"Why was {late[0]} late?")
    console.print(tables.why_text(run.why(late[0])))
    _heading(console, 7, "Replay")
    console.print(replay_line(run))
    _heading(console, 8, "Your turn")
    for words, meaning in your_turn(choices, run, late):
        console.print(f"  [bold]{escape(command_line(*words))}[/bold]", soft_wrap=True)
        console.print(f"      {meaning}", style="dim")
    _files(choices, console, run, answers)


def _heading(console: Console, number: int, title: str) -> None:
    console.print()
    console.rule(f"[bold]{number}  {escape(title)}[/bold]", align="left", style="cyan")


def lateness(run: Run) -> list[str]:
    """The requests, the most interesting late one first: preempted ones before others, then by latency."""
    def key(name: str) -> tuple[bool, float]:
        return run.requests[name].num_preemptions > 0, run.requests[name].e2e or 0.0

    return sorted(run.requests, key=key, reverse=True)


def answer_table(run: Run, answers: Sequence[Answer], console: Console) -> Table:
    """One row a request: what was asked, what came, whether it is right, and what it went through."""
    plain = not console.encoding.lower().startswith("utf")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    for name in ("id", "asked", "answered", "ok", "cached", "preempt", "latency"):
        wide = name in ("asked", "answered")
        table.add_column(name, ratio=1 if wide else None, no_wrap=True, overflow="ellipsis",
                         justify="left" if wide or name in ("id", "ok") else "right")  # fmt: skip
    for answer in answers:
        m = run.requests[answer.request]
        tick = Text(_TICKS[plain][answer.right], "bold green" if answer.right else "bold red")
        table.add_row(Text(answer.request, "cyan"), Text(asked(answer.problem)), Text(answered(answer)), tick,
                      f"{m.num_cached_tokens or ''}", f"{m.num_preemptions or ''}",
                      "-" if m.e2e is None else seconds(m.e2e))  # fmt: skip
    return table


_TICKS = {False: {True: "✓", False: "✗"}, True: {True: "y", False: "n"}}


def asked(problem: Problem) -> str:
    """The question, without control words; of a document its last sentence, where the question stands."""
    text = problem.prompt
    for word in CONTROL_WORDS:
        text = text.replace(word, "")
    if problem.suite == "doc":
        return f"…{text[text.rfind('.') + 1 :].strip()}"
    return text


def answered(answer: Answer) -> str:
    """The model's own answer, shortened to what counts; beside a wrong one, the right one."""
    text = answer_part(answer.text)
    if answer.problem.suite == "arith" and "#" in text:
        text = text.rpartition("#")[2]
    said = shortened(text, 60) or "(nothing)"
    return said if answer.right or not answer.problem.gold else f"{shortened(said, 10)}, not {answer.problem.gold}"


def score_line(answers: Sequence[Answer]) -> str:
    """How many answers are right, by kind."""
    kinds = {kind: [a.right for a in answers if a.problem.suite == suite] for suite, kind in _KINDS.items()}
    parts = ", ".join(f"{kind}s {sum(right)}/{len(right)}" for kind, right in kinds.items() if right)
    return f"{sum(a.right for a in answers)} of {len(answers)} verified as right ({parts})."


def replay_line(run: Run) -> str:
    """Replay the trace both ways and say what came of it."""
    from llmlab.cli.replays import agreement, first_divergence

    with working("Replaying"):
        wrong, divergence = run.verify(), first_divergence(run)
    if wrong:
        return f"View replay DIFFERS: {escape(wrong[0])}"
    if divergence is not None:
        return f"Decision replay DIFFERS in step {divergence.step}: {escape(str(divergence.replayed))}"
    return agreement(run)


def your_turn(choices: Choices, run: Run, late: Sequence[str]) -> list[tuple[list[object], str]]:
    """Commands to try next, with what they do."""
    other = "most_blocks" if run.started.config["victim"] != "most_blocks" else "last_come"
    engine = {**choices.engine, "victim": other}
    again: list[object] = ["tour", *as_words(engine), "--out", f"{choices.out}-{other.replace('_', '-')}"]
    if choices.requests != Choices().requests:
        again += ["--requests", choices.requests]
    return [
        (["why", choices.trace, late[min(1, len(late) - 1)]], "the same question about another request"),
        (["trace", "replay", choices.trace, "--victim", other], "where would this policy have chosen another victim?"),
        (again, "the same requests and pool with that policy, for real"),
    ]


def _files(choices: Choices, console: Console, run: Run, answers: Sequence[Answer]) -> None:
    console.print(f"\nTrace:  [bold]{escape(str(choices.trace))}[/bold]", soft_wrap=True)
    if choices.report:
        with working("Writing the report"):
            path = write_tour_report(choices, run, answers)
        console.print(f"Report: [bold]{escape(str(path))}[/bold]", soft_wrap=True)


def write_tour_report(choices: Choices, run: Run, answers: Sequence[Answer]) -> Path:
    """The HTML report of the run."""
    from llmlab.ui.report import write_report

    path = choices.out / REPORT_FILE
    write_report(run, path, texts={a.request: a.text for a in answers}, why=run.why(lateness(run)[0]).sentences,
                 prompts={a.request: a.problem.prompt for a in answers},
                 verdicts={a.request: a.right for a in answers})  # fmt: skip
    return path
