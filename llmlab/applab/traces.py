"""Recorded runs for a page: where they lie, what is wrong with one, what was decided in a step, and forks of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec

from llmlab import instead
from llmlab.applab.gallery import recorded_runs
from llmlab.comparing import Comparison, compare
from llmlab.events import catalog as ev
from llmlab.plugins import REGISTRIES
from llmlab.runs import Run
from llmlab.types import LabError, TraceError
from llmlab.ui.chart import seconds
from llmlab.ui.inspector import Forced, forced

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FORKED_SEAMS = ("ordering", "admission", "composer", "victim", "tiering")
LARGEST = 200_000  # events of a run that a page shows


class Opened(msgspec.Struct, frozen=True):
    """A run, or the `problem` that it could not be opened for. `note`: what is missing of it."""

    run: Run | None = None
    problem: str = ""
    note: str = ""


class Forked(msgspec.Struct, frozen=True):
    """The history up to a step continued twice on the simulated executor: as it was, and with another policy."""

    as_it_was: Run
    changed: Run
    comparison: Comparison
    at: int
    seam: str
    policy: str


def traces_here(folder: Path) -> dict[str, Path]:
    """Shipped runs, and traces in `folder` and the folders in it, by the name that a menu shows."""
    found = {f"shipped: {name}": path for name, path in recorded_runs().items()}
    for path in sorted([*folder.glob("*.jsonl*"), *folder.glob("*/*.jsonl*")])[:40]:
        if path.name.endswith(ENDINGS) and path.is_file():
            found[str(path.relative_to(folder))] = path
    return found


def opened(path: str | Path) -> Opened:
    """The trace of a file."""
    try:
        run = Run.load(Path(path).expanduser())
        return _shown(run)
    except LabError as error:
        return Opened(problem=f"{error.problem[:1].upper()}{error.problem[1:]}. {error.way_out}".strip())


def uploaded(name: str, content: bytes) -> Opened:
    """The trace that a visitor gave; its name says how it is packed."""
    ending = next((e for e in ENDINGS if name.endswith(e)), "")
    if not ending:
        return Opened(problem=f"{name} is no trace by its name. Give a file that ends with {', '.join(ENDINGS)}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{ending}"
        path.write_bytes(content)
        return opened(path)


def _shown(run: Run) -> Opened:
    if len(run.log_events) > LARGEST:
        raise TraceError("trace", len(run.log_events), f"has more than {LARGEST:,} events, which no page shows",
                         "Use `llmlab why` and `llmlab trace` on the command line.")  # fmt: skip
    if not run.requests:
        raise TraceError("trace", "", "holds no request", "Record one: `llmlab tour`, or `llmlab sim --trace FILE`.")
    notes = []
    if run.cut:
        notes.append(f"Its end is missing: {run.cut}.")
    if run.started.level < 2:
        notes.append(f"It was recorded at log level {run.started.level}: decisions are in it from level 2 on, so it cannot be forked.")
    return Opened(run, note=" ".join(notes))


# --------------------------------------------------------------------------------------- one step
def finished_step(run: Run, step: int) -> int:
    """The last step that finished at or before `step` (-1: the end)."""
    ends = [e.step for e in run.log_events if isinstance(e, ev.StepFinished)]
    return max((s for s in ends if step < 0 or s <= step), default=-1)


def decision_table(run: Run, step: int) -> str:
    """What was decided in `step`, and what else was possible, as a table of Markdown; a sentence if there is nothing."""
    found = [e for e in run.events("Decision", step=step) if e.seam != "eviction"]
    if not found:
        return f"No decision was recorded in step {step}: everybody who ran before ran on."
    lines = ["| who decides | about | chose | because | instead |", "|:---|:---|:---|:---|:---|"]
    for event in found[:30]:
        instead = "<br>".join(_option(a) for a in event.alternatives[:4]) or "-"
        cost = f" ({seconds(event.predicted.seconds)})" if event.predicted is not None else ""
        lines.append(f"| {event.seam}: {event.policy} | {event.request or '-'} | {_cell(event.chosen)}{cost} | {_cell(event.reason)} | {instead} |")
    return "\n".join(lines)


def _option(a: ev.Alternative) -> str:
    told = [f"predicted {seconds(a.predicted.seconds)}"] if a.predicted is not None else []
    told += [] if a.feasible else ["not possible"]
    told += [a.why_not] if a.why_not else []
    return _cell(f"{a.option}{': ' + ', '.join(told) if told else ''}")


def _cell(text: str) -> str:
    short = text if len(text) <= 90 else text[:87] + "..."
    return short.replace("|", "\\|").replace("<", "&lt;")


# ------------------------------------------------------------------------------------------ forks
def choices(run: Run, seam: str) -> list[str]:
    """The policies of a seam that the run was not recorded with."""
    return [name for name in REGISTRIES[seam].names() if name != run.started.config.get(seam)]


def others(run: Run, step: int) -> dict[str, Forced]:
    """What else could have been decided in `step`, by the words of a menu, as far as a fork can force it."""
    found = {}
    for event in run.events("Decision", step=step):
        for one in event.alternatives:
            try:
                found[f"{event.seam}: {one.option} instead of {event.chosen}"] = forced(run, event.seq, one.option)
            except LabError:  # a decision of another kind, or one that was not possible
                continue
    return found


def forked(run: Run, at: int, seam: str, policy: str | Forced) -> Forked:
    """Continue `run` after step `at` under `policy`, or with one other choice, and, for a fair comparison, as it was: both
    simulated. Raises LabError."""
    as_it_was = run if run.mode == "simulated" else run.fork(at)
    plugin = getattr(instead, policy.plugin)(policy.option, policy.step, policy.asker, policy=policy.policy) if isinstance(policy, Forced) else policy
    changes: dict[str, Any] = {seam: plugin}
    changed = run.fork(at, **changes)
    return Forked(as_it_was, changed, compare(as_it_was, changed), at, seam, policy if isinstance(policy, str) else f"{policy.option} instead")


def fork_finding(fork: Forked) -> str:
    """What the other policy changed, in one sentence."""
    told = []
    for quantity, name in (("ttft", "mean time to first token"), ("e2e", "mean latency")):
        ratio = fork.comparison.mean_ratio(quantity)
        if ratio is not None and abs(ratio - 1) >= 0.005:
            better = fork.comparison.better(quantity)
            told.append(f"the {name} {'falls' if ratio < 1 else 'rises'} by {abs(ratio - 1):.0%} (better for {better} of {len(fork.comparison.requests)})")
    if not told:
        return f"With {fork.seam} {fork.policy} from step {fork.at} on, the mean latencies stay as they are"
    return f"With {fork.seam} {fork.policy} from step {fork.at} on, {' and '.join(told)}"
