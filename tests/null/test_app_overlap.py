"""The page on CPU and GPU in parallel, without a browser."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from llmlab.applab import gallery, overlap
from llmlab.applab.overlap import ATTENTION, COPY, LINEAR, Bar, Glimpse, Machine, Record, Served


@pytest.fixture(scope="module")
def record() -> Record:
    return overlap.read(gallery.recorded_file("overlap.json"))


@pytest.mark.parametrize("placement", overlap.NAMES)
def test_what_the_page_opens_with_is_what_the_simulator_says_today(record: Record, placement: str) -> None:
    """Red after a change of costs or placements: `python -m llmlab.applab.record datasets/runs/overlap.json`."""
    now, then = overlap.served(Machine(), placement), record.served[placement]
    assert now.rate == pytest.approx(then.rate, rel=1e-6) and now.ttft == pytest.approx(then.ttft, rel=1e-6)
    assert {where: len(v) for where, v in now.tpot.items()} == {where: len(v) for where, v in then.tpot.items()}
    seen, before = overlap.glimpse(Machine(), placement), record.glimpses[placement]
    assert seen.length == pytest.approx(before.length, rel=1e-6) and (seen.near, seen.away) == (before.near, before.away)


@pytest.mark.parametrize("placement", overlap.NAMES)
def test_two_iterations_add_up(record: Record, placement: str) -> None:
    seen = record.glimpses[placement]
    assert seen.near + seen.away > 0
    for lane in overlap.LANES.values():
        own = sorted((bar for bar in seen.bars if bar.lane == lane), key=lambda bar: bar.start)
        assert all(0 <= bar.start < bar.end <= seen.length + 1e-3 for bar in own)
        assert all(a.end <= b.start + 1e-3 for a, b in itertools.pairwise(own)), f"{lane} does two things at once"
        assert seen.busy(lane) <= 1 + 1e-3
    assert (seen.busy("CPU") > 0) == (placement != "gpu_only")
    # The work of two iterations agrees with the rate of the run that they are taken from.
    assert seen.worth / seen.length * 1e3 == pytest.approx(record.served[placement].rate, rel=0.5)


def test_the_atlas_is_as_old_as_what_the_page_opens_with(record: Record) -> None:
    """Without it the page simulates every other setting, and says so."""
    atlas = overlap.read_atlas(gallery.recorded_file("overlap.msgpack.zst"))
    if atlas.mark != record.mark:
        pytest.skip("the atlas is older than overlap.json: `python -m llmlab.applab.record datasets/runs/overlap.msgpack.zst` (minutes)")
    offered = {Machine(speed, tokens).name for speed in overlap.SPEEDS for tokens in overlap.BUDGETS}
    assert set(atlas.machines) == offered, "a setting of the sliders is missing"
    for name, one in atlas.machines.items():
        assert set(one.served) == set(one.glimpses) == set(overlap.NAMES), name
        assert overlap.rates_chart(Machine(), one.served, ("neo", "apex")) is not None
    same = atlas.machines.get(Machine().name)
    if same is not None:
        assert {n: s.rate for n, s in same.served.items()} == pytest.approx({n: s.rate for n, s in record.served.items()})


def test_bars_without_a_gap_become_one() -> None:
    bars = [Bar("GPU", LINEAR, 0.0, 1.0), Bar("link to host", COPY, 1.0, 1.2), Bar("GPU", LINEAR, 1.0, 2.0), Bar("GPU", ATTENTION, 2.0, 3.0),
            Bar("GPU", LINEAR, 3.5, 4.0), Bar("GPU", LINEAR, 4.5, 5.0)]  # fmt: skip
    told = {(b.lane, b.kind, b.start, b.end) for b in overlap.merged(bars)}
    assert told == {("GPU", LINEAR, 0.0, 2.0), ("GPU", ATTENTION, 2.0, 3.0), ("GPU", LINEAR, 3.5, 4.0), ("GPU", LINEAR, 4.5, 5.0),
                    ("link to host", COPY, 1.0, 1.2)}  # fmt: skip


def made(**rates: float) -> dict[str, Served]:
    return {name: Served(rate, 1.0, {"GPU": (0.1, 0.2, 0.3), "CPU": (1.0, 2.0, 3.0)}) for name, rate in rates.items()}


def test_findings_follow_the_data() -> None:
    ahead = overlap.finding(Machine(), made(gpu_only=20, fastdecode=50, neo=80, apex=100))
    assert "apex makes 100 tokens a second: 5.0 times those of the GPU alone, 25% more than neo" in ahead
    assert "as many as apex" in overlap.finding(Machine(), made(gpu_only=20, fastdecode=50, neo=100, apex=100))
    slow = overlap.finding(Machine(2), made(gpu_only=20, fastdecode=10, neo=10, apex=30))
    assert slow.endswith("1.5 times those of the GPU alone (simulated)")
    lost = overlap.finding(Machine(), made(gpu_only=200, fastdecode=50, neo=80, apex=150))
    assert "the GPU alone is the fastest with 200" in lost and "apex, makes 25% fewer" in lost
    told = overlap.latency_finding(made(gpu_only=1, apex=1), ("apex", "apex"))
    assert told.count("under apex") == 1 and "200 ms on the GPU and 2.00 s on the host" in told
    seen = Glimpse(10.0, 2.0, "async_overlap", 1, 9, (Bar("GPU", LINEAR, 0.0, 5.0), Bar("CPU", ATTENTION, 0.0, 10.0)))
    assert overlap.glimpse_finding("apex", seen) == "apex: 5 ms an iteration, worth 200 tokens/s"
    assert (seen.busy("GPU"), seen.busy("CPU"), seen.busy("link to host")) == (0.5, 1.0, 0.0)


def test_every_choice_of_the_page_is_drawn(record: Record) -> None:
    pytest.importorskip("altair")
    for chosen in (("neo", "apex"), ("gpu_only", "gpu_only"), ("fastdecode", "gpu_only")):
        assert overlap.rates_chart(Machine(), record.served, chosen).to_dict()["title"]["text"]
        assert overlap.latency_chart(record.served, chosen).to_dict()["layer"]
    for until in (10.0, 2000.0):
        spec = overlap.gantt("apex", record.glimpses["apex"], until).to_dict()
        (rows,) = spec["datasets"].values()
        assert rows and all(0 <= row["t0"] < row["t1"] <= until for row in rows)


def test_the_record_can_be_written_and_read(record: Record) -> None:
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record
