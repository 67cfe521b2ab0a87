"""Task suites with verifiers: seeded generators in plain Python, without files and without torch.

    >>> import random
    >>> from llmlab import tasks
    >>> problem = tasks.suite("arith").problem(random.Random(0), k=2, style="slow", split="test")
    >>> tasks.verify(problem, "...#368")
    False
"""

from __future__ import annotations

from llmlab.tasks.base import Demonstration, Oracle, Problem, Segment, Split, Suite, split_of
from llmlab.tasks.registry import SUITE_NAMES, suite, verify
from llmlab.tasks.tour import tour_problems

__all__ = ["SUITE_NAMES", "Demonstration", "Oracle", "Problem", "Segment", "Split", "Suite", "split_of", "suite",
           "tour_problems", "verify"]
