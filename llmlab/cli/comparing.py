"""`llmlab compare` and `llmlab fork`: two runs side by side, and another future of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from llmlab.cli.options import engine_options
from llmlab.cli.traces import TraceFile
from llmlab.config import SEAM_FIELDS

if TYPE_CHECKING:
    from llmlab.comparing import Comparison
    from llmlab.events.trace import Run
    from llmlab.runs import Run as ForkableRun

QUANTITIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
SAME = 1e-9  # seconds: clocks that were added up in another order
LONGEST_NAME = 16  # that heads a column
CHANGED = 5  # requests at each end of the table of changes
_Report = Annotated[Path | None, typer.Option(help="Write an HTML report.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")]
COMPARE_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab compare tour/trace.jsonl.zst tour-most-blocks/trace.jsonl.zst[/cyan]

[cyan]llmlab compare fcfs.jsonl.zst sjf.jsonl.zst --report fcfs-sjf.html[/cyan]
"""
FORK_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab fork run.jsonl.zst --at 412 --victim most_blocks[/cyan]

[cyan]llmlab fork run.jsonl.zst --at 0 --ordering my_orders.py:ShortestPrompt -o other.jsonl.zst --report fork.html[/cyan]
"""


class Names(NamedTuple):
    """What two runs are called."""

    a: str
    b: str

    @property
    def heads(self) -> Names:
        """Names for the columns of a table: the letters, if one is too long."""
        return self if max(map(len, self)) <= LONGEST_NAME else Names("a", "b")


class Change(NamedTuple):
    """How one request fared in both runs: its end-to-end seconds."""

    request: str
    a: float
    b: float

    @property
    def delta(self) -> float:
        return self.b - self.a


def add_to(app: typer.Typer) -> None:
    app.command(epilog=COMPARE_EXAMPLES)(compare)
    app.command(epilog=FORK_EXAMPLES)(fork)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A trace file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same requests.")],
    report: _Report = None,
    as_json: _AsJson = False,
) -> None:
    """Two runs side by side, request by request: who gained, who lost, and the first decision where they part."""
    from llmlab.cli.traces import load

    _show(load(a), load(b), _names(a, b), report, as_json)


@engine_options(*SEAM_FIELDS, recorded=True)
def fork(
    trace: TraceFile,
    at: Annotated[int, typer.Option(metavar="STEP", help="The last step that both histories share.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The fork's trace; default: beside TRACE.")] = None,
    report: _Report = None,
    as_json: _AsJson = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Continue a recorded run from one step on under other policies, on the simulated executor, and compare.

    Up to that step the recorded decisions are taken again, or the fork is refused. Behind it requests arrive when they
    did and get as many tokens as they got; time is simulated, so compare a fork of a measured run with care. Without
    other policies: the same ones, in simulated time.
    """
    from llmlab.cli.console import command_line, stderr, working
    from llmlab.cli.plugins import with_plug_ins

    run = _forkable(trace)
    output = output or _beside(trace, at, engine)
    with working(f"Forking after step {at}"):
        forked = run.fork(at, **with_plug_ins(engine))
        forked.save(output)
    changed = ", ".join(f"{name}={value}" for name, value in engine.items()) or "the same policies"
    stderr().print(f"Fork after step {at} with {changed}: {output}", markup=False, soft_wrap=True)
    _show(run, forked, Names("recorded", "fork"), report, as_json)
    if not as_json:
        stderr().print(f"Ask it: {command_line('trace', 'info', output)}", style="dim", markup=False, soft_wrap=True)


def _forkable(path: Path) -> ForkableRun:
    from llmlab.cli.traces import load
    from llmlab.runs import Run

    run = load(path)
    return Run(run.log_events, run.cut)


def _beside(trace: Path, at: int, engine: dict[str, Any]) -> Path:
    """run.jsonl.zst -> run-fork-412-most_blocks.jsonl.zst; a class goes by its name."""
    stem, _, _ = trace.name.partition(".jsonl")
    choices = [str(value).rpartition(":")[2] for value in engine.values()]
    return trace.with_name("-".join([stem, "fork", str(at), *choices]) + ".jsonl.zst")


def _names(a: Path, b: Path) -> Names:
    """Shortest names that tell two files apart: their own, or their directories', or the whole paths."""
    for pair in ((a.name, b.name), (a.parent.name, b.parent.name)):
        if pair[0] != pair[1] and all(pair):
            return Names(*(name.partition(".jsonl")[0] for name in pair))
    return Names(str(a), str(b)) if a != b else Names("a", "b")


# -------------------------------------------------------------------------------------------- printing
def _show(a: Run, b: Run, names: Names, report: Path | None, as_json: bool) -> None:
    from llmlab.comparing import compare as compared

    found = compared(a, b)
    if as_json:
        _print_json(found)
    else:
        _print(a, b, names, found)
    if report is not None:
        _write(report, a, b, names, found)


