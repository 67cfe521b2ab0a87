"""`llmlab run`: prompts, or a drawn workload, through one engine."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from llmlab.cli.options import engine_options

if TYPE_CHECKING:
    from llmlab.cli.answers import Answers, Asked
    from llmlab.cli.jobs import Job
    from llmlab.cli.progress import RunProgress
    from llmlab.config import EngineConfig
    from llmlab.engine import Engine
    from llmlab.events.metrics import RunMetrics
    from llmlab.events.trace import Run
    from llmlab.types import SamplingParams

_WHAT, _SAMPLING, _DRAWN = "What to run", "Sampling", "A drawn workload instead of prompts"
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab run '37*46-23*58?'[/cyan]

[cyan]llmlab run --chat --stream --max-tokens 200 'describe the harbor'[/cyan]

[cyan]llmlab run --speculate lab-xs --draft-tree 2x2x1 --temperature 0 '37*46-23*58?'[/cyan]

[cyan]llmlab run --file prompts.jsonl --json --num-blocks 64 --victim most_blocks --trace run.jsonl.zst[/cyan]

[cyan]cat prompts.txt | llmlab run --file - --model ./my-model --dtype bfloat16[/cyan]

[cyan]llmlab run --executor sim --hardware a100 --model llama-2-7b --requests 200 --rate 4[/cyan]
"""


class Drawn(NamedTuple):
    """A workload to draw; lengths as the command line writes them."""

    requests: int
    rate: float | None
    prompt_len: str
    output_len: str
    shared_prefix: int


class Output(NamedTuple):
    """What becomes of a run."""

    as_json: bool
    stream: bool
    drawn: bool
    report: Path | None


class Served(NamedTuple):
    """What was asked and what came, by request id. `whole`: Ctrl-C did not end it."""

    prompts: dict[str, str]
    texts: dict[str, str]
    whole: bool


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(run)


@engine_options()
def run(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPTS", help="Prompts, one an argument.")] = None,
    file: Annotated[str | None, typer.Option("--file", "-F", help="One prompt a line, or .jsonl; - is stdin.", rich_help_panel=_WHAT)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask each prompt as a user's message.", rich_help_panel=_WHAT)] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.", rich_help_panel=_WHAT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.", rich_help_panel=_WHAT)] = False,
    trace: Annotated[Path | None, typer.Option(help="Write all events: .jsonl, .jsonl.gz or .jsonl.zst.", rich_help_panel=_WHAT)] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report.", rich_help_panel=_WHAT)] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", rich_help_panel=_SAMPLING)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.", rich_help_panel=_SAMPLING)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.", rich_help_panel=_SAMPLING)] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0: all.", rich_help_panel=_SAMPLING)] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the likeliest token.", rich_help_panel=_SAMPLING)] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.", rich_help_panel=_SAMPLING)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end.", rich_help_panel=_SAMPLING)] = False,
    requests: Annotated[int | None, typer.Option(help="Number of requests to draw.", rich_help_panel=_DRAWN)] = None,
    rate: Annotated[float | None, typer.Option(help="Arrivals a second; default: all at once.", rich_help_panel=_DRAWN)] = None,
    prompt_len: Annotated[str, typer.Option(help="128, 16,128 or lognormal:256,1.0.", rich_help_panel=_DRAWN)] = "lognormal:256,1.0",
    output_len: Annotated[str, typer.Option(help="As --prompt-len.", rich_help_panel=_DRAWN)] = "lognormal:64,0.8",
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts share.", rich_help_panel=_DRAWN)] = 0,
    *,
    engine: dict[str, Any],
) -> None:  # fmt: skip
    """Run prompts, a file of prompts or a drawn workload: any model, any policy, real or simulated.

    Answers go to stdout in the order of the prompts, progress goes to stderr.
    """
    from llmlab.config import engine_config
    from llmlab.types import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                              stop=tuple(stop or ()), ignore_eos=ignore_eos)  # fmt: skip
    drawn = None if requests is None else Drawn(requests, rate, prompt_len, output_len, shared_prefix)
    jobs = _jobs(prompts or [], file, sampling, chat, drawn)
    config = engine_config(**engine, trace=None if trace is None else str(trace))
    if not _serve(config, jobs, Output(as_json, stream, drawn is not None, report)):
        raise typer.Exit(130)


def _jobs(prompts: Sequence[str], file: str | None, sampling: SamplingParams, chat: bool,
          drawn: Drawn | None) -> Callable[[Engine], list[Job]]:  # fmt: skip
    """The jobs, as soon as an engine can say how large its vocabulary is; prompts are read and checked now."""
    from llmlab.cli.jobs import jobs_of, workload_jobs
    from llmlab.types import ConfigError

    if drawn is None:
        jobs = jobs_of(prompts, file, sampling, chat)
        return lambda engine: jobs
    if prompts or file is not None:
        raise ConfigError("requests", drawn.requests, "draws a workload, but prompts were given too", "Leave one of them out.")
    return lambda engine: workload_jobs(*drawn, engine.config.seed, engine.model.vocab_size)


