"""Calling policies: the guard around every seam, and the recorder of what was considered.

The seam records, not the plug-in. Built-in defaults are trusted; every other policy is checked, and when it
raises, overruns its time or answers nonsense, the default decides that once and `PolicyFailed` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Generic, TypeVar, get_args

from msgspec.structs import replace

from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.registry import policy_name
from llmlab.scheduling.watchdog import Overrun, Watchdog
from llmlab.seams import (
    Admit,
    DraftLengths,
    EngineView,
    ExpertId,
    Limits,
    Offers,
    Placed,
    Rehome,
    RequestView,
    RoutingView,
    Wait,
    Where,
    Wish,
)  # fmt: skip
from llmlab.types import Commit, ConfigError, Cost, Home, PolicyError, WorkItem

_LARGEST = 2**63  # integers from here on fit into no log
OPTIONAL = ("cuts",)  # promises that a policy may make beside its answers
P = TypeVar("P")
A = TypeVar("A")


class Seam(Generic[P]):
    """One seam of one engine: the policy in force, its default, and the guard. Where a call for every request in every
    step would be too dear, a `trusted` policy may be called directly."""

    def __init__(self, name: str, policy: P, default: P, log: EventLog, timeout: float) -> None:
        _check_interface(name, policy, default)
        self.name = name
        self.policy = policy
        self.default = default
        self.policy_name = policy_name(policy)
        self.trusted = type(policy).__module__.startswith(("llmlab.scheduling.", "llmlab.memory.", "llmlab.decoding."))
        self._log = log
        self._timeout = timeout
        self._watchdog = Watchdog(timeout)

    def ask(self, call: Callable[[P], A], check: Callable[[A], A], cause: int = -1) -> A:
        """The policy's answer, or the default's if the policy fails. `check` raises PolicyError on nonsense."""
        if self.trusted:
            return call(self.policy)
        began = time.thread_time()
        try:
            answer = self._watchdog.call(lambda: check(call(self.policy)))
        except Overrun:
            spent = time.thread_time() - began
            return self.fall_back(call, f"interrupted after {spent:.2f} s of CPU, allowed are {self._timeout:g} s", cause)
        except Exception as error:  # a cell's code may raise anything: the run must go on
            return self.fall_back(call, f"{type(error).__name__}: {error}", cause)
        spent = time.thread_time() - began
        if spent > self._timeout:
            return self.fall_back(call, f"took {spent:.2f} s of CPU, allowed are {self._timeout:g} s", cause)
        return answer

    def fall_back(self, call: Callable[[P], A], error: str, cause: int) -> A:
        """Let the default decide this once, and say why."""
        self._log.emit(ev.PolicyFailed, None, cause, seam=self.name, policy=self.policy_name, error=error[:500],
                       fallback=policy_name(self.default))  # fmt: skip
        return call(self.default)


def _check_interface(seam: str, policy: object, default: object) -> None:
    """A plug-in has the methods of the default. Raises ConfigError, before anything runs."""
    if isinstance(policy, type):
        raise ConfigError(seam, policy.__name__, "is a class, not an object", f"Write {seam}={policy.__name__}().")
    for method in [name for name in dir(default) if not name.startswith("_") and callable(getattr(default, name))]:
        if method in OPTIONAL:
            continue
        if not callable(getattr(policy, method, None)):
            raise ConfigError(seam, policy, f"has no method {method}()", "Give a registered name, or an object as described "
                              "in llmlab.seams.")  # fmt: skip


class Considered:
    """Alternatives that a policy priced during the decision in progress."""

    def __init__(self, price: Callable[[Sequence[WorkItem]], Cost]) -> None:
        self._price = price
        self.alternatives: list[ev.Alternative] = []

    def consider(self, option: str, items: Sequence[WorkItem]) -> Cost:
        """Price `items`, remember them as the alternative `option`."""
        cost = self._price(items)
        self.alternatives.append(ev.Alternative(option, cost.seconds, predicted=cost))
        return cost

    def take(self) -> tuple[ev.Alternative, ...]:
        taken, self.alternatives = tuple(self.alternatives), []
        return taken


# ------------------------------------------------------------------------------ answers that make sense
def checked_key(key: Any) -> tuple[Any, ...]:
    """A key as a tuple of numbers, which any two keys can be compared by and a log can hold."""
    kind = type(key)
    if (kind is float and key == key) or (kind is int and abs(key) < _LARGEST):  # the common case
        return (key,)
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, (int, float)) for part in parts):  # numbers of numpy become Python's
        parts = tuple(float(part) if isinstance(part, Real) else part for part in parts)
    for part in parts:
        if not isinstance(part, (int, float)) or part != part or (isinstance(part, int) and abs(part) >= _LARGEST):
            raise PolicyError("key", key, "must be a number or a tuple of numbers, without NaN")
    if not parts:
        raise PolicyError("key", key, "is empty", "Return a number, such as request.arrival.")
    return parts


def checked_admission(answer: Admit | Wait) -> Admit | Wait:
    if not isinstance(answer, (Admit, Wait)) or not isinstance(answer.reason, str):
        raise PolicyError("admit", answer, "must be Admit(...) or Wait(reason), the reason a string")
    return answer


def checked_items(answer: Iterable[WorkItem], offers: Offers, limits: Limits) -> Sequence[WorkItem]:
    """Items that are cut from the offers, once each, within the limits."""
    items = tuple(answer)
    offered = {item.request: item for item in (*offers.running, *offers.waiting)}
    seen: dict[str, None] = {}
    for item in items:
        if not isinstance(item, WorkItem):
            raise PolicyError("compose", item, "is not a WorkItem", "Return offers, or offer.shortened(n).")
        offer = offered.get(item.request)
        if offer is None or item.request in seen:
            raise PolicyError("compose", item.request, "was not offered, or is in the answer twice")
        if item.num_tokens < 1 or item.tokens[0] != offer.tokens[0] or item != offer.shortened(item.num_tokens):
            raise PolicyError("compose", tuple(item.tokens), f"is not a cut of the offer {tuple(offer.tokens)}",
                              "Use offer.shortened(n).")  # fmt: skip
        seen[item.request] = None
    total = sum(item.num_tokens for item in items)
    if total > limits.max_num_batched_tokens:
        raise PolicyError("compose", total, f"is above the budget of {limits.max_num_batched_tokens} tokens")
    seats = limits.max_num_seqs - sum(1 for o in offers.running if o.request not in seen)
    if len(seen) > seats:
        raise PolicyError("compose", len(seen), f"requests do not fit into {seats} seats")
    return items


def checked_places(answer: Placed | Iterable[WorkItem], items: Sequence[WorkItem], view: EngineView) -> Placed:
    """Given items, once each, changed in nothing but device, lane and layers; a list must hold all of them in order."""
    placed = answer if isinstance(answer, Placed) else Placed(tuple(answer))
    given = {item.request: item for item in items}
    for place in placed.items:
        item = given.pop(place.request, None) if isinstance(place, WorkItem) else None
        if item is None or replace(place, device=item.device, lane=item.lane, layers=item.layers,
                                   emit=place.emit if place.layers is None else item.emit) != item:  # fmt: skip
            raise PolicyError("place", place, f"is not {item} elsewhere", "Change only device, lane and layers.")
        _check_place(place, view)
    if given and placed is not answer:
        raise PolicyError("place", len(placed.items), f"items, where {len(items)} were given", "Answer a Placed to leave items out.")
    names = [r.id for r in view.running]
    for move in placed.moves:
        if not isinstance(move, Rehome) or move.request not in names or move.home not in ("device", "cpu"):
            raise PolicyError("place", move, "is not a Rehome of a running request")
    return placed


def _check_place(place: WorkItem, view: EngineView) -> None:
    if place.device not in ("device", "cpu") or not isinstance(place.lane, int):
        raise PolicyError("place", place, "device must be 'device' or 'cpu', lane an integer")
    if place.device == "cpu" and not view.cpu:
        raise PolicyError("place", place, "asks for the CPU, which cannot attend here", "Look at view.cpu.")
    num_layers = view.costs.num_layers if view.costs is not None else 0
    if place.layers is not None and not 0 <= place.layers[0] <= place.layers[1] <= num_layers:
        raise PolicyError("place", place, f"asks for layers outside 0..{num_layers}")


def checked_wish(answer: Wish | None) -> Wish | None:
    """No wish, or one that lets prompts get on."""
    if answer is None:
        return None
    tokens = answer.prompt_tokens if isinstance(answer, Wish) else None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1 or not isinstance(answer.reason, str):
        raise PolicyError("wish", answer, "must be None or Wish(prompt_tokens, reason) of at least one token")
    return answer


def checked_home(answer: Home) -> Home:
    if answer not in ("device", "cpu"):
        raise PolicyError("home", answer, "must be 'device' or 'cpu'")
    return answer


def checked_offer(offer: WorkItem | None, request: RequestView) -> WorkItem | None:
    """Work on the request that was asked about, from its first uncomputed token on, or none."""
    if offer is None:
        return None
    if not isinstance(offer, WorkItem) or offer.request != request.id:
        raise PolicyError("work", offer, f"is not a WorkItem of {request.id}")
    (start, stop), longest = offer.tokens, request.num_tokens + len(request.drafts)
    if len(offer.drafts) > len(request.drafts) or not all(token in request.drafts for token in offer.drafts):
        raise PolicyError("work", offer.drafts, f"are not drafts of {request.id}, which are {request.drafts}")
    early = offer.kv_write == "overwrite" and 0 <= start < request.num_computed_tokens
    if not (start == request.num_computed_tokens or early) or not start < stop <= longest or offer.num_committed < 1:
        raise PolicyError("work", (start, stop), f"must begin at {request.num_computed_tokens} and end at most at {longest}")
    return offer


def checked_commit(answer: Commit) -> Commit:
    if not isinstance(answer, Commit) or not all(isinstance(t, int) and t >= 0 for t in (*answer.token_ids, *answer.drafts)):
        raise PolicyError("accept", answer, "must be Commit(token_ids) with token ids")
    return answer


def checked_lengths(answer: DraftLengths, items: Sequence[WorkItem], longest: int) -> DraftLengths:
    """One length per item, between 0 and what the configuration allows."""
    if not isinstance(answer, DraftLengths) or len(answer.lengths) != len(items):
        raise PolicyError("lengths", answer, f"must be DraftLengths with one length for each of {len(items)} items")
    for k in answer.lengths:
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k <= longest:
            raise PolicyError("lengths", k, f"must be an integer from 0 to num_speculative_tokens={longest}")
    return answer


def checked_mode(answer: str, feasible: Sequence[str]) -> str:
    if answer not in feasible:
        raise PolicyError("tiering", answer, f"is not among the feasible options {list(feasible)}")
    return answer


def checked_routing(answer: Mapping[int, Where], view: RoutingView) -> Mapping[int, Where]:
    """A place for every expert in use; `device` only for those that are there, `defer` only before the last layer."""
    last = view.layer + 1 == view.num_layers
    for use in view.uses:
        where = answer.get(use.expert)
        if where not in get_args(Where):
            raise PolicyError("place", where, f"is no place for expert {use.expert}", f"Choose one of {', '.join(get_args(Where))}.")
        if where == "device" and use.expert not in view.resident:
            raise PolicyError("place", where, f"expert {use.expert} of layer {view.layer} is not on the device", "Answer 'fetch'.")
        if where == "defer" and last:
            raise PolicyError("place", where, "there is no layer after the last one", "Answer 'cpu'.")
    return answer


def checked_units(answer: Sequence[ExpertId], num_layers: int, num_experts: int) -> Sequence[ExpertId]:
    """Experts that the model has."""
    units = [ExpertId(*unit) for unit in answer]
    for unit in units:
        if not (0 <= unit.layer < num_layers and 0 <= unit.expert < num_experts):
            raise PolicyError("prefetch", tuple(unit), f"is no expert of {num_layers} layers with {num_experts} each",
                              "Return ExpertId(layer, expert).")  # fmt: skip
    return units


def unchecked(answer: A) -> A:
    return answer
