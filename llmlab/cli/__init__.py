"""The command line: `llmlab tour`, `run`, `sim`, `compare`, `fork`, `sweep`, `check`, `roofline`, `profile`, `why`, `trace`,
`models`, `policies`, `kernels`, `bench`.

Data goes to stdout, progress and errors to stderr. A mistake of the user ends with exit code 2 and the text of the
LabError, Ctrl-C with 130. Nothing heavy is imported before a command needs it, so that `--help` is quick.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """The entry point of the `llmlab` script."""
    from llmlab.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?", it ends no command
    app(prog_name="llmlab")


__all__ = ["main"]
