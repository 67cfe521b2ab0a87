"""Hardware table. Every number carries its source; prices are an input, for they change by the month.

Peaks are *dense* rates (no 2:4 sparsity) with 32-bit accumulation, in operations per second, a multiply-add
counting two. Bandwidths are decimal bytes per second, links are per direction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from roofline.errors import RooflineError, nearest, non_negative, positive
from roofline.precision import canonical

GB = 1e9
GIB = 2.0**30
TERA = 1e12


@dataclass(frozen=True, slots=True)
class Link:
    """A point-to-point link: bytes per second in one direction, and seconds before the first byte."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        positive("link bandwidth", self.bandwidth)
        non_negative("link latency", self.latency)

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds that moving ``num_bytes`` takes (0 bytes take 0 seconds)."""
        non_negative("num_bytes", num_bytes)
        return self.latency + num_bytes / self.bandwidth if num_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    ``peak`` maps a number format to operations per second. ``units`` is the number of multiprocessors over
    which matrix tiles are dealt (1 for a CPU: no wave quantisation). ``onchip_bytes`` is what lies closer than
    main memory: registers, level 1 and level 2 (last-level cache on a CPU). ``cache_bandwidth`` is the measured
    rate of reading from there, None where nobody measured it. ``sources`` says for each field where its number
    comes from.
    """

    name: str
    kind: str
    memory_bytes: float
    bandwidth: float
    peak: Mapping[str, float]
    units: int
    onchip_bytes: float
    tdp: float
    links: Mapping[str, Link]
    sources: Mapping[str, str] = field(default_factory=dict)
    cache_bandwidth: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "bandwidth", "units", "onchip_bytes", "tdp"):
            positive(f"{self.name}: {name}", getattr(self, name))
        for dtype, rate in self.peak.items():
            positive(f"{self.name}: peak[{dtype}]", rate)
        if self.price_per_hour is not None:
            non_negative(f"{self.name}: price_per_hour", self.price_per_hour)

    @property
    def default_dtype(self) -> str:
        """The format models run in here unless asked otherwise: fp16 on a GPU, fp32 on a CPU."""
        return "fp16" if "fp16" in self.peak else "fp32"

    def peak_of(self, dtype: str) -> float:
        """Return the peak rate for ``dtype``; a format without a unit raises and names those that have one."""
        key = canonical(dtype)
        if key not in self.peak:
            raise RooflineError(f"{self.name} has no {key} unit; it has {', '.join(self.peak)}")
        return self.peak[key]

    def ridge(self, dtype: str | None = None) -> float:
        """Return the turning point in operations per byte: below it an operation is bound by memory."""
        return self.peak_of(dtype or self.default_dtype) / self.bandwidth

    def link(self, name: str) -> Link:
        """Return the link called ``name`` (``"host"``, ``"peer"``); an unknown one raises."""
        if name not in self.links:
            raise RooflineError(f"{self.name} has no link {name!r}; it has {', '.join(self.links) or 'none'}")
        return self.links[name]

    def with_price(self, per_hour: float) -> Hardware:
        """Return the same device at a price per hour, in the currency of your choice."""
        return replace(self, price_per_hour=per_hour)


# Seconds before the first byte of a copy. An assumption, not a data sheet's number: a small cudaMemcpy is seen to
# take about 10 us, a small NVLink put about 3 us, a socket's exchange inside a data centre about 50 us.
_LATENCY = {"host": 10e-6, "peer": 3e-6, "net": 50e-6}
_PCIE = {3: 15.75 * GB, 4: 31.5 * GB, 5: 63.0 * GB}  # x16, one direction, after line coding (PCI-SIG)


