"""The apps in a real browser: each opens, complains of nothing, asks nobody outside, and every control does something.

One server and one browser serve all tests. `llmlab lab` is what users start, so it is what runs here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmlab.applab.gallery import APPS

pytest.importorskip("marimo", reason='marimo is not installed: pip install "llmlab[apps]"')
from lab import Page, running_lab

LOOKS = [("light", 1280), ("dark", 800)]


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


def test_a_page_shows_a_picture_before_it_has_one_of_its_own(browser: Any, lab: str) -> None:
    page = Page(browser, lab, "dark", 1280, 900)
    page.page.goto(f"{lab}kv_lab/", wait_until="commit")
    page.page.wait_for_function("document.querySelector('#llmlab-first img')?.naturalWidth > 300")
    assert page.page.locator("#App .vega-embed").count() == 0
    page.page.locator("#App .vega-embed").first.wait_for()
    page.becomes(lambda: page.page.locator("#llmlab-first").count() == 0, "the picture drawn beforehand stays")
    page.close()


def test_chunked_prefill_is_where_a_visitor_starts(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1200)
    page.open(lab, ".card")
    assert "Start here" in page.page.locator(".card").first.inner_text()
    page.page.locator(".card").first.click()
    page.becomes(lambda: page.page.locator(".vega-embed").count() == 2, "a picture is missing")
    assert "In one step" in finding(page) and "(s, log)" not in finding(page)
    page.save(screenshots, "chunked_prefill_light_1280")
    page.changes(lambda: finding(page), lambda: page.slide("tokens of the long prompt", "ArrowRight"), "prompt")
    page.becomes(lambda: "8,192 tokens makes everybody wait" in finding(page), "the prompt does not grow")
    before = page.picture(".vega-embed")
    page.slide("token budget of a step", "ArrowLeft", 4)
    page.becomes(lambda: "In 17 chunks" in finding(page), "the prompt is not cut")
    page.becomes(lambda: page.picture(".vega-embed") != before, "the picture stays")
    page.close()


def number(page: Page, name: str) -> float:
    """The value of one of the timeline's tiles."""
    found = re.search(rf"{re.escape(name)}\s*\n\s*([\d.]+)", page.text(".llt .tiles"))
    assert found, f"no {name} in {page.text('.llt .tiles')!r}"
    return float(found[1])


def test_engine_room(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1400)
    page.open(f"{lab}engine_room/", ".llt")
    page.becomes(lambda: "The model is being loaded" not in page.text(), "the model is never loaded")
    page.becomes(lambda: "waiting" in page.text(".llt .tiles"), "nothing is drawn of the engine itself")
    page.becomes(lambda: number(page, "step") > 3, "no step is made")
    before = number(page, "step")
    page.becomes(lambda: number(page, "step") > before, "the engine stands still")

    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("who goes first", "sjf_oracle"), "ordering")
    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("a step is", "prefill_first"), "composer")
    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("the preempted", "swap"), "tiering")
    page.changes(lambda: page.text(".llt .facts"), lambda: page.choose("drafts from", "n-grams of its own text"), "drafts")
    page.becomes(lambda: bool(re.search(r"Drafts of ngram: \d+% of \d+ tokens held", page.text())), "no draft is verified")
    for words, name in (("suffixes of all texts", "suffix"), ("a smaller model (lab-xs)", "lab-xs")):
        page.choose("drafts from", words)
        page.becomes(lambda name=name: bool(re.search(rf"Drafts of {name}: \d+% of", page.text())), f"{name} does not draft")
    page.choose("drafts from", "nobody")
    page.becomes(lambda: "Drafts of" not in page.text(), "drafting cannot be switched off")
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


