"""How long until something is to be seen: each app from its command to its first pictures, in a browser that is running already.

    python benchmarks/first_picture.py [APP ...]

Every app is started in a process of its own, as `llmlab app NAME` does. Prints one JSON object for each: seconds from the start
of the command until pages are answered, until the picture is there that was drawn beforehand, until the page has one of its own;
and the CPU seconds of the server and of the browser up to then, which a busy machine stretches less. Needs the packages of extras `apps` and `browser`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from live_page import FLAGS, ROOT, cpu_seconds

from llmlab.applab.gallery import APPS


def first_picture(browser: Any, name: str) -> dict[str, object]:
    """One app."""
    session, before = browser.new_browser_cdp_session(), 0.0
    before = _browser_seconds(session)
    began = time.monotonic()
    command = [sys.executable, "-m", "llmlab.cli", "app", name, "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answered = time.monotonic() - began
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(180_000)  # milliseconds
        page.goto(url, wait_until="commit")
        page.wait_for_function("document.querySelector('#llmlab-first img')?.naturalWidth > 0")
        drawn_before = time.monotonic() - began
        page.locator(".llt, .vega-embed").first.wait_for()
        seen = time.monotonic() - began
        used, shown = cpu_seconds(process.pid), _browser_seconds(session) - before
        page.close()
    finally:
        process.terminate()
        process.wait(timeout=30)
    return {"app": name, "answered": round(answered, 2), "drawn_before": round(drawn_before, 2), "of_its_own": round(seen, 2), "cpu_server": round(used, 2),
            "cpu_browser": round(shown, 2), "load": round(os.getloadavg()[0], 1)}  # fmt: skip


def _browser_seconds(session: Any) -> float:
    """CPU seconds of all processes of the browser that are alive."""
    total = 0.0
    for process in session.send("SystemInfo.getProcessInfo")["processInfo"]:
        try:
            total += cpu_seconds(process["id"])
        except OSError:
            continue
    return total


def main(names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or next(p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists())
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        browser.new_page().goto("about:blank")
        for name in names:
            print(json.dumps(first_picture(browser, name)), flush=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:] or [app.name for app in APPS])
