"""A running lab and a page in it: what the tests of the apps share."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 240_000  # milliseconds to wait for something that must happen, on a machine that may be busy



@contextmanager
def running_lab(*options: str) -> Iterator[str]:
    """The URL of a lab in a process of its own."""
    command = [sys.executable, "-m", "llmlab.cli", "lab", "--no-browser", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


class Page:
    """A page of the lab in a browser. Collects what it complains of and whom it asks."""

    def __init__(self, browser: Any, url: str, scheme: str = "light", width: int = 1280, height: int = 1100) -> None:
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.outside.append(r.url))
        self.began = time.monotonic()

    def open(self, url: str, picture: str) -> float:
        """Go there and wait for `picture` (a CSS selector); the seconds until it was there."""
        self.began = time.monotonic()
        self.page.goto(url)
        self.page.locator(picture).first.wait_for(timeout=PATIENCE)
        return time.monotonic() - self.began

    def text(self, selector: str = "#App") -> str:
        """All words on the page, those of widgets included."""
        return str(self.page.locator(selector).first.inner_text())

    def says(self, words: str) -> bool:
        """Whether these words stand anywhere on the page, shadow roots included."""
        return bool(self.page.get_by_text(words).count())

    def picture(self, selector: str) -> str:
        """A fingerprint of how something looks."""
        return hashlib.md5(self.page.locator(selector).first.screenshot()).hexdigest()

    def holds(self, what: Callable[[], bool], seconds: float = PATIENCE / 1000) -> bool:
        """Whether `what` holds, `seconds` from now at the latest."""
        until = time.monotonic() + seconds
        while not what():
            if time.monotonic() > until:
                return False
            self.page.wait_for_timeout(100)
        return True

    def becomes(self, what: Callable[[], bool], why: str) -> None:
        """Wait until `what` holds, with much patience."""
        assert self.holds(what), f"{why}\n{self.text()[:3000]}"

    def changes(self, look: Callable[[], Any], act: Callable[[], Any], why: str) -> None:
        """Assert that `act` changes what `look` sees."""
        before = look()
        act()
        self.becomes(lambda: look() != before, f"{why}: nothing changed")

    def slide(self, label: str, key: str, times: int = 1) -> None:
        """Move the slider with this label by arrow keys."""
        self.page.get_by_role("slider").nth(self._slider(label)).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def _slider(self, label: str) -> int:
        """Sliders stand in their labels' order on the page."""
        names = self.page.locator("marimo-slider").evaluate_all("all => all.map(e => e.getAttribute('data-label') || '')")
        found = [i for i, name in enumerate(names) if label in re.sub("<[^>]*>", "", name)]
        assert len(found) == 1, f"{label!r} among {names}"
        return found[0]

    def choose(self, label: str, option: str) -> None:
        """Choose in the dropdown with this label."""
        boxes = self.page.locator("marimo-dropdown")
        names = boxes.evaluate_all("all => all.map(e => e.getAttribute('data-label') || '')")
        found = [i for i, name in enumerate(names) if label in re.sub("<[^>]*>", "", name)]
        assert len(found) == 1, f"{label!r} among {names}"
        boxes.nth(found[0]).locator("select").select_option(label=option)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).first.click()

    def save(self, folder: Path, name: str) -> None:
        self.page.screenshot(path=folder / f"{name}.png")

    def close(self) -> None:
        """Leave, and assert that the page neither complained nor asked anybody else."""
        self.page.close()
        assert self.complaints == []
        assert self.outside == []
