"""All metrics, as folds of events. Definitions with symbols: docs/metrics.md.

A fold of a live run keeps its newest requests one by one and adds the older ones up (`Past`), so its memory is bounded
however many there are.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from llmlab.events import catalog as ev
from llmlab.events.quantiles import Quantiles
from llmlab.types import Cost


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request in seconds of the run's clock; NaN-free: what has not happened is None."""

    request: str
    arrival: float
    num_prompt_tokens: int
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    finish_reason: str = ""
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_computed_tokens: int = 0  # the high-water mark: tokens whose KV existed at some time
    token_times: list[float] = field(default_factory=list)

    @property
    def queue_time(self) -> float | None:
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None with fewer than two."""
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Gaps between consecutive releases."""
        return [b - a for a, b in pairwise(self.token_times)]

    @property
    def e2e(self) -> float | None:
        """End-to-end latency."""
        return None if self.finished is None else self.finished - self.arrival


@dataclass(frozen=True)
class Summary:
    """Mean and percentiles of one quantity (nearest rank); all None without samples."""

    n: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Summary:
        data = sorted(v for v in values if v is not None)
        if not data:
            return cls(0, None, None, None, None, None)
        p50, p90, p99 = (percentile(data, q) for q in (50, 90, 99))
        return cls(len(data), statistics.fmean(data), p50, p90, p99, data[-1])

    @classmethod
    def joined(cls, past: Quantiles, values: Iterable[float | None]) -> Summary:
        """Of what was counted before and `values` together."""
        if not past.n:
            return cls.of(values)
        whole = past.copy()
        whole.extend(v for v in values if v is not None)
        p50, p90, p99 = (whole.percentile(q) for q in (50, 90, 99))
        return cls(whole.n, whole.mean, p50, p90, p99, whole.largest)


