"""Forks: continue a recorded history under other policies, on the simulated executor.

    recorded   0 ------------ at ----------------- end
    fork       0 ====replay== at ~~~simulated~~~~~ end'

Up to `at` the recorded inputs are replayed with the recorded policies; they must reproduce the recorded decisions, or
the fork is refused. From then on the new policies decide, time is simulated, requests still to come arrive when they
did, and each gets the tokens that it got (so lengths are the true ones).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from llmlab.assembly import Assembly
from llmlab.backends import ModelFacts
from llmlab.config import DRAFT_FIELDS, PLUG_IN_FIELDS, SEAM_FIELDS, EngineConfig
from llmlab.decoding.draft_trees import plan_of
from llmlab.decoding.drafts import NGram, Oracle
from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.metrics import LiveMetrics, acceptance_by_position
from llmlab.events.replay import ReplayClock, compare, feed
from llmlab.events.trace import Run
from llmlab.execution.cost import RooflineCost, wall_cost
from llmlab.execution.drafting import Drafter
from llmlab.execution.sim_executor import PseudoTokens, SimDrafting, SimExecutor, SimTicket
from llmlab.execution.sim_offload import ExpertSimExecutor
from llmlab.executors import Redraft, expert_simulation
from llmlab.plugins import eviction_chooser, policies_of, seam_of
from llmlab.replaying import recorded_config, recorded_cost, recorded_draft, recorded_scheduler
from llmlab.scheduling.scheduler import Scheduler
from llmlab.seams import DraftSource
from llmlab.speculating import price_of, source_name
from llmlab.types import ConfigError, Request, StepPlan, StepResult, TraceError, unknown_name
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


class Outside:
    """What came from outside in the recorded run and lies in the fork's future: stop strings happen again at the same
    token; aborts, refusals and changed settings (but for those that the fork has `kept`) at the same time (between the
    same two steps, as long as nothing else has changed)."""

    def __init__(self, run: Run, position: int, tokens: RecordedTokens, kept: Sequence[str] = ()) -> None:
        self._kept = kept
        self._at_token: dict[str, tuple[int, ev.FinishRequested]] = {}
        self._at_time: deque[tuple[float, int, ev.FinishRequested | ev.RequestRefused | ev.Reconfigured]] = deque()
        planned = 0
        for index, event in enumerate(run.log_events):
            if isinstance(event, ev.StepPlanned) and (event.items or event.moves):
                planned = event.step + 1
            elif index >= position and isinstance(event, ev.FinishRequested) and event.reason == "stop":
                self._at_token[event.request or ""] = tokens.length(event.request or ""), event
            elif index >= position and isinstance(event, (ev.FinishRequested, ev.RequestRefused, ev.Reconfigured)):
                self._at_time.append((event.t, planned, event))

    def apply(self, engine: Engine) -> None:
        now = engine.clock.now(), engine.scheduler.next_step
        while self._at_time and self._at_time[0][:2] <= now:
            event = self._at_time.popleft()[2]
            if isinstance(event, ev.RequestRefused):
                engine.log.emit(ev.RequestRefused, event.request, reason=event.reason)
            elif isinstance(event, ev.Reconfigured):
                engine.reconfigure(**{name: value for name, value in event.changes.items() if name not in (*self._kept, "draft")})
            else:
                engine._admit_early(event.request or "")  # as `Engine.abort` does
                engine.scheduler.finish(event.request or "", event.reason, event.detail)
        for name, (length, event) in list(self._at_token.items()):
            seq = engine.scheduler.sequences.get(name)
            if seq is not None and seq.num_output_tokens >= length:
                del self._at_token[name]
                engine.scheduler.finish(name, event.reason, event.detail)


def fork(run: Run, at: int, recorded: Mapping[str, Any] | None = None, **changes: Any) -> list[ev.Event]:
    """The events of a fork of `run` right after step `at`. `changes`: seams of EngineConfig (objects or names), and `weights` of
    a run whose experts do not all fit: the new policy finds on the device what the old one left there.

    `recorded`: the plug-in objects of the recorded run that are not registered under their names. Raises TraceError
    for a step that the run does not have, ConfigError for changes that are no seam or a policy that is missing.
    """
    for name in changes:
        if name not in PLUG_IN_FIELDS:
            raise unknown_name("fork", name, PLUG_IN_FIELDS)
    run.need_whole()
    if "weights" in changes and "resident" in (changes["weights"], _weights(run)):
        raise ConfigError("weights", changes["weights"], "a fork cannot begin or end to keep experts on the host",
                          "Choose another policy for a run whose weights are not 'resident'.")  # fmt: skip
    if run.started.level < 2:
        raise TraceError(
            "log_level", run.started.level, "decisions were not recorded", "Record with log_level=2 or more."
        )
    clock = ReplayClock()
    scheduler = recorded_scheduler(run, clock, **(recorded or {}))
    scheduler.log.append(_forked_start(run, at, changes))
    config = recorded_config(run, **{**(recorded or {}), **changes})
    engine = _engine(run, config, scheduler, clock, recorded or {})
    memory = _Memory(run, engine)
    position = _replay_until(run, scheduler, clock, at, memory)
    _prove(run, scheduler, position, at)
    engine.config = recorded_config(run, **{**(recorded or {}), **_turned(run, position), **changes})
    drafting = engine.redraft(engine.config)
    policies = policies_of(engine.config, scheduler.log, recorded_cost(run, config), drafting.sizes)
    engine.executor.draft_with(drafting.side)
    scheduler.adopt(policies, clock.now())
    scheduler.memory.pool.choose = eviction_chooser(engine.config, scheduler.log)
    if "weights" in changes and isinstance(engine.executor, ExpertSimExecutor):
        engine.executor.adopt(seam_of(engine.config, scheduler.log, "weights"))
    flying = _in_flight(run, scheduler, position)
    engine.executor.occupy(memory.busy_until)  # type: ignore[attr-defined]
    _continue(run, engine, position, flying, changes)
    return list(scheduler.log)


def _weights(run: Run) -> str:
    return str(run.started.config.get("weights", "resident"))


def _forked_start(run: Run, at: int, changes: Mapping[str, Any]) -> ev.RunStarted:
    from llmlab.registry import policy_name

    named = {name: choice if isinstance(choice, str) else policy_name(choice) for name, choice in changes.items()}
    config = {**run.started.config, **named, "forked_at": at}
    return msgspec.structs.replace(run.started, seq=0, mode="simulated", config=config)


def _turned(run: Run, position: int) -> dict[str, Any]:
    """The seams that were changed while the run went on, as they stood at the fork. Who has ever verified drafts goes on
    doing so: some may still be on their way."""
    events = [e for e in run.log_events[:position] if isinstance(e, ev.Reconfigured)]
    turned = {name: value for e in events for name, value in e.changes.items() if name in (*SEAM_FIELDS, *DRAFT_FIELDS)}
    if "speculation" in turned and run.started.config.get("decoding") == "autoregressive":
        return {"decoding": "speculative", **turned}
    return turned


class _Memory:
    """Tells the fork's executor of recorded steps that may have left something running (copies, attention on the host) or
    lying on the device (experts). A measured run's steps ended with all they had begun."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self._ends = {e.step: e.t for e in run.log_events if isinstance(e, ev.StepFinished)}
        self._engine = engine
        self._simulated, self._experts = run.mode == "simulated", _weights(run) != "resident"
        self.busy_until = 0.0  # by the steps planned so far

    def planned(self, event: ev.StepPlanned) -> None:
        plan = StepPlan(event.step, event.items, event.moves)
        left = self._simulated and (plan.moves or "cpu" in [item.device for item in plan.items])
        if left or (self._experts and plan.items):
            self._engine.executor.resume(self._engine.batch_of(plan), self.busy_until)  # type: ignore[attr-defined]
        if plan.items or plan.moves:
            self.busy_until = max(self.busy_until, self._ends.get(event.step, 0.0))


