"""Measuring a machine: what a model's steps really take here, part by part, as a `roofline.profile.Profile`.

    measure(loaded)                  tables, from the real executor and its kernels
    observations(run events)         the steps of a run that was really made, to calibrate a profile with
    profile_command(...)             both, and a file: what `llmlab profile` does

Every number is a median of repeats, the first of which is dropped; no point takes much longer than `POINT_SECONDS`.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab.config import EngineConfig
from llmlab.events import catalog as ev
from llmlab.execution.base import Row, StepBatch
from llmlab.execution.cost import machine_here, rows_of
from llmlab.execution.threads import choose_threads
from llmlab.execution.torch_executor import KVCache, TorchExecutor
from llmlab.kernels.dispatch import Kernels, make_kernels
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.loader import LoadedModel, load_model
from llmlab.types import Move, Request, SamplingParams, Span, StepPlan, WorkItem
from llmlab.workloads.workload import Workload
from roofline.errors import RooflineError
from roofline.hardware import get as get_hardware
from roofline.profile import AttentionTable, Curve, Machine, Observation, Product, Profile, Share, calibrated, write
from roofline.rows import Rows
from roofline.shapes import Shape

if TYPE_CHECKING:
    from llmlab.workloads.source import Load

POINT_SECONDS = 0.2  # budget of one point; at least MIN_REPEATS are made whatever they take
MIN_REPEATS, MAX_REPEATS = 4, 25
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (0, 16, 64, 256, 1024, 4096)
DECODE_CONTEXTS = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KV_TOKENS = 4096  # that the rows of one attention call see together: what a small engine's batch holds
EMITS = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
PRODUCT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PRODUCTS = ((128, 128), (128, 512), (512, 1024), (1024, 4096), (2048, 8192))  # depth, columns: 16 Ki to 16 Mi weights
MOVED_BLOCKS = (1, 4, 16, 64, 256)
SCATTER = 1024  # blocks over which those of the rows are scattered
CACHE_BYTES = 384 << 20  # of KV that the measurements may use

Progress = Callable[[int, int, str], None]
"""Called with (points done, points in all, what is being measured)."""


def _silent(done: int, total: int, what: str) -> None:
    pass


# --------------------------------------------------------------------------------------- stopwatch
class Stopwatch:
    """Medians of repeated calls on one device, counted for a progress bar."""

    def __init__(self, device: torch.device, total: int, progress: Progress) -> None:
        self._device, self._total, self._progress, self._done = device, total, progress, 0

    def point(self, what: str) -> None:
        """Say what is measured next."""
        self._progress(self._done, self._total, what)
        self._done += 1

    def wait(self) -> None:
        """Until the device has done all that it was asked to."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of `call`."""
        return self.together([call])[0]

    def together(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Median seconds of each of `calls`, taken in turns, so that a drift of the machine meets all alike."""
        times: list[list[float]] = [[] for _ in calls]
        began = time.perf_counter()
        while len(times[0]) < MIN_REPEATS or (
            len(times[0]) < MAX_REPEATS and time.perf_counter() - began < POINT_SECONDS
        ):
            for call, found in zip(calls, times):
                self.wait()
                start = time.perf_counter()
                call()
                self.wait()
                found.append(time.perf_counter() - start)
        return [statistics.median(found[1:]) for found in times]


# ----------------------------------------------------------------------------------------- batches
class Lens(NamedTuple):
    """New tokens of a row, and the tokens that its last one sees."""

    query: int
    kv: int


class Batches:
    """Step batches of any lengths, over blocks of one cache, scattered as in an engine that has been serving for a while.
    Rows share blocks only if the cache is too small."""

    def __init__(self, block_size: int, num_blocks: int, vocab_size: int) -> None:
        self._block_size, self._num_blocks, self._vocab_size = block_size, num_blocks, vocab_size
        near = min(num_blocks, SCATTER)
        self._order = [*np.random.default_rng(0).permutation(near).tolist(), *range(near, num_blocks)]
        self._count = 0

    def blocks(self, spans: Sequence[Lens]) -> list[tuple[int, ...]]:
        """One block table per row, none of whose blocks another row has."""
        tables, at = [], 0
        for span in spans:
            count = -(-span.kv // self._block_size)
            tables.append(tuple(self._order[(at + i) % self._num_blocks] for i in range(count)))
            at += count
        return tables

    def make(self, spans: Sequence[Lens], emitting: int) -> StepBatch:
        """A step over `spans`, the first `emitting` of which sample greedily."""
        rows, names = [], []
        for i, (span, table) in enumerate(zip(spans, self.blocks(spans))):
            self._count += 1
            names.append(f"p{self._count}")
            prompt = tuple((7919 * j + i) % self._vocab_size for j in range(span.kv))
            request = Request(names[-1], self._count, prompt, SamplingParams(temperature=0.0))
            emit: Any = "sample" if i < emitting else "none"
            item = WorkItem(names[-1], Span(span.kv - span.query, span.kv), emit=emit)
            rows.append(Row(item, request, table))
        return StepBatch(StepPlan(0, tuple(row.item for row in rows)), tuple(rows), ())


def attention_metadata(batches: Batches, spans: Sequence[Lens], block_size: int, device: Any) -> AttentionMetadata:
    return AttentionMetadata.build(
        [s.query for s in spans], [s.kv for s in spans], batches.blocks(spans), block_size, device=device
    )


# ------------------------------------------------------------------------------------ measurements
class Bench:
    """One model on one device, ready to be measured. Longest row `max_len`, at most `max_tokens` tokens a step."""

    def __init__(self, loaded: LoadedModel, shape: Shape, block_size: int, max_tokens: int, watch: Stopwatch) -> None:
        self.loaded, self.shape, self.block_size, self.watch = loaded, shape, block_size, watch
        self.device, self.kernels = loaded.device, loaded.model.kernels
        self.width = torch.empty((), dtype=loaded.dtype).element_size()
        self.block_bytes = shape.num_layers * shape.kv_elements * block_size * self.width
        longest = max(2 * MOVED_BLOCKS[-1], -(-loaded.max_model_len // block_size))
        self.num_blocks = max(min(longest, 4096), min(4096, int(CACHE_BYTES // self.block_bytes)))
        self.executor = TorchExecutor(loaded, KVCache(loaded, self.num_blocks, MOVED_BLOCKS[-1], block_size), block_size, 0,
                                      asynchronous=False)  # fmt: skip
        self.max_len = min(loaded.max_model_len, self.num_blocks * block_size)
        self.max_tokens = min(max_tokens, self.max_len)
        self.batches = Batches(block_size, self.num_blocks, shape.vocab_size)

    def caller(
        self, spans: Sequence[Lens], emitting: int, parts: list[dict[str, float]] | None = None
    ) -> Callable[[], None]:
        """A call that runs one step, and notes its parts."""
        batch = self.batches.make(spans, emitting)
        beginning = tuple(row.request.id for row in batch.rows if row.item.tokens[0] == 0)
        again = batch._replace(forget=beginning)

        def run() -> None:
            result = self.executor.submit(again).result()  # rows that begin are forgotten first, so that each run begins them
            if result.results[0].error is not None:
                raise RooflineError(f"a step of {len(spans)} rows failed: {result.results[0].error}")
            if parts is not None:
                parts.append(dict(result.durations.parts))

        return run

    # ---------------------------------------------------------------------------------- attention
    def attention(self, kernels: Kernels, caches: Sequence[tuple[Tensor, Tensor]], what: str) -> AttentionTable:
        """Seconds of one row over all layers, by query length and context: many rows, less the cost of the call."""
        device = caches[0][0].device
        call = self._attention_call([Lens(1, 1)], kernels, caches, device)
        base = self.watch.seconds(call)
        curves = []
        queries = [q for q in QUERIES if q <= self.max_tokens]
        for query in queries:
            self.watch.point(f"{what}, {query} new tokens")
            points = {}
            contexts = DECODE_CONTEXTS if query == 1 else CONTEXTS
            for context in sorted({min(c, self.max_len - query) for c in contexts}):
                points[query + context] = self._row_seconds(Lens(query, query + context), base, kernels, caches, device)
            curves.append(_curve(points))
        return AttentionTable(tuple(queries), tuple(curves))

    def _row_seconds(self, span: Lens, base: float, kernels: Kernels, caches: Any, device: Any) -> float:
        room = self.num_blocks * self.block_size // max(span.kv, self.block_size)
        rows = max(1, min(32, room, 2048 // span.query, KV_TOKENS // span.kv))
        call = self._attention_call([span] * (rows + 1), kernels, caches, device)
        one = self._attention_call([span], kernels, caches, device) if rows > 1 else None
        if one is None:
            return max(self.watch.seconds(call) - base, 1e-9) / (rows + 1)
        many, single = self.watch.together([call, one])
        return max(many - single, 1e-8) / rows

    def _attention_call(self, spans: Sequence[Lens], kernels: Kernels, caches: Any, device: Any) -> Callable[[], None]:
        meta = attention_metadata(self.batches, spans, self.block_size, device)
        tokens, shape = sum(s.query for s in spans), self.loaded.shape
        q = torch.randn(tokens, shape.num_heads, shape.head_dim).to(device=device, dtype=caches[0][0].dtype)

        def run() -> None:
            fresh = replace(meta)  # a new step: what kernels plan once per step counts
            for (k, v), window in zip(caches, shape.layer_windows):
                kernels.paged_attention(q, k, v, fresh, shape.query_scale, window or None, shape.attn_softcap)

        return run

    # ------------------------------------------------------------------------------- whole steps
    def prepare(self) -> Share:
        """Seconds of making a step's inputs: least squares over rows, new tokens, tokens seen, and rows that begin."""
        self.watch.point("preparing a step")
        features, seconds = [], []
        for spans in self._designs():
            parts: list[dict[str, float]] = []
            self.watch.seconds(self.caller(spans, 0, parts))
            beginning = sum(s.query == s.kv for s in spans)
            features.append([1.0, len(spans), sum(s.query for s in spans), sum(s.kv for s in spans), beginning])
            seconds.append(statistics.median(p["prepare"] for p in parts[1:]))
        table, times = np.array(features), np.array(seconds)
        return Share(*_not_negative(table / times[:, None], np.ones(len(times))))

    def _designs(self) -> Iterator[list[Lens]]:
        for rows in (1, 4, 16, 32):
            chunk = min(16, self.max_tokens // rows)
            for span in (Lens(1, 2), Lens(1, 512), Lens(chunk, 64), Lens(chunk, chunk)):
                if span.kv <= self.max_len and span.query >= 1:
                    yield [span] * rows
        yield [Lens(self.max_tokens, self.max_tokens)]

    def tokens(self, prepare: Share, attention: AttentionTable) -> Curve:
        """Seconds of a step's layers by its new tokens, without preparing, attention and scores."""
        points = {}
        for tokens in [n for n in TOKENS if n <= self.max_tokens]:
            self.watch.point(f"layers, {tokens} new tokens")
            query = max(1, tokens // 16)
            spans = [Lens(query, query)] * (tokens // query)
            spans += [Lens(tokens % query, tokens % query)] if tokens % query else []
            whole = self.watch.seconds(self.caller(spans, 0))
            known = prepare.at(len(spans), tokens, tokens, len(spans)) + sum(attention.at(*span) for span in spans)
            points[tokens] = max(whole - known, 0.2 * whole)
        return _curve(points)

    def emit(self) -> Curve:
        """Seconds of scores and greedy sampling by their number: steps with them, less steps without."""
        points = {}
        for count in EMITS:
            self.watch.point(f"scores, {count} tokens")
            spans = [Lens(1, min(64, self.max_len))] * count
            with_them, without = self.watch.together([self.caller(spans, count), self.caller(spans, 0)])
            points[count] = max(with_them - without, 1e-7)
        return _curve(points)

    # -------------------------------------------------------------------------- machine, in general
    def products(self) -> tuple[Product, ...]:
        """Matrix products with the model's kernels, in its number format."""
        return tuple(self._product(depth, columns) for depth, columns in PRODUCTS)

    def _product(self, depth: int, columns: int) -> Product:
        self.watch.point(f"matrix products, {depth} x {columns}")
        weight = torch.randn(columns, depth).to(device=self.device, dtype=self.loaded.dtype)
        layer, points = self.kernels.linear(weight), {}
        for rows in PRODUCT_ROWS:
            x = torch.randn(rows, depth).to(device=self.device, dtype=self.loaded.dtype)
            points[rows] = self.watch.seconds(partial(layer, x))
        return Product(depth, columns, _curve(points))

    def launch(self) -> float:
        """Seconds of the smallest kernel there is: a norm of one row."""
        self.watch.point("launch")
        x = torch.ones(1, self.shape.hidden_size, device=self.device, dtype=self.loaded.dtype)
        weight = torch.ones(self.shape.hidden_size, device=self.device, dtype=self.loaded.dtype)

        def run() -> None:
            for _ in range(32):
                self.kernels.rms_norm(x, weight, 1e-6)

        return self.watch.seconds(run) / 32

    def copies(self) -> dict[str, Curve]:
        """Seconds of moving blocks of KV: to the host, from it, and within the device; by bytes."""
        found = {}
        for name, kind in (("d2h", "swap_out"), ("h2d", "swap_in"), ("d2d", "copy")):
            self.watch.point(f"copies {name}")
            points = {}
            for count in MOVED_BLOCKS:
                behind = self.num_blocks - count if kind == "copy" else 0
                move = Move(kind, "p", tuple(range(count)), tuple(range(behind, behind + count)))  # type: ignore[arg-type]
                points[count * self.block_bytes] = self.watch.seconds(partial(self.executor.cache.move, move))
            found[name] = _curve(points)
        return found

    def host_attention(self) -> AttentionTable | None:
        """Attention on the host beside a GPU, with the compiled kernels; None on a CPU, where it is the attention."""
        if self.device.type == "cpu":
            return None
        shape = self.loaded.shape
        size = (self.num_blocks, shape.num_kv_heads, self.block_size, shape.head_dim)
        caches = [(torch.zeros(size), torch.zeros(size)) for _ in range(shape.num_layers)]
        return self.attention(make_kernels("auto", "cpu", torch.float32), caches, "attention on the host")


def _curve(points: dict[int, float]) -> Curve:
    return Curve(tuple(float(x) for x in points), tuple(points.values()))


def _not_negative(table: np.ndarray, target: np.ndarray) -> list[float]:
    """Least squares; a column that would get a negative weight is left out."""
    columns = list(range(table.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(table[:, columns], target, rcond=None)
        if (found >= 0).all():
            weights = dict(zip(columns, found.tolist()))
            return [weights.get(i, 0.0) for i in range(table.shape[1])]
        columns.remove(columns[int(found.argmin())])


def num_points(device: str) -> int:
    """How many points a progress bar has to reach (a few fewer for short models)."""
    attention = len(QUERIES) * (1 if device == "cpu" else 2)
    return attention + len(TOKENS) + len(EMITS) + len(PRODUCTS) + 5


def measure(
    loaded: LoadedModel, shape: Shape, block_size: int = 16, max_tokens: int = 512, progress: Progress | None = None
) -> Profile:
    """Measure `loaded` on its device, some 20 to 100 s. `shape`: its sizes (`llmlab.backends` knows how to get them).

    `max_tokens`: new tokens of the largest step to be measured. The engine's own time is not known yet: see
    `roofline.profile.calibrated`. Raises RooflineError if a step fails.
    """
    device = loaded.device
    bench = Bench(
        loaded, shape, block_size, max_tokens, Stopwatch(device, num_points(device.type), progress or _silent)
    )
    gc.collect()
    with torch.inference_mode():
        bench.watch.seconds(bench.caller([Lens(1, 1)], 1))  # compile, touch all weights
        attention = bench.attention(bench.kernels, bench.executor.cache.layers, "attention")
        prepare = bench.prepare()
        return Profile(
            machine=_machine(device), kernels=bench.kernels.name, dtype=_precision(loaded.dtype),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"), software=_software(),
            memory_bytes=_memory_bytes(device), base=_base(device), shape=shape, block_size=block_size,
            launch=bench.launch(), prepare=prepare, tokens=bench.tokens(prepare, attention), attention=attention,
            emit=bench.emit(), products=bench.products(), copies=bench.copies(), cpu_attention=bench.host_attention(),
        )  # fmt: skip


def _machine(device: torch.device) -> Machine:
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return machine_here(torch.get_num_threads(), name)


def _precision(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(dtype).removeprefix("torch.")]


def _software() -> dict[str, str]:
    import llmlab

    return {
        "llmlab": llmlab.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _base(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu-2core"
    try:
        return get_hardware(torch.cuda.get_device_name(device)).name
    except RooflineError:
        return "a10"


# ------------------------------------------------------------------------------------ from a run
def observations(events: Iterable[ev.Event]) -> list[Observation]:
    """The steps of a measured run (log level 2 or more): rows, executor seconds, and the time between steps."""
    found: list[Observation] = []
    planned: dict[int, ev.StepPlanned] = {}
    arrived: list[float] = []  # since the last step ended
    last: ev.StepFinished | None = None
    for event in events:
        if isinstance(event, ev.RequestArrived):
            arrived.append(event.spec.arrival)
        elif isinstance(event, ev.StepPlanned) and event.items and not event.moves:
            planned[event.seq] = event
        elif isinstance(event, ev.StepFinished):
            plan = planned.pop(event.plan, None)
            if plan is not None and event.measured.execute > 0:
                found.append(_observation(plan, event, last, arrived))
            last, arrived = event, []
    return found


def _observation(plan: ev.StepPlanned, done: ev.StepFinished, last: ev.StepFinished | None, arrived: Sequence[float]
                 ) -> Observation:  # fmt: skip
    rows, seconds = rows_of(plan.items), done.measured.execute
    if last is not None and last.num_running + last.num_waiting:
        return Observation(rows, seconds, max(1e-7, done.t - last.t - seconds))
    slept = last is not None and bool(arrived) and min(arrived) > last.t
    return Observation(rows, seconds, woken=done.t - min(arrived) - seconds if slept else None)


# --------------------------------------------------------------------------------------- command
def profile_command(
    device: str, model: str, out: str | Path, progress: Progress | None, run: Callable[[EngineConfig, Load], Any],
    shape_of: Callable[[LoadedModel], Shape], *, num_threads: int | None = None, dtype: str = "auto",
    kernels: str = "auto", random_weights: bool = False, block_size: int = 16, max_tokens: int = 512,
) -> Profile:  # fmt: skip
    """Measure `model` on `device` ("cpu" or "cuda"), calibrate with a short run, write `out`, and return the profile.

    `run`: `llmlab.run`; `shape_of`: `llmlab.backends.roofline_shape` (both are floors above this one). Under three
    minutes for models that the device runs well. Raises LabError or RooflineError.
    """
    threads = num_threads or choose_threads().num_threads  # the same for both parts
    config = EngineConfig(model=model, device=device, dtype=dtype, kernels=kernels, num_threads=threads,  # type: ignore[arg-type]
                          random_weights=random_weights, block_size=block_size, enable_prefix_caching=False,
                          max_num_batched_tokens=max_tokens, max_num_seqs=32)  # fmt: skip
    loaded = loaded_for(config)
    profile = measure(loaded, shape_of(loaded), block_size, max_tokens, progress)
    total = num_points(device)
    (progress or _silent)(total - 1, total, "a short run, for the engine's own time")
    served = run(config, probe(profile))
    profile = calibrated(profile, observations(served.log_events))
    write(profile, out)
    (progress or _silent)(total, total, "done")
    return profile


def loaded_for(config: EngineConfig) -> LoadedModel:
    """The model that the torch executor would run for `config`."""
    on_gpu = config.device == "cuda"
    dtype = config.dtype if config.dtype != "auto" else ("float16" if on_gpu else "float32")
    kernels = make_kernels(config.kernels, config.device, getattr(torch, dtype), config.num_threads)
    return load_model(
        config.model, dtype, config.device, kernels, config.random_weights, config.seed, config.max_model_len
    )


def probe(profile: Profile, seconds: float = 12.0) -> Workload:
    """A job of some `seconds` for this machine: prompts of 16 to 192 tokens, outputs of 16 to 96, 2 rows to 32."""
    from roofline.profile import ProfileCost

    cost = ProfileCost(profile)
    decode = cost.step(Rows.decode(16, 160)).seconds / 16
    prompt = cost.step(Rows.prefill(104)).seconds
    each = 56 * decode + prompt
    count = int(min(120, max(12, seconds / each)))
    arrivals = np.cumsum(np.full(count, 0.8 * each)).tolist()
    rng = np.random.default_rng(0)
    return Workload.drawn(arrivals, (16, 192), (16, 96), rng, 0)