def percentile(ordered: Sequence[float], q: float) -> float:
    """Nearest-rank percentile of ascending data, q in (0, 100]."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


@dataclass(frozen=True)
class RunMetrics:
    """A run in numbers. `mode` says whether time was measured or simulated. Seconds, tokens, ratios."""

    mode: str
    duration: float
    num_requests: int
    num_finished: int
    num_refused: int
    num_steps: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    num_preemptions: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    recompute_tax: float
    prefix_hit_rate: float
    mean_batch: float
    max_kv_blocks: int
    schedule_share: float
    drafted_tokens: int
    accepted_tokens: int
    wasted_tokens: int
    wasted_joules: float
    padded_tokens: int
    acceptance_rate: float
    tokens_per_verification: float
    ttft: Summary
    tpot: Summary
    itl: Summary
    e2e: Summary
    queue_time: Summary
    predicted_over_measured: Summary
    mfu: Summary
    mbu: Summary

    def rows(self) -> list[tuple[str, Any]]:
        """(name, value) pairs, flat, in the order of the page that defines them."""
        flat: list[tuple[str, Any]] = []
        for name, value in vars(self).items():
            if isinstance(value, Summary):
                flat += [(f"{stat}_{name}", getattr(value, stat)) for stat in ("mean", "p50", "p90", "p99")]
            else:
                flat.append((name, value))
        return flat


def acceptance_by_position(events: Iterable[ev.Event]) -> list[float]:
    """How often the i-th draft of a chain held, of those that were reached: all drafts before them held."""
    tried, held = [0] * 64, [0] * 64
    for event in events:
        if isinstance(event, ev.Verified):
            for i in range(min(64, len(event.accepted) + bool(event.rejected))):
                tried[i] += 1
                held[i] += i < len(event.accepted)
    return [h / t for h, t in zip(held, tried) if t]


SUMMARIES = ("ttft", "tpot", "e2e", "queue_time")


class Past:
    """Requests that ended long ago, and steps: sums and counted values, no longer one by one."""

    def __init__(self) -> None:
        self.num_requests = self.prompt_tokens = self.output_tokens = 0
        self.cached_tokens = self.recomputed_tokens = self.num_preemptions = 0
        self.times = {name: Quantiles() for name in SUMMARIES}
        self.itl, self.ratios, self.mfu, self.mbu = Quantiles(), Quantiles(), Quantiles(), Quantiles()

    def take(self, requests: Sequence[RequestMetrics]) -> None:
        """Add finished requests."""
        self.num_requests += len(requests)
        self.prompt_tokens += sum(r.num_prompt_tokens for r in requests)
        self.output_tokens += sum(r.num_output_tokens for r in requests)
        self.cached_tokens += sum(r.num_cached_tokens for r in requests)
        self.recomputed_tokens += sum(r.num_recomputed_tokens for r in requests)
        self.num_preemptions += sum(r.num_preemptions for r in requests)
        for name, counted in self.times.items():
            counted.extend(value for r in requests if (value := getattr(r, name)) is not None)


class MetricsFold:
    """Folds events one by one; usable as a sink of a live log. Handlers only read the event.

    `keep`: how many requests that have ended are kept one by one in `requests`, at least, an eighth of them with the times of
    their tokens; None keeps all. Percentiles over more than that are off by up to 0.05 %.
    """

    def __init__(self, keep: int | None = None) -> None:
        self.requests: dict[str, RequestMetrics] = {}
        self.past = Past()
        self._keep = keep
        self._ended: deque[str] = deque()
        self._timed: deque[str] = deque()  # those of them whose times of tokens are still there
        self.mode = "measured"
        self.num_steps = self.num_refused = self.max_kv_blocks = 0
        self.end = 0.0
        self._start: float | None = None
        self._batch_tokens = 0
        self._schedule = self._execute = 0.0
        self._predicted: dict[int, Cost] = {}
        self._ratios: list[float] = []
        self._peak = self._bandwidth = 0.0
        self._mfu: list[float] = []
        self._mbu: list[float] = []
        self._joules_per_token: dict[int, float] = {}
        self._drafts = self._accepted = self._rejected = self._verifications = self._wasted = 0
        self._wasted_joules = 0.0
        self._padded = 0
        self._handlers = {
            ev.RunStarted: self._run_started, ev.RequestArrived: self._arrived, ev.RequestRefused: self._refused,
            ev.RequestAdmitted: self._admitted, ev.RequestPreempted: self._preempted,
            ev.TokensReleased: self._released, ev.RequestFinished: self._finished, ev.StepPlanned: self._planned,
            ev.StepFinished: self._step_finished, ev.Leapt: self._leapt, ev.RolledBack: self._rolled_back,
            ev.Drafted: self._drafted, ev.Verified: self._verified,
        }  # fmt: skip

    def write(self, event: ev.Event) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)  # type: ignore[operator]

    def close(self) -> None:
        pass

    def forget(self, request: str) -> None:
        """Drop a finished request (long-lived servers)."""
        self.requests.pop(request, None)

    # ------------------------------------------------------------------------------------ handlers
    def _run_started(self, event: ev.RunStarted) -> None:
        self.mode = event.mode
        self._peak, self._bandwidth = (float(event.hardware.get(name) or 0.0) for name in ("peak", "bandwidth"))

    def _arrived(self, event: ev.RequestArrived) -> None:
        spec = event.spec
        self._start = spec.arrival if self._start is None else min(self._start, spec.arrival)
        self.requests[spec.id] = RequestMetrics(spec.id, spec.arrival, len(spec.prompt_token_ids))

    def _refused(self, event: ev.RequestRefused) -> None:
        self.num_refused += 1

    def _admitted(self, event: ev.RequestAdmitted) -> None:
        request = self.requests[event.request or ""]
        if request.first_scheduled is None:
            request.first_scheduled = event.t
        request.num_cached_tokens += event.num_cached_tokens

    def _preempted(self, event: ev.RequestPreempted) -> None:
        request = self.requests[event.request or ""]
        request.num_preemptions += 1

    def _released(self, event: ev.TokensReleased) -> None:
        request, times = self.requests[event.request or ""], event.times or (event.t,)
        if request.first_token is None:
            request.first_token = times[0]
        request.last_token = times[-1]
        request.num_output_tokens += len(event.token_ids)
        request.token_times.extend(times)

    def _finished(self, event: ev.RequestFinished) -> None:
        request = self.requests[event.request or ""]
        request.finished, request.finish_reason = event.t, event.reason
        self.end = event.t
        self._ended.append(request.request)
        self._timed.append(request.request)
        if self._keep is not None and len(self._timed) >= self._keep // 4:
            self._condense_times(self._keep // 8)
        if self._keep is not None and len(self._ended) >= 2 * self._keep:
            self._condense(self._keep)

    def _condense_times(self, keep: int) -> None:
        """Of older requests, count the gaps between tokens. Whoever holds a request's metrics keeps its own."""
        gone = [found for _ in range(len(self._timed) - keep) if (found := self.requests.get(self._timed.popleft())) is not None]
        self.past.itl.extend(gap for r in gone for gap in r.itl)
        self.requests.update({r.request: replace(r, token_times=[]) for r in gone})

    def _condense(self, keep: int) -> None:
        """Add the oldest ended requests up, all but `keep`."""
        gone = [self._ended.popleft() for _ in range(len(self._ended) - keep)]
        self.past.take([found for name in gone if (found := self.requests.pop(name, None)) is not None])
        for counted, values in ((self.past.ratios, self._ratios), (self.past.mfu, self._mfu), (self.past.mbu, self._mbu)):
            counted.extend(values)
            values.clear()

    def _planned(self, event: ev.StepPlanned) -> None:
        if event.predicted is not None:
            self._predicted[event.step] = event.predicted
            self._joules_per_token[event.step] = event.predicted.joules / max(1, event.num_tokens)
        requests = self.requests
        for item in event.items:
            request, (start, stop) = requests[item.request], item.tokens
            computed = request.num_computed_tokens
            if start < computed and item.kv_write == "append":
                request.num_recomputed_tokens += min(stop, computed) - start
            if stop > computed:
                request.num_computed_tokens = stop

    def _rolled_back(self, event: ev.RolledBack) -> None:
        request = self.requests[event.request or ""]
        request.num_computed_tokens = min(request.num_computed_tokens, event.num_computed_tokens)
        self._wasted += event.tokens_wasted
        self._wasted_joules += event.tokens_wasted * self._joules_per_token.get(event.step, 0.0)

    def _drafted(self, event: ev.Drafted) -> None:
        self._drafts += len(event.token_ids)

    def _verified(self, event: ev.Verified) -> None:
        self._verifications += 1
        self._accepted += len(event.accepted)
        self._rejected += len(event.rejected)

    def _step_finished(self, event: ev.StepFinished) -> None:
        self.num_steps += 1
        self.end = event.t
        self.max_kv_blocks = max(self.max_kv_blocks, event.used_blocks)
        self._schedule += event.measured.schedule + event.measured.commit
        self._execute += event.measured.execute
        self._batch_tokens += event.num_tokens
        self._padded += event.measured.padded_tokens
        predicted = self._predicted.pop(event.step, None)
        self._joules_per_token.pop(event.step, None)
        seconds = event.measured.execute
        if predicted is not None and seconds:
            if predicted.seconds:
                self._ratios.append(predicted.seconds / seconds)
            if self._peak:
                self._mfu.append(predicted.flops / seconds / self._peak)
            if self._bandwidth:
                self._mbu.append(predicted.bytes.hbm / seconds / self._bandwidth)

    def _leapt(self, event: ev.Leapt) -> None:
        self.num_steps += event.num_steps
        self.end = event.t
        self.max_kv_blocks = max(self.max_kv_blocks, event.used_blocks)
        self._execute += event.seconds
        self._batch_tokens += event.num_tokens

    # --------------------------------------------------------------------------------------- result
    def result(self) -> RunMetrics:
        done, past = list(self.requests.values()), self.past
        prompt = past.prompt_tokens + sum(r.num_prompt_tokens for r in done)
        output = past.output_tokens + sum(r.num_output_tokens for r in done)
        cached = past.cached_tokens + sum(r.num_cached_tokens for r in done)
        lost = past.recomputed_tokens + sum(r.num_recomputed_tokens for r in done)
        duration = max(0.0, self.end - (self._start or 0.0))
        finished = past.num_requests + sum(1 for r in done if r.finished is not None)
        per_second = 1 / duration if duration else 0.0
        busy = self._schedule + self._execute
        ttft, tpot, e2e, queue = (Summary.joined(past.times[name], (getattr(r, name) for r in done)) for name in SUMMARIES)
        return RunMetrics(
            mode=self.mode, duration=duration, num_requests=past.num_requests + len(done), num_finished=finished,
            num_refused=self.num_refused, num_steps=self.num_steps, prompt_tokens=prompt, output_tokens=output,
            cached_tokens=cached, computed_tokens=self._batch_tokens, recomputed_tokens=lost,
            num_preemptions=past.num_preemptions + sum(r.num_preemptions for r in done),
            request_throughput=finished * per_second, output_throughput=output * per_second,
            total_token_throughput=(prompt + output) * per_second,
            recompute_tax=lost / self._batch_tokens if self._batch_tokens else 0.0,
            prefix_hit_rate=cached / (cached + self._batch_tokens) if cached else 0.0,
            mean_batch=self._batch_tokens / self.num_steps if self.num_steps else 0.0,
            max_kv_blocks=self.max_kv_blocks, schedule_share=self._schedule / busy if busy else 0.0,
            drafted_tokens=self._drafts, accepted_tokens=self._accepted, wasted_tokens=self._wasted,
            wasted_joules=self._wasted_joules, padded_tokens=self._padded,
            acceptance_rate=self._accepted / (self._accepted + self._rejected) if self._accepted else 0.0,
            tokens_per_verification=1 + self._accepted / self._verifications if self._verifications else 0.0,
            ttft=ttft, tpot=tpot, e2e=e2e, queue_time=queue, mfu=Summary.joined(past.mfu, self._mfu),
            mbu=Summary.joined(past.mbu, self._mbu), itl=Summary.joined(past.itl, (gap for r in done for gap in r.itl)),
            predicted_over_measured=Summary.joined(past.ratios, self._ratios),
        )  # fmt: skip


class LiveMetrics:
    """The metrics of a running log, as a sink that folds a few steps at a time: between two kernels each request that is
    touched costs cache misses, and nobody looks at metrics in every step."""

    def __init__(self, keep: int | None = None, lag: int = 512) -> None:
        self._fold = MetricsFold(keep)
        self._behind: list[ev.Event] = []
        self._lag = lag

    def write(self, event: ev.Event) -> None:
        self._behind.append(event)
        if len(self._behind) >= self._lag:
            self.read()

    def read(self) -> MetricsFold:
        """The fold, with everything in it that was written."""
        for event in self._behind:
            self._fold.write(event)
        self._behind.clear()
        return self._fold

    def close(self) -> None:
        self.read()


def fold(events: Iterable[ev.Event]) -> MetricsFold:
    """The metrics of a list of events."""
    metrics = MetricsFold()
    for event in events:
        metrics.write(event)
    return metrics
