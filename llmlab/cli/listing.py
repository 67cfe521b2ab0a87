"""`llmlab models`, `policies`, `kernels` and `bench`: what there is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.cli.options import engine_options

if TYPE_CHECKING:
    from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BENCH_EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab bench[/cyan]   which are there

[cyan]llmlab bench cpu[/cyan]

[cyan]llmlab bench scheduler --help[/cyan]   the options of a benchmark are its own
"""


def add_to(app: typer.Typer) -> None:
    app.command()(models)
    app.command()(policies)
    app.command()(kernels)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(epilog=BENCH_EXAMPLES, context_settings=passed_on)(bench)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.strip(">"), justify="right" if column.endswith(">") else "left")
    return table


def _echo_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


# ------------------------------------------------------------------------------------------- models
def models(as_json: AsJson = False) -> None:
    """The models that come with llmlab: size, training, and measured accuracy with its interval."""
    from llmlab.models.zoo import SHAPES, shipped_models

    entries = [_model_entry(name, path) for name, path in shipped_models().items()]
    entries.sort(key=lambda entry: (entry["parameters"] or 0, entry["name"]))
    if as_json:
        _echo_json(entries)
        return
    from rich.text import Text

    from llmlab.cli.console import stdout

    console = stdout()
    if not entries:
        console.print("No model comes with this installation.")
    for entry in entries:
        console.print(Text(entry["name"], "bold"), _model_line(entry), highlight=False)
        console.print(_gate_table(entry))
    console.print(Text(f"Shapes without weights (simulate them, or fill them with --random-weights): {', '.join(sorted(SHAPES))}.", "dim"))


def _model_entry(name: str, path: Path) -> dict[str, Any]:
    """A model as plain data. A model without a readable card has no training facts."""
    import msgspec

    from llmlab.training.cards import CARD_FILE, load_card
    from llmlab.types import LabError

    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    entry: dict[str, Any] = {"name": name, "path": str(path), "bytes": size, "parameters": None, "tokens": None, "role": "", "gates": []}
    if not (path / CARD_FILE).exists():
        return {**entry, "problem": ""}
    try:
        card = load_card(path)
    except LabError as error:  # the other models are listed all the same
        return {**entry, "problem": str(error)}
    gates = [{**msgspec.to_builtins(g), "name": g.name, "accuracy": g.accuracy, "passed": g.passed} for g in card.gates]
    return {**entry, "parameters": card.parameters, "tokens": card.tokens, "role": card.role, "gates": gates}


def _model_line(entry: dict[str, Any]) -> str:
    """Facts of a model in one line."""
    if entry["parameters"] is None:
        return f"{entry['bytes'] / 1e6:.1f} MB, without a readable card" + (f": {entry['problem']}" if entry["problem"] else "")
    trained = "" if entry["tokens"] is None else f", trained on {_millions(entry['tokens'])} tokens"
    role = f": {entry['role']}" if entry["role"] else ""
    return f"{_millions(entry['parameters'])} parameters{trained}, {entry['bytes'] / 1e6:.1f} MB{role}"


def _gate_table(entry: dict[str, Any]) -> Table:
    table = _table("  gate", "accuracy>", "95 % interval", "n>", "required>")
    for gate in entry["gates"] or [None]:
        name, *cells = _gate_cells(gate)
        table.add_row(f"  {name}", *cells)
    return table


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number < 1e7 else f"{number / 1e6:,.0f} M"


def _gate_cells(gate: dict[str, Any] | None) -> list[str]:
    if gate is None:
        return ["not measured", "", "", "", ""]
    required = "" if gate["required"] is None else f"{'✓' if gate['passed'] else '✗'} {gate['required']:.0%}"
    return [gate["name"], f"{gate['accuracy']:.1%}", f"{gate['low']:.1%} .. {gate['high']:.1%}", str(gate["n"]), required]


