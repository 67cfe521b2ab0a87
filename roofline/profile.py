"""A measured machine: what one model's steps cost there, as a file, and the cost model that reads it.

    profile = read("cpu.json");  ProfileCost(profile).step(Rows([1, 1, 256], [900, 40, 768])).seconds

A profile belongs to (machine, threads, kernels, number format, model shape). A step's time is a sum of parts,

    t(step) = prepare + tokens(T) + sum over rows of attention(q, kv) + emit(n)

with T new tokens and n of them whose scores are computed and sampled. `ProfileCost` carries it to another model shape
through the measured matrix products. Tables hold medians; between two points time follows a power law (a straight line
in logarithms). Outside: below the first point the first value (a launch is never cheaper), beyond the last one time
grows with the size (the rate stays).
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

from roofline.cost import AroundAttention, CostModel, StepCost
from roofline.errors import RooflineError, non_negative, positive
from roofline.fit import Fit, Measurement
from roofline.fit import fit as fit_efficiency
from roofline.hardware import Hardware
from roofline.hardware import get as get_hardware
from roofline.ops import AttentionRates, Op, block_ops, linear
from roofline.precision import Precision, canonical
from roofline.rows import Rows, leaving, segments
from roofline.shapes import Shape

SCHEMA = 2
REMEMBERED = 1 << 18  # attention times kept by (query, kv)
LINKS = ("h2d", "d2h", "d2d")
PARTS = ("prepare", "tokens", "attention", "emit")
KNOTS = (1.0, 4.0, 16.0, 64.0, 256.0)  # new tokens of a step at which calibration corrects the layers


# ------------------------------------------------------------------------------------------ tables
@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by size: `x` ascending and positive, `seconds` positive."""

    x: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.seconds):
            raise RooflineError(
                f"x and seconds must be equally long and not empty, got {len(self.x)}, {len(self.seconds)}"
            )
        for name, values in (("x", self.x), ("seconds", self.seconds)):
            for value in values:
                positive(name, value)
        if any(b <= a for a, b in zip(self.x, self.x[1:])):
            raise RooflineError(f"x must ascend, got {list(self.x)[:8]}")

    def at(self, x: float) -> float:
        """Return the seconds at size `x` (0 for nothing)."""
        xs, seconds = self.x, self.seconds
        if x <= 0:
            return 0.0
        if x <= xs[0]:
            return seconds[0]
        if x >= xs[-1]:
            return seconds[-1] * x / xs[-1]
        i = bisect_right(xs, x)
        return _between(x, xs[i - 1], xs[i], seconds[i - 1], seconds[i])

    def scaled(self, factor: float) -> Curve:
        """Return the curve with all times multiplied."""
        return Curve(self.x, tuple(factor * s for s in self.seconds))


def _between(x: float, low: float, high: float, at_low: float, at_high: float) -> float:
    share = math.log(x / low) / math.log(high / low)
    return at_low * math.exp(share * math.log(at_high / at_low))


@dataclass(frozen=True, slots=True)
class AttentionTable:
    """Seconds of one row's attention over all layers: `curves[i]` gives them for `query[i]` new tokens by the number of
    tokens that the last of them sees (kv).

    Between two query lengths (at the same context kv - query) time follows a power law; a longer query costs what
    pieces of the longest measured one cost, which is how kernels cut it.
    """

    query: tuple[int, ...]
    curves: tuple[Curve, ...]

    def __post_init__(self) -> None:
        if not self.query or len(self.query) != len(self.curves) or self.query[0] != 1:
            raise RooflineError(f"query must begin with 1 and have a curve for each entry, got {list(self.query)[:8]}")
        if any(b <= a for a, b in zip(self.query, self.query[1:])):
            raise RooflineError(f"query must ascend, got {list(self.query)[:8]}")

    def at(self, query: int, kv: int) -> float:
        """Return the seconds of a row of `query` new tokens, the last of which sees `kv` tokens."""
        most, seconds = self.query[-1], 0.0
        while query > most:
            seconds += self.curves[-1].at(kv - query + most)
            query -= most
        i = bisect_right(self.query, query)
        before, context = self.query[i - 1], kv - query
        at_low = self.curves[i - 1].at(before + context)
        if before == query:
            return seconds + at_low
        after = self.query[i]
        return seconds + _between(query, before, after, at_low, self.curves[i].at(after + context))

    def scaled(self, factor: float) -> AttentionTable:
        """Return the table with all times multiplied."""
        return AttentionTable(self.query, tuple(curve.scaled(factor) for curve in self.curves))


