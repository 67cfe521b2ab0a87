"""Memory of the CPU in huge pages, where the system has them: scattered reads of KV then miss fewer translations."""

from __future__ import annotations

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page; where they have another size nothing but the gain is lost
FIRST = 4 * HUGE  # bytes that are taken at once


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, in huge pages if they fill some and the system allows it. The first of them are taken at once, as
    the first requests would wait for them; the others when they are first written.

    Raises RuntimeError or OSError if there is no room.
    """
    size = prod(shape) * dtype.itemsize
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # the tensor keeps it alive
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw[start : start + min(size, FIRST)] = 0
    return raw[start : start + size].view(dtype).view(shape)
