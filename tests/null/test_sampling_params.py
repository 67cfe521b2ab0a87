"""SamplingParams refuses what it cannot mean, and says which field, which value and what to do instead."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llmlab.types import RequestError, SamplingParams

NAN, INF = float("nan"), float("inf")
HUGE = 10**400  # an integer that neither a float nor a log can hold

WRONG: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, NAN, True, None, "2", HUGE],
    "max_tokens": [0, -3, 2.5, NAN, "5"],
    "min_tokens": [-1, NAN, 0.5, None, 17],  # above max_tokens=16
    "temperature": [-1.0, -1e-9, NAN, INF, -INF, HUGE, None, "warm", True],
    "top_p": [0.0, 0, -0.1, 1.1, NAN, INF, None],
    "top_k": [-2, NAN, 1.0, None],
    "min_p": [-0.1, 1.1, NAN, -INF, None],
    "seed": ["a", 1.5, NAN, True, 2**63, -(2**63) - 1],
    "stop": ["", ("a", ""), (3,), 5],
    "stop_token_ids": [(-1,), ("a",), (NAN,), "ab", 5],
    "ignore_eos": ["yes", 1, None, NAN], "deterministic": ["yes", 1, None],
    "logprobs": [-1, NAN, 1.5],
    "prompt_logprobs": [-1, NAN, 1.5],
    "presence_penalty": [-2.1, 2.1, NAN, INF, None],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, None],
    "repetition_penalty": [0.0, -1.0, NAN, INF, HUGE, None],
    "logit_bias": [{-1: 1.0}, {1: NAN}, {1: INF}, {"a": 1.0}, {1: "x"}, {1: HUGE}, [1], 5],
}
RIGHT: dict[str, list[Any]] = {
    "n": [1, 8], "max_tokens": [1, None, 10**9], "min_tokens": [0, 16], "temperature": [0, 0.0, 1e-30, 1, 1e300],
    "top_p": [1e-300, 1, 1.0], "top_k": [-1, 0, 1, 10**12], "min_p": [0, 1], "seed": [None, -5, 2**63 - 1, -(2**63)],
    "stop": ["end", ["a", "b"], None, ()], "stop_token_ids": [[1, 2], None], "ignore_eos": [True, False], "deterministic": [True, False],
    "logprobs": [None, 0, 5], "prompt_logprobs": [None, 0], "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2, 2.0], "repetition_penalty": [1e-3, 1, 50], "logit_bias": [None, {}, {3: -100, 0: 1.5}],
}


def test_the_tables_name_every_field() -> None:
    assert set(WRONG) == set(RIGHT) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_wrong_values_are_refused_with_field_value_and_way_out(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    error = caught.value
    assert error.field.split("[")[0] == field
    inside = [value] if not isinstance(value, (dict, tuple, str)) else [value, *value]
    inside += list(value.values()) if isinstance(value, dict) else []
    assert any(error.value is part or error.value == part for part in inside)
    assert error.problem and error.way_out
    message = str(error)
    assert message.startswith(f"{error.field}=") and repr(error.value)[:100] in message and error.way_out in message


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in RIGHT.items() for v in values])
def test_what_is_accepted_can_be_logged(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in RIGHT.items() for v in values])
def test_right_values_are_kept(field: str, value: Any) -> None:
    kept = getattr(SamplingParams(**{field: value}), field)
    if field in ("stop", "stop_token_ids"):
        assert kept == ((value,) if isinstance(value, str) else tuple(value or ()))
    else:
        assert kept == value


@pytest.mark.parametrize("text", ['{"temperature": -1}', '{"top_p": 0}', '{"max_tokens": 0}'])
def test_decoding_refuses_too(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=SamplingParams)


def test_min_tokens_without_a_maximum() -> None:
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_greedy_and_penalties() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=1e-9).greedy
    assert not SamplingParams().has_penalties
    for field, value in (("presence_penalty", -0.5), ("frequency_penalty", 0.1), ("repetition_penalty", 0.9)):
        assert SamplingParams(**{field: value}).has_penalties
