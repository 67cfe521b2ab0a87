"""The commands put together, and what becomes of errors."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llmlab.cli import (
    apps,
    checks,
    comparing,
    courses,
    listing,
    papers,
    profiles,
    roofs,
    serving,
    simulating,
    sweeping,
    touring,
    traces,
)
from llmlab.types import LabError
from roofline.errors import RooflineError

USAGE, INTERRUPTED = 2, 130


class LabGroup(TyperGroup):
    """Answers mistakes with a sentence on stderr instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (LabError, RooflineError) as error:
            _say(str(error))
            raise typer.Exit(USAGE) from None
        except KeyboardInterrupt:
            _say("interrupted", "")
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            _say(f"{error.filename}: {error.strerror}")
            raise typer.Exit(USAGE) from None


def _say(text: str, label: str = "error: ") -> None:
    from rich.text import Text

    from llmlab.cli.console import stderr

    stderr().print(Text(label, "bold red").append(text, "default not bold"), soft_wrap=True)


app = typer.Typer(
    name="llmlab", cls=LabGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]llmlab tour[/bold]: a real engine, its answers, its timeline, and why one was late.",
)  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmlab import __version__

        typer.echo(f"llmlab {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """The lab bench of LLM inference: run a real engine, and question every decision it took."""


touring.add_to(app)
apps.add_to(app)
courses.add_to(app)
serving.add_to(app)
simulating.add_to(app)
comparing.add_to(app)
sweeping.add_to(app)
checks.add_to(app)
roofs.add_to(app)
profiles.add_to(app)
traces.add_to(app)
papers.add_to(app)
listing.add_to(app)
