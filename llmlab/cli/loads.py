"""The workload options of `llmlab sim` and `llmlab sweep`: drawn, drawn like a public trace, or read from a trace file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from llmlab.types import ConfigError, TraceError

if TYPE_CHECKING:
    from llmlab.workloads.workload import Workload

REQUESTS, RATE = 200, 1.0
PROMPT_LEN, OUTPUT_LEN = "lognormal:256,1.0", "lognormal:64,0.8"
AXES = ("requests", "rate", "cv", "prompt_len", "output_len", "like", "shared_prefix")  # what a sweep may vary
_PANEL = "The workload"


class LoadChoice(NamedTuple):
    """A workload as the command line describes it; None where nothing was said."""

    requests: int | None = None
    rate: float | None = None
    cv: float | None = None
    prompt_len: str | None = None
    output_len: str | None = None
    shared_prefix: int | None = None
    like: str | None = None
    workload_file: Path | None = None

    def draw(self, seed: int) -> Workload:
        """The workload. Raises ConfigError or TraceError."""
        from llmlab.workloads.workload import Workload

        more = {} if self.shared_prefix is None else {"shared_prefix": self.shared_prefix}
        if self.workload_file is not None:
            self._refuse("workload_file", "like", "cv", "prompt_len", "output_len", "shared_prefix")
            return self._read(self.workload_file, seed)
        count = REQUESTS if self.requests is None else self.requests
        if self.like is not None:
            self._refuse("like", "cv", "prompt_len", "output_len")
            return Workload.like(self.like, self.rate, count, seed, **more)
        from llmlab.cli.jobs import length_model

        rate = RATE if self.rate is None else self.rate
        lengths = length_model(self.prompt_len or PROMPT_LEN), length_model(self.output_len or OUTPUT_LEN)
        if self.cv is not None:
            return Workload.gamma(rate, self.cv, count, *lengths, seed, **more)
        return Workload.poisson(rate, count, *lengths, seed, **more)

    def _refuse(self, chosen: str, *others: str) -> None:
        """A workload from elsewhere has its own lengths and gaps."""
        for name in others:
            if getattr(self, name) is not None:
                raise ConfigError(name, getattr(self, name), f"says something that {_option(chosen)} says already",
                                  f"Leave {_option(name)} or {_option(chosen)} out.")  # fmt: skip

    def _read(self, path: Path, seed: int) -> Workload:
        loaded = _reader(path)(path, self.requests, seed=seed)
        return loaded if self.rate is None else loaded.at_rate(self.rate)

    def words(self) -> list[str]:
        """The command-line words that give this choice."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return [word for name, value in given.items() for word in (_option(name), str(value))]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _reader(path: Path) -> Callable[..., Workload]:
    """The reader of the format that a file's first line shows. Raises TraceError."""
    from llmlab.workloads.workload import Workload

    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = file.readline()
    except OSError as error:
        raise TraceError("workload_file", str(path), f"cannot be read ({error.strerror})",
                         "Give an Azure, BurstGPT or Mooncake trace.") from None  # fmt: skip
    readers = {"ContextTokens": Workload.azure, "Request tokens": Workload.burstgpt, "input_length": Workload.mooncake}
    for sign, reader in readers.items():
        if sign in first:
            return reader
    raise TraceError(f"{path.name} line 1", first.strip(), "is the beginning of no format known here",
                     "Known: Azure (CSV with ContextTokens), BurstGPT (CSV with Request tokens), Mooncake (JSON lines with "
                     "input_length).")  # fmt: skip


# ------------------------------------------------------------------------------------------- options
def _parameters() -> Iterator[inspect.Parameter]:
    def option(name: str, kind: Any, text: str, *names: str) -> inspect.Parameter:
        annotation = Annotated[kind | None, typer.Option(*(names or (_option(name),)), help=text, rich_help_panel=_PANEL, show_default=False)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    yield option("requests", int, f"Number of requests [dim]\\[default: {REQUESTS}, or the whole file][/dim]", "--requests", "-n")
    yield option("rate", float, f"Arrivals a second [dim]\\[default: {RATE:g}, or the trace's own][/dim]")
    yield option("cv", float, "Burstiness: standard deviation of the gaps over their mean [dim]\\[default: 1, Poisson][/dim]")
    yield option("prompt_len", str, f"128, 16,128, lognormal:MEDIAN,SIGMA, zipf:MAX,S ... [dim]\\[default: {PROMPT_LEN}][/dim]")
    yield option("output_len", str, f"As --prompt-len [dim]\\[default: {OUTPUT_LEN}][/dim]")
    yield option("shared_prefix", int, "Tokens that all prompts share [dim]\\[default: 0][/dim]")
    yield option("like", str, "Draw from the figures of a public trace, such as azure-conv-2023.")
    yield option("workload_file", Path, "An Azure, BurstGPT or Mooncake trace of your own.")


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose parameter `load` is a LoadChoice, the options of a workload."""
    ours = list(_parameters())

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        load = LoadChoice(**{p.name: arguments.pop(p.name) for p in ours})
        command(**arguments, load=load)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "load"]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + ours
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapper.__wrapped__
    return wrapper
