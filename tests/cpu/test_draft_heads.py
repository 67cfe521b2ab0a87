"""Draft heads: what a source sees of the target, that answers stay those of plain decoding, and what is refused."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_util import PRACTICE, Oracle, greedy, serve, tiny_engine, tokens_of, write_heads, write_model

import llmlab
from llmlab.decoding import draft_heads
from llmlab.decoding.draft_heads import FILE, DraftHeads, HeadWeights, save_heads
from llmlab.events import catalog as ev
from llmlab.models.loader import load_model
from llmlab.models.zoo import shipped_models
from llmlab.replaying import replay_decisions
from llmlab.runs import Run
from llmlab.seams import DraftContext, Proposal
from llmlab.training import heads
from llmlab.training.cards import CARD_FILE, load_card, readme
from llmlab.types import ConfigError, SamplingParams

PROMPTS = [[(i * 31 + n * 7) % 96 for i in range(n)] for n in (1, 3, 8, 17)] + [[4, 5, 6, 7] * 6]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    yield Oracle(directory, write_model(directory))


@pytest.fixture(scope="module")
def trained(oracle: Oracle) -> Any:
    return write_heads(oracle.directory)


# ------------------------------------------------------------------------------------------- the seam
class Watching:
    """Drafts as often right as wrong, and keeps what it is shown."""

    reads_hidden = True

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.seen = oracle, []  # type: ignore[var-annotated]

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        self.seen += [(list(c.token_ids), None if c.hidden is None else c.hidden.clone()) for c in contexts]
        return [Proposal(self._next(c)) for c in contexts]

    def _next(self, context: DraftContext) -> tuple[int, ...]:
        told = self.oracle.greedy(context.request.prompt_token_ids, 20)
        at = len(context.token_ids) - context.request.num_prompt_tokens
        right = told[at : at + context.k]
        hold = (at * at + context.request.num_prompt_tokens) % 5
        return (*right[:hold], *[(t + 1) % 96 for t in right[hold:]])


@pytest.mark.parametrize("budget", [3, 64])
def test_the_state_shown_is_the_one_that_the_newest_token_was_drawn_from(budget: int, oracle: Oracle) -> None:
    """After drafts that held, drafts that did not, prompts in chunks, and several requests in one step."""
    source = Watching(oracle)
    with tiny_engine(oracle.directory, speculation=source, max_num_batched_tokens=budget, num_blocks=120) as engine:
        names = [engine.add_request(prompt, greedy(12)) for prompt in PROMPTS]
        done = serve(engine)
        model: Any = engine.executor._model  # type: ignore[attr-defined]
        shown = [(tokens, hidden) for tokens, hidden in source.seen if hidden is not None]
        again = model.logits(torch.stack([hidden for _, hidden in shown])).argmax(-1).tolist()
    assert [tokens[-1] for tokens, _ in shown] == again
    assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(prompt, 12)] for prompt in PROMPTS]
    held = [len(e.accepted) for e in engine.log.filter(ev.Verified)]
    assert len(shown) > 20 and len(set(held)) > 2


def test_nobody_gathers_states_for_a_source_that_does_not_ask(oracle: Oracle) -> None:
    class Deaf(Watching):
        reads_hidden = False

    source = Deaf(oracle)
    with tiny_engine(oracle.directory, speculation=source) as engine:
        engine.add_request(PROMPTS[2], greedy(8))
        serve(engine)
    assert source.seen and all(hidden is None for _, hidden in source.seen)


# ---------------------------------------------------------------------------------------- heads that draft
def test_training_lowers_the_loss_and_the_drafts_hold(trained: Any, oracle: Oracle) -> None:
    made, samples = trained
    assert made.steps == 120 and made.loss < 0.5 * made.first_loss
    untrained = heads.Heads(heads.Output.of(oracle.directory), 64, 4)
    assert made.heads.acceptance(samples)[0] > max(0.5, 2 * untrained.acceptance(samples)[0])


def test_what_is_recorded_is_what_the_model_says(trained: Any, oracle: Oracle) -> None:
    """From each state the target's own output layer draws the first of the tokens that follow it."""
    _, samples = trained
    output = heads.Output.of(oracle.directory)
    assert (output.logits(samples.states).argmax(-1) == samples.tokens[:, 0]).all()
    assert (samples.tokens[:, 1:] == heads.ABSENT).any() and (samples.tokens[:, 0] >= 0).all()


