"""What policies see: frozen views of the queue, the running requests and the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence

import msgspec

from llmlab.memory.kv_manager import KVManager
from llmlab.seams import EngineView, Limits, PoolView, RequestView
from llmlab.types import Cost, Sequence, WorkItem


class Viewer:
    """Makes the views of one engine. `cap` bounds how much of the queue a view holds."""

    def __init__(self, memory: KVManager, limits: Limits, consider: Callable[[str, AbstractSequence[WorkItem]], Cost],
                 cap: int) -> None:  # fmt: skip
        self.cap = cap
        self._memory = memory
        self.limits = limits
        self._consider = consider

    def engine(self, now: float, step: int, waiting: Iterable[Sequence], num_waiting: int, running: Iterable[Sequence]
               ) -> EngineView:  # fmt: skip
        """All that a policy sees; `waiting` is the head of the queue."""
        show = self.request
        return EngineView(now, step, tuple([show(seq) for seq in waiting]), num_waiting, tuple([show(seq) for seq in running]),
                          self.pool(), self.limits, self._consider)  # fmt: skip

    def pool(self) -> PoolView:
        pool, host = self._memory.pool, self._memory.host
        return PoolView(self._memory.num_blocks, pool.num_free, self._memory.num_quarantined, host.num_blocks, host.num_free,
                        self._memory.block_size)  # fmt: skip

    def request(self, seq: Sequence, num_cached_tokens: int | None = None) -> RequestView:
        """One request; `num_cached_tokens` where the prefix cache was asked just now."""
        request = seq.request
        return RequestView(
            request.id, request.number, request.arrival, request.priority, seq.status, seq.num_prompt_tokens,
            len(seq.token_ids) + seq.num_pending, seq.num_computed_tokens,
            seq.num_cached_tokens if num_cached_tokens is None else num_cached_tokens,
            self._memory.num_blocks_of(request.id), seq.num_preemptions, request,
        )  # fmt: skip

    def after_admission(self, view: EngineView, seq: Sequence, taken: int) -> EngineView:
        """The view as if `seq` ran and had taken `taken` blocks."""
        request = msgspec.structs.replace(self.request(seq), num_blocks=self._memory.blocks_for(len(seq.token_ids)))
        pool = msgspec.structs.replace(view.pool, num_free=max(0, view.pool.num_free - taken))
        return msgspec.structs.replace(view, pool=pool, running=(*view.running, request))
