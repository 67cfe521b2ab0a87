"""`llmlab roofline`: what a step of a model costs on a device, op by op, and what a technique would change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from llmlab.cli.tables import Fact
    from roofline.cost import OpCost, StepCost
    from roofline.energy import BindingReport, EnergySplit
    from roofline.lenses import Case, Comparison
    from roofline.memory import MemoryPlan

PREFILL_SHOWN = 2048  # tokens of the prompt that stands beside the step in the report's charts
EXAMPLES = """
[bold]Examples[/bold]

[cyan]llmlab roofline llama-2-7b t4[/cyan]   one request, 1,024 tokens seen

[cyan]llmlab roofline llama-3.1-8b a100 --batch 64 --context 2048 --lens int4 --lens kv8 --lens gqa:4[/cyan]

[cyan]llmlab roofline qwen3-30b-a3b h100 --prefill 4096 --report roofline.html[/cyan]

[cyan]llmlab roofline --list[/cyan]   devices, models and lenses
"""


class Priced(NamedTuple):
    """A step, priced, and what stands around it."""

    case: Case
    step: StepCost
    plan: MemoryPlan
    problem: str | None  # the sentence that says what is missing for this load, and what would make it fit
    binding: BindingReport
    energy: EnergySplit
    context: int
    lenses: tuple[Comparison, ...]
    together: Comparison | None


class OpRow(NamedTuple):
    """One kind of op over all layers of one device: operations, bytes, seconds."""

    name: str
    executions: float
    flops: float
    bytes: float
    intensity: float
    bound: str
    seconds: float


def add_to(app: typer.Typer) -> None:
    app.command(epilog=EXAMPLES)(roofline)


def roofline(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A known shape or hub id.", show_default=False)] = "llama-2-7b",
    hardware: Annotated[str, typer.Argument(metavar="[HARDWARE]", help="A device of the table.", show_default=False)] = "a100",
    batch: Annotated[int, typer.Option(help="Requests that decode one token each.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens that each of them sees.")] = 1024,
    prefill: Annotated[int | None, typer.Option(help="Instead of decoding: a whole prompt of so many tokens.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16, fp8, fp32, w4a16, w8a8, w8a8kv8 ... [dim]\\[default: the device's][/dim]",
                                              show_default=False)] = None,
    tp: Annotated[int, typer.Option("--tp", help="Devices that share every layer.")] = 1,
    per_hour: Annotated[float | None, typer.Option("--price", help="What a device costs for an hour, in any currency: adds what a million tokens cost.",
                                                   show_default=False)] = None,
    lens: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A technique, before and after; may be repeated. "
                                                   "`--list` names them.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Write the tables and charts as an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="Show devices, models and lenses.")] = False,
) -> None:  # fmt: skip
    """What a step costs, op by op: operations, bytes, what binds it, time, energy, and what fits into memory.

    All numbers are modelled: data sheets, with the fraction of them that kernels reach. docs/roofline.md says how well
    that agrees with measurements.
    """
    if show_list:
        _print_list()
        return
    priced = price(model, hardware, batch, context, prefill, dtype, tp, lens or [], per_hour)
    if as_json:
        _print_json(priced)
    else:
        _print(priced)
    if report is not None:
        _write(report, priced)


# ---------------------------------------------------------------------------------------------- pricing
def price(model: str, hardware: str, batch: int, context: int, prefill: int | None, dtype: str | None, tp: int,
          lenses: Sequence[str], per_hour: float | None = None) -> Priced:  # fmt: skip
    """Price a step and the techniques; `per_hour`: what a device costs. Raises ConfigError or RooflineError."""
    from llmlab.cli.lenses import lens_of
    from roofline import energy
    from roofline.hardware import get as get_hardware
    from roofline.lenses import Case, Comparison, compare, compose

    _check(batch, context, prefill, tp)
    rows = _rows(batch, context, prefill)
    device = get_hardware(hardware) if per_hour is None else get_hardware(hardware).with_price(per_hour)
    case = Case.of(model, device, rows, dtype, tp=tp, tokens=rows.tokens)  # of a prompt, too, every token counts
    cost = case.model()
    step = cost.step(case.rows)
    seen = context if prefill is None else prefill
    plan, problem = _room(case, batch, seen)
    found = [lens_of(text, case) for text in lenses]
    together = compose(case, found)
    both = Comparison("all together", case.outcome(), together.outcome()) if len(found) > 1 else None
    limits = energy.binding(cost, case.rows, tokens=case.tokens, kv_tokens=float(plan.tokens) if plan.tokens else None)
    return Priced(case, step, plan, problem, limits, energy.split(step), seen, tuple(compare(one, case) for one in found), both)


def _room(case: Case, batch: int, context: int) -> tuple[MemoryPlan, str | None]:
    """What the memory of one device holds, and why the load does not fit, if it does not."""
    from roofline.memory import DoesNotFit, room_for

    try:
        return room_for(case.shape, case.hardware, case.precision, sequences=batch, context=context, tp=case.tp), None
    except DoesNotFit as error:
        return error.plan, str(error)


def _check(batch: int, context: int, prefill: int | None, tp: int) -> None:
    from llmlab.types import ConfigError

    for name, value in (("batch", batch), ("context", context), ("prefill", prefill), ("tp", tp)):
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be at least 1")


def _rows(batch: int, context: int, prefill: int | None) -> Any:
    from roofline.rows import Rows

    return Rows.decode(batch, context) if prefill is None else Rows.prefill(*[prefill] * batch)


def op_rows(costs: Sequence[OpCost]) -> list[OpRow]:
    """One row for each name of an op, in the order of the step; sums over layers of one device."""
    groups: dict[str, list[OpCost]] = {}
    for cost in costs:
        groups.setdefault(cost.op.name, []).append(cost)
    return [_op_row(name, group) for name, group in groups.items()]


def _op_row(name: str, group: Sequence[OpCost]) -> OpRow:
    def total(get: Callable[[OpCost], float]) -> float:
        return sum(cost.op.count * get(cost) for cost in group)

    flops, moved = total(lambda c: c.op.flops), total(lambda c: c.op.bytes + c.op.bytes_link)
    longest = max(group, key=lambda c: c.seconds * c.op.count)
    return OpRow(name, sum(c.op.count for c in group), flops, moved, flops / moved if moved else 0.0, longest.bound,
                 total(lambda c: c.seconds))  # fmt: skip


# -------------------------------------------------------------------------------------------- printing
def quantity(value: float, unit: str) -> str:
    """A number of three digits with a decimal prefix: 13.2 GB, 1.27 TFLOP."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{rate(value / factor)} {prefix}{unit}"
    return f"{rate(value)} {unit}"


