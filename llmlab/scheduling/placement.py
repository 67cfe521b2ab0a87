"""Where items run (seam C): the simple placements. Those that weigh modes against each other are in `placement_modes`."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from llmlab.registry import Registry
from llmlab.scheduling.placement_modes import Overlapped, Pipelined
from llmlab.seams import EngineView, Need, Placement, RequestView
from llmlab.types import Home, WorkItem


class DeviceOnly:
    """Everything on the device that holds the KV pool."""

    name = "device_only"
    steady = True  # it leaves every item where it is, whatever the view

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem]:
        return items


class GpuOnly(DeviceOnly):
    """The same under the name that hybrid systems are compared with: under pressure, KV is dropped or swapped out."""

    name = "gpu_only"


class HostAttention:
    """All KV on the host: prompts are computed on the device, every decode attends on the CPU.

    Source: FastDecode, whose attention workers are one host here.
    """

    name = "fastdecode"

    def home(self, view: EngineView, request: RequestView, need: Need) -> Home:
        return "cpu"

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem]:
        return [replace(item, device="cpu") if view.cpu and item.num_tokens == 1 else item for item in items]


PLACEMENTS: Registry[Placement] = Registry(
    "placement", {"device_only": DeviceOnly, "gpu_only": GpuOnly, "fastdecode": HostAttention, "neo": Pipelined, "apex": Overlapped}
)
