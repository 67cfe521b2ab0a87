"""Which apps there are, and where their files lie."""

from __future__ import annotations

from pathlib import Path

import msgspec

import llmlab
from llmlab.types import ConfigError, unknown_name


class App(msgspec.Struct, frozen=True):
    """One app: its file's name, its title, the one idea that it shows, and a word to visitors who choose."""

    name: str
    title: str
    idea: str
    hint: str = ""


APPS = (
    App("chunked_prefill", "Chunked prefill",
        "Eight people read their answers, a token at a time; somebody sends a long prompt, and all stand still. Cut it into chunks.",
        "Start here: one minute, two sliders"),
    App("engine_room", "Engine room",
        "A real engine under a stream of requests. Turn a knob and watch the next step obey; click a bar and read why it was late."),
    App("policy_lab", "Policy lab",
        "Write a scheduling policy in ten lines. It is checked, then raced against the built-in ones on the same arrivals."),
    App("time_machine", "Time machine",
        "Open a recorded run, go to any step, read what was decided and what else was possible, and let it go on differently."),
    App("roofline_explorer", "Roofline explorer",
        "A model, a machine, a batch: what bounds a step, what fits into memory, and what it costs in joules."),
    App("kv_lab", "KV lab",
        "Who owns the memory: block size, shared beginnings and eviction, and what each of them saves."),
    App("speculation", "Speculation",
        "Draft several tokens, verify them in one step: how many were right, and was it worth it? On the real engine."),
    App("experts", "Experts",
        "A mixture of experts of which only some fit on the device: fetch them, keep them, or compute them on the CPU?"),
    App("overlap", "CPU and GPU in parallel",
        "A small GPU whose CPU attends, too: four placements under one load, who works when, and what a token costs where. Simulated."),
)  # fmt: skip


def app(name: str) -> App:
    """The app of this name. Raises ConfigError with the nearest names."""
    found = {one.name: one for one in APPS}
    if name not in found:
        raise unknown_name("app", name, found)
    return found[name]


def app_file(name: str) -> Path:
    """The notebook of an app: inside an installed package, or in `apps/` of a source checkout. Raises ConfigError."""
    package = Path(llmlab.__path__[0])
    places = [package / "_apps" / f"{name}.py", package.parent / "apps" / f"{name}.py"]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError("app", name, "its file is not installed", f"It should be at {places[0]}; install llmlab again.")


def recorded_file(name: str) -> Path:
    """A file among the recorded runs: inside an installed package, or of a source checkout. Raises ConfigError."""
    package = Path(llmlab.__path__[0])
    places = [root / "runs" / name for root in (package / "_data", package.parent / "datasets")]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError("recorded", name, "is not installed", f"It should be at {places[0]}; install llmlab again.")


def recorded_runs() -> dict[str, Path]:
    """Traces that come with llmlab, by name."""
    package = Path(llmlab.__path__[0])
    found: dict[str, Path] = {}
    for root in (package / "_data" / "runs", package.parent / "datasets" / "runs"):
        for path in sorted(root.glob("*.jsonl.zst")):
            found.setdefault(path.name.removesuffix(".jsonl.zst"), path)
    return found
