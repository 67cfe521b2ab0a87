"""The order in which a step's lanes pass the layers: one program for the real executor and for the simulated one.

    one lane     pre 0 | begin 0  attend 0  join 0  post 0 | pre 1 | begin 1 ...
    two lanes    while the rows of one lane are away on the CPU, the other lane has the device:

        lane 0   pre 0  begin 0  attend 0          | join 0  post 0  pre 1  begin 1 |                              | attend 1 join 1 ...
        lane 1                            pre 0 begin 0                              | attend 0 join 0 post 0 pre 1 begin 1 |

`pre`: norm, q, k, v and rotation of the lane's rows. `begin`: the rows on the CPU leave, their attention begins.
`attend`: attention of the rows on the device. `join`: rows come back from the CPU, those that have just left and those
that an earlier step left half-way: as late as possible, just before `post`, the rest of the layer.
Source of the interleaving: NEO, whose half-steps these are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Act = Literal["pre", "begin", "attend", "join", "post"]


class Stage(NamedTuple):
    act: Act
    lane: int
    layer: int


@functools.lru_cache(maxsize=64)
def stages(lanes: tuple[int, ...], num_layers: int) -> tuple[Stage, ...]:
    """The program of a step with these lanes, in the order in which the device meets it."""
    return tuple(_stages(lanes, num_layers))


def _stages(lanes: Sequence[int], num_layers: int) -> Iterator[Stage]:
    for lane in lanes:
        yield Stage("pre", lane, 0)
        yield Stage("begin", lane, 0)
        if lane == lanes[0]:
            yield Stage("attend", lane, 0)
    for layer in range(num_layers):
        for index, lane in enumerate(lanes):
            yield Stage("join", lane, layer)
            yield Stage("post", lane, layer)
            if layer + 1 < num_layers:
                yield Stage("pre", lane, layer + 1)
                yield Stage("begin", lane, layer + 1)
            following = lanes[(index + 1) % len(lanes)]
            if index + 1 < len(lanes):
                yield Stage("attend", following, layer)
            elif layer + 1 < num_layers:
                yield Stage("attend", following, layer + 1)
