"""Whether the head of the queue may start (seam A)."""

from __future__ import annotations

from llmlab.registry import Registry
from llmlab.seams import Admission, Admit, EngineView, Need, RequestView, Wait


class PromptFits:
    """Start when the whole prompt fits, and a little (1 % of the pool) stays free for those who run."""

    name = "prompt_fits"

    def __init__(self, watermark: float = 0.01) -> None:
        self.watermark = watermark

    def admit(self, view: EngineView, request: RequestView, need: Need) -> Admit | Wait:
        spare = int(self.watermark * view.pool.num_blocks) if view.running else 0
        if need.prompt + spare <= view.pool.num_free:
            return Admit(f"it takes {need.prompt} of {view.pool.num_free} free blocks")
        return Wait(f"{view.pool.num_free} blocks are free, it needs {need.prompt} and {spare} must stay spare")


class WorstCase:
    """Start only when even the longest possible outputs of all running requests fit: never preempts."""

    name = "worst_case"

    def admit(self, view: EngineView, request: RequestView, need: Need) -> Admit | Wait:
        pool = view.pool
        promised = sum(pool.blocks_for(r.request.max_total_tokens) - r.num_blocks for r in view.running)
        if need.total + promised <= pool.num_free:
            return Admit(f"needs at most {need.total} blocks, {pool.num_free - promised} are free and unpromised")
        return Wait(f"may need {need.total} blocks; of {pool.num_free} free ones {promised} are promised")


class Optimistic:
    """Start as soon as one block is free: the highest occupancy, the most preemptions."""

    name = "optimistic"

    def admit(self, view: EngineView, request: RequestView, need: Need) -> Admit | Wait:
        return Admit(f"{view.pool.num_free} blocks are free") if view.pool.num_free else Wait("no block is free")


ADMISSIONS: Registry[Admission] = Registry(
    "admission", {"prompt_fits": PromptFits, "worst_case": WorstCase, "optimistic": Optimistic}
)
