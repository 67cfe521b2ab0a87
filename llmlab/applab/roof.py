"""Two set-ups on one roofline: what a step costs, what fits, what techniques would change. All numbers are modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from llmlab.ui.chart import seconds
from roofline import charts
from roofline.cost import StepCost
from roofline.energy import split
from roofline.errors import RooflineError
from roofline.lenses import Case, Comparison, compare, standard
from roofline.memory import DoesNotFit, MemoryPlan, room_for
from roofline.rows import Rows

MACHINES = ("t4", "a10", "a100", "h100", "h200")
MODELS = ("lab-s", "llama-2-7b", "llama-3.1-8b", "llama-3.1-70b", "qwen3-8b", "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v2-lite")
WIDTHS = ("fp16", "w8a16", "w4a16")


class SetUp(msgspec.Struct, frozen=True):
    """A model on a machine under a batch."""

    model: str = "llama-3.1-8b"
    machine: str = "a100"
    width: str = "fp16"
    batch: int = 8
    context: int = 1024
    prefill: bool = False

    @property
    def case(self) -> Case:
        """Raises RooflineError for numbers that the machine has no peak for."""
        rows = Rows.prefill(*[self.context] * self.batch) if self.prefill else Rows.decode(self.batch, self.context)
        return Case.of(self.model, self.machine, rows, self.width, tokens=rows.tokens)

    @property
    def label(self) -> str:
        what = "prefill" if self.prefill else "decode"
        return f"{what} of {self.batch}, {self.model} {self.width}, {self.machine}"


class Priced(msgspec.Struct, frozen=True):
    """One set-up with all that is shown of it. `fits`: what the memory holds; `problem`: what is missing, if anything."""

    name: str
    setup: SetUp
    case: Any
    step: Any
    fits: MemoryPlan
    problem: str = ""

    @property
    def tokens_per_second(self) -> float:
        return float(self.case.tokens / self.step.seconds)

    @property
    def joules_per_token(self) -> float:
        return float(split(self.step).total / self.case.tokens)


def priced(name: str, setup: SetUp) -> Priced:
    """Price a set-up. Raises RooflineError."""
    case = setup.case
    step = case.model().step(case.rows)
    try:
        fits, problem = room_for(case.shape, case.hardware, case.precision, sequences=setup.batch, context=setup.context), ""
    except DoesNotFit as error:
        fits, problem = error.plan, str(error)
    return Priced(name, setup, case, step, fits, problem)


def roofline_chart(a: Priced, b: Priced) -> Any:
    """Both steps on one roofline; with two machines, both ceilings."""
    import altair as alt

    steps: dict[str, StepCost] = {"A": a.step} if b.setup == a.setup else {"A": a.step, "B": b.step}
    others = [b.case.hardware] if b.case.hardware.name != a.case.hardware.name else []
    told = f"A: {a.setup.label}. B: {b.setup.label}. A mark is an op, its area the share of its step's time (modelled)"
    return charts.roofline(steps, others).properties(title=alt.Title(finding(a, b), subtitle=told))


def finding(a: Priced, b: Priced) -> str:
    """The difference of the two in one sentence."""
    if a.setup == b.setup:
        return (f"{a.setup.label}: a step takes {seconds(a.step.seconds)}, most of it {a.step.bound}; "
                f"{a.tokens_per_second:,.0f} tokens/s, {a.joules_per_token:.3g} J a token")  # fmt: skip
    fast, slow = (b, a) if b.tokens_per_second >= a.tokens_per_second else (a, b)
    words = f"{fast.name} makes {_times(fast.tokens_per_second / slow.tokens_per_second)} the tokens per second of {slow.name}"
    thirsty, frugal = (b, a) if b.joules_per_token >= a.joules_per_token else (a, b)
    energy = f"a token of {thirsty.name} costs {_times(thirsty.joules_per_token / frugal.joules_per_token)} the energy"
    large = [p.name for p in (a, b) if p.problem]
    said = f". {' and '.join(large)} would not fit into memory" if large else ""
    return f"{words}, and {energy}; A is bound by {a.step.bound}, B by {b.step.bound}{said}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 20 else f"{ratio:.3g} times"


def table(both: Sequence[Priced]) -> str:
    """A and B side by side, as Markdown."""
    facts: Mapping[str, Any] = {
        "what": lambda p: p.setup.label,
        "a step takes": lambda p: f"{seconds(p.step.seconds)}, bound by {p.step.bound}",
        "tokens per second": lambda p: f"{p.tokens_per_second:,.0f}",
        "joules per token": lambda p: f"{p.joules_per_token:.3g}",
        "share of peak arithmetic": lambda p: f"{p.step.flops / p.step.seconds / p.case.hardware.peak_of(p.case.precision.linear_format):.1%}",
        "share of memory bandwidth": lambda p: f"{p.step.bytes_hbm / p.step.seconds / p.case.hardware.bandwidth:.1%}",
        "what fits": _fits,
    }
    lines = ["| | " + " | ".join(p.name for p in both) + " |", "|:---|" + ":---|" * len(both)]
    lines += [f"| {name} | " + " | ".join(of(p) for p in both) + " |" for name, of in facts.items()]
    return "\n".join(lines)


def _fits(p: Priced) -> str:
    if p.problem:
        return p.problem.replace("|", "/")
    return f"{p.fits.tokens:,} tokens of KV: {p.fits.sequences(p.setup.context):,} requests of {p.setup.context:,}"


def gains(p: Priced, names: Sequence[str]) -> list[Comparison]:
    """Each of the named techniques before and after; those that do not suit the case are left out."""
    found = []
    for lens in standard(p.case):
        if lens.name in names:
            try:
                found.append(compare(lens, p.case))
            except RooflineError:
                continue
    return found


def lens_names(p: Priced) -> list[str]:
    """The techniques that suit a set-up."""
    return [lens.name for lens in standard(p.case)]


def memory_chart(both: Sequence[Priced]) -> Any:
    """What the memory of A and of B has to hold, against its wall."""
    plans = [p.fits for p in both]
    if len(plans) == 2 and both[0].setup == both[1].setup:
        plans = plans[:1]
    return charts.memory_bar(plans, both[0].setup.batch * both[0].setup.context)
