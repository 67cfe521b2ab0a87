"""The house rules that a machine can check: imports point down, torch stays where it belongs, functions stay short.

    roofline -> nouns, events -> workloads, tasks -> memory, kernels -> models -> scheduling, decoding -> execution
    -> the engine's floor -> cluster -> programs, training, privacy -> analysis, ui, papers -> what the apps share
    -> the command line, teaching
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS: list[tuple[str, ...]] = [
    ("roofline",),
    ("types", "seams", "config", "registry", "clock", "rng", "events"),
    ("workloads", "tasks"),
    ("memory", "kernels"),
    ("models",),
    ("scheduling", "decoding"),
    ("execution",),
    ("engine", "serving"),  # and every other file that lies directly in llmlab/
    ("cluster",),
    ("programs", "training", "privacy"),
    ("analysis", "ui", "papers"),
    ("applab",),
    ("cli", "tour", "__main__", "teaching"),
]
FILES = tuple(path.stem for path in (Path(__file__).resolve().parent.parent / "llmlab").glob("*.py"))
FLOOR_OF = dict.fromkeys(FILES, FLOORS.index(("engine", "serving")))
FLOOR_OF |= {name: level for level, names in enumerate(FLOORS) for name in names}
HEAVY = ("torch", "numba", "transformers", "tokenizers", "safetensors", "triton", "altair", "pandas", "scipy",
         "matplotlib", "marimo", "starlette", "uvicorn", "huggingface_hub")  # fmt: skip
# What must be importable where there is no torch.
LIGHT = (*FILES, "events", "memory", "scheduling", "workloads", "tasks", "cli", "decoding.autoregressive", "execution.base",
         "execution.cost", "execution.sim_executor")  # fmt: skip
# Names by which the papers go: no file of the core carries one.
PAPERS = ("adablock", "adrs", "alisa", "apex", "archon", "arcmemo", "aries", "astar", "batchllm", "clairvoyant", "cosine",
          "flashdecoding", "flashinfer", "hex_dllm", "hexgen", "hogwild", "itq3s", "layered_prefill", "llm4rec", "llm42",
          "llm_viewer", "llumnix", "lmql", "lora_drop", "nanoflow", "neo", "optscale", "parrot", "prunetir", "rlot", "saga",
          "splitwise", "stream2llm", "thunderagent", "tide", "tpi_llm", "xllm", "xlstm", "zo_inference")  # fmt: skip
MAX_LINES = 60


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "_data" not in path.parts)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources("llmlab", "roofline")}


def house_of(module: str) -> str | None:
    """The name in FLOORS that a module belongs to; None for the bare package `llmlab`."""
    first, *rest = module.split(".")
    if first == "roofline":
        return "roofline"
    return rest[0] if first == "llmlab" and rest else None


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of ours in a file, wherever it stands."""
    home = importlib.import_module("llmlab")._HOME
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                public = home.get(alias.name) if node.module == "llmlab" else None
                yield node.lineno, public or (whole if whole in MODULES else node.module or "")


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in MODULES if house_of(name) is not None and house_of(name) not in FLOOR_OF]
    assert homeless == [], "give the package a floor in FLOORS"


def test_imports_point_down_only() -> None:
    wrong = []
    for name, path in MODULES.items():
        here = house_of(name)
        for line, target in imported(path):
            there = house_of(target)
            if here is None or there is None:
                continue
            if FLOOR_OF[there] > FLOOR_OF[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({here}) imports {target} ({there}), which is above it")
    assert wrong == []


def test_roofline_knows_nothing_of_llmlab() -> None:
    found = [f"{module_name(p)}:{line} {target}" for p in sources("roofline") for line, target in imported(p)
             if target.split(".")[0] == "llmlab"]  # fmt: skip
    assert found == []


def test_the_ui_reads_runs_and_never_engines() -> None:
    forbidden = ("engine", "assembly", "backends", "executors", "plugins", "execution", "scheduling", "memory", "decoding", "kernels", "models", "llm", "running")
    found = [f"{module_name(p)}:{line} {target}" for p in sources("llmlab/ui") for line, target in imported(p)
             if house_of(target) in forbidden]  # fmt: skip
    assert found == []


def test_nothing_of_ours_is_called_datasets() -> None:
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_no_file_of_the_core_carries_the_name_of_a_paper() -> None:
    found = []
    for path in sources("llmlab"):
        if "papers" in path.parts:
            continue
        for part in path.relative_to(ROOT).with_suffix("").parts:
            found += [f"{path.relative_to(ROOT)}: {paper}" for paper in PAPERS if f"_{paper}_" in f"_{part}_"]
    assert found == []


@pytest.mark.parametrize("package", ["llmlab", "roofline"])
def test_functions_are_at_most_sixty_lines_long(package: str) -> None:
    long = []
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert long == []


# ----------------------------------------------------------------------------------- what an import costs
def loaded_after(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` are loaded in a fresh interpreter after `code`."""
    probe = f"{code}\nimport sys, json\nprint(json.dumps([n for n in {names!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_importing_llmlab_loads_nothing() -> None:
    assert loaded_after("import llmlab; dir(llmlab); llmlab.__version__", (*HEAVY, "numpy", "msgspec", "roofline")) == []
    assert loaded_after("import llmlab.types, llmlab.seams", (*HEAVY, "numpy", "roofline")) == []


def test_the_core_is_importable_without_torch() -> None:
    light = [name for name in MODULES if name.startswith(("roofline", *(f"llmlab.{package}" for package in LIGHT)))
             and not name.endswith("__main__")]  # fmt: skip
    assert len(light) > 40
    if loaded_after("import " + ", ".join(light), HEAVY):
        guilty = {name: found for name in light if (found := loaded_after(f"import {name}", HEAVY))}
        raise AssertionError(f"these load what is heavy: {guilty}")


SIMULATE = """
from llmlab import Engine, EngineConfig, SamplingParams, Workload, run
engine = Engine(model="lab-xs", executor="sim", num_blocks=32)
engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))
while engine.has_unfinished_requests():
    engine.step()
done = run(EngineConfig(model="llama-2-7b", executor="sim", hardware="a100"), Workload.poisson(rate=5.0, n=5, seed=0))
str(done.metrics), done.at(3), str(done.why(list(done.requests)[0]))
"""


def test_simulating_loads_no_torch() -> None:
    assert loaded_after(SIMULATE, HEAVY) == []
    blocked = "import sys\nfor name in ('torch', 'numba', 'transformers'):\n    sys.modules[name] = None\n"
    assert loaded_after(blocked + SIMULATE, ()) == []