def rate(value: float) -> str:
    """A number of three digits, or whole."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def title(p: Priced) -> str:
    """What was priced, as a phrase."""
    n, case = len(p.case.rows), p.case
    decode = all(q == 1 for q in case.rows.query)
    what = f"decode of {n}, {p.context:,} tokens seen by each" if decode else f"prefill of {n} x {p.context:,} tokens"
    return f"{case.shape.name}, {case.precision.name}, on {f'{case.tp} x ' if case.tp > 1 else ''}{case.hardware.name}: {what}"


def op_table(p: Priced) -> list[list[str]]:
    """All ops of a step with their share of its time; a head first."""
    rows = [["op", "count", "operations", "bytes", "op/byte", "bound", "time", "share"]]
    for row in op_rows(p.step.per_op()):
        rows.append([row.name, f"{row.executions:g}", quantity(row.flops, "FLOP"), quantity(row.bytes, "B"), rate(row.intensity), row.bound,
                     _seconds(row.seconds), f"{row.seconds / p.step.seconds:.1%}"])  # fmt: skip
    return rows


def totals(p: Priced) -> list[Fact]:
    """The step as a whole, and what a token costs."""
    from llmlab.cli.tables import Fact

    step, case, limits = p.step, p.case, p.binding
    peak = step.flops / step.seconds / case.tp / case.hardware.peak_of(case.precision.linear_format)
    memory = step.bytes_hbm / step.seconds / case.tp / case.hardware.bandwidth
    parts = {name: getattr(p.energy, name) / p.energy.total for name in ("compute", "memory", "link", "static")}
    return [
        Fact("step", _seconds(step.seconds), f"most of it {step.bound}"),
        Fact("operations", quantity(step.flops, "FLOP"), f"{peak:.1%} of the arithmetic"),
        Fact("bytes", quantity(step.bytes_hbm, "B"), f"{memory:.1%} of the memory bandwidth"),
        Fact("tokens", f"{rate(case.tokens / step.seconds)} /s", f"at most: {_useful(case)} a step"),
        Fact("scarcest", *_scarcest(limits)),
        *_money(p),
        Fact("energy", f"{limits.joules_per_token:.3g} J/token", ", ".join(f"{k} {v:.0%}" for k, v in parts.items() if v >= 0.005)),
    ]


def _money(p: Priced) -> list[Fact]:
    """What a million tokens cost, if somebody said what a device costs."""
    from llmlab.cli.tables import Fact
    from roofline.energy import price_per_token

    per_token = price_per_token(p.step, p.case.tokens)
    if per_token is None:
        return []
    group = f"{p.case.tp} devices at " if p.case.tp > 1 else ""
    return [Fact("price", f"{1e6 * per_token:.3g}", f"for a million tokens, {group}{p.case.hardware.price_per_hour:g} an hour")]


def _useful(case: Case) -> str:
    from llmlab.events.why import count

    kind = "token" if all(q == 1 for q in case.rows.query) else "prompt token"
    made = count(int(case.tokens), kind)
    return f"{made} by {case.tp} devices together in" if case.tp > 1 else f"{made} in"


def _scarcest(limits: BindingReport) -> tuple[str, str]:
    """The resource that alone would allow the fewest tokens a second, and all of them in that order."""
    alone = {name: rate for name, rate in limits.staves.items() if rate < float("inf") and name != "step"}
    ranked = sorted(alone, key=lambda name: alone[name])
    return ranked[0], "alone it would allow " + ", ".join(f"{f'{name} ' if i else ''}{rate(alone[name])} tok/s" for i, name in enumerate(ranked))


def memory_facts(p: Priced) -> list[Fact]:
    """What one device holds."""
    from llmlab.cli.tables import Fact
    from llmlab.events.why import count

    plan, gib = p.plan, 2.0**30
    missing = [Fact("fits", "no", p.problem)] if p.problem else []
    return [
        Fact("memory", f"{plan.capacity / gib:.1f} GiB", f"{plan.usable / gib:.1f} GiB of it for the engine, on each device"),
        Fact("weights", f"{plan.weights / gib:.2f} GiB", f"activations {plan.activations / gib:.2f} GiB"),
        Fact("KV cache", f"{quantity(plan.kv_per_token, 'B')}/token", f"{plan.tokens:,} tokens fit: {count(plan.sequences(p.context), 'request')} of {p.context:,}"),
        *missing,
    ]  # fmt: skip


def lens_table(p: Priced) -> list[list[str]]:
    """Before and after of every technique, and of all together; a head first."""
    rows = [["technique", "tokens/s", "speed", "tok/J", "weights", "KV/token"]]
    for c in (*p.lenses, *([p.together] if p.together is not None else [])):
        rows.append([c.name, f"{rate(c.before.tokens_per_second)} → {rate(c.after.tokens_per_second)}", f"x{c.speedup:.2f}",
                     f"x{c.energy_gain:.2f}", quantity(c.after.weights, "B"), quantity(c.after.kv_per_token, "B")])  # fmt: skip
    return rows


def _seconds(value: float) -> str:
    from llmlab.events.why import seconds

    return seconds(value)


def _print(p: Priced) -> None:
    from llmlab.cli.console import stderr, stdout
    from llmlab.cli.tables import facts_table, text_table

    console = stdout()
    console.print(f"[bold]{title(p)}[/bold] (modelled{', ops of one device' if p.case.tp > 1 else ''})")
    console.print(text_table(op_table(p)))
    console.print()
    console.print(facts_table([*totals(p), *(fact for fact in memory_facts(p) if fact.name != "fits")]))
    if p.problem:
        stderr().print(p.problem, style="yellow", markup=False)
    if p.lenses:
        console.print("\n[bold]Techniques[/bold], before and after")
        console.print(text_table(lens_table(p)))


def _print_json(p: Priced) -> None:
    from dataclasses import asdict

    import msgspec

    from roofline.energy import price_per_token

    case, step = p.case, p.step
    value = {
        "model": case.shape.name, "hardware": case.hardware.name, "precision": case.precision.name, "tp": case.tp, "mode": "modelled",
        "step": {"seconds": step.seconds, "flops": step.flops, "bytes": step.bytes_hbm, "link_bytes": step.bytes_link, "joules": step.joules,
                 "bound": step.bound, "tokens": case.tokens, "tokens_per_second": case.tokens / step.seconds},
        "ops": [row._asdict() for row in op_rows(step.per_op())],
        "limits": {k: v for k, v in p.binding.staves.items() if v < float("inf")}, "joules_per_token": p.binding.joules_per_token,
        "price_per_token": price_per_token(step, case.tokens),
        "energy": asdict(p.energy),
        "memory": {**asdict(p.plan), "tokens": p.plan.tokens, "problem": p.problem},
        "lenses": [_lens_json(c) for c in p.lenses],
        "together": _lens_json(p.together) if p.together is not None else None,
    }  # fmt: skip
    typer.echo(msgspec.json.encode(value).decode())


def _lens_json(c: Comparison) -> dict[str, Any]:
    names = ("seconds", "flops", "bytes", "joules", "weights", "kv_per_token", "tokens", "tokens_per_second", "joules_per_token")
    sides = {side: {name: getattr(getattr(c, side), name) for name in names} for side in ("before", "after")}
    return {"name": c.name, "speedup": c.speedup, "energy_gain": c.energy_gain, "memory_gain": c.memory_gain, **sides}


# ------------------------------------------------------------------------------------------ list, report
def _print_list() -> None:
    from llmlab.cli.console import stdout
    from llmlab.cli.lenses import FORMS
    from llmlab.cli.tables import text_table
    from roofline import hardware, shapes

    console = stdout()
    devices = [["device", "memory", "bandwidth", "peak", "TDP", "op/byte at the ridge"]]
    for d in hardware.table().values():
        peak = f"{quantity(d.peak_of(d.default_dtype), 'FLOP/s')} {d.default_dtype}"
        devices.append([d.name, f"{d.memory_bytes / 2**30:g} GiB", quantity(d.bandwidth, "B/s"), peak, f"{d.tdp:g} W", f"{d.ridge():.0f}"])
    models = [["model", "parameters", "used by a token", "layers", "KV/token (fp16)"]]
    for s in shapes.table().values():
        active = quantity(s.num_params(active=True), "") if s.num_experts else "all"
        models.append([s.name, quantity(s.num_params(), ""), active, str(s.num_layers), quantity(s.kv_bytes_per_token(), "B")])
    lenses = [["lens", "what it does"], *([form.text, form.about] for form in FORMS.values())]
    for rows, wide in ((devices, 1), (models, 1), (lenses, 2)):
        console.print(text_table(rows, wide))
        console.print()


def _write(path: Path, p: Priced) -> None:
    from llmlab.cli.console import stderr, working
    from llmlab.cli.pages import Section, write_roofline

    facts = [["quantity", "value", "note"], *([f.name, f.value, f.meaning] for f in (*totals(p), *memory_facts(p)))]
    tables = [Section("Ops of one step", op_table(p)), Section("In total", facts, wide=3)]
    if p.lenses:
        tables.insert(0, Section("Techniques, before and after", lens_table(p)))
    lead = f"A step takes {_seconds(p.step.seconds)}, most of it {p.step.bound}: at most {rate(p.case.tokens / p.step.seconds)} tokens per second. All numbers are modelled."
    with working("Writing the report"):
        write_roofline(path, title(p), lead, _charts(p), tables)
    stderr().print(f"Report: {path}", markup=False)


def _charts(p: Priced) -> dict[str, Callable[[], Any]]:
    """The step beside a long prompt (or, if it is one, beside a decode of one request) on the roofline, and its parts."""
    from roofline import charts
    from roofline.rows import Rows

    cost, decode = p.step.model, all(q == 1 for q in p.case.rows.query)
    other = Rows.prefill(PREFILL_SHOWN) if decode else Rows.decode(1, p.context)
    names = (f"decode of {len(p.case.rows)}", f"prefill of {PREFILL_SHOWN:,}") if decode else (f"prefill of {p.context:,}", "decode of 1")
    steps = dict(zip(names, (p.step, cost.step(other))))
    plan, tokens = p.plan, len(p.case.rows) * p.context
    found: dict[str, Callable[[], Any]] = {
        "roofline": lambda: charts.roofline(steps), "time": lambda: charts.time_stack(steps),
        "energy": lambda: charts.energy_waterfall(p.step, p.case.tokens),
    }  # fmt: skip
    found["memory"] = lambda: charts.memory_bar([plan], tokens)
    if p.lenses:
        found["techniques"] = lambda: charts.lens_gains(p.lenses, f"{title(p)} (modelled)")
    return found
