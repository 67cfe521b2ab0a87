"""Experts that do not fit: Fiddler, KTransformers, Mixtral-offloading and MoE-Infinity as policies at one seam.

Simulated: Mixtral-8x7B in fp16 on an A10 that holds 56 of its 256 experts, PCIe 4, two hosts; the routing is recorded from
lab-moe, a trained mixture with as many experts a layer, whose layers are repeated to the depth of Mixtral. Measured: the
same policies on lab-moe itself, with real threads and copies, for exactness and for what deferral costs in answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llmlab.clock import VirtualClock
from llmlab.events import catalog as ev
from llmlab.events.log import EventLog
from llmlab.execution.expert_timeline import Host, OffloadRun, RooflineExperts, simulate
from llmlab.papers import Finding, Progress, Report, Table
from llmlab.scheduling.expert_calls import told
from llmlab.scheduling.weights import WEIGHT_PLACEMENTS, Oracle
from llmlab.seams import WeightPlacement
from llmlab.workloads.routing import RoutingTrace, load_routing
from roofline.cost import CostModel

# What a host reads per second, and the float32 rate that its cores reach (70 % of cores x clock x operations per cycle).
DESKTOP = Host("2 channels of DDR4, 8 cores", 40e9, 0.65e12)
SERVER = Host("8 channels of DDR5, 32 cores", 250e9, 2.9e12)
HOSTS = (DESKTOP, SERVER)
SLOTS = 56  # of Mixtral's 256 experts: what 24 GB hold beside attention, embeddings and KV (the card's figure)
PROFILED = 20  # sequences on which popularity is measured; the others are served
WHOSE = {
    "on_demand": "naive offloading", "popular": "static popularity", "lru": "Mixtral-offloading", "next_router": "its speculative loading",
    "lfu": "", "similar_past": "MoE-Infinity", "cheaper_side": "Fiddler", "balanced": "", "cpu_experts": "KTransformers",
    "deferred": "its expert deferral", "oracle": "Belady",
}  # fmt: skip


class Setting(NamedTuple):
    """The large model's routing, cut into what was profiled and what is served."""

    served: RoutingTrace
    popularity: tuple[tuple[float, ...], ...]


def setting(trace: RoutingTrace, num_layers: int = 32) -> Setting:
    deep = trace.deeper(num_layers)
    return Setting(deep.sequences(PROFILED, deep.num_sequences), deep.sequences(0, PROFILED).popularity())


def costs(host: Host, hardware: str = "a10") -> RooflineExperts:
    return RooflineExperts(CostModel("mixtral-8x7b", hardware, "fp16"), host)


def decode(policy: str, at: Setting, host: Host, batch: int, num_steps: int) -> OffloadRun:
    """`num_steps` steps of `batch` sequences under a policy."""
    steps = list(at.served.decode_steps(batch, num_steps))
    return simulate(_policy(policy, at.served, steps), at.served, steps, costs(host), SLOTS, at.popularity, 512 * batch)


def prefill(policy: str, at: Setting, host: Host, num_tokens: int, num_slots: int = SLOTS) -> OffloadRun:
    """One prompt in one step."""
    steps = [at.served.prompt_rows(num_tokens)]
    kv = num_tokens * (num_tokens + 1) // 2
    return simulate(_policy(policy, at.served, steps), at.served, steps, costs(host), num_slots, at.popularity, kv)


def _policy(name: str, trace: RoutingTrace, steps: Sequence[Sequence[int]]) -> WeightPlacement:
    if name != "oracle":
        return WEIGHT_PLACEMENTS.resolve(name)
    return Oracle([[[u.expert for u in trace.uses(rows, layer)] for layer in range(trace.num_layers)] for rows in steps])


def crossing(host: Host) -> int:
    """Tokens of one expert from which bringing it is sooner done than computing it on the CPU."""
    price = costs(host)
    return next(n for n in range(1, 100_000) if price.cpu(n) > price.fetch + price.device(n))