@dataclass(frozen=True, slots=True)
class Product:
    """Measured products of `rows` x `depth` activations with one `depth` x `columns` weight."""

    depth: int
    columns: int
    by_rows: Curve

    def __post_init__(self) -> None:
        positive("depth", self.depth)
        positive("columns", self.columns)


@dataclass(frozen=True, slots=True)
class Share:
    """Seconds that grow with what a step holds: its rows, its new tokens, the tokens that rows see, and its rows that
    begin (whose new tokens are all that they see: a request is let in, its tokens are listed)."""

    step: float = 0.0
    row: float = 0.0
    token: float = 0.0
    kv_token: float = 0.0
    begin: float = 0.0

    def __post_init__(self) -> None:
        for column in fields(self):
            non_negative(column.name, getattr(self, column.name))

    def at(self, rows: int, tokens: int, kv_tokens: int, beginning: int = 0) -> float:
        """Return the seconds of a step."""
        return self.step + self.row * rows + self.token * tokens + self.kv_token * kv_tokens + self.begin * beginning

    def of(self, rows: Rows) -> float:
        """Return the seconds of a step over ``rows``."""
        query, kv = rows.query, rows.kv
        beginning = sum(map(eq, query, kv)) if self.begin else 0
        return self.at(len(query), sum(query), sum(kv), beginning)

    def scaled(self, factor: float) -> Share:
        """Return the share with all times multiplied."""
        return Share(*(factor * getattr(self, column.name) for column in fields(self)))


# ----------------------------------------------------------------------------------------- profile
@dataclass(frozen=True, slots=True)
class Machine:
    """Where a profile was measured: host name, processor, its cores, threads used, and the device's own name."""

    host: str
    processor: str
    cores: int
    threads: int
    device: str

    def __str__(self) -> str:
        where = self.processor if self.device == "cpu" else f"{self.device} ({self.processor})"
        return f"{where}, {self.cores} cores, {self.threads} threads, host {self.host}"


@dataclass(frozen=True)
class Profile:
    """What one machine takes for one model. Seconds; `copies` by bytes, one way. `engine` is the time outside of the
    executor (planning, committing, answers), zero where no run was measured; `wake`: what an engine that waits for the next
    arrival loses until it has noticed it (a sleep ends late). `cpu_attention`: of the host beside a GPU.
    `base` names the table entry that power and link latencies are taken from.
    """

    machine: Machine
    kernels: str
    dtype: str
    date: str
    software: Mapping[str, str]
    memory_bytes: float
    base: str
    shape: Shape
    block_size: int
    launch: float
    prepare: Share
    tokens: Curve
    attention: AttentionTable
    emit: Curve
    products: tuple[Product, ...]
    copies: Mapping[str, Curve]
    engine: Share = field(default_factory=Share)
    wake: float = 0.0
    cpu_attention: AttentionTable | None = None
    notes: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise RooflineError(f"schema {self.schema!r}: this version reads profiles of schema {SCHEMA}; measure anew")
        missing = [link for link in LINKS if link not in self.copies]
        if missing:
            raise RooflineError(f"copies lacks {', '.join(missing)}")
        if len(self.products) < 2:
            raise RooflineError(f"products needs at least 2 matrices, got {len(self.products)}")
        positive("memory_bytes", self.memory_bytes)
        non_negative("launch", self.launch)
        non_negative("wake", self.wake)
        canonical(self.dtype)

    @property
    def name(self) -> str:
        """The machine and the model, for people."""
        return f"{self.shape.name} on {self.machine}"

    def hardware(self, name: str = "") -> Hardware:
        """Return the machine as an entry of the hardware table: measured ceilings, power and latencies of `base`."""
        base = get_hardware(self.base)
        measured = f"measured {self.date} on {self.machine}"
        rate = max(
            2 * n * p.depth * p.columns / s for p in self.products for n, s in zip(p.by_rows.x, p.by_rows.seconds)
        )
        large = max(self.products, key=lambda p: p.depth * p.columns)
        width = Precision.parse(self.dtype).weight_bytes
        sources = {**base.sources, "peak": measured, "bandwidth": measured + ": weights read at one row"}
        return replace(
            base, name=name or self.name, memory_bytes=self.memory_bytes, peak={canonical(self.dtype): rate},
            bandwidth=width * large.depth * large.columns / large.by_rows.seconds[0], cache_bandwidth=None, sources=sources,
        )  # fmt: skip

    def measurements(self) -> list[Measurement]:
        """Return matrix products and attention as `roofline.fit` takes them."""
        precision = Precision.parse(self.dtype)
        found = [
            Measurement(linear("product", n, p.columns, p.depth, precision), s)
            for p in self.products for n, s in zip(p.by_rows.x, p.by_rows.seconds)
        ]  # fmt: skip
        rates, layers = AttentionRates.of(self.shape, precision, 1), self.shape.num_layers
        for query, curve in zip(self.attention.query, self.attention.curves):
            for kv, seconds in zip(curve.x, curve.seconds):
                op = rates.op(query, int(kv), Rows([query], [int(kv)]).total_pairs())
                found.append(Measurement(op, seconds / layers))
        return found

    def fitted(self) -> Fit:
        """Return roofline efficiencies on `hardware()`, fitted to the measured kernels."""
        return fit_efficiency(self.measurements(), self.hardware())


