"""The documentation site: `python -m llmlab.teaching.site` in a checkout writes build/site.

Its pages are those of docs/, the lessons with what they show, and the reference from the docstrings. Fonts are the
reader's own and nothing is fetched from elsewhere, so that it works from a disk without a network. Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmlab.teaching.pages import lesson_page
from llmlab.teaching.reference import chapters, reference_page
from llmlab.teaching.scripts import Lesson, lessons_in
from llmlab.types import ConfigError, LabError

CONFIG = "mkdocs.yml"
WIDE = ("papers.md",)  # a table of six columns: the whole width is its own


def stage(root: Path, target: Path, executed: bool = True) -> list[Path]:
    """Write all pages as Markdown below `target`, which is emptied first; their paths. Raises ConfigError."""
    if not (root / "docs" / "index.md").exists():
        raise ConfigError("root", str(root), "is no checkout of llmlab", "Give the directory that holds docs/ and lessons/.")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "docs", target)
    for page in target.rglob("*.md"):
        front = "---\nhide: [navigation, toc]\n---\n\n" if page.name in WIDE else ""
        page.write_text(front + spelled_out(page.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(root / "CHANGELOG.md", target / "changelog.md")
    _stage_lessons(lessons_in(root / "lessons"), target / "tutorials", executed)
    folder = target / "reference"
    folder.mkdir()
    for name, chapter in chapters().items():
        (folder / f"{name}.md").write_text(reference_page(chapter), encoding="utf-8")
    return sorted(target.rglob("*.md"))


def _stage_lessons(lessons: Sequence[Lesson], folder: Path, executed: bool) -> None:
    folder.mkdir()
    for lesson in lessons:
        page = lesson_page(lesson, executed)
        (folder / f"{lesson.name}.md").write_text(page.text, encoding="utf-8")
        for name, svg in page.pictures.items():
            (folder / name).write_text(svg, encoding="utf-8")
        shutil.copy(lesson.path.with_suffix(".ipynb"), folder)


def spelled_out(text: str) -> str:
    """Formulas between dollar signs as HTML, for pages that load no typesetter; code stays as it is."""
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(piece if i % 2 else re.sub(r"\$([^$\n]+)\$", _formula, piece) for i, piece in enumerate(pieces))


def _formula(found: re.Match[str]) -> str:
    text = found[1].replace(r"\sum", "Σ")
    text = re.sub(r"\\(max|min)", r"\1", text)
    text = re.sub(r"_(\w|\{[^}]*\})", lambda m: f"<sub>{m[1].strip('{}')}</sub>", text)
    return f"<i>{text}</i>"


def build(root: Path, pages: Path, site: Path) -> None:
    """Make a site of staged pages; a broken link is an error. Raises ConfigError with what the builder said."""
    try:
        import zensical  # noqa: F401
    except ImportError:
        raise ConfigError("zensical", None, "is not installed", "pip install 'llmlab[docs]'") from None
    config = with_all_pages((root / CONFIG).read_text(encoding="utf-8"), pages)
    settings = pages.parent / CONFIG
    built = pages.parent / "site"  # the builder writes nowhere else than below its settings
    settings.write_text(f"docs_dir: {pages.name}\nsite_dir: {built.name}\n{config}", encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pages.parent)
    if done.returncode:
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).partition("Traceback")[0].strip()
        raise ConfigError("docs", str(pages), f"the site could not be built.\n{said}")
    if site.resolve() != built.resolve():
        shutil.copytree(built, site, dirs_exist_ok=True)


def with_all_pages(config: str, pages: Path) -> str:
    """The settings, whose last part is the navigation, with a section for pages that it does not name yet."""
    names = sorted(str(path.relative_to(pages)) for path in pages.rglob("*.md"))
    missing = [name for name in names if not re.search(rf"\s{re.escape(name)}$", config, re.MULTILINE)]
    if not missing or "\nnav:" not in config:
        return config
    return config.rstrip() + "\n  - More:\n" + "".join(f"      - {name}\n" for name in missing)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m llmlab.teaching.site", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout")
    parser.add_argument("--out", type=Path, default=Path("build/site"), help="where the site goes")
    parser.add_argument("--no-run", action="store_true", help="show the lessons' code without its results")
    options = parser.parse_args(arguments)
    pages = options.root.resolve() / "build" / "docs"
    try:
        count = len(stage(options.root, pages, not options.no_run))
        build(options.root, pages, options.out)
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{count} pages: {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
