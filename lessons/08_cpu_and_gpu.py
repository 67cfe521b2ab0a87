# %% [markdown]
# # 08 CPU and GPU in parallel
#
# The memory of a device decides how many requests it can serve at once, and with it (lesson 04) how well its arithmetic
# is used. Beside it stands a computer with ten times as much memory and a processor that mostly idles. Keys and values
# could live *there*. Bringing them over for every token is hopeless: they are the largest thing there is. But attention
# could be computed where they lie: only one query goes to the host and one result comes back, a few kilobytes.
#
# So a request gets a **home**: the device or the host. What is left to decide is the waiting. The processor is slower than
# the device. Does the device wait for it?
#
# - **device only**: no homes on the host; whoever does not fit waits in the queue;
# - **wait**: in every layer, the device waits until the host's attention is back;
# - **later**: it does not wait. It goes on with the requests that live on it; a request of the host joins the *next* step,
#   with the layer that has become ready meanwhile. One layer per step.
#
# The third is the idea of *asynchronous overlap* (APEX, arXiv 2506.03296); the second is what came before it.
#
# **After this lesson you can**
#
# - write a placement: where a request lives, and which of its layers a step computes;
# - see overlap, and its absence, on the timelines of the resources;
# - predict all three throughputs from four numbers, and choose;
# - say who pays for the overlap, and how much.
#
# Everything here is **simulated**: `llama-3.1-8b` on an A10 whose cache is kept small, beside a slow processor. Time is laid
# on one timeline per resource; overlap is only what these timelines allow.

# %%
from typing import NamedTuple

from msgspec.structs import replace

import llmlab
from llmlab import EngineConfig, SamplingParams
from llmlab.execution.cost import RooflineCost
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show
from llmlab.teaching.figures import Bar, bars, table
from llmlab.types import Span, WorkItem
from llmlab.ui import figures, theme
from llmlab.ui.chart import seconds, setting
from roofline import shapes

theme.enable("light")
MODEL, DEVICE, SLOW, FAST = "llama-3.1-8b", "a10", "cpu-2core", "xeon-6342-2s"
CONTEXT, ON_DEVICE, ON_HOST = 1000, 13, 128  # tokens of a request; requests at home here and there
BLOCKS = ON_DEVICE * 71  # of 16 tokens: what the device holds, with some room to grow
LAYERS = shapes.get(MODEL).num_layers

# %% [markdown]
# ## Placements
#
# A placement answers two questions. `home`: where shall the KV of a request that starts now live? `place`: on which device,
# and through which layers, does each item of this step run? `item.passing(layer, L)` is the work of one layer: it joins
# behind the attention that an earlier step began, and begins the next.


# %%
class Wait:
    """Who does not fit on the device lives on the host; the device waits for it in every layer."""

    def home(self, view, request, need):
        return "device" if need.prompt + 8 * len(view.running) <= view.pool.num_free else "cpu"

    def place(self, view, items):
        away = {r.id: r for r in view.running if r.home == "cpu"}
        return [self.passed(i, away[i.request], view) if i.request in away and i.num_tokens == 1 else i for i in items]

    def passed(self, item, request, view):
        return replace(item, device="cpu")  # all layers, in this step


class Later(Wait):
    """The same homes, but a request of the host passes one layer per step."""

    def passed(self, item, request, view):
        return item.passing(request.cursor, view.costs.num_layers)


class Steady(NamedTuple):
    """What a full engine does, step after step: tokens per second, seconds per token of both kinds of requests."""

    rate: float
    step: float
    on_device: int
    on_host: int
    device_tpot: float
    host_tpot: float
    run: object


