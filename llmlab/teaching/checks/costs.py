"""Checks about what steps cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from roofline import hardware
from roofline.cost import turning_rows_limit
from roofline.precision import Precision

TurningBatch = Callable[[float, float, float], float]


def turning_batch(answer: TurningBatch) -> Iterator[str]:
    """`answer(peak, bandwidth, bytes_per_weight)`: as the roofline's own limit for large matrices."""
    for name in ("a100-40g", "t4", "a10", "h100"):
        device = hardware.get(name)
        for code in ("fp16", "w8a16", "w4a16"):
            precision = Precision.parse(code)
            width, peak = precision.weight_bytes, device.peak_of(precision.linear_format)
            got, wanted = answer(peak, device.bandwidth, width), turning_rows_limit(precision, device)
            if abs(got - wanted) > 1e-6 * wanted:
                yield (f"{device.name}: {peak:.3g} operations/s, {device.bandwidth:.3g} bytes/s and {width:g} bytes a weight "
                       f"give {got:.4g} by your formula; both times are equal at {wanted:.4g} tokens.")  # fmt: skip
