"""Pictures of every app for people to look at: light and dark, 1280 and 800 pixels wide, as it opens and with its knobs turned.

    python tests/browser/looks.py [NAME ...] [--to FOLDER] [--only light_1280]

Every page is photographed as a whole, whatever its height. Errors in the console are printed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import FLAGS
from lab import Page, running_lab

LOOKS = [("light", 1280), ("light", 800), ("dark", 1280), ("dark", 800)]
TALLEST = 6000  # pixels of one picture


def _settled(page: Page) -> None:
    """Wait until nothing on the page is computed or drawn any more, or for half a minute: some pages never rest."""
    said, same = "", 0
    for _ in range(20 if page.page.locator(".llt[data-mode=live]").count() else 120):
        page.page.wait_for_timeout(250)
        now = re.sub(r"[\d.,]+", "", page.text("body"))
        busy = page.page.locator("[role=progressbar], [data-testid=loading-indicator], .marimo-output-stale, .output-area-stale").count()
        same = same + 1 if now == said and not busy else 0
        said = now
        if same >= 6:
            return


def _photograph(page: Page, path: Path) -> None:
    width = page.page.viewport_size["width"]
    page.page.set_viewport_size({"width": width, "height": 1000})
    tall = page.page.evaluate("Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight > e.clientHeight && "
                              "/auto|scroll/.test(getComputedStyle(e).overflowY) && e.matches('#App, body, html, .overflow-auto') "
                              "? e.scrollHeight : 0), document.documentElement.scrollHeight)")  # fmt: skip
    page.page.set_viewport_size({"width": width, "height": min(TALLEST, max(700, int(tall) + 40))})
    page.page.wait_for_timeout(700)
    page.page.screenshot(path=path)


def _write(page: Page, source: str) -> None:
    page.page.locator(".cm-content").first.click()
    page.page.keyboard.press("Control+a")
    page.page.keyboard.insert_text(source)
    page.page.wait_for_timeout(800)
    page.press("Check and race")


def _crowded(page: Page) -> None:
    page.slide("speed", "ArrowRight", 2)
    page.press("Drop a long prompt")
    page.becomes(lambda: "Why was long" in page.text(".llt"), "no long prompt")
    page.slide("arrivals/s", "ArrowRight", 3)
    page.page.wait_for_timeout(6000)


def _forked(page: Page) -> None:
    page.page.locator(".llt").first.focus()
    for _ in range(40):
        page.page.keyboard.press("ArrowLeft")
    page.choose("let it go on", "ordering")
    page.page.wait_for_timeout(800)
    page.choose("namely", "sjf_oracle")
    page.page.wait_for_timeout(800)
    page.press("Fork after step")


def _head_to_head(page: Page) -> None:
    page.choose("goal", "p99 time to first token")
    page.choose("machine", "t4")
    page.page.get_by_text("Head to head").click()


def _roof_turned(page: Page) -> None:
    page.choose("A model", "mixtral-8x7b")
    page.choose("A machine", "t4")
    page.choose("B machine", "h200")
    page.slide("A context", "ArrowRight", 4)
    page.page.get_by_role("switch", name="B computes prompts").click()
    page.page.get_by_role("tab", name="What fits").click()


def _kv_turned(page: Page) -> None:
    page.slide("tokens in a block", "ArrowRight", 2)
    page.slide("families", "ArrowRight", 6)
    page.slide("arrivals/s", "ArrowRight", 3)


def _spec_turned(page: Page) -> None:
    page.choose("drafts from", "a smaller model (lab-xs)")
    page.choose("what is asked", "chat")


def _experts_turned(page: Page) -> None:
    page.choose("who decides", "balanced")
    page.slide("experts of a layer that fit", "ArrowRight", 2)


def _overlap_turned(page: Page) -> None:
    page.choose("compare", "gpu_only")
    page.choose("look at", "their first 10 ms")
    page.slide("KV tokens on the GPU", "ArrowRight", 2)


TURNED: dict[str, dict[str, Callable[[Page], None]]] = {
    "chunked_prefill": {"cut": lambda page: page.slide("token budget of a step", "ArrowLeft", 4)},
    "engine_room": {"crowded": _crowded},
    "policy_lab": {"turned": _head_to_head, "error": lambda page: _write(page, "class Broken:\n    def key(self, request now):\n        return 1\n")},
    "time_machine": {
        "inspector": lambda page: page.choose("another picture of this run", "everything in a window of time"),
        "card": lambda page: page.choose("another picture of this run", "the decision of this step"),
        "forked": _forked,
    },
    "roofline_explorer": {"turned": _roof_turned},
    "kv_lab": {"turned": _kv_turned},
    "speculation": {"turned": _spec_turned},
    "experts": {"turned": _experts_turned},
    "overlap": {"turned": _overlap_turned},
}  # fmt: skip


def _look_at(browser: Any, url: str, name: str, scheme: str, width: int, folder: Path) -> None:
    page = Page(browser, url, scheme, width, 1000)
    page.open(url if name == "gallery" else f"{url}{name}/", ".card" if name == "gallery" else ".llt, .vega-embed")
    _settled(page)
    _photograph(page, folder / f"{name}_{scheme}_{width}.png")
    for state, act in TURNED.get(name, {}).items():
        try:
            act(page)
            _settled(page)
        except Exception as error:  # the other pictures are still wanted
            print(f"{name} {state} {scheme} {width}: {str(error)[:300]}")
        _photograph(page, folder / f"{name}_{state}_{scheme}_{width}.png")
    page.page.close()
    print(name, scheme, width, *page.complaints, *page.outside, sep="\n  " if page.complaints or page.outside else " ", flush=True)


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["gallery", *TURNED])
    parser.add_argument("--to", type=Path, default=Path("build/looks"))
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, running_lab() as url:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for name in args.names or ["gallery", *TURNED]:
            for scheme, width in LOOKS:
                if f"{scheme}_{width}".startswith(args.only):
                    _look_at(browser, url, name, scheme, width, args.to)
        browser.close()


if __name__ == "__main__":
    main()