# ------------------------------------------------------------------------------- policies and kernels
def policies(as_json: AsJson = False) -> None:
    """Every registered plug-in, seam by seam; the default of each seam is marked."""
    from llmlab.config import EngineConfig
    from llmlab.plugins import REGISTRIES

    defaults = EngineConfig()
    if as_json:
        _echo_json({seam: registry.summaries() for seam, registry in REGISTRIES.items()})
        return
    table = _table("seam", "name", "what it does")
    for seam, registry in REGISTRIES.items():
        label = seam
        for name, summary in registry.summaries().items():
            table.add_row(label, name + (" *" if name == getattr(defaults, seam) else ""), summary)
            label = ""
    from llmlab.cli.console import stdout

    stdout().print(table)
    stdout().print("* the default. Choose with --SEAM NAME, for example: llmlab tour --victim most_blocks", style="dim")


@engine_options("kernels", "device", "dtype", "num_threads")
def kernels(as_json: AsJson = False, *, engine: dict[str, Any]) -> None:
    """Which implementation runs each operation, and why: on this machine, or on a GPU that is not here (--device t4)."""
    from llmlab.cli.console import stdout, working

    with working("Looking at this machine"):
        choices = kernel_choices(engine)
    if as_json:
        _echo_json([{"op": c.op, "implementation": c.implementation, "why": c.why} for c in choices])
        return
    table = _table("operation", "implementation", "why")
    for choice in choices:
        table.add_row(choice.op, choice.implementation, choice.why)
    stdout().print(table)


def kernel_choices(engine: dict[str, Any]) -> list[Any]:
    """`Kernels.describe()` of what these EngineConfig fields choose. Raises ConfigError."""
    from llmlab.config import engine_config
    from llmlab.types import ConfigError

    if engine.get("device", "auto") not in ("auto", "cpu", "cuda"):
        return _choices_elsewhere(engine)
    config = engine_config(**engine)
    import torch

    from llmlab.backends import dtype_for
    from llmlab.kernels.dispatch import make_kernels, why_no_cuda

    device = "cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu"
    if device == "cuda" and (reason := why_no_cuda()) is not None:
        raise ConfigError("device", "cuda", f"torch sees no CUDA device here: {reason}", "Name a card to see its table: --device t4.")
    dtype = getattr(torch, dtype_for(config, device))
    try:
        return list(make_kernels(config.kernels, device=device, dtype=dtype, num_threads=config.num_threads).describe())
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("kernels", config.kernels, str(error)) from None


def _choices_elsewhere(engine: dict[str, Any]) -> list[Any]:
    """What a GPU of the hardware table would get."""
    from llmlab.config import engine_config
    from llmlab.kernels.capability import capability_of, check_dtype, default_dtype, kernel_table
    from llmlab.kernels.variants import parse_kernels

    capability = capability_of(engine["device"])
    config = engine_config(**{**engine, "device": "cuda"})
    dtype = default_dtype(capability) if config.dtype == "auto" else config.dtype
    check_dtype(capability, dtype)
    return list(kernel_table(capability, dtype, variants=parse_kernels(config.kernels).variants))


# -------------------------------------------------------------------------------------------- bench
def bench(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which: cpu, kernels, scheduler, ... or the beginning of a name (none: list them).")] = None,
) -> None:
    """Run a benchmark of the source checkout; what follows its name are its own options."""
    from llmlab.cli.console import stdout
    from llmlab.types import unknown_name

    scripts = benchmark_scripts()
    if name is None or name in ("-h", "--help"):
        table = _table("benchmark", "what it measures")
        for known, path in scripts.items():
            table.add_row(known, _first_line(path))
        stdout().print(table)
        return
    meant = [name] if name in scripts else [known for known in scripts if known.startswith(name)]
    if len(meant) != 1:
        raise unknown_name("benchmark", name, scripts)
    script = scripts[meant[0]]
    command = [sys.executable, str(script), *ctx.args]
    raise typer.Exit(subprocess.run(command, cwd=script.parent.parent, check=False).returncode)


def benchmark_scripts() -> dict[str, Path]:
    """The scripts in `benchmarks/` by name. Raises ConfigError where there are none."""
    import llmlab
    from llmlab.types import ConfigError

    directory = Path(llmlab.__path__[0]).parent / "benchmarks"
    found = {p.stem.removeprefix("bench_"): p for p in sorted(directory.glob("*.py")) if not p.stem.startswith(("_", "conftest"))}
    if not found:
        raise ConfigError("benchmarks", str(directory), "there are none here: they come with the source, not with the wheel",
                          "Clone the repository, `pip install -e '.[bench]'` there, and run `llmlab bench` again.")  # fmt: skip
    return found


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0]
