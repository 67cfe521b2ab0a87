"""Forks: continue a recorded history under other policies, on the simulated executor.

    recorded   0 ------------ at ----------------- end
    fork       0 ====replay== at ~~~simulated~~~~~ end'

Up to `at` the recorded inputs are replayed with the recorded policies; they must reproduce the recorded decisions, or
the fork is refused. From then on the new policies decide, time is simulated, requests still to come arrive when they
did, and each gets the tokens that it got (so lengths are the true ones).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmlab.assembly import Assembly, ModelFacts, policies_of
from llmlab.config import SEAM_FIELDS, EngineConfig
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.metrics import MetricsFold
from llmlab.events.replay import ReplayClock, compare, feed
from llmlab.events.trace import Run
from llmlab.execution.base import Done
from llmlab.execution.cost import RooflineCost
from llmlab.execution.sim_executor import PseudoTokens, SimExecutor
from llmlab.replaying import recorded_config, recorded_scheduler
from llmlab.scheduling.scheduler import Scheduler
from llmlab.types import Request, StepPlan, StepResult, TraceError, unknown_name
from roofline.shapes import Shape


class RecordedTokens:
    """Each request gets the tokens that it got in the recorded run; behind their end, pseudo-random ones."""

    def __init__(self, run: Run, vocab_size: int) -> None:
        self._outputs: dict[str, list[int]] = {}
        for event in run.events("TokensReleased"):
            self._outputs.setdefault(event.request, []).extend(event.token_ids)
        self._more = PseudoTokens(vocab_size, run.started.seed)

    def token(self, request: Request, position: int) -> int:
        outputs, index = self._outputs.get(request.id, []), position - request.num_prompt_tokens
        return outputs[index] if index < len(outputs) else self._more.token(request, position)

    def length(self, request: str) -> int:
        return len(self._outputs.get(request, []))


class OutsideEnds:
    """Finishes that came from outside in the recorded run and lie in the fork's future: stop strings happen again
    at the same token, aborts at the same time."""

    def __init__(self, events: Sequence[ev.Event], tokens: RecordedTokens) -> None:
        ends = [e for e in events if isinstance(e, ev.FinishRequested) and e.request is not None]
        self._at_token = {e.request: (tokens.length(e.request or ""), e) for e in ends if e.reason == "stop"}
        self._at_time = sorted((e for e in ends if e.reason != "stop"), key=lambda e: (e.t, e.seq))

    def apply(self, engine: Engine) -> None:
        now = engine.clock.now()
        while self._at_time and self._at_time[0].t <= now:
            event = self._at_time.pop(0)
            engine.scheduler.finish(event.request or "", event.reason, event.detail)
        for name, (length, event) in list(self._at_token.items()):
            seq = engine.scheduler.sequences.get(name or "")
            if seq is not None and seq.num_output_tokens >= length:
                del self._at_token[name]
                engine.scheduler.finish(seq.id, event.reason, event.detail)


def fork(run: Run, at: int, recorded: Mapping[str, Any] | None = None, **changes: Any) -> list[ev.Event]:
    """The events of a fork of `run` right after step `at`. `changes`: seams of EngineConfig (objects or names).

    `recorded`: the plug-in objects of the recorded run that are not registered under their names. Raises TraceError
    for a step that the run does not have, ConfigError for changes that are no seam or a policy that is missing.
    """
    for name in changes:
        if name not in SEAM_FIELDS:
            raise unknown_name("fork", name, SEAM_FIELDS)
    clock = ReplayClock()
    scheduler = recorded_scheduler(run, clock, **(recorded or {}))
    scheduler.log.append(_forked_start(run, at, changes))
    position = _replay_until(run, scheduler, clock, at)
    _prove(run, scheduler, position, at)
    config = recorded_config(run, **{**(recorded or {}), **changes})
    scheduler.adopt(policies_of(config, scheduler.log), clock.now())
    engine = _engine(run, config, scheduler, clock)
    _continue(run, engine, position)
    return list(scheduler.log)


def _forked_start(run: Run, at: int, changes: Mapping[str, Any]) -> ev.RunStarted:
    from llmlab.registry import policy_name

    named = {name: choice if isinstance(choice, str) else policy_name(choice) for name, choice in changes.items()}
    config = {**run.started.config, **named, "forked_at": at}
    return msgspec.structs.replace(run.started, seq=0, mode="simulated", config=config)


def _replay_until(run: Run, scheduler: Scheduler, clock: ReplayClock, at: int) -> int:
    """Feed recorded inputs up to StepFinished(at); the index of the event behind it."""
    for index, event in enumerate(run.log_events):
        clock.t = event.t
        feed(scheduler, event)
        if isinstance(event, ev.StepFinished) and event.step == at:
            return index + 1
    raise TraceError("at", at, "has not finished in this run", "`run.steps` lists the steps.")


def _prove(run: Run, scheduler: Scheduler, position: int, at: int) -> None:
    """Refuse to fork a history that the recorded policies do not reproduce."""
    differences = compare(run.log_events[:position], tuple(scheduler.log))
    if differences:
        raise TraceError("at", at, f"the recorded history cannot be reproduced ({str(differences[0])[:300]})",
                         "If the run used plug-ins of your own, pass them: fork(..., recorded={'ordering': MyOrder()}).")  # fmt: skip


def _engine(run: Run, config: EngineConfig, scheduler: Scheduler, clock: ReplayClock) -> Engine:
    model = run.started.model
    shape = Shape(**model["shape"])
    cost = RooflineCost(shape, run.started.hardware["name"], config.block_size, model["precision"])
    executor = SimExecutor(cost, RecordedTokens(run, shape.vocab_size), clock, {"device": run.started.hardware["name"]})
    facts = ModelFacts(model["name"], shape.vocab_size, scheduler.limits.max_model_len, tuple(model["eos_token_ids"]), shape)
    parts = Assembly(scheduler, executor, clock, scheduler.log, None, MetricsFold(), facts, scheduler.limits)
    return Engine(config, parts)


def _continue(run: Run, engine: Engine, position: int) -> None:
    """Run to the end: steps in flight as recorded, then simulated ones."""
    future = run.log_events[position:]
    ends = OutsideEnds(future, RecordedTokens(run, engine.model.vocab_size))
    finished = {e.step: e for e in future if isinstance(e, ev.StepFinished)}
    for step in sorted(engine.scheduler.inflight):  # submitted before the fork, collected after it
        if step not in finished:
            raise TraceError("at", step, "was in flight and never finished in this run", "Fork at an earlier step.")
        done = finished[step]
        engine.adopt(StepPlan(step, ()), Done(StepResult(step, done.results, done.measured)))
    for event in future:
        if isinstance(event, ev.RequestArrived):
            engine.expect(event.spec)
    while engine.has_unfinished_requests():
        ends.apply(engine)
        engine.step()