def test_inference_and_training_compute_the_same_heads(trained: Any, oracle: Oracle) -> None:
    made, samples = trained
    source = DraftHeads(load_model(oracle.directory, "f32").model, made.heads.weights())
    texts = torch.cat([samples.past, samples.tokens[:, :1]], 1)[:40]
    with torch.inference_mode():
        states = source.step(samples.states[:40].clone(), [[t for t in text if t >= 0] for text in texts.tolist()])
        torch.testing.assert_close(states, made.heads(samples.states[:40], texts, made.heads.table()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"kernels": "numba"}, {"dtype": "bfloat16"}])
def test_heads_by_name(trained: Any, fields: dict[str, Any], oracle: Oracle) -> None:
    """Some of the prompts are those that they were trained on, so that some drafts hold."""
    prompts = [*PROMPTS, *PRACTICE[:8]]
    with tiny_engine(oracle.directory, speculation="heads", num_blocks=200, **fields) as engine:
        names = [engine.add_request(prompt, greedy(16)) for prompt in prompts]
        done = serve(engine)
    if "dtype" not in fields:
        assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(prompt, 16)] for prompt in prompts]
    metrics = Run.of(engine.log).metrics
    assert metrics.drafted_tokens >= metrics.accepted_tokens > 0 and not engine.log.filter(ev.PolicyFailed)


@pytest.mark.parametrize(("source", "tree"), [("heads", None), ("lab-xs", "2x2x1")])
@pytest.mark.parametrize("policy", ["goodput", "ewma"])
def test_what_a_measured_run_learned_of_its_drafts_a_replay_learns_too(source: str, tree: str | None, policy: str, tmp_path: Path) -> None:
    """From the file alone: the times and results that the log holds."""
    params, file = SamplingParams(max_tokens=40, temperature=0.0), tmp_path / "run.jsonl.zst"
    with llmlab.LLM("lab-s", speculation=source, num_speculative_tokens=5, draft_tree=tree, draft_policy=policy, num_threads=1) as llm:
        for prompt in ("12*34+5?", "37*46-23*58?"):
            llm.generate(prompt, params)
        Run(llm.log).save(file)
        known = llm.engine.scheduler.policies.drafting.book  # type: ignore[union-attr]
    run = Run.load(file)
    assert run.started.model["draft"] and len(run.steps) > 8 and known.outlook().acceptance is not None
    assert replay_decisions(run).differences == []


def test_a_proposal_ends_before_a_token_that_is_not_likely_enough(trained: Any, oracle: Oracle) -> None:
    def drafted(least: float) -> list[int]:
        model = load_model(oracle.directory, "f32").model
        source = DraftHeads(model, trained[0].heads.weights(), least=least)
        with tiny_engine(oracle.directory, speculation=source, num_blocks=200) as engine:
            names = [engine.add_request(prompt, greedy(12)) for prompt in (*PROMPTS, *PRACTICE[:4])]
            done = serve(engine)
        assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(prompt, 12)] for prompt in (*PROMPTS, *PRACTICE[:4])]
        metrics = Run.of(engine.log).metrics
        return [metrics.drafted_tokens, metrics.drafted_tokens - metrics.accepted_tokens]

    every, likely, none = drafted(0.0), drafted(0.5), drafted(1.01)
    assert every[0] > likely[0] > 0 and every[1] > likely[1] and none == [0, 0]


def test_sampled_answers_are_those_of_plain_decoding(trained: Any, oracle: Oracle) -> None:
    def answers(**fields: Any) -> list[Any]:
        params = [SamplingParams(max_tokens=12, temperature=t, top_p=p, ignore_eos=True) for t, p in ((0.7, 1.0), (0.3, 0.8), (0.0, 1.0))]
        with tiny_engine(oracle.directory, num_blocks=200, **fields) as engine:
            names = [engine.add_request(p, params[i % 3], request_id=str(i)) for i, p in enumerate(PROMPTS)]
            done = serve(engine)
            assert not engine.log.filter(ev.PolicyFailed)
        return [tokens_of(done[name]) for name in names]

    assert answers(speculation="heads") == answers()


