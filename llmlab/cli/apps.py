"""`llmlab lab` and `llmlab app NAME`: the apps in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab lab[/cyan]                      all apps, a card for each

[cyan]llmlab app engine_room[/cyan]          one app

[cyan]llmlab lab --no-browser --port 0[/cyan]   any free port, and print the URL only
"""
Port = Annotated[int, typer.Option(help="Port on this machine; a busy one is passed over, 0 takes any.")]
Browser = Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser, or print the URL only.")]


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(lab)
    app.command("app", epilog=EXAMPLES)(one_app)


def lab(port: Port = 2780, browser: Browser = True) -> None:
    """Open the lab: all apps in one process with a real engine, on this machine only."""
    _open("", port, browser)


def one_app(
    name: Annotated[str, typer.Argument(help="engine_room, policy_lab, time_machine, roofline_explorer, kv_lab, ...")],
    port: Port = 2780,
    browser: Browser = True,
) -> None:
    """Open one app of the lab."""
    _open(name, port, browser)


def _open(name: str, port: int, browser: bool) -> None:
    import msgspec

    from llmlab.applab import gallery, serving
    from llmlab.cli.console import stderr, stdout
    from llmlab.types import ConfigError

    if name:
        gallery.app(name)
    try:
        import marimo  # noqa: F401
    except ImportError:
        raise ConfigError("apps", "marimo", "is not installed", 'Run `pip install "llmlab[apps]"`.') from None
    place = msgspec.structs.replace(serving.find_port(port), path=f"/{name}/" if name else "/")
    if place.note:
        stderr().print(place.note)

    def ready() -> None:
        if browser and serving.open_browser(place.url):
            stderr().print("Ctrl-C ends it.")
        stdout().print(place.url, soft_wrap=True)
        _warm_up(name)

    serving.serve(place, ready)


def _warm_up(name: str) -> None:
    """Load what the pages need, and the engine's model, while the browser still loads the page or the visitor reads the cards."""
    import llmlab.applab.pages  # noqa: F401

    if name in ("", "engine_room"):
        from llmlab.applab.live import shared_engine

        shared_engine()
