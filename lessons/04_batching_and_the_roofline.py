# %% [markdown]
# # 04 Batching, and the roofline
#
# A decode step of one request fetches every weight of the model from memory, uses each of them once, and throws it away.
# Most of the arithmetic units stand idle. If sixteen requests are in the step, each weight is fetched once and used
# sixteen times. This is the whole secret of cheap serving: **batching**. It works until something else becomes the
# bottleneck, and the *roofline* says what, and when.
#
# **After this lesson you can**
#
# - measure how the throughput of a real engine grows with the batch, and fit a law to it;
# - compute the arithmetic intensity of a step and place it under the roofline of a device;
# - say from which batch a device stops being bound by memory, from two numbers of its data sheet;
# - say why long contexts spoil the party.
#
# First **measured**: `lab-s` on this machine. Then **computed**: the cost model, for devices that you may not own.

# %%
import statistics

import llmlab
from llmlab import SamplingParams
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show
from llmlab.teaching.figures import Axis, Point, curves, table
from llmlab.ui import theme
from llmlab.ui.chart import seconds, setting
from roofline import CostModel, Rows, charts, hardware, memory, shapes

theme.enable("light")
sizes = (1, 2, 4, 8, 16, 32)  # requests in a batch

# %% [markdown]
# ## Predict

# %%
guess = predict("One request alone makes X tokens per second. Sixteen requests in one batch make how many times X?",
                Slider(8, 1, 16, 0.5), "times")

# %% [markdown]
# ## Run it
#
# One engine, six runs: 1, 2, 4, ... 32 requests at once, 24 tokens each. We look only at the steps in which everybody
# decodes, and take the median of their times.

# %%
engine = llmlab.Engine(model="lab-s", num_blocks=256, enable_prefix_caching=False)
for size in sizes:
    for i in range(size):
        engine.add_request([65 + i, 70, 75, 80], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
run = llmlab.Run.of(engine.log)
decodes = {n: [s for s in run.steps if len(s.items) == n and s.num_tokens == n] for n in sizes}
took = {n: statistics.median(s.measured for s in steps) for n, steps in decodes.items()}
rate = {n: n / took[n] for n in sizes}

guess.reveal(rate[16] / rate[1], f"{rate[1]:,.0f} tokens per second alone, {rate[16]:,.0f} in a batch of 16.")
say(table([{"requests in the step": n, "step": seconds(took[n]), "tokens per second": f"{rate[n]:,.0f}"} for n in sizes]))

# %% [markdown]
# ## Formula against measurement: a fixed part and a part per request
#
# The simplest law for the time of a step with `n` requests is a straight line:
#
#     t(n) = a + b n        throughput(n) = n / (a + b n), at most 1 / b
#
# `a` is paid once per step, `b` by every request. We take both from the ends (`n = 1` and `n = 32`) and see how well the
# line meets what lies between.

# %%
b = (took[32] - took[1]) / 31
a = took[1] - b
law = {n: n / (a + b * n) for n in sizes}
off = max(abs(law[n] / rate[n] - 1) for n in (2, 4, 8, 16))
show(curves({"": [Point(n, rate[n]) for n in sizes]}, {"": [Point(n, law[n]) for n in sizes]},
            Axis("requests in the step", True), Axis("tokens per second", False, ",.0f"),
            f"32 requests together make {rate[32] / rate[1]:.1f} times the tokens of one",
            f"{setting(run)}. Points: medians of measured steps. Dashed: n / (a + b n)"))
say(f"Here a = {seconds(a)} and b = {seconds(b)}: the fixed part is worth {a / b:.0f} requests. Between the ends the "
    f"line is off by at most {off:.0%}.")

# %% [markdown]
# On this small model, the fixed part is mostly the program around the arithmetic. On a large one it is the fetching of
# weights. For that we need numbers of a larger machine.
#
# ## The roofline
#
# A device has two rates: operations per second (`peak`) and bytes per second (`bandwidth`). Work that needs `F`
# operations and `M` bytes takes at least
#
#     t = max(F / peak, M / bandwidth)
#
# `F / M`, operations per byte, is the **intensity** of the work; `peak / bandwidth` is the **ridge** of the device.
# Left of the ridge memory decides, right of it arithmetic does. Each mark below is one kind of operation inside a step.

# %%
SHAPE, DEVICE = shapes.get("llama-3.1-8b"), hardware.get("a10")


def decode_step(batch, context, model="llama-3.1-8b", device="a10"):
    """The predicted cost of a step in which `batch` requests decode, each seeing `context` tokens."""
    return CostModel(model, device).step(Rows([1] * batch, [context] * batch))


few, lots = decode_step(1, 512), decode_step(64, 512)
show(charts.roofline({"1 request": few, "64 requests": lots}))
say(f"{SHAPE.name} on an {DEVICE.name} (computed): the step of one request reads {few.bytes_hbm / 1e9:.1f} GB and does "
    f"{few.flops / 1e9:.0f} billion operations, {few.flops / few.bytes_hbm:.1f} per byte. 64 requests read only "
    f"{lots.bytes_hbm / few.bytes_hbm:.2f} times as much and do {lots.flops / few.flops:.0f} times the operations. "
    f"The ridge lies at {DEVICE.ridge():.0f}.")

# %% [markdown]
# ## Turn the knobs
#
# Throughput against the batch, for devices and contexts of your choice. The curve ends where the cache no longer fits.

# %%
def frontier(device, context):
    """Decode throughput up to the batch that fits into memory, bound and all."""
    most = memory.plan("llama-3.1-8b", device).sequences(context)
    batches = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= most] or [1]
    points = [Point(n, n / decode_step(n, context, device=device).seconds) for n in batches]
    ideal = [Point(n, n * points[0].y) for n in batches]
    return curves({"": points}, {"as if free": ideal}, Axis("requests in the step", True),
                  Axis("tokens per second", True, "~s"),
                  f"{batches[-1]} requests make {points[-1].y / points[0].y:.0f} times the tokens of one",
                  f"Computed: llama-3.1-8b on {device}, {context:,} tokens of context each; {most:,} such requests fit")


