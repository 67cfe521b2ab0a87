"""The first thing to be seen of an app: a picture drawn beforehand, shown until the page itself has one.

`python -m llmlab.applab.first [FOLDER]` draws all of them anew, as FOLDER/NAME.light.svgz and NAME.dark.svgz (apps/first).
They are what the apps open with: recorded runs, and simulated or computed ones with their default settings.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llmlab

FOLDER = "first"
THEMES = ("light", "dark")


def picture_file(name: str, theme: str) -> Path | None:
    """The picture of an app: inside an installed package, or in `apps/` of a source checkout; None without one."""
    package = Path(llmlab.__path__[0])
    places = [root / FOLDER / f"{name}.{theme}.svgz" for root in (package / "_apps", package.parent / "apps")]
    return next((place for place in places if place.is_file()), None)


# ------------------------------------------------------------------------------------------ drawing
def charts() -> Mapping[str, Callable[[], Any]]:
    """What draws an app's first picture under the theme in force, by the name of the app."""
    return {
        "chunked_prefill": _scene, "engine_room": _timeline, "time_machine": _timeline, "policy_lab": _race, "roofline_explorer": _roofline,
        "kv_lab": _blocks, "speculation": _strip, "experts": _experts, "overlap": _placements,
    }  # fmt: skip


def svg(name: str, theme: str) -> str:
    """The first picture of an app."""
    import vl_convert

    from llmlab.ui import theme as themes
    from roofline.charts import enable_theme

    with themes.enable(theme):
        if name == "roofline_explorer":
            enable_theme(dark=theme == "dark")
        spec = charts()[name]().to_dict() | {"background": "transparent"}
    return str(vl_convert.vegalite_to_svg(json.dumps(spec)))


def _scene() -> Any:
    from llmlab.applab import chunks

    return chunks.scene_chart(chunks.scene(4096, 8192), chunks.longest(4096))


def _timeline() -> Any:
    from llmlab.applab.pages import recorded
    from llmlab.ui import figures

    return figures.request_timeline(recorded("first-look"))


def _strip() -> Any:
    from llmlab.applab.pages import recorded
    from llmlab.ui import figures

    return figures.speculation_strip(recorded("drafts"))


def _blocks() -> Any:
    from llmlab.applab import kv
    from llmlab.ui import figures

    return figures.kv_block_map(kv.served(kv.Pool()))


def _roofline() -> Any:
    from llmlab.applab import roof

    return roof.roofline_chart(*(roof.priced(name, roof.SetUp(machine=machine)) for name, machine in (("A", "a100"), ("B", "h100"))))


def _experts() -> Any:
    from llmlab.applab import experts

    return experts.chart(experts.Offload(), experts.compared(experts.Offload()))


def _placements() -> Any:
    from llmlab.applab import overlap, pages

    return overlap.rates_chart(overlap.Machine(), pages.placements(overlap.Machine()), ("neo", "apex"))


def _race() -> Any:
    from llmlab.applab import charts, trial

    entry = trial.read(trial.EXAMPLES["shortest prompt first"])
    return charts.race_chart(trial.race(entry, trial.Course("a100", 1.3, 300, seeds=3), entry.seam),
                             trial.GOALS["mean time to first token"], entry.seam)  # fmt: skip


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0] if arguments else "apps/first")
    folder.mkdir(parents=True, exist_ok=True)
    for name in charts():
        for theme in THEMES:
            path = folder / f"{name}.{theme}.svgz"
            path.write_bytes(gzip.compress(svg(name, theme).encode(), mtime=0))
            print(f"{path} {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
