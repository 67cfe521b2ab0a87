"""`llmlab lessons`: the course, copied to where a learner can write in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab lessons[/cyan]   into ./llmlab-lessons

[cyan]llmlab lessons course --solutions[/cyan]   for a teacher
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(lessons)


def lessons(
    directory: Annotated[Path, typer.Argument(help="Where they go; files that are there already are left alone.")] = Path("llmlab-lessons"),
    solutions: Annotated[bool, typer.Option("--solutions", help="Also the reference solutions of the exercises.")] = False,
) -> None:
    """Copy the lessons, as notebooks and as scripts, to a directory of yours. Nothing is overwritten."""
    from llmlab.cli.console import stdout
    from llmlab.events.why import count
    from llmlab.types import ConfigError

    source = shipped_lessons()
    if source is None:
        raise ConfigError("lessons", "none", "this installation came without them", "Install from a checkout or a whole wheel.")
    directory.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(source.glob("[0-9][0-9]_*")) if path.suffix in (".py", ".ipynb")]
    files += [source / "solutions.py"] if solutions else []
    new = [path for path in files if not (directory / path.name).exists()]
    for path in new:
        shutil.copy(path, directory)
    kept = f", {len(files) - len(new)} were there already and are as they were" if len(new) < len(files) else ""
    stdout().print(f"{count(len(new), 'file')} copied to {directory}{kept}.", soft_wrap=True)
    stdout().print(f"Open {directory / '01_one_token.ipynb'} in Jupyter, or run: python {directory / '01_one_token.py'}", soft_wrap=True)


def shipped_lessons() -> Path | None:
    """Where the lessons lie: inside an installed package, or in a source checkout."""
    import llmlab

    package = Path(llmlab.__path__[0])
    found = [root for root in (package / "_lessons", package.parent / "lessons") if list(root.glob("01_*.py"))]
    return found[0] if found else None