def _replay_until(run: Run, scheduler: Scheduler, clock: ReplayClock, at: int, memory: _Memory) -> int:
    """Feed recorded inputs up to StepFinished(at); the index of the event behind it."""
    for index, event in enumerate(run.log_events):
        clock.t = event.t
        try:
            feed(scheduler, event)
        except Exception as error:  # it went another way, and chokes on results that are not for its plans
            _prove(run, scheduler, index, at)
            raise _irreproducible(at, error) from error
        if isinstance(event, ev.StepPlanned):
            memory.planned(event)
        if isinstance(event, ev.RequestRefused):
            scheduler.log.emit(ev.RequestRefused, event.request, reason=event.reason)
        if isinstance(event, ev.StepFinished) and event.step == at:
            return index + 1
    raise TraceError("at", at, "has not finished in this run", "`run.steps` lists the steps.")


def _prove(run: Run, scheduler: Scheduler, position: int, at: int) -> None:
    """Refuse to fork a history that the recorded policies do not reproduce."""
    differences = compare([_unpriced(e) for e in run.log_events[:position]], [_unpriced(e) for e in scheduler.log])
    if differences:
        recorded, replayed = (str(event)[:140] for event in (differences[0].recorded, differences[0].replayed))
        raise _irreproducible(at, f"event {differences[0].index}: recorded {recorded}, replayed {replayed}")


