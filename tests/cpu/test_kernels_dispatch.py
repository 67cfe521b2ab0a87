"""One switch forces either kernel set; one number sets all threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from llmlab.kernels.dispatch import make_kernels, set_num_threads
from llmlab.kernels.pool import openmp
from llmlab.types import LabError


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    set_num_threads(before)


def test_auto_takes_numba_on_the_cpu_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMLAB_KERNELS", raising=False)
    assert make_kernels().name == "numba"
    assert make_kernels(device="meta").name == "torch"
    assert make_kernels(dtype=torch.float64).name == "torch"


def test_the_environment_forces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMLAB_KERNELS", "torch")
    assert make_kernels().name == "torch"
    assert make_kernels("numba").name == "numba"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"name": "cuda"}, "kernels"),
        ({"name": "numba", "device": "meta"}, "kernels"),
        ({"num_threads": 0}, "num_threads"),
    ],
)
def test_impossible_choices_are_named(arguments: dict, field: str) -> None:
    with pytest.raises(LabError, match=field):
        make_kernels(**arguments)


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_a_set_describes_its_choices(name: str) -> None:
    rows = make_kernels(name).describe()
    assert rows and all(row.op and row.implementation and row.why for row in rows)
    if name == "numba":
        assert {"linear", "paged_attention", "rope_store", "threads"} <= {row.op for row in rows}


def test_one_number_sets_torch_and_the_compiled_kernels() -> None:
    kernels = make_kernels("numba", num_threads=2)
    assert torch.get_num_threads() == 2
    assert kernels.pool.num_threads == (2 if openmp().parallel else 1)  # type: ignore[attr-defined]


def test_two_python_threads_may_run_kernels_at_once() -> None:
    """Each has its own scratch memory, and the GIL is free while a kernel runs."""
    kernels = make_kernels("numba", num_threads=1)
    linear = kernels.linear(torch.randn(512, 512))
    inputs = [torch.randn(rows, 512) for rows in (1, 3, 40, 90)]
    want, failures = [linear(x) for x in inputs], []

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        failures.extend(1 for _ in range(30) if not torch.equal(linear(x), y))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(inputs, want, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
