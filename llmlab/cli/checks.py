"""`llmlab check`: does a plug-in keep the contract of its seam?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

PATIENCE = 5.0
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab check most_blocks[/cyan]

[cyan]llmlab check my_orders.py:ShortestPrompt[/cyan]   a class (made without arguments) or an object of your own

[cyan]llmlab check sjf_oracle --seam ordering --patience inf[/cyan]   it starves by design: forgive that
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(check)


def check(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="module:Class, file.py:Class, or the name of a registered plug-in.")],
    seam: Annotated[str | None, typer.Option(help="Its seam: ordering, victim, composer ...; recognised if only one fits.")] = None,
    patience: Annotated[float, typer.Option(help="How many times later than by default an old request may end; inf forgives all.")] = PATIENCE,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a call may take; default: the engine's limit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check a policy against the contract of its seam; every failure is a sentence.

    Total, pure, forgetful, reproducible in another process, blind to the order of candidates, fair to old requests, and
    quick. Exit code 1 if it fails anywhere.
    """
    from llmlab.checking import check as examine
    from llmlab.cli.console import stdout, working
    from llmlab.cli.plugins import plug_in

    subject: Any = plug_in("policy", policy)
    with working(f"Checking {policy}"):
        found = examine(subject, seam or _seam_of(policy), patience=patience, timeout=timeout)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode({**msgspec.to_builtins(found), "ok": found.ok}).decode())
    else:
        stdout().print(str(found), markup=False, soft_wrap=True, style=None if found.ok else "red")
    if not found.ok:
        raise typer.Exit(1)


def _seam_of(policy: str) -> str | None:
    """The seam that has a plug-in of this name; None for a `module:Class`, whose methods tell. Raises ConfigError."""
    from llmlab.checking import SEAMS
    from llmlab.plugins import REGISTRIES
    from llmlab.types import ConfigError, unknown_name

    if ":" in policy:
        return None
    seams = [seam for seam, registry in REGISTRIES.items() if seam in SEAMS and policy in registry.names()]
    if not seams:
        known = [name for seam, registry in REGISTRIES.items() if seam in SEAMS for name in registry.names()]
        raise unknown_name("policy", policy, known)
    if len(seams) > 1:
        raise ConfigError("policy", policy, f"is a name at {' and '.join(seams)}", "Choose one with --seam.")
    return seams[0]
