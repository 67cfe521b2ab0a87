"""Predicted times for placements that weigh modes (seam C): of one layer, and of steps in the long run.

A step's rate counts the tokens that come out of it; what prompts are worth shows later only. `Forecast` looks that far: steps with
a chunk of prompts and steps without one, in the proportion in which each answer's prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmlab.seams import EngineView, LayerCost
from llmlab.types import Span, WorkItem


class Times:
    """Predicted seconds of ONE layer, from the cost model. The CPU's attention is taken as a start, so much a row and so
    much a token of KV, read off the cost model at three points."""

    def __init__(self, costs: LayerCost) -> None:
        self.costs = costs
        one, long, two = (costs.host_attention([_probe(kv) for kv in rows]) for rows in ((1,), (4097,), (1, 1)))
        self.per_token = (long - one) / 4096
        self.per_row = max(0.0, two - one - self.per_token)
        self.start = max(0.0, one - self.per_row - self.per_token)
        self._linears: dict[int, float] = {}
        sent = costs.transfer_seconds(costs.sent_bytes(1), "d2h")
        self.trip = sent + costs.transfer_seconds(costs.returned_bytes(1), "h2d")

    def linears(self, num_tokens: int) -> float:
        found = self._linears.get(num_tokens)
        if found is None:
            around = self.costs.around(num_tokens, 0) if num_tokens else None
            found = self._linears[num_tokens] = around.before + around.after if around is not None else 0.0
        return found

    def attention(self, items: Sequence[WorkItem]) -> float:
        return self.costs.attention(items) if items else 0.0

    def row(self, item: WorkItem) -> float:
        """What a decode adds to the CPU's attention."""
        return self.per_row + self.per_token * item.tokens[1]

    def edges(self, entering: int, leaving: int) -> float:
        """Of a whole step."""
        return (self.costs.enter(entering) if entering else 0.0) + (self.costs.leave(leaving) if leaving else 0.0)


def _probe(kv: int) -> WorkItem:
    return WorkItem("", Span(kv - 1, kv))


# ------------------------------------------------------------------------------------- in the long run
class Crowd(NamedTuple):
    """Whom steps serve for a while: `near` decode with their KV on the device, as many as fit there, `away` on the host; rows of
    `kv` tokens, each of whose answers of `output` tokens has a prompt of `prompt` tokens behind it."""

    near: int
    away: int
    kv: int
    prompt: float
    output: float