# -------------------------------------------------------------------------------------- the cost model
class ProfileCost:
    """The cost of steps of `shape` (the profile's own by default) on the machine of a profile.

    Takes the place of `roofline.CostModel`: seconds are measured ones, operations, bytes and joules the roofline's.
    Another shape than the profile's is priced through the measured matrix products, and worse for it.
    """

    def __init__(self, profile: Profile, shape: Shape | None = None, name: str = "") -> None:
        self.profile, self.shape = profile, shape or profile.shape
        self.hardware = profile.hardware(name)
        self.roofline = CostModel(self.shape, self.hardware, profile.dtype)
        self.precision = self.roofline.precision
        moved = _Moved(profile, self.shape) if not same_sizes(self.shape, profile.shape) else None
        self._tokens = moved.tokens if moved else profile.tokens.at
        self._emit = moved.emit if moved else profile.emit.at
        self._attention = profile.attention.scaled(moved.attention) if moved else profile.attention
        self._moved_attention = moved.attention if moved else 1.0
        moe = self.shape.moe_layers()
        self._kinds = {layer: n for layer, n in ((0, self.shape.num_layers - moe), (self.shape.num_layers - 1, moe)) if n}
        self._known: dict[tuple[int, int], float] = {}
        self._by_tokens: dict[int, float] = {}

    def parts(self, rows: Rows) -> dict[str, float]:
        """Return the seconds of `PARTS`."""
        query = rows.query
        total = {"prepare": self.pause(rows)}
        tokens = attention = 0.0
        layers = self.shape.num_layers
        for part in [None] if rows.layers is None and query else segments(rows, layers):
            active, share = (rows, 1.0) if part is None else (part.rows, (part.stop - part.start) / layers)
            tokens += share * self._token_seconds(sum(active.query))
            attention += share * self._row_seconds(active)
        return {**total, "tokens": tokens, "attention": attention, "emit": self._emit(leaving(rows, layers))}

    def step(self, rows: Rows) -> StepCost:
        """Return the cost of one step over `rows`."""
        base, seconds = self.roofline.step(rows), sum(self.parts(rows).values())
        joules = base.joules + (seconds - base.seconds) * self.roofline.static_watts
        return replace(base, seconds=seconds, joules=joules)

    def pause(self, rows: Rows) -> float:
        """Return the seconds of preparing a step's inputs."""
        return self.profile.prepare.of(rows) if rows.query else 0.0

    def around_attention(self, tokens: int, layer: int, experts: float | None = None) -> AroundAttention:
        """Return a layer's share of the measured step, cut around its attention as the roofline would."""
        own = self.roofline.around_attention(tokens, layer, experts)
        layers = [self.roofline.around_attention(tokens, i, experts) for i in self._kinds]
        whole = sum(n * (a.before + a.after) for n, a in zip(self._kinds.values(), layers))
        share = self._token_seconds(tokens) / whole
        return AroundAttention(share * own.before, share * own.after)

    def attention_seconds(self, rows: Rows) -> float:
        """Return the seconds of one layer's attention."""
        return self._row_seconds(rows) / self.shape.num_layers

    def host_attention_seconds(self, rows: Rows) -> float:
        """Return the seconds of one layer's attention on the host beside the device. Raises if it was not measured."""
        table = self.profile.cpu_attention
        if table is None:
            raise RooflineError(f"{self.profile.name}: attention on the host was not measured")
        factor = self._moved_attention / self.shape.num_layers
        return factor * sum(table.at(q, kv) for q, kv in zip(rows.query, rows.kv))

    def edge_seconds(self, entering: int, leaving: int) -> float:
        """Return the seconds of scoring and sampling ``leaving`` tokens; the embedding is part of the measured layers."""
        return self._emit(leaving)

    def copy_seconds(self, num_bytes: float) -> float:
        """Return the seconds of a copy within the device's memory."""
        return self.profile.copies["d2d"].at(num_bytes)

    def engine_seconds(self, rows: Rows) -> float:
        """Return the time of a step outside of the executor."""
        return self.profile.engine.of(rows)

    def _token_seconds(self, tokens: int) -> float:
        found = self._by_tokens.get(tokens)
        if found is None:
            found = self._by_tokens[tokens] = self._tokens(tokens)
        return found

    def _row_seconds(self, rows: Rows) -> float:
        known, total = self._known, 0.0
        for key in zip(rows.query, rows.kv):
            seconds = known.get(key)
            if seconds is None:
                if len(known) >= REMEMBERED:
                    known.clear()
                seconds = known[key] = self._attention.at(*key)
            total += seconds
        if rows.pairs is not None:
            total *= (
                rows.total_pairs() / Rows(rows.query, [max(a, b) for a, b in zip(rows.query, rows.kv)]).total_pairs()
            )
        return total

    def transfer_seconds(self, num_bytes: float, link: str = "host") -> float:
        """Return the seconds of a copy (`h2d`, `d2h`, `d2d`; `host`: the slower of both directions)."""
        copies = self.profile.copies
        return max(copies[name].at(num_bytes) for name in (("h2d", "d2h") if link == "host" else (link,)))


