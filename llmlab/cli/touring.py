"""`llmlab tour`: the main job of the lab, without a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmlab.cli.options import engine_options

FIELDS = ("model", "device", "dtype", "kernels", "num_threads", "random_weights", "block_size", "num_blocks",
          "enable_prefix_caching", "max_num_batched_tokens", "max_num_seqs", "overlap_depth", "ordering", "admission",
          "composer", "victim", "eviction", "tiering", "seed")  # fmt: skip
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab tour[/cyan]

[cyan]llmlab tour --victim most_blocks --out tour-most-blocks[/cyan]   the same requests, another policy

[cyan]llmlab tour --requests 48 --composer prefill_first --overlap 1 --seed 7[/cyan]
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(tour)


@engine_options(*FIELDS)
def tour(
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 24,
    out: Annotated[Path, typer.Option(help="Where trace and report go.")] = Path("llmlab-tour"),
    report: Annotated[bool, typer.Option(help="Write the HTML report.")] = True,
    *,
    engine: dict[str, Any],
) -> None:
    """A first look: serve mixed requests with a KV pool that is too small, and see everything that happens.

    Sums, chat and documents run through the real engine; their answers are checked, the timeline is drawn, one late
    request is explained, and the run is replayed from its own trace.
    """
    from llmlab.cli.console import stdout
    from llmlab.tour import Choices, take_tour

    if not take_tour(Choices(requests, out, report, engine), stdout()):
        raise typer.Exit(130)
