"""The sampler against transformers' logits processors, plain numpy and exact distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from llmlab import rng
from llmlab.decoding import sampler
from llmlab.decoding.sampler import Sampled, SampleRow, prompt_logprobs, sample
from llmlab.types import RequestError, SamplingParams, TokenLogprobs

GREEDY = SamplingParams(temperature=0.0)


def row(params: SamplingParams = GREEDY, position: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (),
        eos: tuple[int, ...] = (), seed: int = 0, request: str = "r") -> SampleRow:
    return SampleRow(params, seed, request, position, prompt, output, eos)


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(found: list[Sampled]) -> list[int]:
    assert all(s.error is None for s in found), found
    return [s.token_id for s in found]


# ------------------------------------------------------------------------------------------ the oracle
def processed(logits: torch.Tensor, r: SampleRow) -> torch.Tensor:
    """[vocab] before temperature, from transformers and plain loops."""
    s, scores = r.sampling, logits.clone()
    stops = [t for t in {*r.eos_token_ids, *s.stop_token_ids} if t < len(logits)]
    ids = torch.tensor([[*r.prompt_token_ids, *r.output_token_ids]], dtype=torch.int64)
    if stops and s.min_tokens:
        least = hf.MinNewTokensLengthLogitsProcessor(len(r.prompt_token_ids), s.min_tokens, stops)
        scores = least(ids, scores[None])[0]
    for token, bias in (s.logit_bias or {}).items():
        scores[token] += bias
    if s.repetition_penalty != 1.0 and ids.numel():
        scores = hf.RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty))(ids, scores[None])[0]
    for token in r.output_token_ids:
        scores[token] -= s.frequency_penalty
    for token in set(r.output_token_ids):
        scores[token] -= s.presence_penalty
    return scores


def distribution(logits: torch.Tensor, r: SampleRow) -> np.ndarray:
    """The exact probabilities [vocab] float64 that the row is to be drawn from."""
    s, ids = r.sampling, torch.zeros((1, 1), dtype=torch.int64)
    steps = LogitsProcessorList([hf.TemperatureLogitsWarper(float(s.temperature))])
    if s.min_p:
        steps.append(hf.MinPLogitsWarper(float(s.min_p)))
    if s.top_k > 0:
        steps.append(hf.TopKLogitsWarper(s.top_k))
    if s.top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(float(s.top_p)))
    return torch.softmax(steps(ids, processed(logits, r)[None].double())[0], -1).numpy()


def check_inverse_cdf(logits: torch.Tensor, rows: list[SampleRow]) -> int:
    """Each token is where u falls in the descending distribution; returns how many draws were compared."""
    compared = 0
    for line, r, token in zip(logits, rows, tokens(sample(logits, rows))):
        p = distribution(line, r)
        order = np.argsort(-processed(line, r).numpy(), kind="stable")
        upto = np.cumsum(p[order])
        u = rng.uniform(r.seed, r.request, r.position)
        assert p[token] > 0, f"{r.sampling}: token {token} was filtered out"
        if np.abs(upto - u).min() > 1e-5:  # float32 logits: the border itself may round either way
            assert token == order[np.searchsorted(upto, u, side="right")], r.sampling
            compared += 1
    return compared


FILTERS: dict[str, dict[str, Any]] = {
    "none": {}, "cold": {"temperature": 0.3}, "hot": {"temperature": 2.5}, "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 7}, "top_k above the head": {"top_k": 300, "temperature": 3.0}, "top_k off": {"top_k": -1},
    "top_k above the vocabulary": {"top_k": 10**12}, "top_p": {"top_p": 0.8}, "small top_p": {"top_p": 1e-9},
    "wide top_p": {"top_p": 0.99, "temperature": 4.0}, "top_k then top_p": {"top_k": 20, "top_p": 0.6},
    "all": {"temperature": 1.3, "min_p": 0.01, "top_k": 40, "top_p": 0.9}, "min_p 1": {"min_p": 1.0},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": -0.7},
    "bias": {"logit_bias": {3: 4.0, 0: -100, 11: 2.5}, "top_k": 5},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (3, 10**15), "top_p": 0.7},
}


@pytest.mark.parametrize("vocab", [12, 50, 129, 700])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_follow_the_oracle(name: str, vocab: int) -> None:
    n = 60
    params, outputs = SamplingParams(max_tokens=None, **FILTERS[name]), [1, 2, 2, 5, 7, 7, 7, 11]
    rows = [row(params, i, prompt=(1, 4, 6), output=outputs, eos=(0, 5)) for i in range(n)]
    logits = normal(n, vocab, seed=vocab)
    before = logits.clone()
    assert check_inverse_cdf(logits, rows) > 0.9 * n
    assert torch.equal(logits, before), "the caller's logits were changed"


@st.composite
def sampling(draw: st.DrawFn, vocab: int, temperature: float | None = None) -> SamplingParams:
    def maybe(off: Any, values: st.SearchStrategy[Any]) -> Any:
        return draw(st.just(off) | values)

    return SamplingParams(
        max_tokens=None, temperature=draw(st.floats(0.2, 4.0)) if temperature is None else temperature,
        top_p=maybe(1.0, st.floats(0.05, 0.99)), top_k=maybe(0, st.integers(1, 2 * vocab)),
        min_p=maybe(0.0, st.floats(0.001, 0.9)), min_tokens=maybe(0, st.integers(1, 6)),
        stop_token_ids=draw(st.lists(st.integers(0, vocab), max_size=2)),
        repetition_penalty=maybe(1.0, st.floats(0.5, 2.0)), frequency_penalty=maybe(0.0, st.floats(-2, 2)),
        presence_penalty=maybe(0.0, st.floats(-2, 2)), logprobs=maybe(None, st.integers(0, 5)),
        logit_bias=maybe(None, st.dictionaries(st.integers(0, vocab - 1), st.floats(-5, 5), max_size=3)))


@st.composite
def sample_rows(draw: st.DrawFn, vocab: int, temperature: float | None = None) -> SampleRow:
    ids = st.lists(st.integers(0, vocab - 1), max_size=8)
    return row(draw(sampling(vocab, temperature)), draw(st.integers(0, 10**6)), draw(ids), draw(ids),
               tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=2))), draw(st.integers(0, 9)),
               draw(st.sampled_from(["a", "b"])))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([20, 300]))
def test_any_mixture_follows_the_oracle(data: st.DataObject, vocab: int) -> None:
    rows = data.draw(st.lists(sample_rows(vocab), min_size=1, max_size=6))
    check_inverse_cdf(normal(len(rows), vocab, seed=data.draw(st.integers(0, 99)), scale=1.5), rows)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_greedy_is_the_largest_processed_logit(data: st.DataObject) -> None:
    vocab = 20
    rows = data.draw(st.lists(sample_rows(vocab, temperature=0.0), min_size=1, max_size=6))
    logits = normal(len(rows), vocab, seed=data.draw(st.integers(0, 99)))
    for line, r, token in zip(logits, rows, tokens(sample(logits, rows))):
        scores = processed(line, r)
        assert scores[token] >= scores.max() - 1e-5


# -------------------------------------------------------------------------------- exact distributions
@pytest.mark.parametrize(("params", "draws", "vocab", "quantile"), [
    # quantile: 0.999 of chi-square with (kept - 1) degrees of freedom
    (SamplingParams(temperature=0.8), 50_000, 8, 24.32),
    (SamplingParams(temperature=1.5, top_k=5), 50_000, 8, 18.47),
    (SamplingParams(temperature=1.2, min_p=0.05, top_p=0.95, repetition_penalty=1.3), 50_000, 8, None),
    (SamplingParams(temperature=5.0), 20_000, 260, None),  # flat: half of the draws lie outside the sorted head
])
def test_frequencies_match(params: SamplingParams, draws: int, vocab: int, quantile: float | None) -> None:
    line = normal(vocab, seed=vocab, scale=1.5)
    rows = [row(params, position, prompt=(1, 2)) for position in range(draws)]
    counts = np.bincount(tokens(sample(line.expand(draws, vocab), rows)), minlength=vocab)
    p = distribution(line, rows[0])
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    freedom = kept.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert quantile is None or abs(limit - quantile) < 0.3
    assert (((counts - draws * p)[kept] ** 2) / (draws * p[kept])).sum() < limit


# ------------------------------------------------------------------------------- independence of the batch
@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([5, 131, 1001]), st.sampled_from([0.05, 3.0]))
def test_a_token_depends_on_its_row_alone(data: st.DataObject, vocab: int, scale: float) -> None:
    pool = data.draw(st.lists(sample_rows(vocab) | sample_rows(vocab, temperature=0.0), min_size=1, max_size=5))
    logits = normal(len(pool), vocab, seed=data.draw(st.integers(0, 99)), scale=scale)
    alone = [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(pool)]
    batch = data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=20))
    assert sample(logits[batch], [pool[i] for i in batch]) == [alone[i] for i in batch]


@pytest.mark.parametrize("vocab", [1, 7, 33, 1000, 2049, 40_001])
def test_exp_rounds_alike_wherever_a_row_stands(vocab: int) -> None:
    """The one operation whose bits could depend on the batch: on a row's place in it, or on the threads."""
    line = -normal(vocab, scale=8.0).abs()
    alone, threads = line.clone().exp_(), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for n in (1, 2, 3, 17):
                assert torch.equal(line.repeat(n, 1).exp_(), alone.expand(n, -1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_other_devices_take_the_same_tokens(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where numpy cannot read the memory gives the same, ties included."""
    logits = (normal(40, 500, scale=scale) * 8).round() / 8
    logits[3, 9], logits[11, 0], logits[17] = torch.nan, torch.inf, -torch.inf
    params = [GREEDY, SamplingParams(logprobs=3), SamplingParams(top_p=0.9), SamplingParams(top_k=9, logprobs=7),
              SamplingParams(temperature=0.0, presence_penalty=1.0)]
    rows = [row(params[i % 5], i, output=(1, 2, 3)) for i in range(40)]
    expected, plain = sample(logits, rows), sample(logits, [row()] * 40)
    monkeypatch.setattr(sampler, "_numpy_reads", lambda tensor: False)
    assert sample(logits, rows) == expected
    assert sample(logits, [row()] * 40) == plain


def test_the_head_decides_as_the_whole_row_would(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (normal(200, 400, scale=2.0) * 4).round() / 4  # with ties
    params = [SamplingParams(), SamplingParams(top_p=0.7), SamplingParams(top_k=30), SamplingParams(min_p=0.02),
              SamplingParams(top_k=30, top_p=0.5)]
    rows = [row(params[i % 5], i) for i in range(200)]
    found = []
    for heads in ((), (1,), (2, 5), (16, 31), (48,), (128, 2048)):
        monkeypatch.setattr(sampler, "HEADS", heads)
        found.append(tokens(sample(logits, rows)))
    assert all(other == found[0] for other in found)


def test_seed_request_and_position_all_matter() -> None:
    line = torch.zeros(1, 1000)
    one = SamplingParams()
    rows = [row(one), row(one, seed=1), row(one, request="s"), row(one, position=1)]
    assert len(set(tokens(sample(line.expand(4, -1), rows)))) == 4
    assert len(set(tokens(sample(line.expand(4, -1), rows[:1] * 4)))) == 1


# ------------------------------------------------------------------------------------- greedy, edges, ties
def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [-0.0, 0.0, -1.0, 0.0]])
    assert tokens(sample(logits, [row(), row()])) == [1, 0]
    slow = [row(SamplingParams(temperature=0.0, logit_bias={0: -1.0}))] * 2
    assert tokens(sample(logits, slow)) == [1, 1]


def test_ties_with_the_kth_token_stay_as_in_vllm() -> None:
    params = SamplingParams(top_k=2)
    line = torch.tensor([5.0, 4.0, 4.0, 4.0, -9.0])
    assert set(tokens(sample(line.expand(300, -1), [row(params, i) for i in range(300)]))) == {0, 1, 2, 3}


def test_top_p_cuts_ties_by_id() -> None:
    params = SamplingParams(top_p=0.5)
    assert set(tokens(sample(torch.zeros(300, 4), [row(params, i) for i in range(300)]))) == {0, 1}


def test_min_p_of_one_keeps_the_ties_of_the_largest() -> None:
    line, params = torch.tensor([2.0, 5.0, 5.0, 4.99]), SamplingParams(min_p=1.0)
    assert set(tokens(sample(line.expand(100, -1), [row(params, i) for i in range(100)]))) == {1, 2}


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.25 - 2**-53, 0), (0.25, 1), (0.5, 2), (1 - 2**-53, 3)])
def test_the_borders_of_the_inverse_cdf(u: float, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "uniform", lambda seed, request, position: u)
    assert tokens(sample(torch.zeros(1, 4), [row(SamplingParams())])) == [token]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-3])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = normal(50, 200)
    logits[:, 7] = -torch.inf
    rows = [row(SamplingParams(temperature=temperature), i) for i in range(50)]
    assert tokens(sample(logits, rows)) == logits.argmax(-1).tolist()


def test_an_immense_temperature_is_uniform_over_what_is_possible() -> None:
    logits = normal(400, 4)
    logits[:, 2] = -torch.inf
    found = tokens(sample(logits, [row(SamplingParams(temperature=1e300), i) for i in range(400)]))
    assert set(found) == {0, 1, 3} and min(found.count(t) for t in (0, 1, 3)) > 90


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_forbids_eos_and_stops_until_there_are_enough(ignore_eos: bool) -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0]])
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,), ignore_eos=ignore_eos)
    for output, expected in (((), 2), ((5,), 2), ((5, 5), 0)):
        assert tokens(sample(logits, [row(params, output=output, eos=(0,))])) == [expected]


def test_half_precision_and_gradients_are_fine() -> None:
    logits = normal(3, 9).bfloat16().requires_grad_()
    assert tokens(sample(logits, [row()] * 3)) == logits.float().argmax(-1).tolist()


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 5), []) == [] and prompt_logprobs(torch.zeros(0, 5), [], 2) == []


def test_rows_and_logits_must_match() -> None:
    for wrong in (torch.zeros(2, 5), torch.zeros(5)):
        with pytest.raises(ValueError, match="one row of logits each"):
            sample(wrong, [row()])
        with pytest.raises(ValueError, match="one row of logits each"):
            prompt_logprobs(wrong, [1], 0)


# --------------------------------------------------------------------------------------------- log-probabilities
def check_logprobs(found: TokenLogprobs, line: torch.Tensor, token: int, count: int) -> None:
    expected = torch.log_softmax(line.double(), -1).numpy()
    order = np.lexsort((np.arange(len(line)), -expected))
    assert found.logprob == pytest.approx(expected[token], abs=1e-6)
    assert found.rank == 1 + list(order).index(token)
    assert [t for t, _ in found.top] == list(order[:count])
    assert [p for _, p in found.top] == pytest.approx(expected[order[:count]], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from([4, 200]), st.booleans())
def test_logprobs_are_of_the_raw_logits(data: st.DataObject, vocab: int, ties: bool) -> None:
    rows = data.draw(st.lists(sample_rows(vocab) | sample_rows(vocab, temperature=0.0), min_size=1, max_size=6))
    logits = normal(len(rows), vocab, seed=data.draw(st.integers(0, 99)))
    logits = logits.round() if ties else logits
    for line, r, found in zip(logits, rows, sample(logits, rows)):
        assert (found.logprobs is None) == (r.sampling.logprobs is None)
        if found.logprobs is not None:
            check_logprobs(found.logprobs, line, found.token_id, r.sampling.logprobs or 0)


def test_logprobs_zero_reports_the_chosen_token_only() -> None:
    found = sample(torch.tensor([[1.0, 2.0, 3.0]]), [row(SamplingParams(temperature=0.0, logprobs=0,
                                                                       logit_bias={0: 50}))])[0].logprobs
    assert found is not None and found.top == () and found.rank == 3


def test_the_two_zeros_tie() -> None:
    found = sample(torch.tensor([[-1.0, -0.0, 0.0]]), [row(SamplingParams(temperature=0.0, logprobs=2))])[0]
    assert found.token_id == 1 and found.logprobs is not None and [t for t, _ in found.logprobs.top] == [1, 2]


def test_more_logprobs_than_tokens() -> None:
    found = sample(torch.tensor([[1.0, -torch.inf, 3.0]]), [row(SamplingParams(temperature=0.0, logprobs=9))])[0]
    assert found.logprobs is not None and [t for t, _ in found.logprobs.top] == [2, 0, 1]
    assert found.logprobs.top[2][1] == -math.inf


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
@pytest.mark.parametrize("num_top", [0, 3, 31])
def test_prompt_logprobs(num_top: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "CHUNK", chunk)
    logits, ids = normal(17, 31), [(7 * i) % 31 for i in range(17)]
    found = prompt_logprobs(logits, ids, num_top)
    assert len(found) == 17
    for line, token, one in zip(logits, ids, found):
        check_logprobs(one, line, token, num_top)


def test_prompt_logprobs_refuses_what_has_none() -> None:
    logits = normal(3, 5)
    for token in (5, -1):
        with pytest.raises(RequestError, match=rf"^prompt_token_ids={token}: is outside the vocabulary of 5 tokens"):
            prompt_logprobs(logits, [0, token, 1], 2)
    logits[1, 2] = torch.nan
    with pytest.raises(RequestError, match=r"row 1: 1 of 5 logits are NaN"):
        prompt_logprobs(logits, [0, 1, 2], 2)


# ----------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(temperature=0.0, logprobs=2),
                                    SamplingParams(top_k=2, presence_penalty=1.0)])
def test_a_broken_row_hurts_no_other(params: SamplingParams) -> None:
    logits = normal(6, 10)
    good = sample(logits, [row(params, i) for i in range(6)])
    logits[1] = torch.nan
    logits[2, 4] = torch.nan
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    found = sample(logits, [row(params, i, request=f"q{i}" if 0 < i < 5 else "r") for i in range(6)])
    assert [found[0], found[5]] == [good[0], good[5]]
    for i, problem in ((1, "10 of 10 logits are NaN"), (2, "1 of 10 logits are NaN"), (3, "a logit is +inf"),
                       (4, "every logit is -inf")):
        assert found[i] == Sampled(-1, None, f"request 'q{i}', position {i}: {problem}")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_choose_is_an_error(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=1, stop_token_ids=(0,))
    found = sample(normal(2, 2), [row(params, eos=(1,)), row(params, eos=(0,))])
    assert found[0].token_id == -1 and "min_tokens" in str(found[0].error)
    assert found[1] == Sampled(1)


def test_a_bias_outside_the_vocabulary_is_an_error() -> None:
    params = SamplingParams(logit_bias={1: 5.0, 7: 1.0})
    found = sample(normal(2, 7), [row(params), row()])
    assert "logit_bias=7: is outside the vocabulary of 7 tokens. Use ids in [0, 6]." in str(found[0].error)
    assert found[1].error is None
