"""`python -m llmlab.cli`: the same as the `llmlab` script."""

from __future__ import annotations

from llmlab.cli import main

main()
