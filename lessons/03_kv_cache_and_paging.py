# %% [markdown]
# # 03 The KV cache, and why it is paged
#
# To write the hundredth token, a model must take the ninety-nine before it into account. It could read all of them again.
# Nobody does: each layer leaves behind two short vectors per token, a *key* and a *value*, and everything that later
# tokens need to know of an earlier one is in them. Kept, they are the **KV cache**. It turns reading-it-all-again into
# reading-one-token, and then it becomes the largest thing in the machine's memory that nobody planned for.
#
# **After this lesson you can**
#
# - say how much work the cache saves, and check it by running a model without it;
# - compute the bytes per token of any model, and how many tokens fit on a device;
# - find the place of a token in paged memory;
# - say what a block size costs on either side, and when sharing a prefix works.
#
# The first half is **measured** on the real engine with `lab-s`; the sweeps over block sizes use the **simulated**
# executor, whose block bookkeeping is the same code.

# %%
import random
import time

import llmlab
from llmlab import SamplingParams, Workload, tasks
from llmlab.teaching import Choice, Slider, check, knobs, predict, say, show
from llmlab.teaching.figures import Axis, Point, curves, table
from llmlab.ui import figures, theme
from llmlab.ui.chart import count, seconds, setting
from roofline import hardware, memory

theme.enable("light")
POOL = {"model": "lab-s", "num_blocks": 256, "enable_prefix_caching": False}
prompt_text = tasks.suite("doc").problem(random.Random(2), split="test").prompt

# %% [markdown]
# ## Predict

# %%
engine = llmlab.Engine(**POOL)
PROMPT = engine.tokenizer.encode(prompt_text)[:100]
OUTPUT = 48
guess = predict(f"A prompt of {len(PROMPT)} tokens, then {OUTPUT} written ones. Without a cache every step reads "
                "everything again. How many times as many tokens have to be computed?", Slider(10, 1, 100), "times")

# %% [markdown]
# ## Run it, with the cache and without
#
# With the cache: one request. Without: after each token we throw everything away and send prompt and answer so far as a
# new prompt, asking for one token. Both are greedy, so the words must agree.

# %%
greedy = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)


