"""Hash-chained prefix caching: a block is findable under the hash of its own and all earlier tokens.

    block 0            block 1                     block 2 (partial: never findable)
    h0 = H(root, t0)   h1 = H(h0, t1)
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as AbstractSequence

ROOT = b"llmlab"
FIXED_ROOT = b"llmlab fixed"  # KV that was computed with fixed numerics is found by those only who ask for it


def chain_hashes(token_ids: AbstractSequence[int], block_size: int, known: list[bytes], limit: int,
                 root: bytes = ROOT) -> list[bytes]:  # fmt: skip
    """Extend `known` in place to the hashes of the first `limit` full blocks of `token_ids`; return it.

    16-byte BLAKE2b over (previous hash, tokens as int64): collisions are out of reach even for an
    adversary, so equal hashes may be trusted to mean equal tokens and equal context.
    """
    limit = min(limit, len(token_ids) // block_size)
    start, width = len(known) * block_size, 8 * block_size
    if len(known) < limit:
        data = array("q", token_ids[start : limit * block_size]).tobytes()
        previous = known[-1] if known else root
        for offset in range(0, len(data), width):
            previous = hashlib.blake2b(previous + data[offset : offset + width], digest_size=16).digest()
            known.append(previous)
    return known
