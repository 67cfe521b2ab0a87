"""Runs as tables: facts, metrics with their units, latencies, events; and `why` as wrapped sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmlab.cli.timeline import MARKS
from llmlab.events.why import TITLES, count, seconds

if TYPE_CHECKING:
    from llmlab.events.metrics import RunMetrics, Summary
    from llmlab.events.trace import Run
    from llmlab.events.why import Stretch, Why


NAME_WIDTH = 24  # columns that a name gets at least before it is wrapped
SIDE_BY_SIDE = 136  # columns that two tables need


class Fact(NamedTuple):
    """One row of a table of facts."""

    name: str
    value: str
    meaning: str = ""


def facts_table(facts: Iterable[Fact], title: str = "") -> Table:
    """Names, values and, where there is one, what the value means."""
    rows = list(facts)
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, show_header=False,
                  padding=(0, 2, 0, 0))  # fmt: skip
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    if any(fact.meaning for fact in rows):
        table.add_column(style="dim")
    for fact in rows:
        table.add_row(*(Text(part) for part in fact[: len(table.columns)]))
    return table


def text_table(rows: Sequence[Sequence[str]], wide: int = 1) -> Table:
    """Rows of plain text, the first one the head; all but the first `wide` columns stand at the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(rows[0]):
        longest = max(len(row[index]) for row in rows)
        table.add_column(Text(name), justify="left" if index < wide else "right", no_wrap=index >= wide, min_width=min(longest, NAME_WIDTH))
    for row in rows[1:]:
        table.add_row(*(Text(cell, "cyan" if index == 0 else "") for index, cell in enumerate(row)))
    return table


# ------------------------------------------------------------------------------------------ metrics
def metric_facts(m: RunMetrics, num_blocks: int) -> list[Fact]:
    """A run's metrics with units, as people read them."""
    facts = [
        Fact("duration", seconds(m.duration), f"{m.num_finished} of {m.num_requests} requests finished"
             + (f", {m.num_refused} refused" if m.num_refused else "")),
        Fact("steps", f"{m.num_steps}", f"{m.mean_batch:.1f} tokens in a step on average"),
        Fact("output", f"{m.output_throughput:,.0f} tok/s", f"{m.output_tokens:,} tokens"),
        Fact("prompts and output", f"{m.total_token_throughput:,.0f} tok/s", f"{m.prompt_tokens:,} prompt tokens"),
        Fact("requests", f"{m.request_throughput:.2f} /s"),
        Fact("computed", f"{m.computed_tokens:,} tokens"),
        Fact("prefix hit rate", f"{m.prefix_hit_rate:.1%}", f"{m.cached_tokens:,} tokens came from the prefix cache"),
        Fact("preemptions", f"{m.num_preemptions}", "KV memory ran out"),
        Fact("recompute tax", f"{m.recompute_tax:.1%}", f"{m.recomputed_tokens:,} tokens were computed again"),
        Fact("KV peak", f"{m.max_kv_blocks} blocks", f"of {num_blocks}"),
    ]
    if m.mode == "measured":
        facts.append(Fact("scheduler's share", f"{m.schedule_share:.1%}", "of the time of the steps"))
        ratio = m.predicted_over_measured
        if ratio.p50 is not None:
            facts.append(Fact("predicted / measured", f"{ratio.p50:.2g}", "a step's time by the roofline, median"))
    return facts


LATENCIES = (
    ("ttft", "TTFT", "to the first token"),
    ("tpot", "TPOT", "per token after it"),
    ("itl", "ITL", "between releases"),
    ("e2e", "E2E", "to the end"),
    ("queue_time", "queue", "until first scheduled"),
)


