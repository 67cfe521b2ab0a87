"""`llmlab profile`: measure this machine once, so that the simulator can speak of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.cli.options import engine_options

if TYPE_CHECKING:
    from roofline.profile import Profile

FIELDS = ("model", "device", "dtype", "kernels", "num_threads", "random_weights", "block_size", "max_num_batched_tokens")
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab profile[/cyan]   the model lab-s on this machine's CPU, about a minute

[cyan]llmlab profile --device cuda --model llama-3.1-8b --random-weights --dtype float16 -o my-gpu.json[/cyan]

[cyan]llmlab sim --hardware profile-lab-s-cpu.json --model lab-s[/cyan]   what it is for
"""


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(profile)


@engine_options(*FIELDS)
def profile(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the profile goes [dim]\\[default: profile-MODEL-DEVICE.json][/dim]",
                                                show_default=False)] = None,
    *,
    engine: dict[str, Any],
) -> None:  # fmt: skip
    """Measure a model on this machine: layers, attention, copies and the engine's own time, each a median of repeats.

    Takes one to three minutes; let the machine do nothing else meanwhile. The file is a device for `llmlab sim
    --hardware FILE`, for this model, this number of threads and these kernels.
    """
    from llmlab.config import engine_config

    config = engine_config(**engine)  # names and numbers are checked before torch is loaded
    out = output or Path(f"profile-{Path(config.model).name}-{'cuda' if config.device == 'cuda' else 'cpu'}.json")
    _check_output(out)
    _print(_measured(engine, out), out, config.model)


def _check_output(path: Path) -> None:
    """Before minutes are spent. Raises ConfigError."""
    from llmlab.types import ConfigError

    if path.suffix != ".json":
        raise ConfigError("output", str(path), "a profile is a .json file", "The simulator knows profiles by that ending.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError("output", str(path), "cannot be written", "Give a path in a directory that exists and that you may write.")


def _measured(engine: dict[str, Any], out: Path) -> Profile:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from llmlab.cli.console import stderr, working

    with working("Loading torch"):
        device = _device(engine.get("device", "auto"))
        from llmlab.backends import roofline_shape
        from llmlab.execution.profiling import profile_command
        from llmlab.running import run

    chosen = {name: engine[name] for name in ("num_threads", "dtype", "kernels", "random_weights", "block_size") if name in engine}
    console = stderr()
    bar = Progress(BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console,
                   transient=True, disable=not console.is_terminal)  # fmt: skip
    with bar:
        task = bar.add_task("loading the model", total=None)
        return profile_command(
            device, engine.get("model", "lab-s"), out, lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            run, roofline_shape, max_tokens=engine.get("max_num_batched_tokens", 512), **chosen,
        )  # fmt: skip


def _device(wanted: str) -> str:
    """"cpu" or "cuda". Raises ConfigError where torch sees no GPU."""
    import torch

    from llmlab.types import ConfigError

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "torch sees no CUDA device here", "Use --device cpu.")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def _print(found: Profile, out: Path, model: str) -> None:
    from rich.text import Text

    from llmlab.cli.console import command_line, stdout
    from llmlab.cli.tables import Fact, facts_table
    from llmlab.events.why import seconds

    one, many = _decode_seconds(found, 1), _decode_seconds(found, 16)
    machine = found.hardware()
    facts = [
        Fact("machine", str(found.machine)),
        Fact("model", f"{found.shape.name}, {found.dtype}, kernels {found.kernels}"),
        Fact("launch", seconds(found.launch), "the smallest kernel"),
        Fact("decode, 1 request", seconds(one), f"{1 / one:,.0f} tok/s, seeing 128 tokens"),
        Fact("decode, 16 requests", seconds(many), f"{16 / many:,.0f} tok/s"),
        Fact("products", f"{machine.peak_of(found.dtype) / 1e9:,.0f} GFLOP/s", "the fastest one"),
        Fact("weights read", f"{machine.bandwidth / 1e9:,.1f} GB/s", "by the largest product of one row"),
    ]
    console = stdout()
    console.print(facts_table(facts, f"Measured on this machine, {found.date}: {out}"))
    console.print(Text("\nTry: ", "bold").append(command_line("sim", "--hardware", out, "--model", model, "--rate", 2), "not bold"), soft_wrap=True)


def _decode_seconds(found: Profile, rows: int) -> float:
    from roofline.profile import ProfileCost
    from roofline.rows import Rows

    cost, work = ProfileCost(found), Rows.decode(rows, 128)
    return cost.step(work).seconds + cost.engine_seconds(work)