def same_sizes(a: Shape, b: Shape) -> bool:
    """Whether two shapes cost the same: all but their names and sources agree."""
    return replace(a, name="", source="") == replace(b, name="", source="")


class _Moved:
    """A profile carried over to another shape.

    Matrix products come from the measured ones (a power law in the number of weights at equal rows), brought down where
    those of the own shape would exceed its measured step. What a step took beyond its products grows with the layers,
    and, as far as it grew with the tokens, with the width, too. Attention grows with layers, heads and head width.
    """

    def __init__(self, profile: Profile, shape: Shape) -> None:
        self._profile, self._shape, own = profile, shape, profile.shape
        self._layers = shape.num_layers / own.num_layers
        self._width = self._layers * shape.hidden_size / own.hidden_size
        self.attention = self._layers * shape.num_heads * shape.head_dim / (own.num_heads * own.head_dim)
        self._sizes = sorted(profile.products, key=lambda p: p.depth * p.columns)
        self._first = self._beyond(1)

    def tokens(self, tokens: float) -> float:
        """Return the seconds of the layers without attention."""
        if tokens <= 0:
            return 0.0
        rest = self._first * self._layers + (self._beyond(tokens) - self._first) * self._width
        own = self._profile.tokens.at(tokens) / self._products(self._profile.shape, tokens)
        return min(1.0, own) * self._products(self._shape, tokens) + max(0.0, rest)

    def emit(self, rows: float) -> float:
        """Return the seconds of scores and sampling."""
        own, new = self._profile.shape, self._shape
        if rows <= 0:
            return 0.0
        head, ours = (self._product(rows, s.vocab_size * s.hidden_size) for s in (new, own))
        rest = max(0.0, self._profile.emit.at(rows) - ours)
        return head + rest * max(1.0, new.vocab_size / own.vocab_size)

    def _beyond(self, tokens: float) -> float:
        return max(0.0, self._profile.tokens.at(tokens) - self._products(self._profile.shape, tokens))

    def _products(self, shape: Shape, tokens: float) -> float:
        precision, moe = Precision.parse(self._profile.dtype), shape.moe_layers()
        kinds = ((False, shape.num_layers - moe), (True, moe))
        return sum(
            layers * op.count * self._op(op) for is_moe, layers in kinds if layers
            for op in block_ops(shape, round(tokens), precision, 1, is_moe) if op.kind == "linear"
        )  # fmt: skip

    def _op(self, op: Op) -> float:
        return max(1.0, op.groups) * self._product(op.rows, op.columns * op.depth)

    def _product(self, rows: float, weights: float) -> float:
        times = [p.by_rows.at(max(1.0, rows)) for p in self._sizes]
        return Curve(tuple(float(p.depth * p.columns) for p in self._sizes), tuple(times)).at(weights)