# ---------------------------------------------------------------------------------------- experiment
def run(quick: bool, progress: Progress) -> Report:
    """The whole experiment; `quick`: fewer steps and batches, and nothing measured."""
    trace = load_routing("lab-moe")
    at = setting(trace)
    batches, num_steps = ((1,), 16) if quick else ((1, 4, 16), 60)
    runs: dict[tuple[str, str, int], OffloadRun] = {}
    todo = [(host, name, batch) for host in HOSTS for name in WHOSE for batch in batches]
    for number, (host, name, batch) in enumerate(todo):
        progress(0.8 * number / len(todo), f"{name}, {host.name}, batch {batch}")
        runs[host.name, name, batch] = decode(name, at, host, batch, num_steps)
    prompts = (64, 2048) if quick else (64, 256, 1024, 2048, 4096)
    progress(0.8, "prompts")
    tables = [_costs_table(), _hits_table(at, num_steps), *(_decode_table(host, runs, batches) for host in HOSTS), _prefill_table(at, prompts)]
    findings = [*_simulated(at, runs), *_trace_findings(trace)]
    if not quick:
        progress(0.85, "lab-moe for real: exactness and deferral")
        findings += measured(24)
    figures: Mapping[str, Callable[[], Any]] = {
        "gantt": lambda: _gantt(decode("balanced", at, DESKTOP, 1, 6)), "experts": lambda: _heat(runs[DESKTOP.name, "lru", 1]),
        "rates": lambda: rates_chart(runs, batches[0]),
    }  # fmt: skip
    return Report("moe_offload", "Expert offload on one machine: Fiddler, KTransformers, Mixtral-offloading, MoE-Infinity",
                  f"simulated: Mixtral-8x7B fp16 on an A10, {SLOTS} of 256 experts resident, PCIe 4 at 25 GB/s, routing of lab-moe "
                  f"({len(trace.experts):,} tokens) repeated to 32 layers, {num_steps} steps; seed 0", tuple(findings), tuple(tables),
                  figures)  # fmt: skip


def _simulated(at: Setting, runs: Mapping[tuple[str, str, int], OffloadRun]) -> list[Finding]:
    def rate(host: Host, name: str) -> float:
        return runs[host.name, name, 1].tokens_per_second

    here = {host.name: costs(host) for host in HOSTS}
    ratios = [(here[h.name].fetch + here[h.name].device(1)) / here[h.name].cpu(1) for h in HOSTS]
    long = [prefill("cpu_experts", at, h, 2048, 1).seconds / prefill("on_demand", at, h, 2048, 1).seconds for h in HOSTS]
    hits = {name: runs[DESKTOP.name, name, 1].hit_rate for name in ("popular", "lru", "oracle")}
    ahead = [rate(h, "cheaper_side") / max(rate(h, "on_demand"), rate(h, "lru")) for h in HOSTS]
    deferral = rate(SERVER, "deferred") / rate(SERVER, "cpu_experts")
    return [
        Finding("At batch 1 an expert is computed on the CPU sooner than it is brought over PCIe 4 (Mixtral, 16 bits)",
                f"{ratios[0]:.1f} times sooner on the desktop, {ratios[1]:.1f} times on the server", "computed",
                ratios[0] > 1.5 and ratios[1] > 5),
        Finding("For a prompt of 2,048 tokens bringing the experts wins",
                f"{long[0]:.1f} times sooner than the desktop's CPU, {long[1]:.1f} times than the server's, nothing resident",
                "simulated", min(long) > 3),
        Finding("Fiddler: 8.2 times Mixtral-offloading, 1.26 times the best baseline (single requests, other machines)",
                f"{ahead[0]:.2f} times the better of fetching on demand and LRU on the desktop, {ahead[1]:.2f} times on the server",
                "simulated", min(ahead) > 1),
        Finding("A least-recently-used cache of experts is hit more often than the most popular experts kept for ever",
                f"hits: popular {hits['popular']:.1%}, LRU {hits['lru']:.1%}, with the future known {hits['oracle']:.1%}", "simulated",
                hits["popular"] < hits["lru"] <= hits["oracle"]),
        Finding("KTransformers: deferring experts gives up to 1.45 times the throughput", f"{deferral:.2f} times on the server",
                "simulated", None),
    ]  # fmt: skip


