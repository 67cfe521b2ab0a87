"""The timeline in a real browser, inside a page from disk: every control moves something, and nobody is asked for anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import PATIENCE

import llmlab


def crowded(num_requests: int = 24, gap: float = 1e-4) -> llmlab.Run:
    """A simulated run with preemptions."""
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, max_num_batched_tokens=64, log_level=3,
                           log_capacity=2_000_000)  # fmt: skip
    for i in range(num_requests):
        ids = [1 + (j % 7) for j in range(10 + 3 * (i % 20))]
        engine.add_request(ids, llmlab.SamplingParams(max_tokens=40), metadata={"output_len": 20 + i % 20}, arrival=gap * i)
    while engine.has_unfinished_requests():
        engine.step()
    return llmlab.Run.of(engine.log)


@pytest.fixture(scope="module")
def run() -> llmlab.Run:
    made = crowded()
    assert made.metrics.num_preemptions > 1
    return made


@pytest.fixture(scope="module")
def path(run: llmlab.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.to_html(tmp_path_factory.mktemp("timeline") / "run.html")


class Opened:
    """A page with a timeline, and what it complained of."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 1000})
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn=yes]", timeout=PATIENCE)
        self.root = self.page.locator(".llt[data-drawn=yes]")
        self.root.wait_for(timeout=PATIENCE)

    def drawn(self) -> None:
        """Wait until what was asked for so far has been drawn: the frame after the next has begun."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    @property
    def step(self) -> int:
        self.drawn()
        return int(self.root.get_attribute("data-step"))

    def picture(self, canvas: str) -> str:
        self.drawn()
        return str(self.page.locator(f".llt canvas{canvas}").evaluate("c => c.toDataURL()"))

    def key(self, name: str) -> None:
        self.root.focus()
        self.page.keyboard.press(name)

    def drag(self, canvas: Any, start: float, end: float) -> None:
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + start * box["width"], y)
        self.page.mouse.down()
        for i in range(1, 6):
            self.page.mouse.move(box["x"] + (start + (end - start) * i / 5) * box["width"], y)
        self.page.mouse.up()

    def of_colour(self, rgb: tuple[int, int, int]) -> dict[str, float]:
        """Where on the timeline a pixel has this colour, in pixels of the page."""
        return self.page.locator('.llt canvas[aria-label^="Timeline"]').evaluate(
            """(canvas, [r, g, b]) => {
                const {width, height} = canvas, data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
                const box = canvas.getBoundingClientRect(), ratio = width / box.width;
                for (let i = 0; i < data.length; i += 4) {
                    const x = (i / 4) % width, y = Math.floor(i / 4 / width);
                    const next = 4 * 3;
                    if (data[i] === r && data[i + 1] === g && data[i + 2] === b && data[i + next] === r && data[i + next + 2] === b)
                        return {x: box.x + (x + 2) / ratio, y: box.y + (y + 2) / ratio};
                }
                throw new Error("no pixel of this colour");
            }""",
            list(rgb),
        )

    def done(self) -> None:
        assert self.complaints == []
        assert [url for url in self.asked if not url.startswith(("file:", "data:", "blob:"))] == []
        self.page.close()


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    made = Opened(browser, path)
    yield made
    made.done()


LINES, STRIP, WALL, OVER = '[aria-label^="Timeline"]', '[aria-label^="Tokens"]', '[aria-label^="KV blocks"]', ".over"


def test_keys_move_the_scrubber_and_the_pictures(opened: Opened, run: llmlab.Run) -> None:
    steps = [s.step for s in run.steps]
    assert opened.step == run.events("RequestPreempted")[0].step
    opened.key("Home")
    assert opened.step == steps[0]
    before = [opened.picture(c) for c in (LINES, STRIP, WALL, OVER)]
    opened.key("ArrowRight")
    assert opened.step == steps[1]
    opened.key("Shift+ArrowRight")
    assert opened.step == steps[11]
    opened.key("ArrowLeft")
    assert opened.step == steps[10]
    assert all(a != b for a, b in zip(before, [opened.picture(c) for c in (LINES, STRIP, WALL, OVER)]))
    opened.key("End")
    assert opened.step == steps[-1]


def test_the_scrubber_and_the_buttons(opened: Opened) -> None:
    over = opened.page.locator(".llt .over")
    first = opened.step
    opened.drag(over, 0.5, 0.75)
    late = opened.step
    opened.drag(over, 0.75, 0.1)
    assert opened.step < first < late
    assert over.get_attribute("aria-valuenow") == str(opened.step)
    for title, by in (("Next step", 1), ("Step before", -1)):
        row = opened.step
        opened.page.get_by_role("button", name=title).click()
        assert opened.step == row + by
    opened.page.get_by_role("button", name="Newest step").click()
    last = opened.step
    opened.page.get_by_role("button", name="First step").click()
    assert opened.step < last
    opened.drag(opened.page.locator(f".llt canvas{STRIP}"), 0.3, 0.6)
    assert 0 < opened.step < last


def test_zoom_shows_less_time_and_all_of_it_again(opened: Opened) -> None:
    whole = opened.picture(LINES)
    opened.key("+")
    opened.key("+")
    near = opened.picture(LINES)
    opened.page.get_by_role("button", name="Show more time").click()
    wider = opened.picture(LINES)
    opened.page.get_by_role("button", name="Show the whole run").click()
    assert len({whole, near, wider}) == 3 and opened.picture(LINES) == whole


def test_play_moves_by_itself_and_stops(opened: Opened) -> None:
    opened.key("Home")
    opened.page.get_by_label("Speed").select_option("4")
    first = opened.step
    opened.key(" ")
    opened.page.wait_for_function(f"+document.querySelector('.llt').dataset.step > {first + 5}", timeout=PATIENCE)
    opened.page.get_by_role("button", name="Pause").click()
    stopped = opened.step
    opened.page.wait_for_timeout(300)
    assert opened.step == stopped


def test_a_click_on_a_bar_says_why_it_was_late(opened: Opened, run: llmlab.Run) -> None:
    opened.key("End")
    opened.drawn()
    place = opened.of_colour((0, 114, 178))  # decode
    opened.page.mouse.click(place["x"], place["y"])
    why = opened.page.locator(".llt .why")
    why.get_by_text("after it arrived").first.wait_for(timeout=PATIENCE)
    name = why.locator("h4").inner_text().split()[2]
    assert run.why(name).headline.split(":")[0].split(" us")[0] in why.inner_text().replace(" µs ", " us ")
    assert why.locator("li").count() == len(run.why(name).stretches)
    opened.key("ArrowDown")
    assert name not in why.locator("h4").inner_text()
    opened.key("Escape")
    assert not why.is_visible()


def test_decisions_of_the_step_are_said_aloud_with_alternatives(opened: Opened, run: llmlab.Run) -> None:
    victim = run.event(run.events("RequestPreempted")[0].cause)
    said = opened.page.locator(".llt [aria-live]").text_content()
    assert f"Step {victim.step}" in said and "preempt" in said and victim.chosen in said
    log = opened.page.locator(".llt .log").inner_text()
    for option in victim.alternatives:
        assert f"or {option.option}: predicted" in log


def test_the_theme_follows_the_page(opened: Opened) -> None:
    before = opened.picture(LINES)
    opened.page.locator("#theme").click()
    assert opened.root.get_attribute("data-theme") == "dark" and opened.picture(LINES) != before
    opened.page.locator("#theme").click()
    assert opened.root.get_attribute("data-theme") == "light" and opened.picture(LINES) == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_it_fits_and_is_photographed(browser: Any, path: Path, screenshots: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, path, width, scheme)
    assert opened.root.get_attribute("data-theme") == scheme
    opened.key("ArrowUp")
    opened.drawn()
    opened.root.screenshot(path=screenshots / f"timeline_{scheme}_{width}.png")
    wide = opened.root.evaluate("root => [...root.querySelectorAll('*')].every(e => e.getBoundingClientRect().right <= root.getBoundingClientRect().right + 1)")
    assert wide, f"something sticks out at {width} px"
    opened.done()


def test_a_thousand_requests_stay_smooth(browser: Any, tmp_path: Path, screenshots: Path) -> None:
    opened = Opened(browser, crowded(1000, 6e-4).to_html(tmp_path / "run.html"))
    opened.key("0")
    opened.drawn()
    opened.root.screenshot(path=screenshots / "timeline_thousand.png")
    last = int(opened.page.locator(".llt .over").get_attribute("aria-valuemax"))
    steps = set()
    for share in (0.1, 0.35, 0.6, 0.85):
        opened.drag(opened.page.locator(".llt .over"), share, share + 0.1)
        steps.add(opened.step)
    assert len(steps) == 4 and max(steps) <= last
    opened.done()
