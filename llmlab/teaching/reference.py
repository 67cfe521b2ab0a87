"""The reference pages: signatures and docstrings of the public names, as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple


class Chapter(NamedTuple):
    """One page: its title, a sentence, and the names that it describes, by module."""

    title: str
    lead: str
    names: Mapping[str, Sequence[str]]


def chapters() -> dict[str, Chapter]:
    """All pages of the reference, by file name."""
    import llmlab
    from llmlab.events import catalog
    from llmlab.ui import figures

    home = llmlab._HOME
    own = {name: home[name] for name in llmlab.__all__}
    seams = ("Ordering", "Admission", "LengthModel", "Victim", "Composer", "Placement", "Eviction", "Tiering",
             "DecodingMethod", "StopRule", "CostModel", "EngineView", "RequestView", "PoolView", "Limits", "Offers",
             "Need", "BlockView", "TierOption", "Admit", "Wait")  # fmt: skip
    return {
        "api": Chapter("Python API", "The public names of `llmlab`. All are loaded when they are first used.",
                       {module: [n for n, m in own.items() if m == module] for module in dict.fromkeys(own.values())}),
        "results": Chapter("Outputs, logs, metrics", "What runs, engines and comparisons give back.",
                           {"llmlab.outputs": ("RequestOutput", "CompletionOutput"), "llmlab.events.log": ("EventLog",),
                            "llmlab.events.trace": ("Step",), "llmlab.events.metrics": ("RequestMetrics", "RunMetrics", "Summary"),
                            "llmlab.events.why": ("Why", "Stretch"), "llmlab.comparing": ("Comparison",), "llmlab.checking": ("Report",)}),
        "seams": Chapter("Seams and views", "The contracts of policies, and the frozen views that they see.", {"llmlab.seams": seams}),
        "events": Chapter("Events", "Every event that a log can hold.", {"llmlab.events.catalog": ["Event", *catalog.EVENT_TYPES, "Alternative"]}),
        "figures": Chapter("Figures", "Pictures of a run: functions from a `Run` to an altair chart.", {"llmlab.ui.figures": figures.__all__}),
        "costs": Chapter("Costs", "The roofline package: what work costs, on hardware that you may not own.",
                         {"roofline": ("CostModel", "Rows"), "roofline.memory": ("plan", "MemoryPlan"),
                          "roofline.profile": ("Profile", "ProfileCost", "read")}),
        "teaching": Chapter("Teaching kit", "What the lessons are made of.",
                            {"llmlab.teaching": ("predict", "Guess", "knobs", "Slider", "Choice", "check", "Verdict", "say", "show", "timeline", "collecting"),
                             "llmlab.teaching.figures": ("bars", "curves", "token_strip", "table")}),
    }  # fmt: skip


def reference_page(chapter: Chapter) -> str:
    """A page as Markdown."""
    parts = [f"# {chapter.title}", chapter.lead]
    for module, names in chapter.names.items():
        for name in names:
            parts += _entry(name, getattr(import_module(module), name), module)
    return "\n\n".join(parts) + "\n"


def _entry(name: str, thing: Any, module: str) -> Iterator[str]:
    yield f"## {name}"
    yield f"```python\n{_signature(name, thing)}\n```"
    yield f"*`{module}`*"
    yield _doc(thing)
    if inspect.isclass(thing):
        rows = [f"- **`{_member(n, m)}`**" + (f": {first}" if (first := _first(m)) else "") for n, m in _members(thing)]
        if rows:
            yield "\n".join(rows)


class _Raw(NamedTuple):
    """An annotation that shows as it stands in the source."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _parameters(thing: Any) -> str:
    """The signature as it stands in the source: a class has no result, and no parameter is its own."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "(...)"
    raw = {name: p.replace(annotation=_Raw(p.annotation)) if isinstance(p.annotation, str) else p
           for name, p in signature.parameters.items() if name not in ("self", "cls", *_inherited(thing))}  # fmt: skip
    result: Any = signature.return_annotation
    result = inspect.Signature.empty if inspect.isclass(thing) else _Raw(result) if isinstance(result, str) else result
    return _tidy(str(signature.replace(parameters=list(raw.values()), return_annotation=result)))


def _inherited(thing: Any) -> tuple[str, ...]:
    """The header of an event, which is described once."""
    from llmlab.events.catalog import Event

    is_event = inspect.isclass(thing) and issubclass(thing, Event) and thing is not Event
    return tuple(Event.__struct_fields__) if is_event else ()


def _signature(name: str, thing: Any) -> str:
    if _is_protocol(thing):
        return f"class {name}(Protocol)"
    text = f"{'class ' if inspect.isclass(thing) else ''}{name}{_parameters(thing)}"
    return text if len(text) <= 100 else _broken(text)


def _is_protocol(thing: Any) -> bool:
    return bool(getattr(thing, "_is_protocol", False))


def _tidy(signature: str) -> str:
    """No address of an object, no module of a type."""
    text = re.sub(r"<object object at 0x[0-9a-f]+>|<factory>", "...", signature)
    return re.sub(r"\b(?:llmlab|roofline|typing|collections)(?:\.\w+)*\.(?=[A-Z])", "", text)


def _broken(text: str) -> str:
    """One parameter a line."""
    name, _, rest = text.partition("(")
    inside, _, after = rest.rpartition(")")
    return f"{name}(\n    " + ",\n    ".join(_split(inside)) + f",\n){after}"


def _split(text: str) -> list[str]:
    """At the commas that lie in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _members(thing: type) -> Iterator[tuple[str, Any]]:
    """Methods and properties, those that this project's own classes hand down included."""
    own = [base for base in thing.__mro__ if base.__module__.partition(".")[0] in ("llmlab", "roofline")]
    every = {name: member for base in reversed(own) for name, member in vars(base).items()}
    for name, member in every.items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        function = property(function.func) if isinstance(function, cached_property) else function
        if name.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
            continue
        if inspect.getdoc(function) or _is_protocol(thing):
            yield name, function


def _member(name: str, member: Any) -> str:
    return name if isinstance(member, property) else f"{name}{_parameters(member)}"


def _first(member: Any) -> str:
    """The first paragraph, as one line."""
    return _escaped(" ".join((inspect.getdoc(member) or "").partition("\n\n")[0].split()))


def _doc(thing: Any) -> str:
    return "\n".join(line if line.startswith("    ") else _escaped(line) for line in (inspect.getdoc(thing) or "").splitlines())


def _escaped(line: str) -> str:
    """No HTML outside of backticks."""
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(line.split("`")))