def _trace_findings(trace: RoutingTrace) -> list[Finding]:
    recall = (trace.guess[:, :-1, :, None] == trace.experts[:, 1:, None, :]).any(-1).mean()
    stay = (trace.experts[1:, :, :, None] == trace.experts[:-1, :, None, :]).any(-1).mean()
    return [
        Finding("Mixtral-offloading: the next layer's router, asked one layer early, finds 80-90 % of the experts (second-hand)",
                f"{recall:.0%} in lab-moe; chance would be {2 / trace.num_experts:.0%}", "measured", None),
        Finding("Routing is local in time", f"a token takes {stay:.0%} of the experts of the token before it (lab-moe)", "measured",
                bool(stay > 2 / trace.num_experts)),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- for real
def measured(num_problems: int) -> list[Finding]:
    """lab-moe on this machine: the same answers under every exact policy, and what deferral changes."""
    from llmlab import tasks

    rng = random.Random("moe-offload")
    asked = [tasks.suite("arith").problem(rng, k=1, style="slow", split="test") for _ in range(num_problems)]
    answers = {name: _answers(name, [p.prompt for p in asked]) for name in ("resident", "on_demand", "lru", "balanced", "deferred")}
    same = [name for name in ("on_demand", "lru", "balanced") if answers[name] == answers["resident"]]
    right = {name: sum(tasks.verify(p, text) for p, text in zip(asked, answers[name], strict=True)) for name in answers}
    return [
        Finding("Offloading changes no answer", f"{len(same)} of 3 policies give all {num_problems} answers of the resident model to "
                "the letter, 8 of 48 experts on the device", "measured", len(same) == 3),
        Finding("KTransformers: deferral costs at most 0.5 points of accuracy",
                f"one product, slow style: {right['resident']} of {num_problems} right resident, {right['deferred']} deferred; "
                f"mean KL of the next token {divergence([p.prompt for p in asked[:8]]):.3g} nats", "measured", None),
    ]  # fmt: skip


def _answers(policy: str, prompts: Sequence[str]) -> list[str]:
    from llmlab.llm import LLM
    from llmlab.types import SamplingParams

    fields: dict[str, Any] = {} if policy == "resident" else {"num_expert_slots": 8}
    llm = LLM("lab-moe", weights=policy, num_blocks=512, **fields)
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=64, temperature=0.0))
    llm.close()
    return [output.outputs[0].text for output in outputs]


def divergence(prompts: Sequence[str]) -> float:
    """Mean KL(resident || deferred) of the next token over the positions of prompts, from the 20 likeliest tokens (nats)."""
    import math

    from llmlab.llm import LLM
    from llmlab.types import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=20)
    seen = []
    for fields in ({"weights": "resident"}, {"weights": "deferred", "num_expert_slots": 8}):
        llm = LLM("lab-moe", num_blocks=512, **fields)  # type: ignore[arg-type]
        seen.append([scores for output in llm.generate(list(prompts), params) for scores in output.prompt_logprobs or () if scores])
        llm.close()
    total = 0.0
    for exact, deferred in zip(*seen, strict=True):
        other, rest = dict(deferred.top), min(value for _, value in deferred.top)
        total += sum(math.exp(value) * (value - other.get(token, rest)) for token, value in exact.top)
    return total / max(1, len(seen[0]))


# ------------------------------------------------------------------------------------------ tables
def _costs_table() -> Table:
    rows = []
    for host in HOSTS:
        price = costs(host)
        rows.append((host.name, f"{1e3 * price.fetch:.1f}", f"{1e3 * price.device(1):.2f}", f"{1e3 * price.cpu(1):.2f}",
                     f"{1e3 * price.cpu(512):.0f}", str(crossing(host))))  # fmt: skip
    return Table("One expert of Mixtral-8x7B (352 MB)", ("host", "bring it, ms", "device, 1 token", "CPU, 1 token", "CPU, 512 tokens",
                 "tokens from which bringing wins"), tuple(rows), "computed from the roofline; A10, PCIe 4 at 80 % of the sheet")  # fmt: skip


def _hits_table(at: Setting, num_steps: int) -> Table:
    slots, names, steps = (56, 96, 128, 192), ("popular", "lru", "lfu", "oracle"), list(at.served.decode_steps(1, num_steps))
    price = costs(SERVER)
    rows = tuple((name, *(f"{simulate(_policy(name, at.served, steps), at.served, steps, price, n, at.popularity, 512).hit_rate:.0%}"
                          for n in slots)) for name in names)  # fmt: skip
    return Table("Experts found resident, one sequence, by how many of the 256 fit", ("policy", *map(str, slots)), rows, "simulated")


def _decode_table(host: Host, runs: Mapping[tuple[str, str, int], OffloadRun], batches: Sequence[int]) -> Table:
    columns = ("policy", "as in", *(f"tok/s, batch {b}" for b in batches), *(f"hits, batch {b}" for b in batches), "GB over the link a token")
    rows = []
    for name, whose in WHOSE.items():
        mine = [runs[host.name, name, batch] for batch in batches]
        moved = len(mine[0].fetches) * costs(host).num_bytes / mine[0].tokens / 1e9
        rows.append((name, whose, *(f"{r.tokens_per_second:.2f}" for r in mine), *(f"{r.hit_rate:.0%}" for r in mine), f"{moved:.1f}"))
    return Table(f"Decoding, {host.name}", columns, tuple(rows), "simulated; hits: experts resident when their layer asked for them")