def crowd_of(view: EngineView) -> Crowd | None:
    """The crowd of a view, with those in the queue as far as there is room; None if nobody has begun to decode. Its answers' lengths
    are guessed as twice what those who run have by now: on the average, they are half-way. (Who has only the token that its
    prompt brought does not count: it may be waiting for its turn.)"""
    decoding = [r for r in view.running if r.decoding]
    ages = [r.num_output_tokens for r in decoding if r.num_output_tokens > 1]
    if not ages:
        return None
    pool, shown = view.pool, (*view.running, *view.waiting)
    kv = -(-sum(r.num_tokens for r in decoding) // len(decoding))
    each = pool.blocks_for(kv)
    everybody = min(len(view.running) + view.num_waiting, view.limits.max_num_seqs)
    near = max(1, min(everybody, pool.num_blocks // each))
    prompt = sum(r.num_prompt_tokens for r in shown) / len(shown)
    return Crowd(near, min(everybody - near, pool.num_host_blocks // each), kv, prompt, 2 * sum(ages) / len(ages))


class Pace(NamedTuple):
    """What a step brings: tokens out, and its seconds."""

    out: float
    seconds: float


class Course(NamedTuple):
    """To keep to one mode, with chunks of prompts of so many tokens: what comes out in the long run, in tokens/s."""

    mode: str
    chunk: int
    rate: float


class Forecast:
    """What the three modes yield for a crowd in the long run, each kept through steps with prompts and steps without: whoever
    changes between them loses the layers that rows on the host have behind them."""

    def __init__(self, times: Times, crowd: Crowd) -> None:
        self.times, self.crowd = times, crowd
        self._layers, self._row = times.costs.num_layers, times.per_row + times.per_token * crowd.kv
        self._attention = times.attention([_probe(crowd.kv)] * crowd.near)
        self._paces = {"gpu_only": self._alone, "asym_pipeline": self._in_lanes, "async_overlap": self._overlapping}

    def courses(self, most: int) -> list[Course]:
        """The best chunk for each mode: from what the linears carry almost for nothing, doubled up to `most` tokens. In lanes it is
        `most`: the longer a step, the less of the CPU's time is wasted on rows that just do not fit, which is not forecast."""
        least = least_chunk(self.times, most)
        chunks = [*(least << i for i in range(16) if least << i < most), most]
        return [max((Course(mode, chunk, self.rate(mode, chunk)) for chunk in (chunks if mode != "asym_pipeline" else [most])),
                    key=lambda c: (c.rate, c.chunk)) for mode in self._paces]  # fmt: skip

    def rate(self, mode: str, chunk: int) -> float:
        """Output tokens per second, if prompts get `chunk` tokens in each step as long as there are any."""
        crowd, without, beside = self.crowd, self._paces[mode](0), self._paces[mode](chunk)
        ratio = crowd.prompt / crowd.output  # prompt tokens behind each token that comes out
        more = ratio * (beside.out - without.out)
        share = min(1.0, ratio * without.out / (chunk - more)) if chunk > more else 1.0  # of steps with a chunk
        out = chunk / ratio if share == 1.0 else share * beside.out + (1 - share) * without.out
        return out / (share * beside.seconds + (1 - share) * without.seconds)

    def _alone(self, chunk: int) -> Pace:
        return self._pace(chunk, 0, 0.0, 0.0)

    def _in_lanes(self, chunk: int) -> Pace:
        """As many rows in each of two lanes as the CPU can serve while the device has the other one."""
        times, crowd = self.times, self.crowd
        first = self._served(times.linears(crowd.near + chunk), crowd.away)
        second = times.linears(first)
        last = self._served(second + self._attention, crowd.away - first)
        return self._pace(chunk, last, first + last, second)

    def _overlapping(self, chunk: int) -> Pace:
        """As many rows, a layer each, as the CPU can serve within a step."""
        crowd, layers, start = self.crowd, self._layers, self.times.start
        joining = -(-crowd.away // (layers + 1))
        seconds = self._pace(chunk, joining, 0.0, 0.0).seconds
        busy = crowd.away * self._row + min(crowd.away, layers) * start
        rows = crowd.away if busy <= seconds else max(1.0, (seconds - layers * start) / self._row)
        return self._pace(chunk, joining, rows / (layers + 1), 0.0)

    def _served(self, window: float, rows: int) -> int:
        """Rows that the CPU can attend to within a `window` of one layer."""
        left = window - self.times.start - self.times.trip
        return max(0, min(rows, int(left / self._row)))

    def _pace(self, chunk: int, joining: int, added: float, extra: float) -> Pace:
        """A step of the device's rows and a chunk, `joining` rows of the host in its linears, `extra` seconds a layer for other
        linears; `added` rows of the host come out."""
        times, crowd = self.times, self.crowd
        middle = int(crowd.prompt / 2)
        attention = self._attention + (times.attention((WorkItem("", Span(middle, middle + chunk)),)) if chunk else 0.0)
        entering, out = crowd.near + chunk + joining, crowd.near + added + chunk / max(1.0, crowd.prompt)
        layer = times.linears(entering) + attention + extra
        return Pace(out, self._layers * layer + times.edges(entering, round(out)))


def least_chunk(times: Times, most: int, slower: float = 1.125) -> int:
    """Tokens, in sixteens, that make a layer's linears at most `slower` times as long as one token does."""
    chunk = 16
    while chunk + 16 <= most and times.linears(chunk + 16) <= slower * times.linears(1):
        chunk += 16
    return chunk
