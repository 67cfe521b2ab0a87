# %% [markdown]
# # 08 CPU and GPU in parallel
#
# The memory of a device decides how many requests it can serve at once, and with it (lesson 04) how well its arithmetic
# is used. Beside it stands a computer with ten times as much memory and a processor that mostly idles. Keys and values
# could live *there*. Bringing them over for every token is hopeless: they are the largest thing there is. But attention
# could be computed where they lie: only one query goes to the host and one result comes back, a few kilobytes.
#
# So a request gets a **home**: the device or the host. What is left to decide is the waiting. The processor is slower than
# the device. Does the device wait for it? Three **modes** of a step:
#
# - **gpu_only**: it does not even ask. Requests of the host stand still, and whoever does not fit waits in the queue;
# - **asym_pipeline**: two halves take turns. While the processor attends for the host's rows, the device has the others; then
#   they change places. Every row moves on, but the device computes its linear layers twice (the scheduler of NEO);
# - **async_overlap**: the device never waits. It goes on with its own requests; a request of the host joins the *next* step,
#   with the layer whose attention has come back meanwhile. One layer per step.
#
# The third is *asynchronous overlap* (APEX, arXiv 2506.03296). APEX is more than that mode: before every step it predicts
# what each of the three would bring, and takes the best. The engine's placements do just that: `neo` weighs the first two
# modes, `apex` all three, `gpu_only` has only one. You will see the real ones decide.
#
# **After this lesson you can**
#
# - say where a request lives, and which of its layers a step computes;
# - see overlap, and its absence, on the timelines of the resources;
# - predict the throughput of all three modes from a handful of numbers, and choose as `apex` does;
# - say who pays for the overlap, and how much.
#
# Everything here is **simulated**: `llama-3.1-8b` on an A10 whose cache is kept small, beside a slow processor. Time is laid
# on one timeline per resource; overlap is only what these timelines allow.

# %%
from typing import NamedTuple

import llmlab
from llmlab import EngineConfig, SamplingParams
from llmlab.execution.cost import RooflineCost
from llmlab.scheduling.placement_modes import Times
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show
from llmlab.teaching.figures import Bar, bars, table
from llmlab.types import Span, WorkItem
from llmlab.ui import figures, theme
from llmlab.ui.chart import seconds, setting
from roofline import shapes

theme.enable("light")
MODEL, DEVICE, SLOW, FAST = "llama-3.1-8b", "a10", "cpu-2core", "xeon-6342-2s"
CONTEXT, ON_DEVICE, ON_HOST = 1000, 13, 128  # tokens of a request; requests at home here and there
BLOCKS = ON_DEVICE * 75  # of 16 tokens: what the device holds, with some room to grow
LAYERS = shapes.get(MODEL).num_layers

# %% [markdown]
# ## An engine that has settled
#
# `steady` fills an engine with requests, lets it read all prompts, and then watches it make tokens.


# %%
class Steady(NamedTuple):
    """What an engine does step after step: tokens per second, seconds of a step, requests that live on either side, seconds
    per token there, how often each mode was chosen."""

    rate: float
    step: float
    on_device: int
    on_host: int
    device_tpot: float
    host_tpot: float
    modes: dict[str, int]
    run: object


def steady(placement, num_requests=ON_DEVICE + ON_HOST, host=SLOW, steps=10, log_level=2):
    """Let `placement` settle, and observe `steps` steps."""
    config = EngineConfig(model=MODEL, executor="sim", hardware=DEVICE, host=host, placement=placement, max_num_seqs=512,
                          num_blocks=BLOCKS, num_host_blocks=20_000, max_num_batched_tokens=4096, log_level=log_level,
                          enable_prefix_caching=False)
    with llmlab.Engine(config) as engine:
        for _ in range(num_requests):
            engine.add_request([7] * CONTEXT, SamplingParams(max_tokens=1000), metadata={"output_len": 1000})
        for _ in range(150):
            engine.step()
            if not engine.num_waiting and all(s.num_output_tokens for s in engine.scheduler.running.values()):
                break
        began, first = engine.clock.now(), engine.log.num_emitted
        for _ in range(steps):
            engine.step()
        seen = engine.clock.now() - began
        homes = {s.id: s.home for s in engine.scheduler.running.values()}
        run = llmlab.Run.of(engine.log)
    made = [homes[e.request] for e in run.events("TokensReleased") if e.seq >= first and e.request in homes]
    here, there = ([made.count(home), list(homes.values()).count(home)] for home in ("device", "cpu"))
    modes = [d.chosen for d in run.events("Decision") if d.seam == "placement" and d.seq >= first] or ["gpu_only"] * steps
    return Steady(len(made) / seen, seen / steps, here[1], there[1], here[1] * seen / max(1, here[0]),
                  there[1] * seen / there[0] if there[0] else float("nan"), {m: modes.count(m) for m in sorted(set(modes))}, run)


