"""The apps in a real browser: each opens, complains of nothing, asks nobody outside, and every control does something.

One server and one browser serve all tests. `llmlab lab` is what users start, so it is what runs here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmlab.applab.gallery import APPS

pytest.importorskip("marimo", reason='marimo is not installed: pip install "llmlab[apps]"')
from lab import Page, running_lab

LOOKS = [("light", 1280), ("dark", 800)]
PICTURE = {"engine_room": ".llt"}


@pytest.fixture(scope="module")
def lab(browser: Any) -> Iterator[str]:
    with running_lab() as url:
        yield url


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_the_gallery_shows_a_card_for_each_app(browser: Any, lab: str, screenshots: Path, scheme: str, width: int) -> None:
    page = Page(browser, lab, scheme, width, 700)
    page.open(lab, ".card")
    assert page.page.locator(".card").count() == len(APPS)
    assert scheme in (page.page.locator("body").get_attribute("class") or "")
    page.save(screenshots, f"gallery_{scheme}_{width}")
    page.press("light" if scheme == "dark" else "dark")
    page.becomes(lambda: scheme not in (page.page.locator("body").get_attribute("class") or ""), "the theme does not switch")
    page.close()


def number(page: Page, name: str) -> float:
    """The value of one of the timeline's tiles."""
    found = re.search(rf"{re.escape(name)}\s*\n\s*([\d.]+)", page.text(".llt .tiles"))
    assert found, f"no {name} in {page.text('.llt .tiles')!r}"
    return float(found[1])


def test_engine_room(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1400)
    took = page.open(f"{lab}engine_room/", ".llt")
    assert took < 20, f"the first picture took {took:.1f} s"
    page.becomes(lambda: "The model is being loaded" not in page.text(), "the model is never loaded", 90)
    page.becomes(lambda: number(page, "step") > 3, "no step is made")
    before = number(page, "step")
    page.becomes(lambda: number(page, "step") > before, "the engine stands still")

    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("who goes first", "sjf_oracle"), "ordering")
    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("a step is", "prefill_first"), "composer")
    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("the preempted", "swap"), "tiering")
    page.slide("token budget", "ArrowLeft", 2)
    page.becomes(lambda: "tokens of 32" in page.text(".llt .tiles"), "the budget does not change")
    page.slide("KV blocks", "ArrowLeft", 3)
    page.becomes(lambda: "of 104 in use" in page.text(".llt"), "the pool does not change")
    page.slide("arrivals/s", "ArrowRight", 3)
    page.becomes(lambda: number(page, "waiting") > 0, "more arrivals make nobody wait")
    page.slide("speed", "ArrowRight", 3)
    page.becomes(lambda: "Slow motion" not in page.text(), "the speed does not change")
    page.press("Drop a long prompt")
    page.becomes(lambda: "Why was long" in page.text(".llt"), "the long prompt does not arrive")
    page.save(screenshots, "engine_room_light_1280")
    page.slide("arrivals/s", "ArrowLeft", 7)
    page.page.get_by_label("your prompt").fill("12*34")
    page.press("Send")
    page.becomes(lambda: bool(re.search(r"you\d+ asked .*12\*34.* and got .*\d", page.text())), "no answer comes")
    page.becomes(lambda: "Why was you" in page.text(".llt") and "(measured)" in page.text(".llt"), "nobody says why")
    page.close()


def test_engine_room_at_night_and_for_two(browser: Any, lab: str, screenshots: Path) -> None:
    first, second = (Page(browser, lab, "dark", 800, 1400) for _ in range(2))
    first.open(f"{lab}engine_room/", ".llt")
    second.open(f"{lab}engine_room/", ".llt")
    for page in (first, second):
        page.becomes(lambda page=page: "2 pages look at this one engine" in page.text(), "nobody says that there are two")
        assert page.page.locator(".llt").first.get_attribute("data-theme") == "dark"
    too_wide = first.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert too_wide <= 0
    second.close()
    first.becomes(lambda: "2 pages look" not in first.text(), "a closed tab is still counted", 40)
    first.save(screenshots, "engine_room_dark_800")
    first.close()
