"""`llmlab sim`: what a policy would do on a device that nobody here owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from llmlab.cli.loads import LoadChoice, load_options
from llmlab.cli.options import engine_options

if TYPE_CHECKING:
    from rich.console import Console

    from llmlab.config import EngineConfig
    from llmlab.engine import Engine
    from llmlab.events.metrics import RequestMetrics, RunMetrics
    from llmlab.events.trace import Run
    from llmlab.events.why import Stretch, Why
    from llmlab.workloads.source import Load

FIELDS = ("model", "hardware", "host", "dtype", "quantization", "gpu_memory", "attention_plan", "tensor_parallel_size", "block_size", "num_blocks", "num_host_blocks", "enable_prefix_caching",
          "max_num_batched_tokens", "max_num_seqs", "max_model_len", "overlap_depth", "ordering", "admission", "composer",
          "victim", "placement", "eviction", "tiering", "decoding", "seed", "log_level", "log_capacity", "check_interval",
          "policy_timeout", "num_alternatives", "view_cap", "speculation", "num_speculative_tokens", "draft_tree", "draft_policy", "fixed_rows",
          "weights", "num_expert_slots", "routing")  # fmt: skip
DEFAULTS: Mapping[str, Any] = {"model": "llama-2-7b", "hardware": "t4"}
BRIEF = 3  # stretches of the worst request's life that are told
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab sim[/cyan]   200 requests to Llama-2-7B on a T4

[cyan]llmlab sim --like azure-conv-2023 --rate 1 --hardware a10 --report sim.html[/cyan]

[cyan]llmlab sim --rate 2 --requests 200 --prompt-len lognormal:1020,1.1 --hardware a100 --model llama-2-13b[/cyan]

[cyan]llmlab sim --workload-file AzureLLMInferenceTrace_conv.csv --requests 500 --trace sim.jsonl.zst[/cyan]

[cyan]llmlab sim --ordering my_orders.py:ShortestPrompt[/cyan]   a policy of your own
"""


class Outcome(NamedTuple):
    """What a simulation came to. `run`: None if its beginning fell out of the log's memory. `whole`: Ctrl-C did not
    end it. `wall`: seconds that simulating took here."""

    metrics: RunMetrics
    requests: dict[str, RequestMetrics]
    run: Run | None
    num_blocks: int
    device: str
    whole: bool
    wall: float


class Suggestion(NamedTuple):
    """A command to try next, and what for."""

    command: str
    why: str


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(sim)


@engine_options(*FIELDS, **DEFAULTS)
@load_options
def sim(
    trace: Annotated[Path | None, typer.Option(help="Write all events: .jsonl, .jsonl.gz or .jsonl.zst.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print settings, metrics and every request as one JSON object.")] = False,
    *,
    load: LoadChoice,
    engine: dict[str, Any],
) -> None:
    """Simulate a workload: the real scheduler and memory, on a device's cost model instead of a device.

    Prints the metrics, why the worst request was late, and what to try next. Decisions, blocks and preemptions are the
    engine's own; times come from the cost model, lengths from the workload; nothing is measured.
    """
    from llmlab.cli.plugins import with_plug_ins
    from llmlab.config import engine_config

    workload = load.draw(engine.get("seed", 0))
    fields = with_plug_ins(engine)
    config = engine_config(**fields, executor="sim", trace=None if trace is None else str(trace))
    outcome = simulate(config, workload)
    if as_json:
        _print_json(config, outcome)
    else:
        _print(outcome, repr(workload), config)
        _print_suggestions(list(_suggestions(outcome, engine, load, trace)))
    if report is not None:
        _write_report(outcome, report)
    if not outcome.whole:
        raise typer.Exit(130)


# --------------------------------------------------------------------------------------------- serving
def simulate(config: EngineConfig, workload: Load) -> Outcome:
    """Serve a workload with a progress bar. Ctrl-C ends it after the step in flight, and what there is counts."""
    import time

    from llmlab.cli.console import listening
    from llmlab.cli.progress import following
    from llmlab.engine import Engine
    from llmlab.running import serve

    began = time.perf_counter()
    with Engine(config) as engine, listening() as interrupt, following(engine, len(workload)) as progress:
        done = 0

        def follow(output: Any) -> None:
            nonlocal done
            done += 1
            progress.step(done)
            if interrupt.pressed:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            serve(engine, workload, on_finish=follow)
        engine.settle()
        whole = not interrupt.pressed
    return _outcome(engine, whole, time.perf_counter() - began)


