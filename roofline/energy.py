"""Energy of steps, joules per token, and which constraint binds a site (a Leontief production function).

Q = min over the staves of a barrel (compute, memory bandwidth, memory capacity, delivered power, cooling) times
utilisation, after "Energy-to-Token" (arXiv 2605.11733). Its efficiency multiplier is set to 1 here: techniques change
the operations, bytes and joules per token themselves, so a multiplier would count them twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from roofline.cost import CostModel, OpCost, StepCost
from roofline.errors import RooflineError, positive
from roofline.rows import Rows


@dataclass(frozen=True, slots=True)
class EnergySplit:
    """Joules of a step by cause, summed over the devices of the group."""

    compute: float
    memory: float
    link: float
    static: float

    @property
    def total(self) -> float:
        """All joules; equals ``StepCost.joules``."""
        return self.compute + self.memory + self.link + self.static


def price_per_token(step: StepCost, tokens: float) -> float | None:
    """Return what one of the ``tokens`` of a step costs, in the currency of ``Hardware.with_price`` (None: no price was
    given): the hours that all devices of the group are busy. An idle device costs as much, so this is the least."""
    per_hour = step.model.hardware.price_per_hour
    positive("tokens", tokens)
    return None if per_hour is None else step.seconds / 3600 * per_hour * step.model.tp / tokens


def split(step: StepCost) -> EnergySplit:
    """Divide a step's joules into compute, memory, link and static (the draw that flows anyway)."""
    model, n = step.model, step.model.tp
    compute = memory = link = 0.0
    for cost in step.per_op():
        part = model.op_energy(cost.op, cost.seconds)
        compute += n * cost.op.count * part.compute
        memory += n * cost.op.count * part.memory
        link += n * cost.op.count * part.link
    static = n * model.static_watts * step.seconds
    return EnergySplit(compute, memory, link, static)


@dataclass(frozen=True, slots=True)
class ClockPoint:
    """A step at a fraction of the clock: wall seconds, joules of the group and mean watts of one device."""

    clock: float
    seconds: float
    joules: float
    watts: float


def at_clock(step: StepCost, clock: float) -> ClockPoint:
    """Return a step at ``clock`` times the normal frequency.

    Compute takes 1 / clock as long and draws clock^2 of the energy per operation (voltage follows frequency);
    memory, links, launches and the static draw keep their pace. So a step bound by memory saves energy for nothing
    until compute becomes the longer part.
    """
    if not 0.1 <= clock <= 1:
        raise RooflineError(f"clock must lie in [0.1, 1] of the normal frequency, got {clock!r}")
    model, n = step.model, step.model.tp
    saved = dynamic = 0.0
    for cost in step.per_op():
        energy = model.op_energy(cost.op, cost.seconds)
        saved += cost.op.count * (max(cost.compute, cost.memory) - max(cost.compute / clock, cost.memory))
        dynamic += cost.op.count * (energy.compute * clock**2 + energy.memory + energy.link)
    seconds = step.seconds - saved
    joules = n * (dynamic + model.static_watts * seconds)
    return ClockPoint(clock, seconds, joules, joules / n / seconds)


def clock_sweep(step: StepCost, points: int = 19) -> list[ClockPoint]:
    """Return the step at evenly spaced clocks from 0.1 to 1, lowest first."""
    return [at_clock(step, 0.1 + 0.9 * i / (points - 1)) for i in range(points)]


def best_clock(step: StepCost) -> ClockPoint:
    """Return the clock with the least joules per step (the fastest of equals)."""
    return min(clock_sweep(step, 91), key=lambda point: (point.joules, point.seconds))


def under_cap(step: StepCost, watts: float) -> ClockPoint:
    """Return the fastest clock at which one device draws at most ``watts``; a cap below the lowest draw raises."""
    positive("watts", watts)
    allowed = [point for point in clock_sweep(step, 91) if point.watts <= watts]
    if not allowed:
        lowest = at_clock(step, 0.1).watts
        raise RooflineError(
            f"no clock meets a cap of {watts:g} W: the step draws {lowest:.0f} W at a tenth of the clock"
        )
    return max(allowed, key=lambda point: point.clock)


@dataclass(frozen=True, slots=True)
class Site:
    """What a site delivers: groups of devices, watts at its meter, PUE, and watts of heat it can remove.

    ``pue``: facility watts per watt of the devices. ``utilization``: useful tokens over computed tokens, times busy
    over wall time.
    """

    groups: int = 1
    power_watts: float = float("inf")
    pue: float = 1.2
    cooling_watts: float = float("inf")
    utilization: float = 1.0

    def __post_init__(self) -> None:
        if self.groups < 1 or self.pue < 1 or not 0 < self.utilization <= 1:
            raise RooflineError(
                "a site needs groups >= 1, pue >= 1 and utilization in (0, 1], got "
                f"{self.groups}, {self.pue} and {self.utilization}"
            )
        if not self.power_watts > 0 or not self.cooling_watts > 0:
            raise RooflineError("a site's power_watts and cooling_watts must lie above 0")


@dataclass(frozen=True, slots=True)
class BindingReport:
    """Tokens per second that each stave alone would allow, and which one is shortest.

    ``slack[stave]`` is how far it stands above the shortest (0 for the binding one, 1 for twice as long).
    """

    staves: Mapping[str, float]
    binding: str
    slack: Mapping[str, float]
    tokens_per_second: float
    joules_per_token: float


def binding(
    model: CostModel,
    rows: Rows,
    site: Site | None = None,
    *,
    tokens: float | None = None,
    kv_tokens: float | None = None,
) -> BindingReport:
    """Return what limits the tokens per second of a steady run of steps like ``rows``.

    ``tokens``: useful tokens of one step (by default the logits: one per row). ``kv_tokens``: cache tokens that fit
    into one group (:func:`roofline.memory.plan`); without it capacity is no stave.
    """
    site = site or Site()
    step = model.step(rows)
    made = float(len(rows) if tokens is None else tokens)
    positive("tokens", made)
    staves = _device_staves(model, step, made, site)
    per_token = step.joules / made
    staves["power"] = site.power_watts / site.pue / per_token
    staves["cooling"] = site.cooling_watts / per_token
    if kv_tokens is not None:
        positive("kv_tokens", kv_tokens)
        staves["capacity"] = site.groups * made / step.seconds * kv_tokens / sum(rows.kv)
    shortest = min(staves, key=lambda name: staves[name])
    limit = staves[shortest]
    slack = {name: value / limit - 1 for name, value in staves.items()}
    return BindingReport(
        MappingProxyType(staves), shortest, MappingProxyType(slack), limit * site.utilization, per_token
    )


def _device_staves(model: CostModel, step: StepCost, made: float, site: Site) -> dict[str, float]:
    """Return what the devices allow: each resource alone, and the step as it runs (launches and links included)."""
    listed: list[OpCost] = list(step.per_op())
    compute = sum(cost.op.count * cost.compute for cost in listed)
    memory = sum(cost.op.count * cost.memory for cost in listed)
    rate = site.groups * made
    return {"compute": rate / compute, "memory": rate / memory, "step": rate / step.seconds}
