"""`llmlab why` and `llmlab trace info|replay|export`: questions to a recorded run."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.cli.options import engine_options

if TYPE_CHECKING:
    from llmlab.cli.replays import Divergence
    from llmlab.events.trace import Run

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file: .jsonl, .jsonl.gz or .jsonl.zst.")]
WHY_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab why llmlab-tour/trace.jsonl.zst r17[/cyan]

[cyan]llmlab why llmlab-tour/trace.jsonl.zst r17 --at 1.25[/cyan]   what was it waiting for at that moment?
"""
REPLAY_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab trace replay run.jsonl.zst[/cyan]   are the recorded decisions taken again, are the states the same?

[cyan]llmlab trace replay run.jsonl.zst --victim most_blocks[/cyan]   where would this policy have decided otherwise?
"""
EXPORT_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab trace export run.jsonl.zst -o run.pftrace.json[/cyan]   for ui.perfetto.dev

[cyan]llmlab trace export run.jsonl.zst -o report.html[/cyan]

[cyan]llmlab trace export run.jsonl.zst -o events.csv[/cyan]
"""
REPLAYED_FIELDS = ("ordering", "admission", "composer", "victim", "placement", "eviction", "tiering", "num_blocks",
                   "max_num_batched_tokens", "max_num_seqs")  # fmt: skip


def add_to(app: typer.Typer) -> None:
    app.command(epilog=WHY_EXAMPLES)(why)
    group = typer.Typer(no_args_is_help=True, help="Look at, replay and export a recorded run.")
    group.command()(info)
    group.command(epilog=REPLAY_EXAMPLES)(replay)
    group.command(epilog=EXPORT_EXAMPLES)(export)
    app.add_typer(group, name="trace")


def why(
    trace: TraceFile,
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="The request's id, such as r17.")],
    at: Annotated[float | None, typer.Option(metavar="T", help="A moment of its life, in seconds of the run's clock.")] = None,
) -> None:
    """Why was this request as late as it was? The chain of causes, as sentences."""
    from llmlab.cli.console import stdout
    from llmlab.cli.tables import why_text

    run = load(trace)
    stdout().print(why_text(run.why(request, at)))


def load(path: Path) -> Run:
    """The run in a file; a damaged tail is said on stderr."""
    from llmlab.cli.console import stderr, working
    from llmlab.events.trace import Run

    with working(f"Reading {path}"):
        run = Run.load(path)
    if run.cut:
        stderr().print(f"The end of {path} is missing: {run.cut}. This is what is left.", style="yellow")
    return run


# --------------------------------------------------------------------------------------------- info
def info(
    trace: TraceFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts, metrics and counts as one JSON object.")] = False,
    timeline: Annotated[bool, typer.Option(help="Draw the requests over time.")] = True,
) -> None:
    """What is in a trace: where it was recorded, metrics, events, and a timeline."""
    run = load(trace)
    if as_json:
        _print_json(run)
    else:
        _print_info(run, trace, timeline)


def _print_json(run: Run) -> None:
    import msgspec

    counts = Counter(type(event).__name__ for event in run.log_events)
    value = {"config": run.started.config, "hardware": run.started.hardware, "model": run.started.model["name"],
             "mode": run.mode, "cut": run.cut, "metrics": dict(run.metrics.rows()), "events": counts}  # fmt: skip
    typer.echo(msgspec.json.encode(value).decode())


def _print_info(run: Run, path: Path, timeline: bool) -> None:
    from llmlab.cli import tables
    from llmlab.cli.console import command_line, stdout
    from llmlab.cli.timeline import Timeline

    console = stdout()
    console.print(tables.facts_table(tables.run_facts(run), f"{path}: {len(run.log_events):,} events"))
    console.print(f"\n[bold]Metrics[/bold], {tables.measured_or_simulated(run)}")
    console.print(tables.metrics_and_latencies(run, console.width))
    console.print("\n[bold]Events[/bold]")
    console.print(tables.event_table(run))
    slowest = _slowest(run, 24)
    if timeline and slowest:
        shown = [name for name in run.requests if name in slowest]
        console.print(f"\n[bold]Timeline[/bold]{'' if len(shown) == len(run.requests) else ', the slowest requests'}")
        console.print(Timeline.of(run, shown))
    if slowest:
        console.print("\nAsk why: ", style="bold", end="")
        console.print(command_line("why", path, slowest[0]), markup=False, soft_wrap=True)


