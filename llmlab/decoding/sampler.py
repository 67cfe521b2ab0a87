"""From logits to tokens. The meanings and their order are vLLM's:

    raw logits ─┬─> log-probabilities, as reported
                └─> min_tokens, logit_bias ─> penalties ─┬─> greedy: the largest, lowest id first
                                                         └─> temperature ─> min_p ─> top_k ─> top_p ─> draw

A row's token depends on that row alone, bit for bit, whatever else is in the batch. Float sums cannot
promise this: `softmax`, `cumsum` and `sum` may add in another order when the shape of the batch, the
alignment of a row or the number of threads changes. So probabilities become integer weights, whose sums
are exact in any order. What is left is exact (max, comparisons, sorts, IEEE + - * /) or, for `exp` alone,
one rounding per element; a test holds `exp` to it. Ties are ordered by token id, never by a sort's whim.

On the CPU, numpy's argmax, partition and sort take a tenth, a quarter and a twentieth of torch's time (one
thread of an AVX-512 machine, 32 x 8192); they read the same memory.
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
from llmlab.types import Request, RequestError, SamplingParams, TokenLogprobs

# Most draws fall into the most likely tokens, so only these are sorted; more, then all, when a draw needs them.
HEADS = (128, 2048)
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


def sample_row(request: Request, seed: int, token_ids: Sequence[int], drafts: Sequence[int] = ()) -> SampleRow:
    """The row that samples behind `token_ids` and `drafts` of a request. Its own seed, if it has one, keys the random
    numbers by the number of the answer, else the engine's `seed` by the request's id."""
    sampling = request.sampling
    seeded = sampling.seed is not None
    history: Sequence[int] = ()
    if sampling.has_penalties or sampling.min_tokens > 0:
        history = (*token_ids[request.num_prompt_tokens :], *drafts)
    return SampleRow(
        sampling, sampling.seed if sampling.seed is not None else seed,
        f"#{request.metadata.get('sample', 0)}" if seeded else request.id, len(token_ids) + len(drafts),
        request.prompt_token_ids, history, request.eos_token_ids,
    )  # fmt: skip


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


def plain(sampling: SamplingParams) -> bool:
    """Whether a row with these parameters takes the largest logit and reports nothing, at every position."""
    return (sampling.temperature == 0.0 and sampling.logprobs is None and sampling.min_tokens == 0
            and not sampling.logit_bias and not sampling.has_penalties)


def greedy(logits: Tensor) -> list[int]:
    """The tokens of plain rows [n, vocab] float32; -1 where `sample` would say what is wrong."""
    return _argmax(logits.detach().float())


def probabilities(logits: Tensor, rows: Sequence[SampleRow]) -> np.ndarray:
    """What `sample` draws from: [n, vocab] float64, for `logits` [n, vocab] float32. Edits and filters included; all of it on one
    token where a row is greedy; a row that has no finite largest logit is all 0. Sorts whole rows that have top_k or top_p."""
    logits = logits.detach().float().clone()
    _edit(logits, list(rows))
    best = _argmax(logits)
    found = np.zeros(logits.shape)
    found[np.arange(len(rows)), best] = 1.0
    found[np.array(best) < 0] = 0.0
    drawn = [i for i, row in enumerate(rows) if best[i] >= 0 and row.sampling.temperature > 0.0]
    if drawn:
        found[drawn] = _shares(logits[drawn], _table([rows[i] for i in drawn]))
    return found


def scored(logits: Tensor, token: int, row: SampleRow) -> Sampled:
    """`token` as the choice of a row [1, vocab], with the log-probabilities that the row asks for."""
    return Sampled(token, _reported(logits.detach().float(), [token], [row], {}).get(0))


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
    _edit(logits, rows)
    tokens = _argmax(logits)
    drawn = [i for i, row in enumerate(rows) if tokens[i] >= 0 and row.sampling.temperature > 0.0]
    if drawn:
        part = logits if len(drawn) == len(rows) else logits[drawn]
        for i, token in zip(drawn, _draw(part, [rows[i] for i in drawn])):
            tokens[i] = token
    return tokens


def _edit(logits: Tensor, rows: list[SampleRow]) -> None:
    if any(map(_edited, rows)):
        _forbid_stops(logits, rows)
        _add_bias(logits, rows)
        _penalise(logits, rows)


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

    temperature: np.ndarray
    min_p: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    u: np.ndarray


class _Ranked(NamedTuple):
    """The largest logits of each row by (logit descending, id): all [m, width], in host memory.

    Of tokens tied with the last, some may be missing: `known` marks those whose rank is certain.
    """

    ids: np.ndarray
    values: np.ndarray
    known: np.ndarray


def _draw(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    """Tokens [m] by inverse CDF over the filtered distribution, most likely token first."""
    table = _table(rows)
    weights = _weights(logits, table[:, :1], table[:, 1:2])
    total, tokens = weights.sum(1, keepdim=True).cpu().numpy(), np.full(len(rows), -1)
    for width in (*HEADS, logits.shape[1]):
        if len(rest := np.flatnonzero(tokens < 0)) == 0:
            break
        at = slice(None) if len(rest) == len(rows) else torch.from_numpy(rest).to(logits.device)
        ranked = _ranked(logits[at], width)
        part = weights[at].gather(1, torch.from_numpy(ranked.ids).to(logits.device)).cpu().numpy()
        tokens[rest] = _invert(_Controls(*np.split(table[rest], 5, axis=1)), ranked, part, total[rest])
    return tokens.tolist()


def _table(rows: Sequence[SampleRow]) -> np.ndarray:
    """The columns of `_Controls`, [m, 5]."""
    table: np.ndarray = np.array([(row.sampling.temperature, row.sampling.min_p, row.sampling.top_k, row.sampling.top_p,
                                   rng.uniform(row.seed, row.request, row.position)) for row in rows])  # fmt: skip
    return table


def _shares(logits: Tensor, table: np.ndarray) -> np.ndarray:
    """The probability of each token [m, vocab] under the controls of `table`, whose draw counts for nothing."""
    weights = _weights(logits, table[:, :1], table[:, 1:2])
    c = _Controls(*np.split(table, 5, axis=1))
    if not ((c.top_k > 0) | (c.top_p < 1)).any():
        every: np.ndarray = weights.cpu().numpy().astype(np.float64)
        every /= every.sum(1, keepdims=True)
        return every
    ranked = _ranked(logits, logits.shape[1])
    part = weights.gather(1, torch.from_numpy(ranked.ids).to(logits.device)).cpu().numpy()
    upto, total = part.cumsum(1), part.sum(1, keepdims=True)
    kept, _ = _kept(c, ranked, part, upto - part, total, total)
    found = np.zeros(logits.shape)
    np.put_along_axis(found, ranked.ids, np.where(upto - part < kept, part, 0) / kept, 1)  # every filter keeps a prefix
    return found


def _scale_bits(vocab: int) -> int:
    """The weight of the most likely token is 2**this: as large as a sum over the vocabulary in int64 allows."""
    return 62 - vocab.bit_length()


def _weights(logits: Tensor, temperature: np.ndarray, min_p: np.ndarray) -> Tensor:
    """Probabilities up to a factor, [m, vocab] int64: floor(2**bits * exp((logit - max) / temperature)).

    Zero where the ratio to the most likely token is below `min_p` [m, 1], or too small to count: 2**-43
    in the largest vocabularies. `temperature` [m, 1] is kept within what a float32 can divide by.
    """
    limits = np.finfo(np.float32)
    divisor = torch.from_numpy(temperature.clip(limits.tiny, limits.max).astype(np.float32)).to(logits.device)
    ratios = (logits - logits.amax(-1, keepdim=True)).div_(divisor).exp_()
    if min_p.any():
        ratios.mul_(ratios >= torch.from_numpy(min_p).to(logits.device))
    return ratios.mul_(2.0 ** _scale_bits(logits.shape[1])).long()


def _invert(c: _Controls, ranked: _Ranked, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    """The drawn tokens [m], from the `weights` of the ranked ones and the `total` [m, 1] of all;
    -1 where the ranked ones do not decide it.

        weight |####                 in this order every filter keeps a prefix
               |########             r = u * (weight kept)
               |####|############    the token is the first whose weight up to and including it exceeds r
    """
    upto = weights.cumsum(1)
    reach = (weights * ranked.known).sum(1, keepdims=True)
    kept, decided = _kept(c, ranked, weights, upto - weights, total, reach)
    r = np.minimum((c.u * kept).astype(np.int64), kept - 1)
    place = np.minimum((upto <= r).sum(1), weights.shape[1] - 1)
    return np.where((decided & (r < reach))[:, 0], ranked.ids[np.arange(len(place)), place], -1)


def _kept(c: _Controls, ranked: _Ranked, weights: np.ndarray, before: np.ndarray, total: np.ndarray,
          reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight [m, 1] that top_k and then top_p keep, and whether the ranked tokens suffice to tell."""
    mass, told = total, np.ones_like(total, dtype=bool)
    if (some := c.top_k > 0).any():
        row, last = np.arange(len(total))[:, None], (c.top_k.clip(1, weights.shape[1]) - 1).astype(np.int64)
        inside = ranked.values >= ranked.values[row, last]  # as in vLLM, ties with the k-th stay
        mass = np.where(some, (weights * inside).sum(1, keepdims=True), total)
        told = ~some | ranked.known[row, last]
    if (some := c.top_p < 1).any():
        limit = c.top_p * mass
        told &= ~some | (limit <= reach)
        mass = np.where(some, (weights * (before < limit)).sum(1, keepdims=True), mass)
    return mass, told


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
    total = _weights(logits, np.ones((1, 1)), np.zeros((1, 1))).sum(1, keepdim=True).double()
    log_z = logits.amax(1, keepdim=True).double() + total.log() - _scale_bits(vocab) * math.log(2.0)
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    value = logits.gather(1, chosen)
    earlier = (logits == value) & (torch.arange(vocab, device=logits.device) < chosen)
    ranks = (1 + ((logits > value) | earlier).sum(1)).tolist()
    logprobs = (value.double() - log_z).flatten().tolist()
    best = _leading(logits, min(max(counts), vocab))
    tops = (best.values - log_z.cpu().numpy()).tolist()
    return [TokenLogprobs(logprob, rank, tuple(zip(ids[:n], top[:n])))
            for logprob, rank, ids, top, n in zip(logprobs, ranks, best.ids.tolist(), tops, counts)]