def test_the_script_of_the_timeline_may_come_late(browser: Any, lab: str) -> None:
    page = Page(browser, lab, "light", 1280, 1400)
    held: list[Any] = []
    page.page.route(re.compile("/@file/.*js"), lambda route: held.append(route))
    page.page.goto(f"{lab}engine_room/")
    page.becomes(lambda: bool(held), "nobody asks for the script")
    page.becomes(lambda: "Drop a long prompt with" in page.text(), "the model is never loaded")
    for route in held:
        route.continue_()
    page.page.unroute_all()
    page.becomes(lambda: bool(page.page.locator(".llt[data-drawn=yes]").count()), "nothing is drawn")
    page.becomes(lambda: number(page, "step") > 3, "no step is made")
    assert page.page.get_by_role("button", name="Pause").count() == 1
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
    first.becomes(lambda: "2 pages look" not in first.text(), "a closed tab is still counted")
    first.save(screenshots, "engine_room_dark_800")
    first.close()


def finding(page: Page) -> str:
    """All findings on the page: the headings over its pictures."""
    return "\n".join(page.page.locator(".llmlab-finding").all_inner_texts())


def flip(page: Page, label: str) -> None:
    page.page.get_by_role("switch", name=label).click()


def test_policy_lab(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1300)
    page.open(f"{lab}policy_lab/", ".vega-embed")
    assert "ShortestPrompt (yours)" in finding(page)
    page.becomes(lambda: page.says("starves requests"), "the check says nothing")
    page.save(screenshots, "policy_lab_light_1280")
    page.changes(lambda: finding(page), lambda: page.choose("goal", "p99 time to first token"), "goal")
    page.changes(lambda: page.text(), lambda: page.slide("load", "ArrowRight", 3), "load")
    page.changes(lambda: page.text(), lambda: page.slide("KV blocks", "ArrowLeft", 3), "KV blocks")
    page.changes(lambda: finding(page), lambda: page.slide("seeds", "ArrowLeft", 2), "seeds")
    page.changes(lambda: page.text(), lambda: page.choose("machine", "t4"), "machine")
    page.changes(lambda: page.text(), lambda: page.choose("begin with", "half a step for prompts"), "example")
    page.becomes(lambda: "HalfAndHalf" in finding(page), "the example does not race")
    with page.page.expect_download() as saved:
        page.page.get_by_text("Save the figure").click()
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
    submit(page, "class Broken:\n    def key(self, request now):\n        return 1\n",
           lambda: page.says("It does not race") and page.says("Line 2"), "the syntax error is not explained")
    submit(page, "class Raises:\n    def key(self, request, now):\n        return request.nothing\n",
           lambda: page.says("AttributeError") and page.says("Line 3"), "the error is not explained")
    page.save(screenshots, "policy_lab_error_light_1280")
    submit(page, "class Endless:\n    def key(self, request, now):\n        while True:\n            pass\n",
           lambda: page.says("has not come to an end"), "a loop without end is not stopped")
    submit(page, "class Newest:\n    def key(self, request, now):\n        return -request.arrival\n",
           lambda: "Newest (yours)" in finding(page), "a mended policy does not race")
    page.close()


def submit(page: Page, source: str, done: Callable[[], bool], why: str) -> None:
    """Put a text into the editor and submit it until it has been read: the editor tells the page a moment after the typing."""
    page.page.locator(".cm-content").first.click()
    page.page.keyboard.press("Control+a")
    page.page.keyboard.press("Delete")
    page.page.keyboard.insert_text(source)
    for _ in range(12):
        page.page.wait_for_timeout(600)
        page.press("Check and race")
        if page.holds(done, 20):
            return
    raise AssertionError(f"{why}\n{page.text()[:3000]}")


