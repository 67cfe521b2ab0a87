"""`llmlab.run(config, workload)`: a whole workload through one engine, as a Run."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.outputs import RequestOutput
from llmlab.runs import Run
from llmlab.types import RequestError
from llmlab.workloads.source import Finished, Load, Source, TimedRequest


def run(config: EngineConfig, workload: Load, on_output: Callable[[RequestOutput], None] | None = None) -> Run:
    """Serve `workload` to its end and return the Run. Simulated or measured, as the config says.

    `on_output` sees every output that changed. A request that the engine refuses is in the log and in
    `metrics.num_refused`, and the run goes on. Raises ConfigError, ModelError, and RequestError if all were refused.
    """
    with Engine(config) as engine:
        serve(engine, workload, on_output)
        return Run.of(engine.log, engine.metrics)


def serve(engine: Engine, workload: Load, on_output: Callable[[RequestOutput], None] | None = None,
          on_finish: Callable[[RequestOutput], None] | None = None) -> None:  # fmt: skip
    """Feed `workload` to an engine and step it until nothing is left to do; in leaps where nobody watches every output
    (`on_output`) and the executor allows it. `on_finish` sees those that are finished. Raises RequestError if all were
    refused."""
    feed = Feed(engine, workload.source(engine.model.vocab_size))
    advance = engine.leap if on_output is None else engine.step
    while feed.pour():
        for output in advance():
            feed.take(output)
            if on_output is not None:
                on_output(output)
            if on_finish is not None and output.finished:
                on_finish(output)
    if feed.refusal is not None and not feed.num_accepted:
        raise feed.refusal


class Feed:
    """Hands an engine its requests when their time has come, so that prompts yet to come need no memory, and tells the
    source who finished."""

    def __init__(self, engine: Engine, source: Source) -> None:
        self.num_accepted = 0
        self.refusal: RequestError | None = None
        self._engine, self._source = engine, source
        self._arriving = source.arriving()
        self._horizon = -math.inf  # the last arrival that the engine knows of
        self._asked: dict[str, TimedRequest] = {}

    def pour(self) -> bool:
        """Hand over what has arrived, and the one after it, which tells the engine how far to wait. False: all is done."""
        while self._horizon <= self._engine.clock.now():
            request = next(self._arriving, None)
            if request is None:
                self._horizon = math.inf
            elif self._ask([request]):
                self._horizon = request.arrival
        return self._engine.has_unfinished_requests()

    def take(self, output: RequestOutput) -> None:
        """An output that changed: if it is the last of its request, ask what follows from it."""
        if output.finished:
            request = self._asked.pop(output.request_id)
            tokens = output.outputs[0].token_ids
            self._ask(list(self._source.on_finish(Finished(request, tokens, self._engine.clock.now()))))

    def _ask(self, requests: list[TimedRequest]) -> bool:
        """Whether the engine took any of `requests`, or of those that came in the place of refused ones."""
        before = self.num_accepted
        while requests:
            request = requests.pop(0)
            try:
                name = self._engine.add_request(
                    {"prompt_token_ids": request.prompt_token_ids}, request.sampling, request_id=request.id,
                    arrival=request.arrival, priority=request.priority, session=request.session, metadata=request.metadata,
                )  # fmt: skip
            except RequestError as error:
                self.refusal = self.refusal or error
                end = Finished(request, (), max(self._engine.clock.now(), request.arrival), refused=True)
                requests += self._source.on_finish(end)
            else:
                self._asked[name] = request
                self.num_accepted += 1
        return self.num_accepted > before