def steady(placement, num_requests, host=SLOW, steps=66, log_level=2):
    """Fill an engine, let it settle, and observe `steps` steps."""
    config = EngineConfig(model=MODEL, executor="sim", hardware=DEVICE, host=host, placement=placement, max_num_seqs=512,
                          num_blocks=BLOCKS, num_host_blocks=20_000, max_num_batched_tokens=4096, log_level=log_level,
                          enable_prefix_caching=False)
    with llmlab.Engine(config) as engine:
        for _ in range(num_requests):
            engine.add_request([7] * CONTEXT, SamplingParams(max_tokens=1000), metadata={"output_len": 1000})
        for _ in range(num_requests * CONTEXT // 4096 + 8):
            engine.step()
        began, first = engine.clock.now(), engine.log.num_emitted
        for _ in range(steps):
            engine.step()
        seen = engine.clock.now() - began
        homes = {s.id: s.home for s in engine.scheduler.running.values()}
        run = llmlab.Run.of(engine.log)
    made = [homes[e.request] for e in run.events("TokensReleased") if e.seq >= first and e.request in homes]
    here, there = ([made.count(home), list(homes.values()).count(home)] for home in ("device", "cpu"))
    return Steady(len(made) / seen, seen / steps, here[1], there[1], here[1] * seen / max(1, here[0]),
                  there[1] * seen / there[0] if there[0] else float("nan"), run)


# %% [markdown]
# ## Predict
#
# 141 requests of 1,000 tokens. The device holds 13 of them; the other 128 live on the host, whose processor has two cores.

# %%
guess = predict("The device waits for the host in every layer; eleven times as many requests are in each step. The "
                "throughput is how many times that of the device alone?", Slider(2.0, 0.1, 6.0, 0.1), "times")

# %% [markdown]
# ## Run it

# %%
EVERYBODY = ON_DEVICE + ON_HOST
alone = steady("device_only", EVERYBODY, steps=20)
waits = steady(Wait(), EVERYBODY, steps=6)
later = steady(Later(), EVERYBODY)
guess.reveal(waits.rate / alone.rate, f"A step takes {seconds(waits.step)} instead of {seconds(alone.step)}.")
say(table([
    {"": name, "on the device": s.on_device, "on the host": s.on_host, "step": seconds(s.step),
     "tokens/s": f"{s.rate:.0f}", "against device only": f"{s.rate / alone.rate:.2f}"}
    for name, s in {"device only": alone, "wait": waits, "later": later}.items()
]))

# %% [markdown]
# ## The timelines
#
# The same two placements for a few steps, resource by resource. Under *wait* the device (top) stands still most of the
# time. Under *later* it never stops, and the host's work fits beneath it.

# %%
for each in (Wait(), Later()):
    drawn = steady(each, EVERYBODY, steps=4, log_level=4).run
    finished = drawn.events("StepFinished")
    show(figures.resource_gantt(drawn, finished[-3].t, finished[-1].t))

# %% [markdown]
# ## Formula against measurement: four numbers
#
# Let `G` and `H` be the requests at home on the device and on the host, `t` the seconds of a step without the host, `h` the
# seconds of the host's attention for all `H` in one layer (with the way there and back), and `L` the layers. Then
#
#     device only   G / t
#     wait          (G + H) / (t + L h)
#     later         G / s + H / ((L + 1) s)       with s = max(t, L h / (L + 1))
#
# `L + 1`: after the last layer, one more step for the token. `s` is the time of a step: `t`, unless the host cannot do its
# `L` layers within a round of `L + 1` steps; then everybody waits for it. `t` and `h` come from the cost model, before
# anything runs.


# %%
def parts(on_device, on_host, host, context=CONTEXT):
    """(t, h): seconds of a step on the device alone, and of one layer's way over the host."""
    cost = RooflineCost(shapes.get(MODEL), DEVICE, 16, "fp16", host=host)
    rows = [WorkItem(f"r{i}", Span(context, context + 1)) for i in range(max(on_device, on_host, 1))]
    t = cost.step(rows[:on_device]).seconds if on_device else 0.0
    one, away = cost.layers(), rows[:on_host]
    if not away:
        return t, 0.0
    way = (one.transfer_seconds(one.sent_bytes(on_host), "d2h") + one.transfer_seconds(one.returned_bytes(on_host), "h2d"))
    return t, one.host_attention(away) + way


def rates(g, h_rows, t, h):
    """Tokens per second of the three ways."""
    step = max(t, LAYERS * h / (LAYERS + 1))
    return {"device only": g / t, "wait": (g + h_rows) / (t + LAYERS * h),
            "later": g / step + h_rows / ((LAYERS + 1) * step)}


t, h = parts(ON_DEVICE, ON_HOST, SLOW)
formula = rates(ON_DEVICE, ON_HOST, t, h)
say(f"t = {seconds(t)}, h = {seconds(h)}, L = {LAYERS}.")
say(table([
    {"": name, "formula": f"{formula[name]:.0f}", "simulated": f"{s.rate:.0f}", "apart by": f"{s.rate / formula[name] - 1:+.0%}"}
    for name, s in {"device only": alone, "wait": waits, "later": later}.items()
]))

# %% [markdown]
# ## Turn the knobs
#
# A faster processor, longer contexts, more requests on the host: which way wins? (By the formulas.) Try 512 requests on the
# slow host: it gets more to do than it can, and even *later* begins to wait.


# %%
def compare_ways(host, context, on_host):
    """The three rates as bars."""
    found = rates(ON_DEVICE, on_host, *parts(ON_DEVICE, on_host, host, context))
    best = max(found, key=found.get)
    gain = found[best] / found["device only"]
    return bars([Bar(name, value) for name, value in found.items()], "tokens per second",
                f"Best is {best}: {gain:.2f} times the device alone",
                f"Computed: {MODEL} on {DEVICE} beside {host}, {ON_DEVICE} requests there and {on_host} on the host, "
                f"{context:,} tokens each", ".0f")


panel = knobs(compare_ways, host=Choice(SLOW, "xeon-6130-2s", FAST), context=Choice(100, 1000, 4000, start=1000),
              on_host=Choice(8, 32, 128, 512, start=128))

# %% [markdown]
# ## The events: who pays
#
# Nothing is free. Under *later* the steps stay short for those who live on the device. A request of the host gets a token
# once in `L + 1` steps. The log tells them apart:

# %%
say(f"Seconds per token under *later*: {seconds(later.device_tpot)} on the device, **{seconds(later.host_tpot)}** on the host, "
    f"{later.host_tpot / later.device_tpot:.0f} times as long. Under *wait* everybody has {seconds(waits.device_tpot)}.")
guest = list(later.run.requests)[-1]
show(later.run.why(guest, later.run.log_events[-1].t))

# %% [markdown]
# For a chat this is unbearable; for work that nobody watches (summaries at night, agents) it is free throughput. A real
# placement therefore brings requests back to the device when room is free, or picks who may wait.
#
# ## Exercise: choose the way
#
# Write `choose(g, h_rows, t, h, layers)`: the name of the way with the highest throughput, `"device only"`, `"wait"` or
# `"later"`, by the formulas above, the host that cannot keep up included. If two are equal, the one that comes first in
# this list. With nobody on the host, all three are the same.


# %% exercise
def choose(g, h_rows, t, h, layers):
    """The way with the highest throughput."""
    return "wait" if h_rows else "device only"  # the more the better? your turn


# %%
verdict = check("choose_way", choose)

# %% [markdown]
# ## Break it
#
# As long as the host is not given more than it can do in a round, *later* cannot lose against the device alone, and beside
# the slow processor it beats waiting. Now put the two processors of a server beside the device, instead of two cores:

# %%
quick = {"wait": steady(Wait(), EVERYBODY, host=FAST, steps=6), "later": steady(Later(), EVERYBODY, host=FAST)}
show(bars([Bar(name, s.rate, note=f"step {seconds(s.step)}, a token takes {seconds(s.host_tpot)} on the host")
           for name, s in quick.items()], "tokens per second",
          f"Beside a fast host, waiting makes {quick['wait'].rate / quick['later'].rate:.1f} times the tokens of not waiting",
          f"{setting(quick['wait'].run)}, host {FAST}", ".0f"))

# %% [markdown]
# If the host is done with a layer long before the step is over, one layer per step leaves it idle nearly all the time. Which
# way is right depends on numbers that change with every step, so a good placement prices the ways in each step and takes
# the best: that is the core of the paper's scheduler. On small devices beside ordinary processors it mostly answers
# *later*; your exercise is its decision rule.
#
# ## What this does not show
#
# - Prompts. A step that reads prompts is longer, and more of the host's work hides behind it.
# - Two sub-batches that take turns on device and host (the paper's rival): on this device they read the weights twice.
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
# It shrinks: more requests live on the device, `G / t` grows, and the host's share stays what it was. With enough memory for
# everybody the best way is the device alone. That is why a placement should ask first whether there is pressure at all.
# </details>
#
# <details><summary>3. Under <i>later</i>, does a slower processor make the device slower?</summary>
#
# Not until its attention for one layer of all its requests takes longer than about one step. Up to there the processor's
# speed does not show at all, which is the point of the idea, and also why a fast one is wasted on it.
# </details>
