"""Public request traces, as workloads. The files are the user's: nothing of them comes with llmlab.

    Azure      CSV         TIMESTAMP, ContextTokens, GeneratedTokens
    BurstGPT   CSV         Timestamp (s), [Session ID, Elapsed time,] Model, Request tokens, Response tokens, ..., Log Type
    Mooncake   JSON lines  timestamp (ms), input_length, output_length, hash_ids

Every reader checks each line: a malformed one, or one that lies before its predecessor, is a TraceError with its number.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llmlab.types import TraceError
from llmlab.workloads.workload import Workload

BLOCK_TOKENS = 512  # of a Mooncake hash id


class Row(NamedTuple):
    """One request of a trace: seconds and tokens."""

    time: float
    prompt: int
    output: int
    session: str | None = None
    blocks: tuple[int, ...] = ()


class _Place(NamedTuple):
    """A line of a file, for errors."""

    path: Path
    line: int

    def error(self, value: object, problem: str, way_out: str = "") -> TraceError:
        return TraceError(f"{self.path.name} line {self.line}", value, problem, way_out)


def read_azure(path: str | Path, n: int | None = None, **more: Any) -> Workload:
    """An Azure trace; its first `n` requests. `more` are fields of Workload. Raises TraceError."""
    return _workload(path, n, _azure_rows(Path(path)), **more)


def read_burstgpt(path: str | Path, n: int | None = None, model: str | None = None, log_type: str | None = None,
                  **more: Any) -> Workload:  # fmt: skip
    """A BurstGPT trace without its failed requests (no tokens), only those of `model` ("ChatGPT", "GPT-4") and `log_type`
    ("Conversation log", "API log") if given; the first `n` of them. Raises TraceError."""
    wanted = {name: value for name, value in (("Model", model), ("Log Type", log_type)) if value is not None}
    return _workload(path, n, _burstgpt_rows(Path(path), wanted), **more)


def read_mooncake(path: str | Path, n: int | None = None, block_tokens: int = BLOCK_TOKENS, **more: Any) -> Workload:
    """A Mooncake trace; its first `n` requests. Each hash id stands for `block_tokens` tokens. Raises TraceError."""
    return _workload(path, n, _mooncake_rows(Path(path), block_tokens), block_tokens=block_tokens, **more)


def _workload(path: str | Path, n: int | None, rows: Iterator[Row], **more: Any) -> Workload:
    kept: list[Row] = []
    for row in rows:
        if n is not None and len(kept) >= n:
            break
        kept.append(row)
    if not kept:
        raise TraceError("trace", str(path), "holds no request" if n is None or n > 0 else f"n={n} takes no request")
    first = kept[0].time
    return Workload(
        tuple(row.time - first for row in kept), tuple(row.prompt for row in kept), tuple(row.output for row in kept),
        blocks=tuple(row.blocks for row in kept) if kept[0].blocks else (),
        session_ids=tuple(row.session for row in kept) if any(row.session for row in kept) else (),
        **{"about": Path(path).name, **more},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ formats
def _azure_rows(path: Path) -> Iterator[Row]:
    first: datetime | None = None
    last = 0.0
    for place, fields in _csv_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        when = _parsed(place, "TIMESTAMP", fields["TIMESTAMP"], datetime.fromisoformat, "a date and time")
        first = when if first is None else first
        try:
            seconds = (when - first).total_seconds()
        except TypeError:
            raise place.error(fields["TIMESTAMP"], "has a time zone and the first line none, or the reverse") from None
        last = _in_order(place, seconds, last, fields["TIMESTAMP"])
        yield Row(seconds, _tokens(place, fields, "ContextTokens", 1), _tokens(place, fields, "GeneratedTokens", 1))


def _burstgpt_rows(path: Path, wanted: Mapping[str, str]) -> Iterator[Row]:
    last = 0.0
    for place, fields in _csv_rows(path, ("Timestamp", "Request tokens", "Response tokens", *wanted)):
        seconds = _parsed(place, "Timestamp", fields["Timestamp"], _seconds, "a number of seconds")
        last = _in_order(place, seconds, last, fields["Timestamp"])
        prompt, output = (_tokens(place, fields, name, 0) for name in ("Request tokens", "Response tokens"))
        if prompt and output and all(fields[name] == value for name, value in wanted.items()):
            yield Row(seconds, prompt, output, fields.get("Session ID") or None)


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def _mooncake_rows(path: Path, block_tokens: int) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    last = 0.0
    with _opened(path) as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            place = _Place(path, number)
            try:
                line = decoder.decode(text)
            except msgspec.DecodeError as error:
                raise place.error(text.strip(), f"is not a request ({error})", _MOONCAKE_FORM) from None
            _check_mooncake(place, line, block_tokens)
            last = _in_order(place, line.timestamp / 1000, last, line.timestamp)
            yield Row(last, line.input_length, line.output_length, blocks=tuple(line.hash_ids))


_MOONCAKE_FORM = 'Write {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}.'


def _check_mooncake(place: _Place, line: _MooncakeLine, block_tokens: int) -> None:
    for name in ("input_length", "output_length"):
        if getattr(line, name) < 1:
            raise place.error(getattr(line, name), f"{name} must be at least 1")
    if len(line.hash_ids) != -(-line.input_length // block_tokens):
        raise place.error(len(line.hash_ids), f"hash ids do not cover {line.input_length} tokens in blocks of {block_tokens}",
                          "Pass the trace's own block_tokens.")  # fmt: skip
    if min(line.hash_ids) < 0:
        raise place.error(min(line.hash_ids), "hash ids must not be negative")


# ------------------------------------------------------------------------------------------- lines
@contextmanager
def _opened(path: Path) -> Iterator[TextIOWrapper]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise TraceError("trace", str(path), f"cannot be read ({error.strerror})",
                         "Download it from its publisher; docs/workloads.md says where.") from None  # fmt: skip
    except UnicodeDecodeError as error:
        raise TraceError(
            "trace", str(path), f"is not UTF-8 text ({error.reason})", "Is it compressed? Unpack it."
        ) from None


def _csv_rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[_Place, dict[str, str]]]:
    """The rows of a CSV file with a header, as dicts. Raises TraceError."""
    with _opened(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in needed if name not in header]
            if missing:
                raise _Place(path, 1).error(header, f"has no column {missing[0]}", f"Needed: {', '.join(needed)}.")
            for fields in reader:
                place = _Place(path, reader.line_num)
                if len(fields) == len(header):
                    yield place, dict(zip(header, fields))
                elif fields:
                    raise place.error(fields, f"has {len(fields)} fields, the header {len(header)}")
        except csv.Error as error:
            raise _Place(path, reader.line_num).error("", f"is not CSV ({error})") from None


def _parsed(place: _Place, name: str, text: str, parse: Callable[[str], Any], what: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        raise place.error(text, f"{name} is not {what}") from None


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _tokens(place: _Place, fields: Mapping[str, str], name: str, low: int) -> int:
    count = _parsed(place, name, fields[name], int, "a whole number")
    if not low <= count < 2**40:
        raise place.error(fields[name], f"{name} must be a number of tokens, at least {low}")
    return int(count)


def _in_order(place: _Place, seconds: float, last: float, shown: object) -> float:
    if not seconds >= last:
        raise place.error(shown, "lies before the line above it", "Sort the file by time.")
    return seconds