def _leading(logits: Tensor, k: int) -> _Ranked:
    """At least the k largest logits by (logit descending, id); nothing is missing among the first k."""
    ranked = _ranked(logits, k + 1)
    return ranked if k == 0 or ranked.known[:, k - 1].all() else _ranked(logits, logits.shape[1])


# ------------------------------------------------------------------- argmax and ranking: exact on any device
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


def _ranked(logits: Tensor, width: int) -> _Ranked:
    """At least the `width` largest logits of each row, in order."""
    vocab = logits.shape[1]
    if width > vocab // 8:  # to sort all costs no more than to find which
        values = logits.cpu().numpy()
        ids = np.broadcast_to(np.arange(vocab), values.shape)
    elif _numpy_reads(logits):
        ids = np.argpartition(logits.numpy(), -width, axis=-1)[:, -width:]
        values = logits.numpy()[np.arange(len(ids))[:, None], ids]
    else:
        values, ids = (part.cpu().numpy() for part in logits.topk(width, sorted=False))
    ids, values = _sorted(values, ids)
    return _Ranked(ids, values, (values > values[:, -1:]) | (ids.shape[1] == vocab))


def _sorted(values: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values [m, width] by (value descending, id ascending), with -0.0 as 0.0.

    One sort of distinct int64: above the value, below the id. The bits of a positive float32 grow with it
    when read as an integer, those of a negative one shrink: so its lower 31 are flipped, there and back.
    """
    bits = (values + np.float32(0.0)).view(np.int32)  # -0.0 + 0.0 is 0.0: equal values need equal bits
    keys = np.sort((~_flipped(bits)).astype(np.int64) << 32 | ids)
    return keys & 0xFFFFFFFF, _flipped((~(keys >> 32)).astype(np.int32)).view(np.float32)


def _flipped(bits: np.ndarray) -> np.ndarray:
    flipped: np.ndarray = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return flipped


def _numpy_reads(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
