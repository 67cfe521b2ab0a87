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
