"""What a page costs that watches the live engine for minutes, in a real browser: the engine room as it opens.

    python benchmarks/live_page.py [MINUTES] [--width 1280] [--speed SPEED]

Starts `llmlab lab` in a process of its own and a headless Chromium (which draws without a GPU), opens the engine room, and
prints one JSON object for each sample and one for the whole session: batches a second that reached the page; shares of a
core, of the page's main thread (scripting, layout and style, everything: CDP's Performance domain), of Chromium's processes
by kind (painting happens in those, too) and of the server, in which the engine computes as well; memory of the page's
JavaScript and of both sides' processes. Measured; needs the packages of extras `apps` and `browser`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PAGE = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration", "TaskDuration", "JSHeapUsedSize", "Nodes")
TICK = os.sysconf("SC_CLK_TCK")
EVERY = 10.0  # seconds between two samples


@contextmanager
def running_lab() -> Iterator[tuple[str, int]]:
    """The URL and the process id of a lab."""
    command = [sys.executable, "-m", "llmlab.cli", "lab", "--no-browser", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident(pid: int) -> float:
    """MiB of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """All counters of a session."""

    def __init__(self, page: Any, browser: Any, server: int) -> None:
        self._page, self._server = page, server
        self._cdp = page.context.new_cdp_session(page)
        self._cdp.send("Performance.enable")
        self._browser = browser.new_browser_cdp_session()

    def read(self) -> dict[str, float]:
        """Counters as they stand; seconds, MiB, and the number of the newest batch that was drawn."""
        known = {m["name"]: m["value"] for m in self._cdp.send("Performance.getMetrics")["metrics"]}
        found = {name: float(known[name]) for name in PAGE}
        for process in self._browser.send("SystemInfo.getProcessInfo")["processInfo"]:
            kind = str(process["type"]).lower()
            found[f"cpu {kind}"] = found.get(f"cpu {kind}", 0.0) + cpu_seconds(process["id"])
            found[f"rss {kind}"] = found.get(f"rss {kind}", 0.0) + resident(process["id"])
        root = self._page.locator(".llt").first
        return found | {
            "t": time.monotonic(), "cpu server": cpu_seconds(self._server), "rss server": resident(self._server),
            "batch": float(root.get_attribute("data-batch") or 0), "step": float(root.get_attribute("data-step") or 0),
        }  # fmt: skip


def between(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """What happened between two readings: rates, shares of a core, and memory at the end."""
    took = b["t"] - a["t"]
    rate = {name: (b[name] - a[name]) / took for name in b if name in a}
    shares = {"scripting": rate["ScriptDuration"], "layout_and_style": rate["LayoutDuration"] + rate["RecalcStyleDuration"],
              "main_thread": rate["TaskDuration"]}  # fmt: skip
    shares |= {f"process_{name[4:]}": rate[name] for name in rate if name.startswith("cpu ")}
    memory = {"js_heap_mib": b["JSHeapUsedSize"] / 2**20, "dom_nodes": b["Nodes"]}
    memory |= {f"{name[4:]}_mib": b[name] for name in b if name.startswith("rss ")}
    numbers = {"seconds": took, "batches_per_second": rate["batch"], "steps_per_second": rate["step"]}
    return {name: round(value, 3) for name, value in (numbers | {f"core_{k}": v for k, v in shares.items()} | memory).items()}


def session(minutes: float, width: int, speed: int) -> None:
    """Watch, and print. `speed`: how often the speed's slider goes up first."""
    from playwright.sync_api import sync_playwright

    with running_lab() as (url, server), sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or next(p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).exists())
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 1400})
        page.set_default_timeout(150_000)  # milliseconds: the machine may be busy
        page.goto(f"{url}engine_room/")
        page.wait_for_function("+(document.querySelector('marimo-anywidget')?.shadowRoot ?? document).querySelector('.llt')?.dataset.step > 20 "
                               "&& !document.body.innerText.includes('being loaded')", timeout=400_000)  # fmt: skip
        for _ in range(speed):
            page.get_by_role("slider").nth(3).press("ArrowRight")
        time.sleep(5)
        watch = Watch(page, browser, server)
        first = before = watch.read()
        until = first["t"] + 60 * minutes
        while before["t"] < until - EVERY / 2:
            time.sleep(EVERY)
            now = watch.read()
            print(json.dumps(between(before, now)), flush=True)
            before = now
        print(json.dumps({"session": between(first, before), "load": os.getloadavg(), "cores": os.cpu_count()}), flush=True)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("minutes", type=float, nargs="?", default=10.0)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--faster", type=int, default=0, help="how often the speed's slider goes up first")
    wanted = parser.parse_args()
    session(wanted.minutes, wanted.width, wanted.faster)
