"""The timeline in marimo: the same file, a kernel behind it, a finished run and a live one on one page."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("marimo")
pytest.importorskip("anywidget")
from lab import PATIENCE

APP = '''
import marimo
app = marimo.App(width="full")

@app.cell
def _():
    import time
    import marimo as mo, llmlab
    from llmlab.ui.widget import Timeline
    def engine():
        made = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, max_num_batched_tokens=64, log_level=3)
        for i in range(16):
            made.add_request([1 + j % 7 for j in range(10 + 3 * i)], llmlab.SamplingParams(max_tokens=40), metadata={"output_len": 20 + i})
        return made
    done = engine()
    while done.has_unfinished_requests():
        done.step()
    widget = mo.ui.anywidget(Timeline(llmlab.Run.of(done.log)))
    widget
    return Timeline, engine, llmlab, mo, time, widget

@app.cell
def _(mo, widget):
    mo.md(f"STATE {widget.value['step']} {widget.value['selected']}")
    return

@app.cell
def _(Timeline, engine, llmlab, mo, time):
    growing = engine()
    live = Timeline.live(growing.log, keep=100)
    def loop():
        number = 0
        while not mo.current_thread().should_exit:
            if number % 8 == 0:
                growing.add_request([1 + number % 9] * 30, llmlab.SamplingParams(max_tokens=20))
            growing.step()
            live.pull()
            number += 1
            time.sleep(0.05)  # the pace of the show; nothing is measured
    mo.Thread(target=loop, daemon=True).start()
    mo.ui.anywidget(live)
    return
'''


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("marimo")
    (folder / "app.py").write_text(APP)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "marimo", "run", str(folder / "app.py"), "--headless", "--no-token", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": root, "MARIMO_SKIP_UPDATE_CHECK": "1"}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, url: str, request: pytest.FixtureRequest, screenshots: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1280, "height": 1900}, color_scheme=request.param)
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(url)
    page.locator(".llt[data-drawn=yes]").nth(1).wait_for(timeout=PATIENCE)
    yield page
    page.screenshot(path=screenshots / f"timeline_marimo_{request.param}.png")
    assert complaints == [] and [u for u in asked if not u.startswith((url, "data:", "blob:"))] == []
    page.close()


def test_both_timelines_talk_to_the_kernel(page: Any) -> None:
    done, live = page.locator(".llt").nth(0), page.locator(".llt").nth(1)
    done.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.get_by_text("STATE 1 r0").wait_for(timeout=PATIENCE)
    done.locator(".why").get_by_text("r0 ended").wait_for(timeout=PATIENCE)
    first = int(live.get_attribute("data-step"))
    page.wait_for_function(f"n => +n.dataset.step > {first + 5}", arg=live.element_handle(), timeout=PATIENCE)
    live.get_by_role("button", name="Pause").click()
    live.get_by_role("button", name="Follow").wait_for(timeout=PATIENCE)
    stopped = live.get_attribute("data-step")
    page.wait_for_timeout(400)
    assert live.get_attribute("data-step") == stopped
    live.get_by_role("button", name="Follow").click()
    page.wait_for_function(f"n => +n.dataset.step > {stopped}", arg=live.element_handle(), timeout=PATIENCE)
