"""`llmlab papers`: the papers behind llmlab, their state, and the experiments that stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmlab.papers import Report

LIST_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab papers[/cyan]                            the list

[cyan]llmlab papers run moe_offload --quick[/cyan]    an experiment in its short form
"""
RUN_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab papers run moe_offload[/cyan]                     claims beside what was found, tables, pictures

[cyan]llmlab papers run moe_offload --quick --json[/cyan]      the short form, as JSON, without pictures
"""
MARKS: Mapping[bool | None, str] = {True: "[green]holds[/green]", False: "[red]does not hold[/red]", None: "[dim]not compared[/dim]"}

group = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")


def add_to(app: typer.Typer) -> None:
    app.add_typer(group, name="papers", help="The papers behind llmlab: their state, and experiments to run.", epilog=LIST_EXAMPLES)


@group.callback()
def show(ctx: typer.Context) -> None:
    """The papers behind llmlab, their seam and their state."""
    if ctx.invoked_subcommand is not None:
        return
    from rich.table import Table as RichTable

    from llmlab.cli.console import stdout
    from llmlab.papers import EXPERIMENTS
    from llmlab.papers.seeds import SEEDS

    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in ("slug", "paper", "seams", "state"):
        table.add_column(column, overflow="fold")
    for seed in SEEDS:
        runs = " · [cyan]papers run[/cyan]" if seed.slug in EXPERIMENTS else ""
        table.add_row(seed.slug, seed.title, seed.seams, seed.state + runs)
    stdout().print(table)
    extra = [slug for slug in EXPERIMENTS if slug not in {seed.slug for seed in SEEDS}]
    stdout().print(f"\nExperiments that repeat several papers at once: {', '.join(extra) or 'none'}.")


@group.command(epilog=RUN_EXAMPLES)
def run(
    slug: Annotated[str, typer.Argument(metavar="PAPER", help="A paper with an experiment, as `llmlab papers` lists them.")],
    quick: Annotated[bool, typer.Option("--quick", help="The short form: fewer cases, seconds instead of minutes.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the pictures; made if need be.")] = Path("llmlab-papers"),
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw the pictures (PNG).")] = True,
    dark: Annotated[bool, typer.Option("--dark", help="Pictures on a dark ground.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and tables as JSON; no pictures.")] = False,
) -> None:
    """Run the experiment of a paper: its claims beside what is found here, with tables and pictures."""
    from llmlab.papers import experiment

    module = experiment(slug)
    report = _watched(module, quick)
    if as_json:
        import msgspec

        plain = {name: value for name, value in report._asdict().items() if name != "figures"}
        plain["findings"] = [finding._asdict() for finding in report.findings]
        plain["tables"] = [table._asdict() for table in report.tables]
        typer.echo(msgspec.json.encode(plain).decode())
        return
    _print(report)
    if pictures and report.figures:
        _draw(report, out, "dark" if dark else "light")


def _watched(module: Any, quick: bool) -> Report:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from llmlab.cli.console import stderr

    with Progress(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stderr(), transient=True) as bar:
        task = bar.add_task("begins", total=1.0)
        report: Report = module.run(quick, lambda share, what: bar.update(task, completed=share, description=what))
    return report


def _print(report: Report) -> None:
    from rich.table import Table as RichTable

    from llmlab.cli.console import stdout

    console = stdout()
    console.print(f"[bold]{report.title}[/bold]\n[dim]{report.setup}[/dim]\n")
    claims = RichTable(header_style="bold", pad_edge=False, expand=False, show_lines=True)
    for column in ("claimed", "found here", "how", ""):
        claims.add_column(column, overflow="fold")
    for finding in report.findings:
        claims.add_row(finding.claim, finding.found, finding.kind, MARKS[finding.holds])
    console.print(claims)
    for table in report.tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold", header_style="bold", box=None,
                          caption=table.note or None, caption_justify="left")  # fmt: skip
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i < 1 or not _numeric(table.rows, i) else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print()
        console.print(shown)


def _numeric(rows: tuple[tuple[str, ...], ...], column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column][:1] in "-+" for row in rows if row[column])


def _draw(report: Report, out: Path, theme: str) -> None:
    from llmlab.cli.console import stdout
    from llmlab.ui.theme import enable

    out.mkdir(parents=True, exist_ok=True)
    stdout().print()
    with enable(theme):
        for name, draw in report.figures.items():
            path = out / f"{report.slug}-{name}.png"
            draw().save(str(path), scale_factor=2)
            stdout().print(f"{path}", soft_wrap=True)
