"""Every field of EngineConfig as an option of the command line, made from the field itself.

    @engine_options()                       all fields
    @engine_options("victim", "composer")   these only
    def command(..., engine: dict[str, Any]) -> None

`engine` holds the fields that were given on the command line, so a command knows what the user chose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer

from llmlab.config import PLUG_IN_FIELDS, EngineConfig

HIDDEN_FIELDS = ("trace",)  # --trace is an option of its own


class About(NamedTuple):
    """Help of one option: its panel, its text, and other names for it."""

    panel: str
    text: str
    names: tuple[str, ...] = ()


_SEE = "`llmlab policies` lists them"
ABOUT: Mapping[str, About] = {
    "model": About("Model and machine", "Shipped model, directory, hub id or shape.", ("--model", "-m")),
    "executor": About("Model and machine", "torch runs the model, sim predicts time on --hardware."),
    "host": About("Model and machine", "The CPU beside the device, for rows that a placement sends there."),
    "hardware": About("Model and machine", "Device to simulate (t4, a100, h100, ...); of a real run: what to predict for."),
    "device": About("Model and machine", "Where torch runs."),
    "dtype": About("Model and machine", "Numbers of weights and KV; auto: the checkpoint's."),
    "kernels": About("Model and machine", "Kernel set; `llmlab kernels` says what auto means here."),
    "num_threads": About("Model and machine", "Threads on the CPU.", ("--threads", "--num-threads")),
    "random_weights": About("Model and machine", "Fill a shape with random weights (speed is real, answers are not)."),
    "quantization": About("Model and machine", "Narrow weights: int8 or int4, with -gN and -sym or -asym if you like (int4-g32-sym)."),
    "gpu_memory": About("KV memory", "What weights and KV may take: bytes, 16GB, or the card to imitate (t4)."),
    "tensor_parallel_size": About("Model and machine", "Simulated devices that share every layer."),
    "attention_plan": About("Model and machine", "How predictions deal attention to a GPU's programs."),
    "block_size": About("KV memory", "Tokens in a KV block."),
    "num_blocks": About("KV memory", "Blocks in the KV pool; auto: from memory."),
    "num_host_blocks": About("KV memory", "Blocks of the host tier; auto: as many as the pool."),
    "enable_prefix_caching": About("KV memory", "Share the KV of equal beginnings.",
                                   ("--prefix-caching/--no-prefix-caching",)),
    "max_num_batched_tokens": About("Batching", "Token budget of a step."),
    "max_num_seqs": About("Batching", "Requests that may run at once."),
    "max_model_len": About("Batching", "Longest prompt plus answer; auto: the model's."),
    "overlap_depth": About("Batching", "Steps in flight while the next is planned; 0 is synchronous.",
                           ("--overlap-depth", "--overlap")),
    "ordering": About("Policies", f"Who stands where in the queue ({_SEE})."),
    "admission": About("Policies", "Whether the head of the queue may start."),
    "composer": About("Policies", "What a step contains."),
    "victim": About("Policies", "Whom to preempt when KV memory runs out."),
    "placement": About("Policies", "Where the work of a step runs."),
    "eviction": About("Policies", "Which cached block to give away."),
    "tiering": About("Policies", "What becomes of a victim's KV: recompute or swap."),
    "decoding": About("Policies", "How tokens become answers."),
    "weights": About("Policies", "Where the experts of a mixture lie and are computed."),
    "num_expert_slots": About("Model and machine", "Experts that fit on the device, with --weights; auto: a quarter of them."),
    "routing": About("Model and machine", "Recorded routing that simulated experts follow: a name or a file."),
    "layer_window": About("Model and machine", "Layers kept in memory while the others are read from disk; auto: all."),
    "fixed_rows": About("Batching", "Tokens in a pass with fixed numerics (deterministic requests)."),
    "speculation": About("Speculation", "Where drafts come from: ngram, suffix, heads, or a draft model of the same vocabulary; simulated: how often they "
                         "hold, and whose they are (0.8,0.7@llama-3.2-1b).",
                         ("--speculate", "--speculation")),
    "num_speculative_tokens": About("Speculation", "Drafts a request at most, verified in one step.",
                                    ("--num-speculative-tokens", "--drafts")),
    "draft_tree": About("Speculation", "Drafts as a tree: children of a node by depth (2x2x1), in place of --drafts."),
    "acceptance": About("Speculation", "When a draft of a sampled request holds: keyed (no token changes) or rejection (more hold)."),
    "draft_policy": About("Speculation", "How many of them: fixed, ewma, goodput."),
    "seed": About("Log and limits", "Seed of all random numbers."),
    "log_level": About("Log and limits", "0 metrics, 1 lifecycle, 2 decisions, 3 blocks, 4 kernels."),
    "log_capacity": About("Log and limits", "Events kept in memory; a trace file keeps all."),
    "check_interval": About("Log and limits", "Check the memory's integrity every so many steps (0: never)."),
    "policy_timeout": About("Log and limits", "Seconds that a plug-in may take for one answer."),
    "num_alternatives": About("Log and limits", "Rejected options that a decision keeps."),
    "view_cap": About("Log and limits", "Queued requests that policies see."),
}  # fmt: skip


def option_fields() -> list[str]:
    """The fields of EngineConfig that are options."""
    return [name for name in EngineConfig.__struct_fields__ if name not in HIDDEN_FIELDS]


def engine_options(
    *names: str, recorded: bool = False, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose parameter `engine` is a dict, an option for each field in `names` (all if none).

    `recorded`: the defaults come from a trace, so the help shows none. `defaults`: fields that are something else here
    than in a plain EngineConfig; `engine` holds them even if they were not given.
    """
    fields = names or tuple(option_fields())

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapper(**arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in fields}
            command(**arguments, engine=defaults | {name: value for name, value in given.items() if value is not None})

        _set_signature(wrapper, command, fields, recorded, defaults)
        return wrapper

    return decorate


