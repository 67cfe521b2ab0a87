"""The one error of this package, and the nearest-name helper behind its messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RooflineError(ValueError):
    """A value the caller can mend. The message names the field, the value and the way out."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` known names that resemble ``name``, best first (never empty if any is known)."""
    names = list(known)
    close = get_close_matches(name, names, n=n, cutoff=0.4)
    return close or names[:n]


def unknown(what: str, name: str, known: Iterable[str]) -> RooflineError:
    """Build the error for a name that is in no table, with the nearest names in it."""
    names = list(known)
    return RooflineError(
        f"unknown {what} {name!r}: the nearest names are {', '.join(nearest(name, names))} "
        f"({len(names)} known, {what}.names() lists them)"
    )


def positive(field: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above zero."""
    if not 0 < value < float("inf"):
        raise RooflineError(f"{field} must be a finite number above 0, got {value!r}")


def non_negative(field: str, value: float) -> None:
    """Raise unless ``value`` is a finite number of at least zero."""
    if not 0 <= value < float("inf"):
        raise RooflineError(f"{field} must be a finite number of at least 0, got {value!r}")