def test_time_machine(browser: Any, lab: str, screenshots: Path, tmp_path: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1500)
    page.open(f"{lab}time_machine/", ".llt")
    page.becomes(lambda: "What was decided in step" in finding(page), "no step is shown")
    page.changes(lambda: finding(page), lambda: page.page.locator(".llt button", has_text="‹").nth(1).click(), "going back a step")
    page.changes(lambda: options(page), lambda: page.choose("let it go on", "ordering"), "seam")
    page.choose("namely", "sjf_oracle")
    page.press("Fork after step")
    page.becomes(lambda: "With ordering sjf_oracle from step" in finding(page), "there is no fork")
    assert "Both continuations are simulated" in page.text()
    page.save(screenshots, "time_machine_light_1280")
    page.becomes(lambda: page.page.locator(".vega-embed").count() >= 2, "there is no other picture")
    page.page.locator(".llt button", has_text="›").nth(0).click()
    page.becomes(lambda: "What was decided in step 197" in finding(page), "the step does not go on")
    page.press("Fork here with this one")
    page.becomes(lambda: re.search("With (victim|tiering) .* instead from step 196", finding(page)) is not None, "no other choice is taken")
    page.changes(lambda: finding(page), lambda: page.slide("limit, ms", "ArrowRight", 2), "limit")
    for words in ("the decision of this step", "everything in a window of time", "what each step computes"):
        page.changes(lambda: finding(page), lambda w=words: page.choose("another picture of this run", w), words)
    path = page.page.get_by_label("or the path of a file")
    empty, old, damaged = (tmp_path / f"{name}.jsonl" for name in ("empty", "old", "damaged"))
    empty.touch()
    old.write_text('{"event":"RunStarted","seq":0,"t":0.0,"schema":0,"mode":"measured"}\n')
    damaged.write_bytes(b"\x00\xff no trace")
    for file, said in ((empty, "Is empty"), (old, "Has schema"), (damaged, "Line 1"), (tmp_path / "none.jsonl", "Does not exist")):
        path.fill(str(file))
        path.press("Enter")
        page.becomes(lambda said=said: page.says("This cannot be opened") and page.says(said), f"{file.name} is not explained")
    page.page.locator("input[type=file]").set_input_files(str(empty))
    page.becomes(lambda: page.says("Is empty"), "an empty upload is not explained")
    page.close()


def test_roofline_explorer(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1700)
    page.open(f"{lab}roofline_explorer/", ".vega-embed")
    page.save(screenshots, "roofline_explorer_light_1280")
    page.changes(lambda: finding(page), lambda: page.slide("A batch", "ArrowRight"), "A batch")
    page.changes(lambda: finding(page), lambda: page.slide("B batch", "ArrowRight", 2), "B batch")
    page.changes(lambda: finding(page), lambda: page.slide("A context", "ArrowRight", 2), "A context")
    page.changes(lambda: finding(page), lambda: page.slide("B context", "ArrowRight"), "B context")
    page.changes(lambda: finding(page), lambda: flip(page, "A computes prompts"), "A phase")
    page.changes(lambda: finding(page), lambda: flip(page, "B computes prompts"), "B phase")
    for name, choices in (("model", ("llama-3.1-70b", "mixtral-8x7b")), ("machine", ("t4", "h200")), ("numbers", ("w8a16", "w4a16"))):
        for side, choice in zip("AB", choices):
            page.changes(lambda: finding(page) + page.text(), lambda n=f"{side} {name}", c=choice: page.choose(n, c), f"{side} {name}")
    assert "GB" in page.text() or "does not fit" in page.text(), "what does not fit is not said"
    page.page.get_by_role("tab", name="Where the time goes").click()
    page.becomes(lambda: "of the time of" in finding(page), "the second tab is empty")
    page.page.get_by_role("tab", name="What fits").click()
    page.becomes(lambda: page.page.get_by_role("tab", name="What fits").get_attribute("aria-selected") == "true", "the third tab")
    page.page.locator("marimo-multiselect").locator("button").click()
    page.changes(lambda: finding(page) + page.text(), lambda: page.page.get_by_text("Deselect all").click(), "techniques")
    page.close()


def test_kv_lab(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1300)
    page.open(f"{lab}kv_lab/", ".vega-embed")
    page.becomes(lambda: "Blocks of" in finding(page), "the alternatives are missing")
    page.save(screenshots, "kv_lab_light_1280")
    for label, key in (("tokens in a block", "ArrowRight"), ("KV tokens", "ArrowRight"), ("shared beginning", "ArrowRight"),
                       ("families", "ArrowRight"), ("arrivals/s", "ArrowRight")):  # fmt: skip
        page.changes(lambda: page.text(), lambda k=key, n=label: page.slide(n, k), label)
    page.changes(lambda: page.picture(".vega-embed >> nth=1"), lambda: page.choose("eviction", "deepest_first"), "eviction")
    flip(page, "prefix cache")
    page.becomes(lambda: "Without a prefix cache" in page.text(), "the cache cannot be switched off")
    page.close()


