# %% [markdown]
# # 07 Preemption and memory pressure
#
# Nobody knows how long an answer will be, so an engine lets in more requests than it could hold if all of them became
# long. Usually they do not. When they do, the pool runs dry in the middle of the writing, and somebody has to give up
# memory that is already filled with work: that request is **preempted**. It comes back later and computes the lost part
# again, or gets it back from a slower memory.
#
# Three seams are asked in turn: **admission** (may one more start?), **victim** (who gives way?), **tiering** (drop the
# victim's memory, or move it to the host?).
#
# **After this lesson you can**
#
# - read from a log who took whose memory, who else could have given way, and what it cost;
# - account for every token that was computed twice;
# - say when moving memory is cheaper than computing again;
# - choose between few preemptions and many, knowing what each does to whom.
#
# The first half is **measured** on the real engine with `lab-s`. Then **simulated**: `llama-2-7b` on a T4, whose 16 GB
# leave room for a few thousand tokens of cache beside the weights.

# %%
import llmlab
from llmlab import EngineConfig, SamplingParams, Workload, tasks
from llmlab.events.why import describe
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show, timeline
from llmlab.teaching.figures import Axis, Bar, Point, bars, curves, table
from llmlab.ui import figures, theme
from llmlab.ui.chart import count, seconds, setting
from roofline import CostModel, Rows

theme.enable("light")
PROMPTS = [p.prompt for p in tasks.tour_problems(seed=1, n=24) if p.suite != "doc"][:16]


def serve(num_blocks, **more):
    """The 16 prompts on the real engine with a pool of `num_blocks` blocks of 16 tokens."""
    with llmlab.Engine(model="lab-s", num_blocks=num_blocks, max_num_seqs=16, log_level=3, admission="optimistic",
                       **more) as engine:
        for prompt in PROMPTS:
            engine.add_request(prompt, SamplingParams(max_tokens=160, temperature=0.0))
        while engine.has_unfinished_requests():
            engine.step()
        return llmlab.Run.of(engine.log)


roomy = serve(200)
need = roomy.metrics.max_kv_blocks
say(f"16 short problems at once, with all the memory they want, use at most **{need} blocks**.")

# %% [markdown]
# ## Predict

# %%
SMALL = need // 2
guess = predict(f"Now the pool has {SMALL} blocks, half of it. How many of the 16 are preempted at least once?",
                Slider(8, 0, 16), "requests")

# %% [markdown]
# ## Run it

# %%
tight = serve(SMALL)
hit = [r for r in tight.requests.values() if r.num_preemptions]
guess.reveal(len(hit), f"There were {tight.metrics.num_preemptions} preemptions: some were hit more than once.")
timeline(tight)
show(figures.kv_block_map(tight))
answers = [[e.token_ids for e in run.events("TokensReleased", request=name)] for run in (roomy, tight) for name in run.requests]
same = [sum(a, ()) for a in answers[:16]] == [sum(a, ()) for a in answers[16:]]
say(f"All 16 answers are {'the same' if same else 'NOT the same'} as with enough memory: preemption costs time, not quality.")

# %% [markdown]
# ## The events: who, why, and what else
#
# The chain of one preemption, from the log. A request needed a block and found none; the victim policy scored the others;
# the tiering policy chose what becomes of the memory. Each is the cause of the next.

# %%
first = tight.events("RequestPreempted")[0]
chain = [e for e in tight.log_events if first.seq - 3 <= e.seq <= first.seq and e.step == first.step]
for event in chain:
    if type(event).__name__ == "Decision":
        say(f"- {describe(event)}")
show(tight.why(first.request))

# %% [markdown]
# ## Formula against measurement: the recompute tax
#
# What was dropped must be computed again, unless the prefix cache still has it (blocks that nobody has overwritten yet are
# found by their content). So, over a run that ends,
#
#     tokens computed twice = tokens lost - tokens found again in the cache

# %%
rows = []
for caching in (False, True):
    run = serve(SMALL, enable_prefix_caching=caching)
    lost = sum(e.tokens_lost for e in run.events("RequestPreempted"))
    found = sum(e.num_cached_tokens for e in run.events("RequestAdmitted") if e.attempt)
    rows.append({"prefix cache": "on" if caching else "off", "lost": lost, "found again": found,
                 "lost - found": lost - found, "counted": run.metrics.recomputed_tokens,
                 "tax": f"{run.metrics.recompute_tax:.0%}"})
say(table(rows))
say("The *tax* is the share of all computed tokens that were computed for the second time.")

# %% [markdown]
# ## Drop or move?
#
# A victim's memory can be copied to the host and back instead. That costs bytes over a link, twice; dropping costs a
# prefill. Which is cheaper depends on the machine and the model, and for short victims on what a step costs at the least.


# %%
def drop_or_move(model, device):
    """Predicted time until a victim is back, for both ways."""
    cost = CostModel(model, device)
    lengths = [2**i for i in range(5, 13)]
    again = [Point(n, cost.step(Rows([n], [n])).seconds * 1e3) for n in lengths]
    moved = [Point(n, 2e3 * cost.transfer_seconds(n * cost.shape.kv_bytes_per_token("fp16"))) for n in lengths]
    ratio = again[5].y / moved[5].y
    return curves({"compute again": again, "move and back": moved}, {}, Axis("tokens of the victim", True),
                  Axis("milliseconds", True), f"For {lengths[5]:,} tokens, computing again takes {ratio:.1f} times as "
                  "long as moving", f"Computed: {model} on {device}, its host link")


