"""llmlab: the lab bench of LLM inference. The public names, loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmlab.checking import check
    from llmlab.comparing import compare
    from llmlab.config import EngineConfig
    from llmlab.engine import Engine
    from llmlab.llm import LLM
    from llmlab.plugins import register
    from llmlab.running import run
    from llmlab.runs import Run
    from llmlab.sweeping import sweep
    from llmlab.types import LabError, Request, SamplingParams
    from llmlab.workloads.workload import Workload

_HOME = {
    "LLM": "llmlab.llm", "SamplingParams": "llmlab.types", "Engine": "llmlab.engine",
    "EngineConfig": "llmlab.config", "run": "llmlab.running", "Run": "llmlab.runs",
    "Workload": "llmlab.workloads.workload", "register": "llmlab.plugins", "LabError": "llmlab.types",
    "Request": "llmlab.types", "compare": "llmlab.comparing", "check": "llmlab.checking", "sweep": "llmlab.sweeping",
}  # fmt: skip
__all__ = [
    "LLM", "Engine", "EngineConfig", "LabError", "Request", "Run", "SamplingParams", "Workload", "check", "compare",
    "register", "run", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmlab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