def _set_signature(wrapper: Callable[..., None], command: Callable[..., None], fields: tuple[str, ...],
                   recorded: bool, defaults: Mapping[str, Any]) -> None:  # fmt: skip
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "engine"]
    shown = {name: "as recorded" if recorded else _shown({**_defaults(), **defaults}[name]) for name in fields}
    hints = _hints()
    options = [_parameter(name, hints[name], shown[name]) for name in fields]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + options
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapper.__wrapped__  # type: ignore[attr-defined]


def _shown(default: Any) -> str:
    return "auto" if default is None else str(default)


def _parameter(name: str, hint: Any, shown: str) -> inspect.Parameter:
    """The option of one field. Not given means None: the default stands in the help only."""
    about = ABOUT.get(name, About("Log and limits", f"EngineConfig.{name}."))
    choices = f" One of {', '.join(get_args(hint))}." if get_origin(hint) is Literal else ""
    option = typer.Option(
        *_option_names(name), help=f"{about.text}{choices} [dim]\\[default: {shown}][/dim]", rich_help_panel=about.panel,
        show_default=False, metavar="NAME" if choices or name in PLUG_IN_FIELDS else None,
        autocompletion=_completion(name) if name in PLUG_IN_FIELDS else None,
    )  # fmt: skip
    kind = _scalar(hint) | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _option_names(name: str) -> tuple[str, ...]:
    about = ABOUT.get(name)
    return about.names if about is not None and about.names else (f"--{name.replace('_', '-')}",)


def _defaults() -> dict[str, Any]:
    plain = EngineConfig()
    return {name: getattr(plain, name) for name in EngineConfig.__struct_fields__}


def _hints() -> dict[str, Any]:
    return get_type_hints(EngineConfig)


def _scalar(hint: Any) -> Any:
    """The type that the command line reads: text for names, so that the engine's own errors answer wrong ones."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return hint if hint in (bool, int, float) else str


def _completion(seam: str) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        from llmlab.plugins import REGISTRIES

        return [name for name in REGISTRIES[seam].names() if name.startswith(incomplete)]

    return complete


def as_words(engine: Mapping[str, Any]) -> list[str]:
    """The command-line words that give these fields."""
    words: list[str] = []
    for name, value in engine.items():
        option = _option_names(name)[0]
        if isinstance(value, bool):
            words.append(option.split("/")[0 if value else -1])
        else:
            words += [option, str(value)]
    return words