def _prefill_table(at: Setting, prompts: Sequence[int]) -> Table:
    names = ("on_demand", "cpu_experts", "cheaper_side", "balanced")
    rows = tuple((host.name, name, *(f"{prefill(name, at, host, n).seconds:.2f}" for n in prompts)) for host in HOSTS for name in names)
    return Table("A prompt in one step: seconds", ("host", "policy", *(f"{n} tokens" for n in prompts)), rows, "simulated")


# ----------------------------------------------------------------------------------------- pictures
def as_run(done: OffloadRun, price: RooflineExperts, policy: str, load: str) -> Any:
    """The simulation as a log, so that the figures of runs can show it."""
    from llmlab.events.trace import Run

    log = EventLog(VirtualClock(), level=4, capacity=1 << 22)
    log.emit(ev.RunStarted, level=4, mode="simulated", seed=0, hardware={"name": "a10, PCIe 4"}, config={"weights": policy},
             model={"name": f"mixtral-8x7b, {load}"})  # fmt: skip
    for span in done.spans:
        log.emit(ev.Span, resource=span.resource, start=span.start, end=span.end, op=span.op)
    for fetch in done.fetches:
        if fetch.evicted is not None:
            log.emit(ev.ExpertEvicted, layer=fetch.evicted.layer, expert=fetch.evicted.expert, unused=fetch.unused)
        log.emit(ev.ExpertFetched, layer=fetch.unit.layer, expert=fetch.unit.expert, bytes=int(price.num_bytes), reason=fetch.reason)
    for dispatch in done.dispatches:
        at = told(dispatch.work.layer, dispatch.chosen)
        log.emit(ev.ExpertsDispatched, layer=at.layer, device=at.device, fetched=at.fetched, cpu=at.cpu, deferred=at.deferred)
    return Run.of(log)


def _gantt(done: OffloadRun) -> Any:
    from llmlab.ui.resources import resource_gantt

    ends = [d.end for d in done.dispatches]
    first = len(ends) - 32 + 4
    return resource_gantt(as_run(done, costs(DESKTOP), "balanced", "batch 1"), ends[first - 1], ends[first + 4])


def _heat(done: OffloadRun) -> Any:
    from llmlab.ui.experts import expert_heat_map

    return expert_heat_map(as_run(done, costs(DESKTOP), "lru", f"{done.tokens} tokens, batch 1"))


def rates_chart(runs: Mapping[tuple[str, str, int], OffloadRun], batch: int) -> Any:
    """Tokens per second of every policy on both hosts, the best of each host strong."""
    import altair as alt

    from llmlab.ui.chart import data, title
    from llmlab.ui.theme import roles

    c = roles()
    rows: list[dict[str, Any]] = [{"policy": name, "host": host.name, "rate": runs[host.name, name, batch].tokens_per_second,
             "label": f"{runs[host.name, name, batch].tokens_per_second:.1f}"} for host in HOSTS for name in WHOSE]  # fmt: skip
    best = {host.name: max((r for r in rows if r["host"] == host.name), key=lambda r: r["rate"]) for host in HOSTS}
    for row in rows:
        row["best"] = best[row["host"]] is row
    base = alt.Chart(data(rows)).encode(
        y=alt.Y("policy:N", sort=list(WHOSE), title=None, axis=alt.Axis(grid=False)),
        x=alt.X("rate:Q", title="tokens per second", axis=alt.Axis(tickCount=5, format="~r")),
    )  # fmt: skip
    bars = base.mark_bar(size=13).encode(color=alt.condition("datum.best", alt.value(c.decode), alt.value(c.waiting)))
    words = base.mark_text(align="left", dx=4).encode(text="label:N")
    found = "; ".join(f"{row['policy']} leads with {row['label']} on {name}" for name, row in best.items())
    return (alt.layer(bars, words).properties(width=330, height=250)
            .facet(column=alt.Column("host:N", title=None, sort=[h.name for h in HOSTS])).resolve_scale(x="independent")
            .properties(title=title(f"Which experts to bring, which to compute where they lie: {found}",
                                    f"Simulated: Mixtral-8x7B fp16 on an A10 with {SLOTS} of 256 experts, batch {batch}, routing of lab-moe")))  # fmt: skip


