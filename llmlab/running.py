"""`llmlab.run(config, workload)`: a whole workload through one engine, as a Run."""

from __future__ import annotations

from collections.abc import Callable

from llmlab.config import EngineConfig
from llmlab.engine import Engine
from llmlab.outputs import RequestOutput
from llmlab.runs import Run
from llmlab.workloads.workload import Workload


def run(config: EngineConfig, workload: Workload, on_output: Callable[[RequestOutput], None] | None = None) -> Run:
    """Serve `workload` to its end and return the Run. Simulated or measured, as the config says.

    `on_output` sees every output that changed. Raises ConfigError, ModelError, RequestError.
    """
    with Engine(config) as engine:
        for item in workload.requests(engine.model.vocab_size):
            engine.add_request({"prompt_token_ids": item.prompt_token_ids}, item.sampling, arrival=item.arrival,
                               priority=item.priority, session=item.session, metadata=item.metadata)  # fmt: skip
        while engine.has_unfinished_requests():
            for output in engine.step():
                if on_output is not None:
                    on_output(output)
        return Run.of(engine.log)
