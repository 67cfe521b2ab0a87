"""Plug-ins of the user's own on the command line: `module:Class` or `file.py:Class`, wherever a policy has a name.

    llmlab check my_orders.py:ShortestPrompt --seam ordering
    llmlab sim --ordering my_orders.py:ShortestPrompt
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from llmlab.config import PLUG_IN_FIELDS
from llmlab.types import ConfigError


def with_plug_ins(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an EngineConfig, every `module:Class` among its seams loaded, and drafts for the simulator made from
    their numbers. Raises ConfigError."""
    found = {name: plug_in(name, value) if name in PLUG_IN_FIELDS else value for name, value in fields.items()}
    return found if "speculation" not in found else {**found, "speculation": draft_source(found["speculation"])}


def draft_source(text: Any) -> Any:
    """`0.8,0.7` or `0.8,0.7@llama-3.2-1b`: how often the first, the second and later drafts hold in a simulation, and whose
    steps they cost. Any other text is a name, or `module:Class`. Raises ConfigError."""
    if not isinstance(text, str) or not text[:1].isdigit():
        return plug_in("speculation", text)
    from llmlab.speculating import Simulated, check_acceptance

    numbers, _, model = text.partition("@")
    try:
        acceptance = tuple(float(number) for number in numbers.split(","))
    except ValueError:
        raise ConfigError("speculation", text, "are no numbers", "Write 0.8,0.7 or 0.8,0.7@llama-3.2-1b.") from None
    check_acceptance(acceptance)
    return Simulated(acceptance, model or None)


def plug_in(field: str, text: Any) -> Any:
    """What a seam gets: the object that `module:Class` names, or the name of a registered one as it is."""
    if not isinstance(text, str) or ":" not in text:
        return text
    place, _, name = text.rpartition(":")
    found = getattr(_module(field, text, place), name, None)
    if found is None:
        raise ConfigError(field, text, f"{place} has no {name!r}", "Write module:Class or file.py:Class.")
    return _object(field, text, found) if inspect.isclass(found) else found


def _object(field: str, text: str, made_of: type) -> Any:
    try:
        return made_of()
    except Exception as error:  # whatever its constructor does
        raise ConfigError(field, text, f"cannot be made without arguments ({type(error).__name__}: {error})",
                          "Name an object of your module instead: module:my_policy.") from None  # fmt: skip


def _module(field: str, text: str, place: str) -> ModuleType:
    """The module of that name, looked for in the working directory too, or the file."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # a module may fail in any way while it loads
        raise ConfigError(field, text, f"{place} cannot be loaded ({type(error).__name__}: {error})",
                          "Write module:Class or file.py:Class.") from None  # fmt: skip


def _module_of_file(path: Path) -> ModuleType:
    """Like an import of the file's name, so that other processes find it again by its name and place."""
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise ImportError(f"another module is called {path.stem!r} already; rename the file")
    return module