def _slowest(run: Run, most: int) -> list[str]:
    """The requests that took longest, the longest first; unfinished ones count as endless."""
    def lateness(name: str) -> float:
        e2e = run.requests[name].e2e
        return float("inf") if e2e is None else e2e

    return sorted(run.requests, key=lateness, reverse=True)[:most]


# ------------------------------------------------------------------------------------------- replay
@engine_options(*REPLAYED_FIELDS, recorded=True)
def replay(trace: TraceFile, *, engine: dict[str, Any]) -> None:
    """Replay a trace from its events alone: no model, no executor.

    View replay: the state folded from the events has every recorded hash. Decision replay: a scheduler that gets the
    recorded arrivals and results decides the same. Exit code 1 if not. With another policy: the first place where it
    would have decided otherwise.
    """
    from llmlab.cli.console import stdout, working
    from llmlab.cli.replays import agreement, first_divergence

    run = load(trace)
    console = stdout()
    if engine:
        changed = ", ".join(f"{name}={value}" for name, value in engine.items())
        with working("Replaying"):
            divergence = first_divergence(run, **engine)
        console.print(f"With {changed}:{' the same would have been decided, to the end.' if divergence is None else ''}", markup=False)
        _print_divergence(divergence)
        return
    with working("Replaying"):
        wrong, divergence = run.verify(), first_divergence(run)
    if not wrong and divergence is None:
        console.print(agreement(run))
        return
    for sentence in wrong[:1]:
        console.print(f"View replay differs ({len(wrong)} times): {sentence}", markup=False)
    _print_divergence(divergence)
    raise typer.Exit(1)


def _print_divergence(divergence: Divergence | None) -> None:
    from rich.padding import Padding

    from llmlab.cli.console import stdout
    from llmlab.cli.tables import bullet
    from llmlab.events.why import seconds

    if divergence is None:
        return
    console = stdout()
    console.print(f"First difference in step {divergence.step}, at {seconds(divergence.t)}:")
    for who, way in (("recorded", divergence.recorded), ("replayed", divergence.replayed)):
        console.print(Padding(bullet(f"{who}: {way}"), (0, 0, 0, 2)))


# ------------------------------------------------------------------------------------------- export
def export(
    trace: TraceFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="The suffix says what: .pftrace or .json (Perfetto), "
                                         ".html (report), .csv (events), .jsonl[.gz|.zst] (trace).")],
) -> None:  # fmt: skip
    """Write a trace as a Perfetto timeline, an HTML report, a table of events, or another trace."""
    from llmlab.cli.console import stderr, working
    from llmlab.types import unknown_name

    writer = next((write for suffix, write in WRITERS.items() if output.name.endswith(suffix)), None)
    if writer is None:
        raise unknown_name("output", output.suffix or output.name, WRITERS)
    run = load(trace)
    with working(f"Writing {output}"):
        writer(run, output)
    stderr().print(f"Wrote {output}", markup=False)


def _write_perfetto(run: Run, path: Path) -> None:
    run.to_perfetto(path)


def _write_html(run: Run, path: Path) -> None:
    from llmlab.ui.report import write_report

    write_report(run, path)


def _write_trace(run: Run, path: Path) -> None:
    run.save(path)


def _write_csv(run: Run, path: Path) -> None:
    """One row an event: the header's fields, and the rest as JSON."""
    import msgspec

    header = ("seq", "t", "step", "instance", "request", "cause")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["event", *header, "details"])
        for event in run.log_events:
            details = {name: value for name, value in msgspec.to_builtins(event).items() if name not in (*header, "event")}
            values = [getattr(event, name) for name in header]
            writer.writerow([type(event).__name__, *values, msgspec.json.encode(details).decode()])


WRITERS: Mapping[str, Callable[[Any, Path], None]] = {
    ".html": _write_html, ".csv": _write_csv, ".jsonl": _write_trace, ".jsonl.gz": _write_trace,
    ".jsonl.zst": _write_trace, ".pftrace": _write_perfetto, ".json": _write_perfetto,
}  # fmt: skip