def _outcome(engine: Engine, whole: bool, wall: float) -> Outcome:
    log, trace = engine.log, engine.config.trace
    run = _run(engine) if log.first_seq == 0 or trace is not None else None
    pool = engine.scheduler.memory.pool
    return Outcome(engine.metrics.result(), engine.metrics.requests, run, pool.num_blocks, engine.config.hardware or "t4", whole, wall)


def _run(engine: Engine) -> Run:
    from llmlab.events.trace import Run

    return Run.load(engine.config.trace or "") if engine.log.first_seq > 0 else Run.of(engine.log)


# -------------------------------------------------------------------------------------------- printing
def _print(outcome: Outcome, workload: str, config: EngineConfig) -> None:
    from rich.text import Text

    from llmlab.cli.console import stderr, stdout
    from llmlab.cli.tables import metrics_tables

    console = stdout()
    group = f"{config.tensor_parallel_size} x " if config.tensor_parallel_size > 1 else ""
    console.print(f"[bold]Metrics[/bold], simulated: {config.model} on {group}{outcome.device}, nothing was measured")
    console.print(Text(workload, "dim"), soft_wrap=True)
    console.print(metrics_tables(outcome.metrics, outcome.num_blocks, console.width))
    worst = worst_request(outcome.requests)
    if worst is not None:
        _print_why(console, outcome, worst)
    elif config.log_level < 1:
        console.print("Log level 0 keeps no tokens and no steps: --log-level 1 tells latencies, 2 decisions.", style="yellow")
    rate = outcome.metrics.num_finished / outcome.wall
    stderr().print(Text(f"simulated {outcome.metrics.duration:,.4g} s in {outcome.wall:.2f} s of this machine's "
                        f"({rate:,.0f} requests a second)", "dim"))  # fmt: skip


def worst_request(requests: dict[str, RequestMetrics]) -> str | None:
    """The request that waited longest for its first token."""
    late = {name: m.ttft for name, m in requests.items() if m.ttft is not None}
    return max(late, key=lambda name: late[name]) if late else None


def _print_why(console: Console, outcome: Outcome, name: str) -> None:
    from llmlab.events.why import seconds

    late = seconds(outcome.requests[name].ttft or 0.0)
    console.print(f"\n[bold]The latest first token[/bold]: {name}, {late} after its arrival")
    if outcome.run is None:
        console.print("Why is not known: the log's memory was too small. --trace FILE keeps every event.", style="yellow")
        return
    console.print(why_in_brief(outcome.run.why(name)))


