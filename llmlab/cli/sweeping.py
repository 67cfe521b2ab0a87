"""`llmlab sweep`: every combination of settings, in parallel, as a table and a file that a later sweep goes on with."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

import typer

from llmlab.cli.loads import AXES, LoadChoice, load_options
from llmlab.cli.options import engine_options
from llmlab.cli.simulating import DEFAULTS, FIELDS
from llmlab.types import ConfigError, unknown_name

if TYPE_CHECKING:
    from llmlab.sweeping import Row

_PANEL = "The sweep"
_LOAD_KINDS: Mapping[str, type] = {"requests": int, "rate": float, "cv": float, "shared_prefix": int}
# Metric of a row, head of its column, and whether it is in seconds; what matters most first: narrow terminals show fewer.
COLUMNS = (("p90_ttft", "TTFT p90", True), ("p90_e2e", "E2E p90", True), ("output_throughput", "tok/s", False),
           ("num_preemptions", "preempted", False), ("num_refused", "refused", False), ("p50_tpot", "TPOT p50", True), ("p50_ttft", "TTFT p50", True))  # fmt: skip
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab sweep --set ordering=fcfs,sjf_oracle --set max_num_batched_tokens=128,512 --seeds 3 -o results.jsonl[/cyan]

[cyan]llmlab sweep --set hardware=t4,a10,a100 --set rate=0.5,1,2,4 --like azure-conv-2023 --jobs 2[/cyan]

[cyan]llmlab sweep --set ordering=fcfs,my_orders.py:ShortestPrompt --seeds 5[/cyan]   a policy of your own

[cyan]llmlab sweep --set 'prompt_len="lognormal:1020,1.1","lognormal:300,0.8",512'[/cyan]   values with commas stand in quotes
"""


class Axes(NamedTuple):
    """What `--set` asked for: fields of EngineConfig, and parts of the workload."""

    fields: dict[str, list[Any]]
    loads: dict[str, list[Any]]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(sweep)


@engine_options("executor", *FIELDS, **DEFAULTS, executor="sim", log_level=1)
@load_options
def sweep(
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=A,B,...", rich_help_panel=_PANEL,
        help=f"Values of one setting; a value with commas stands in double quotes. May be repeated, for another setting or for more values of one. Any field of EngineConfig, or of the workload: {', '.join(AXES)}.")] = None,
    seeds: Annotated[int, typer.Option(min=1, rich_help_panel=_PANEL, help="Workloads for each setting, drawn from this many seeds.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", rich_help_panel=_PANEL,
        help="Rows as .jsonl, one a point, written as they come. A later sweep with this file runs only what it lacks.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", rich_help_panel=_PANEL,
        help="Runs at once; default: one for each core, and one for measured runs.")] = None,
    backend: Annotated[str, typer.Option(rich_help_panel=_PANEL, help="processes, inline or ray.")] = "processes",
    as_json: Annotated[bool, typer.Option("--json", rich_help_panel=_PANEL, help="Print all rows, one JSON object a line.")] = False,
    *,
    load: LoadChoice,
    engine: dict[str, Any],
) -> None:  # fmt: skip
    """Run every combination of settings on the same workloads and print a table: one row a setting, means over seeds.

    Ends with exit code 1 if a point failed; the others are kept.
    """
    from llmlab.cli.plugins import with_plug_ins

    axes = axes_of(settings or [])
    first = engine.get("seed", 0)
    loads = _loads(load, axes.loads, seeds)
    grid = {**axes.fields, "workload": loads} | ({"workload_seed": range(first, first + seeds)} if _drawn(load) else {})
    shared = {name: value for name, value in with_plug_ins(engine).items() if name not in axes.fields}
    rows = _run(grid, shared, output, jobs, backend)
    if as_json:
        _print_json(rows)
    else:
        _print(rows, [*axes.fields, *axes.loads], seeds if _drawn(load) else 1)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------- the grid
def axes_of(settings: Sequence[str]) -> Axes:
    """The values of every `NAME=A,"B,C",...`, in the types of their fields; a name that comes again adds values. Raises
    ConfigError."""
    from llmlab.cli.options import _scalar
    from llmlab.config import EngineConfig

    kinds = {name: _scalar(hint) for name, hint in get_type_hints(EngineConfig).items() if name != "trace"}
    load_kinds = {name: _LOAD_KINDS.get(name, str) for name in AXES}
    axes = Axes({}, {})
    for text in settings:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not values:
            raise ConfigError("set", text, "is not NAME=A,B,...", "Write --set ordering=fcfs,sjf_oracle.")
        if name not in kinds and name not in load_kinds:
            raise unknown_name("set", name, (*kinds, *load_kinds))
        place, kind = (axes.fields, kinds[name]) if name in kinds else (axes.loads, load_kinds[name])
        place.setdefault(name, []).extend(_value(name, part, kind) for part in _parts(text, values))
    return axes


def _parts(text: str, values: str) -> list[str]:
    """What stands between commas; in double quotes a comma is one of the value's own."""
    try:
        parts = next(csv.reader([values], skipinitialspace=True, strict=True))
    except csv.Error:
        raise ConfigError("set", text, "has a quotation mark too many or too few",
                          """Write --set 'prompt_len="lognormal:1020,1.1","uniform:16,128"'.""") from None  # fmt: skip
    return [part.strip() for part in parts]


