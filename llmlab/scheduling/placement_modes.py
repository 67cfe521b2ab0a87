"""Placements that weigh modes against each other in every step, with predicted times (seam C).

    device alone        | linears of G rows | attention of G rows |                        CPU rows wait
    asymmetric pipeline   the batch in two lanes: while one's rows attend on the CPU, the other has the device
    async overlap       | linears of G rows and the CPU rows that join here | attention of G |     CPU rows pass one layer a step

`Pipelined` knows the first two (source: the scheduler of NEO), `Overlapped` all three (source: arXiv
2506.03296). Both keep KV on the device while it fits; under pressure the last decodes go to the host, and come back while
the pool is less than 95 % full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from llmlab.scheduling.placement_times import Course, Forecast, Times, crowd_of
from llmlab.seams import EngineView, LayerCost, Mode, Need, Offers, Placed, Rehome, RequestView, Wish
from llmlab.types import Home, Span, WorkItem

FULL_BATCH = 128  # tokens of linear work from which a further prompt is no longer cheap (NEO's threshold)
LEAST_GAIN = 1.02  # what the other modes must promise over the device alone
CHANGE = 1.5  # what a mode must promise for a step over the one that yields most in the long run, to be chosen instead
INERTIA = 1.05  # how much more than the mode in force, pipeline or overlap, another must yield in the long run


# ------------------------------------------------------------------------------------------- tiers
class Tiered:
    """Where KV lives: on the device while it fits there, else on the host; the same rules for all placements here.

    `swap_in_below`: decodes come back from the host while the pool would be less full than this (0: never, so who goes to
    the host stays there).
    """

    def __init__(self, swap_in_below: float = 0.95) -> None:
        self.swap_in_below = swap_in_below

    def home(self, view: EngineView, request: RequestView, need: Need) -> Home:
        """The device, unless it is full, or an earlier request of this step had to go to the host: then those behind follow,
        so that a small one does not overtake."""
        if not view.cpu:
            return "device"
        behind = any(r.home == "cpu" and r.status != "running" for r in view.running)
        growth = sum(1 for r in view.running if r.home == "device" and not r.num_computed_tokens % view.pool.block_size)
        spare = int(0.01 * view.pool.num_blocks) if view.running else 0
        free = view.pool.num_free - growth - spare
        back = next((r for r in view.running if r.home == "cpu" and r.decoding and not r.cursor), None)
        if back is not None and self.swap_in_below:  # who waits on the host goes first
            free -= view.pool.blocks_for(back.num_tokens)
        return "cpu" if behind or need.prompt > free else "device"

    def moves(self, view: EngineView, items: Sequence[WorkItem]) -> tuple[Rehome, ...]:
        """Out: the last decodes, until the next tokens of the others fit. In: the oldest, while there is room."""
        pool, decoding = view.pool, {item.request for item in items if item.num_tokens == 1}
        near = [r for r in view.running if r.home == "device"]
        starting = sum(pool.blocks_for(item.tokens[1]) for item in items if item.home == "device") - sum(
            r.num_blocks for r in near if any(item.request == r.id for item in items))  # fmt: skip
        short = starting - pool.num_free
        if short > 0:
            return self._out(view, [r for r in near if r.id in decoding], short)
        return self._in(view, decoding, pool.num_free - starting)

    def _out(self, view: EngineView, decodes: Sequence[RequestView], short: int) -> tuple[Rehome, ...]:
        moves: list[Rehome] = []
        room = view.pool.num_host_free
        for request in reversed(decodes[1:]):
            if short <= 0 or room < request.num_blocks:
                break
            moves.append(Rehome(request.id, "cpu"))
            short -= request.num_blocks + 1
            room -= request.num_blocks
        return tuple(moves)

    def _in(self, view: EngineView, decoding: set[str], free: int) -> tuple[Rehome, ...]:
        moves: list[Rehome] = []
        kept = int((1 - self.swap_in_below) * view.pool.num_blocks) if self.swap_in_below else view.pool.num_blocks
        for request in view.running:
            if request.home != "cpu" or request.cursor or request.id not in decoding:
                continue
            need = view.pool.blocks_for(request.num_tokens) + 1
            if free - need < kept:
                break
            moves.append(Rehome(request.id, "device"))
            free -= need
        return tuple(moves)


# ------------------------------------------------------------------------------------------- work
class Work(NamedTuple):
    """The items of a step, sorted: `near` attend on the device (decodes and all prompts), `decodes` among them; `away` are
    decodes whose KV is on the host, in order of arrival; `hosted` prompts whose KV goes there."""

    near: list[WorkItem]
    decodes: list[WorkItem]
    hosted: list[WorkItem]
    away: list[WorkItem]


def sort_work(items: Sequence[WorkItem], view: EngineView, moves: Sequence[Rehome]) -> Work:
    """`items` as they will lie when `moves` are made."""
    moved: dict[str, Home] = {move.request: move.home for move in moves}
    work = Work([], [], [], [])
    for item in items:
        home = moved.get(item.request, item.home)
        if home == "cpu" and item.num_tokens == 1 and item.emit == "sample" and not item.drafts:
            work.away.append(item)
            continue
        work.near.append(item)
        if item.num_tokens == 1:
            work.decodes.append(item)
        elif home == "cpu":
            work.hosted.append(item)
    return work


def count_tokens(items: Sequence[WorkItem]) -> int:
    return sum([item.num_tokens for item in items])


def count_emitting(items: Sequence[WorkItem]) -> int:
    return sum([item.emit == "sample" for item in items])


# -------------------------------------------------------------------------------- the three modes
class Lanes(NamedTuple):
    """A batch in two lanes: CPU rows of each (the device's rows are all in the first), and seconds of one layer."""

    away: tuple[list[WorkItem], list[WorkItem]]
    seconds: float

    @property
    def chosen(self) -> list[WorkItem]:
        return [*self.away[0], *self.away[1]]


class Weigher:
    """What the modes promise for one step. A rate counts the tokens that come out; a row that passes one layer of L counts
    as one of L + 1."""

    def __init__(self, view: EngineView, times: Times, work: Work) -> None:
        self.view, self.times, self.work = view, times, work
        self.num_layers = times.costs.num_layers
        self.tokens = count_tokens(work.near)
        self.emitting = count_emitting(work.near)
        self.linears = times.linears(self.tokens)
        self.attention = times.attention(work.near)

    def device_alone(self) -> Mode:
        seconds = self._seconds(self.linears + self.attention, self.tokens, self.emitting)
        return Mode("gpu_only", self.emitting / seconds if seconds else 0.0, seconds)

    def _seconds(self, layer: float, entering: int, leaving: int) -> float:
        return self.num_layers * layer + self.times.edges(entering, leaving) if layer else 0.0

    def lanes(self) -> Lanes:
        """NEO's greedy: CPU rows into one of two lanes while neither's attention on the CPU outlasts what the device does for
        the other meanwhile. Who does not fit is left out, with all later ones at least as long."""
        times = self.times
        away: tuple[list[WorkItem], list[WorkItem]] = ([], [])
        busy = [times.start + times.trip, times.start + times.trip]
        target, shortest = 1, float("inf")
        slack = [self._slack(away, busy, i) for i in (0, 1)]
        for item in self.work.away:
            if item.tokens[1] >= shortest:
                continue
            away[target].append(item)
            busy[target] += times.row(item)
            tried = [self._slack(away, busy, i) for i in (0, 1)]
            if min(tried) < 0:
                away[target].pop()
                busy[target] -= times.row(item)
                shortest = item.tokens[1]
                continue
            slack = tried
            target = 0 if slack[0] > slack[1] else 1
        first, second = (times.linears(self.tokens + len(away[0])), times.linears(len(away[1])))
        return Lanes(away, first + second + self.attention)

    def _slack(self, away: tuple[list[WorkItem], list[WorkItem]], busy: Sequence[float], lane: int) -> float:
        """How much sooner the CPU is done with lane `lane` than the device with what it does meanwhile."""
        if not away[lane]:
            return float("inf") if away[1 - lane] else 0.0
        other = self.tokens + len(away[0]) if lane else len(away[1])
        return self.times.linears(other) + (self.attention if lane == 0 else 0.0) - busy[lane]

    def asymmetric(self, lanes: Lanes) -> Mode:
        rows = len(lanes.chosen)
        seconds = self._seconds(lanes.seconds, self.tokens + rows, self.emitting + rows)
        return Mode("asym_pipeline", (self.emitting + rows) / seconds if seconds else 0.0, seconds, "" if rows else "no CPU row fits")

    def overlapping(self) -> list[WorkItem]:
        """The CPU rows that the CPU can serve within one pass of the device through all layers, the oldest first."""
        times, layers = self.times, self.num_layers
        joined = -(-len(self.work.away) // (layers + 1))
        device = self._seconds(times.linears(self.tokens + joined) + self.attention, self.tokens + joined, self.emitting + joined)
        chosen: list[WorkItem] = []
        busy = 0.0
        for item in self.work.away:
            busy += times.row(item) + (times.start if len(chosen) < layers else 0.0)
            if chosen and busy > device:
                break
            chosen.append(item)
        return chosen

    def in_lanes(self, lanes: Lanes) -> list[WorkItem]:
        """The CPU rows in their lanes; one that is half-way goes on from there, to the end."""
        cursors = self._cursors()
        return [replace(item, device="cpu", lane=lane, layers=Span(cursors[item.request], self.num_layers)
                        if cursors.get(item.request) else None) for lane in (0, 1) for item in lanes.away[lane]]  # fmt: skip

    def layer_by_layer(self, chosen: Sequence[WorkItem]) -> list[WorkItem]:
        cursors = self._cursors()
        return [item.passing(cursors.get(item.request, 0), self.num_layers) for item in chosen]

    def _cursors(self) -> dict[str, int]:
        return {r.id: r.cursor for r in self.view.running if r.cursor}

    def asynchronous(self, chosen: Sequence[WorkItem]) -> Mode:
        """Rows on their way to the host count as if they were there, as far as the CPU could serve them as well. Without them
        few rows look best in lanes, where steps are long, prompts get through slowly and the rows stay few."""
        cohort = self.num_layers + 1
        joined = -(-len(chosen) // cohort)
        layer = self.times.linears(self.tokens + joined) + self.attention
        busy = sum(map(self.times.row, chosen)) + min(len(chosen), self.num_layers) * self.times.start
        device = self._seconds(layer, self.tokens + joined, self.emitting + joined)
        coming = 0
        if chosen and len(chosen) == len(self.work.away) and busy < device:
            coming = min(self._on_the_way(), int((device - busy) * len(chosen) / busy))
        seconds = max(device, busy)
        rate = (self.emitting + (len(chosen) + coming) / cohort) / seconds if seconds else 0.0
        return Mode("async_overlap", rate, seconds, "" if chosen else "no CPU row")

    def _on_the_way(self) -> int:
        """Requests that will decode on the host: their prompts are being computed, or wait and find room there."""
        away, pool = self.work.away, self.view.pool
        length = -(-sum(item.tokens[1] for item in away) // len(away))
        starting = sum(r.home == "cpu" and not r.decoding for r in self.view.running)
        return starting + min(self.view.num_waiting, pool.num_host_free // pool.blocks_for(length))

    def inequality(self, lanes: Lanes) -> tuple[float, float]:
        """N_G / N_C, and what it must stay below for the pipeline to beat the device alone.

        Decode only: 2 T_gl/T_ga + 3 + T_ga/T_gl (arXiv 2506.03296, eq. 6). With prompts in the step: T_G (T_G + dT) / (T_ga dT), T_G the
        layer's time on the device alone and dT what the split costs in linears; it reduces to eq. 6 for dT = T_gl."""
        times = self.times
        kv = sum(item.tokens[1] for item in self.work.decodes)
        decode_attention = times.attention(self.work.decodes)
        if not kv or not decode_attention:
            return float("inf"), float("inf")
        ratio = kv / decode_attention * times.per_token
        whole = self.linears + self.attention
        extra = self.linears if len(self.work.near) == len(self.work.decodes) else max(
            1e-12, lanes.seconds - whole)  # fmt: skip
        return ratio, whole * (whole + extra) / (decode_attention * extra)


# ------------------------------------------------------------------------------------- placements
class Pipelined(Tiered):
    """Two sub-batches, so that the device works on one while the other attends on the CPU; or the device alone.

    Source: the scheduler of NEO, as its code has it.
    """

    name = "neo"

    def __init__(self, swap_in_below: float = 0.95) -> None:
        super().__init__(swap_in_below)
        self._times: Times | None = None

    def times(self, costs: LayerCost) -> Times:
        if self._times is None or self._times.costs is not costs:
            self._times = Times(costs)
        return self._times

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem] | Placed:
        if not view.cpu or view.costs is None:
            return items
        moves = self.moves(view, items)
        work = sort_work(items, view, moves)
        if not work.away:
            return Placed(self._trimmed(items, work), moves, "gpu_only")
        weigher = Weigher(view, self.times(view.costs), work)
        return self.weigh(weigher, self._trimmed(work.near, work), moves)

    def _trimmed(self, items: Sequence[WorkItem], work: Work) -> tuple[WorkItem, ...]:
        """Without the last prompts that go to the host, as long as the device has a full batch without them."""
        tokens = count_tokens(items)
        dropped: list[str] = []
        for item in reversed(work.hosted):
            if tokens - item.num_tokens < FULL_BATCH or item.tokens[0]:
                break
            tokens -= item.num_tokens
            dropped.append(item.request)
        return tuple(item for item in items if item.request not in dropped) if dropped else tuple(items)

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        lanes = weigher.lanes()
        alone, pipeline = weigher.device_alone(), weigher.asymmetric(lanes)
        if pipeline.rate > alone.rate:
            return Placed((*near, *weigher.in_lanes(lanes)), moves, pipeline.name, considered=(alone, pipeline))
        return Placed(near, moves, alone.name, considered=(alone, pipeline))


class Overlapped(Pipelined):
    """CPU rows share the linears of the one batch, but pass a layer a step, so that the device never waits for them; where
    the pipeline promises more, that; else the device alone.

    Source: arXiv 2506.03296, asynchronous overlap and its choice of mode per iteration.
    """

    name = "apex"

    def wish(self, view: EngineView, offers: Offers) -> Wish | None:
        """The chunk that suits the mode with which most comes out in the long run."""
        kept = self._course(view)
        return None if kept is None else Wish(kept.chunk, f"{kept.mode}, {kept.rate:.1f} tokens/s in the long run")

    def _course(self, view: EngineView) -> Course | None:
        """The mode to keep to, and how prompts are cut for it; None if nobody has begun to decode, or all have room on the device."""
        crowd = crowd_of(view)
        if not view.cpu or view.costs is None or crowd is None or not crowd.away:
            return None
        room = max(1, view.limits.max_num_batched_tokens - sum(r.decoding for r in view.running))
        favour = {"gpu_only": LEAST_GAIN, "async_overlap" if _under_way(view) else "asym_pipeline": INERTIA}
        return max(Forecast(self.times(view.costs), crowd).courses(room), key=lambda c: c.rate * favour.get(c.mode, 1.0))

    def weigh(self, weigher: Weigher, near: tuple[WorkItem, ...], moves: tuple[Rehome, ...]) -> Placed:
        lanes, chosen = weigher.lanes(), weigher.overlapping()
        alone, overlap = weigher.device_alone(), weigher.asynchronous(chosen)
        ratio, bound = weigher.inequality(lanes)
        pipeline = weigher.asymmetric(lanes)
        said = f"N_G/N_C = {ratio:.1f}, eq. 6 allows {bound:.1f}"
        if ratio >= bound and not pipeline.why_not:
            pipeline = replace(pipeline, why_not=f"{said} ({pipeline.rate:.1f} tokens/s)")
        considered = (alone, pipeline, overlap)
        kept = self._course(weigher.view)
        said += "" if kept is None else f"; in the long run {kept.mode}, {kept.rate:.1f} tokens/s"
        best = max([mode for mode in considered if not mode.why_not], key=lambda mode: mode.rate * _weight(mode, kept))
        if best is pipeline:
            near = (*near, *weigher.in_lanes(lanes))
        elif best is overlap:
            near = (*near, *weigher.layer_by_layer(chosen))
        return Placed(near, moves, best.name, said, considered)


def _weight(mode: Mode, kept: Course | None) -> float:
    return (CHANGE if kept is not None and mode.name == kept.mode else 1.0) * (LEAST_GAIN if mode.name == "gpu_only" else 1.0)


def _under_way(view: EngineView) -> bool:
    """Whether most rows on the host are in the middle of a token, as overlap leaves them."""
    away = [r for r in view.running if r.home == "cpu" and r.decoding]
    return 2 * sum(r.cursor > 0 for r in away) > len(away)