def _print_json(found: Comparison) -> None:
    import msgspec

    ratios = {name: found.mean_ratio(name) for name in QUANTITIES}
    counts = {name: counted(found, name)._asdict() for name in QUANTITIES}
    value = {**msgspec.to_builtins(found), "ratios": {**ratios, "output_throughput": found.throughput_ratio}, "counts": counts}
    typer.echo(msgspec.json.encode(value).decode())


class Counts(NamedTuple):
    """Requests whose latency is smaller, larger and equal in the second run."""

    better: int
    worse: int
    equal: int


def counted(found: Comparison, quantity: str) -> Counts:
    """How many requests gained and lost in `quantity`."""
    deltas = [d for r in found.requests if (d := getattr(r, quantity).delta) is not None]
    better, worse = (sum(1 for d in deltas if sign * d > SAME) for sign in (-1, 1))
    return Counts(better, worse, len(deltas) - better - worse)


def _print(a: Run, b: Run, names: Names, found: Comparison) -> None:
    from rich.text import Text

    from llmlab.cli.console import stdout
    from llmlab.cli.tables import text_table

    console = stdout()
    said = f": a is {names.a} ({found.modes[0]}), b is {names.b} ({found.modes[1]})"
    console.print(Text(f"{len(found.requests)} requests in both runs", "bold").append(said, "not bold"))
    for name, only in ((names.a, found.only_a), (names.b, found.only_b)):
        if only:
            console.print(f"{len(only)} only in {name}: {', '.join(only[:8])}{' ...' if len(only) > 8 else ''}", markup=False)
    if found.modes[0] != found.modes[1]:
        console.print("One was measured and one simulated: a difference may lie in the clock, not in the policy.", style="yellow")
    console.print(text_table(ratio_rows(a, b, names, found)))
    console.print(Text("\n").append(found.parted))
    changed = change_rows(found, names)
    if len(changed) > 1:
        console.print("\n[bold]Requests that changed most[/bold], end to end")
        console.print(text_table(changed))


def ratio_rows(a: Run, b: Run, names: Names, found: Comparison) -> list[list[str]]:
    """Means of both runs, their ratio, and how many requests gained and lost; then what counts for the whole run."""
    rows = [["mean", *names.heads, "b / a", "better", "worse", "equal"]]
    for quantity, title in QUANTITIES.items():
        pairs = [p for r in found.requests if (p := getattr(r, quantity)).delta is not None]
        if pairs:
            means = [_seconds(sum(values) / len(pairs)) for values in (tuple(p.a for p in pairs), tuple(p.b for p in pairs))]
            rows.append([title, *means, _ratio(found.mean_ratio(quantity)), *map(str, counted(found, quantity))])
    m, n = a.metrics, b.metrics
    rows.append(["output tok/s", f"{m.output_throughput:,.1f}", f"{n.output_throughput:,.1f}", _ratio(found.throughput_ratio), "", "", ""])
    rows.append(["preemptions", str(m.num_preemptions), str(n.num_preemptions), "", "", "", ""])
    rows.append(["duration", _seconds(m.duration), _seconds(n.duration), _ratio(n.duration / m.duration if m.duration else None), "", "", ""])
    return rows


def change_rows(found: Comparison, names: Names) -> list[list[str]]:
    """The requests that gained and lost most, end to end; a head only if nothing changed."""
    changes = [Change(r.request, r.e2e.a, r.e2e.b) for r in found.requests if r.e2e.a is not None and r.e2e.b is not None]
    changes = sorted((c for c in changes if abs(c.delta) > SAME), key=lambda c: c.delta)
    ends = changes if len(changes) <= 2 * CHANGED else changes[:CHANGED] + changes[-CHANGED:]
    preemptions = {r.request: r.preemptions for r in found.requests}
    return [["request", *names.heads, "change", "preemptions"], *(_change_row(c, preemptions[c.request]) for c in ends)]


def _change_row(change: Change, preemptions: Any) -> list[str]:
    sign = "-" if change.delta < 0 else "+"
    return [change.request, _seconds(change.a), _seconds(change.b), sign + _seconds(abs(change.delta)),
            f"{preemptions.a:g} → {preemptions.b:g}"]  # fmt: skip


def _seconds(value: float) -> str:
    from llmlab.events.why import seconds

    return seconds(value)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _write(path: Path, a: Run, b: Run, names: Names, found: Comparison) -> None:
    from llmlab.cli.console import stderr, working
    from llmlab.cli.pages import write_comparison

    ratios: Sequence[Sequence[str]] = ratio_rows(a, b, names, found)
    with working("Writing the report"):
        write_comparison(path, {names.a: a, names.b: b}, found, ratios, change_rows(found, names))
    stderr().print(f"Report: {path}", markup=False)
