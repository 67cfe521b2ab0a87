"""Workloads: what is drawn, what is read from traces, and what answers to the system."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simlab import Watch, run_to_end, sim_engine

import llmlab
from llmlab.events import catalog as ev
from llmlab.running import Feed
from llmlab.types import ConfigError, LabError, RequestError, TraceError
from llmlab.workloads.arrivals import pauses
from llmlab.workloads.lengths import Quantiles, draw
from llmlab.workloads.source import Finished, Load, TimedRequest
from llmlab.workloads.twins import Twin, dispersion, rank_correlation, shipped_twins
from llmlab.workloads.workload import Workload

DATA = Path(__file__).parents[3] / "shared" / "data"
AZURE, MOONCAKE = DATA / "azure_llm_2023_conv.csv", DATA / "mooncake_synthetic.jsonl"
SMALL: dict[str, Any] = {"prompt": (3, 20), "output": (1, 9)}


def needs(path: Path) -> Any:
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not in ../shared/data")


def gaps(workload: Workload) -> np.ndarray:
    return np.diff(np.array(workload.arrivals))


def served(load: Load, **fields: Any) -> llmlab.Run:
    """A run whose executor checks every KV read, fed as `llmlab.run` does it."""
    engine = sim_engine(num_blocks=64, log_level=2, **fields)
    feed, watch = Feed(engine, load.source(engine.model.vocab_size)), Watch(engine)
    while feed.pour():
        for output in engine.step():
            feed.take(output)
        watch.check()
    return llmlab.Run.of(engine.log)  # type: ignore[return-value]


# --------------------------------------------------------------------------------------- arrivals
def test_poisson_draws_gaps_then_prompts_then_outputs_from_one_generator() -> None:
    drawn = Workload.poisson(rate=2.0, n=50, prompt="lognormal:256,1.0", output=(16, 128), seed=3)
    rng = np.random.default_rng((3, 0))
    assert drawn.arrivals == tuple(np.cumsum(rng.exponential(0.5, 50)).tolist())
    assert drawn.prompt_lens == tuple(np.maximum(1, np.rint(rng.lognormal(np.log(256), 1.0, 50))).astype(int).tolist())
    assert drawn.output_lens == tuple(rng.integers(16, 128, 50, endpoint=True).tolist())


@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 3.0])
def test_gamma_has_the_rate_and_the_burstiness_that_were_asked_for(cv: float) -> None:
    gap = gaps(Workload.gamma(rate=5.0, cv=cv, n=40_000, **SMALL))
    assert gap.mean() == pytest.approx(0.2, rel=0.05)
    assert gap.std() / gap.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_a_ramp_follows_its_rates_and_pauses_where_the_rate_is_zero() -> None:
    steps = [(100.0, 2.0), (50.0, 0.0), (200.0, 20.0), (10.0, 0.0)]
    arrivals = np.array(Workload.ramp(rates=steps, **SMALL).arrivals)
    start = 0.0
    for duration, rate in steps:
        count = int(((arrivals >= start) & (arrivals < start + duration)).sum())
        assert abs(count - duration * rate) <= 5 * (duration * rate) ** 0.5
        start += duration
    assert arrivals.max() < 350


def test_at_rate_stretches_time_and_nothing_else() -> None:
    slow = Workload.poisson(rate=1.0, n=500, seed=1, **SMALL)
    fast = slow.at_rate(8.0)
    assert len(fast) / fast.arrivals[-1] == pytest.approx(8.0, rel=0.02)
    np.testing.assert_allclose(np.array(fast.arrivals) / fast.arrivals[-1], np.array(slow.arrivals) / slow.arrivals[-1])
    assert (fast.prompt_lens, fast.output_lens) == (slow.prompt_lens, slow.output_lens)


@pytest.mark.parametrize(("think", "mean"), [(2.5, 2.5), ((1.0, 3.0), 2.0), ("exponential:4", 4.0), ("uniform:0,5", 2.5),
                                             ("lognormal:3,0", 3.0), (lambda rng, n: rng.random(n), 0.5)])  # fmt: skip
def test_pauses(think: Any, mean: float) -> None:
    assert pauses(think, np.random.default_rng(0), 20_000).mean() == pytest.approx(mean, rel=0.05)


# ---------------------------------------------------------------------------------------- lengths
@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=200), st.integers(0, 2**32))
@settings(max_examples=50)
def test_empirical_lengths_stay_inside_the_data_and_match_its_quantiles(data: list[int], seed: int) -> None:
    table = Quantiles.of(data)
    drawn = draw(table, np.random.default_rng(seed), 4000)
    assert min(data) <= drawn.min() and drawn.max() <= max(data)
    # the share of draws below a quantile is its level (binomial, 6 standard deviations)
    for level in (0.1, 0.5, 0.9):
        cut = float(table.at(np.array([level]))[0])
        below = (drawn < np.floor(cut)).mean()
        assert below <= level + 6 * (level * (1 - level) / 4000) ** 0.5


def test_length_models_have_the_moments_that_they_name() -> None:
    rng = np.random.default_rng(1)
    assert np.median(draw("lognormal:1020,1.1", rng, 50_000)) == pytest.approx(1020, rel=0.03)
    zipf = draw("zipf:8,1.0", rng, 50_000)
    assert (zipf == 1).mean() / (zipf == 4).mean() == pytest.approx(4.0, rel=0.1)
    assert set(draw((3, 5), rng, 500)) == {3, 4, 5} and set(draw(7, rng, 5)) == {7}
    twin = Twin.load("azure-conv-2023")
    assert np.median(draw("empirical:azure-conv-2023/output", rng, 20_000)) == pytest.approx(
        twin.output.at(np.array([0.5]))[0], rel=0.05
    )


# ----------------------------------------------------------------------------------------- tokens
def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_families_share_their_prefix_and_nothing_more() -> None:
    load = Workload.batch(12, prompt=(40, 60), output=1, shared_prefix=32, families=3)
    prompts = [r.prompt_token_ids for r in load.requests(50_000)]
    for i, a in enumerate(prompts):
        for j, b in enumerate(prompts[:i]):
            assert shared(a, b) == (32 if (i - j) % 3 == 0 else 0)


def test_a_prompt_shorter_than_the_prefix_keeps_a_token_of_its_own() -> None:
    prompts = [
        r.prompt_token_ids for r in Workload.batch(4, prompt=(5, 9), output=1, shared_prefix=32).requests(50_000)
    ]
    for a, b in itertools.pairwise(prompts):
        assert shared(a, b) == min(len(a), len(b)) - 1


def test_popular_families_come_more_often() -> None:
    load = Workload.batch(4000, prompt=9, output=1, shared_prefix=8, families=10, family_skew=1.0)
    heads = [r.prompt_token_ids[:8] for r in load.requests(1 << 20)]
    counts = sorted((heads.count(head) for head in set(heads)), reverse=True)
    assert len(counts) == 10 and counts[0] / counts[4] == pytest.approx(5.0, rel=0.25)


def test_a_prompt_does_not_depend_on_who_came_before() -> None:
    load = Workload.poisson(1.0, 30, seed=4, shared_prefix=6, families=4, **SMALL)
    tokens = load.tokens(999)
    later = [tokens.prompt(i, load.prompt_lens[i]) for i in reversed(range(30))]
    assert [r.prompt_token_ids for r in load.requests(999)] == later[::-1]
    assert all(len(r.prompt_token_ids) == n for r, n in zip(load.requests(999), load.prompt_lens))


LOADS: dict[str, Callable[[], Any]] = {
    "open": lambda: Workload.gamma(40.0, 2.0, 25, shared_prefix=8, families=2, **SMALL),
    "closed": lambda: Workload.batch(25, shared_prefix=8, **SMALL).closed_loop(4, think=(0.0, 0.02)),
    "sessions": lambda: Workload.sessions(30.0, 8, turns=(1, 4), prompt=(2, 9), output=(1, 6), think="exponential:0.01"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADS)
def test_a_load_is_a_value(kind: str) -> None:
    load = LOADS[kind]()
    assert load == LOADS[kind]() == pickle.loads(pickle.dumps(load)) and len(load) > 8
    once, again = (list(load.source(500).arriving()) for _ in range(2))
    assert once == again and [r.arrival for r in once] == sorted(r.arrival for r in once)


# ------------------------------------------------------------------------------------ being served
@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_feeding_in_time_leaves_the_same_history_as_feeding_all_at_once(overlap_depth: int) -> None:
    load = LOADS["open"]()
    eager = sim_engine(num_blocks=64, log_level=2, overlap_depth=overlap_depth)
    for r in load.requests(eager.model.vocab_size):
        eager.add_request(list(r.prompt_token_ids), r.sampling, arrival=r.arrival, metadata=r.metadata)
    run_to_end(eager, 2000)
    assert list(eager.log) == list(served(load, overlap_depth=overlap_depth).log_events)


def test_requests_are_drawn_when_they_arrive_and_not_before() -> None:
    drawn: list[float] = []

    class Spy:
        def arriving(self) -> Any:
            for request in LOADS["open"]().requests(256):
                drawn.append(request.arrival)
                yield request

        def on_finish(self, finished: Finished) -> Any:
            return ()

    engine = sim_engine(num_blocks=64)
    feed = Feed(engine, Spy())
    assert not drawn
    while feed.pour():
        assert sum(arrival > engine.clock.now() for arrival in drawn) <= 1
        engine.step()
    assert len(drawn) == 25


def arrivals_and_ends(run: llmlab.Run) -> tuple[dict[str, float], dict[str, float]]:
    specs = {e.spec.id: e.spec.arrival for e in run.events("RequestArrived")}
    return specs, {e.request: e.t for e in run.events("RequestFinished")}


@pytest.mark.parametrize("overlap_depth", [0, 1])
@pytest.mark.parametrize("concurrency", [1, 4, 40])
def test_a_client_asks_again_when_it_is_answered_and_has_thought(concurrency: int, overlap_depth: int) -> None:
    load = Workload.batch(25, **SMALL).closed_loop(concurrency, think=(0.0, 0.02))
    run = served(load, overlap_depth=overlap_depth)
    asked, ended = arrivals_and_ends(run)
    assert len(asked) == len(ended) == 25
    for index in range(25):
        turn, client = divmod(index, concurrency)
        before = index - concurrency
        expected = ended[f"c{client}.{turn - 1}"] + load.think[before] if turn else 0.0
        assert asked[f"c{client}.{turn}"] == pytest.approx(expected, abs=1e-12)
        assert run.requests[f"c{client}.{turn}"].num_output_tokens == load.work.output_lens[index]
    busy = sorted([(t, 1) for t in asked.values()] + [(t, -1) for t in ended.values()], key=lambda e: (e[0], e[1]))
    assert max(np.cumsum([step for _, step in busy])) <= concurrency


@pytest.mark.parametrize("overlap_depth", [0, 1])
def test_a_turn_contains_all_that_was_said_before(overlap_depth: int) -> None:
    load = Workload.sessions(
        30.0, 10, turns=(1, 4), prompt=(6, 9), output=(1, 6), think="exponential:0.01", shared_prefix=4
    )
    run = served(load, overlap_depth=overlap_depth)
    asked, ended = arrivals_and_ends(run)
    prompts = {e.spec.id: e.spec.prompt_token_ids for e in run.events("RequestArrived")}
    outputs: dict[str, tuple[int, ...]] = {}
    for event in run.events("TokensReleased"):
        outputs[event.request] = outputs.get(event.request, ()) + event.token_ids
    index = 0
    for session, turns in enumerate(load.turns):
        assert asked[f"s{session}.0"] == load.starts[session]
        for turn in range(1, turns):
            name, last = f"s{session}.{turn}", f"s{session}.{turn - 1}"
            history = prompts[last] + outputs[last]
            assert prompts[name][: len(history)] == history
            assert len(prompts[name]) - len(history) == load.work.prompt_lens[index + turn]
            assert asked[name] == pytest.approx(ended[last] + load.think[index + turn - 1], abs=1e-12)
        index += turns
    assert len(prompts) == len(load) == index
    assert len({p[:4] for p in prompts.values()}) == 1 and run.metrics.prefix_hit_rate > 0.2


@pytest.mark.parametrize("kind", LOADS)
def test_simulated_runs_of_a_load_fold_to_their_own_state(kind: str) -> None:
    config = llmlab.EngineConfig(model="lab-xs", executor="sim", hardware="t4", num_blocks=64, log_level=2)
    run = llmlab.run(config, LOADS[kind]())
    assert run.verify() == [] and run.metrics.num_finished == len(LOADS[kind]())


def test_a_refused_request_is_counted_and_the_rest_goes_on() -> None:
    config = llmlab.EngineConfig(model="lab-xs", executor="sim", hardware="t4", num_blocks=8, block_size=4, log_level=2)
    load = Workload((0.0, 0.1, 0.2, 9.0), (5, 90, 6, 90), (3, 3, 3, 3))
    run = llmlab.run(config, load)
    assert (run.metrics.num_finished, run.metrics.num_refused) == (2, 2)
    loop = llmlab.run(config, load.closed_loop(1))
    assert list(loop.requests) == ["c0.0", "c0.2"] and loop.metrics.num_refused == 2
    talk = llmlab.run(config, Workload.sessions(1.0, 1, turns=6, prompt=9, output=3, think=0.0))
    assert list(talk.requests) == ["s0.0", "s0.1"] and talk.metrics.num_refused == 1  # the history outgrew the pool
    with pytest.raises(RequestError, match="leaves no room"):
        llmlab.run(config, Workload.batch(3, prompt=90, output=1))


def test_every_refusal_in_a_row_is_answered_even_if_nobody_is_left() -> None:
    config = llmlab.EngineConfig(model="lab-xs", executor="sim", hardware="t4", num_blocks=8, block_size=4, log_level=2)
    lengths = (5, *[90] * 3000, 6)
    run = llmlab.run(config, Workload((0.0,) * 3002, lengths, (1,) * 3002).closed_loop(1))
    assert list(run.requests) == ["c0.0", "c0.3001"]


# ----------------------------------------------------------------------------------------- traces
AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURST_HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def write(tmp_path: Path, text: str | bytes, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_azure(tmp_path: Path) -> None:
    rows = (
        "2023-11-16 23:59:59.5000000,374,44\r\n",
        "2023-11-16 23:59:59.5000000,1,9\r\n",
        "2023-11-17 00:00:01.2500000,7,1\r\n",
    )
    load = Workload.azure(write(tmp_path, AZURE_HEAD + "".join(rows) + "\r\n"), seed=5)
    assert load == Workload((0.0, 0.0, 1.75), (374, 1, 7), (44, 9, 1), seed=5, about="trace")
    assert len(Workload.azure(write(tmp_path, AZURE_HEAD + "".join(rows)), n=2)) == 2
    aware = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,3,4\n"
    assert Workload.azure(write(tmp_path, aware)).arrivals == pytest.approx((0.0, 0.99007))


def test_burstgpt_leaves_failed_requests_out_and_reads_both_of_its_layouts(tmp_path: Path) -> None:
    old = (
        BURST_HEAD
        + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,0,0,0,API log\n45.5,GPT-4,10,0,10,API log\n118,GPT-4,4,2,6,API log\n"
    )
    load = Workload.burstgpt(write(tmp_path, old))
    assert (load.arrivals, load.prompt_lens, load.output_lens) == ((0.0, 113.0), (472, 4), (18, 2))
    assert Workload.burstgpt(write(tmp_path, old), model="GPT-4").prompt_lens == (4,)
    assert Workload.burstgpt(write(tmp_path, old), log_type="Conversation log").prompt_lens == (472,)
    new = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n" \
          "1,abc,2.5,ChatGPT,8,9,17,Conversation log\n2,,1.0,ChatGPT,3,4,7,API log\n"  # fmt: skip
    sessions = [r.session for r in Workload.burstgpt(write(tmp_path, new)).requests(99)]
    assert sessions == ["abc", None]


def mooncake_line(t: float, length: int, output: int, ids: list[int]) -> str:
    return json.dumps({"timestamp": t, "input_length": length, "output_length": output, "hash_ids": ids}) + "\n"


def test_mooncake_blocks_of_one_name_hold_the_same_tokens(tmp_path: Path) -> None:
    text = (
        mooncake_line(0, 1100, 3, [0, 1, 2]) + mooncake_line(500, 1024, 2, [0, 7]) + mooncake_line(2500, 600, 1, [0, 1])
    )
    load = Workload.mooncake(write(tmp_path, text))
    a, b, c = (r.prompt_token_ids for r in load.requests(32_000))
    assert load.arrivals == (0.0, 0.5, 2.5) and [len(a), len(b), len(c)] == [1100, 1024, 600]
    assert (shared(a, b), shared(a, c), shared(b, c)) == (512, 600, 512)
    assert load.requests(32_000) is not None and a == next(load.requests(32_000)).prompt_token_ids


def cached_by_the_trace(load: Workload, block_size: int) -> list[int]:
    """Tokens of each prompt that earlier prompts hold, by the trace's own names; whole blocks, never the last token."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for names, length in zip(load.blocks, load.prompt_lens):
        known = 0
        for end in range(block_size, length, block_size):  # a block that ends with the last token is computed
            if (*names[: -(-end // load.block_tokens)], end) in seen:
                known = end
        found.append(known)
        seen.update((*names[: -(-end // load.block_tokens)], end) for end in range(block_size, length + 1, block_size))
    return found


def test_the_prefix_cache_finds_what_a_mooncake_trace_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text, chains = "", [[0]]
    for number in range(30):
        chain = chains[rng.integers(len(chains))][: rng.integers(1, 5)] + [
            number * 10 + k for k in range(rng.integers(0, 4))
        ]
        chains.append(chain)
        text += mooncake_line(number * 1e6, int(16 * len(chain) - rng.integers(0, 16)), 1, chain)
    load = Workload.mooncake(write(tmp_path, text), block_tokens=16)
    engine = sim_engine(num_blocks=2000, block_size=4, log_level=2, max_num_batched_tokens=4096)
    feed = Feed(engine, load.source(engine.model.vocab_size))
    while feed.pour():
        engine.step()
    run = llmlab.Run.of(engine.log)
    found = [r.num_cached_tokens for r in run.requests.values()]
    assert found == cached_by_the_trace(load, 4) and sum(found) > 300


@needs(MOONCAKE)
def test_the_real_mooncake_trace() -> None:
    load = Workload.mooncake(MOONCAKE)
    assert len(load) == 3993 and sum(load.prompt_lens) / 3993 == pytest.approx(15_325, rel=1e-3)
    head = Workload.mooncake(MOONCAKE, n=25)
    far = Workload(tuple(1e4 * i for i in range(25)), head.prompt_lens, (1,) * 25, blocks=head.blocks)
    config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="h100", num_blocks=40_000,
                                 max_num_batched_tokens=1 << 16, log_level=1)  # fmt: skip
    run = llmlab.run(config, far)
    assert [r.num_cached_tokens for r in run.requests.values()] == cached_by_the_trace(far, 16)


BAD_LINES: list[tuple[str, str | bytes, str, str]] = [
    ("azure", "", "line 1", "no column TIMESTAMP"),
    ("azure", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,374\n", "line 1", "no column GeneratedTokens"),
    ("azure", AZURE_HEAD, "holds no request", ""),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:47,374\n", "line 3", "2 fields"),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,374,44\nyesterday,374,1\n", "line 3", "TIMESTAMP is not a date"),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,374,44\n2023-11-16 18:15:46+00:00,374,1\n", "line 3", "time zone"),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:48,1,1\n2023-11-16 18:15:47.9,1,1\n", "line 4", "before"),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,3.5,44\n", "line 2", "ContextTokens is not a whole number"),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,0,44\n", "line 2", "ContextTokens must be"),
    ("azure", AZURE_HEAD + "2023-11-16 18:15:46,1,-4\n", "line 2", "GeneratedTokens must be"),
    ("azure", AZURE_HEAD + f"2023-11-16 18:15:46,1,{10**30}\n", "line 2", "GeneratedTokens must be"),
    ("azure", AZURE_HEAD.encode() + b"2023-11-16 18:15:46,1,\xff\n", "not UTF-8", ""),
    ("azure", AZURE_HEAD + '2023-11-16 18:15:46,1,"4\n', "line 2", ""),
    ("burstgpt", BURST_HEAD + "5,ChatGPT,1,1,2,API log\n4,ChatGPT,1,1,2,API log\n", "line 3", "before"),
    ("burstgpt", BURST_HEAD + "soon,ChatGPT,1,1,2,API log\n", "line 2", "Timestamp is not a number"),
    ("burstgpt", BURST_HEAD + "nan,ChatGPT,1,1,2,API log\n", "line 2", "Timestamp is not a number"),
    ("burstgpt", BURST_HEAD + "5,ChatGPT,0,0,0,API log\n", "holds no request", ""),
    ("burstgpt", BURST_HEAD + "5,ChatGPT,1,x,1,API log\n", "line 2", "Response tokens is not"),
    ("mooncake", "", "holds no request", ""),
    ("mooncake", mooncake_line(0, 5, 1, [1]) + "\n{]\n", "line 3", "is not a request"),
    ("mooncake", '{"timestamp": 0, "input_length": 5, "output_length": 1}\n', "line 1", "hash_ids"),
    ("mooncake", mooncake_line(0, 5, 1, [1]).replace("5", '"5"'), "line 1", "input_length"),
    ("mooncake", mooncake_line(7, 5, 1, [1]) + mooncake_line(6, 5, 1, [1]), "line 2", "before"),
    ("mooncake", mooncake_line(0, 0, 1, []), "line 1", "input_length must be"),
    ("mooncake", mooncake_line(0, 5, 0, [1]), "line 1", "output_length must be"),
    ("mooncake", mooncake_line(0, 513, 1, [1]), "line 1", "do not cover 513 tokens"),
    ("mooncake", mooncake_line(0, 5, 1, [-1]), "line 1", "not be negative"),
    ("mooncake", b"\x28\xb5\x2f\xfd\x00", "not UTF-8", ""),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "where", "what"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_malformed_trace_is_an_error_with_the_line_number(kind: str, text: str | bytes, where: str, what: str,
                                                            tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(TraceError) as caught:
        getattr(Workload, kind)(write(tmp_path, text))
    assert where in str(caught.value) and what in str(caught.value)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    for kind in ("azure", "burstgpt", "mooncake"):
        with pytest.raises(TraceError, match=r"cannot be read .*docs/workloads\.md"):
            getattr(Workload, kind)(tmp_path / "nowhere")
        with pytest.raises(TraceError, match="cannot be read"):
            getattr(Workload, kind)(tmp_path)


# ------------------------------------------------------------------------------------------ twins
def test_a_twin_has_the_figures_that_it_was_drawn_from() -> None:
    twin = Twin.load("azure-conv-2023")
    assert "azure-conv-2023" in shipped_twins()
    drawn = Workload.like("azure-conv-2023", n=40_000, seed=1)
    again = Twin.of(drawn, twin.name, twin.source)
    assert again.rate == pytest.approx(twin.rate, rel=1e-3) and again.gap_cv == pytest.approx(twin.gap_cv, rel=0.03)
    assert again.rank_correlation == pytest.approx(twin.rank_correlation, abs=0.02)
    assert 0.1 < again.drift_sigma < 0.4
    for level in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99):
        for column in ("prompt", "output"):
            wanted, got = (getattr(t, column).at(np.array([level]))[0] for t in (twin, again))
            assert got == pytest.approx(wanted, rel=0.06), (column, level)


def test_like_keeps_the_rate_that_was_asked_for_even_in_a_short_run() -> None:
    for seed in range(5):
        load = Workload.like("azure-conv-2023", rate=4, n=1000, seed=seed)
        assert load.arrivals[-1] == pytest.approx(250.0)
    assert Workload.like("azure-conv-2023", rate=4, n=10, seed=1) == Workload.like(
        "azure-conv-2023", rate=4, n=10, seed=1
    )
    assert Workload.like("azure-conv-2023", n=10, shared_prefix=4).shared_prefix == 4


def test_a_twin_of_ones_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = rng.lognormal(5, 1, 3000).astype(int) + 1
    outputs = np.maximum(1, prompts // 2 + rng.integers(0, 40, 3000))
    load = Workload(
        tuple(np.cumsum(rng.gamma(0.25, 4 * 0.1, 3000)).tolist()), tuple(prompts.tolist()), tuple(outputs.tolist())
    )
    path = Twin.of(load, "mine", "drawn in a test").save(tmp_path / "mine.json")
    twin = Twin.load(path)
    assert twin.gap_cv == pytest.approx(2.0, rel=0.15) and twin.rank_correlation > 0.8
    drawn = Workload.like(path, n=5000)
    assert rank_correlation(np.array(drawn.prompt_lens), np.array(drawn.output_lens)) == pytest.approx(
        twin.rank_correlation, abs=0.03
    )
    assert draw(f"empirical:{path}/output", rng, 10).shape == (10,)
    with pytest.raises(TraceError, match="is no twin"):
        Twin.load(write(tmp_path, '{"name": 3}', "bad.json"))
    with pytest.raises(TraceError, match="cannot be read"):
        Twin.load(tmp_path / "none.json")


@needs(AZURE)
def test_the_shipped_twin_is_fitted_to_the_azure_trace_and_near_it() -> None:
    trace = Workload.azure(AZURE)
    shipped = Twin.load("azure-conv-2023")
    assert len(trace) == 19_366 and Twin.of(trace, shipped.name, shipped.source) == shipped
    drawn = shipped.draw(len(trace), seed=0)
    for column in ("prompt_lens", "output_lens"):
        real, twin = np.array(getattr(trace, column)), np.array(getattr(drawn, column))
        for level in (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
            assert np.quantile(twin, level) == pytest.approx(np.quantile(real, level), rel=0.06), (column, level)
        assert twin.mean() == pytest.approx(real.mean(), rel=0.03)
    for window, worst in ((1, 0.15), (10, 0.3), (60, 0.5)):
        real, twin = (dispersion(np.array(w.arrivals), window) for w in (trace, drawn))
        assert twin == pytest.approx(real, rel=worst), window


# -------------------------------------------------------------------------------------- bad input
W = Workload
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: W.poisson(0, 5), "rate"), (lambda: W.poisson(-1, 5), "rate"), (lambda: W.poisson(float("nan"), 5), "rate"),
    (lambda: W.poisson(float("inf"), 5), "rate"), (lambda: W.poisson("2", 5), "rate"), (lambda: W.poisson(1, 0), "n"),
    (lambda: W.poisson(1, 2.5), "n"), (lambda: W.poisson(1, True), "n"), (lambda: W.poisson(1, 5, seed=-1), "seed"),
    (lambda: W.poisson(1, 5, seed="x"), "seed"), (lambda: W.gamma(1, -1, 5), "cv"), (lambda: W.gamma(1, float("inf"), 5), "cv"),
    (lambda: W.gamma(0, 1, 5), "rate"), (lambda: W.ramp([]), "rates"), (lambda: W.ramp([(1, -2)]), "rates"),
    (lambda: W.ramp([(0, 2)]), "rates"), (lambda: W.ramp([(5, 0)]), "rates"), (lambda: W.ramp([5]), "rates"),
    (lambda: W.ramp(5), "rates"), (lambda: W.batch(3, prompt=0), "prompt"), (lambda: W.batch(3, prompt=(9, 3)), "prompt"),
    (lambda: W.batch(3, output="normal:3,4"), "output"), (lambda: W.batch(3, output="lognormal:x"), "output"),
    (lambda: W.batch(3, output="lognormal:inf,1"), "output"), (lambda: W.batch(3, output=None), "output"),
    (lambda: W.batch(3, output=("a", "b")), "output"), (lambda: W.batch(3, output=lambda rng, n: [1.0]), "output"),
    (lambda: W.batch(3, output=lambda rng, n: np.full(n, np.nan)), "output"),
    (lambda: W.batch(3, output="empirical:azure-conv-2023"), "empirical"),
    (lambda: W.batch(3, output="empirical:azure-conf-2023/prompt"), "twin"),
    (lambda: W.batch(3, families=0), "families"), (lambda: W.batch(3, shared_prefix=-1), "shared_prefix"),
    (lambda: W.batch(3, family_skew=float("nan")), "family_skew"), (lambda: W((0.0,), (1, 2), (1,)), "workload"),
    (lambda: W((1.0, 0.5), (1, 2), (1, 1)), "arrivals"), (lambda: W((-1.0,), (1,), (1,)), "arrivals"),
    (lambda: W((0.0,), (1,), (1,), blocks=((1,), (2,))), "blocks"), (lambda: W.batch(3).at_rate(2), "at_rate"),
    (lambda: W.poisson(1, 5).at_rate(0), "rate"), (lambda: W.batch(3).closed_loop(0), "concurrency"),
    (lambda: W.batch(3).closed_loop(2, think=-1), "think"), (lambda: W.batch(3).closed_loop(2, think="gamma:1,2"), "think"),
    (lambda: W.batch(3).closed_loop(2, think="exponential:-2"), "think"), (lambda: W.batch(3).closed_loop(2, think=None), "think"),
    (lambda: W.sessions(0, 3), "rate"), (lambda: W.sessions(1, 3, turns=0), "turns"), (lambda: W.like("azure"), "twin"),
    (lambda: W.like("azure-conv-2023", rate=0), "rate"), (lambda: W.like("azure-conv-2023", n=0), "n"),
    (lambda: Quantiles((0.0, 1.0), (3.0, 2.0)), "quantiles"), (lambda: Quantiles((0.0, 0.5), (1.0, 2.0)), "quantiles"),
    (lambda: Twin.of(W.batch(500), "x", "y"), "workload"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input_names_the_field(index: int) -> None:
    make, field = BAD[index]
    with pytest.raises(LabError) as caught:
        make()
    assert caught.value.field == field


def test_an_unknown_twin_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="azure-conv-2023"):
        Workload.like("azure-conv-2024")


def test_a_workload_shows_itself_in_a_line() -> None:
    text = repr(Workload.like("azure-conv-2023", n=100_000))
    assert len(text) < 160 and "100000 requests" in text and "azure-conv-2023" in text
    assert repr(Workload((), (), ())) == "Workload(0 requests)"


def test_timed_requests_are_what_runs_are_made_of() -> None:
    request = next(Workload.batch(1, prompt=4, output=3, temperature=0.5).requests(9))
    assert isinstance(request, TimedRequest) and request.metadata == {"output_len": 3}
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.ignore_eos) == (3, 0.5, True)
    assert ev.RequestArrived.LEVEL == 0
