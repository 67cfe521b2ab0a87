"""Colours by meaning, and the two altair themes made of them.

One meaning, one colour, in every chart, page and widget (Okabe-Ito, safe for colour-blind readers). Colour never stands
alone: thickness, shape or position says the same. Nothing is registered on import; call `enable` once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from llmlab.types import ConfigError

ThemeName = Literal["light", "dark"]
FONT = "Liberation Sans, Helvetica Neue, Helvetica, Arial, sans-serif"


class Roles(msgspec.Struct, frozen=True):
    """What a colour means. Text may be `ink`, `mute`, `decode`, `preempted` or `cached` only: the others are fills, too
    pale to read. `owners` tell memory owners apart and, on purpose, repeat no other role (Paul Tol's light scheme)."""

    ink: str
    mute: str
    grid: str
    paper: str
    waiting: str
    preempted: str
    decode: str
    prefill: str = "#E69F00"
    cached: str = "#009E73"
    rejected: str = "#CC79A7"
    transfer: str = "#56B4E9"
    owner_ink: str = "#1B2430"
    owners: tuple[str, ...] = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#BBCC33", "#AAAA00")

    @property
    def phases(self) -> dict[str, str]:
        return {"waiting": self.waiting, "prefill": self.prefill, "decode": self.decode}


LIGHT = Roles(ink="#1F2933", mute="#6B7580", grid="#E8EBEF", paper="#FFFFFF", waiting="#C9CED6", preempted="#D55E00",
              decode="#0072B2")  # fmt: skip
DARK = Roles(ink="#E6E9EE", mute="#9AA5B1", grid="#2B333D", paper="#15191E", waiting="#5A6675", preempted="#FF7A33",
             decode="#3D9BD9", cached="#1FB98C")  # fmt: skip
ROLES: dict[str, Roles] = {"light": LIGHT, "dark": DARK}


def register_themes() -> None:
    """Make `llmlab_light` and `llmlab_dark` known to altair; enables neither."""
    import altair as alt

    def theme(name: str) -> Callable[[], Any]:
        return lambda: {"config": config(name)}

    for name in ROLES:
        alt.theme.register(f"llmlab_{name}", enable=False)(theme(name))


def enable(name: str = "light") -> Any:
    """Register both themes and switch to "light" or "dark". Also a context manager: `with enable("dark"): ...`.
    Raises ConfigError for another name."""
    if name not in ROLES:
        raise ConfigError("theme", name, "is not a theme", f"Choose one of {', '.join(ROLES)}.")
    import altair as alt

    register_themes()
    return alt.theme.enable(f"llmlab_{name}")


def roles() -> Roles:
    """The colours of the theme that is enabled now; light if it is none of ours."""
    import altair as alt

    return DARK if alt.theme.active == "llmlab_dark" else LIGHT


def recoloured(spec: Any, source: str, target: str) -> Any:
    """A Vega-Lite spec drawn under the theme `source` as it would be under `target`: every colour of a role exchanged,
    and the configuration. Data is shared, not copied. Works because no two roles of a theme have one colour."""
    swap = dict(zip(_colours(ROLES[source]), _colours(ROLES[target])))

    def walk(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: value if key in ("datasets", "values") else walk(value) for key, value in part.items()}
        if isinstance(part, list):
            return [walk(value) for value in part]
        return swap.get(part, part) if isinstance(part, str) else part

    return {**walk({k: v for k, v in spec.items() if k != "config"}), "config": config(target)}


def recoloured_svg(svg: str, source: str, target: str) -> str:
    """A picture that was drawn under the theme `source`, in the colours of `target`."""
    swap = {a.lower(): b for a, b in zip(_colours(ROLES[source]), _colours(ROLES[target])) if a != b}
    return re.sub("#[0-9a-fA-F]{6}\\b", lambda found: swap.get(found[0].lower(), found[0]), svg)


def _colours(c: Roles) -> list[str]:
    values = [getattr(c, name) for name in c.__struct_fields__]
    return [colour for value in values for colour in ([value] if isinstance(value, str) else value)]


def config(name: str) -> dict[str, Any]:
    """The Vega-Lite configuration of a theme. Charts carry no styling of their own besides the roles."""
    c = ROLES[name]
    small = {"labelFontSize": 11, "titleFontSize": 11.5, "titleFontWeight": "normal"}
    return {
        "background": c.paper,
        "font": FONT,
        "padding": 12,
        "view": {"stroke": None, "continuousWidth": 820, "continuousHeight": 300},
        "title": {"anchor": "start", "frame": "group", "fontSize": 17, "fontWeight": 600, "color": c.ink, "offset": 14,
                  "subtitleColor": c.mute, "subtitleFontSize": 12.5, "subtitleFontWeight": "normal",
                  "subtitlePadding": 5, "subtitleLineHeight": 17},
        "axis": {**small, "labelColor": c.mute, "titleColor": c.mute, "gridColor": c.grid, "domain": False,
                 "ticks": False, "labelPadding": 6, "titlePadding": 8},
        "axisX": {"titleAnchor": "end"},
        "axisY": {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleY": -10, "titleX": -34},
        "legend": {**small, "labelColor": c.ink, "titleColor": c.mute, "orient": "top", "symbolType": "square",
                   "symbolSize": 110, "offset": 4, "labelFontSize": 11.5, "symbolBaseFillColor": c.mute},
        "header": {"labelColor": c.ink, "titleColor": c.mute, "labelFontSize": 12},
        "text": {"color": c.ink, "fontSize": 11.5},
        "rule": {"color": c.mute},
        "range": {"category": [LIGHT.decode if name == "light" else c.decode, c.prefill, c.cached, c.rejected,
                               c.transfer, c.preempted, "#F0E442", c.mute]},
        "style": {
            "note": {"color": c.mute, "fontSize": 11.5},
            "strong": {"color": c.preempted, "fontSize": 12, "fontWeight": "bold"},
            # the styles that charts of `roofline` name
            "halo": {"stroke": c.paper, "strokeWidth": 3}, "rim": {"stroke": c.paper, "strokeWidth": 1},
            "wall": {"color": c.ink, "fill": c.ink}, "quiet": {"color": c.mute, "fill": c.mute}, "bold": {"color": c.ink},
            "roof": {"color": c.ink, "strokeWidth": 2.5}, "otherRoof": {"color": c.mute, "strokeWidth": 2, "opacity": 0.6},
        },
    }  # fmt: skip
