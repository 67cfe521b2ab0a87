"""The Run that users hold: what its events say (llmlab.events.trace), and what could have been (forks)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from llmlab.events import trace


class Run(trace.Run):
    """What an engine did, as events, and what could have been. Immutable: take a new one to see more."""

    def fork(self, at: int, recorded: Mapping[str, Any] | None = None, **changes: Any) -> Run:
        """The same history up to step `at`, then simulated under other policies: `run.fork(at=412, victim="most_blocks")`.

        Raises as `llmlab.forking.fork`.
        """
        from llmlab.forking import fork

        return Run(fork(self, at, recorded, **changes))

    def to_html(self, path: str | Path, theme: Literal["light", "dark", "auto"] = "auto") -> Path:
        """Write the run as one HTML page that opens from disk without a network: the timeline to scrub and play, why each
        request was late, figures, tables. Raises ConfigError for an unknown theme, TraceError if it cannot be written."""
        # By name: pictures are drawn some floors above, and a run must load where they are not installed.
        written: Path = import_module("llmlab.ui.report").write_report(self, path, theme=theme)
        return written
