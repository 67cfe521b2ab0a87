# %% [markdown]
# # 06 Who runs next
#
# When more requests come than can run, somebody waits. Whom to let in first is the oldest question of scheduling, and
# language models give it a twist: how much work a request is, nobody knows before it is done.
#
# The seam for it is the **ordering**: a policy gives every waiting request a *key*, and the smallest key is next. That is
# all. First come, first served is `key = arrival`; shortest job first is `key = length`.
#
# **After this lesson you can**
#
# - use Little's law to check any queue, yours included;
# - say why short jobs first lowers the mean, and who pays for it;
# - recognise starvation in a log, and mend it with one line;
# - compare two policies so that the result means something.
#
# Everything here is **simulated**: `llama-3.1-8b` on an A10 with four seats, so that a queue forms. The policies know the
# true lengths (they are *oracles*): the best that any prediction of lengths could reach.

# %%
import llmlab
from llmlab import EngineConfig, Workload
from llmlab.scheduling.ordering import job_length
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show
from llmlab.teaching.figures import Axis, Point, curves, table
from llmlab.ui import figures, theme
from llmlab.ui.chart import seconds

theme.enable("light")


def load(rate=2.0, seed=0, n=60):
    """Requests with mixed lengths: most are short, a few are very long."""
    return Workload.poisson(rate=rate, n=n, prompt="lognormal:200,0.8", output="lognormal:60,1.0", seed=seed)


def serve(ordering, work, log_level=2):
    """One simulated run with four seats."""
    config = EngineConfig(model="llama-3.1-8b", executor="sim", hardware="a10", ordering=ordering,
                          max_num_batched_tokens=512, max_num_seqs=4, log_level=log_level)
    return llmlab.run(config, work)


# %% [markdown]
# ## Predict
#
# Two runs of the same 60 requests, first come first served (`fcfs`) and shortest job first (`sjf_oracle`).

# %%
guess = predict("How many of the 60 get their first token sooner with shortest job first?", Slider(30, 0, 60), "requests")

# %% [markdown]
# ## Run it

# %%
fcfs, sjf = serve("fcfs", load()), serve("sjf_oracle", load())
both = llmlab.compare(fcfs, sjf)
guess.reveal(both.better("ttft"), f"The mean time to first token is {both.mean_ratio('ttft'):.2f} times that of fcfs.")
show(figures.policy_race(fcfs, sjf, ("first come, first served", "shortest job first")))

# %% [markdown]
# Grey is waiting. Under *fcfs* everybody behind a long request shares its fate: the *convoy*. Under *sjf* the short ones
# slip past, and a few long grey lines remain. The distribution says it without names:

# %%
show(figures.latency_ecdf({"fcfs": fcfs, "sjf": sjf}, "ttft"))
worst = max(sjf.requests.values(), key=lambda r: r.queue_time or 0.0)
show(sjf.why(worst.request))

# %% [markdown]
# ## Formula against measurement: Little's law
#
# For any queue that starts and ends empty, whatever the policy, whatever the lengths:
#
#     L = lambda W
#
# `L` is the mean number of requests inside, `lambda` how many arrive per second, `W` how long each stays on average. We
# count `L` in the engine's steps (running plus waiting, weighted by time) and compute the right side from the requests.


# %%
def little(run):
    """L counted step by step, lambda and W from the requests."""
    span = run.steps[-1].end - min(r.arrival for r in run.requests.values())
    area = sum((s.end - s.start) * (s.num_running + s.num_waiting) for s in run.steps)
    return area / span, len(run.requests) / span, run.metrics.e2e.mean


rows = []
for name, one in {"fcfs": fcfs, "sjf_oracle": sjf}.items():
    counted, arrivals, stay = little(one)
    rows.append({"ordering": name, "lambda": f"{arrivals:.3f} /s", "W": f"{stay:.2f} s",
                 "lambda W": f"{arrivals * stay:.2f}", "L counted": f"{counted:.2f}",
                 "apart by": f"{abs(counted / (arrivals * stay) - 1):.1%}"})
say(table(rows))

# %% [markdown]
# (A request that comes in the middle of a step is counted from the next one on: that is the small difference.) The law
# needs no assumption, so it is a test of *measurements*: if a benchmark reports a throughput, a mean latency and a
# mean concurrency that do not fit, one of the three is wrong. And it says what an ordering can do: at the same arrivals,
# a smaller mean stay *is* a smaller crowd.
#
# ## Near the edge
#
# How long one waits depends on the load far more than on the policy, until it is high. Turn the knobs:


