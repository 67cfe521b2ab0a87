"""Huge pages: zeros like any others, whose memory outlives whoever asked for it."""

from __future__ import annotations

import gc

import pytest
import torch

from llmlab.kernels import pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 4, 8), (65, 8, 64, 64), (0, 2, 4, 8)])
def test_zeros_are_zeros_and_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = pages.zeros(shape, dtype)
    assert made.shape == shape and made.dtype is dtype and made.is_contiguous() and not made.any()
    if made.nbytes >= pages.HUGE:
        assert made.data_ptr() % pages.HUGE == 0
    part = made.fill_(3.0)[-1:]
    del made
    gc.collect()
    others = [pages.zeros(shape, dtype) for _ in range(3)]
    assert (part == 3.0).all() and not any(other.any() for other in others)