# -------------------------------------------------------------------------------------- calibration
@dataclass(frozen=True, slots=True)
class Observation:
    """One step that really ran: its rows, the executor's seconds, and the seconds between it and the step before that
    the executor was not running (None if the engine was waiting for an arrival, too). `woken`: then instead the seconds
    from that arrival to the step's end without the executor's."""

    rows: Rows
    seconds: float
    engine: float | None = None
    woken: float | None = None


def calibrated(profile: Profile, observed: Iterable[Observation]) -> Profile:
    """Return the profile with its parts multiplied so that they tell the steps of one run best, and with the engine's
    own time from the same run.

    The layers get a factor at each of `KNOTS` (a power law between two), every other part one factor, and rows that begin
    seconds of their own. Least squares on relative errors with a pull towards 1, in which the worst 5 % of the steps
    (interruptions) have no say. Needs at least 20 steps of the profile's own model.
    """
    steps = list(observed)
    if len(steps) < 20:
        raise RooflineError(f"calibrating needs at least 20 steps, got {len(steps)}")
    cost = ProfileCost(profile)
    table = np.array([_columns(cost, step.rows) for step in steps])
    found = _factors(table, np.array([step.seconds for step in steps])).tolist()
    by_size, (prepare, attention, emit, begin) = found[: len(KNOTS)], found[len(KNOTS) :]
    scaled = profile.prepare.scaled(prepare)
    engine, wake = _engine_share(steps), profile.wake
    if engine is not None and (woken := [step.woken - engine.of(step.rows) for step in steps if step.woken is not None]):
        wake = max(0.0, float(np.median(woken)))
    return replace(
        profile, prepare=replace(scaled, begin=scaled.begin + begin * BEGIN), tokens=_reshaped(profile.tokens, by_size),
        attention=profile.attention.scaled(attention), emit=profile.emit.scaled(emit), engine=engine or profile.engine, wake=wake,
    )  # fmt: skip


BEGIN = 1e-4  # seconds: the unit of what a beginning row takes, while it is looked for


def _columns(cost: ProfileCost, rows: Rows) -> list[float]:
    """Seconds of a step by what gets a factor of its own: the layers at each of `KNOTS`, the other parts, beginning rows."""
    parts = cost.parts(rows)
    tokens = [parts["tokens"] * share for share in _shares(float(sum(rows.query)))]
    return [*tokens, parts["prepare"], parts["attention"], parts["emit"], BEGIN * sum(map(eq, rows.query, rows.kv))]


def _shares(tokens: float) -> list[float]:
    """How much each of `KNOTS` has to say about a step of so many tokens; 1 together."""
    at = np.interp(math.log(max(tokens, 1.0)), np.log(KNOTS), np.arange(len(KNOTS)))
    return [max(0.0, 1.0 - abs(float(at) - knot)) for knot in range(len(KNOTS))]


