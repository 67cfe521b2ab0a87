# %% [markdown]
# # 01 One token
#
# A language model does one thing: it reads a list of tokens and gives every token of its vocabulary a score, for how
# well it would go on from here. Everything else in this course, the caches, the batches, the schedulers, exists to do
# that one thing often and fast. So let us look at one token, closely.
#
# **After this lesson you can**
#
# - say what goes into a step of a model and what comes out of it;
# - turn scores into probabilities, and say what *temperature* and *top-p* do to them;
# - predict how often a sampled model says what, and check it against a real engine;
# - say which answers heat ruins, and which ones greed does.
#
# Everything here is **measured**: the real engine runs `lab-s`, a model of 1.25 million parameters that comes with
# llmlab. It needs no GPU and no download.

# %%
import math

import llmlab
from llmlab import SamplingParams, tasks
from llmlab.teaching import Slider, check, knobs, predict, say, show
from llmlab.teaching.figures import Bar, Token, bars, token_strip
from llmlab.ui import theme

theme.enable("light")
llm = llmlab.LLM("lab-s")
VOCAB = llm.engine.model.vocab_size
WHERE = f"Measured: {llm.engine.model.name} on this machine's CPU"

# %% [markdown]
# ## Text becomes numbers
#
# The model never sees letters. A *tokenizer* cuts the text into pieces that it knows and replaces each by its number.

# %%
prompt = "<chat>tell me about the river?<ans>the river is"
ids = llm.tokenizer.encode(prompt)


def spelled(token_id):
    """One token as text, the special ones included."""
    return llm.tokenizer.decode([token_id], skip_special_tokens=False)


show("  ".join(f"{i}:{spelled(i)}" for i in ids))
say(f"{len(prompt)} characters became **{len(ids)} tokens** out of a vocabulary of {VOCAB}. Frequent words are one token, "
    "with the space before them.")

# %% [markdown]
# ## Predict
#
# The model has read *"the river is"*. It will now score all tokens of its vocabulary.

# %%
guess = predict(f"Of {VOCAB} tokens, how many get a probability of more than 1%?", Slider(50, 0, 512), "tokens")

# %% [markdown]
# ## One step of the real engine
#
# We ask for exactly one token, greedily (`temperature=0`: take the most likely one), and for the log-probabilities of
# all tokens. One request, one step.

# %%
answer = llm.generate([ids], SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB))[0].outputs[0]
logprobs = dict(answer.logprobs[0].top)  # token id -> natural logarithm of its probability
probs = {token: math.exp(value) for token, value in logprobs.items()}
ranked = sorted(probs, key=lambda token: -probs[token])
likely = [token for token in ranked if probs[token] > 0.01]
step = llm.run.steps[0]

guess.reveal(len(likely), "Nearly all of the vocabulary is impossible here, and the model knows it.")
say(f"The step computed **{step.num_tokens} tokens** of input and gave back **{len(logprobs)} numbers**, which add up to "
    f"{sum(probs.values()):.4f}. Most likely is `{spelled(ranked[0])}`.")

# %%
show(bars([Bar(f"the river is{spelled(t)}", probs[t]) for t in ranked[:8]], "probability of the next token",
          f"{len(likely)} of {VOCAB} tokens share {sum(probs[t] for t in likely):.1%} of the probability", WHERE))

# %% [markdown]
# ## What temperature does
#
# Scores `z` become probabilities by the *softmax*. Before that they are divided by a temperature `T`:
#
#     p(token) = exp(z / T) / sum over all tokens of exp(z / T)
#
# `T = 1` is what the model learned. A small `T` exaggerates differences until only the best token is left; a large one
# levels them. A log-probability is a score, too (shifted by a constant, which cancels), so we can compute this here.


# %%
def heated(temperature, scores=logprobs):
    """Probabilities at a temperature, from scores by token."""
    best = max(scores.values())  # subtracted so that exp() cannot overflow; it cancels in the fraction
    weights = {token: math.exp((score - best) / temperature) for token, score in scores.items()}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def draw_at(temperature):
    """The best eight tokens at this temperature."""
    now = heated(temperature)
    rest = 1 - sum(now[t] for t in ranked[:8])
    rows = [Bar(f"the river is{spelled(t)}", now[t]) for t in ranked[:8]]
    rows.append(Bar(f"any of the other {VOCAB - 8}", rest))
    return bars(rows, "probability", f"At temperature {temperature:g} the best token has {now[ranked[0]]:.0%}, "
                f"and {rest:.1%} goes to tokens outside the best eight", WHERE)


panel = knobs(draw_at, temperature=Slider(1.0, 0.1, 3.0, 0.1))

# %% [markdown]
# ## Formula against measurement
#
# Does the engine's sampler do what the formula says? We ask it 512 times for one token at `T = 1.5`. `n=512` means that
# one request branches into 512: they share the memory of the prompt, and each draws its own random number.

# %%
T, N = 1.5, 512
drawn = llm.generate([ids], SamplingParams(max_tokens=1, temperature=T, n=N))[0].outputs
counts = {}
for one in drawn:
    counts[one.token_ids[0]] = counts.get(one.token_ids[0], 0) + 1
expected = heated(T)
worst = max(abs(counts.get(t, 0) / N - expected[t]) for t in ranked[:8])
noise = math.sqrt(0.25 / N)  # standard deviation of a share of N coin tosses, at most

show(bars([Bar(f"the river is{spelled(t)}", counts.get(t, 0) / N, expected[t]) for t in ranked[:8]],
          "share of the samples (bar) and formula (stroke)",
          f"Of the best eight tokens, none is further than {worst:.1%} from the formula", f"{WHERE}. {N} samples, T = {T}"))
