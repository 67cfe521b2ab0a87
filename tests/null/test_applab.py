"""What the apps share, without a browser, a model or marimo."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import llmlab
from llmlab.applab import first, gallery, serving
from llmlab.applab.window import Window
from llmlab.events import catalog as ev
from llmlab.types import ConfigError

APPS = Path(__file__).parents[2] / "apps"


def test_every_app_has_a_card_and_every_card_an_app() -> None:
    assert sorted(path.stem for path in APPS.glob("*.py")) == sorted(app.name for app in gallery.APPS)
    page = serving.gallery_page(gallery.APPS)
    for app in gallery.APPS:
        assert gallery.app_file(app.name) == APPS / f"{app.name}.py"
        assert f'href="{app.name}/"' in page and app.title in page


def test_an_unknown_app_is_answered_with_near_names() -> None:
    with pytest.raises(ConfigError, match="engine_room"):
        gallery.app("engine-rom")


def test_the_gallery_names_no_other_host() -> None:
    assert "://" not in serving.gallery_page(gallery.APPS)
    assert "://" not in serving._HEAD


# ------------------------------------------------------------------------------------------ ports
def test_a_busy_port_is_passed_over_and_that_is_said() -> None:
    with socket.socket() as busy:
        busy.bind((serving.HOST, 0))
        busy.listen()
        wanted = busy.getsockname()[1]
        place = serving.find_port(wanted)
    assert place.port > wanted and str(wanted) in place.note and str(place.port) in place.url


def test_any_free_port_needs_no_note() -> None:
    place = serving.find_port(0)
    assert place.port > 0 and not place.note
    with pytest.raises(ConfigError):
        serving.find_port(70_000)


# ---------------------------------------------------------------------------------- first pictures
def test_every_app_has_a_first_picture_that_says_where_it_comes_from() -> None:
    assert sorted(first.charts()) == sorted(app.name for app in gallery.APPS)
    for app in gallery.APPS:
        for theme in first.THEMES:
            file = first.picture_file(app.name, theme)
            assert file is not None, app.name
            svg = gzip.decompress(file.read_bytes()).decode()
            assert re.search(r"[Mm]easured|[Ss]imulated|[Mm]odelled|[Cc]omputed", svg), app.name
            assert re.findall(r"https?://(?!www.w3.org)", svg) == []


@pytest.mark.parametrize("name", ["engine_room", "kv_lab", "experts", "overlap", "roofline_explorer"])
def test_a_first_picture_is_what_would_be_drawn_today(name: str) -> None:
    file = first.picture_file(name, "light")
    assert file is not None
    svg = gzip.decompress(file.read_bytes()).decode()
    drawn = re.findall(r"<text[^>]*>([^<]{12,})</text>", svg)
    again = re.findall(r"<text[^>]*>([^<]{12,})</text>", first.svg(name, "light"))
    assert drawn == again, "python -m llmlab.applab.first draws them anew"


def served(path: str) -> tuple[int, dict[bytes, bytes], bytes]:
    """What the lab answers: status, headers, body."""
    pytest.importorskip("marimo")
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
             "root_path": "", "scheme": "http", "server": ("127.0.0.1", 1), "http_version": "1.1"}  # fmt: skip
    with ThreadPoolExecutor(1) as fresh:
        fresh.submit(asyncio.run, serving.lab(())(scope, receive, send)).result()
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent)


def test_first_pictures_and_scripts_are_sent_without_asking_marimo() -> None:
    status, headers, body = served("/kv_lab/first.dark.svg")
    assert (status, headers[b"content-type"], headers[b"content-encoding"]) == (200, b"image/svg+xml", b"gzip")
    assert gzip.decompress(body).startswith(b"<svg")
    for path in ("/nobody/first.dark.svg", "/kv_lab/first.pink.svg", "/kv_lab/assets/none.js", "/kv_lab/assets/..%2Findex.html"):
        assert served(path)[0] == 404
    import marimo

    script = next((Path(marimo.__file__).parent / "_static" / "assets").glob("*.js"))
    status, headers, body = served(f"/kv_lab/assets/{script.name}")
    assert (status, headers[b"content-type"]) == (200, b"text/javascript; charset=utf-8")
    assert b"immutable" in headers[b"cache-control"]
    assert body == script.read_bytes()


# ------------------------------------------------------------------------------------------ theme
def page_through(cookie: str) -> tuple[bytes, dict[bytes, bytes], dict[bytes, bytes]]:
    """A page of marimo's kind behind the theme: its body and headers, and the headers that the app was asked with."""
    sent: list[Any] = []
    asked: dict[bytes, bytes] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.update(scope["headers"])
        body = b'{"theme": "light"} {&quot;theme&quot;: &quot;light&quot;}'
        headers = [(b"content-type", b"text/html; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body[:9], "more_body": True})
        await send({"type": "http.response.body", "body": body[9:]})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"cookie", cookie.encode()), (b"if-none-match", b"tag")]}
    with ThreadPoolExecutor(1) as fresh:  # a loop that a browser test left running in this thread must not be in the way
        fresh.submit(asyncio.run, serving.Themed(app)(scope, None, send)).result()
    return b"".join(m.get("body", b"") for m in sent), dict(sent[0]["headers"]), asked