def _unpriced(event: ev.Event) -> ev.Event:
    """The event without what a cost model said: a newer one may say otherwise, and the history is the same as long as
    nobody decided otherwise because of it."""
    if isinstance(event, ev.StepPlanned):
        return msgspec.structs.replace(event, predicted=None)
    if isinstance(event, ev.Decision):
        return msgspec.structs.replace(event, predicted=None, alternatives=())
    return event


def _irreproducible(at: int, why: object) -> TraceError:
    return TraceError("at", at, f"the recorded history cannot be reproduced ({str(why)[:300]})",
                      "If the run used plug-ins of your own, pass them: fork(..., recorded={'ordering': MyOrder()}).")  # fmt: skip


def _in_flight(run: Run, scheduler: Scheduler, position: int) -> list[ev.StepFinished]:
    """How the steps ended that were submitted before the fork and collected after it, in their order."""
    ends = {e.step: e for e in run.log_events[position:] if isinstance(e, ev.StepFinished)}
    for step in scheduler.inflight:
        if step not in ends:
            raise TraceError("at", step, "was in flight and never finished in this run", "Fork at an earlier step.")
    return [ends[step] for step in sorted(scheduler.inflight)]


def _engine(run: Run, config: EngineConfig, scheduler: Scheduler, clock: ReplayClock, recorded: Mapping[str, Any]) -> Engine:
    """`recorded`: plug-ins of the recorded run that no registry knows."""
    model = run.started.model
    shape = Shape(**model["shape"])
    cost, device = recorded_cost(run, config), run.started.hardware["name"]
    tokens = RecordedTokens(run, shape.vocab_size)
    wall = wall_cost(cost, config.overlap_depth)
    if _weights(run) != "resident":
        known = recorded_config(run, **{"weights": _weights(run), **recorded})
        executor: SimExecutor = expert_simulation(known, cost, wall, tokens, clock, scheduler.log)
    else:
        executor = SimExecutor(wall, tokens, clock, {"device": device}, config.block_size, detailed=config.log_level >= 4)
    facts = ModelFacts(
        model["name"], shape.vocab_size, scheduler.limits.max_model_len, tuple(model["eos_token_ids"]), shape
    )
    parts = Assembly(scheduler, executor, clock, scheduler.log, None, LiveMetrics(), facts, scheduler.limits,
                     lambda config: _drafting(run, config, tokens, cost))  # fmt: skip
    return Engine(config, parts)


def _drafting(run: Run, config: EngineConfig, tokens: RecordedTokens, cost: RooflineCost) -> Redraft:
    """The drafts that n-grams find in the recorded tokens; of other sources ones that hold as often as those of the
    recorded run did, position by position (in a simulation: as often as it was told that they do)."""
    if config.speculation is None:
        return Redraft(None)
    shape = Shape(**run.started.model["shape"])
    held = run.started.model.get("acceptance") or acceptance_by_position(run.log_events) or [0.0]
    plan = partial(plan_of, config.branches)
    source: DraftSource = (NGram() if config.speculation == NGram.name
                           else Oracle(tokens.token, held, shape.vocab_size, config.seed, plan))  # fmt: skip
    draft = recorded_draft(run, source_name(config.speculation))
    return Redraft(SimDrafting(Drafter(source, shape.vocab_size), price_of(cost, draft, config)), draft)


def _continue(run: Run, engine: Engine, position: int, flying: Sequence[ev.StepFinished],
              changes: Mapping[str, Any]) -> None:  # fmt: skip
    """Run to the end: steps in flight as recorded, then simulated ones. The fork's own `changes` stay as they are."""
    outside = Outside(run, position, RecordedTokens(run, engine.model.vocab_size), tuple(changes))
    for done in flying:
        result = StepResult(done.step, done.results, done.measured, lost=done.lost)
        engine.adopt(StepPlan(done.step, ()), SimTicket(result, done.t, engine.clock))
    for event in run.log_events[position:]:
        if isinstance(event, ev.RequestArrived):
            engine.expect(event.spec)
    while engine.has_unfinished_requests():
        outside.apply(engine)
        engine.step()
    outside.apply(engine)
