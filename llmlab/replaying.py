"""Replay a recorded run's decisions, from its trace alone: no model, no executor, no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from llmlab.config import EngineConfig
from llmlab.decoding.draft_sizes import DraftSizes, sizes_from
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.events.replay import Difference, ReplayClock, replay
from llmlab.events.trace import Run
from llmlab.execution.cost import RooflineCost
from llmlab.plugins import build_scheduler
from llmlab.scheduling.scheduler import Scheduler
from llmlab.seams import Limits
from llmlab.types import TraceError
from roofline.shapes import Shape


class Replayed(msgspec.Struct, frozen=True):
    """The outcome of a decision replay: no differences means that the same decisions were taken."""

    differences: list[Difference]
    num_events: int


def recorded_config(run: Run, **overrides: Any) -> EngineConfig:
    """The configuration that a run was recorded with; `overrides` replace fields, such as plug-in objects."""
    fields = {**run.started.config, **overrides, "trace": None}
    known = {name: fields[name] for name in EngineConfig.__struct_fields__ if name in fields}
    return EngineConfig(**known)


def recorded_scheduler(run: Run, clock: ReplayClock, **overrides: Any) -> Scheduler:
    """A fresh scheduler as it stood at the beginning of the run. Raises ConfigError for a policy that is not
    registered: pass the object itself in `overrides`."""
    config, started = recorded_config(run, **overrides), run.started
    if "shape" not in started.model or config.num_blocks is None or config.num_host_blocks is None:
        raise TraceError("trace", "RunStarted", "does not say which model and pool it used", "Record it anew.")
    limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len or 0)
    log = EventLog(clock, config.log_level, capacity=max(1, 2 * len(run.log_events)))
    return build_scheduler(config, recorded_cost(run, config), limits, log, config.num_blocks, config.num_host_blocks,
                           recorded_draft(run, started.config.get("speculation")))  # fmt: skip


def recorded_cost(run: Run, config: EngineConfig) -> RooflineCost:
    """The cost model that a run was planned with."""
    started = run.started
    return RooflineCost(Shape(**started.model["shape"]), started.hardware["name"], config.block_size,
                        started.model["precision"], config.host, config.attention_plan, config.tensor_parallel_size)  # fmt: skip


def recorded_draft(run: Run, source: str | None) -> DraftSizes | None:
    """The sizes of the draft source that a run used, at its start or later; None if it told none."""
    told = [(run.started.config.get("speculation"), run.started.model.get("draft"))]
    told += [(e.changes["speculation"], e.changes.get("draft")) for e in run.events(ev.Reconfigured) if "speculation" in e.changes]
    return next((sizes_from(sizes) for name, sizes in told if name == source and sizes is not None), None)


def replay_decisions(run: Run, **overrides: Any) -> Replayed:
    """Feed the recorded arrivals, finishes and results to a fresh scheduler; where it decides otherwise."""
    clock = ReplayClock()
    scheduler = recorded_scheduler(run, clock, **overrides)
    return Replayed(replay(run, scheduler, clock), len(run.log_events))
