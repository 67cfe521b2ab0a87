"""Power model: what an operation, a byte and a second of waiting cost in joules.

The model is ours, not a vendor's. Power = static + what compute draws + what memory draws, with
``static_fraction`` of the TDP always on, a kernel at the achieved compute ceiling drawing the whole TDP, and a
kernel that only streams memory drawing ``stream_fraction`` of it. Published decode measurements lie between 0.2 and
0.45 of the TDP (137-300 W of 700 W on an H200 at small batches) and streaming kernels between 0.5 and 0.7.
"""

from __future__ import annotations

from dataclasses import dataclass

from roofline.errors import RooflineError
from roofline.hardware import Hardware


@dataclass(frozen=True, slots=True)
class PowerModel:
    """Fractions of the TDP, and joules per byte that crosses a link (10 pJ per bit: an assumption)."""

    static_fraction: float = 0.15
    stream_fraction: float = 0.55
    joules_per_link_byte: float = 80e-12

    def __post_init__(self) -> None:
        if not 0 <= self.static_fraction < self.stream_fraction <= 1:
            raise RooflineError(
                "the power model needs 0 <= static_fraction < stream_fraction <= 1, got "
                f"{self.static_fraction} and {self.stream_fraction}"
            )

    def static_watts(self, hardware: Hardware) -> float:
        """Return the watts drawn without any work."""
        return self.static_fraction * hardware.tdp

    def joules_per_byte(self, hardware: Hardware, achieved_bandwidth: float) -> float:
        """Return the dynamic joules of one byte of main memory, if streaming reaches ``achieved_bandwidth``."""
        return (self.stream_fraction - self.static_fraction) * hardware.tdp / achieved_bandwidth

    def joules_per_flop(self, hardware: Hardware, achieved_peak: float) -> float:
        """Return the dynamic joules of one operation, if products reach ``achieved_peak`` operations/s."""
        return (1 - self.static_fraction) * hardware.tdp / achieved_peak
