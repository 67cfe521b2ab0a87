"""Where items run (seam C)."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.registry import Registry
from llmlab.seams import EngineView, Placement
from llmlab.types import WorkItem


class DeviceOnly:
    """Everything on the device that holds the KV pool."""

    name = "device_only"
    steady = True  # it leaves every item where it is, whatever the view

    def place(self, view: EngineView, items: Sequence[WorkItem]) -> Sequence[WorkItem]:
        return items


PLACEMENTS: Registry[Placement] = Registry("placement", {"device_only": DeviceOnly})
