"""`llmlab.sweep(grid, workload)`: one run for every combination of settings, in parallel, as a tidy table.

grid -> points -> [ finished before? ] -> processes (or Ray) -> one row each -> results file

A point that fails is a row with its error. With `results=FILE` every row is written when it is there, and a later sweep
skips the points that it finds in the file.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import blake2b
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

import llmlab
from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.registry import policy_name
from llmlab.running import serve
from llmlab.types import ConfigError, TraceError, unknown_name
from llmlab.workloads.source import Load

LoadFactory = Callable[[int], Load]
Row = dict[str, Any]
_OWN_AXES = ("workload", "workload_seed")
_EVENTS_KEPT = 1000  # a sweep wants the metrics, which need no event again


class Point(msgspec.Struct, frozen=True):
    """One run to be: its settings, its load, and what its row says of them."""

    key: str
    labels: Row
    fields: Mapping[str, Any]
    load: Load


def sweep(grid: Mapping[str, Any], workload: Load | LoadFactory | None = None, *, results: str | Path | None = None,
          backend: str = "processes", workers: int | None = None, progress: bool = True, **config: Any) -> list[Row]:  # fmt: skip
    """Run every combination of `grid`; one row each, in the grid's order: its settings, then all metrics of the run,
    `error` ("" if all went well) and `wall_seconds`.

    `grid` maps fields of EngineConfig to lists of values (plug-in objects are welcome), "workload" to a list of workloads
    or a dict of them by name, and "workload_seed" to seeds for workloads given as functions of a seed. `config` are fields
    that all points share. `results`: a .jsonl file that rows are appended to; points that it holds are not run again,
    those that failed are. `backend`: "processes", "inline" (this process) or "ray" (a cluster; needs ray). `workers`
    defaults to the cores, and to one for measured runs, which must not disturb each other. Raises ConfigError for
    settings that no point could run with.

        llmlab.sweep({"ordering": ["fcfs", "sjf_oracle"], "hardware": ["t4", "a100"]}, load, executor="sim")
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise ConfigError("workers", workers, "must be a positive number of processes")
    points = _points(grid, workload, config)
    book = ResultsFile(results)
    done = {point.key: book.rows[point.key] for point in points if point.key in book.rows}
    todo = list({point.key: point for point in points if point.key not in done}.values())
    with _progress_bar(len(points), len(points) - len(todo), progress) as advance:
        for point, outcome in BACKENDS[backend](todo, workers or _default_workers(points)):
            row = {**point.labels, **outcome, "key": point.key}
            book.add(row)
            done[point.key] = row
            advance()
    return [{**done[point.key], **point.labels} for point in points]


# ------------------------------------------------------------------------------------ from grid to points
def _points(grid: Mapping[str, Any], workload: Load | LoadFactory | None, config: Mapping[str, Any]) -> list[Point]:
    axes = {name: _axis(name, values) for name, values in grid.items()}
    for name in (*axes, *config):
        if name not in EngineConfig.__struct_fields__ and not (name in axes and name in _OWN_AXES):
            raise unknown_name("sweep", name, (*EngineConfig.__struct_fields__, *_OWN_AXES))
    if "trace" in axes or "trace" in config:
        raise ConfigError(
            "trace", "trace", "every point would write the same file", "Record the run of interest alone."
        )
    if "workload" not in axes:
        axes["workload"] = _axis("workload", [workload])
    seeds = axes.pop("workload_seed", None)
    loads = _loads(axes.pop("workload"), seeds)
    settings = [dict(zip(axes, values)) for values in product(*axes.values())]
    return [_point({**config, **chosen}, chosen, *load) for chosen in settings for load in loads]


def _axis(name: str, values: Any) -> list[Any]:
    """The values of one axis; for workloads, pairs of a name and a load."""
    if name != "workload":
        return _listed(name, values)
    if isinstance(values, Mapping):
        return list(values.items())
    loads = _listed(name, values)
    names = [_load_name(load) for load in loads]
    return [
        (own if names.count(own) == 1 else f"{own} #{index}", load)
        for index, (own, load) in enumerate(zip(names, loads))
    ]


def _listed(name: str, values: Any) -> list[Any]:
    if not isinstance(values, (list, tuple, range)) or not len(values):
        raise ConfigError(name, values, "must be a list of values", f"Write {{{name!r}: [...]}}.")
    return list(values)


