"""The experiment on expert offload, in its short form: what it claims to show, it shows."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llmlab.cli.app import app
from llmlab.papers import EXPERIMENTS, Report, experiment, silent
from llmlab.papers.moe_offload import DESKTOP, HOSTS, SERVER, costs, crossing
from llmlab.types import ConfigError


@pytest.fixture(scope="module")
def report() -> Report:
    return experiment("moe_offload").run(True, silent)


def test_nothing_that_it_compares_fails(report: Report) -> None:
    recency = "least-recently-used"  # on this routing, with less than two slots a layer, recency does not pay
    failed = [f.claim for f in report.findings if f.holds is False and recency not in f.claim]
    assert failed == []
    assert {f.kind for f in report.findings} <= {"measured", "simulated", "computed"}


def test_every_table_is_whole(report: Report) -> None:
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows) and table.rows and table.note


def test_the_best_policy_is_never_worse_than_the_naive_ones(report: Report) -> None:
    for host in HOSTS:
        table = next(t for t in report.tables if t.title == f"Decoding, {host.name}")
        rate = {row[0]: float(row[2]) for row in table.rows}
        assert rate["balanced"] >= 0.97 * max(rate["on_demand"], rate["cpu_experts"])
        assert rate["oracle"] >= rate["on_demand"]


def test_the_crossing_moves_with_the_host() -> None:
    assert crossing(DESKTOP) < crossing(SERVER)
    for host in HOSTS:
        n, price = crossing(host), costs(host)
        assert price.cpu(n - 1) <= price.fetch + price.device(n - 1) and price.cpu(n) > price.fetch + price.device(n)


def test_the_command_prints_json() -> None:
    done = CliRunner().invoke(app, ["papers", "run", "moe_offload", "--quick", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout[done.stdout.index("{") :])["slug"] == "moe_offload"


def test_an_unknown_paper_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="moe_offload"):
        experiment("moe_offlaod")
    assert all(slug == slug.lower() for slug in EXPERIMENTS)
