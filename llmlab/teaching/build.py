"""Notebooks from lessons: `python -m llmlab.teaching.build lessons/` writes one .ipynb beside each percent script.

The script is the source; a notebook is its cells, after one that offers Colab and one that installs llmlab where it is
missing. No outputs, no dates, no pictures from elsewhere, fixed cell ids: building again changes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmlab.teaching.scripts import Cell, Lesson, lessons_in
from llmlab.types import LabError

COLAB = "https://colab.research.google.com/"
_NEEDED = """\
# Where llmlab is missing (in Colab, for example), it is installed first. Elsewhere this does nothing.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("llmlab") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", {source!r}], check=True)
    importlib.invalidate_caches()"""
# No package index has llmlab (yet), so where it is missing it comes from a wheel beside the notebook.
_MISSING = """\
# Where llmlab is missing (in Colab, for example), it is installed from a wheel that lies beside this notebook. Elsewhere this does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("llmlab") is None:
    wheels = sorted(Path().glob("llmlab-*.whl"))
    if not wheels:
        raise ImportError("llmlab is not installed here. In a checkout: pip install '.[apps]'. In Colab: make a wheel in a checkout with "
                          "`pip wheel --no-deps .`, upload it (files, on the left), and run this cell again.")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"./{wheels[-1]}[apps]"], check=True)
    importlib.invalidate_caches()"""


def repository_of(root: Path) -> str:
    """OWNER/NAME where this project is published, from `[tool.llmlab] repository` in pyproject.toml; "" if nowhere."""
    file = root / "pyproject.toml"
    if not file.exists():
        return ""
    settings = tomllib.loads(file.read_text(encoding="utf-8"))
    return str(settings.get("tool", {}).get("llmlab", {}).get("repository", ""))


def notebook(lesson: Lesson, repository: str = "") -> str:
    """The .ipynb of a lesson as text."""
    cells = [Cell("markdown", _badge(lesson, repository), "", 0), Cell("code", _install(repository), "", 0), *lesson.cells]
    content = {
        "cells": [_cell(cell, f"{lesson.number}-{i:02}") for i, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _badge(lesson: Lesson, repository: str) -> str:
    """A link without a picture: Colab's own badge would be fetched from elsewhere, and be a broken one without a network."""
    if repository:
        return f"[▶ Open in Colab]({COLAB}github/{repository}/blob/main/lessons/{lesson.name}.ipynb)"
    return f"[▶ Open in Colab]({COLAB}) (upload this file there, and a wheel of llmlab: the next cell says how)"


def _install(repository: str) -> str:
    source = f"llmlab[apps] @ git+https://github.com/{repository}"
    return _NEEDED.format(source=source) if repository else _MISSING


def _cell(cell: Cell, name: str) -> dict[str, Any]:
    lines = cell.source.splitlines(keepends=True)
    common = {"cell_type": cell.kind, "id": name, "metadata": {"tags": [cell.name]} if cell.name else {}}
    return {**common, "source": lines} if cell.kind == "markdown" else {**common, "execution_count": None, "outputs": [], "source": lines}


def outdated(folder: Path) -> list[Path]:
    """Notebooks that are missing, or differ from what building gives. Raises ConfigError if there is no lesson."""
    return [path for path, text in _built(folder) if not path.exists() or path.read_text(encoding="utf-8") != text]


def _built(folder: Path) -> list[tuple[Path, str]]:
    repository = repository_of(folder.resolve().parent)
    return [(lesson.path.with_suffix(".ipynb"), notebook(lesson, repository)) for lesson in lessons_in(folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. With `--check` it writes nothing and answers 1 if something is out of date."""
    parser = argparse.ArgumentParser(prog="python -m llmlab.teaching.build", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the lessons lie")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a notebook is out of date")
    options = parser.parse_args(arguments)
    try:
        stale = outdated(options.folder)
        for path, text in _built(options.folder):
            if path in stale and not options.check:
                path.write_text(text, encoding="utf-8")
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"{'out of date' if options.check else 'written'}: {path}" for path in stale) or "All notebooks are up to date.")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