def why_in_brief(why: Why) -> Any:
    """The longest stretches of a request's life in their order, each with its first sentence."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from llmlab.cli.tables import bullet, stretch_title

    longest = sorted(why.stretches, key=lambda s: -s.seconds)[:BRIEF]
    parts: list[Any] = [Text(why.headline)]
    for stretch in [s for s in why.stretches if s in longest]:
        parts.append(stretch_title(stretch))
        parts += [Padding(bullet(sentence), (0, 0, 0, 4)) for sentence in _telling(stretch)]
    return Group(*parts)


def _telling(stretch: Stretch) -> tuple[str, ...]:
    """The sentences that say most about a stretch: who went first, and what the head of the queue lacked."""
    if stretch.kind != "queued":
        return stretch.sentences[:1]
    reasons = [s for s in stretch.sentences if "had to wait" in s]
    return (*stretch.sentences[:1], *[s for s in reasons[-1:] if s != stretch.sentences[0]])


def _print_json(config: EngineConfig, outcome: Outcome) -> None:
    import msgspec

    from llmlab.cli.answers import METRICS

    requests = [{"id": name, **{key: getattr(m, key) for key in METRICS}} for name, m in outcome.requests.items()]
    value = {"mode": outcome.metrics.mode, "config": config.describe(), "num_blocks": outcome.num_blocks,
             "metrics": dict(outcome.metrics.rows()), "worst": worst_request(outcome.requests), "requests": requests}  # fmt: skip
    typer.echo(msgspec.json.encode(value).decode())


def _write_report(outcome: Outcome, path: Path) -> None:
    from llmlab.cli.console import stderr, working
    from llmlab.types import ConfigError
    from llmlab.ui.report import write_report

    if outcome.run is None:
        raise ConfigError("report", str(path), "the beginning of the run fell out of the log's memory",
                          "Give --trace FILE too, or fewer --requests.")  # fmt: skip
    with working("Writing the report"):
        write_report(outcome.run, path)
    stderr().print(f"Report: {path}", markup=False)


# ------------------------------------------------------------------------------------- what to try next
def _suggestions(outcome: Outcome, engine: dict[str, Any], load: LoadChoice, trace: Path | None) -> Iterator[Suggestion]:
    from llmlab.cli.console import command_line
    from llmlab.cli.options import as_words

    chosen = {name: value for name, value in engine.items() if DEFAULTS.get(name) != value}
    again = [*as_words(chosen), *load.words()]
    m, worst = outcome.metrics, worst_request(outcome.requests)
    if trace is None:
        yield Suggestion(command_line("sim", *again, "--trace", "sim.jsonl.zst"), "keep every event: why, fork and replay read it")
    elif worst is not None:
        yield Suggestion(command_line("why", trace, worst), "the whole story")
        step = _step_before(outcome, worst)
        if engine.get("log_level", 2) < 2:
            yield Suggestion(command_line("sim", *_replaced(chosen, load, log_level=2), "--trace", trace), "decisions too: fork and replay need them")
        elif step is not None:
            yield Suggestion(command_line("fork", trace, "--at", step, "--ordering", "sjf_oracle"), "the same history, another order from there")
    larger = _larger_device(outcome.device)
    if larger is not None and (m.num_preemptions or m.num_refused or _waited(m)):
        yield Suggestion(command_line("sim", *_replaced(chosen, load, hardware=larger)), "a device with more memory")
    orders = [] if "ordering" in engine else ["--set", "ordering=fcfs,sjf_oracle"]
    yield Suggestion(command_line("sweep", *again, *orders, "--set", "max_num_batched_tokens=256,512,1024", "--seeds", 3),
                     "does it matter, beyond one seed?")  # fmt: skip


def _replaced(chosen: dict[str, Any], load: LoadChoice, **others: Any) -> list[str]:
    from llmlab.cli.options import as_words

    return [*as_words({**chosen, **others}), *load.words()]


def _waited(m: RunMetrics) -> bool:
    """Whether requests spent most of the time to their first token in the queue."""
    return bool(m.queue_time.mean and m.ttft.mean and m.queue_time.mean > 0.5 * m.ttft.mean)


def _step_before(outcome: Outcome, name: str) -> int | None:
    """The last step that had finished when a request arrived; the first one if none had."""
    arrival = outcome.requests[name].arrival
    ended = [e for e in outcome.run.log_events if type(e).__name__ == "StepFinished"] if outcome.run is not None else []
    before = [e.step for e in ended if e.t <= arrival]
    return before[-1] if before else ended[0].step if ended else None


def _larger_device(name: str) -> str | None:
    """The device of the table with the next larger memory."""
    from roofline import RooflineError, hardware

    try:
        memory = hardware.get(name).memory_bytes
    except RooflineError:  # a profile's machine is in no table
        return None
    larger = [device for device in hardware.table().values() if device.kind == "gpu" and device.memory_bytes > memory]
    return min(larger, key=lambda device: device.memory_bytes).name if larger else None


def _print_suggestions(suggestions: list[Suggestion]) -> None:
    from rich.text import Text

    from llmlab.cli.console import stdout

    console = stdout()
    console.print("\n[bold]What to try next[/bold]")
    for suggestion in suggestions:
        console.print(Text("  ").append(suggestion.command).append(f"   {suggestion.why}", "dim"), soft_wrap=True)