def test_speculation(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1000)
    page.open(f"{lab}speculation/", ".vega-embed")
    assert "drafted tokens are accepted" in finding(page) and page.says("Recorded earlier")
    page.save(screenshots, "speculation_light_1280")
    page.changes(lambda: finding(page), lambda: page.choose("drafts from", "a smaller model (lab-xs)"), "source")
    assert page.says("Run here just now") and page.says("All answers are the same")
    page.changes(lambda: finding(page), lambda: page.slide("tokens in a draft", "ArrowLeft", 2), "tokens")
    page.changes(lambda: finding(page), lambda: page.choose("how many", "ewma"), "policy")
    page.changes(lambda: finding(page), lambda: page.choose("what is asked", "chat"), "task")
    page.changes(lambda: finding(page), lambda: page.slide("at once", "ArrowLeft"), "batch")
    page.close()


def test_experts(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1300)
    page.open(f"{lab}experts/", ".vega-embed")
    assert "lru makes" in finding(page)
    page.page.wait_for_timeout(2000)
    page.save(screenshots, "experts_light_1280")
    page.changes(lambda: finding(page), lambda: page.choose("who decides", "balanced"), "policy")
    page.changes(lambda: finding(page), lambda: page.slide("experts of a layer that fit", "ArrowRight", 2), "room")
    page.changes(lambda: finding(page), lambda: page.choose("machine", "h100"), "machine")
    page.changes(lambda: finding(page), lambda: page.slide("requests at once", "ArrowLeft"), "batch")
    page.close()


def test_overlap(browser: Any, lab: str, screenshots: Path) -> None:
    page = Page(browser, lab, "light", 1280, 1300)
    page.open(f"{lab}overlap/", ".vega-embed")
    page.becomes(lambda: page.page.locator(".vega-embed").count() == 4, "a picture is missing")
    assert "apex makes" in finding(page) and "(simulated)" in finding(page) and re.search(r"neo: .* an iteration, worth \d+ tokens/s", finding(page))
    page.page.wait_for_timeout(1000)
    page.save(screenshots, "overlap_light_1280")
    page.changes(lambda: page.picture(".vega-embed >> nth=1"), lambda: page.choose("look at", "their first 10 ms"), "look at")
    page.changes(lambda: finding(page), lambda: page.choose("compare", "gpu_only"), "compare")
    page.becomes(lambda: "gpu_only: " in finding(page), "the left panel does not follow")
    page.changes(lambda: finding(page), lambda: page.choose("with", "fastdecode"), "with")
    page.becomes(lambda: "fastdecode: " in finding(page), "the right panel does not follow")
    page.changes(lambda: finding(page), lambda: page.slide("CPU's attention", "ArrowRight", 3), "CPU speed")
    page.becomes(lambda: "attends at 40%" in finding(page), "the CPU does not get faster")
    page.changes(lambda: finding(page), lambda: page.slide("KV tokens on the GPU", "ArrowRight", 3), "KV tokens")
    page.becomes(lambda: "With 6,912 KV tokens" in finding(page), "the memory does not grow")
    page.close()


@pytest.mark.parametrize("name", [app.name for app in APPS if app.name != "engine_room"])
def test_every_app_at_night_on_a_narrow_screen(browser: Any, lab: str, screenshots: Path, name: str) -> None:
    page = Page(browser, lab, "dark", 800, 1500)
    page.open(f"{lab}{name}/", ".llt, .vega-embed")
    page.page.wait_for_timeout(1500)
    assert page.page.locator("body").get_attribute("data-theme") == "dark"
    too_wide = page.page.evaluate("document.querySelector('#App').scrollWidth - document.querySelector('#App').clientWidth")
    assert too_wide <= 0, f"{name} is {too_wide} px too wide"
    page.save(screenshots, f"{name}_dark_800")
    page.close()


def options(page: Page) -> list[str]:
    """What the page's menus offer."""
    return list(page.page.locator("marimo-dropdown select").evaluate_all("all => all.map(s => s.innerHTML)"))
