# %% [markdown]
# # 02 Prefill and decode
#
# Reading is fast, writing is slow. A model that has never heard of the words *prefill* and *decode* still lives them:
# the tokens of a prompt are all known and go through the model together; the tokens of the answer come one by one,
# because each depends on the one before. Two numbers describe what a user feels, and each belongs to one of the two:
#
# - **TTFT**, the time to the first token: waiting, then reading the prompt;
# - **TPOT**, the time per output token after that: the pace of the writing.
#
# **After this lesson you can**
#
# - see the two phases in the steps of an engine, although the engine itself does not know them;
# - say how many steps a request takes, exactly;
# - compute TTFT and TPOT from a log of events;
# - explain why a longer prompt costs less per token, and when that ends.
#
# The first half is **measured** on the real engine with `lab-s`. The second half asks the **cost model** about models
# and machines that you may not own; each picture says which.

# %%
import random

import llmlab
from llmlab import SamplingParams, tasks
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show, timeline
from llmlab.teaching.figures import Axis, Point, curves, table
from llmlab.ui import figures, theme
from llmlab.ui.chart import seconds, setting
from roofline import CostModel, Rows

theme.enable("light")
llm = llmlab.LLM("lab-s", enable_prefix_caching=False, max_num_batched_tokens=1024,
                 num_blocks=256)
record = tasks.suite("doc").problem(random.Random(5), split="test").prompt
ids = llm.tokenizer.encode(record)
say(f"Our prompt is a record of **{len(ids)} tokens** with a question at its end. It begins: *{record[:110]}...*")

# %% [markdown]
# ## Predict
#
# The engine will read this prompt and then write 48 tokens. Reading is many times more tokens than writing.

# %%
guess = predict("What share of the whole time goes to reading the prompt?", Slider(50, 0, 100), "%")

# %% [markdown]
# ## Run it
#
# `ignore_eos` lets the model go on past the end of its answer, so that we get exactly 48 tokens.

# %%
OUTPUT = 48
request = llm.generate([ids], SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True))[0]
run = llm.run
times = run.requests[request.request_id]
reading, whole = times.ttft, times.e2e

guess.reveal(100 * reading / whole,
             f"{len(ids)} tokens were read in {seconds(reading)}, {OUTPUT} written in {seconds(whole)}.")
say(f"Per token, writing was **{times.tpot / (reading / len(ids)):.0f} times as expensive** as reading.")

# %% [markdown]
# Where does that come from? A *step* is one pass through the model. Here is what each step of this run computed:

# %%
steps = run.steps
say(table([
    {"step": s.step, "tokens computed": s.num_tokens, "time": seconds(s.measured),
     "time per token": seconds(s.measured / s.num_tokens)} for s in [*steps[:3], steps[-1]]
]))
show(figures.batch_composition(run))

# %% [markdown]
# One tall step, then many flat ones. The engine did not switch modes: in both cases it computed *the tokens that are
# known but not yet computed*. For the prompt these are hundreds, later it is one. The flat steps are so slow per token
# because a step has costs that do not depend on how many tokens are in it: every weight of the model must be fetched
# once, and the program around it runs once, be it for one token or for a thousand.
#
# ## The events
#
# `run.why` tells the same story from the log. (Its clock began when the engine was made, here and in all pictures.)

# %%
show(run.why(request.request_id))

# %% [markdown]
# ## Formula against measurement: how many steps?
#
# An engine may compute at most `max_num_batched_tokens` tokens in a step, its *token budget* `B`. A prompt of `P` tokens
# then takes several steps, and the last of them gives the first of `O` output tokens:
#
#     steps = ceil(P / B) + (O - 1)
#
# We try four budgets on the real engine. Watch the last column: the text must not depend on how the reading was cut.