panel = knobs(drop_or_move, model=Choice("llama-2-7b", "llama-3.1-8b"), device=Choice("t4", "a10", "a100", "h100"))

# %% [markdown]
# ## Choose the victim
#
# Now the T4, simulated: 50 requests, 1.5 a second. Three policies for the victim, and for comparison an admission that
# never lets in more than could ever fit (`worst_case`), so that nobody is preempted at all.

# %%
LOAD = Workload.poisson(rate=1.5, n=50, prompt="lognormal:120,0.7", output="lognormal:120,0.7", seed=0)


def t4(load=LOAD, **policies):
    return llmlab.run(EngineConfig(model="llama-2-7b", executor="sim", hardware="t4", enable_prefix_caching=False,
                                   **policies), load)


runs = {name: t4(victim=name) for name in ("last_come", "most_blocks", "least_progress")}
runs["worst_case admission"] = t4(admission="worst_case")
say(table([
    {"": name, "preemptions": r.metrics.num_preemptions, "most of one": max(q.num_preemptions for q in r.requests.values()),
     "tax": f"{r.metrics.recompute_tax:.0%}", "mean TTFT": seconds(r.metrics.ttft.mean),
     "mean E2E": seconds(r.metrics.e2e.mean), "tokens/s": f"{r.metrics.output_throughput:.0f}"}
    for name, r in runs.items()
]))

# %% [markdown]
# Few preemptions are not a cheap tax: whoever owns the most blocks has the most to compute again. And no preemptions are
# the dearest of all, because memory that is kept for the worst case is empty most of the time.
#
# Would one other choice have helped? Fork the history at the first preemption, and let another policy go on from there:

# %%
base = runs["most_blocks"]
fork = base.fork(at=base.events("RequestPreempted")[0].step - 1, victim="last_come")
show(llmlab.compare(base, fork))

# %% [markdown]
# ## Exercise: a fair victim
#
# Some requests are hit again and again. Write a victim policy under which nobody is preempted a second time while somebody
# who was spared so far could give way; among equals, the one that came last. `candidate.num_preemptions`,
# `candidate.arrival` and `candidate.number` are yours; the **smallest** score gives way, and a tuple is a score, too.


# %% exercise
class Fair:
    """Whoever was preempted least often; among equals, the last come."""

    def score(self, view, candidate, needy):
        return (-candidate.arrival, -candidate.number)  # the last come, however often: your turn


# %%
verdict = check("fair_victim", Fair)
mine = t4(victim=Fair())
say(f"Your policy on the load above: {count(mine.metrics.num_preemptions, 'preemption')}, at most "
    f"{max(r.num_preemptions for r in mine.requests.values())} of one request, tax {mine.metrics.recompute_tax:.0%}. "
    "Compare with `last_come` in the table.")

# %% [markdown]
# ## Break it
#
# In every time above, preempting beat waiting. Here is the load where it does not: short prompts, long answers, and a
# user who watches the text appear. Look at the longest silence in the middle of an answer.

# %%
CHATTY = Workload.poisson(rate=1.0, n=30, prompt="uniform:16,64", output="uniform:300,600", seed=0)
both = {name: t4(CHATTY, admission=name, log_level=1) for name in ("prompt_fits", "worst_case")}
silence = {name: r.metrics.itl.max for name, r in both.items()}
show(bars([Bar(name, silence[name], note=f"mean TTFT {seconds(r.metrics.ttft.mean)}, {r.metrics.output_throughput:.0f} tokens/s, "
               f"{count(r.metrics.num_preemptions, 'preemption')}") for name, r in both.items()],
          "longest gap between two tokens of an answer (s)",
          f"Letting everybody in stops somebody's text for {seconds(silence['prompt_fits'])}; waiting at the door for "
          f"{seconds(silence['worst_case'])}", setting(both["prompt_fits"]), ".1f"))

# %% [markdown]
# ## What this does not show
#
# - One seed. The *order* of the victim policies changes with the load; that the tax follows the victims' sizes does not.
# - Moving was priced, not overlapped: real engines copy while they compute, and the gap becomes larger.
# - An admission that guesses lengths from experience stands between the two extremes of the last picture.
#
# ## Three questions
#
# <details><summary>1. The oldest running request is never a victim in llmlab, whatever the policy says. Why?</summary>
#
# So that somebody always gets on. If everybody could be preempted for everybody, two requests could take each other's
# memory for ever, and nobody would finish.
# </details>
#
# <details><summary>2. A preempted request is let in again only when all its tokens fit at once. What would happen
# without this rule?</summary>
#
# It would start to compute its lost part, find no memory half-way, and be preempted again: work that is lost each time.
# The tax would grow without bound under pressure. This is called thrashing.
# </details>
#
# <details><summary>3. Why does preemption with greedy decoding, or with a fixed seed, not change the answer?</summary>
#
# The tokens that were already written are kept; only their keys and values are computed again, from the same tokens at the
# same positions. Random numbers are keyed by position, so the next draw is the one that would have come anyway.
# </details>
