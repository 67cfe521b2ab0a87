"""Names for plug-ins. One table per seam; registering a name again replaces it, because cells rerun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from llmlab.types import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> factory of a plug-in for one seam.

    The built-ins are given at construction, so importing a module registers nothing behind one's back.
    """

    def __init__(self, seam: str, builtins: dict[str, Callable[..., T]]) -> None:
        self.seam = seam
        self._factories = dict(builtins)

    def register(self, name: str, factory: Callable[..., T]) -> None:
        """Add or replace a plug-in (last one wins)."""
        self._factories[name] = factory

    def names(self) -> list[str]:
        return sorted(self._factories)

    def summaries(self) -> dict[str, str]:
        """First docstring line of every plug-in, for listings."""
        return {name: (self._factories[name].__doc__ or "").strip().split("\n")[0] for name in self.names()}

    def resolve(self, choice: str | T, **params: Any) -> T:
        """A plug-in from its name, or the object itself. Raises ConfigError with the nearest names."""
        if not isinstance(choice, str):
            return choice
        if choice not in self._factories:
            raise unknown_name(self.seam, choice, self._factories)
        return self._factories[choice](**params)


def policy_name(policy: object) -> str:
    """The name a policy goes by in the log: its `name` attribute, else its class name."""
    return str(getattr(policy, "name", type(policy).__name__))
