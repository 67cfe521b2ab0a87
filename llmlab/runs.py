"""The Run that users hold: what its events say (llmlab.events.trace), and what could have been (forks)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmlab.events import trace


class Run(trace.Run):
    """A run that can be forked. See `llmlab.events.trace.Run` for everything else."""

    def fork(self, at: int, recorded: Mapping[str, Any] | None = None, **changes: Any) -> Run:
        """The same history up to step `at`, then simulated under other policies: `run.fork(at=412, victim="most_blocks")`.

        Raises as `llmlab.forking.fork`.
        """
        from llmlab.forking import fork

        return Run(fork(self, at, recorded, **changes))
