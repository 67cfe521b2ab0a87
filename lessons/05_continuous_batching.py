# %% [markdown]
# # 05 Continuous batching and chunked prefill
#
# Lesson 04 filled a step with many requests. But requests come when they like, and each ends after its own number of
# tokens. Who is in the next step? Three answers, each of which was once the state of the art:
#
# - **decode first**: finish the batch, then start the next one. Whoever arrives meanwhile waits for the slowest;
# - **prefill first**: let newcomers in at every step, and read their prompts at once. Whoever is writing stalls;
# - **chunked**: let newcomers in at every step, but read their prompts in pieces beside the writing of the others.
#
# The seam where this is decided is called the **composer**: it sees what every request could do next, and answers with
# the list of what the step shall do, within the *token budget*.
#
# **After this lesson you can**
#
# - recognise the three in a picture of their steps;
# - predict the longest stall of a stream from the token budget, with a cost model;
# - choose a budget for a target, and say what it costs;
# - write a composer and have it checked.
#
# Mostly **simulated**: `llama-3.1-8b` on an A10, the same scheduler as the real engine, time from the cost model. One
# part is **measured** with `lab-s` on this machine.

# %%
import random

import llmlab
from llmlab import EngineConfig, SamplingParams, Workload, tasks
from llmlab.events.why import describe
from llmlab.scheduling.composers import fill, split
from llmlab.teaching import Choice, check, knobs, predict, say, show, timeline
from llmlab.teaching.figures import Axis, Bar, Point, bars, curves, table
from llmlab.ui import figures, theme
from llmlab.ui.chart import seconds, setting
from roofline import CostModel, Rows

theme.enable("light")
LOAD = Workload.poisson(rate=2.0, n=40, prompt="lognormal:600,0.9", output="lognormal:120,0.6", seed=0)


def serve(composer, budget, load=LOAD, **more):
    """One simulated run of an A10 with llama-3.1-8b."""
    config = EngineConfig(model="llama-3.1-8b", executor="sim", hardware="a10", composer=composer,
                          max_num_batched_tokens=budget, max_num_seqs=32, **more)
    return llmlab.run(config, load)


# %% [markdown]
# ## Predict

# %%
guess = predict("40 requests arrive, two a second. Which of the three has the longest mean time to the first token?",
                Choice("chunked", "prefill_first", "decode_first"))

# %% [markdown]
# ## Run it

# %%
runs = {name: serve(name, 512) for name in ("decode_first", "prefill_first", "chunked")}
slowest = max(runs, key=lambda name: runs[name].metrics.ttft.mean)
guess.reveal(slowest, "It lets nobody in until the last of the batch is done.")
say(table([
    {"composer": name, "mean TTFT": seconds(r.metrics.ttft.mean), "usual gap between tokens": seconds(r.metrics.itl.p50),
     "worst gap": seconds(r.metrics.itl.max), "tokens per second": f"{r.metrics.output_throughput:.0f}"}
    for name, r in runs.items()
]))

worst = {name: r.metrics.itl.max for name, r in runs.items()}
say("*Decode first* never makes a writer wait, and almost nobody gets to write. *Prefill first* starts everybody at once, "
    f"and then they stall each other. *Chunked* gives up {seconds(runs['chunked'].metrics.ttft.mean - runs['prefill_first'].metrics.ttft.mean)} "
    f"of mean TTFT against it, and its worst gap is **{worst['prefill_first'] / worst['chunked']:.0f} times shorter**.")

# %% [markdown]
# Look at the steps of the first six requests (orange: tokens of prompts, blue: of answers). Under *prefill first* the
# blue ground has holes wherever somebody reads; under *chunked* it never breaks off.

# %%
FEW = Workload.poisson(rate=2.0, n=6, prompt="lognormal:600,0.9", output=(30, 60), seed=0)
few = serve("chunked", 128, FEW)
show(figures.batch_composition(serve("prefill_first", 128, FEW)), figures.batch_composition(few))

# %% [markdown]
# The same run request by request. In the notebook you can scrub through it, and click a bar to ask why it was late.

# %%
timeline(few)

# %% [markdown]
# ## The events
#
# The composer's choices are in the log, with what it left out and what the step would have cost without the prompt:

# %%
mixed = next(d for d in runs["chunked"].events("Decision") if d.seam == "composer" and d.predicted is None
             and any(a.predicted is not None for a in d.alternatives))
say(f"Step {mixed.step}: {describe(mixed)}")
stalled = max(runs["prefill_first"].requests.values(), key=lambda r: max(r.itl, default=0.0))
show(runs["prefill_first"].why(stalled.request))

# %% [markdown]
# ## Formula against measurement: the longest stall
#
# Under chunked prefill, the gap between two tokens of a stream is the time of one step, and no step has more than `B`
# tokens. So the cost model can tell the worst gap before anything runs: price a step with `B` tokens, most of them a
# piece of a prompt.

# %%
BUDGETS = (64, 128, 256, 512, 1024)
by_budget = {budget: serve("chunked", budget) for budget in BUDGETS}


def full_step(budget, writers=12, context=800):
    """Predicted seconds of a step: `writers` streams and a chunk that fills the budget."""
    chunk = budget - writers
    rows = Rows([1] * writers + [chunk], [context] * writers + [max(chunk, context)])
    return CostModel("llama-3.1-8b", "a10").step(rows).seconds


show(curves({"": [Point(b, by_budget[b].metrics.itl.p99 * 1e3) for b in BUDGETS]},
            {"": [Point(b, full_step(b) * 1e3) for b in BUDGETS]},
            Axis("token budget", True), Axis("milliseconds between tokens, 99th percentile"),
            f"A budget of {BUDGETS[0]} keeps 99% of the gaps below {seconds(by_budget[64].metrics.itl.p99)}, "
            f"{BUDGETS[-1]} below {seconds(by_budget[1024].metrics.itl.p99)}",
            f"{setting(by_budget[512])}. Points: the run. Dashed: cost of a full step"))