def _gpu(
    name: str, memory: float, bandwidth: float, peak: dict[str, float], sms: int, l1_kib: int, l2_mib: float,
    tdp: float, pcie: int, nvlink: float, sheet: str,
) -> Hardware:  # fmt: skip
    links = {"host": Link(_PCIE[pcie], _LATENCY["host"]), "net": Link(12.5 * GB, _LATENCY["net"])}
    links["peer"] = Link(nvlink * GB, _LATENCY["peer"]) if nvlink else links["host"]
    onchip = sms * (256 + l1_kib) * 1024 + l2_mib * 2**20
    sources = {
        "memory_bytes": sheet, "bandwidth": sheet, "peak": sheet + "; dense, sparse figures halved", "tdp": sheet,
        "units": "multiprocessors: " + sheet,
        "onchip_bytes": f"{sms} x (256 KiB registers + {l1_kib} KiB level 1) + {l2_mib:g} MiB level 2: "
                        "architecture white paper of the family",
        "links": f"host: PCIe {pcie}.0 x16 (PCI-SIG); peer: half the sheet's bidirectional NVLink figure, PCIe if "
                 "none; net: 100 Gbit/s Ethernet, an assumption; latencies are assumptions",
    }  # fmt: skip
    rates = {dtype: rate * TERA for dtype, rate in peak.items()}
    return Hardware(
        name, "gpu", memory * GIB, bandwidth * GB, MappingProxyType(rates), sms, onchip, tdp,
        MappingProxyType(links), MappingProxyType(sources),
    )  # fmt: skip


def _cpu(
    name: str, memory: float, bandwidth: float, gflops: float, llc_mib: float, tdp: float,
    sources: dict[str, str], cache_bandwidth: float | None = None,
) -> Hardware:  # fmt: skip
    links = {"host": Link(bandwidth * GB / 2), "net": Link(1.25 * GB, _LATENCY["net"])}
    sources = {**sources, "links": "host: a copy inside main memory (read + write); net: 10 Gbit/s, an assumption"}
    return Hardware(
        name, "cpu", memory * GIB, bandwidth * GB, MappingProxyType({"fp32": gflops * GB}), 1, llc_mib * 2**20, tdp,
        MappingProxyType(links), MappingProxyType(sources), cache_bandwidth and cache_bandwidth * GB,
    )  # fmt: skip