# %%
def waiting(ordering, seed):
    """Mean wait against the rate of arrivals."""
    rates = (0.5, 1.0, 1.5, 2.0)
    found = {rate: serve(ordering, load(rate, seed, n=40), log_level=1) for rate in rates}
    return curves({"": [Point(rate, found[rate].metrics.queue_time.mean) for rate in rates]}, {},
                  Axis("requests per second"), Axis("mean seconds in the queue"),
                  f"At {rates[-1]:g} requests per second one waits {seconds(found[2.0].metrics.queue_time.mean)}, at "
                  f"{rates[0]:g} {seconds(found[0.5].metrics.queue_time.mean)}",
                  f"Simulated on a10, llama-3.1-8b, {ordering}, seed {seed}, 40 requests a run")


panel = knobs(waiting, ordering=Choice("fcfs", "sjf_oracle", "ljf"), seed=Choice(0, 1, 2, 3))

# %% [markdown]
# ## Several seeds, in pairs
#
# One run proves nothing. The honest comparison gives both policies the *same* requests, for several draws, and looks at the
# ratio in each pair.

# %%
def ratios(rate, n):
    """Mean TTFT of sjf over that of fcfs, for four seeds."""
    found = []
    for seed in range(4):
        pair = [serve(name, load(rate, seed, n), log_level=1).metrics.ttft.mean for name in ("fcfs", "sjf_oracle")]
        found.append(pair[1] / pair[0])
    return found


busy, quiet = ratios(2.0, n=60), ratios(0.5, n=30)
say(table([{"load": name, **{f"seed {i}": f"{r:.2f}" for i, r in enumerate(found)}}
           for name, found in (("2.0 requests/s", busy), ("0.5 requests/s", quiet))]))
say(f"Busy: shorter by {1 - sum(busy) / 4:.0%} on average, from {1 - max(busy):.0%} to {1 - min(busy):.0%}.")

# %% [markdown]
# ## Exercise: nobody starves
#
# One long request, and short ones that never stop coming: under shortest job first it waits until the stream ends. Mend
# it: write a key that grows with the length *and* with the arrival, so that whoever waits long enough goes first.
# `job_length(request)` gives the tokens of work, `request.arrival` the seconds. The check runs two loads: on the
# stream the long request must start within 40 seconds; on a mixed load your mean time to first token must stay at least
# 20% below first come, first served.


# %% exercise
class Patient:
    """Shortest job first, but not for ever."""

    refresh = "arrival"  # the key is computed once, when a request enters the queue

    def key(self, request, now):
        return job_length(request)  # starves: your turn


# %%
verdict = check("patient", Patient)

# %% [markdown]
# A key that is fixed on arrival is enough: "length minus age times c" and "length plus arrival times c" differ by the same
# number for everybody at any moment, so they sort alike, and the second never has to be computed again.
#
# ## Break it
#
# Look at the second row of the table above, the quiet load:

# %%
say(f"At 0.5 requests per second the ratio of the means is {', '.join(f'{r:.2f}' for r in quiet)}: "
    f"in {sum(r >= 0.995 for r in quiet)} of 4 draws shortest job first is no better, or worse. "
    "With no queue there is nothing to order.")
same = Workload.poisson(rate=2.0, n=40, prompt=200, output=60, seed=0)
equal = [serve(name, same, log_level=1).metrics.ttft.mean for name in ("fcfs", "sjf_oracle")]
say(f"And if all jobs have the same length: mean TTFT {seconds(equal[0])} and {seconds(equal[1])}. (Simulated.)")

# %% [markdown]
# ## What this does not show
#
# - Real lengths are unknown. A predictor is right about the order of some pairs and wrong about others; how much of the
#   oracle's gain survives is a question for its own page.
# - Mean times are not what a service promises. Promises are about percentiles and deadlines, and there the oracle's long
#   tail counts against it.
# - Fairness between users, who each have many requests, needs more than a key per request.
#
# ## Three questions
#
# <details><summary>1. Shortest job first lowers the mean. Does it make the device faster?</summary>
#
# No. The same tokens are computed, and the last request ends about as late or even later, because the long ones are left
# to the end, where the batch is no longer full. Only the order in which people are served changes.
# </details>
#
# <details><summary>2. A dashboard shows 30 requests per second, a mean latency of 2 s and a mean concurrency of 40. What do
# you conclude?</summary>
#
# By Little's law 60 requests must be inside on average. One of the three numbers is measured wrongly, or they are not of
# the same requests or the same stretch of time: perhaps refused ones count in one of them.
# </details>
#
# <details><summary>3. Why do keys break ties by arrival and then by number?</summary>
#
# So that the order is the same in every run, on every machine. A queue that depends on the order of a hash table cannot
# be replayed, and what cannot be replayed cannot be explained.
# </details>