def _serve(config: EngineConfig, jobs: Callable[[Engine], list[Job]], output: Output) -> bool:
    """Serve all jobs and print what was asked for; False if Ctrl-C ended it."""
    from llmlab.cli.console import stderr, working
    from llmlab.engine import Engine

    with working(f"Loading {config.model}"):
        engine = Engine(config)
    if engine.chosen:
        stderr().print(engine.chosen, style="dim", markup=False, highlight=False)
    with engine:
        served = _drive(engine, jobs(engine), output)
    if output.drawn and not output.as_json:
        _print_metrics(_recorded(engine))
    if output.report is not None:
        _write_report(_recorded(engine), served, output.report)
    stderr().print(_summary(engine.metrics.result()))
    return served.whole


def _drive(engine: Engine, jobs: Sequence[Job], output: Output) -> Served:
    from llmlab.cli.console import listening
    from llmlab.cli.progress import following

    asked = queue(engine, jobs, skip_refused=output.drawn)
    on_screen = sys.stdout.isatty() and sys.stderr.isatty()
    # A live bar and answers on the same terminal would overwrite each other: hold the answers, or leave the bar out.
    held = io.StringIO() if on_screen and not output.stream else None
    answers = None if output.drawn and not output.as_json else _answers(asked, output, held or sys.stdout)
    bar = nullcontext(None) if on_screen and output.stream else following(engine, len(asked))
    with listening() as interrupt, bar as progress:
        texts: dict[str, str] = {}
        whole = _loop(engine, [a.id for a in asked], texts, answers, progress, lambda: interrupt.pressed)
    if answers is not None:
        answers.close()
    if held is not None:
        sys.stdout.write(held.getvalue())
    return Served({a.id: a.title for a in asked}, texts, whole)


def queue(engine: Engine, jobs: Sequence[Job], skip_refused: bool) -> list[Asked]:
    """Add all jobs. One that is refused is left out with a word on stderr, or else raises RequestError naming it."""
    from llmlab.cli.answers import Asked
    from llmlab.cli.console import stderr
    from llmlab.types import LabError, RequestError

    if engine.config.executor == "sim" and any(job.title for job in jobs):
        raise RequestError("executor", "sim", "a simulation reads no text, it has no tokenizer",
                           "Draw a workload with --requests N, or give prompt_token_ids in a .jsonl file.")  # fmt: skip
    now = engine.clock.now()
    asked: list[Asked] = []
    for job in jobs:
        try:
            name = engine.add_request(job.prompt, job.sampling, arrival=now + (job.arrival or 0.0), metadata=job.metadata)
            asked.append(Asked(name, job.title))
        except LabError as error:
            refused = RequestError(f"{job.source}: {error.field}", error.value, error.problem, error.way_out)
            if not skip_refused:
                raise refused from None
            stderr().print(f"left out: {refused}", style="yellow", markup=False)
    return asked


def _loop(engine: Engine, ids: Sequence[str], texts: dict[str, str], answers: Answers | None,
          progress: RunProgress | None, interrupted: Callable[[], bool]) -> bool:  # fmt: skip
    """Step to the end, or until Ctrl-C: then everything is aborted and the steps in flight are collected."""
    done, aborted = 0, False
    while engine.has_unfinished_requests():
        if interrupted() and not aborted:
            aborted = True
            for name in ids:
                engine.abort(name)
        for output in engine.step():
            done += output.finished
            texts[output.request_id] = output.outputs[0].text
            if answers is not None:
                answers.update(output)
        if progress is not None:
            progress.step(done)
    return not aborted


def _answers(asked: Sequence[Asked], output: Output, out: Any) -> Answers:
    from llmlab.cli.answers import JsonAnswers, TextAnswers

    if output.as_json:
        return JsonAnswers(asked, out, output.stream)
    return TextAnswers(asked, out, output.stream, titles=sys.stdout.isatty() and len(asked) > 1)


def _recorded(engine: Engine) -> Run:
    """The run; from the trace file if the log's ring was too small. Raises TraceError."""
    from llmlab.events.trace import Run

    if engine.log.first_seq > 0 and engine.config.trace is not None:
        return Run.load(engine.config.trace)
    return Run.of(engine.log)


def _print_metrics(run: Run) -> None:
    from llmlab.cli.console import stdout
    from llmlab.cli.tables import measured_or_simulated, metrics_and_latencies

    console = stdout()
    console.print(f"[bold]Metrics[/bold], {measured_or_simulated(run)}")
    console.print(metrics_and_latencies(run, console.width))


def _write_report(run: Run, served: Served, path: Path) -> None:
    from llmlab.cli.console import stderr, working
    from llmlab.ui.report import write_report

    with working("Writing the report"):
        write_report(run, path, texts=served.texts, prompts=served.prompts)
    stderr().print(f"Report: {path}")


def _summary(m: RunMetrics) -> str:
    from llmlab.events.why import count, seconds

    return (f"{count(m.num_finished, 'request')}, {count(m.output_tokens, 'token')} in {seconds(m.duration)}: "
            f"{m.output_throughput:,.0f} tok/s ({m.mode})")  # fmt: skip