# %% [markdown]
# ## Predict
#
# 141 requests of 1,000 tokens. The device holds 13 of them; the other 128 live on the host, whose processor has two cores
# and attends at about a fourteenth of the device's speed.

# %%
guess = predict("Under apex the processor helps, and the device never waits for it. The throughput is how many times that of the "
                "device alone?", Slider(4.0, 1.0, 10.0, 0.1), "times")

# %% [markdown]
# ## Run it

# %%
alone, neo, apex = steady("gpu_only"), steady("neo"), steady("apex", steps=35)
guess.reveal(apex.rate / alone.rate, f"A step takes {seconds(apex.step)}, alone {seconds(alone.step)}; the processor adds what it can.")
say(table([
    {"placement": name, "on the device": s.on_device, "on the host": s.on_host, "step": seconds(s.step), "modes": ", ".join(s.modes),
     "tokens/s": f"{s.rate:.0f}", "against gpu_only": f"{s.rate / alone.rate:.2f}"}
    for name, s in {"gpu_only": alone, "neo": neo, "apex": apex}.items()
]))

# %% [markdown]
# ## What it weighed
#
# `apex` predicted all three modes before each step; here is the last one. *Eq. 6* of the paper: the pipeline beats the device
# alone while the device is at most so many times as fast at attention as the processor.

# %%
last = [d for d in apex.run.events("Decision") if d.seam == "placement"][-1]
say(f"**{last.chosen}**: {last.reason}. The others: " + "; ".join(f"{a.option} {a.why_not}" for a in last.alternatives) + ".")

# %% [markdown]
# ## The timelines
#
# Two steps of each, resource by resource. Under `neo` both are busy, and a step takes twice as long: each half of the rows
# needs the layer's weights anew (`linear 0` and `linear 0'`). Under `apex` the device hardly notices the other: the steps are as
# short as alone, and one layer's attention lies beneath each of them.

# %%
for name in ("neo", "apex"):
    drawn = steady(name, steps=4, log_level=4).run
    finished = drawn.events("StepFinished")
    show(figures.resource_gantt(drawn, finished[-3].t, finished[-1].t))

# %% [markdown]
# ## Formula against measurement
#
# Let `G` and `H` be the requests at home on the device and on the host, `L` the layers; of one layer, `l` the seconds of
# its linears, `a` of the device's attention to its `G` rows, `r` of the processor's attention to one row of the host; `e` the
# seconds that a step needs before the first layer and behind the last, where words become tokens.
#
#     gpu_only        G / T              with T = L (l + a) + e, a step
#     asym_pipeline  (G + min(H, D / (L r))) / D    with D = L (2 l + a) + 2 e
#     async_overlap   G / T + min(H / ((L + 1) T), 1 / (L r))
#
# The pipeline takes as many host rows as the processor can serve while the device is busy. In the overlap a row of the host
# gets a token once in `L + 1` steps (after the last layer, one more for the token), unless the processor is slower than that:
# it serves `1 / (L r)` at most. `l`, `a`, `r` and `e` come from the cost model, before anything runs.


# %%
def parts(on_device, host, context=CONTEXT):
    """(l, a, r, e) in seconds."""
    times = Times(RooflineCost(shapes.get(MODEL), DEVICE, 16, "fp16", host=host).layers())
    row = WorkItem("", Span(context - 1, context))
    return times.linears(on_device), times.attention([row] * on_device), times.row(row), times.edges(on_device, on_device)


def rates(g, h_rows, linear, attention, row, edge, layers=LAYERS):
    """Tokens per second of the three modes."""
    alone, twice = layers * (linear + attention) + edge, layers * (2 * linear + attention) + 2 * edge
    return {"gpu_only": g / alone, "asym_pipeline": (g + min(h_rows, twice / layers / row)) / twice,
            "async_overlap": g / alone + min(h_rows / ((layers + 1) * alone), 1 / (layers * row))}


found = parts(apex.on_device, SLOW, CONTEXT + 50)
formula = rates(apex.on_device, apex.on_host, *found)
say(", ".join(f"{name} = {seconds(value)}" for name, value in zip("lare", found)) + f", L = {LAYERS}.")
say(table([
    {"mode": name, "formula": f"{formula[name]:.0f}", "simulated": f"{s.rate:.0f}", "apart by": f"{s.rate / formula[name] - 1:+.0%}"}
    for name, s in {"gpu_only": alone, "asym_pipeline": neo, "async_overlap": apex}.items()
]))