def _value(name: str, text: str, kind: type) -> Any:
    """One value: "none" is None, a `module:Class` its object."""
    from llmlab.cli.plugins import with_plug_ins

    if text.lower() == "none":
        return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(name, text, "must be true or false")
        return text.lower() == "true"
    if name in ("prompt_len", "output_len"):
        return _length(name, text)
    try:
        return with_plug_ins({name: kind(text)})[name]
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(name, text, f"must be a number ({kind.__name__})") from None


def _length(name: str, text: str) -> str:
    """A length model, as text. Raises ConfigError, at once, for a form that nobody can read."""
    import numpy as np

    from llmlab.cli.jobs import length_model
    from llmlab.workloads.lengths import draw

    plain = text.replace(" ", "")
    try:
        draw(length_model(plain), np.random.default_rng(0), 1, name)
    except ConfigError as error:
        quoted = f"""{name}="lognormal:1020,1.1","uniform:16,128\""""
        raise ConfigError(name, text, error.problem, f"A value with commas stands in quotes: --set '{quoted}'.") from None
    return plain


def _drawn(load: LoadChoice) -> bool:
    return load.workload_file is None


def _loads(load: LoadChoice, axes: Mapping[str, list[Any]], seeds: int) -> dict[str, Any]:
    """Workloads by name: functions of a seed, or what a file holds."""
    choices = {_label(dict(zip(axes, values))): load._replace(**dict(zip(axes, values))) for values in product(*axes.values())}
    if _drawn(load):
        return {name: choice.draw for name, choice in choices.items()}
    if seeds > 1:
        raise ConfigError("seeds", seeds, "a workload file is the same for every seed", "Leave --seeds or --workload-file out.")
    return {name: choice.draw(0) for name, choice in choices.items()}


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "drawn"


def _run(grid: Mapping[str, Any], shared: Mapping[str, Any], output: Path | None, jobs: int | None, backend: str) -> list[Row]:
    from llmlab import sweeping
    from llmlab.cli.console import stderr

    known = set(sweeping.ResultsFile(output).rows) if output is not None else set()
    rows = sweeping.sweep(grid, results=output, backend=backend, workers=jobs, **shared)
    found = sum(row["key"] in known for row in rows)
    where = f", {found} of them were in {output}" if found else f", written to {output}" if output is not None else ""
    stderr().print(f"{len(rows)} points{where}", style="dim", markup=False)
    return rows


# -------------------------------------------------------------------------------------------- printing
def _print_json(rows: Sequence[Row]) -> None:
    import msgspec

    for row in rows:
        typer.echo(msgspec.json.encode(row).decode())


def _print(rows: Sequence[Row], axes: Sequence[str], seeds: int) -> None:
    from rich.text import Text

    from llmlab.cli.console import stdout
    from llmlab.cli.tables import text_table

    console = stdout()
    mode = next((row["mode"] for row in rows if not row["error"]), "nothing came of it")
    over = f", means of {seeds} seeds ± their standard deviation" if seeds > 1 else ""
    wide = max(1, len(axes))
    console.print(Text(f"{len(rows)} runs", "bold").append(f", {mode}{over}", "not bold"))
    console.print(text_table(_narrowed(setting_rows(rows, axes), wide, console.width), wide))
    for row in rows:
        if row["error"]:
            console.print(Text(f"failed: {_name(row, axes)}: {row['error']}", "red"))


def setting_rows(rows: Sequence[Row], axes: Sequence[str]) -> list[list[str]]:
    """The table: a head, and one line for each setting, its metrics as means over seeds ± standard deviation."""
    refused = any(row.get("num_refused") for row in rows)  # then the lines do not tell of the same requests
    columns = [column for column in COLUMNS if refused or column[0] != "num_refused"]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_setting(row, axes), []).append(row)
    lines = [[*(axes or ["setting"]), *(title for _, title, _ in columns)]]
    for setting, group in groups.items():
        good = [row for row in group if not row["error"]]
        cells = [_cell([row[name] for row in good if row[name] is not None], timed) for name, _, timed in columns]
        lines.append([*(setting or ("as given",)), *cells])
    return lines


def _narrowed(lines: list[list[str]], wide: int, width: int) -> list[list[str]]:
    """The table without its last columns, as far as `width` demands it; the settings and one metric always stay."""
    def taken(columns: int) -> int:
        return sum(2 + max(len(line[i]) for line in lines) for i in range(columns))

    columns = next((n for n in range(len(lines[0]), wide + 1, -1) if taken(n) <= width), wide + 1)
    return [line[:columns] for line in lines]


def _setting(row: Row, axes: Sequence[str]) -> tuple[str, ...]:
    """The values of a row on each axis; those of the workload stand in its name."""
    parts = dict(part.split("=", 1) for part in row["workload"].split(", ") if "=" in part)
    return tuple(str(row[name]) if name in row and name not in parts else parts.get(name, "-") for name in axes)


def _name(row: Row, axes: Sequence[str]) -> str:
    values = [f"{name}={value}" for name, value in zip(axes, _setting(row, axes))]
    return ", ".join([*values, f"seed {row['workload_seed']}"] if "workload_seed" in row else values)


def _cell(values: Sequence[float], timed: bool) -> str:
    from llmlab.events.why import seconds

    show: Callable[[float], str] = seconds if timed else _number
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return show(mean) if len(values) == 1 or not mean else f"{show(mean)} ±{statistics.stdev(values) / mean:.0%}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value < 100 and value != int(value) else f"{value:,.0f}"
