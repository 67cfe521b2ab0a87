"""Kernels that are asked for by name: what a name means, and what each card makes of it."""

from __future__ import annotations

import pytest

from llmlab.kernels.capability import capability_of, chosen_line, few_rows, kernel_table
from llmlab.kernels.dataflow import Dataflow
from llmlab.kernels.variants import USUAL, Variants, parse_kernels
from llmlab.types import ConfigError


def test_names() -> None:
    assert parse_kernels("auto") == ("auto", USUAL) and parse_kernels("triton") == ("triton", USUAL)
    assert parse_kernels("triton+one-max").variants == Variants(0.0, Dataflow())
    assert parse_kernels("triton+one-max@-3.5+rows").variants == Variants(-3.5, Dataflow(9, 9))
    few = parse_kernels("triton+flat@40+rows@4").variants.few_rows
    assert [few.pick(n) for n in (1, 4, 5, 40, 41)] == ["rows", "rows", "flat", "flat", "library"]
    alone = parse_kernels("triton+flat").variants.few_rows
    assert [alone.pick(n) for n in (1, 32, 33)] == ["flat", "flat", "library"]


@pytest.mark.parametrize(("text", "told"), [
    ("fast", "Known: auto, numba, torch, triton"), ("triton+flatt", "Did you mean 'triton+flat'"), ("numba+flat", "numba has no variants"),
    ("triton+rows@17", "'17' is not 1 to 16 rows"), ("triton+flat@0", "1 to 64 rows"), ("triton+one-max@x", "'x' is not a number"),
    ("triton+one-max@nan", "is not a number"), ("triton+", "unknown name"),
])  # fmt: skip
def test_bad_names_are_refused_with_the_way_out(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match="kernels=") as error:
        parse_kernels(text)
    assert told in str(error.value)


def test_the_table_tells_what_a_card_makes_of_them() -> None:
    asked = parse_kernels("triton+one-max@4+rows@2+flat").variants
    rows = {c.op: c for c in kernel_table(capability_of("h200"), "bfloat16", variants=asked)}
    assert rows["softmax of decoding"].implementation == "one maximum, 4"
    assert rows["linear, few rows"].implementation == "triton, sums in registers up to 2 rows, flat products up to 32"
    t4 = capability_of("t4")
    rows = {c.op: c for c in kernel_table(t4, "float16", variants=asked)}
    assert rows["softmax of decoding"].implementation == "online maximum" and "sm_75" in rows["softmax of decoding"].why
    assert rows["linear, few rows"].implementation == "triton, sums in registers up to 2 rows"
    assert few_rows(t4, parse_kernels("triton+flat").variants).pick(1) == "library"
    line = chosen_line(t4, list(rows.values()), "float16", "", 100)
    assert "linear, few rows: triton, sums" in line and "softmax" not in line
    assert "few rows" not in chosen_line(t4, kernel_table(t4, "float16"), "float16", "", 100)
