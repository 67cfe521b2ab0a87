"""The plug-ins of an engine by name, and the scheduler that they make: neither model nor executor is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmlab.config import DRAFT_FIELDS, EngineConfig
from llmlab.decoding.autoregressive import TokenStop
from llmlab.decoding.draft_lengths import DRAFT_POLICIES
from llmlab.decoding.draft_sizes import DraftSizes, sizes_from
from llmlab.decoding.methods import DECODING_METHODS
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.execution.draft_price import WithDrafts
from llmlab.memory.eviction import EVICTIONS, LRU
from llmlab.memory.kv_manager import KVManager
from llmlab.memory.tiers import TIERINGS
from llmlab.registry import Registry
from llmlab.scheduling.admission import ADMISSIONS
from llmlab.scheduling.composers import COMPOSERS
from llmlab.scheduling.core import Drafting, Policies
from llmlab.scheduling.ordering import ORDERINGS
from llmlab.scheduling.placement import PLACEMENTS
from llmlab.scheduling.preemption import VICTIMS
from llmlab.scheduling.scheduler import Scheduler
from llmlab.scheduling.seamcalls import Seam, checked_key, unchecked
from llmlab.scheduling.weights import WEIGHT_PLACEMENTS
from llmlab.seams import BlockView, CostModel, Eviction, Limits
from llmlab.speculating import book_of, price_of, source_name

REGISTRIES: dict[str, Registry[Any]] = {
    "ordering": ORDERINGS, "admission": ADMISSIONS, "composer": COMPOSERS, "victim": VICTIMS,
    "placement": PLACEMENTS, "eviction": EVICTIONS, "tiering": TIERINGS, "decoding": DECODING_METHODS,
    "weights": WEIGHT_PLACEMENTS, "draft_policy": DRAFT_POLICIES,
}  # fmt: skip


def register(seam: str, name: str, factory: Any) -> None:
    """Make a plug-in known by name, for configurations and the command line. Registering again replaces it."""
    if seam not in REGISTRIES:
        from llmlab.types import unknown_name

        raise unknown_name("seam", seam, REGISTRIES)
    REGISTRIES[seam].register(name, factory)


def build_scheduler(config: EngineConfig, cost: CostModel, limits: Limits, log: EventLog, num_blocks: int,
                    num_host_blocks: int, drafts: DraftSizes | None = None) -> Scheduler:  # fmt: skip
    """A scheduler with its memory and policies; neither model nor executor is needed. `drafts`: sizes of the draft source."""
    memory = KVManager(num_blocks, num_host_blocks, config.block_size, config.enable_prefix_caching, log,
                       eviction_chooser(config, log))  # fmt: skip
    policies = policies_of(config, log, cost, drafts)
    return Scheduler(policies, memory, cost, log, limits, config.view_cap, config.num_alternatives,
                     lambda seam, choice: reseated(config, log, seam, choice, cost))  # fmt: skip


def policies_of(config: EngineConfig, log: EventLog, cost: CostModel, drafts: DraftSizes | None) -> Policies:
    """The guarded seams that a configuration asks for."""
    def seam(name: str) -> Seam[Any]:
        return seam_of(config, log, name)

    drafting = _drafting(config, log, cost, drafts)
    return Policies(seam("ordering"), seam("admission"), seam("composer"), seam("victim"), seam("placement"),
                    seam("tiering"), seam("decoding"), TokenStop(), drafting)  # fmt: skip


def _drafting(config: EngineConfig, log: EventLog, cost: CostModel, drafts: DraftSizes | None) -> Drafting | None:
    """Who decides on the number of drafts, if there are any."""
    if config.speculation is None:
        return None
    price = price_of(cost, drafts, config)
    plans = cost if price is None else WithDrafts(cost, price)
    return Drafting(seam_of(config, log, "draft_policy"), book_of(cost, price, config), source_name(config.speculation), plans)


def seam_of(config: EngineConfig, log: EventLog, name: str) -> Seam[Any]:
    """The guarded seam of one field; the default of EngineConfig decides where a plug-in fails. With drafts, the default
    of decoding is to verify them."""
    registry, default = REGISTRIES[name], getattr(EngineConfig(), name)
    choice = getattr(config, name)
    if name == "decoding" and config.speculation is not None:
        choice, default = "speculative" if choice == default else choice, "speculative"
    return Seam(name, registry.resolve(choice), registry.resolve(default), log, config.policy_timeout)


def reseated(config: EngineConfig, log: EventLog, seam: str, choice: Any, cost: CostModel) -> Any:
    """What a scheduler gets when a seam of its is to have another policy while it runs; `seam` may be "drafting", too."""
    if seam == "drafting":
        return _redrafted(config, log, cost, choice)
    changed = msgspec.structs.replace(config, **{seam: choice})
    return eviction_chooser(changed, log) if seam == "eviction" else seam_of(changed, log, seam)


def _redrafted(config: EngineConfig, log: EventLog, cost: CostModel, changes: Mapping[str, Any]) -> Drafting | None:
    """Another drafting side: all of DRAFT_FIELDS, and as "draft" the sizes of the draft source, if they are known."""
    changed = msgspec.structs.replace(config, **{name: changes[name] for name in DRAFT_FIELDS if name in changes})
    return _drafting(changed, log, cost, sizes_from(changes["draft"]) if "draft" in changes else None)


def eviction_chooser(config: EngineConfig, log: EventLog) -> Any:
    """Index of the block to evict among the given views; logged with its alternatives at level 3. None is what the pool
    does by itself, which is LRU: below level 3, where nobody reads the scores, nobody computes them."""
    if log.level < 3 and type(EVICTIONS.resolve(config.eviction)) is LRU:
        return None
    seam: Seam[Eviction] = Seam("eviction", EVICTIONS.resolve(config.eviction), EVICTIONS.resolve("lru"), log,
                                config.policy_timeout)  # fmt: skip

    def choose(blocks: Sequence[BlockView]) -> int:
        scores = seam.ask(lambda p: [checked_key(p.score(b)) for b in blocks], unchecked)
        best = min(range(len(blocks)), key=lambda i: (scores[i], i))
        if log.level >= 3:
            log.emit(ev.Decision, seam="eviction", policy=seam.policy_name, chosen=f"block {blocks[best].block_id}",
                     num_candidates=len(blocks), reason=f"smallest score {scores[best][0]:g}",
                     alternatives=tuple(ev.Alternative(f"block {b.block_id}", scores[i][0])
                                        for i, b in enumerate(blocks) if i != best)[: config.num_alternatives])  # fmt: skip
        return best

    return choose
