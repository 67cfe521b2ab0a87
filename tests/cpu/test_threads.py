"""How many threads: as asked, bounded by the environment, measured otherwise."""

from __future__ import annotations

import pytest
import torch

from llmlab.execution import threads


@pytest.fixture(autouse=True)
def restore_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_asked_for_is_taken() -> None:
    assert threads.choose_threads(1) == (1, "as asked")
    assert torch.get_num_threads() == 1


def test_environment_bounds_the_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads.available_cores() == 1
    assert threads.choose_threads().num_threads == 1


@pytest.mark.parametrize(("together", "alone", "chosen"), [(1.0, 2.0, 2), (1.0, 1.1, 1), (50.0, 1.0, 1)])
def test_team_must_pay(monkeypatch: pytest.MonkeyPatch, together: float, alone: float, chosen: int) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    monkeypatch.setattr(threads, "_median_seconds", lambda data, n: alone if n == 1 else together)
    choice = threads.choose_threads()
    assert choice.num_threads == torch.get_num_threads() == chosen
    assert "times as fast" in choice.why
