"""All apps in one process with the engine: marimo's ASGI apps behind a page of cards, on this machine only.

Nothing is fetched from outside at run time. The theme is a cookie, so that a page and its kernel (which draws the figures)
agree on it before anything is shown.
"""

from __future__ import annotations

import html
import mimetypes
import os
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import msgspec

from llmlab.applab import first
from llmlab.applab.gallery import APPS, App, app_file
from llmlab.types import ConfigError

HOST = "127.0.0.1"
PORT = 2780
TRIED = 50  # ports after the wanted one
THEME_COOKIE, WIDTH_COOKIE = "llmlab_theme", "llmlab_width"
SESSION_SECONDS = 10  # a closed tab's kernel lives on for so long, in case it comes back
_LIGHT = (b'"theme": "light"', b"&quot;theme&quot;: &quot;light&quot;")  # as marimo's pages say it


class Place(msgspec.Struct, frozen=True):
    """Where the lab will be found. `note` says if that is not where it was asked to be."""

    port: int
    path: str = "/"
    note: str = ""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.path}"


def find_port(wanted: int = PORT) -> Place:
    """The wanted port, or the next free one; 0 takes any. Raises ConfigError if there is none."""
    if not 0 <= wanted < 65536:
        raise ConfigError("port", wanted, "must be 0 to 65535", "0 takes any free one.")
    for port in range(wanted, min(wanted + TRIED, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            found = int(probe.getsockname()[1])
        return Place(found, note="" if wanted in (0, found) else f"Port {wanted} is busy; this is port {found}.")
    raise ConfigError("port", wanted, f"is busy, and so are the {TRIED - 1} after it", "Use --port 0 for any free one.")


def serve(place: Place, ready: Callable[[], None]) -> None:
    """Serve all apps until Ctrl-C; `ready` is called, in a thread of its own, as soon as pages are answered."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(lab(), host=HOST, port=place.port, log_level="error", access_log=False))
    threading.Thread(target=_when_up, args=(server, ready), daemon=True).start()
    server.run()


def _when_up(server: Any, ready: Callable[[], None]) -> None:
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.02)
    ready()


def open_browser(url: str) -> bool:
    """Whether a browser could be opened."""
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


# ------------------------------------------------------------------------------------- the ASGI app
def lab(apps: Sequence[App] = APPS) -> Any:
    """The ASGI application: the cards at /, an app at /NAME/."""
    os.environ.setdefault("MARIMO_SKIP_UPDATE_CHECK", "1")
    import marimo
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Mount, Route

    builder = marimo.create_asgi_app(quiet=True, session_ttl=SESSION_SECONDS, html_head=_HEAD)
    for one in apps:
        builder = builder.with_app(path=f"/{one.name}", root=str(app_file(one.name)), middleware=[Themed])

    async def cards(request: Any) -> Any:
        return HTMLResponse(gallery_page(apps))

    return Starlette(routes=[Route("/", cards), Route("/{app}/first.{theme}.svg", _first_picture), Route("/{app}/assets/{name}", _Assets()),
                             Mount("/", builder.build())])  # fmt: skip


async def _first_picture(request: Any) -> Any:
    """The picture that a page shows until it has one of its own."""
    from starlette.responses import Response

    known = request.path_params["theme"] in first.THEMES and request.path_params["app"] in {one.name for one in APPS}
    file = first.picture_file(request.path_params["app"], request.path_params["theme"]) if known else None
    if file is None:
        return Response(status_code=404)
    return Response(file.read_bytes(), media_type="image/svg+xml", headers={"Content-Encoding": "gzip", "Cache-Control": "no-cache"})


class _Assets:
    """ASGI: marimo's own scripts, styles and fonts, straight from its package. A page asks for 300 of them, and on their way through
    marimo's server they cost more time than all else before the first picture. Their names hold a hash of what is in them."""

    def __init__(self) -> None:
        import marimo

        folder = Path(marimo.__file__).parent / "_static" / "assets"
        self._files = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import Response

        path = self._files.get(scope["path_params"]["name"])
        if path is None:
            answer = Response(status_code=404)
        else:
            kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0]
            answer = Response(path.read_bytes(), media_type=kind, headers={"Cache-Control": "max-age=31536000, immutable"})
        await answer(scope, receive, send)


class Themed:
    """ASGI middleware: a page is sent in the theme that its visitor's cookie names."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        cookies = dict(scope["headers"]).get(b"cookie", b"").decode("latin-1")
        # A page that the browser kept in the other theme has the same tag: never answer "not modified".
        scope = {**scope, "headers": [(k, v) for k, v in scope["headers"] if k != b"if-none-match"]}
        if theme_of(cookies) != "dark":
            await self._app(scope, receive, send)
            return
        held: list[Any] = []

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                page = b"text/html" in dict(message["headers"]).get(b"content-type", b"")
                if page:
                    held.append(message)
                    return
            if held and message["type"] == "http.response.body":
                await _send_darkened(held, message, send)
                return
            await send(message)

        await self._app(scope, receive, answer)


async def _send_darkened(held: list[Any], message: Any, send: Any) -> None:
    """Collect a page's pieces; send it, with its length put right, once it is whole."""
    held.append(message)
    if message.get("more_body"):
        return
    start, *pieces = held
    body = b"".join(piece.get("body", b"") for piece in pieces)
    for written in _LIGHT:
        body = body.replace(written, written.replace(b"light", b"dark"))
    headers = [(k, str(len(body)).encode() if k == b"content-length" else v) for k, v in start["headers"]]
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    held.clear()


def theme_of(cookies: str) -> str:
    """ "light" or "dark", from a Cookie header."""
    found = SimpleCookie(cookies).get(THEME_COOKIE)
    return "dark" if found is not None and found.value == "dark" else "light"


# ------------------------------------------------------------------------------------------ pages
_SCRIPT = f"""
const llmlabTheme = () => (document.cookie.match(/{THEME_COOKIE}=(light|dark)/) || [])[1];
const llmlabMeasure = () => {{ document.cookie = `{WIDTH_COOKIE}=${{innerWidth}}; path=/; samesite=lax`; }};
llmlabMeasure();
addEventListener("resize", llmlabMeasure);
const llmlabSwitch = (name) => {{ document.cookie = `{THEME_COOKIE}=${{name}}; path=/; max-age=31536000; samesite=lax`; }};
if (!llmlabTheme()) {{
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  llmlabSwitch(dark ? "dark" : "light");
  if (dark && document.cookie) location.reload();
}}
"""
# Shown from the first moment on, below what the page has already, until the page has a picture of its own.
_FIRST = """
(() => {
  const theme = llmlabTheme() || "light", place = document.createElement("div"), until = Date.now() + 60000;
  place.id = "llmlab-first";
  place.className = theme;
  place.innerHTML = `<p>Drawn earlier, to look at while the page is being loaded.</p><img alt="" src="first.${theme}.svg">`;
  place.querySelector("img").onerror = () => place.remove();
  document.documentElement.append(place);
  const look = setInterval(() => {
    const boxes = (what) => [...document.querySelectorAll(what)].map((e) => e.getBoundingClientRect());
    const drawn = (root) => root.querySelector(".llt, .vega-embed canvas, .vega-embed svg") ||
      [...root.querySelectorAll("*")].some((e) => e.shadowRoot && drawn(e.shadowRoot));
    place.style.top = Math.max(34, ...boxes("#App .output-area").map((box) => box.bottom)) + "px";
    if (drawn(document) || Date.now() > until) { clearInterval(look); place.remove(); }
  }, 100);
})();
"""
_HEAD = f"""
<style>
  :root {{ --marimo-heading-font: Liberation Sans, Helvetica, Arial, sans-serif; --marimo-text-font: Liberation Sans, Helvetica, Arial, sans-serif; }}
  [data-testid="loading-indicator"] {{ position: fixed !important; top: 5px; left: 96px; margin: 0; z-index: 61; }}
  [data-testid="loading-indicator"] svg {{ height: 24px; }}
  .running-app-icon {{ animation: llmlab-appear 0s 1s forwards; }} /* marimo's own turns for ever, and makes the page paint */
  @keyframes llmlab-appear {{ to {{ visibility: visible; }} }}
  #llmlab-first {{ position: fixed; top: 34px; left: 0; right: 0; bottom: 0; z-index: 50; overflow: hidden; pointer-events: none;
    padding: 0 max(24px, calc(50% - 628px)); font: 13px/1.4 Liberation Sans, Helvetica, Arial, sans-serif; color: #6B7580; }}
  #llmlab-first.dark {{ color: #9AA5B1; }}
  #llmlab-first p {{ margin: 12px 0 6px; }}
  #llmlab-first img {{ max-width: 100%; max-height: calc(100% - 50px); }}
  .llmlab-bar {{ position: fixed; top: 0; left: 0; right: 0; height: 34px; z-index: 60; display: flex; align-items: center;
    gap: 14px; padding: 0 16px; font: 13px/1 Liberation Sans, Helvetica, Arial, sans-serif; background: #F4F6F8;
    border-bottom: 1px solid #E1E5EA; }}
  .llmlab-bar a, .llmlab-bar button {{ color: #0060A0; background: none; border: 0; font: inherit; cursor: pointer;
    text-decoration: none; padding: 4px; }}
  .llmlab-bar button {{ margin-left: auto; }}
  .llmlab-bar.dark {{ background: #1B2026; border-color: #2B333D; }}
  .llmlab-bar.dark a, .llmlab-bar.dark button {{ color: #6DB4E8; }}
  #root {{ padding-top: 30px; }}
  #root > div {{ min-height: 0; }}
  [data-testid="notebook-actions-dropdown"], [data-testid="watermark"] {{ display: none !important; }}
  #App > div {{ padding-left: max(12px, calc(50% - 640px)) !important; padding-right: max(12px, calc(50% - 640px)) !important; }}
  #App .output-area div[style*=flex] > div {{ min-width: 0; }} .cm-editor {{ max-width: 100%; }}
  .vega-embed {{ max-width: 100%; }} .vega-embed canvas, .vega-embed svg {{ max-width: 100% !important; height: auto !important; }}
  .output-area {{ padding-left: 12px; padding-right: 12px; overflow-x: auto !important; max-width: 100%; }}
  #App .marimo-cell {{ min-width: 0; max-width: 100%; }} #App h1 {{ margin: 12px 0 2px; }} #App .output {{ margin-bottom: 6px; }}
  .marimo-output-stale, .output-area-stale {{ opacity: 1 !important; }}
</style>
<script>{_SCRIPT}{_FIRST}
addEventListener("DOMContentLoaded", () => {{
  const bar = document.createElement("nav"), dark = llmlabTheme() === "dark";
  bar.className = "llmlab-bar" + (dark ? " dark" : "");
  bar.innerHTML = '<a href="../">← all apps</a><button type="button" id="llmlab-theme"></button>';
  const button = bar.querySelector("button");
  button.textContent = dark ? "light" : "dark";
  button.onclick = () => {{ llmlabSwitch(dark ? "light" : "dark"); location.reload(); }};
  document.body.prepend(bar);
}});
</script>
"""


def gallery_page(apps: Sequence[App]) -> str:
    """The page of cards."""
    cards = "".join(_card(one) for one in apps)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>llmlab</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{_CARDS}</style><script>{_SCRIPT}</script></head>
<body><script>document.body.className = llmlabTheme() || "light";</script>
<main><header><h1>llmlab</h1><button type="button" id="llmlab-theme"></button></header>
<p class=lead>The lab bench of LLM inference: a real engine whose every decision can be read, questioned and replayed.
Everything here runs on this machine and asks nobody for anything.</p><div class=cards>{cards}</div></main>
<script>
const button = document.getElementById("llmlab-theme"), dark = llmlabTheme() === "dark";
button.textContent = dark ? "light" : "dark";
button.onclick = () => {{ llmlabSwitch(dark ? "light" : "dark"); location.reload(); }};
</script></body></html>"""


def _card(one: App) -> str:
    hint = f"<p class=hint>{html.escape(one.hint)}</p>" if one.hint else ""
    return f'<a class="card{" first" if hint else ""}" href="{one.name}/">{hint}<h2>{html.escape(one.title)}</h2><p>{html.escape(one.idea)}</p></a>'


_CARDS = """
body { margin: 0; font: 16px/1.5 Liberation Sans, Helvetica, Arial, sans-serif; background: #FFFFFF; color: #1F2933; }
body.dark { background: #15191E; color: #E6E9EE; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px; }
header { display: flex; align-items: baseline; justify-content: space-between; }
h1 { margin: 0; font-size: 34px; } h2 { margin: 0 0 6px; font-size: 19px; color: #0072B2; } p { margin: 0; }
.lead { color: #6B7580; max-width: 60em; margin: 6px 0 28px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }
.card { display: block; padding: 18px 20px; border: 1px solid #E1E5EA; border-radius: 8px; color: inherit;
  text-decoration: none; }
.card:hover, .card:focus { border-color: #0072B2; }
.card.first { border: 2px solid #0072B2; } .hint { font-weight: bold; font-size: 13px; color: #00734F; margin: 0 0 4px; }
button { color: #0060A0; background: none; border: 0; font: inherit; cursor: pointer; }
.dark .lead { color: #9AA5B1; } .dark h2 { color: #3D9BD9; } .dark .card { border-color: #2B333D; }
.dark .card:hover, .dark .card:focus, .dark .card.first { border-color: #3D9BD9; } .dark .hint { color: #1FB98C; } .dark button { color: #6DB4E8; }
"""
