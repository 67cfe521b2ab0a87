"""The HTML report in a real browser: it draws, it fits, it asks nobody for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lab import PATIENCE

import llmlab
from llmlab.ui.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, max_num_batched_tokens=64, log_level=3)
    for i in range(20):
        ids = [1 + (j % 7) for j in range(10 + 3 * i)]
        engine.add_request(ids, llmlab.SamplingParams(max_tokens=40), metadata={"output_len": 20 + i}, arrival=1e-4 * i)
    while engine.has_unfinished_requests():
        engine.step()
    run = llmlab.Run.of(engine.log)
    assert run.metrics.num_preemptions > 0, "the report must have a preemption to tell of"
    late = max(run.requests.values(), key=lambda r: (r.num_preemptions, r.e2e or 0.0))
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(run, path, texts={"r0": "<b>not bold</b>"}, why=[late.request], theme="auto")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800])
def test_report_opens_from_disk(browser: Any, report: Path, screenshots: Path, scheme: str, width: int) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 2400})
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn=yes]", timeout=PATIENCE)
    page.wait_for_selector(".llt[data-drawn=yes]", timeout=PATIENCE)
    page.screenshot(path=screenshots / f"report_{scheme}_{width}.png", full_page=True)
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    drawings = page.locator(".plot svg").count()
    assert drawings >= 4, f"only {drawings} figures were drawn"
    too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert too_wide <= 0, f"the page is {too_wide} px too wide at {width} px"
    assert page.locator("b", has_text="not bold").count() == 0, "an answer's text must be escaped"
    page.close()