def test_a_page_comes_in_the_theme_of_its_cookie() -> None:
    body, headers, asked = page_through("a=b; llmlab_theme=dark")
    assert body == b'{"theme": "dark"} {&quot;theme&quot;: &quot;dark&quot;}'
    assert headers[b"content-length"] == str(len(body)).encode()
    assert b"if-none-match" not in asked, "a page kept in the other theme must not be taken for this one"


@pytest.mark.parametrize("cookie", ["", "llmlab_theme=light", "llmlab_theme=pink", "bad \x7f cookie"])
def test_without_a_choice_it_is_light(cookie: str) -> None:
    assert b"dark" not in page_through(cookie)[0]


# ----------------------------------------------------------------------------------------- window
@pytest.fixture(scope="module")
def cut() -> Window:
    """The newest 1500 events of a run with preemptions."""
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, max_num_batched_tokens=64,
                           log_level=3, log_capacity=1500)  # fmt: skip
    for i in range(40):
        engine.add_request([1 + (i + j) % 7 for j in range(30)], llmlab.SamplingParams(max_tokens=40), arrival=8e-4 * i)
    started = engine.log[0]
    assert isinstance(started, ev.RunStarted)
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.log.first_seq > 0
    return Window([started], tuple(engine.log))


def test_a_window_answers_like_a_run_although_its_beginning_is_gone(cut: Window) -> None:
    assert 0 < len(cut.requests) < 40 and cut.started.model["name"] == "lab-s"
    assert cut.metrics.num_preemptions > 0
    for name in cut.requests:
        assert name in cut.why(name).headline
    preempted = next(n for n, r in cut.requests.items() if r.num_preemptions)
    assert "tiering policy" in str(cut.why(preempted))


def test_a_chain_of_causes_ends_where_the_window_begins(cut: Window) -> None:
    assert cut.event(1) is cut.started
    last = cut.log_events[-1]
    assert cut.event(last.seq) is last


def test_the_newest_requests_only(cut: Window) -> None:
    names = list(cut.requests)
    assert list(Window([cut.started], cut.log_events, newest=3).requests) == names[-3:]


@pytest.mark.parametrize("words", [["app", "engine-rom"], ["lab", "--port", "70000"]])
def test_the_command_answers_an_unknown_app_and_a_wrong_port_with_a_sentence(words: list[str]) -> None:
    pytest.importorskip("marimo", reason='marimo is not installed: pip install "llmlab[apps]"')
    from typer.testing import CliRunner

    from llmlab.cli.app import app

    result = CliRunner().invoke(app, words)
    said = "engine_room" if words[0] == "app" else "port"
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_where_no_browser_can_be_opened_that_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(url: str) -> bool:
        raise serving.webbrowser.Error("no browser")

    monkeypatch.setattr(serving.webbrowser, "open", broken)
    assert serving.open_browser("http://127.0.0.1:1/") is False