def _nvidia() -> tuple[Hardware, ...]:
    """Rows: memory GiB, GB/s, TFLOP/s, SMs, KiB level 1, MiB level 2, W, PCIe, NVLink GB/s one way, source."""
    turing = {"fp32": 8.1, "fp16": 65.0, "int8": 130.0, "int4": 260.0}
    a10 = {"fp32": 31.2, "tf32": 62.5, "fp16": 125.0, "bf16": 125.0, "int8": 250.0, "int4": 500.0}
    a10g = {"fp32": 35.0, "tf32": 35.0, "fp16": 70.0, "bf16": 70.0, "int8": 140.0, "int4": 280.0}
    l4 = {"fp32": 30.3, "tf32": 60.0, "fp16": 121.0, "bf16": 121.0, "fp8": 242.5, "int8": 242.5}
    a40 = {"fp32": 37.4, "tf32": 74.8, "fp16": 149.7, "bf16": 149.7, "int8": 299.3, "int4": 598.7}
    a6000 = {"fp32": 38.7, "tf32": 77.4, "fp16": 154.8, "bf16": 154.8, "int8": 309.7, "int4": 619.3}
    a100 = {"fp32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0, "int8": 624.0, "int4": 1248.0}
    sxm = {"fp32": 67.0, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4, "fp8": 1978.9, "int8": 1978.9}
    pcie = {"fp32": 51.0, "tf32": 378.0, "fp16": 756.0, "bf16": 756.0, "fp8": 1513.0, "int8": 1513.0}
    ada = {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2, "fp8": 330.3, "int8": 660.6, "int4": 1321.2}
    return (
        _gpu("t4", 16, 320, turing, 40, 96, 4, 70, 3, 0, "NVIDIA T4 data sheet (2019)"),
        _gpu("a10", 24, 600, a10, 72, 128, 6, 150, 4, 0, "NVIDIA A10 data sheet (2021)"),
        _gpu("a10g", 24, 600, a10g, 80, 128, 6, 300, 4, 0, "NVIDIA A10G data sheet (2022, AWS G5)"),
        _gpu("l4", 24, 300, l4, 58, 128, 48, 72, 4, 0, "NVIDIA L4 data sheet (2023)"),
        _gpu("a40", 48, 696, a40, 84, 128, 6, 300, 4, 56.25, "NVIDIA A40 data sheet (2020)"),
        _gpu("a6000", 48, 768, a6000, 84, 128, 6, 300, 4, 56.25, "NVIDIA RTX A6000 data sheet (2020)"),
        _gpu("a100-40gb", 40, 1555, a100, 108, 192, 40, 400, 4, 300, "NVIDIA A100 data sheet (2020), SXM"),
        _gpu("a100-80gb", 80, 2039, a100, 108, 192, 40, 400, 4, 300, "NVIDIA A100 data sheet (2021), SXM"),
        _gpu("h100-sxm", 80, 3350, sxm, 132, 256, 50, 700, 5, 450, "NVIDIA H100 data sheet (2023), SXM5"),
        _gpu("h100-pcie", 80, 2000, pcie, 114, 256, 50, 350, 5, 300, "NVIDIA H100 data sheet (2023), PCIe"),
        _gpu("h200", 141, 4800, sxm, 132, 256, 50, 700, 5, 450, "NVIDIA H200 data sheet (2024), SXM"),
        _gpu("rtx-4090", 24, 1008, ada, 128, 128, 72, 450, 4, 0, "NVIDIA Ada architecture white paper v2, app. A"),
    )


def _xeon(model: str, cores: int, ghz: float, channels: int, mts: int, llc: float, tdp: float) -> Hardware:
    """A two-socket Xeon: peak = cores x clock x 64 (two AVX-512 multiply-add units, 16 lanes, 2 operations)."""
    ark = f"Intel product page of {model}"
    sources = {
        "peak": f"computed: 2 x {cores} cores x {ghz} GHz base clock x 64; {ark}. AVX-512 clocks are lower",
        "bandwidth": f"computed: 2 x {channels} channels x {mts} MT/s x 8 bytes; {ark}",
        "memory_bytes": "an input: set it to the machine's own", "units": "one pool of cores",
        "onchip_bytes": "last-level cache: " + ark, "tdp": "two sockets: " + ark,
    }  # fmt: skip
    name = model.lower().replace("xeon gold ", "xeon-") + "-2s"
    return _cpu(name, 256, 2 * channels * mts * 8e-3, 2 * cores * ghz * 64, 2 * llc, 2 * tdp, sources)


def _cpus() -> tuple[Hardware, ...]:
    measured = "measured by this project: "
    two_core = {
        "peak": measured + "fp32 matrix product, 2 threads of a quiet AVX-512 server core pair (python -m roofline.measure)",
        "bandwidth": measured + "weights read by a parallel dot-product loop at batch 1 (a plain copy moves 100 GB/s)", "units": "one pool of cores",
        "onchip_bytes": "32 MiB last-level cache shared by the two cores, as the machine reports it",
        "cache_bandwidth": measured + "matrix-vector product over 4 MiB, 2 threads (python -m roofline.measure)",
        "memory_bytes": "an input: set it to the machine's own",
        "tdp": "stand-in: Intel i3-1115G4 (2 cores, AVX-512), 28 W; a virtual machine reports none",
    }  # fmt: skip
    return (
        _cpu("cpu-2core", 16, 87.0, 215.0, 32, 28.0, two_core, 195.0),
        _xeon("Xeon Gold 6130", 16, 2.1, 6, 2666, 22, 125),
        _xeon("Xeon Gold 6342", 24, 2.8, 8, 3200, 36, 230),
    )


def table() -> dict[str, Hardware]:
    """Return every known device by name."""
    return {device.name: device for device in (*_nvidia(), *_cpus())}


def names() -> list[str]:
    """Return the known names."""
    return list(table())


# What people write for a device that exists in several forms.
_SHORT = {"a100": "a100-80gb", "h100": "h100-sxm", "4090": "rtx-4090", "rtx4090": "rtx-4090", "cpu": "cpu-2core"}


def _plain(name: str) -> str:
    text = re.sub(r"[^a-z0-9]", "", name.lower().replace("nvidia", "").replace("tesla", "").replace("geforce", ""))
    return re.sub(r"(?<=0)gb?$", "", text) if text.startswith("a100") else text


def get(name: str | Hardware) -> Hardware:
    """Look up a device by name in any usual spelling (``"A100-80GB"``, ``"NVIDIA H100 PCIe"``, ``"4090"``).

    ``"a100"`` means the 80 GB card and ``"h100"`` the SXM one. Raises with the nearest names otherwise.
    """
    if isinstance(name, Hardware):
        return name
    known = table()
    plain = {_plain(key): device for key, device in known.items()}
    plain |= {key: known[target] for key, target in _SHORT.items()}
    found = known.get(name) or plain.get(_plain(name))
    if found is None:
        near = ", ".join(nearest(name.lower(), known))
        raise RooflineError(
            f"unknown hardware {name!r}: the nearest names are {near}; a device of your own: roofline.Hardware(...)"
        )
    return found
