"""What policies see: frozen views of the queue, the running requests and the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence

import msgspec

from llmlab.memory.kv_manager import KVManager
from llmlab.seams import EngineView, LayerCost, Limits, PoolView, RequestView
from llmlab.types import Cost, Home, Sequence, WorkItem


class Viewer:
    """Makes the views of one engine. `cap` bounds how much of the queue a view holds. `cpu` turns False when the
    CPU's worker has died."""

    def __init__(self, memory: KVManager, limits: Limits, consider: Callable[[str, AbstractSequence[WorkItem]], Cost],
                 cap: int, costs: LayerCost) -> None:  # fmt: skip
        self.cap = cap
        self.cpu = memory.host.num_blocks > 0
        self._costs = costs
        self._memory = memory
        self.limits = limits
        self._consider = consider

    def engine(self, now: float, step: int, waiting: Iterable[Sequence], num_waiting: int, running: Iterable[Sequence]
               ) -> EngineView:  # fmt: skip
        """All that a policy sees; `waiting` is the head of the queue."""
        show = self.request
        return EngineView(now, step, tuple([show(seq) for seq in waiting]), num_waiting, tuple([show(seq) for seq in running]),
                          self.pool(), self.limits, self._consider, self.cpu, self._costs)  # fmt: skip

    def pool(self) -> PoolView:
        pool, host = self._memory.pool, self._memory.host
        return PoolView(self._memory.num_blocks, pool.num_free, self._memory.num_quarantined, host.num_blocks, host.num_free,
                        self._memory.block_size)  # fmt: skip

    def request(self, seq: Sequence, num_cached_tokens: int | None = None) -> RequestView:
        """One request; `num_cached_tokens` where the prefix cache was asked just now."""
        request = seq.request
        table = self._memory.tables.get(request.id)  # every running request is shown in every step
        num_blocks, num_host_blocks = (0, 0) if table is None else (len(table.block_ids), len(table.host_block_ids))
        return RequestView(
            request.id, request.number, request.arrival, request.priority, seq.status, seq.num_prompt_tokens,
            len(seq.token_ids) + seq.num_pending, seq.num_computed_tokens,
            seq.num_cached_tokens if num_cached_tokens is None else num_cached_tokens,
            num_blocks, seq.num_preemptions, request, seq.home, seq.cursor,
            num_host_blocks, seq.num_pending, seq.drafts, seq.draft_parents, seq.acceptance,
        )  # fmt: skip

    def after_admission(self, view: EngineView, seq: Sequence, taken: int, home: Home = "device") -> EngineView:
        """The view as if `seq` ran and had taken `taken` blocks of the tier that it is to live in."""
        blocks = self._memory.blocks_for(len(seq.token_ids))
        if home == "cpu":
            request = msgspec.structs.replace(self.request(seq), num_host_blocks=blocks, home=home)
            pool = msgspec.structs.replace(view.pool, num_host_free=max(0, view.pool.num_host_free - taken))
        else:
            request = msgspec.structs.replace(self.request(seq), num_blocks=blocks)
            pool = msgspec.structs.replace(view.pool, num_free=max(0, view.pool.num_free - taken))
        return msgspec.structs.replace(view, pool=pool, running=(*view.running, request))

    def of_tier(self, view: EngineView, home: Home) -> EngineView:
        """The view for an admission to `home`: its pool is that tier's, and only those who live there run."""
        if not self.cpu:
            return view
        pool = view.pool
        if home == "cpu":
            pool = msgspec.structs.replace(pool, num_blocks=pool.num_host_blocks, num_free=pool.num_host_free)
        running = tuple([r if home == "device" else msgspec.structs.replace(r, num_blocks=r.num_host_blocks)
                         for r in view.running if r.home == home])  # fmt: skip
        return msgspec.structs.replace(view, pool=pool, running=running)