def _reshaped(curve: Curve, factors: Sequence[float]) -> Curve:
    """A curve over tokens, multiplied with factors that hold at `KNOTS`."""
    by = [sum(share * factor for share, factor in zip(_shares(x), factors)) for x in curve.x]
    return Curve(curve.x, tuple(seconds * factor for seconds, factor in zip(curve.seconds, by)))


def _factors(table: np.ndarray, seconds: np.ndarray, pull: float = 0.01) -> np.ndarray:
    """Factors of the columns of `table` [steps, parts] that bring their sums closest to `seconds` [steps].

    Errors are relative to the sums as they are told, so that noise that only ever delays moves the mean, not more. Every
    factor is pulled to 1 (that of the last column to 0), those of the knots to their neighbours, too."""
    knots, prior = len(KNOTS), np.array([*[1.0] * (table.shape[1] - 1), 0.0])
    factors, kept = prior, np.full(len(table), True)
    steps = np.eye(knots - 1, len(prior), 1) - np.eye(knots - 1, len(prior))  # from one knot to the next
    for _ in range(6):
        told = (table @ factors)[:, None]
        weight = math.sqrt(pull * len(table)) * np.maximum((table / told).mean(axis=0), 0.02)
        rows = np.vstack([(table / told)[kept], np.diag(weight), 0.05 * math.sqrt(pull * len(table)) * steps])
        wanted = np.concatenate([(seconds / told[:, 0])[kept], weight * prior, np.zeros(knots - 1)])
        found, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        factors = np.clip(found, [*[0.1] * (len(prior) - 1), 0.0], [*[5.0] * (len(prior) - 1), np.inf])
        wrong = np.abs(table @ factors / seconds - 1)
        kept = wrong <= np.quantile(wrong, 0.95)
    return np.asarray(factors)


def _engine_share(steps: Sequence[Observation]) -> Share | None:
    """Engine seconds as a constant, a slope per row and one per row that begins, all positive or left out; extremes are cut
    at their 1st and 99th percentile."""
    found = [(1.0, len(s.rows), sum(map(eq, s.rows.query, s.rows.kv)), s.engine) for s in steps if s.engine is not None]
    if len(found) < 20:
        return None
    *columns, seconds = np.array(found, np.float64).T
    seconds, kept = np.clip(seconds, *np.quantile(seconds, [0.01, 0.99])), [0, 1, 2]
    while True:
        weights, *_ = np.linalg.lstsq(np.array([columns[i] for i in kept]).T, seconds, rcond=None)
        if (weights >= 0).all():
            break
        kept.remove(kept[int(weights.argmin())])
    step, row, begin = (dict(zip(kept, weights.tolist())).get(i, 0.0) for i in range(3))
    return Share(step, row, begin=begin)