# ------------------------------------------------------------------------------------------ what is refused
def _copied(oracle: Oracle, to: Path) -> Path:
    shutil.copytree(oracle.directory, to)
    (to / FILE).unlink(missing_ok=True)
    return to


def test_a_model_without_heads_says_how_to_train_them(oracle: Oracle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"has no {FILE} .*Train some: python -m llmlab.training.heads"):
        tiny_engine(_copied(oracle, tmp_path / "bare"), speculation="heads")


def test_heads_of_other_weights_are_refused(trained: Any, oracle: Oracle, tmp_path: Path) -> None:
    """Also where every size fits: states mean something to the weights that made them alone."""
    other = _copied(oracle, tmp_path / "other")
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    shutil.copy(oracle.directory / FILE, other / FILE)
    with pytest.raises(ConfigError, match=f"was trained for the states of '{oracle.directory.name}'"):
        tiny_engine(other, speculation="heads")


@pytest.mark.parametrize("name", HeadWeights._fields)
def test_heads_of_another_size_are_refused(name: str, trained: Any, oracle: Oracle, tmp_path: Path) -> None:
    wrong = _copied(oracle, tmp_path / "wrong")
    weights = trained[0].heads.weights()
    save_heads(weights._replace(**{name: getattr(weights, name)[..., :-1].contiguous()}), wrong)
    with pytest.raises(ConfigError, match=r"its \w+ is \[.*\] where the target needs"):
        tiny_engine(wrong, speculation="heads")


def test_damaged_heads_are_named(trained: Any, oracle: Oracle, tmp_path: Path) -> None:
    bad = _copied(oracle, tmp_path / "bad")
    (bad / FILE).write_bytes((oracle.directory / FILE).read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"heads\.safetensors.*does not read as draft heads"):
        tiny_engine(bad, speculation="heads")


def test_trees_are_refused(trained: Any, oracle: Oracle) -> None:
    with pytest.raises(ConfigError, match="heads draft chains only"):
        tiny_engine(oracle.directory, speculation="heads", draft_tree="2x2")


def test_the_simulator_has_no_states() -> None:
    with pytest.raises(ConfigError, match="the simulator has no states to draft from"):
        llmlab.Engine(model="llama-3.1-8b", executor="sim", hardware="a10", speculation="heads")


# --------------------------------------------------------------------------------------------- the shipped ones
@pytest.mark.parametrize("directory", [d for d in shipped_models().values() if (d / FILE).exists()], ids=lambda d: d.name)
def test_shipped_heads_are_what_the_card_says(directory: Path) -> None:
    card = load_card(directory).heads
    assert card is not None and card.sha256 == hashlib.sha256((directory / FILE).read_bytes()).hexdigest()
    assert (directory / FILE).stat().st_size < 2.5e6 and (directory / "README.md").read_text() == readme(load_card(directory))
    prompts = heads.problems(8, "test", seed=1)
    with llmlab.LLM(directory.name) as plain, llmlab.LLM(directory.name, speculation="heads", num_speculative_tokens=4) as drafting:
        params = SamplingParams(max_tokens=60, temperature=0.0)
        assert [o.outputs[0].token_ids for o in plain.generate(prompts, params)] == \
            [o.outputs[0].token_ids for o in drafting.generate(prompts, params)]  # fmt: skip
        assert drafting.run.metrics.acceptance_rate > 0.5 and drafting.run.metrics.tokens_per_verification > 2


def test_making_heads_writes_them_and_the_card(oracle: Oracle, tmp_path: Path) -> None:
    """The whole way on a shipped model, in seconds."""
    directory = tmp_path / "lab-xs"
    shutil.copytree(shipped_models()["lab-xs"], directory)
    card = heads.make(str(directory), heads.Plan(0.02, inner=16, rows=32, max_tokens=4, held_out=2), "a test")
    assert load_card(directory).heads == card and card.steps > 0 and len(card.acceptance) == heads.DEPTH
    assert "## Draft heads" in (directory / "README.md").read_text() and (directory / CARD_FILE).is_file()
    assert draft_heads.fingerprint(directory) == draft_heads.fingerprint(shipped_models()["lab-xs"])
