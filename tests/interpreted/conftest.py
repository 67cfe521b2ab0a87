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


def _widening(original):
    """The interpreter keeps bfloat16 as 16-bit integers, and multiplies matrices of them as integers. A product of two
    bfloat16 numbers is exact in float32, and tensor cores add in float32: so that is what is multiplied."""

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, d, *more):
        return original(self, wide(a), wide(b), d, *more)

    return create_dot


if not collect_ignore_glob:
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang_tensor = _patched(interpreter._patch_lang_tensor)
    interpreter.InterpreterBuilder.create_dot = _widening(interpreter.InterpreterBuilder.create_dot)