# ------------------------------------------------------------------------------------------- files
def write(profile: Profile, path: str | Path) -> Path:
    """Write a profile as JSON, numbers rounded to five digits. Returns the path."""
    path = Path(path)
    path.write_text(json.dumps(_rounded(asdict(profile)), indent=1) + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 1 else value
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def read(path: str | Path) -> Profile:
    """Read a profile. Raises RooflineError that names the file and the field."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RooflineError(f"{path}: {error.strerror or error}; `llmlab profile` measures one") from None
    except ValueError as error:
        raise RooflineError(f"{path}: no JSON ({error})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise RooflineError(f"{path}: schema is {found!r}, expected {SCHEMA}: no profile of this version")
    return _Reader(str(path)).profile(data)


class _Reader:
    """Decodes a file strictly: no field may be missing, unknown, or of another type."""

    def __init__(self, path: str) -> None:
        self._path = path

    def profile(self, data: Mapping[str, Any]) -> Profile:
        special = {
            "machine": lambda v: self._plain(Machine, v, "machine"), "shape": lambda v: self._plain(Shape, v, "shape"),
            "prepare": lambda v: self._plain(Share, v, "prepare"), "engine": lambda v: self._plain(Share, v, "engine"),
            "tokens": lambda v: self._curve(v, "tokens"), "emit": lambda v: self._curve(v, "emit"),
            "attention": lambda v: self._attention(v, "attention"),
            "cpu_attention": lambda v: None if v is None else self._attention(v, "cpu_attention"),
            "products": self._products, "copies": self._copies, "software": self._texts,
        }  # fmt: skip
        self._names(Profile, data, "")
        plain = {f.name: f.type for f in fields(Profile) if f.name not in special}
        values = {n: special[n](v) if n in special else self._typed(v, str(plain[n]), n) for n, v in data.items()}
        found: Profile = self._build(Profile, values, "")
        return found

    def _fail(self, where: str, problem: str) -> RooflineError:
        return RooflineError(f"{self._path}: {where + ': ' if where else ''}{problem}")

    def _names(self, kind: type[Any], data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise self._fail(where, f"must be an object, got {data!r:.60}")
        known = [f.name for f in fields(kind)]
        for word, names in (
            ("lacks", [n for n in known if n not in data]),
            ("has unknown", [n for n in data if n not in known]),
        ):
            if names:
                raise self._fail(where, f"{word} {', '.join(names)}")

    def _build(self, kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
        try:
            return kind(**values)
        except RooflineError as error:
            raise self._fail(where, str(error)) from None

    def _typed(self, value: Any, kind: str, where: str) -> Any:
        fits = {"int": isinstance(value, int) and not isinstance(value, bool), "bool": isinstance(value, bool),
                "float": isinstance(value, (int, float)) and not isinstance(value, bool)}  # fmt: skip
        if not fits.get(kind, isinstance(value, str)):
            raise self._fail(where, f"must be {kind if kind in fits else 'a text'}, got {value!r:.60}")
        return float(value) if kind == "float" else value

    def _plain(self, kind: type[Any], data: Any, where: str) -> Any:
        self._names(kind, data, where)
        types = {f.name: str(f.type) for f in fields(kind)}
        return self._build(kind, {n: self._typed(v, types[n], f"{where}.{n}") for n, v in data.items()}, where)

    def _numbers(self, data: Any, kind: str, where: str) -> tuple[Any, ...]:
        if not isinstance(data, list):
            raise self._fail(where, f"must be a list, got {data!r:.60}")
        return tuple(self._typed(v, kind, f"{where}[{i}]") for i, v in enumerate(data))

    def _curve(self, data: Any, where: str) -> Curve:
        self._names(Curve, data, where)
        values = {name: self._numbers(data[name], "float", f"{where}.{name}") for name in ("x", "seconds")}
        curve: Curve = self._build(Curve, values, where)
        return curve

    def _attention(self, data: Any, where: str) -> AttentionTable:
        self._names(AttentionTable, data, where)
        query = self._numbers(data["query"], "int", f"{where}.query")
        curves = tuple(self._curve(c, f"{where}.curves[{i}]") for i, c in enumerate(self._list(data["curves"], where)))
        table: AttentionTable = self._build(AttentionTable, {"query": query, "curves": curves}, where)
        return table

    def _list(self, data: Any, where: str) -> list[Any]:
        if not isinstance(data, list):
            raise self._fail(where, f"must be a list, got {data!r:.60}")
        return data

    def _products(self, data: Any) -> tuple[Product, ...]:
        found = []
        for i, entry in enumerate(self._list(data, "products")):
            where = f"products[{i}]"
            self._names(Product, entry, where)
            sizes = {n: self._typed(entry[n], "int", f"{where}.{n}") for n in ("depth", "columns")}
            found.append(
                self._build(Product, {**sizes, "by_rows": self._curve(entry["by_rows"], f"{where}.by_rows")}, where)
            )
        return tuple(found)

    def _copies(self, data: Any) -> dict[str, Curve]:
        if not isinstance(data, dict):
            raise self._fail("copies", f"must be an object, got {data!r:.60}")
        return {name: self._curve(curve, f"copies.{name}") for name, curve in data.items()}

    def _texts(self, data: Any) -> dict[str, str]:
        if not isinstance(data, dict):
            raise self._fail("software", f"must be an object, got {data!r:.60}")
        return {name: self._typed(text, "str", f"software.{name}") for name, text in data.items()}
