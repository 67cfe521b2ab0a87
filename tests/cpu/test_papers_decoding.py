"""The experiments on drafts and on determinism run in their short form and say what kind of number each is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmlab.papers import EXPERIMENTS, llm42, silent, speculation


def test_the_experiment_on_drafts() -> None:
    report = speculation.run(True, lambda share, what: None)
    kinds = {finding.claim: (finding.kind, finding.holds) for finding in report.findings}
    assert kinds["drafts change no answer"] == ("measured", True)
    assert kinds["a10: one stream gains"] == ("simulated", True)
    assert kinds["a10: the length by goodput is never worse than 0.97 of plain"][0] == "simulated"
    assert kinds["this CPU: one stream gains 1.5 times with the better source"][0] == "measured"
    assert {f"this CPU: at batch 16 the length by {policy} is never worse than 0.97 of plain" for policy in speculation.CHOOSING} <= set(kinds)
    assert kinds["a10: six drafts cross 1.0 where the roofline says"] == ("simulated", True)
    assert [table.note.split(",")[0] for table in report.tables] == ["measured", "simulated", "measured"]
    for draw in report.figures.values():
        assert draw().to_dict()["title"]
    assert EXPERIMENTS[report.slug].endswith("speculation")


def test_the_roofline_predicts_that_drafts_stop_paying() -> None:
    prices = speculation.prices_on("a10")
    gains = [speculation.predicted_gain(prices, batch, 0.8, 4) for batch in (1, 16, 64, 256)]
    assert gains == sorted(gains, reverse=True) and gains[0] > 1.5 and gains[-1] < 1
    assert speculation.predicted_gain(prices, 16, [0.8] * 4, 4) == pytest.approx(gains[1])
    assert 16 < speculation.crossing([1, 16, 64, 256], dict(zip((1, 16, 64, 256), gains)).__getitem__) < 256  # type: ignore[operator]
    assert speculation.crossing([1, 16], lambda batch: 2.0) is None


@pytest.mark.parametrize("dtype", llm42.FORMATS)
def test_verified_requests_get_one_answer_in_the_short_experiment(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**llm42.SHAPE, "num_hidden_layers": 1}))
    rides = llm42.flipped(str(tmp_path), llm42.QUICK._replace(rides=3, prompts=2, tokens=8), True, dtype)
    assert (rides.several, rides.tokens) == (0.0, 48) and rides.flips < rides.tokens


def test_the_cost_of_verification_by_share_and_by_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**llm42.SHAPE, "num_hidden_layers": 1}))
    rates, rolled = llm42.throughputs(str(tmp_path), 4, 1)
    assert set(rates) == set(rolled) == {*llm42.SHARES, llm42.ALL_FIXED} and min(rates.values()) > 0
    sizes = llm42.QUICK._replace(grid_tokens=6)
    cells = llm42.grid(str(tmp_path), sizes, silent)
    assert set(cells) == {(n, w) for n in sizes.groups for w in sizes.windows} and min(c.rate for c in cells.values()) > 0
    assert all(0 <= cell.recomputed < 1 for cell in cells.values())
    assert llm42.grid_chart(cells).to_dict()["title"] and len(llm42._grid_table(cells).rows) == len(sizes.groups)
    assert [finding.kind for finding in llm42._grid_findings(cells)] == ["measured", "measured"]
