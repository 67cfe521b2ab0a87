"""A run as lines of text: one row a request, one character a slice of time, and the KV memory beneath.

    r0 ██━━━━━━━━━━━━━━━━━━━━                 1.20 s
    r7 ····█━━━━━━━×××××××▓━━━━━━━━━          2.31 s
    KV ▂▄▆████████████████▇▇▆▄▃▂             max 98 %

Characters differ as well as colours, so the picture survives NO_COLOR and a copy into a mail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

if TYPE_CHECKING:
    from llmlab.events.trace import Run
    from llmlab.events.why import Stretch


class Mark(NamedTuple):
    """How one kind of stretch is drawn. `ascii` where the terminal cannot show `char`."""

    char: str
    ascii: str
    style: str
    title: str


MARKS: Mapping[str, Mark] = {
    "queued": Mark("·", ".", "bright_black", "waiting"),
    "prompt": Mark("█", "#", "cyan", "prompt"),
    "decode": Mark("━", "=", "green", "decoding"),
    "preempted": Mark("×", "x", "red", "preempted"),
    "recompute": Mark("▓", "%", "magenta", "computing again"),
}
LEVELS, ASCII_LEVELS = " ▁▂▃▄▅▆▇█", " 123456789"
EDGE = 9  # columns right of the bars


class Row(NamedTuple):
    """One request: its stretches in order, and what stands right of its bar."""

    name: str
    stretches: Sequence[Stretch]
    note: str


class Use(NamedTuple):
    """KV blocks in use from `start` [s] to `end` [s]."""

    start: float
    end: float
    blocks: int


class Timeline:
    """A rich renderable; as wide as it may be."""

    def __init__(self, rows: Sequence[Row], usage: Sequence[Use], num_blocks: int, start: float, end: float) -> None:
        self.rows, self.usage, self.num_blocks = rows, usage, num_blocks
        self.start, self.end = start, max(end, start + 1e-9)

    @classmethod
    def of(cls, run: Run, requests: Iterable[str] | None = None) -> Timeline:
        """The given requests of a run (all if none)."""
        from llmlab.events.why import seconds

        names = list(run.requests if requests is None else requests)
        rows = []
        for name in names:
            metrics = run.requests[name]
            rows.append(Row(name, run.why(name).stretches, "" if metrics.e2e is None else seconds(metrics.e2e)))
        done = [s for s in run.steps if s.end is not None]
        ends = [s.start for s in done[1:]] + [s.end or s.start for s in done[-1:]]  # blocks are held between steps, too
        usage = [Use(s.start, end, s.used_blocks) for s, end in zip(done, ends, strict=True)]
        begin = min((m.arrival for m in run.requests.values()), default=0.0)
        num_blocks = int(run.started.config.get("num_blocks") or 0)
        return cls(rows, usage, num_blocks, begin, run.log_events[-1].t)

    # --------------------------------------------------------------------------------- the picture
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not console.encoding.lower().startswith("utf")
        label = max([len(row.name) for row in self.rows] + [2]) + 1
        width = max(10, options.max_width - label - EDGE)
        for row in self.rows:
            yield self._line(console, row, label, width, plain)
        if self.usage and self.num_blocks:
            yield self._memory(label, width, plain)
        yield self._axis(label, width)
        yield self._legend(plain)

    def _line(self, console: Console, row: Row, label: int, width: int, plain: bool) -> Text:
        text = Text(f"{row.name:<{label}}", no_wrap=True, end="\n")
        for segment in self._segments(console, cells(row.stretches, self.start, self.end, width), plain):
            text.append(segment.text, segment.style)
        return text.append(f"{row.note:>{EDGE}}", "bold")

    @staticmethod
    def _segments(console: Console, kinds: Sequence[str], plain: bool) -> Iterable[Segment]:
        for kind in kinds:
            mark = MARKS.get(kind)
            if mark is None:
                yield Segment(" ", Style.null())
            else:
                yield Segment(mark.ascii if plain else mark.char, console.get_style(mark.style))

    def _memory(self, label: int, width: int, plain: bool) -> Text:
        """The pool's fullest moment in each slice of time."""
        levels = ASCII_LEVELS if plain else LEVELS
        text = Text(f"{'KV':<{label}}", no_wrap=True)
        shares = [blocks / self.num_blocks for blocks in peaks(self.usage, self.start, self.end, width)]
        for share in shares:
            style = "red" if share > 0.97 else "yellow" if share > 0.8 else "green"
            text.append(levels[min(len(levels) - 1, -(-int(share * 1000) * (len(levels) - 1) // 1000))], style)
        return text.append(f"{f'max {max(shares):.0%}':>{EDGE}}", "bold")

    def _axis(self, label: int, width: int) -> Text:
        """Times of the run's clock below the first, middle and last column."""
        from llmlab.events.why import seconds

        left, right = seconds(self.start), seconds(self.end)
        middle = seconds((self.start + self.end) / 2) if width > 40 else ""
        inner = f"{middle:^{max(0, width - len(left) - len(right))}}"
        return Text(" " * label + left + inner + right, style="dim", no_wrap=True)

    def _legend(self, plain: bool) -> Text:
        text = Text()
        for mark in MARKS.values():
            text.append((mark.ascii if plain else mark.char) * 2, mark.style)
            text.append(f" {mark.title}   ")
        return text


def cells(stretches: Sequence[Stretch], start: float, end: float, width: int) -> list[str]:
    """The kind of stretch in each of `width` slices of [start, end]; every stretch gets at least one slice."""
    scale = width / (end - start)
    drawn = [""] * width
    cursor = 0
    for stretch in stretches:
        first = min(max(cursor, int((stretch.start - start) * scale)), width - 1)
        cursor = min(max(first + 1, round((stretch.end - start) * scale)), width)
        drawn[first:cursor] = [stretch.kind] * (cursor - first)
    return drawn


def peaks(usage: Sequence[Use], start: float, end: float, width: int) -> list[int]:
    """The most blocks in use in each of `width` slices of [start, end]."""
    scale = width / (end - start)
    found = [0] * width
    for use in usage:
        first, last = (min(width - 1, max(0, int((t - start) * scale))) for t in (use.start, use.end))
        for column in range(first, last + 1):
            found[column] = max(found[column], use.blocks)
    return found
