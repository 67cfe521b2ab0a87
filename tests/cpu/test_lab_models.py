"""The lab models: tokenizer, training, export, and what is shipped."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llmlab import tasks
from llmlab.training import cards, export, lab_tokenizer
from llmlab.training.data import BROAD, FOCUS, Source, demonstrate, encode
from llmlab.training.gates import CELLS, Answerer, measure, problems
from llmlab.training.net import SHAPES, Experts, LabLlama, Shape, from_llama, shape_of, to_llama
from llmlab.training.pretrain import Plan, Training, batches
from llmlab.types import ModelError

MODELS = Path(__file__).parents[2] / "datasets" / "models"
SHIPPED = sorted(path.parent for path in MODELS.glob("*/card.json"))
TINY = Shape(64, 2, 2, 1, 96)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return lab_tokenizer.build()


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    export.write_model(TINY, to_llama(LabLlama(TINY)), directory)
    return directory


# --- tokenizer ---

@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\n\t"), max_size=60))
def test_any_ascii_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert "".join(tokenizer.decode([i], skip_special_tokens=False) for i in ids) == text


def test_the_vocabulary_has_512_entries_with_digits_single(tokenizer: Any) -> None:
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(512))
    assert {t for t in vocab if any(c.isdigit() for c in t) and not t.startswith("<")} == set("0123456789")
    assert [vocab[t] for t in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    assert tokenizer.encode("1702", add_special_tokens=False).tokens == ["1", "7", "0", "2"]


def test_the_built_tokenizer_is_the_shipped_one(tokenizer: Any) -> None:
    for directory in SHIPPED:
        assert json.loads((directory / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())


def test_bos_is_the_same_in_training_and_when_asked(tokenizer: Any, tiny_directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_directory)
    for recipe in BROAD.mixture + FOCUS.mixture:
        demo = demonstrate(recipe, random.Random(3))
        row = encode(tokenizer, [demo])[0]
        asked = theirs(demo.prompt).input_ids
        assert row.ids[:len(asked)] == asked
        assert row.learn[:len(asked)] == [False] * len(asked)
        assert row.ids == theirs(demo.prompt + demo.completion).input_ids


def test_the_chat_template_makes_the_prompt_of_the_chat_suite(tiny_directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_directory)
    ids = theirs.apply_chat_template([{"role": "user", "content": "describe the river?"}], return_dict=False)
    assert ids == theirs("<chat>describe the river?<ans>").input_ids
    roles = ("user", "assistant", "user")
    several = [{"role": role, "content": text} for role, text in zip(roles, "abc", strict=True)]
    assert theirs.apply_chat_template(several, tokenize=False) == "<bos><chat>a<ans>b<eos><chat>c<ans>"


# --- the model ---

@pytest.mark.parametrize("name", sorted(SHAPES))
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    shape = shape_of(name)
    torch.manual_seed(1)
    mine = LabLlama(shape)
    for p in mine.parameters():
        torch.nn.init.normal_(p, std=0.08) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    export.write_model(shape, to_llama(mine), tmp_path)
    written = from_llama(shape, load_file(str(tmp_path / "model.safetensors")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 512, (2, 70))
    torch.testing.assert_close(written(ids), theirs(ids).logits, rtol=1e-4, atol=2e-4)
    assert shape.num_params == sum(p.numel() for p in mine.parameters())


def test_experts_are_a_weighted_sum_over_the_chosen_ones() -> None:
    shape = Shape(32, 1, 1, 1, 16, num_experts=4, top_k=2)
    experts, x = Experts(shape), torch.randn(9, 32)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.3)
    expected = []
    for row in x:
        scores = experts.router(row).softmax(-1).topk(2)
        share = scores.values / scores.values.sum()
        expected.append(sum(w * experts._expert(int(i), row[None])[0] for w, i in zip(share, scores.indices, strict=True)))
    torch.testing.assert_close(experts(x), torch.stack(expected))
    assert 1.0 <= experts.imbalance.item() <= 2.0


@pytest.mark.parametrize("shape", [TINY, shape_of("lab-moe")], ids=["dense", "experts"])
def test_llama_names_change_both_ways_without_loss(shape: Shape) -> None:
    model = LabLlama(shape)
    again = from_llama(shape, to_llama(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_padding_on_the_right_changes_nothing() -> None:
    model, ids = LabLlama(TINY), torch.randint(3, 512, (2, 20))
    padded = torch.cat((ids, torch.zeros(2, 12, dtype=torch.int64)), 1)
    torch.testing.assert_close(model(padded)[:, :20], model(ids))


def test_the_loss_looks_at_learned_tokens_only() -> None:
    model, ids = LabLlama(TINY), torch.randint(3, 512, (1, 12))
    learn = torch.zeros(1, 12, dtype=torch.bool)
    learn[0, 5:8] = True
    logits = model(ids).log_softmax(-1)
    expected = -torch.stack([logits[0, t - 1, ids[0, t]] for t in (5, 6, 7)]).mean()
    torch.testing.assert_close(model.loss(ids, learn), expected)


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="choose one of lab-xs, lab-s, lab-m, lab-moe"):
        shape_of("lab-q")


# --- training ---

def small_source(tokenizer: Any) -> Source:
    return Source(tokenizer, seed=1, focus_from=2, pool_rows=384)


def test_batches_follow_from_the_seed(tokenizer: Any) -> None:
    one, two = (small_source(tokenizer).pool(3) for _ in range(2))
    assert len(one) > 3
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.learn, b.learn) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].ids, small_source(tokenizer).pool(4)[0].ids)


def test_a_batch_stays_within_its_phase(tokenizer: Any) -> None:
    source = small_source(tokenizer)
    assert (source.phase(1), source.phase(2)) == (BROAD, FOCUS)
    assert all(b.ids.numel() <= BROAD.batch_tokens for b in source.pool(1))
    assert all(b.ids.numel() <= FOCUS.batch_tokens for b in source.pool(2))


def test_the_loss_falls(tokenizer: Any) -> None:
    plan = Plan("lab-xs", tokens=1e9, learning_rate=3e-3, warmup_steps=10)
    training = Training(plan, started=0.0)
    feed = batches(small_source(tokenizer), training.progress)
    losses = [float(training.step(next(feed), training.rate(0.0))) for _ in range(60)]
    assert sum(losses[:5]) / 5 > 5.5
    assert sum(losses[-10:]) / 10 < 3.2
    assert all(torch.isfinite(p).all() for p in training.averaged().parameters())


def test_a_stopped_run_goes_on_exactly_where_it_stopped(tokenizer: Any, tmp_path: Path) -> None:
    def steps(training: Training, count: int) -> None:
        feed = batches(small_source(tokenizer), training.progress)
        for _ in range(count):
            training.step(next(feed), 1e-3)

    plan = Plan("lab-xs", tokens=1e9)
    whole, first = Training(plan, 0.0), Training(plan, 0.0)
    steps(whole, 8)
    steps(first, 5)
    first.save(tmp_path)
    second = Training(plan, 99.0)
    second.restore(tmp_path)
    steps(second, 3)
    assert second.progress == whole.progress
    assert all(torch.equal(a, b) for a, b in zip(whole.master, second.master, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.average, second.average, strict=True))


def test_the_learning_rate_falls_with_the_budget() -> None:
    training = Training(Plan("lab-xs", minutes=10, warmup_steps=1), started=0.0)
    rates = [training.rate(60.0 * minute) for minute in (0, 5, 10, 20)]
    assert rates == pytest.approx([2e-3, 2e-3 * 0.525, 1e-4, 1e-4])


# --- export and cards ---

def test_an_exported_directory_loads_in_transformers(tiny_directory: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_directory, dtype=torch.float32)
    torch.manual_seed(0)
    mine = LabLlama(TINY).to(torch.bfloat16).float()
    ids = torch.randint(0, 512, (1, 30))
    torch.testing.assert_close(model(ids).logits, mine(ids), rtol=1e-4, atol=1e-4)


def test_export_writes_a_card(tmp_path: Path) -> None:
    directory = fresh_xs(tmp_path)
    card, = cards.load_cards(tmp_path)
    assert card.parameters == SHAPES["lab-xs"].num_params and card.finished
    assert card.sha256["model.safetensors"] == sha256(directory / "model.safetensors")
    assert "a test" in (directory / "README.md").read_text()


def test_a_missing_card_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llmlab\.training\.export"):
        cards.load_card(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"name": 3}', b"\xff\xfe", b""])
def test_a_bad_card_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"card\.json"):
        cards.load_card(tmp_path)


def test_the_wilson_interval_agrees_with_the_textbook() -> None:
    assert cards.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert cards.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-3)


def test_gate_problems_are_held_out() -> None:
    for cell in CELLS:
        assert all(p.split == "test" for p in problems(cell, 3))


def test_answers_are_those_of_transformers_and_keep_their_order(tmp_path: Path) -> None:
    directory = fresh_xs(tmp_path)
    answerer = Answerer(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompts = ["<slow>37*46?", "<chat>tell me about the river?<ans>", "<slow>12*13-45*67?", "12*13?"]
    together = answerer.answers(prompts, 25)
    for prompt, text in zip(prompts, together, strict=True):
        assert text == greedy(model, answerer.tokenizer, prompt, 25)
    assert len(set(together)) > 1
    assert answerer.answers(prompts, 9, 1.0) == answerer.answers(prompts, 9, 1.0)


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """The likeliest continuation, one whole forward pass per token."""
    ids = list(tokenizer.encode(prompt).ids)
    start = len(ids)
    while len(ids) < start + max_tokens and ids[-1] != 2:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode([i for i in ids[start:] if i != 2], skip_special_tokens=False))


def fresh_xs(tmp_path: Path) -> Path:
    training = Training(Plan("lab-xs", tokens=100.0), started=0.0)
    with torch.no_grad():
        for p in training.average:
            p.mul_(4 if p.ndim > 1 else 1)          # larger weights: answers that vary
    training.save(tmp_path / "state")
    log = {"step": 1, "tokens": 5, "loss": 1.5, "rate": 1e-4, "seconds": 60.0}
    (tmp_path / "state" / "log.jsonl").write_text(json.dumps(log) + "\n")
    export.export(tmp_path / "state", tmp_path / "lab-xs", machine="a test")
    return tmp_path / "lab-xs"


def test_a_gate_counts_right_answers(tmp_path: Path) -> None:
    gate = measure(Answerer(fresh_xs(tmp_path)), CELLS[0], "lab-xs", 4)
    assert gate.n == 4 and gate.right == 0 and gate.low == 0 and 0.3 < gate.high < 0.7


# --- what is shipped ---

def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_datasets_is_no_package() -> None:
    assert not list(MODELS.parent.rglob("__init__.py"))


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_model_is_what_its_card_says(directory: Path) -> None:
    card = cards.load_card(directory)
    shape = shape_of(directory.name)
    assert card.name == directory.name and card.parameters == shape.num_params
    assert card.sha256 == {name: sha256(directory / name) for name in card.sha256}
    assert (directory / "README.md").read_text() == cards.readme(card)
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.hidden_size, config.num_hidden_layers) == (shape.hidden_size, shape.num_layers)
    assert card.gates, "a shipped card has measured gates"
    assert len(cards.describe([card])) == len(card.gates)


@pytest.mark.parametrize("directory", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_model_solves_what_its_card_claims(directory: Path) -> None:
    """Forty fresh held-out problems: the accuracy lies in the card's interval, widened by this sample's own."""
    card = cards.load_card(directory)
    claimed = next(g for g in card.gates if g.name == "arith-1 slow greedy")
    cell = next(c for c in CELLS if (c.suite, c.k, c.style, c.method) == ("arith", 1, "slow", "greedy"))
    asked = problems(cell, 40, seed=7)
    texts = Answerer(directory).answers([p.prompt for p in asked], cell.max_tokens, 0.0)
    right = sum(tasks.verify(p, t) for p, t in zip(asked, texts, strict=True))
    low, high = cards.wilson(right, len(asked), z=3.0)
    assert low <= claimed.high and high >= claimed.low