def _load_name(load: Any) -> str:
    return (
        "drawn"
        if inspect.isfunction(load) and load.__name__ == "<lambda>"
        else getattr(load, "__name__", repr(load)[:120])
    )


def _loads(named: Sequence[tuple[str, Any]], seeds: Sequence[int] | None) -> list[tuple[Row, Load, str]]:
    """Every load with its labels and its digest; functions of a seed are called here, once per seed."""
    found: list[tuple[Row, Load, str]] = []
    for name, given in named:
        if callable(given):
            made = [({"workload": name, "workload_seed": seed}, given(seed)) for seed in seeds or (0,)]
            found += [(labels, load, _digest(load)) for labels, load in made]
        elif seeds is not None:
            raise ConfigError("workload", name, "is no function of a seed, but workload_seed is in the grid",
                              "Write lambda seed: Workload.poisson(..., seed=seed).")  # fmt: skip
        elif not hasattr(given, "source"):
            raise ConfigError("workload", name, "is no workload", "Write sweep(grid, Workload.poisson(...)).")
        else:
            found.append(({"workload": name}, given, _digest(given)))
    return found


def _point(fields: Mapping[str, Any], chosen: Mapping[str, Any], load_labels: Row, load: Load, digest: str) -> Point:
    labels = {name: _shown(value) for name, value in chosen.items()}
    fields = {**_DEFAULTS, **fields}
    identity = {name: _identity(value) for name, value in sorted(fields.items())}
    key = blake2b(msgspec.json.encode([identity, digest, llmlab.__version__]), digest_size=12).hexdigest()
    return Point(key, {**labels, **load_labels}, fields, load)


_DEFAULTS = dict(zip(EngineConfig.__struct_fields__, EngineConfig.__struct_defaults__)) | {"log_capacity": _EVENTS_KEPT}


def _shown(value: Any) -> Any:
    """A setting as a row shows it; a plug-in with its name and its parameters."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    own = {
        name: part for name, part in getattr(value, "__dict__", {}).items() if isinstance(part, (bool, int, float, str))
    }
    inside = ", ".join(f"{name}={part!r}" for name, part in own.items() if not name.startswith("_") and name != "name")
    return policy_name(value) + (f"({inside})" if inside else "")


def _identity(value: Any) -> Any:
    """What must be equal for a finished point to count as the same: of a plug-in its state, and its class's source."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        source = inspect.getsource(type(value))
    except (OSError, TypeError):  # built in, or made on the fly
        source = ""
    state = [[name, _identity(part)] for name, part in sorted(getattr(value, "__dict__", {}).items())]
    shown = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is not the same tomorrow
    return [type(value).__module__, type(value).__qualname__, source, state or shown]


def _digest(load: Any) -> str:
    try:
        content = msgspec.json.encode(load)
    except (TypeError, ValueError):
        content = pickle.dumps(load)
    return blake2b(type(load).__qualname__.encode() + content, digest_size=12).hexdigest()


# --------------------------------------------------------------------------------------- results file
class ResultsFile:
    """Rows in a .jsonl file, one appended at a time. `rows`: those of finished points, by key."""

    def __init__(self, path: str | Path | None) -> None:
        self.rows: dict[str, Row] = {}
        self._path = None if path is None else Path(path)
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a last line without its end was cut off in the middle
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = msgspec.json.decode(line, type=dict[str, Any])
                key = row["key"]
            except (msgspec.DecodeError, KeyError) as error:
                raise TraceError(f"{path.name} line {number}", line.decode(errors="replace"), f"is no row of a sweep ({error})",
                                 "Choose another results file.") from None  # fmt: skip
            if not row.get("error"):
                self.rows[key] = row
        if whole != content:
            path.write_bytes(whole)

    def add(self, row: Row) -> None:
        if self._path is not None:
            try:
                with self._path.open("ab") as file:
                    file.write(msgspec.json.encode(row) + b"\n")
            except OSError as error:
                raise ConfigError("results", str(self._path), f"cannot be written ({error.strerror})") from None


