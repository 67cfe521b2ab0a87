"""From logits to tokens. The meanings and their order are vLLM's:

    raw logits ─┬─> log-probabilities, as reported
                └─> min_tokens, logit_bias ─> penalties ─┬─> greedy: the largest, lowest id first
                                                         └─> temperature ─> min_p ─> top_k ─> top_p ─> draw

A row's token depends on that row alone, bit for bit, whatever else is in the batch. Float sums cannot
promise this: `softmax`, `cumsum` and `sum` may add in another order when the shape of the batch, the
alignment of a row or the number of threads changes. So probabilities become integer weights, whose sums
are exact in any order. What is left is exact (max, comparisons, sorts, IEEE + - * /) or, for `exp` alone,
one rounding per element; a test holds `exp` to it. Ties are ordered by token id, never by a sort's whim.

On the CPU, numpy's argmax, partition and sort are 5 to 10 times as fast as torch's; they see the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmlab import rng
from llmlab.types import RequestError, SamplingParams, TokenLogprobs

# Most draws fall into the most likely tokens, so only these are sorted; the rest only when a draw needs it.
HEAD = 128
# Elements of logits that `prompt_logprobs` looks at together: bounds its scratch memory to some 100 MB.
CHUNK = 1 << 22


class SampleRow(NamedTuple):
    """What the sampler must know about one row of logits.

    `position` is the index of the token to be sampled. `seed` and `request` key the random numbers:
    rows with the same (seed, request, position) and the same logits get the same token.
    """

    sampling: SamplingParams
    seed: int
    request: str
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: tuple[int, ...] = ()


class Sampled(NamedTuple):
    """The token of one row, or token_id = -1 and the `error` that kept the row from having one."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token per row of `logits` [n, vocab] float32, which stays as it is.

    A row that cannot be sampled comes back with its `error`; the others do not notice.
    Raises ValueError if `logits` is not two-dimensional with one row per entry of `rows`.
    """
    if logits.dim() != 2 or len(logits) != len(rows):
        raise ValueError(f"logits of shape {list(logits.shape)} for {len(rows)} rows: give one row of logits each")
    if not rows:
        return []
    logits = logits.detach().float()
    tokens = _argmax(logits)
    if all(map(_plain, rows)) and min(tokens) >= 0:
        return [Sampled(token) for token in tokens]
    errors = _refusals(logits, tokens, rows)
    chosen = [i for i, row in enumerate(rows) if i not in errors and not _takes_argmax(row)]
    if chosen:
        for i, token in zip(chosen, _choose(logits[chosen], [rows[i] for i in chosen])):
            tokens[i] = token
            if token < 0:
                errors[i] = _name(rows[i]) + "logit_bias, min_tokens and penalties leave no finite largest logit"
    logprobs = _reported(logits, tokens, rows, errors)
    return [Sampled(-1, None, errors[i]) if i in errors else Sampled(token, logprobs.get(i))
            for i, token in enumerate(tokens)]


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability and rank of each `next_token_ids` [n] under `logits` [n, vocab] float32, one per row.

    Row i holds the logits after prompt token i; `num_top` most likely tokens are listed beside each.
    Raises RequestError for a token outside the vocabulary and for logits that are no distribution.
    """
    if logits.dim() != 2 or len(logits) != len(next_token_ids):
        raise ValueError(f"logits of shape {list(logits.shape)} for {len(next_token_ids)} tokens: "
                         "give one row of logits each")
    vocab, found = logits.shape[1], []
    for token in next_token_ids:
        if not 0 <= token < vocab:
            raise _outside("prompt_token_ids", token, vocab)
    step = max(1, CHUNK // max(1, vocab))
    for start in range(0, len(logits), step):
        part, tokens = logits[start : start + step].detach().float(), list(next_token_ids[start : start + step])
        for i, best in enumerate(_argmax(part)):
            if best < 0:
                raise RequestError("prompt_logprobs", num_top, f"row {start + i}: {_ailment(part[i])}",
                                   "Check the model's weights and dtype, or leave prompt_logprobs out.")
        found += _logprobs(part, tokens, [num_top] * len(tokens))
    return found


# ------------------------------------------------------------------------------- what a row asks for
def _edited(row: SampleRow) -> bool:
    """Whether the row's logits change before the choice."""
    s = row.sampling
    return bool(s.logit_bias) or s.has_penalties or s.min_tokens > len(row.output_token_ids)


def _takes_argmax(row: SampleRow) -> bool:
    return row.sampling.temperature == 0.0 and not _edited(row)


def _plain(row: SampleRow) -> bool:
    return row.sampling.temperature == 0.0 and row.sampling.logprobs is None and not _edited(row)


# ------------------------------------------------------------------------------------------- errors
def _refusals(logits: Tensor, best: list[int], rows: Sequence[SampleRow]) -> dict[int, str]:
    """Row -> why it cannot be sampled: its logits are no distribution, or its bias names no token."""
    errors, vocab = {}, logits.shape[1]
    for i, row in enumerate(rows):
        stray = next((t for t in row.sampling.logit_bias or () if t >= vocab), None)
        if best[i] < 0:
            errors[i] = _name(row) + _ailment(logits[i])
        elif stray is not None:
            errors[i] = _name(row) + str(_outside("logit_bias", stray, vocab))
    return errors


def _name(row: SampleRow) -> str:
    return f"request {row.request!r}, position {row.position}: "


def _ailment(logits: Tensor) -> str:
    if logits.isnan().any():
        return f"{int(logits.isnan().sum())} of {len(logits)} logits are NaN"
    return "a logit is +inf" if len(logits) and logits.max() > 0 else "every logit is -inf"


def _outside(field: str, token: int, vocab: int) -> RequestError:
    return RequestError(field, token, f"is outside the vocabulary of {vocab} tokens", f"Use ids in [0, {vocab - 1}].")


# ---------------------------------------------------------------------------------- logits before the choice
def _choose(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    """Tokens of the rows that take more than an argmax; `logits` [m, vocab] is scratch. -1: none is left."""
    if any(map(_edited, rows)):
        _forbid_stops(logits, rows)
        _add_bias(logits, rows)
        _penalise(logits, rows)
    tokens = _argmax(logits)
    drawn = [i for i, row in enumerate(rows) if tokens[i] >= 0 and row.sampling.temperature > 0.0]
    if drawn:
        part = logits if len(drawn) == len(rows) else logits[drawn]
        for i, token in zip(drawn, _draw(part, [rows[i] for i in drawn])):
            tokens[i] = token
    return tokens


def _cells(tokens: Sequence[Collection[int]], vocab: int) -> np.ndarray:
    """Positions in the flat [rows, vocab] logits of the tokens of each row, without ids that are in no vocabulary."""
    lengths = [len(ids) for ids in tokens]
    flat = np.fromiter(chain.from_iterable(tokens), np.int64, sum(lengths))
    rows = np.repeat(np.arange(len(tokens)), lengths)
    return (rows * vocab + flat)[(flat >= 0) & (flat < vocab)]


def _forbid_stops(logits: Tensor, rows: list[SampleRow]) -> None:
    """No end-of-sequence and no stop token before `min_tokens` outputs, with or without `ignore_eos`."""
    vocab = logits.shape[1]
    cells = _cells([[t for t in (*row.eos_token_ids, *row.sampling.stop_token_ids) if t < vocab]
                    if row.sampling.min_tokens > len(row.output_token_ids) else () for row in rows], vocab)
    logits.view(-1)[torch.from_numpy(cells).to(logits.device)] = -math.inf


def _add_bias(logits: Tensor, rows: list[SampleRow]) -> None:
    biases = [row.sampling.logit_bias or {} for row in rows]
    added = np.fromiter(chain.from_iterable(bias.values() for bias in biases), np.float64)
    _update(logits, _cells(biases, logits.shape[1]), added, torch.add)


def _penalise(logits: Tensor, rows: list[SampleRow]) -> None:
    """Repetition divides positive and multiplies other logits of tokens in prompt or output; frequency and
    presence are subtracted, per occurrence and once, for tokens in the output."""
    vocab = logits.shape[1]
    repetition, frequency, presence = np.array([(row.sampling.repetition_penalty, row.sampling.frequency_penalty,
                                                 row.sampling.presence_penalty) for row in rows]).T
    seen = np.unique(_cells([(*row.prompt_token_ids, *row.output_token_ids) if penalty != 1.0 else ()
                             for row, penalty in zip(rows, repetition)], vocab))
    _update(logits, seen, repetition[seen // vocab], _repel)
    counted = (frequency != 0.0) | (presence != 0.0)
    cells, counts = np.unique(_cells([row.output_token_ids if on else () for row, on in zip(rows, counted)], vocab),
                              return_counts=True)
    at = cells // vocab
    _update(logits, cells, counts * frequency[at] + presence[at], torch.sub)


def _repel(logits: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def _update(logits: Tensor, cells: np.ndarray, operand: np.ndarray, op: Callable[[Tensor, Tensor], Tensor]) -> None:
    """logits[cells] = op(logits[cells], operand), for distinct `cells` of the flat logits."""
    if len(cells):
        flat, at = logits.view(-1), torch.from_numpy(cells).to(logits.device)
        flat[at] = op(flat[at], torch.from_numpy(operand).to(logits))


# ---------------------------------------------------------------------------------------- the draw
class _Controls(NamedTuple):
    """Per row [m, 1] float64; top_k <= 0 and top_p = 1 switch the filter off; u in [0, 1) is the draw."""

    temperature: Tensor
    min_p: Tensor
    top_k: Tensor
    top_p: Tensor
    u: Tensor


def _controls(rows: list[SampleRow], device: torch.device) -> Tensor:
    """[m, 5]: the columns of `_Controls`, sent to the device in one copy."""
    return torch.tensor([(row.sampling.temperature, row.sampling.min_p, row.sampling.top_k, row.sampling.top_p,
                          rng.uniform(row.seed, row.request, row.position))
                         for row in rows], dtype=torch.float64).to(device)


def _draw(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    """Tokens [m] by inverse CDF over the filtered distribution, most likely token first."""
    table = _controls(rows, logits.device)
    weights = _weights(logits, table[:, :1], table[:, 1:2] if any(row.sampling.min_p for row in rows) else None)
    tokens = _invert(logits, weights, table, HEAD)
    rest = [i for i, token in enumerate(tokens) if token < 0]
    if rest:
        for i, token in zip(rest, _invert(logits[rest], weights[rest], table[rest], logits.shape[1])):
            tokens[i] = token
    return tokens


def _scale_bits(vocab: int) -> int:
    """The weight of the most likely token is 2**this: as large as a sum over the vocabulary in int64 allows."""
    return 62 - vocab.bit_length()


def _weights(logits: Tensor, temperature: Tensor, min_p: Tensor | None = None) -> Tensor:
    """Probabilities up to a factor, [m, vocab] int64: floor(2**bits * exp((logit - max) / temperature)).

    Zero where the ratio to the most likely token is below `min_p` [m, 1], or too small to count: 2**-43
    in the largest vocabularies. `temperature` [m, 1] is kept within what a float32 can divide by.
    """
    limits = torch.finfo(torch.float32)
    ratios = logits - logits.amax(-1, keepdim=True)
    ratios = ratios.div_(temperature.clamp(limits.tiny, limits.max).float()).exp_()
    if min_p is not None:
        ratios.mul_(ratios >= min_p)
    return ratios.mul_(2.0 ** _scale_bits(logits.shape[1])).long()


def _invert(logits: Tensor, weights: Tensor, table: Tensor, width: int) -> list[int]:
    """The drawn token of each row, from its `width` largest logits; -1 where they do not decide it.

        weight |####                 ids ordered by (logit descending, id): every filter keeps a prefix
               |########             r = u * (weight kept)
               |####|############    the token is the first whose weight up to and including it exceeds r
    """
    c = _Controls(*table.T.unsqueeze(-1).unbind())
    ids = _ordered(logits, width)
    values, part = logits.gather(1, ids), weights.gather(1, ids)
    # Tokens tied with the last one may have been cut off, so the order is known only above its value.
    known = values > values[:, -1:] if width < logits.shape[1] else torch.ones_like(values, dtype=torch.bool)
    upto, total = part.cumsum(1), weights.sum(1, keepdim=True)
    kept, decided = _kept(c, values, part, upto, known, total)
    r = torch.minimum((c.u * kept).long(), kept - 1)
    decided &= r < (part * known).sum(1, keepdim=True)
    token = ids.gather(1, (upto <= r).sum(1, keepdim=True).clamp(max=ids.shape[1] - 1))
    return torch.where(decided, token, -1).flatten().tolist()


def _kept(c: _Controls, values: Tensor, part: Tensor, upto: Tensor, known: Tensor,
          total: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [m, 1] that top_k and then top_p keep, and whether the `known` tokens suffice to tell."""
    last = (c.top_k.clamp(1, values.shape[1]) - 1).long()
    some_k = c.top_k > 0
    in_k = (values >= values.gather(1, last)) | ~some_k  # as in vLLM, ties with the k-th stay
    mass = torch.where(some_k, (part * in_k).sum(1, keepdim=True), total)
    told = ~some_k | ((c.top_k <= last + 1) & known.gather(1, last)) | known.all(1, keepdim=True)
    some_p = c.top_p < 1
    limit = c.top_p * mass
    nucleus = (part * in_k * (upto - part < limit)).sum(1, keepdim=True)
    told &= ~some_p | (limit <= (part * known).sum(1, keepdim=True))
    return torch.where(some_p, nucleus, mass), told


# ------------------------------------------------------------------------------- log-probabilities
def _reported(logits: Tensor, tokens: list[int], rows: Sequence[SampleRow],
              errors: dict[int, str]) -> dict[int, TokenLogprobs]:
    """Row -> what it reports of the raw logits, for the rows that ask."""
    counts = {i: row.sampling.logprobs for i, row in enumerate(rows)
              if row.sampling.logprobs is not None and i not in errors}
    if not counts:
        return {}
    asked = list(counts)
    return dict(zip(asked, _logprobs(logits[asked], [tokens[i] for i in asked], list(counts.values()))))


def _logprobs(logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """Of `tokens` [m] under `logits` [m, vocab], with the `counts[i]` most likely tokens of row i.

    Ranks start at 1 and count in the order of the list: by probability, then by id.
    """
    vocab = logits.shape[1]
    one = torch.ones((1, 1), dtype=torch.float64, device=logits.device)
    total = _weights(logits, one).sum(1, keepdim=True).double()
    log_z = logits.amax(1, keepdim=True).double() + total.log() - _scale_bits(vocab) * math.log(2.0)
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    value = logits.gather(1, chosen)
    earlier = (logits == value) & (torch.arange(vocab, device=logits.device) < chosen)
    ranks = (1 + ((logits > value) | earlier).sum(1)).tolist()
    logprobs = (value.double() - log_z).flatten().tolist()
    ids = _leading(logits, min(max(counts), vocab))
    tops = (logits.gather(1, ids).double() - log_z).tolist()
    return [TokenLogprobs(logprob, rank, tuple(zip(top_ids[:n], top[:n])))
            for logprob, rank, top_ids, top, n in zip(logprobs, ranks, ids.tolist(), tops, counts)]


def _leading(logits: Tensor, k: int) -> Tensor:
    """The ids [m, k] of the k largest logits by (logit descending, id), ties at the edge resolved too."""
    if k == 0:
        return torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
    ids = _ordered(logits, k + 1)
    edge = logits.gather(1, ids)[:, k - 1 : k + 1]
    if k < logits.shape[1] and bool((edge[:, 0] == edge[:, 1]).any()):
        ids = _ordered(logits, logits.shape[1])
    return ids[:, :k]


# ----------------------------------------------------------- argmax, partition, sort: exact on any device
def _argmax(logits: Tensor) -> list[int]:
    """The lowest id of the largest logit per row; -1 where that is not finite, as with any NaN in the row."""
    if logits.shape[1] == 0:
        return [-1] * len(logits)
    if not _numpy_reads(logits):
        values, ids = logits.max(-1)
        return torch.where(values.isfinite(), ids, -1).tolist()
    view = logits.numpy()
    best = view.argmax(-1)
    best[~np.isfinite(view[np.arange(len(view)), best])] = -1
    return best.tolist()  # type: ignore[no-any-return]


def _ordered(logits: Tensor, width: int) -> Tensor:
    """The ids [m, width] of the largest logits, by (logit descending, id); of ties at the edge, any."""
    if width >= logits.shape[1]:
        ids = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    elif _numpy_reads(logits):
        ids = torch.from_numpy(np.argpartition(logits.numpy(), -width, axis=-1)[:, -width:])
    else:
        ids = logits.topk(width, sorted=False).indices
    keys = _keys(logits.gather(1, ids), ids)
    keys = torch.from_numpy(np.sort(keys.numpy())) if _numpy_reads(keys) else keys.sort(-1).values
    return keys & 0xFFFFFFFF


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Distinct int64 that sort by (value descending, id ascending). A float32's bits, read as an integer,
    grow with its magnitude: flip those of negative numbers, negate, and put the id below."""
    raw = (values + 0.0).view(torch.int32).long()  # + 0.0: -0.0 and 0.0 tie, so give them the same bits
    return (~(raw ^ ((raw >> 31) & 0x7FFFFFFF)) << 32) | ids


def _numpy_reads(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