# %%
rows, texts = [], []
for budget in (16, 64, 256, 1024):
    with llmlab.Engine(model="lab-s", max_num_batched_tokens=budget, num_blocks=256,
                       enable_prefix_caching=False) as engine:
        engine.add_request(ids, SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True))
        while engine.has_unfinished_requests():
            outputs = engine.step()
        one = llmlab.Run.of(engine.log)
    texts.append(outputs[0].outputs[0].token_ids)
    rows.append({"budget": budget, "steps counted": len(one.steps),
                 "formula": -(-len(ids) // budget) + OUTPUT - 1, "TTFT": seconds(one.requests["r0"].ttft),
                 "same tokens as before": "yes" if texts[-1] == texts[0] else "no"})
say(table(rows))
counted = all(row["steps counted"] == row["formula"] for row in rows)
say(f"The formula is {'exact' if counted else 'WRONG'}, and all four runs "
    f"{'wrote the same tokens' if texts.count(texts[0]) == 4 else 'did NOT write the same tokens'}. "
    "Cutting a prompt changes when it is read, not what is understood.")

# %% [markdown]
# ## Larger models: ask the cost model
#
# A cost model prices a step from first principles: the operations that it needs over the rate of the machine, the bytes
# that it must fetch over the bandwidth, whichever takes longer. Below: one step with `T` new tokens, for a model and a
# machine of your choice. **Computed, not measured.**


# %%
def step_seconds(model, machine, tokens):
    """Predicted seconds of a step that reads `tokens` tokens of one prompt."""
    return CostModel(model, machine).step(Rows([tokens], [tokens])).seconds


def draw(model, machine):
    """Time of a step, and per token, against the number of tokens in it."""
    sizes = [2**i for i in range(12)]
    points = [Point(t, step_seconds(model, machine, t) * 1e3) for t in sizes]
    flat = max(p.x for p in points if p.y < 1.25 * points[0].y)
    return curves({"": points}, {}, Axis("new tokens in the step", True), Axis("milliseconds", True),
                  f"Up to {flat} tokens take hardly longer than one: {points[0].y:.3g} ms",
                  f"Computed: roofline of {model} on {machine}. Both axes logarithmic")


panel = knobs(draw, model=Choice("llama-2-7b", "llama-3.1-8b", "llama-2-13b"),
              machine=Choice("a10", "a100", "h100"))

# %% [markdown]
# The left part is flat: the step waits for the weights to be fetched, and more tokens ride along for nothing. The right
# part is a slope: now the arithmetic takes longer than the fetching. The bend between them is called the *ridge*. A
# prompt of a thousand tokens sits on the slope, where a token is as cheap as it will ever be. A decode step of one
# request sits at the far left. Lesson 04 fills that step with other people's tokens.

# %%
one, many = (step_seconds("llama-2-7b", "a10", t) / t for t in (1, 1024))
say(f"llama-2-7b on an A10 (computed): a token costs **{one * 1e3:.1f} ms alone** and {many * 1e3:.2f} ms among 1,024, "
    f"a factor of {one / many:.0f}.")

# %% [markdown]
# ## Exercise: TTFT and TPOT from events
#
# An engine that only logs *when tokens came out* is enough to compute both. `arrival` is when the request was made,
# `times` holds the time of each output token, in order. Return the pair `(ttft, tpot)`; a request with a single
# token has no time per output token: return `None` for it.


# %% exercise
def latencies(arrival, times):
    """(time to first token, mean time per output token after the first), in seconds."""
    return times[0], times[-1] / len(times)  # two faults: your turn


# %%
verdict = check("latencies", latencies)

# %% [markdown]
# ## Break it
#
# Reading a prompt in one go is the fastest way to its own first token. Not everybody likes that. While `r0` writes, we
# drop a long prompt on the same engine, and look at the gaps between the tokens of `r0`.

# %%
with llmlab.Engine(model="lab-s", enable_prefix_caching=False, num_blocks=256,
                   max_num_batched_tokens=1024) as engine:
    engine.add_request("<chat>tell me about the river in detail?<ans>",
                       SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    for _ in range(20):
        engine.step()
    engine.add_request(ids, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    stalled = llmlab.Run.of(engine.log)
gaps = sorted(stalled.requests["r0"].itl)
timeline(stalled)
say(f"The gap between two tokens of `r0` is usually {seconds(gaps[len(gaps) // 2])}; once it was **{seconds(gaps[-1])}**, "
    f"{gaps[-1] / gaps[len(gaps) // 2]:.0f} times as long. That is the step in which `r1` was read. {setting(stalled)}.")

# %% [markdown]
# The budget is the cure: with a small one the long prompt is read in pieces, between which `r0` goes on. What that
# costs, and who should pay, is lesson 05.
#
# ## What this does not show
#
# - Times were measured on the machine that runs this lesson, beside whatever else it does. Numbers of steps and tokens
#   are exact; times are what they were today.
# - `lab-s` is so small that its steps cost mostly the program around the arithmetic, not the fetching of weights. The
#   shape (a fixed part and a part per token) is the same; the reason for the fixed part is not.
# - The cost model's factors come from a table of devices. How far to trust them is in the documentation, page *Roofline*.
#
# ## Three questions
#
# <details><summary>1. A user complains that the first token takes two seconds, but then the text flows. Which of the two
# numbers is it, and would a GPU with twice the memory bandwidth help?</summary>
#
# TTFT. Reading a long prompt is bound by arithmetic, so bandwidth alone does little; more operations per second, or less
# waiting in the queue, would help. Twice the bandwidth would speed up the flow of the text.
# </details>
#
# <details><summary>2. With budget 16, is the last chunk of the prompt a prefill or a decode?</summary>
#
# Neither word is needed. It is a step that computes the known tokens that are left, and because the last of them is
# among them, it also yields a new one. llmlab's unit of work is a span of tokens; the two phases are what spans of
# different lengths look like from afar.
# </details>
#
# <details><summary>3. Could the model write faster if it had to write two answers?</summary>
#
# Two answers in one step: yes, nearly twice as many tokens in nearly the same time, since the fixed part is paid once.
# One answer: no, its next token still waits for the one before.
# </details>