def finish(engine, prompt, sampling):
    """Serve one prompt to its end; the new tokens."""
    engine.add_request(prompt, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
    return outputs[0].outputs[0].token_ids


began = time.perf_counter()
with_cache = finish(engine, PROMPT, greedy)
fast = time.perf_counter() - began
computed_with = sum(s.num_tokens for s in llmlab.Run.of(engine.log).steps)

began, without_cache = time.perf_counter(), []
for _ in range(OUTPUT):
    without_cache += finish(engine, PROMPT + without_cache, SamplingParams(max_tokens=1, temperature=0.0))
slow = time.perf_counter() - began
run = llmlab.Run.of(engine.log)
computed_without = sum(s.num_tokens for s in run.steps) - computed_with

guess.reveal(computed_without / computed_with)
same = "the same" if with_cache == without_cache else "DIFFERENT"
say(f"Both ways wrote {same} {OUTPUT} tokens. With the cache {computed_with} tokens were computed in {seconds(fast)}, "
    f"without it {computed_without:,} in {seconds(slow)} (measured).")

# %% [markdown]
# ## Formula against measurement: the work
#
# With `P` prompt and `O` output tokens, and `O - 1` steps after the one that reads the prompt:
#
#     with a cache     P + O - 1
#     without          P + (P + 1) + ... + (P + O - 1) = O P + O (O - 1) / 2

# %%
def work_with(p, o):
    return p + o - 1


def work_without(p, o):
    return o * p + o * (o - 1) // 2


p = len(PROMPT)
say(table([
    {"cache": "with", "formula": work_with(p, OUTPUT), "counted in the log": computed_with},
    {"cache": "without", "formula": work_without(p, OUTPUT), "counted in the log": computed_without},
]))
lengths = [2**i for i in range(3, 12)]
most = lengths[-1]
show(curves({}, {"without": [Point(o, work_without(p, o)) for o in lengths],
                 "with": [Point(o, work_with(p, o)) for o in lengths]},
            Axis("output tokens", True), Axis("tokens to compute", True, "~s"),
            f"At {most:,} output tokens the cache saves all but one in "
            f"{work_without(p, most) / work_with(p, most):,.0f} of the tokens to compute",
            f"Computed by the formula, prompt of {p} tokens"))

# %% [markdown]
# The work without a cache grows with the square of the length. What does the cache cost instead? Memory:
#
#     bytes per token = 2 (key and value) x layers x KV heads x head width x bytes per number
#
# The engine's tensors lie open, so we can count.

# %%
layers = engine.executor.cache.layers  # a pair (keys, values) for each layer
held = sum(k.nbytes + v.nbytes for k, v in layers) / (layers[0][0].shape[0] * layers[0][0].shape[2])
shape = engine.model.shape
formula = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
say(f"`lab-s` has {shape.num_layers} layers, {shape.num_kv_heads} KV heads of width {shape.head_dim}, in 4-byte numbers: "
    f"by the formula **{formula:,} bytes** a token, counted in the tensors {held:,.0f}.")
fits = []
for name, device in (("llama-2-7b", "a10"), ("llama-3.1-8b", "a10"), ("llama-2-7b", "a100"), ("llama-3.1-8b", "h200")):
    plan = memory.plan(name, device)
    fits.append({"model": name, "device": f"{device}, {hardware.get(device).memory_bytes / 2**30:.0f} GiB",
                 "KB per token": f"{plan.kv_per_token / 1e3:,.0f}", "tokens that fit": f"{plan.tokens:,}",
                 "requests of 2,000 tokens": plan.sequences(2000)})
say(table(fits))

# %% [markdown]
# (Computed, 16-bit numbers, nine tenths of the memory usable.) Compare the first two rows: about as many weights, but
# `llama-3.1-8b` lets four query heads share one KV head and needs a quarter of the cache.
#
# ## Paging
#
# How long will an answer be? Nobody knows. Reserving the maximum for everybody wastes most of it. So the memory is cut
# into **blocks** of a few tokens, and a request takes one more when it needs one. Its *block table* lists them in order;
# they may lie anywhere.

# %%
short = [p.prompt for p in tasks.tour_problems(seed=1, n=20) if p.suite != "doc"]
with llmlab.Engine(**POOL | {"num_blocks": 64}, log_level=3, max_num_seqs=8) as paged:
    for prompt in short:
        paged.add_request(prompt, SamplingParams(max_tokens=112, temperature=0.0))
    while paged.has_unfinished_requests():
        paged.step()
    blocks = llmlab.Run.of(paged.log)
show(figures.kv_block_map(blocks))

# %% [markdown]
# A row is a block, a colour a request. When one ends, its blocks go to whoever needs them next: no gaps, no moving. The
# log knows how each request came by its memory:

# %%
longest = max(blocks.requests.values(), key=lambda r: r.num_output_tokens)
taken = blocks.events("BlocksReserved", request=longest.request)
say(f"`{longest.request}` took memory {len(taken)} times. First "
    f"{count(len(taken[0].block_ids), 'block')} for its prompt of {longest.num_prompt_tokens} tokens, then one by one: "
    f"{', '.join(str(b) for e in taken[1:6] for b in e.block_ids)}, ...")
show(blocks.why(longest.request))

# %% [markdown]
# ## The right block size
#
# The last block of a request is rarely full: on average `(block size - 1) / 2` places stay empty. Let us measure that on
# a load of 60 requests (simulated executor, real bookkeeping) and set it beside the formula.


# %%
def empty_places(block_size, context="uniform:50,400"):
    """Mean empty places in the last block of a running request, over all steps of a run."""
    config = llmlab.EngineConfig(model="lab-s", executor="sim", hardware="t4", block_size=block_size,
                                 num_blocks=32768 // block_size, enable_prefix_caching=False)
    load = Workload.poisson(rate=200.0, n=60, prompt=context, output="uniform:10,120", seed=1)
    done = llmlab.run(config, load)
    held = [item.tokens.stop for step in done.steps for item in step.items]
    return sum(-tokens % block_size for tokens in held) / len(held), done


sizes = (1, 4, 16, 64, 256)
empty = {size: empty_places(size) for size in sizes}
show(curves({"": [Point(s, empty[s][0]) for s in sizes]}, {"": [Point(s, (s - 1) / 2) for s in sizes]},
            Axis("block size in tokens", True), Axis("empty places per request"),
            f"{empty[16][0]:.1f} places stay empty on average with blocks of 16 tokens, {empty[256][0]:.0f} with 256",
            f"{setting(empty[16][1])}. Points: counted in the run. Dashed: the formula"))

# %% [markdown]
# Small blocks waste less. Why not one token per block? Because every block is an entry in a table that the attention
# kernel must follow, and because a block is also the unit that is found again, moved and counted.
#
# ## Sharing
#
# If two prompts begin alike, the KV of the common beginning is the same, and may be computed once: a finished block is
# filed under a hash of its tokens *and all tokens before it*. Turn the knobs: two requests, one after the other.

# %%
def shared(same_tokens, block_size):
    """What the second of two prompts of 64 tokens finds, if the first `same_tokens` are those of the first one."""
    with llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=256, block_size=block_size) as two:
        first, fresh = [100 + i for i in range(64)], [300 + i for i in range(64)]
        for prompt in (first, first[:same_tokens] + fresh[same_tokens:]):
            two.add_request(prompt, SamplingParams(max_tokens=2))
            while two.has_unfinished_requests():
                two.step()
        found = llmlab.Run.of(two.log).requests["r1"].num_cached_tokens
    return f"{same_tokens} tokens are alike, blocks of {block_size}: {found} tokens were found, {64 - found} computed."


panel = knobs(shared, same_tokens=Choice(8, 15, 16, 40, 64, start=40), block_size=Choice(4, 16, 64, start=16))

# %% [markdown]
# Only whole blocks can be found. And even if all 64 tokens are alike, not all are taken from the cache: the last token
# is always computed, because its *scores* are what we came for.
#
# ## Exercise: find a token
#
# A block table `[7, 2, 9]` with blocks of 4 tokens: token 0 lies in block 7, token 5 in block 2 at place 1. Write
# `slot(table, block_size, position)`: the number of the place in the whole pool, where block `b` holds the places
# `b * block_size` to `b * block_size + block_size - 1`.


# %% exercise
def slot(table, block_size, position):
    """The place in the pool where the KV of the token at `position` lies."""
    return position  # true only if the blocks were 0, 1, 2, ...: your turn


# %%
verdict = check("slot", slot)

# %% [markdown]
# ## Break it
#
# Paging wins because lengths are unknown. On which load does it win nothing? If every request has the same, known
# length, reserving it in one piece wastes nothing either. Large blocks make the opposite mistake visible: how many
# requests of 40 tokens can be in a pool of 4,096 places?

# %%
many = []
for size in (16, 64, 512):
    config = llmlab.EngineConfig(model="lab-s", executor="sim", hardware="t4", block_size=size, num_blocks=4096 // size,
                                 max_num_seqs=256, max_num_batched_tokens=4096, enable_prefix_caching=False)
    done = llmlab.run(config, Workload.batch(128, prompt=30, output=10, seed=0))
    many.append({"block size": size, "most requests at once": max(len(s.items) for s in done.steps),
                 "mean time to first token": seconds(done.metrics.ttft.mean)})
say(table(many) + f"\n\n({setting(done)}. They arrive together. With blocks of 16 more are in at once than 4,096 / 48: a request needs "
    "its third block only for its 33rd token.)")

# %% [markdown]
# ## What this does not show
#
# - The comparison without a cache also pays for 48 requests instead of one; its time says so only roughly. The counts are
#   exact.
# - What happens when the pool is full: lesson 07. How fast attention reads scattered blocks: page *Kernels*.
# - Caches can be made smaller: fewer heads, fewer bits, a window, a latent form. Here a number is a number.
#
# ## Three questions
#
# <details><summary>1. Why are keys and values kept, but not queries?</summary>
#
# A query belongs to the token that is being computed: it asks once and is done. Keys and values are asked by every token
# that comes later.
# </details>
#
# <details><summary>2. Two requests share the first three blocks of a system prompt. One of them writes into the fourth.
# Must anything be copied?</summary>
#
# No. Writing happens behind the shared part, in a block of its own. A copy is needed only if two requests share a block
# that is not full, as the branches of one request with `n > 1` do: the first to write gets its own copy.
# </details>
#
# <details><summary>3. A block is filed under a hash of its tokens and of all tokens before it. Why not of its own tokens
# alone?</summary>
#
# Because a key or value depends on the whole context. The word "river" after "the" has another KV than after "a dry";
# only the same tokens behind the same beginning give the same vectors.
# </details>
