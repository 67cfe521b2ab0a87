"""Trace files: one JSON event a line, compressed by the file's suffix (.zst, .gz, or plain)."""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import msgspec
import zstandard

from llmlab.events.catalog import SCHEMA, AnyEvent, Event, RunStarted
from llmlab.types import TraceError

_FLUSH_EVERY = 512
_READ_BYTES = 1 << 16
_DAMAGED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what decoding a damaged line may raise


class TraceWriter:
    """A sink that writes events to a file as they happen. If the disk fills up or the path goes away, it says so
    once on stderr, drops what follows and lets the run go on; the file stays readable up to that point."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.error: Exception | None = None
        self._encode = msgspec.json.Encoder(enc_hook=str).encode
        self._lines: list[bytes] = []
        try:
            self._file: IO[bytes] | None = _open_write(self.path)
        except OSError as error:
            raise TraceError("trace", str(path), f"cannot be written ({error.strerror or error})",
                             "Give a path in a directory that exists and that you may write.") from None  # fmt: skip

    def write(self, event: Event) -> None:
        if self._file is None:
            return
        try:
            self._lines.append(self._encode(event))
        except (TypeError, ValueError, OverflowError) as error:  # a plug-in put something into it that is no data
            self._flush()
            self._fail(error)
            return
        if len(self._lines) >= _FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        if self._file is None or not lines:
            return
        try:
            self._file.write(b"\n".join(lines) + b"\n")
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._fail(error)
        self._file = None

    def _fail(self, error: Exception) -> None:
        if self.error is not None:
            return
        self.error, file = error, self._file
        self._file = None
        if file is not None:
            with contextlib.suppress(OSError):  # what is still buffered cannot be saved
                file.close()
        print(f"llmlab: the trace {self.path} ends here: {_said(error)}. The run goes on.", file=sys.stderr)


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _open_write(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        return zstandard.ZstdCompressor(level=3).stream_writer(path.open("wb"), closefd=True)
    if path.suffix == ".gz":
        return gzip.open(path, "wb", compresslevel=4)  # type: ignore[return-value]
    return path.open("wb")


class _ZstdFile(io.RawIOBase):
    """A compressed file that notices when its end is missing, which zstandard's own reader does not."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._frame.eof:
            packed = self._file.read(_READ_BYTES)
            if not packed:
                raise EOFError("it ends in the middle of its compressed data")
            self._ready = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_read(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def write_trace(path: str | Path, events: Iterable[Event]) -> None:
    """Write all events to `path`, or raise TraceError (a full disk, a missing directory)."""
    writer = TraceWriter(path)
    for event in events:
        writer.write(event)
    writer.close()
    if writer.error is not None:
        raise TraceError("trace", str(path), f"could not be written whole ({_said(writer.error)})",
                         "Free some space, or choose another path.")  # fmt: skip


class LoadedTrace(msgspec.Struct, frozen=True):
    """Events of a file, and `cut`: why its end is missing, or "" if it is whole."""

    events: list[Event]
    cut: str = ""


def read_trace(path: str | Path) -> LoadedTrace:
    """Events of a trace file. A damaged tail is cut off and named; a file without a readable beginning, or of
    another schema, raises TraceError."""
    path = Path(path)
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(AnyEvent)
    events: list[Event] = []
    cut = ""
    number = 0
    try:
        with _open_read(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    _check_schema(path, line)
                event = decoder.decode(line)
                if events and event.seq != events[-1].seq + 1:
                    cut = f"line {number} is event {event.seq}, event {events[-1].seq + 1} is missing"
                    break
                events.append(event)
    except FileNotFoundError:
        raise TraceError("trace", str(path), "does not exist", "`llmlab run ... --trace FILE` writes one.") from None
    except _DAMAGED as error:
        cut = f"line {number} is damaged ({error})"
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        cut = f"after line {number} the file is damaged ({error})"
    if not events:
        raise TraceError("trace", str(path), cut or "is empty", "Give a file that llmlab wrote (.jsonl, .jsonl.gz, .jsonl.zst).")
    return LoadedTrace(events, cut)


def _check_schema(path: Path, line: bytes) -> None:
    try:
        first = msgspec.json.decode(line)
    except _DAMAGED as error:
        raise TraceError("trace", str(path), f"line 1 is not JSON ({error})", "Is this a llmlab trace?") from None
    if not isinstance(first, dict) or first.get("event") != RunStarted.__name__:
        raise TraceError("trace", str(path), "does not begin with RunStarted", "Is this a whole llmlab trace?")
    schema = first.get("schema")
    if schema != SCHEMA:
        raise TraceError("trace", str(path), f"has schema {schema}, this llmlab reads schema {SCHEMA}",
                         "Read it with the llmlab version that wrote it: " + str(first.get("code", "unknown")))  # fmt: skip
