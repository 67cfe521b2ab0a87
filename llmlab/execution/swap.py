"""KV blocks between a device and host memory, on a queue of copies of their own.

    device blocks --gather--> staging (all layers of a block in one piece) --copy--> host blocks
    device blocks <--scatter- staging                                      <--copy-- host blocks

The gather and the scatter are part of the main queue, the copies are not: a block is free again as soon as
it was gathered, and steps run on while the link is busy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmlab.execution.device_line import DeviceLine, Mark
from llmlab.kernels.layout import sent

STAGED = 32  # blocks in flight at a time


class HostTier:
    """Host memory for `num_blocks` KV blocks, [num_blocks, layers, 2, heads, block_size, head_dim]; allocated at the first swap.

    `caches`: k and v of every layer, [blocks, heads, block_size, head_dim].
    """

    def __init__(self, caches: Sequence[tuple[Tensor, Tensor]], num_blocks: int, line: DeviceLine) -> None:
        self._caches, self._line, self._num_blocks = caches, line, num_blocks
        self._host: Tensor | None = None
        self._staging: Tensor | None = None
        self._free: Mark | None = None  # when the staging may be written again

    def _allocate(self) -> tuple[Tensor, Tensor]:
        if self._host is None or self._staging is None:
            k = self._caches[0][0]
            one = (len(self._caches), 2, *k.shape[1:])
            self._host = self._line.host_empty((self._num_blocks, *one), k.dtype)
            self._staging = torch.empty((STAGED, *one), dtype=k.dtype, device=k.device)
        return self._host, self._staging

    def swap_out(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Device blocks `src` to host blocks `dst`."""
        host, staging = self._allocate()
        for first in range(0, len(src), STAGED):
            blocks = sent(np.array(src[first : first + STAGED], np.int64), staging.device)
            self._wait_for_staging()
            for layer, pair in enumerate(self._caches):
                for half, cache in enumerate(pair):
                    staging[: len(blocks), layer, half] = cache[blocks]
            self._line.copies_after(self._line.mark())
            with self._line.copying():
                for i, block in enumerate(dst[first : first + STAGED]):
                    host[block].copy_(staging[i], non_blocking=True)
            self._free = self._line.mark_copies()

    def swap_in(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Host blocks `src` to device blocks `dst`; what is queued afterwards sees them."""
        host, staging = self._allocate()
        for first in range(0, len(src), STAGED):
            blocks = sent(np.array(dst[first : first + STAGED], np.int64), staging.device)
            self._line.copies_after(self._line.mark())  # the scatter before this one has read the staging
            with self._line.copying():
                for i, block in enumerate(src[first : first + STAGED]):
                    staging[i].copy_(host[block], non_blocking=True)
            self._line.after(self._line.mark_copies())
            for layer, pair in enumerate(self._caches):
                for half, cache in enumerate(pair):
                    cache[blocks] = staging[: len(blocks), layer, half]

    def _wait_for_staging(self) -> None:
        if self._free is not None:
            self._line.after(self._free)