# ------------------------------------------------------------------------------------------ one point
def run_point(fields: Mapping[str, Any], load: Load) -> Row:
    """Serve one point here: its metrics and `wall_seconds`, or the `error` that ended it."""
    began = time.perf_counter()
    try:
        with Engine(EngineConfig(**fields)) as engine:
            serve(engine, load)
            outcome: Row = {**dict(engine.metrics.result().rows()), "error": ""}
    except Exception as error:  # whatever is wrong with one point, the others go on
        outcome = {"error": f"{type(error).__name__}: {error}"[:1000]}
    return {**outcome, "wall_seconds": round(time.perf_counter() - began, 3)}


def run_packed(fields: bytes, load: bytes) -> Row:
    """`run_point` at the other end of a pipe."""
    return run_point(pickle.loads(fields), pickle.loads(load))


def pack(value: Any) -> bytes:
    """`value` on its way to another process. What was defined in a script, a cell or a function travels by value, so the
    other side need not import it. Raises ConfigError for what cannot travel, such as an open file."""
    try:
        data = pickle.dumps(value)
        if b"__main__" not in data:
            return data
    except (pickle.PicklingError, AttributeError, TypeError):
        pass
    from numba import cloudpickle

    try:
        return bytes(cloudpickle.dumps(value))  # type: ignore[no-untyped-call]
    except Exception as error:  # any object may refuse in its own way
        raise ConfigError("sweep", value, f"cannot be sent to another process ({error})",
                          'Use a plug-in\'s registered name, or backend="inline".') from None  # fmt: skip


# ------------------------------------------------------------------------------------------- backends
Outcomes = Iterator[tuple[Point, Row]]
_DIED = {"error": "its process died: out of memory, or killed", "wall_seconds": None}


def _inline(points: Sequence[Point], workers: int) -> Outcomes:
    for point in points:
        yield point, run_point(point.fields, point.load)


def _by_processes(points: Sequence[Point], workers: int) -> Outcomes:
    """All points in one pool. If a process dies, the pool goes with it: those left run again, each in one of its own."""
    left = {point.key: point for point in points}
    for point, outcome in _pooled(points, workers):
        if outcome is not _DIED:
            del left[point.key]
            yield point, outcome
    for point in left.values():
        yield from _pooled([point], 1)


def _pooled(points: Sequence[Point], workers: int) -> Outcomes:
    if not points:
        return
    loads = _packed_loads(points)
    pool = ProcessPoolExecutor(min(workers, len(points)), multiprocessing.get_context("spawn"))
    try:
        with _main_unseen():
            futures: dict[Future[Row], Point] = {
                pool.submit(run_packed, pack(p.fields), loads[id(p.load)]): p for p in points
            }
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], _DIED
    finally:
        pool.shutdown(cancel_futures=True)


def _packed_loads(points: Sequence[Point]) -> dict[int, bytes]:
    """Each load packed once, however many points share it; by its `id`."""
    return {name: pack(load) for name, load in {id(point.load): point.load for point in points}.items()}


@contextmanager
def _main_unseen() -> Iterator[None]:
    """Processes started meanwhile do not run the user's script again: a sweep needs no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _by_ray(points: Sequence[Point], workers: int) -> Outcomes:
    """Tasks of a Ray cluster: the one that this process is connected to, else one started here with `workers` cores."""
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "backend", "ray", "ray is not installed", "Run `pip install ray`, or leave backend out."
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(max_retries=0)(run_packed)
        loads = {name: ray.put(load) for name, load in _packed_loads(points).items()}
        waiting = {task.remote(pack(point.fields), loads[id(point.load)]): point for point in points}
        while waiting:
            ready = ray.wait(list(waiting), num_returns=1)[0][0]
            point = waiting.pop(ready)
            try:
                yield point, ray.get(ready)
            except ray.exceptions.RayError:
                yield point, _DIED
    finally:
        if started:
            ray.shutdown()


BACKENDS: Mapping[str, Callable[[Sequence[Point], int], Outcomes]] = {
    "processes": _by_processes, "inline": _inline, "ray": _by_ray,
}  # fmt: skip


def _default_workers(points: Sequence[Point]) -> int:
    if not all(point.fields["executor"] == "sim" for point in points):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress_bar(total: int, done: int, wanted: bool) -> Iterator[Callable[[], object]]:
    """A bar on stderr, if that is a terminal; a function that moves it on by one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(TextColumn("sweep"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
                   transient=True, disable=not (wanted and console.is_terminal))  # fmt: skip
    with bar:
        task = bar.add_task("sweep", total=total, completed=done)
        yield lambda: bar.advance(task)