# %% [markdown]
# (The pipeline stays furthest behind its formula, which lets the processor work all the time: on its timeline above it stands
# still wherever one half of the rows is done before the other.)
#
# ## Turn the knobs
#
# A faster processor, longer contexts, fewer requests on the host: which mode wins? (By the formulas.)


# %%
def compare_modes(host, context, on_host):
    """The three rates as bars."""
    found = rates(ON_DEVICE, on_host, *parts(ON_DEVICE, host, context))
    best = max(found, key=found.get)
    return bars([Bar(name, value) for name, value in found.items()], "tokens per second",
                f"Best is {best}: {found[best] / found['gpu_only']:.2f} times the device alone",
                f"Computed: {MODEL} on {DEVICE} beside {host}, {ON_DEVICE} requests there and {on_host} on the host, "
                f"{context:,} tokens each", ".0f")


panel = knobs(compare_modes, host=Choice(SLOW, "xeon-6130-2s", FAST), context=Choice(100, 1000, 4000, start=1000),
              on_host=Choice(8, 32, 128, 512, start=128))

# %% [markdown]
# ## The events: who pays
#
# Nothing is free. In the overlap steps stay short for those who live on the device; a request of the host gets a token once
# in `L + 1` steps. The log tells them apart:

# %%
say(f"Seconds per token under `apex`: {seconds(apex.device_tpot)} on the device, **{seconds(apex.host_tpot)}** on the host, "
    f"{apex.host_tpot / apex.device_tpot:.0f} times as long.")
guest = list(apex.run.requests)[-1]
show(apex.run.why(guest, apex.run.log_events[-1].t))

# %% [markdown]
# For a chat this is unbearable; for work that nobody watches (summaries at night, agents) it is free throughput. `apex`
# brings requests back to the device when room is free.
#
# ## Exercise: be the scheduler
#
# Write `choose(g, h_rows, linear, attention, row, layers)` (`l`, `a` and `r`; no `e`): the mode with the highest throughput,
# `"gpu_only"`, `"asym_pipeline"` or `"async_overlap"`, by the formulas above. If two are equal, the first in this list.


# %% exercise
def choose(g, h_rows, linear, attention, row, layers):
    """The mode with the highest throughput."""
    return "async_overlap" if h_rows else "gpu_only"  # never wait? your turn


# %%
verdict = check("choose_way", choose)

# %% [markdown]
# ## Break it
#
# Beside the slow processor, overlap won. Now put the two processors of a server beside the device, and let `apex` decide:

# %%
quick = steady("apex", host=FAST)
g, h_rows = quick.on_device, quick.on_host
forced = rates(g, h_rows, *parts(ON_DEVICE, FAST))["async_overlap"]
show(bars([Bar("overlap, by the formula", forced), Bar("apex", quick.rate, note=f"chose {', '.join(quick.modes)}; step {seconds(quick.step)}")],
          "tokens per second", f"Beside a fast host, apex gives up overlap and makes {quick.rate / forced:.1f} times its tokens",
          f"{setting(quick.run)}, host {FAST}; the first bar is computed", ".0f"))

# %% [markdown]
# If the host is done with a layer long before the step is over, one layer per step leaves it idle nearly all the time.
# Which mode is right depends on numbers that change with every step; that is why `apex` prices them in each, and why your
# exercise is its decision rule.
#
# ## What this does not show
#
# - Prompts. A step that reads prompts is longer, and more of the host's work hides behind it; `neo` and `apex` price that, too.
# - Real processors share their memory with everything else, and small batches pay a fixed price per call. A profile of the
#   machine knows that, a data sheet does not.
#
# ## Three questions
#
# <details><summary>1. Why must a request of the host join at the layer that is ready, and not at the next multiple of
# something?</summary>
#
# Because the weights of a layer are on their way through the device exactly once per step, at that layer. A row that joins
# there shares them with everybody; a row that joins anywhere else would need them fetched for itself alone.
# </details>
#
# <details><summary>2. The device's memory is doubled. What happens to the gain of using the host?</summary>
#
# It shrinks: more requests live on the device, the first term of all three grows, and the host's share stays what it was. With enough memory for
# everybody the best way is the device alone. That is why a placement should ask first whether there is pressure at all.
# </details>
#
# <details><summary>3. In the overlap, does a slower processor make the device slower?</summary>
#
# Not until its attention for one layer of all its requests takes longer than about one step. Up to there the processor's
# speed does not show at all, which is the point of the idea, and also why a fast one is wasted on it.
# </details>
