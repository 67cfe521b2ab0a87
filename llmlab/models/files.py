"""JSON files of a model directory, with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmlab.types import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError says which file and where it breaks."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ModelError(path.name, str(path), f"not valid JSON ({error})", "Fetch it again.") from error
    if not isinstance(value, dict):
        raise ModelError(path.name, str(path), "holds no JSON object", "Fetch it again.")
    return value
