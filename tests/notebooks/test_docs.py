"""The documentation: every code block of the how-to pages runs, the reference is complete, the site has no broken link."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmlab
from llmlab.teaching.pages import lesson_page
from llmlab.teaching.reference import chapters, reference_page
from llmlab.teaching.scripts import lessons_in
from llmlab.teaching.site import build, main, spelled_out, stage, with_all_pages
from llmlab.types import ConfigError

ROOT = Path(__file__).resolve().parents[2]
HOWTO = sorted((ROOT / "docs" / "howto").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def quick_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points and repeats: enough to run every line."""
    from llmlab.execution import profiling

    small: dict[str, Any] = {
        "POINT_SECONDS": 0.002, "MIN_REPEATS": 3, "TOKENS": (1, 4, 64), "QUERIES": (1, 8, 64), "CONTEXTS": (0, 64, 4096),
        "DECODE_CONTEXTS": (0, 64, 4096), "EMITS": (1, 8), "PRODUCT_ROWS": (1, 16, 64), "MOVED_BLOCKS": (1, 8),
        "PRODUCTS": ((64, 64), (64, 256), (256, 512)),
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(profiling, name, value)
    whole = profiling.probe
    monkeypatch.setattr(profiling, "probe", lambda profile: whole(profile, seconds=0.3))


@pytest.mark.parametrize("page", [*HOWTO, ROOT / "docs" / "index.md", ROOT / "docs" / "teaching.md"], ids=lambda page: page.stem)
def test_every_code_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_profiles: None) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert {language for language, _ in blocks} <= {"python", "bash"}
    for language, source in blocks:
        if language == "python":
            exec(compile(source, str(page), "exec"), names)
        elif "pip install" not in source:
            run_shell(source)


def run_shell(source: str) -> None:
    command = f'llmlab() {{ "{sys.executable}" -m llmlab.cli "$@"; }}\nset -euo pipefail\n{source}'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_formulas_are_spelled_out_and_code_is_left_alone() -> None:
    assert spelled_out(r"the sum $\sum_i O_i$ of `$x$`") == "the sum <i>Σ<sub>i</sub> O<sub>i</sub></i> of `$x$`"
    assert spelled_out("```\n$ llmlab a $b\n```\n") == "```\n$ llmlab a $b\n```\n"


def test_the_reference_describes_every_public_name() -> None:
    pages = {name: reference_page(chapter) for name, chapter in chapters().items()}
    for name in llmlab.__all__:
        assert f"\n## {name}\n" in pages["api"]
    run = pages["api"].partition("\n## Run\n")[2].partition("\n## ")[0]
    for name in ("metrics", "requests", "steps", "events(", "at(", "why(", "fork(", "save(", "load(", "to_perfetto("):
        assert f"- **`{name}" in run, f"{name}: what Run inherits belongs to its reference"
    for page in pages.values():
        assert "0x" not in page
        for entry in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
            assert len(entry.split("*`")[1]) > 40, f"no docstring: {entry[:80]}"


def test_a_page_of_a_lesson_shows_what_its_code_showed() -> None:
    lesson = next(one for one in lessons_in(ROOT / "lessons") if one.number == "02")
    page = lesson_page(lesson)
    assert page.text.startswith("# 02 ")
    assert page.text.count('<details markdown="1">') == 3
    assert len(page.pictures) >= 6
    for name in page.pictures:
        assert f"]({name}#only-{'dark' if '.dark.' in name else 'light'})" in page.text
    assert "lesson-box failed" in page.text


def test_the_site_is_built_without_a_broken_link_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    staged = stage(ROOT, tmp_path / "docs", executed=False)
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/.-]+\.md)$", config, re.MULTILINE)
    assert set(listed) <= {str(path.relative_to(tmp_path / "docs")) for path in staged}
    (tmp_path / "docs" / "new.md").write_text("# New\n")
    assert "      - new.md\n" in with_all_pages(config, tmp_path / "docs").partition("- More:")[2]
    build(ROOT, tmp_path / "docs", tmp_path / "elsewhere" / "site")  # anywhere, although its builder writes beside its pages only
    for name in ("new.html", "index.html", "tutorials/01_one_token.html", "reference/api.html"):
        html = (tmp_path / "elsewhere" / "site" / name).read_text(encoding="utf-8")
        fetched = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', html)
        assert fetched == [], name


def test_a_broken_link_and_a_wrong_place_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 1
    assert "is no checkout" in capsys.readouterr().err
    pytest.importorskip("zensical")
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text("# x\n\n[gone](gone.md)\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: {name: material, font: false}\n")
    with pytest.raises(ConfigError, match="gone"):
        build(tmp_path, pages, tmp_path / "site")
