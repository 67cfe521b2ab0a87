"""What a draft source is made of, as far as its price depends on it (seam E). Plain data: the log holds it, so that a replay
prices drafts as the run did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from roofline.shapes import Shape


class HeadSizes(msgspec.Struct, frozen=True, tag="heads", tag_field="kind"):
    """A network that drafts from the target's states: the width of its gate, and the last tokens that it sees."""

    inner: int
    window: int


class LayerSizes(msgspec.Struct, frozen=True, tag="layers", tag_field="kind"):
    """The target's own first layers."""

    first: int


class LookupSizes(msgspec.Struct, frozen=True, tag="lookup", tag_field="kind"):
    """A table that the host looks into: seconds of a call, of each request in it, and of each token that is new to the table."""

    call: float
    request: float
    token: float = 0.0


DraftSizes = Shape | HeadSizes | LayerSizes | LookupSizes  # Shape: a model of its own, which reads every text


def described(sizes: DraftSizes) -> dict[str, Any]:
    """The sizes as a log holds them."""
    return asdict(sizes) if isinstance(sizes, Shape) else msgspec.to_builtins(sizes)  # type: ignore[no-any-return]


def sizes_from(data: Mapping[str, Any]) -> DraftSizes:
    """The sizes that `described` wrote down."""
    if "kind" not in data:
        return Shape(**data)
    return msgspec.convert(dict(data), HeadSizes | LayerSizes | LookupSizes)  # type: ignore[no-any-return]