say(f"Counting {N} random draws is itself uncertain by up to {noise:.1%} (one standard deviation). The largest distance "
    f"among the eight is {worst / noise:.1f} of these; more than three would be a reason to look for a fault.")

# %% [markdown]
# ## One token after another
#
# A sentence is a loop: the chosen token is appended, and the longer list is read again. Below is a whole answer. Each
# box is one token, one step of the engine; the stronger its colour, the less sure the model was.


# %%
def written(prompt, **sampling):
    """An answer as tokens with their probabilities, and its text."""
    out = llm.generate([prompt], SamplingParams(max_tokens=128, logprobs=0, **sampling))[0].outputs[0]
    return [Token(spelled(t), math.exp(p.logprob)) for t, p in zip(out.token_ids, out.logprobs, strict=True)], out.text


slow, slow_text = written("<slow>37*46-23*58?", temperature=0.0)
unsure = [t for t in slow if t.probability < 0.9]
show(token_strip(slow, f"{len(slow)} tokens, {len(slow)} steps; at {len(unsure)} of them the model was less than 90% sure", WHERE))
say(f"It ends with {slow_text.rpartition('#')[2]}; in truth the sum is {37 * 46 - 23 * 58}. Look where the coloured boxes stand: "
    "which product comes first, which factor is split. Several ways are right there, so this doubt is a free choice. A "
    "coloured box inside a result would be another kind of doubt: a number that the model is not sure of.")

# %%
fast, fast_text = written("<fast>37*46-23*58?", temperature=0.0)
doubt = min(t.probability for t in fast)
show(token_strip(fast, f"Asked for a fast answer it is unsure in the middle of the digits: one token had only {doubt:.0%}", WHERE))
say(f"Now it says {fast_text.rpartition('#')[2]}. The probabilities knew: products of two-digit numbers cannot be recalled by "
    "so small a model, and at the hard digits it spreads its bets. Writing the steps out replaces recall by certainty.")

# %% [markdown]
# ## What the engine wrote down
#
# Every request leaves a trail. `run.why` cuts its life into stretches; you will use it in every lesson.

# %%
run = llm.run
last = list(run.requests)[-1]
show(run.why(last))

# %% [markdown]
# ## Exercise: top-p
#
# *Top-p* (nucleus) sampling keeps only the smallest set of most likely tokens whose probabilities add up to at least
# `p`, and draws among those. Write it: `probs` is a list, position = token id; return the ids that are kept. With equal
# probabilities the smaller id goes first. Run the cell after it until the box is green.


# %% exercise
def nucleus(probs, p):
    """The ids of the smallest set of most likely tokens whose probabilities add up to at least p."""
    return list(range(len(probs)))  # keeps everything: your turn


# %%
verdict = check("nucleus", nucleus)

# %% [markdown]
# ## Break it
#
# Sampling makes text lively. Does it help everywhere? Sixteen held-out sums, written in the slow style, at five
# temperatures; a program verifies every answer.

# %%
problems = tasks.tour_problems(seed=3, n=48)
sums = [p for p in problems if p.suite == "arith"][:16]
share = {}
for temperature in (0.0, 0.7, 1.0, 1.5, 2.0):
    outs = llm.generate([p.prompt for p in sums], SamplingParams(max_tokens=160, temperature=temperature, seed=1))
    share[temperature] = sum(tasks.verify(p, o.outputs[0].text) for p, o in zip(sums, outs, strict=True)) / len(sums)
hottest = max(share)
show(bars([Bar(f"T = {t:g}", s) for t, s in share.items()], "share of right answers",
          f"{share[0.0]:.0%} of the sums are right when greedy, {share[hottest]:.0%} at temperature {hottest:g}",
          f"{WHERE}. {len(sums)} held-out problems, one answer each"))

# %% [markdown]
# Heat ruins sums: most tokens have one right choice, and one wrong digit spoils all that follows. (Up to `T = 1` the bars
# differ by no more than chance does with sixteen problems.) But greed loses, too. Ask for a story, greedily and at `T = 1`,
# and count how many of its sentences are new:

# %%
for temperature in (0.0, 1.0):
    _, story = written("<chat>tell me about the river in detail?<ans>", temperature=temperature, seed=4)
    sentences = [s.strip() for s in story.split(".") if s.strip()]
    say(f"**T = {temperature:g}**: {len(set(sentences))} different sentences of {len(sentences)}. *{story}*")

# %% [markdown]
# ## What this does not show
#
# - `lab-s` is tiny and trained on three kinds of text. That small models know what they do not know is not a law.
# - Sixteen problems are few: at a true share of one half, chance alone moves the result by 12 points (one standard
#   deviation). The bars show a direction, not a curve.
# - How long all this took. That is the next lesson.
#
# ## Three questions
#
# <details><summary>1. Two requests with the same prompt and the same temperature get different answers. Is something
# broken?</summary>
#
# No. Each request draws its own random numbers. Give both the same `seed` and they agree, whatever else the engine is
# doing at that moment: llmlab keys random numbers by seed, request and position, not by the order of work.
# </details>
#
# <details><summary>2. Why is dividing log-probabilities by T as good as dividing the model's raw scores?</summary>
#
# They differ by one constant for all tokens (the logarithm of the sum). The softmax divides by the sum of all
# exponentials, and a factor that is common to numerator and denominator cancels.
# </details>
#
# <details><summary>3. The answer to the sum took one step per token. Could the model not write several tokens at once?
# </summary>
#
# Each token is part of the input of the next step, so a plain decoder cannot. Reading is different: all tokens of the
# prompt are known beforehand and pass through the model together. That difference shapes everything that follows.
# </details>
