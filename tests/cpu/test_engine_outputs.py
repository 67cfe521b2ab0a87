"""What clients get from the real engine: stops, text, log-probabilities, aborts, errors, replays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from engine_util import POISON, VOCAB, Oracle, greedy, serve, text, tiny_engine, tokens_of, write_model

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.llm import LLM
from llmlab.outputs import CompletionOutput
from llmlab.replaying import replay_decisions
from llmlab.seams import RequestView
from llmlab.types import ConfigError, LabError, RequestError, SamplingParams, TokenLogprobs

PROMPT = [(i * 37 + 5) % VOCAB for i in range(13)]
OTHERS = [[(i * 31 + n * 7) % (VOCAB - 1) for i in range(n)] for n in (2, 9, 20)]
DEPTHS = pytest.mark.parametrize("overlap_depth", [0, 1, 2])


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    yield Oracle(directory, write_model(directory))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    directory = tmp_path_factory.mktemp("poisoned")
    return Oracle(directory, write_model(directory, poisoned=True))


def one(oracle: Oracle, params: SamplingParams, prompt: Any = PROMPT, **fields: Any) -> CompletionOutput:
    """The answer to one request among others."""
    with tiny_engine(oracle.directory, **fields) as engine:
        for other in OTHERS:
            engine.add_request(other, greedy(6))
        name = engine.add_request(prompt, params)
        return serve(engine)[name].outputs[0]


# -------------------------------------------------------------------------------------------- stops
@DEPTHS
def test_a_stop_token_ends_the_answer_and_is_kept_in_the_ids(oracle: Oracle, overlap_depth: int) -> None:
    expected = oracle.greedy(PROMPT, 20)
    stop = next(t for i, t in enumerate(expected) if i >= 3 and t not in expected[:i])
    at = expected.index(stop)
    out = one(oracle, greedy(20, stop_token_ids=(stop,)), overlap_depth=overlap_depth)
    assert (out.token_ids, out.finish_reason, out.stop_reason) == (expected[: at + 1], "stop", stop)
    assert out.text == text(expected[:at])


@DEPTHS
def test_min_tokens_holds_stop_tokens_back(oracle: Oracle, overlap_depth: int) -> None:
    """Until then they cannot even be sampled, as in vLLM."""
    expected = oracle.greedy(PROMPT, 20)
    stop = expected[1]
    out = one(oracle, greedy(20, stop_token_ids=(stop,), min_tokens=4), overlap_depth=overlap_depth)
    assert stop not in out.token_ids[:4] and len(out.token_ids) >= 4
    assert out.token_ids[:1] == expected[:1] and out.token_ids[1] != stop
    assert out.finish_reason == "length" or out.token_ids[-1] == stop


@DEPTHS
def test_the_end_of_sequence_ends_unless_ignored(overlap_depth: int, tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> None:
    expected = oracle.greedy(PROMPT, 20)
    eos = next(t for i, t in enumerate(expected) if i >= 2 and t not in expected[:i])
    directory = tmp_path_factory.mktemp("eos")
    write_model(directory, eos=eos)
    at = expected.index(eos)
    with tiny_engine(directory, overlap_depth=overlap_depth) as engine:
        ends = engine.add_request(PROMPT, SamplingParams(max_tokens=20, temperature=0))
        goes_on = engine.add_request(PROMPT, greedy(20))
        done = serve(engine)
    out = done[ends].outputs[0]
    assert (out.token_ids, out.finish_reason, out.stop_reason) == (expected[: at + 1], "stop", None)
    assert out.text == text(expected[:at])
    assert tokens_of(done[goes_on]) == [expected]


@DEPTHS
@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_stop_string_ends_the_answer_and_is_cut_from_its_text(oracle: Oracle, overlap_depth: int, length: int) -> None:
    expected = oracle.greedy(PROMPT, 20)
    whole = text(expected)
    stop = whole[6 : 6 + length]
    at = whole.index(stop)
    out = one(oracle, greedy(20, stop=("never\n", stop)), overlap_depth=overlap_depth)
    assert (out.text, out.finish_reason, out.stop_reason) == (whole[:at], "stop", stop)
    assert out.token_ids == expected[: at + length]


def test_a_stop_string_that_ends_with_the_last_token_wins_over_length(oracle: Oracle) -> None:
    whole = text(oracle.greedy(PROMPT, 8))
    stop = whole[-2:]
    if whole.index(stop) == 6:
        out = one(oracle, greedy(8, stop=(stop,)))
        assert (out.text, out.finish_reason, out.stop_reason) == (whole[:6], "stop", stop)


def test_the_answer_ends_at_the_models_length(oracle: Oracle) -> None:
    out = one(oracle, SamplingParams(max_tokens=None, temperature=0, ignore_eos=True), max_model_len=32)
    assert (len(out.token_ids), out.finish_reason) == (32 - len(PROMPT), "length")
    assert out.token_ids == oracle.greedy(PROMPT, 32 - len(PROMPT))


# ------------------------------------------------------------------------------------------- prompts
def test_text_ids_and_dicts_are_the_same_prompt(oracle: Oracle) -> None:
    with tiny_engine(oracle.directory) as engine:
        forms: list[Any] = [PROMPT, tuple(PROMPT), text(PROMPT), {"prompt": text(PROMPT)}, {"prompt_token_ids": PROMPT}]
        names = [engine.add_request(form, greedy(6)) for form in forms]
        done = serve(engine)
        assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(PROMPT, 6)]] * len(forms)
        assert done[names[2]].prompt == text(PROMPT) and list(done[names[2]].prompt_token_ids) == PROMPT
        for bad in ("", "\ud800", ["text", "in", "a", "list"], [{"role": "user", "content": "no template"}]):
            with pytest.raises(LabError):
                engine.add_request(bad, greedy(3))
        assert not engine.has_unfinished_requests()


def test_text_streams_in_order(oracle: Oracle) -> None:
    with tiny_engine(oracle.directory, overlap_depth=1) as engine:
        name = engine.add_request(PROMPT, greedy(10))
        seen = [o.outputs[0].text for _ in range(30) for o in engine.step() if o.request_id == name]
    assert seen[-1] == text(oracle.greedy(PROMPT, 10))
    assert all(b.startswith(a) and len(b) > len(a) for a, b in pairwise(seen))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stream_never_shows_a_part_of_a_stop_string(oracle: Oracle, length: int) -> None:
    whole = text(oracle.greedy(PROMPT, 12))
    stop = whole[7 : 7 + length]
    with LLM(str(oracle.directory), executor="torch", kernels="torch", device="cpu") as llm:
        params = greedy(12, stop=(stop,))
        answer = llm.generate(PROMPT, params)[0].outputs[0].text  # type: ignore[arg-type]
        assert answer == whole[: whole.index(stop)]
        assert "".join(llm.stream(PROMPT, params)) == answer


# --------------------------------------------------------------------------------- log-probabilities
def close(entry: TokenLogprobs, row: Any, token: int, num_top: int) -> None:
    values = row.sort(descending=True).values
    assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
    assert entry.rank == 1 + int((row > row[token]).sum())
    assert len(entry.top) == num_top
    assert [value for _, value in entry.top] == pytest.approx(values[:num_top].tolist(), abs=1e-4)


ROUGH: list[dict[str, Any]] = [
    {}, {"max_num_batched_tokens": 5}, {"num_blocks": 10, "admission": "optimistic"},
    {"num_blocks": 10, "tiering": "swap", "overlap_depth": 1, "max_num_batched_tokens": 6},
]  # fmt: skip


@pytest.mark.parametrize("fields", ROUGH, ids=str)
def test_logprobs_are_those_of_transformers(oracle: Oracle, fields: dict[str, Any]) -> None:
    out = one(oracle, greedy(10, logprobs=3), **fields)
    table = oracle.logprobs(PROMPT + out.token_ids)[len(PROMPT) - 1 :]
    assert out.logprobs is not None and len(out.logprobs) == len(out.token_ids) == 10
    for i, token in enumerate(out.token_ids):
        close(out.logprobs[i], table[i], token, 3)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("fields", ROUGH, ids=str)
def test_prompt_logprobs_are_those_of_transformers(oracle: Oracle, fields: dict[str, Any], n: int) -> None:
    """Also after a prefix that the cache holds, in chunks, and after a preemption in the middle of the prompt."""
    with tiny_engine(oracle.directory, **fields) as engine:
        for other in [PROMPT, *OTHERS]:
            engine.add_request(other, greedy(6))
        for _ in range(4):
            engine.step()
        name = engine.add_request(PROMPT, greedy(6, prompt_logprobs=2, logprobs=0, n=n))
        found = serve(engine)[name]
    table = oracle.logprobs(PROMPT)
    assert found.prompt_logprobs is not None and len(found.prompt_logprobs) == len(PROMPT) - 1
    for i, entry in enumerate(found.prompt_logprobs):
        close(entry, table[i], PROMPT[i + 1], 2)
    assert tokens_of(found) == [oracle.greedy(PROMPT, 6)] * n
    assert all(answer.logprobs and answer.logprobs[0].top == () for answer in found.outputs)


def test_more_logprobs_than_tokens_in_the_vocabulary_are_all_of_them(oracle: Oracle) -> None:
    out = one(oracle, greedy(2, logprobs=500))
    assert out.logprobs is not None and len(out.logprobs[0].top) == VOCAB


# -------------------------------------------------------------------------------------------- aborts
@DEPTHS
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_abort_in_flight_keeps_its_tokens_and_spares_its_neighbours(oracle: Oracle, overlap_depth: int, after: int) -> None:
    expected = oracle.greedy(PROMPT, 12)
    with tiny_engine(oracle.directory, overlap_depth=overlap_depth, num_blocks=24) as engine:
        gone = engine.add_request(PROMPT, greedy(12, n=2))
        kept = [engine.add_request(other, greedy(10)) for other in [*OTHERS, PROMPT]]
        for _ in range(after):
            engine.step()
        engine.abort(gone)
        again = engine.add_request(PROMPT, greedy(12))
        done = serve(engine)
    assert gone not in done
    assert [tokens_of(done[n]) for n in kept] == [[oracle.greedy(p, 10)] for p in [*OTHERS, PROMPT]]
    assert tokens_of(done[again]) == [expected]
    finished = {e.request: e for e in engine.log.filter(ev.RequestFinished)}
    for i in range(2):
        assert finished[f"{gone}#{i}"].reason == "abort"
        released = [t for e in engine.log.filter(ev.TokensReleased, request=f"{gone}#{i}") for t in e.token_ids]
        assert released == expected[: len(released)]


def test_the_executor_forgets_who_ended(oracle: Oracle) -> None:
    with tiny_engine(oracle.directory, overlap_depth=1) as engine:
        known: dict[str, Any] = engine.executor._tokens  # type: ignore[attr-defined]
        gone = [engine.add_request(other, greedy(4, n=2, prompt_logprobs=0)) for other in OTHERS]
        engine.step()
        engine.abort(gone[0])
        serve(engine)
        last = engine.add_request(PROMPT, greedy(4))
        serve(engine)
        assert list(known) == [last]


# -------------------------------------------------------------------------------------------- errors
@DEPTHS
@pytest.mark.parametrize("extra", [{}, {"prompt_logprobs": 1}, {"n": 2}, {"logprobs": 2}], ids=str)
def test_a_request_whose_numbers_break_ends_alone(poisoned: Oracle, overlap_depth: int, extra: dict[str, Any]) -> None:
    with tiny_engine(poisoned.directory, overlap_depth=overlap_depth, num_blocks=20, max_num_batched_tokens=9) as engine:
        kept = [engine.add_request(other, greedy(9)) for other in OTHERS]
        bad = engine.add_request([1, 2, POISON, 3, 4, 5], greedy(9, **extra))
        late = [engine.add_request(other, greedy(9)) for other in OTHERS]
        done = serve(engine)
    for answer in done[bad].outputs:
        assert (answer.finish_reason, answer.token_ids) == ("error", []) and "NaN" in (answer.error or "")
    assert [tokens_of(done[n]) for n in kept + late] == [[poisoned.greedy(p, 9)] for p in OTHERS] * 2
    assert {e.reason for e in engine.log.filter(ev.RequestFinished) if e.request.startswith(bad)} == {"error"}


@DEPTHS
def test_a_bias_outside_the_vocabulary_hurts_its_own_request_only(oracle: Oracle, overlap_depth: int) -> None:
    with tiny_engine(oracle.directory, overlap_depth=overlap_depth) as engine:
        bad = engine.add_request(PROMPT, greedy(5, logit_bias={VOCAB: 1.0}))
        kept = [engine.add_request(other, greedy(7)) for other in OTHERS]
        done = serve(engine)
    assert done[bad].outputs[0].finish_reason == "error" and "logit_bias" in (done[bad].outputs[0].error or "")
    assert [tokens_of(done[n]) for n in kept] == [[oracle.greedy(p, 7)] for p in OTHERS]


@DEPTHS
def test_who_was_swapped_out_in_vain_ends_with_the_reason(oracle: Oracle, overlap_depth: int) -> None:
    """The first allocation of host memory fails: whoever was being moved there must not read garbage when it returns."""
    squeezed = {"num_blocks": 8, "block_size": 4, "tiering": "swap", "num_host_blocks": 16, "overlap_depth": overlap_depth}
    with tiny_engine(oracle.directory, **squeezed) as engine:
        cache: Any = engine.executor.cache  # type: ignore[attr-defined]
        allocate, refused = cache._pair, []

        def fails_once(*args: Any) -> Any:
            cache._pair = allocate
            refused.append(args)
            raise MemoryError("no room for the host tier")

        cache._pair = fails_once
        names = {engine.add_request(other, greedy(12)): other for other in OTHERS * 2}
        done = serve(engine)
        swapped = {move.request for plan in engine.log.filter(ev.StepPlanned) for move in plan.moves if move.kind == "swap_out"}
    assert refused and swapped
    ended = {name: done[name].outputs[0] for name in names if done[name].outputs[0].finish_reason == "error"}
    assert len(ended) == 1 and set(ended) <= swapped
    for output in ended.values():
        assert "swap_out" in (output.error or "") and "no room for the host tier" in (output.error or "")
    for name in set(names) - set(ended):
        assert tokens_of(done[name]) == [oracle.greedy(names[name], 12)]


@DEPTHS
@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), IndexError("kernel"), KeyError("weight"), MemoryError()])
def test_a_step_that_fails_loses_its_requests_and_not_the_engine(oracle: Oracle, overlap_depth: int, failure: Exception) -> None:
    with tiny_engine(oracle.directory, overlap_depth=overlap_depth) as engine:
        model: Any = engine.executor._model  # type: ignore[attr-defined]
        forward = model.forward
        lost = [engine.add_request(other, greedy(9)) for other in OTHERS]
        for _ in range(4):
            engine.step()

        def fails(*args: Any, **kwargs: Any) -> Any:
            model.forward = forward
            raise failure

        model.forward = fails
        done = {output.request_id: output for output in engine.step() if output.finished}
        later = [engine.add_request(other, greedy(9)) for other in OTHERS]
        done |= serve(engine)
    for name in lost:
        assert done[name].outputs[0].finish_reason == "error" and type(failure).__name__ in (done[name].outputs[0].error or "")
    assert [tokens_of(done[n]) for n in later] == [[oracle.greedy(p, 9)] for p in OTHERS]


def test_configurations_that_the_model_cannot_meet(oracle: Oracle) -> None:
    with pytest.raises(LabError, match="max_model_len"):
        tiny_engine(oracle.directory, max_model_len=100_000)
    with pytest.raises(LabError, match="unknown model"):
        Engine(model="lab-ss", executor="torch")
    with pytest.raises(ConfigError, match="cuda"):
        tiny_engine(oracle.directory, device="cuda")


# ------------------------------------------------------------------------------- logs of real runs
def timeless(engine: Engine) -> list[Any]:
    from llmlab.events.replay import timeless as strip

    return [strip(e) for e in engine.log if not isinstance(e, ev.RunStarted)]


def rough_run(oracle: Oracle, **fields: Any) -> Engine:
    """Everything at once, driven by steps and not by the clock."""
    engine = tiny_engine(oracle.directory, **{"num_blocks": 12, "tiering": "swap", "max_num_batched_tokens": 9, **fields})
    with engine:
        for i, prompt in enumerate([PROMPT, *OTHERS, PROMPT]):
            engine.add_request(prompt, SamplingParams(max_tokens=9, temperature=i % 2, n=1 + i % 2, seed=i), arrival=0.0)
            engine.step()
        engine.abort("r3")
        with pytest.raises(RequestError):
            engine.add_request([], greedy(1))
        serve(engine)
    return engine


@DEPTHS
def test_two_runs_of_one_seed_differ_in_nothing_but_times(oracle: Oracle, overlap_depth: int) -> None:
    first, second = (rough_run(oracle, overlap_depth=overlap_depth) for _ in range(2))
    assert timeless(first) == timeless(second)
    assert first.log.filter(ev.RequestPreempted)


@DEPTHS
def test_a_real_run_replays_and_verifies_without_its_model(oracle: Oracle, overlap_depth: int) -> None:
    run = Run.of(rough_run(oracle, overlap_depth=overlap_depth).log)
    assert run.mode == "measured" and run.verify() == []
    assert replay_decisions(run).differences == []
    assert all(s.measured is not None and s.measured > 0 for s in run.steps)
    for name, request in run.requests.items():
        assert sum(run.why(name).parts.values()) == pytest.approx(request.e2e, abs=1e-9)


class _ByTheClock:
    """Keys that carry the very instant at which the request entered the queue."""

    name = "by_the_clock"
    refresh = "arrival"

    def key(self, request: RequestView, now: float) -> float:
        return -now


def test_a_policy_that_looks_at_the_clock_replays_too(oracle: Oracle) -> None:
    engine = tiny_engine(oracle.directory, ordering=_ByTheClock(), num_blocks=12)
    with engine:
        for prompt in [*OTHERS, PROMPT, *OTHERS]:
            engine.add_request(prompt, greedy(8))
        serve(engine)
    assert engine.log.filter(ev.RequestPreempted)
    assert replay_decisions(Run.of(engine.log), ordering=_ByTheClock()).differences == []