panel = knobs(frontier, device=Choice("a10", "a100", "h100", "h200"), context=Choice(256, 1024, 4096, 16384, start=1024))

# %% [markdown]
# ## What the engine predicts about itself
#
# Every planned step carries the cost model's prediction, and every finished one the time it took. The two never mix, and
# their ratio is a column of each run. For `lab-s` on this machine:

# %%
ratio = run.metrics.predicted_over_measured
say(f"Predicted over measured, over {len(run.steps)} steps: median **{ratio.p50:.2f}**, nine in ten below {ratio.p90:.2f}. "
    "A table of devices knows the processor's rates, not what else runs on it today; `llmlab profile` measures.")
show(run.why("r0"))

# %% [markdown]
# ## Exercise: when does batching stop to be free?
#
# Multiplying `n` tokens with a weight matrix of `w` numbers takes `2 n w` operations and fetches `w` numbers of
# `bytes_per_weight` bytes (the tokens themselves are small beside them). Set the two times equal and solve for `n`:
# from that many tokens on, a step is bound by arithmetic.


# %% exercise
def turning_batch(peak, bandwidth, bytes_per_weight):
    """Tokens in a step from which the arithmetic takes as long as fetching the weights."""
    return peak / bandwidth  # the ridge; but one operation is not one token: your turn


# %%
verdict = check("turning_batch", turning_batch)

# %% [markdown]
# ## Break it
#
# Weights are shared by all requests of a step. The KV cache is not: every request reads its own. Make the contexts long
# and see what a larger batch buys.

# %%
rows = []
for context in (256, 2048, 16384):
    one, sixteen = decode_step(1, context), decode_step(16, context)
    cache = 16 * context * SHAPE.kv_bytes_per_token("fp16")
    rows.append({"context": f"{context:,}", "tokens/s alone": f"{1 / one.seconds:.1f}",
                 "tokens/s, batch 16": f"{16 / sixteen.seconds:.0f}",
                 "gain": f"{16 * one.seconds / sixteen.seconds:.1f}",
                 "cache of the 16": f"{cache / 1e9:.1f} GB",
                 "fits": "yes" if memory.plan(SHAPE, DEVICE).sequences(context) >= 16 else "no"})
say(table(rows) + f"\n\n(Computed: {SHAPE.name} on {DEVICE.name}, 16-bit numbers.)")

# %% [markdown]
# With long contexts the step is dominated by bytes that nobody shares, and soon they do not even fit. Batching is a way
# to share weights; for caches one needs other ideas (lessons 03 and 07, and most of the papers on the papers page).
#
# ## What this does not show
#
# - The roofline is an upper limit with fitted fractions for real kernels. On a GPU it is usually right within some ten per
#   cent, for very small models not at all: what it cannot see is the program around the arithmetic.
# - Throughput is not the goal of a user. A larger batch makes every single answer a little slower: look at the column
#   *step* of the first table again.
# - Who is in the batch was decided by us. In a server, requests come and go: lesson 05.
#
# ## Three questions
#
# <details><summary>1. A provider halves the bytes per weight (8-bit weights) and keeps the arithmetic in 16 bits. What
# happens to the step of one request, and to the batch at which arithmetic takes over?</summary>
#
# The step of one request takes about half the time, since it is all fetching. The turning batch halves, too: the
# fetching is sooner overtaken. At large batches nothing is gained.
# </details>
#
# <details><summary>2. Prefill of one prompt of 512 tokens, or decode of 512 requests: which has the higher intensity?
# </summary>
#
# In the products with the weights they are alike: 512 tokens share each weight. In attention they differ: the tokens of
# one prompt share one cache, the 512 requests read 512 different ones.
# </details>
#
# <details><summary>3. Why does the measured line of a small model bend earlier than the computed one of a large model?
# </summary>
#
# Because its fixed part is small compared with what each request adds (sampling, detokenizing, bookkeeping, attention).
# The ratio a / b decides how many requests it takes until the fixed part is shared away.
# </details>
