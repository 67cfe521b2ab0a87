"""Random numbers without state: each is a hash of (seed, request, position, draw). Imports no torch.

A generator with state would tie a request's tokens to the order in which the batch drew. A counter does not:
whatever the neighbours, the batch, the process or the machine, the same key gives the same number.
The hash is BLAKE2b (RFC 7693), so that keys as close as positions 7 and 8 give unrelated bits.
"""

from __future__ import annotations

import struct
from hashlib import blake2b, shake_128

from llmlab.types import LabError


def bits(seed: int, request: str, position: int, draw: int = 0) -> int:
    """64 random bits in [0, 2**64). `draw` tells apart several numbers needed at one position."""
    key = b"%d %d %d %b" % (seed, position, draw, request.encode("utf-8", "surrogatepass"))
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def uniform(seed: int, request: str, position: int, draw: int = 0) -> float:
    """A number in [0, 1): the top 53 of `bits`, so every float it can return is equally likely."""
    return (bits(seed, request, position, draw) >> 11) * 2.0**-53


def integer(seed: int, request: str, position: int, n: int, draw: int = 0) -> int:
    """A number in [0, n), from the same bits as `uniform`; no value is favoured by more than n / 2**64."""
    if n < 1:
        raise LabError("n", n, "must be at least 1", "There is no integer below it to draw.")
    return bits(seed, request, position, draw) * n >> 64


def integers(seed: int, request: str, position: int, n: int, count: int) -> tuple[int, ...]:
    """`count` numbers in [0, n) of one key, at a twentieth of what as many calls of `integer` cost; other numbers than
    theirs. SHAKE-128 (FIPS 202) stretches the key. n at most 2**32; no value is favoured by more than n / 2**64."""
    if not 1 <= n <= 1 << 32:
        raise LabError("n", n, "must lie in 1 to 2**32", "There is no integer below it to draw, or too many.")
    key = b"%d %d %b" % (seed, position, request.encode("utf-8", "surrogatepass"))
    words = struct.unpack(f"<{count}Q", shake_128(key).digest(8 * count))
    return tuple([word * n >> 64 for word in words])