# %% [markdown]
# And the other side of the coin: with a small budget, newcomers are read slowly. The two targets pull in opposite
# directions, and the knob between them is the budget. Turn it.


# %%
def trade(budget, arrivals_per_second):
    """Steps of a run, and what both kinds of users feel."""
    done = serve("chunked", budget, LOAD.at_rate(arrivals_per_second))
    m = done.metrics
    return [figures.batch_composition(done),
            f"Median TTFT {seconds(m.ttft.p50)}; 99% of the gaps below {seconds(m.itl.p99)}; "
            f"mean end-to-end {seconds(m.e2e.mean)}; {m.output_throughput:.0f} tokens/s."]


panel = knobs(trade, budget=Choice(64, 128, 256, 512, 1024, 2048, start=256),
              arrivals_per_second=Choice(0.5, 1.0, 2.0, 4.0, start=2.0))

# %% [markdown]
# ## The same on a real engine
#
# In lesson 02 a long prompt stalled `r0`. Now with three budgets; measured, `lab-s`, this machine:

# %%
record = tasks.suite("doc").problem(random.Random(5), split="test").prompt


def stall(budget):
    """The gaps in r0's stream while a long prompt is read, and the newcomer's TTFT."""
    with llmlab.Engine(model="lab-s", num_blocks=256, enable_prefix_caching=False,
                       max_num_batched_tokens=budget) as engine:
        engine.add_request("<chat>tell me about the river in detail?<ans>",
                           SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        for _ in range(20):
            engine.step()
        engine.add_request(record, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
        return llmlab.Run.of(engine.log)


real = {budget: stall(budget) for budget in (32, 128, 1024)}
show(bars([Bar(f"budget {b}", max(r.requests["r0"].itl) * 1e3, note=f"newcomer's TTFT {seconds(r.requests['r1'].ttft)}, "
               f"{sum(1 for s in r.steps if any(i.request == 'r1' for i in s.items))} steps")
           for b, r in real.items()], "longest gap in the stream of r0 (ms)",
          f"The longest gap is {max(real[1024].requests['r0'].itl) / max(real[32].requests['r0'].itl):.1f} times as long with "
          "budget 1024 as with 32", setting(real[32]), ".1f"))

# %% [markdown]
# ## Exercise: a composer that keeps a promise
#
# Write a composer that caps the *prompt tokens* of a step at `self.most` **as long as somebody is decoding**, and uses
# the whole budget when nobody is. Decodes always go first. You have two helpers: `split(offers.running)` gives
# `(decodes, prompts)`, and `fill(offers, budget, seats)` takes offers in order and cuts the last one to the budget.


# %% exercise
class Considerate:
    """Decodes first; beside them at most `most` prompt tokens in a step."""

    def __init__(self, most=128):
        self.most = most

    def compose(self, view, offers):
        decodes, prompts = split(offers.running)
        budget, seats = view.limits.max_num_batched_tokens, view.limits.max_num_seqs
        return fill([*prompts, *offers.waiting, *decodes], budget, seats)  # prompts first: your turn


# %%
verdict = check("considerate", Considerate)
mine = serve(Considerate(), 2048)
say(f"With your composer and a budget of 2048: 99% of the gaps below {seconds(mine.metrics.itl.p99)}, "
    f"median TTFT {seconds(mine.metrics.ttft.p50)}.")

# %% [markdown]
# ## Break it
#
# When does chunking lose? First, it is not free: every chunk reads the weights again, and the cache of all chunks before
# it. Second, if nobody is writing, there is nobody to be considerate to.

# %%
alone = Workload((0.0,), (4000,), (2,))
cost = {b: serve("chunked", b, alone, max_model_len=8192).requests for b in (64, 256, 1024, 4096)}
ttft = {b: next(iter(r.values())).ttft for b, r in cost.items()}
show(bars([Bar(f"budget {b}", t, note=f"{-(-4000 // b)} steps") for b, t in ttft.items()], "seconds to the first token",
          f"A prompt of 4,000 tokens, alone on the device: chunks of 64 take {ttft[64] / ttft[4096]:.1f} times as long",
          "Simulated on a10, llama-3.1-8b. One request", ".2f"))

# %% [markdown]
# ## What this does not show
#
# - One load, one seed. Lesson 06 shows how to compare policies over several.
# - Decode first is a caricature of static batching: real systems of that kind wait a moment to collect a batch.
# - There are more cuts than this one: by layers instead of tokens, or by separating reading and writing onto different
#   machines. The composer seam takes the first; the second needs more than one engine.
#
# ## Three questions
#
# <details><summary>1. Under chunked prefill with a budget of 512, can a stream still see a gap of more than one full step?
# </summary>
#
# Yes, if its token does not get into a step: when it is preempted for memory (lesson 07), or when more streams write than
# the budget or the seats allow. The budget bounds the length of a step, not who is in it.
# </details>
#
# <details><summary>2. Below which budget does chunked prefill waste the device?</summary>
#
# Below the ridge: a step of fewer tokens takes as long as one with more, because fetching the weights decides. There
# reading in smaller pieces costs time and buys nothing. Lesson 04's exercise computes that number of tokens.
# </details>
#
# <details><summary>3. A colleague measures chunked prefill with one request at a time and finds it slower. Is he right?
# </summary>
#
# He is, about that load: you saw it under "Break it". It is made for streams that share a device. A benchmark must have
# the load that the idea is for, and one that it is not for.
# </details>