def latency_table(m: RunMetrics) -> Table:
    """Percentiles (nearest rank) of the latencies."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("latency", "mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="left" if name == "latency" else "right", no_wrap=True)
    table.add_column("", style="dim")
    for field, name, meaning in LATENCIES:
        table.add_row(Text(name, "cyan"), *_percentiles(getattr(m, field)), meaning)
    return table


def _percentiles(s: Summary) -> list[str]:
    return ["-" if value is None else seconds(value) for value in (s.mean, s.p50, s.p90, s.p99, s.max)]


def metrics_and_latencies(run: Run, width: int) -> RenderableType:
    """All metrics of a run; side by side where `width` columns allow it."""
    return metrics_tables(run.metrics, int(run.started.config.get("num_blocks") or 0), width)


def metrics_tables(m: RunMetrics, num_blocks: int, width: int) -> RenderableType:
    """Metrics and latencies, of a pool of `num_blocks`; side by side where `width` columns allow it."""
    facts, latencies = facts_table(metric_facts(m, num_blocks)), latency_table(m)
    if width < SIDE_BY_SIDE:
        return Group(facts, "", latencies)
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_row(facts, latencies)
    return grid


def measured_or_simulated(run: Run) -> str:
    """What kind of time a run's numbers are, as a phrase."""
    hardware = run.started.hardware
    if run.mode == "simulated":
        return f"simulated on {hardware.get('name', '?')}, nothing was measured"
    threads = f", {count(hardware['threads'], 'thread')}" if "threads" in hardware else ""
    return f"measured on this machine ({hardware.get('device', '?')}{threads})"


# -------------------------------------------------------------------------------------- a whole run
def run_facts(run: Run) -> list[Fact]:
    """Where and how a run was recorded."""
    started, config = run.started, run.started.config
    hardware, model = started.hardware, started.model
    detail = ", ".join(f"{k} {hardware[k]}" for k in ("device", "dtype", "kernels", "threads", "cores", "torch") if k in hardware)
    facts = [
        Fact("model", str(model.get("name", "?"))),
        Fact("mode", f"{started.mode}, with predictions for {hardware.get('name', '?')}"),
        Fact("machine", detail or str(hardware.get("name", "?"))),
        Fact("KV pool", f"{config.get('num_blocks')} blocks of {config.get('block_size')} tokens"),
        Fact("policies", policies_line(config)),
        Fact("limits", f"{config.get('max_num_batched_tokens')} tokens and {config.get('max_num_seqs')} requests in a step,"
                       f" overlap {config.get('overlap_depth')}"),
        Fact("recorded by", f"llmlab {started.code}, log level {started.level}, seed {started.seed}"),
    ]  # fmt: skip
    return [*facts, Fact("damaged", run.cut)] if run.cut else facts


def policies_line(config: object) -> str:
    from llmlab.config import SEAM_FIELDS

    assert isinstance(config, dict)
    return ", ".join(str(config[name]) for name in SEAM_FIELDS if name in config)


def event_table(run: Run) -> Table:
    """How many events of each kind, the most frequent first."""
    counts = Counter(type(event).__name__ for event in run.log_events)
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    columns = 3
    for _ in range(columns):
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    ranked = counts.most_common()
    height = -(-len(ranked) // columns)
    for row in range(height):
        line = [cell for kind, n in ranked[row::height] for cell in (kind, f"{n:,}")]
        table.add_row(*line)
    return table


# ----------------------------------------------------------------------------------------------- why
def why_text(why: Why) -> RenderableType:
    """The answer to `why`, wrapped to the console: headline, then each stretch with its sentences."""
    parts: list[RenderableType] = [Text(why.headline, "bold")]
    for stretch in why.stretches:
        parts.append(stretch_title(stretch))
        parts += [Padding(bullet(sentence), (0, 0, 0, 4)) for sentence in stretch.sentences]
    return Group(*parts)


def stretch_title(stretch: Stretch) -> Text:
    mark = MARKS[stretch.kind]
    title = Text("  ")
    title.append("■ ", mark.style)
    title.append(f"{seconds(stretch.start)} to {seconds(stretch.end)}  ", "dim")
    return title.append(f"{TITLES[stretch.kind]} ({seconds(stretch.seconds)})", mark.style)


def bullet(sentence: str) -> Table:
    """A sentence with a hanging indent."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("-", Text(sentence))
    return table
