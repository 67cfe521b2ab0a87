"""The other choice, once: plug-ins for forks that ask what one decision was worth.

    run.fork(at=11, victim=InsteadVictim("r13", 12, "r9"))    # in step 12 r13 gives its memory up for r9
    run.fork(at=11, tiering=InsteadTiering("swap", 12, "r14"))

Before and after that step the named policy decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.memory.tiers import TIERINGS
from llmlab.scheduling.preemption import VICTIMS
from llmlab.seams import EngineView, Key, RequestView, Tiering, TierOption, Victim


class InsteadVictim:
    """When `needy` finds no block in step `step`, the request `option` is preempted first; otherwise `policy` decides."""

    def __init__(self, option: str, step: int, needy: str, policy: str | Victim = "last_come") -> None:
        self._option, self._step, self._needy = option, step, needy
        self._policy = VICTIMS.resolve(policy)
        self.name = f"{option} instead"

    def score(self, view: EngineView, candidate: RequestView, needy: RequestView) -> Key:
        here = view.step == self._step and needy.id == self._needy
        key = self._policy.score(view, candidate, needy)
        return (0 if here and candidate.id == self._option else 1, *(key if isinstance(key, tuple) else (key,)))


class InsteadTiering:
    """In step `step` the KV of `request` meets the fate `option`, if that is possible; otherwise `policy` decides."""

    def __init__(self, option: str, step: int, request: str, policy: str | Tiering = "recompute") -> None:
        self._option, self._step, self._request = option, step, request
        self._policy = TIERINGS.resolve(policy)
        self.name = f"{option} instead"

    def choose(self, view: EngineView, victim: RequestView, options: Sequence[TierOption]) -> str:
        possible = any(o.mode == self._option and o.feasible for o in options)
        if possible and view.step == self._step and victim.id == self._request:
            return self._option
        return self._policy.choose(view, victim, options)
