# %% 01
def nucleus(probs, p):
    """The ids of the smallest set of most likely tokens whose probabilities add up to at least p."""
    kept, total = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        kept.append(token)
        total += probs[token]
        if total >= p:
            break
    return kept


# %% 02
def latencies(arrival, times):
    """(time to first token, mean time per output token after the first), in seconds."""
    tpot = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    return times[0] - arrival, tpot


# %% 03
def slot(table, block_size, position):
    """The place in the pool where the KV of the token at `position` lies."""
    return table[position // block_size] * block_size + position % block_size


# %% 04
def turning_batch(peak, bandwidth, bytes_per_weight):
    """Tokens in a step from which the arithmetic takes as long as fetching the weights."""
    return peak / bandwidth * bytes_per_weight / 2


# %% 05
class Considerate:
    """Decodes first; beside them at most `most` prompt tokens in a step."""

    def __init__(self, most=128):
        self.most = most

    def compose(self, view, offers):
        decodes, prompts = split(offers.running)
        limits = view.limits
        writing = fill(decodes, limits.max_num_batched_tokens, limits.max_num_seqs)
        room = limits.max_num_batched_tokens - len(writing)
        reading = min(room, self.most) if writing else room
        return [*writing, *fill([*prompts, *offers.waiting], reading, limits.max_num_seqs - len(writing))]


# %% 06
class Patient:
    """Shortest job first, but not for ever."""

    refresh = "arrival"  # the key is computed once, when a request enters the queue

    def key(self, request, now):
        return job_length(request) + 20 * request.arrival


# %% 07
class Fair:
    """Whoever was preempted least often; among equals, the last come."""

    def score(self, view, candidate, needy):
        return (candidate.num_preemptions, -candidate.arrival, -candidate.number)


# %% 08
def choose(g, h_rows, linear, attention, row, layers):
    """The mode with the highest throughput."""
    alone, twice = layers * (linear + attention), layers * (2 * linear + attention)
    rate = {"gpu_only": g / alone, "asym_pipeline": (g + min(h_rows, (2 * linear + attention) / row)) / twice,
            "async_overlap": g / alone + min(h_rows / ((layers + 1) * alone), 1 / (layers * row))}
    return max(rate, key=rate.get)
