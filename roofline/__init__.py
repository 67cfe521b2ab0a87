"""Roofline cost model of LLM inference: numpy at most, no torch, importable alone.

``CostModel("llama-2-7b", "a100-40gb").step(Rows.decode(batch=1, context=512))`` predicts a step; ``step_ops`` lists
what it consists of; ``roofline.memory.plan`` says how many tokens fit; ``roofline.lenses`` show what a technique
changes; ``roofline.fit`` fits the model to measured kernels; ``roofline.charts`` draw it. See ``docs/roofline.md``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roofline.cost import CostModel, Efficiency, OpCost, StepCost, transfer_seconds
    from roofline.errors import RooflineError
    from roofline.hardware import Hardware, Link
    from roofline.ops import Op, step_ops
    from roofline.power import PowerModel
    from roofline.precision import Precision
    from roofline.rows import Rows
    from roofline.shapes import Shape

_HOME = {
    "CostModel": "cost", "Efficiency": "cost", "OpCost": "cost", "StepCost": "cost", "transfer_seconds": "cost",
    "RooflineError": "errors", "Hardware": "hardware", "Link": "hardware", "Op": "ops", "step_ops": "ops",
    "PowerModel": "power", "Precision": "precision", "Rows": "rows", "Shape": "shapes",
}  # fmt: skip
__all__ = [
    "CostModel",
    "Efficiency",
    "Hardware",
    "Link",
    "Op",
    "OpCost",
    "PowerModel",
    "Precision",
    "RooflineError",
    "Rows",
    "Shape",
    "StepCost",
    "step_ops",
    "transfer_seconds",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'roofline' has no attribute {name!r}")
    return getattr(import_module(f"roofline.{_HOME[name]}"), name)
