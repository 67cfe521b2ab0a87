"""Machine code that is kept belongs to the sources of today, parts of a kernel in other files included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llmlab
from llmlab.kernels import linear, norm_rope, numba_attention, pool, vector


def test_a_kernel_is_made_of_its_file_and_of_the_parts_that_it_takes() -> None:
    for module in (linear, norm_rope, numba_attention):
        parts = pool.parts_of(module.__name__)
        assert {module.__name__, vector.__name__, pool.__name__} <= set(parts)
        assert all(path.exists() for path in parts.values())
    assert linear.__name__ not in pool.parts_of(vector.__name__)


def test_a_part_that_changes_makes_its_kernels_anew(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("""
import importlib.util, sys
import numba, numpy as np
from llmlab.kernels import pool

def module(name, path):
    spec = importlib.util.spec_from_file_location("llmlab.kernels." + name, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made

module("probe_part", sys.argv[1] + "/probe_part.py")
probe = module("probe", sys.argv[1] + "/probe.py")
out = np.zeros(1, np.int64)
region = pool.Region(probe.body, "out")
pool.Pool(alone=True).run(region.call(1, out.ctypes.data))
print(out[0], "hits" if region._compiled.cache_hits else "none")
""")
    (tmp_path / "probe.py").write_text("""
from llmlab.kernels.pool import record
from llmlab.kernels.probe_part import write

def body(pointer):
    write(record(pointer).out)
""")
    told = []
    for amount in (3, 3, 4):
        (tmp_path / "probe_part.py").write_text(f"""
import numba
from numba import types
from numba.extending import intrinsic
from llmlab.kernels.vector import spliced

@intrinsic
def _write(typing, address, value):
    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store(args[1], place)
        return context.get_dummy_value()
    return types.void(types.int64, types.int64), codegen

@spliced
def write(address):
    _write(address, {amount})
""")
        environment = {**os.environ, "PYTHONPATH": str(Path(llmlab.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split())
    assert told == [["3", "none"], ["3", "hits"], ["4", "none"]]
