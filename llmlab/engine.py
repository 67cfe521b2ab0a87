"""The engine: one loop around a pure scheduler and an executor.

    ingest -> schedule -> submit -> (collect -> commit) -> outputs

`overlap_depth` steps may be in flight while the next is planned: 0 is synchronous, 1 hides the scheduler and the
detokenizer behind the executor. The same code drives the real and the simulated executor.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmlab.assembly import Assembly, assemble
from llmlab.config import DRAFT_FIELDS, EngineConfig, engine_config
from llmlab.decoding.draft_sizes import described
from llmlab.events import catalog as ev
from llmlab.events.metrics import MetricsFold, RequestMetrics
from llmlab.execution.base import StepBatch, Ticket, row_of
from llmlab.execution.sim_executor import SimExecutor
from llmlab.outputs import AnswerState, RequestOutput
from llmlab.prompts import Prompt, checked_token_ids, token_ids_of
from llmlab.scheduling.core import Update
from llmlab.scheduling.steady import Steady
from llmlab.types import (
    DEVICE,
    FinishReason,
    ItemResult,
    LabError,
    Request,
    RequestError,
    SamplingParams,
    StepPlan,
    StepResult,
    unknown_name,
)  # fmt: skip

# What `Engine.reconfigure` may change while the engine runs.
LIVE_FIELDS = ("ordering", "admission", "composer", "victim", "tiering", "eviction", "max_num_batched_tokens",
               "max_num_seqs", "num_blocks", *DRAFT_FIELDS)  # fmt: skip


class Engine:
    """A complete engine. `Engine(config)` or `Engine(model="lab-s", block_size=16, ...)`.

    Not thread-safe: one thread adds, aborts and steps. Raises ConfigError or ModelError on construction,
    RequestError on requests that cannot be served; whatever else runs goes on.
    """

    def __init__(self, config: EngineConfig | None = None, parts: Assembly | None = None, **fields: Any) -> None:
        self.config = config if config is not None else engine_config(**fields)
        parts = assemble(self.config) if parts is None else parts
        self.scheduler = parts.scheduler
        self.executor = parts.executor
        self.clock = parts.clock
        self.log = parts.log
        self.tokenizer = parts.tokenizer
        self._metrics = parts.metrics
        self.model = parts.model
        self.limits = parts.limits
        self.redraft = parts.redraft
        self._future: list[tuple[float, int, Request]] = []
        self._answers: dict[str, AnswerState] = {}
        self._groups: dict[str, list[str]] = {}
        self._forget: list[str] = []
        self._inflight: deque[tuple[StepPlan, Ticket]] = deque()
        self._schedule_seconds: dict[int, float] = {}
        self._commit_seconds = 0.0
        self._num_requests = 0
        self._closed = False
        self._lost = ""  # why nothing runs here any more
        self._steady: Steady | None = None
        if isinstance(self.executor, SimExecutor) and not self.config.overlap_depth:
            self._steady = Steady(self.scheduler, self.executor)
        self._check_interval = sampled_interval(self.config.check_interval, self.scheduler.memory.pool.num_blocks)

    # -------------------------------------------------------------------------------- requests
    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None,
                    arrival: float | None = None, priority: int = 0, deadline: float | None = None,
                    session: str | None = None, metadata: Mapping[str, Any] | None = None) -> str:  # fmt: skip
        """Queue a prompt; the request's id. `arrival` (seconds of the run's clock) may lie in the future.

        Prompts: text, token ids, chat messages, or {"prompt_token_ids": [...]}. Raises RequestError.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError("params", params, "is not a SamplingParams", "Write SamplingParams(max_tokens=...).")
        request_id = self._free_id(request_id, params.n)
        try:
            if self._lost:
                raise RequestError("engine", self.config.device, f"has lost its device and runs nothing any more: {self._lost}",
                                   "Make a new engine; after a fault of a GPU, in a new process.")  # fmt: skip
            if params.deterministic and str(self.executor.describe().get("device", "")).startswith("cuda") \
                    and self.executor.mode == "measured":  # fmt: skip
                raise RequestError("deterministic", True, "passes of a fixed shape run on the CPU only so far",
                                   "Use device='cpu', or leave it out.")  # fmt: skip
            if params.stop and self.tokenizer is None:
                raise RequestError("stop", params.stop, "this engine has no tokenizer, so it sees no text",
                                   "Use stop_token_ids.")  # fmt: skip
            ids = checked_token_ids(self._token_ids(prompt), self.model.vocab_size, self.limits)
            longest = self.limits.max_model_len
            template = checked_request(Request(
                request_id, 0, ids, params, self.clock.now() if arrival is None else arrival, priority, deadline, session,
                max_total_tokens=longest if params.max_tokens is None else min(longest, len(ids) + params.max_tokens),
                eos_token_ids=self.model.eos_token_ids, metadata={} if metadata is None else metadata,
            ))  # fmt: skip
        except RequestError as error:
            self.log.emit(ev.RequestRefused, request_id, reason=str(error))
            raise
        parent = RequestOutput(request_id, prompt if isinstance(prompt, str) else None, ids, [])
        self._groups[request_id] = [self._queue(template, parent, i) for i in range(params.n)]
        return request_id

    def _token_ids(self, prompt: Prompt) -> Sequence[Any]:
        try:
            return token_ids_of(prompt, self.tokenizer)
        except (TypeError, ValueError) as error:  # no list of ids, or text that no tokenizer can read
            if isinstance(error, LabError):
                raise
            raise RequestError("prompt", prompt, f"cannot be read ({error})", "Give text, or a list of token ids.") from None

    def _free_id(self, wanted: str | None, n: int) -> str:
        """The id that the client chose, or a new one. An id names one request in the whole run's log."""
        if wanted is None:
            number = self._num_requests
            while self._taken(f"r{number}", n):
                number += 1
            return f"r{number}"
        if not isinstance(wanted, str) or not wanted.isprintable() or not wanted:
            raise RequestError("request_id", wanted, "must be a printable, non-empty string", "Leave it out to get one.")
        if self._taken(wanted, n):
            raise RequestError("request_id", wanted, "is already in use", "Choose another id, or leave it out.")
        return wanted

    def _taken(self, request_id: str, n: int) -> bool:
        names = [request_id] if n == 1 else [f"{request_id}#{index}" for index in range(n)]
        return request_id in self._groups or any(name in self._answers or name in self.metrics.requests for name in names)

    def _queue(self, template: Request, parent: RequestOutput, index: int) -> str:
        """One of the `n` answers of a request; all but the first share the first one's prompt."""
        request = msgspec.structs.replace(template, number=self._num_requests)
        if template.sampling.n > 1:
            metadata = {**template.metadata, "sample": index}
            sibling = f"{template.id}#0" if index else None
            request = msgspec.structs.replace(request, id=f"{template.id}#{index}", fork_of=sibling, metadata=metadata)
        self._num_requests += 1
        state = AnswerState(request, parent, index, self.tokenizer.incremental() if self.tokenizer else None)
        parent.outputs.append(state.output)
        self._answers[request.id] = state
        heapq.heappush(self._future, (request.arrival, request.number, request))
        return request.id

    def expect(self, request: Request) -> None:
        """Queue a ready-made request, as a replay or a fork does; its output is not put together."""
        heapq.heappush(self._future, (request.arrival, request.number, request))

    def adopt(self, plan: StepPlan, ticket: Ticket) -> None:
        """Take over a step that somebody else submitted; it will be collected in its turn."""
        self._inflight.append((plan, ticket))

    def abort(self, request_id: str) -> None:
        """End a request now; it keeps the tokens that it has. Unknown or finished ids are ignored."""
        self.settle()
        for name in self._groups.get(request_id, ()):
            if name in self._answers and self._answers[name].output.finish_reason is None:
                self._admit_early(name)
                self._end(name, "abort", None)
        if request_id in self._groups:
            self._close_group(request_id)

    def reconfigure(self, **changes: Any) -> None:
        """Change policies, budget, seats, drafting or the number of KV blocks while requests are here; it holds from the
        next step on, and the log tells of it. Raises ConfigError for a field that is fixed, or a value that cannot be."""
        for name in changes:
            if name not in LIVE_FIELDS:
                raise unknown_name("reconfigure", name, LIVE_FIELDS)
        self.settle()
        config = msgspec.structs.replace(self.config, **changes)
        if all(name not in changes for name in DRAFT_FIELDS):
            self.scheduler.reconfigure(changes, self.clock.now())
        else:
            drafting = self.redraft(config)
            told = {name: getattr(config, name) for name in DRAFT_FIELDS}
            sizes = {"draft": described(drafting.sizes)} if drafting.sizes is not None else {}
            self.scheduler.reconfigure({**changes, **told, **sizes}, self.clock.now())
            self.executor.draft_with(drafting.side)
        self.config, self.limits = config, self.scheduler.limits

    def _admit_early(self, name: str) -> None:
        """An aborted request that has not arrived yet arrives now, so that the log knows of it."""
        for entry in self._future:
            if entry[2].id == name:
                self._future.remove(entry)
                heapq.heapify(self._future)
                now = self.clock.now()
                self.scheduler.add(msgspec.structs.replace(entry[2], arrival=min(now, entry[0])), now)
                return

    def _end(self, name: str, reason: FinishReason, stop_reason: str | None) -> None:
        self.scheduler.finish(name, reason, stop_reason or "")
        self._answers[name].end(reason, stop_reason)
        self._forget.append(name)

    def has_unfinished_requests(self) -> bool:
        return bool(self._future) or self.scheduler.has_work

    @property
    def metrics(self) -> MetricsFold:
        """What the events so far add up to."""
        return self._metrics.read()

    @property
    def chosen(self) -> str:
        """What a GPU got (format, kernels, KV) and why, in one line; "" elsewhere."""
        return next((str(event.hardware.get("chosen", "")) for event in self.log.filter(ev.RunStarted)), "")

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self._future)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    # ------------------------------------------------------------------------------------ the loop
    def step(self) -> list[RequestOutput]:
        """One turn of the loop; the outputs that changed."""
        early = self.settle()
        if early:
            return [*early, *(output for output in self._turn() if output not in early)]
        return self._turn()

    def settle(self) -> list[RequestOutput]:
        """Bring everything up to date with the leaps taken, which tell of a request's tokens only when it ends; the outputs
        that changed. `step`, `abort`, `reconfigure` and `close` do it themselves."""
        return self._outputs(self._steady.settle()) if self._steady is not None else []

    def _turn(self) -> list[RequestOutput]:
        self._ingest()
        began = time.perf_counter()
        plan = self.scheduler.schedule(self.clock.now())
        if plan is not None:
            self._schedule_seconds[plan.step] = time.perf_counter() - began
            self._inflight.append((plan, self.executor.submit(self.batch_of(plan))))
        if self._inflight and (plan is None or len(self._inflight) > self.config.overlap_depth):
            return self._collect()
        if plan is None and not self._inflight:
            self._wait_for_arrival()
        return []

    def leap(self) -> list[RequestOutput]:
        """As many turns of the loop as nothing can change in, taken at once; the outputs that changed. One turn where the
        future is not known: with a real executor, with steps in flight, with policies that must be asked
        (`llmlab.scheduling.steady`). The run is the same, only the caller hears of many tokens at a time: see `settle`."""
        self._ingest()
        if self._steady is None or self._inflight:
            return self.step()
        first = self.scheduler.next_step
        updates = self._steady.leap(self._future[0][0] if self._future else math.inf)
        if updates is None:
            return self.step()
        if isinstance(self.executor, SimExecutor):  # nobody submits a batch that would tell it
            self.executor.forget(self._forget)
            self._forget = []
        interval, last = self._check_interval, self.scheduler.next_step - 1
        if interval and last // interval * interval >= first:
            self._check(last // interval * interval)
        return self._outputs(updates)

    def _ingest(self) -> None:
        while self._future and self._future[0][0] <= self.clock.now():
            request = heapq.heappop(self._future)[2]
            self.scheduler.add(request, self.clock.now())

    def _wait_for_arrival(self) -> None:
        if self._future:
            self.clock.advance_to(self._future[0][0])
        elif self.scheduler.has_work:
            stuck = ", ".join(list(self.scheduler.sequences)[:5])
            self.log.emit(ev.InvariantViolated, what=f"nothing can run although {stuck} are unfinished")
            raise RuntimeError(f"llmlab cannot make progress; unfinished: {stuck}. This is a bug: please report the trace.")

    def batch_of(self, plan: StepPlan) -> StepBatch:
        """A plan as the executor gets it, with what has to be forgotten before it."""
        tables, sequences = self.scheduler.memory.tables, self.scheduler.sequences
        size = self.config.block_size
        rows = tuple(
            row_of(i, sequences[i.request].request,
                   tables[i.request].block_ids if i.home == "device" else tables[i.request].host_block_ids, size)
            for i in plan.items
        )  # fmt: skip
        forget, self._forget = tuple(self._forget), []
        return StepBatch(plan, rows, forget)

    def _collect(self) -> list[RequestOutput]:
        plan, ticket = self._inflight.popleft()
        result = self._timed(ticket.result())
        began = time.perf_counter()
        updates = self.scheduler.commit(result)
        if DEVICE in result.lost:
            self._lost = result.why
            updates += self._end_arriving(result.why)
        self._commit_seconds = time.perf_counter() - began
        self._check(plan.step)
        return self._outputs(updates)

    def _end_arriving(self, why: str) -> list[Update]:
        """Requests that were to arrive later arrive now, and end with the reason."""
        names = [request.id for _, _, request in sorted(self._future)]
        for name in names:
            self._admit_early(name)
            self.scheduler.finish(name, "error", why)
        return [Update(name, (), ItemResult(name, error=why), "error") for name in names]

    def _timed(self, result: StepResult) -> StepResult:
        """The result with the core's own times: of planning this step, and of committing the one before."""
        schedule = self._schedule_seconds.pop(result.step, 0.0)
        if self.executor.mode == "simulated":
            return result
        durations = msgspec.structs.replace(result.durations, schedule=schedule, commit=self._commit_seconds)
        return msgspec.structs.replace(result, durations=durations)

    def _check(self, step: int) -> None:
        interval = self._check_interval
        if interval and step % interval == 0:
            problems = self.scheduler.problems()
            if problems:
                self.log.emit(ev.InvariantViolated, what="; ".join(problems[:5]))
                raise RuntimeError("llmlab's memory is inconsistent: " + "; ".join(problems[:5]))

    # ----------------------------------------------------------------------------------- outputs
    def _outputs(self, updates: Sequence[Update]) -> list[RequestOutput]:
        changed: dict[str, RequestOutput] = {}
        ended: dict[str, None] = {}
        for update in updates:
            state = self._answers.get(update.request)
            if state is None:
                continue
            stop = state.apply(update)
            if stop is not None:
                self._end(update.request, "stop", stop)
            elif update.finish_reason is not None:
                self._forget.append(update.request)
            changed[state.parent.request_id] = state.parent
            if state.output.finish_reason is not None:
                ended[state.parent.request_id] = None
        for request_id in ended:
            self._close_group(request_id)
        return list(changed.values())

    def _close_group(self, request_id: str) -> None:
        """Mark a request finished when all its answers are, and let go of its state."""
        names = self._groups[request_id]
        states = [self._answers[name] for name in names]
        if any(state.output.finish_reason is None for state in states):
            return
        parent = states[0].parent
        parent.finished = True
        parent.metrics = self._request_metrics(names)
        for name in names:
            del self._answers[name]
        del self._groups[request_id]

    def _request_metrics(self, names: Sequence[str]) -> RequestMetrics | None:
        return self.metrics.requests.get(names[0])

    # -------------------------------------------------------------------------------------- end
    def close(self) -> None:
        """Stop the executor and flush the trace. Idempotent."""
        if not self._closed:
            self._closed = True
            self.settle()
            self.executor.close()
            self.log.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def checked_request(request: Request) -> Request:
    """`request` with its metadata as a log holds it: policies must see what a replay will see. Raises RequestError."""
    for field, value in (("arrival", request.arrival), ("deadline", request.deadline)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < float("inf")):
            raise RequestError(field, value, "must be a number of seconds, 0 or more", "Leave it out for now or never.")
    if not isinstance(request.priority, int) or abs(request.priority) >= 2**63:
        raise RequestError("priority", request.priority, "must be an integer of 64 bits", "Smaller goes first; 0 is usual.")
    if request.session is not None and not (isinstance(request.session, str) and request.session.isprintable()):
        raise RequestError("session", request.session, "must be a printable string", "Leave it out if there is none.")
    try:
        metadata = msgspec.json.decode(msgspec.json.encode(dict(request.metadata)))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError("metadata", request.metadata, f"is not plain data ({error})",
                           "Use strings, numbers, lists and dicts.") from None  # fmt: skip
    if "sample" in metadata:
        raise RequestError("metadata", request.metadata, "the key 'sample' is the engine's own", "Choose another key.")
    return msgspec.structs.replace(request, metadata=metadata)


def sampled_interval(interval: int, num_blocks: int) -> int:
    """Steps between two integrity checks. A check looks at every block, so large pools are checked less often
    unless every step was asked for (1); 0 means never."""
    return interval if interval <= 1 else max(interval, num_blocks // 4)
