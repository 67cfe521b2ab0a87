"""These tests run the GPU kernels in Triton's interpreter, in a process of their own.

The interpreter must be chosen before Triton is imported, so `tests/cpu/test_triton.py` starts them with
TRITON_INTERPRET=1; by hand: `TRITON_INTERPRET=1 python -m pytest tests/interpreted`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "cpu"))
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def _patched(original):
    """NumPy 2.4 turns arrays of one element into integers no longer, which Triton 3.6's interpreter asks of loop bounds."""

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


if not collect_ignore_glob:
    from triton.runtime import interpreter

    interpreter._patch_lang_tensor = _patched(interpreter._patch_lang_tensor)
