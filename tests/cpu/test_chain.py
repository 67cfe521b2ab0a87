"""Chains of drafts as one compiled call: the tokens and the KV of going pass by pass, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_util import POISON, VOCAB, greedy, rough_sizes, serve, tiny_engine, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from models_util import PagedRunner, hf_greedy, hf_model, load_hf, tiny_config
from torch import Tensor

from llmlab.events import catalog as ev
from llmlab.kernels.dispatch import set_num_threads
from llmlab.kernels.layout import AttentionMetadata
from llmlab.models.loader import load_model
from llmlab.models.transformer import Transformer
from llmlab.runs import Run
from llmlab.seams import DraftLengths, DraftOutlook, EngineView
from llmlab.types import LabError, SamplingParams, WorkItem

# Families whose plain layers chain: biases, windows, norms of heads, scaled embeddings, tied and untied output layers.
CHAINED = ("gemma", "llama", "llama-bias", "llama3-rope", "mistral", "phi3", "qwen2", "qwen3")
OTHERS = ("gemma2", "mixtral")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for case in (*CHAINED, *OTHERS):
        made[case] = tmp_path_factory.mktemp(case)
        hf_model(tiny_config(case)).save_pretrained(made[case])
    return made


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    set_num_threads(2)
    yield
    set_num_threads(before)


class Texts(NamedTuple):
    """Rows whose KV is there up to `starts`: what is to be read of each text still, and how the caches stand."""

    unread: list[list[int]]
    starts: list[int]
    tables: list[list[int]]
    runner: PagedRunner


def read(model: Transformer, prompts: Sequence[Sequence[int]], counts: Sequence[int], block_size: int, span: range) -> Texts:
    """Prompts in scattered blocks with room for what follows them; the last one, two or three tokens are left. Slots that nobody
    wrote are NaN."""
    runner = PagedRunner(model, block_size, sum(-(-(len(p) + k) // block_size) for p, k in zip(prompts, counts)) + 3)
    tables = [[runner._free.pop() for _ in range(-(-(len(p) + k - 1) // block_size))] for p, k in zip(prompts, counts)]
    starts = [max(0, len(p) - 1 - i % 3) for i, p in enumerate(prompts)]
    for prompt, start, table in zip(prompts, starts, tables):
        if start:
            forward(model, prompt[:start], 0, table, runner, span)
    return Texts([list(p[start:]) for p, start in zip(prompts, starts)], starts, tables, runner)


def forward(model: Transformer, tokens: Sequence[int], start: int, table: list[int], runner: PagedRunner, span: range) -> Tensor:
    """The states behind tokens of one row, from position `start` on."""
    stop = start + len(tokens)
    meta = AttentionMetadata.build([len(tokens)], [stop], [table], runner.block_size)
    return model.forward(model.embed(torch.tensor(tokens)), torch.arange(start, stop), meta, runner.kv_caches, span)


def one_by_one(model: Transformer, texts: Texts, counts: Sequence[int], span: range) -> list[list[int]]:
    """What the chain must be: a pass for every token of every row alone."""
    made = []
    for text, start, table, count in zip(texts.unread, texts.starts, texts.tables, counts, strict=True):
        tokens, at = list(text), 0
        while at < len(text) + count - 1 and tokens[at] >= 0:
            state = forward(model, tokens[at : at + 1], start + at, table, texts.runner, span)
            at += 1
            if at == len(tokens):
                tokens.append(int(model.kernels.argmax(model.logits(state))))
        made.append(tokens)
    longest = max(len(text) + count for text, count in zip(texts.unread, counts))
    return [tokens + [-1] * (longest - len(tokens)) for tokens in made]


def same_bits(one: PagedRunner, other: PagedRunner) -> bool:
    pairs = zip((t for kv in one.kv_caches for t in kv), (t for kv in other.kv_caches for t in kv), strict=True)
    return all(torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) for a, b in pairs)


def check_chain(model: Transformer, prompts: Sequence[Sequence[int]], counts: Sequence[int], block_size: int, span: range) -> list[list[int]]:
    """The tokens behind each prompt."""
    with torch.inference_mode():
        texts, again = (read(model, prompts, counts, block_size, span) for _ in range(2))
        chain = model.chain(texts.runner.kv_caches)
        assert chain is not None
        tokens: list[list[int]] = chain.run(texts.unread, texts.starts, texts.tables, counts, span).tolist()
        assert tokens == one_by_one(model, again, counts, span)
    assert same_bits(texts.runner, again.runner)
    return [row[len(text) : len(text) + count] for row, text, count in zip(tokens, texts.unread, counts)]


def drawn(seed: int, rows: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(1, POISON) for _ in range(dice.choice([1, 2, 5, 16, 31]))] for _ in range(rows)]


@pytest.mark.parametrize("case", CHAINED)
def test_a_chain_is_its_passes(case: str, directories: dict[str, Path]) -> None:
    """Ragged rows of different lengths and counts, over blocks of several sizes, whole and with the last layer left out."""
    model = load_model(directories[case], "f32", kernels="numba").model
    chosen = [check_chain(model, drawn(seed, rows), counts, block_size, span)
              for seed, (rows, counts, block_size, span) in enumerate([
                  (3, (6, 1, 4), 1, range(3)), (1, (9,), 4, range(3)), (5, (2, 7, 7, 3, 1), 5, range(2)), (2, (3, 8), 16, range(3))])]  # fmt: skip
    assert len({token for tokens in chosen for row in tokens for token in row}) > 8, "such chains would show nothing"


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3"])
def test_a_chain_says_what_transformers_say(case: str, directories: dict[str, Path]) -> None:
    model, theirs = load_model(directories[case], "f32", kernels="numba").model, load_hf(directories[case])
    prompts = drawn(11, 3)
    tokens = check_chain(model, prompts, (6, 9, 7), 4, range(3))
    assert tokens == [hf_greedy(theirs, p, k) for p, k in zip(prompts, (6, 9, 7))]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_a_chain_of_narrow_numbers_is_its_passes(case: str, dtype: str, directories: dict[str, Path]) -> None:
    check_chain(load_model(directories[case], dtype, kernels="numba").model, drawn(3, 3), (6, 4, 5), 4, range(3))


def test_threads_change_nothing(directories: dict[str, Path], two_threads: None) -> None:
    check_chain(load_model(directories["qwen2"], "f32", kernels="numba").model, drawn(5, 3), (3, 2, 4), 3, range(3))


def test_long_texts(directories: dict[str, Path]) -> None:
    """Positions beyond one segment of attention, and a row that grows into another chunk."""
    model = load_model("lab-xs", "f32", kernels="numba").model
    dice = random.Random(0)
    check_chain(model, [[dice.randrange(3, 500) for _ in range(n)] for n in (509, 62)], (8, 8), 16, range(3))


def test_a_row_without_a_largest_logit_ends_alone(tmp_path: Path) -> None:
    write_model(tmp_path, poisoned=True)
    model = load_model(tmp_path, "f32", kernels="numba").model
    tokens = check_chain(model, [[1, 2, 3], [4, 5, POISON], [6]], (5, 5, 3), 4, range(3))
    assert tokens[1] == [-1] * 5 and min(tokens[0] + tokens[2]) >= 0


def test_one_logit_that_is_no_number_ends_a_row(tmp_path: Path) -> None:
    """As it does in the sampler, be the others as they may."""
    theirs = hf_model(tiny_config("llama"))
    with torch.no_grad():
        theirs.lm_head.weight[50] = float("nan")
    theirs.save_pretrained(tmp_path)
    assert check_chain(load_model(tmp_path, "f32", kernels="numba").model, [[1, 2], [3]], (2, 2), 4, range(3)) == [[-1, -1]] * 2


def test_who_has_no_chain(directories: dict[str, Path]) -> None:
    """The reference, experts, norms behind sublayers, narrow weights, scaled embeddings in narrow numbers, foreign caches."""
    models = [load_model(directories["llama"], "f32", kernels="torch"), load_model("lab-xs", "f32", kernels="numba", quantization="int8"),
              load_model(directories["gemma"], "bf16", kernels="numba")]  # fmt: skip
    models += [load_model(directories[case], "f32", kernels="numba") for case in OTHERS]
    for loaded in models:
        runner = PagedRunner(loaded.model, 4, 4)
        assert loaded.model.chain(runner.kv_caches) is None, loaded.name
    model = load_model(directories["llama"], "f32", kernels="numba").model
    assert model.chain(PagedRunner(model, 4, 4).kv_caches[:2]) is None


@pytest.mark.parametrize(("start", "table", "count", "field"), [
    (3, [0, 9], 2, "block_tables"), (3, [0], 2, "block_tables"), (250, list(range(8)) * 8, 9, "starts")])  # fmt: skip
def test_a_chain_that_would_leave_its_memory_is_refused(start: int, table: list[int], count: int, field: str, directories: dict[str, Path]
                                                        ) -> None:  # fmt: skip
    model = load_model(directories["llama"], "f32", kernels="numba").model
    chain = model.chain(PagedRunner(model, 4, 8).kv_caches)
    assert chain is not None
    with pytest.raises(LabError, match=field):
        chain.run([[1]], [start], [table], [count], range(3))


# ------------------------------------------------------------------------------------------ in the engine
PROMPTS = [[(i * 31 + n * 7) % VOCAB for i in range(n)] for n in (1, 3, 8, 17)] + [[4, 5, 6, 7] * 6, [9, 9, 9, 9, 9]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory)
    return directory


def ride(directory: Path, seed: int, chained: bool, **fields: Any) -> list[tuple[Any, ...]]:
    """What is drafted and verified while requests come, go, are preempted and share prefixes."""
    dice = random.Random(seed)
    with tiny_engine(directory, kernels="numba", **fields) as engine:
        model = engine.executor._drafter._source._model  # type: ignore[attr-defined]
        assert model._chain is not None
        if not chained:
            model.__dict__["_chain"] = None
        for i in range(dice.randint(3, 8)):
            params = greedy(dice.choice([1, 5, 14]), n=dice.choice([1, 1, 2]))
            if dice.random() < 0.2:  # drafts for a row that samples are made pass by pass, beside the others
                params = SamplingParams(max_tokens=9, temperature=1.0, ignore_eos=True)
            engine.add_request(dice.choice(PROMPTS), params, request_id=f"q{i}")
            for _ in range(dice.randint(0, 4)):
                engine.step()
            if dice.random() < 0.2:
                engine.abort(f"q{dice.randint(0, i)}")
        serve(engine)
        assert not engine.log.filter(ev.PolicyFailed)
        told = [(e.step, e.request, e.token_ids) for e in engine.log.filter(ev.Drafted)]
        return told + [(e.step, e.request, e.accepted, e.rejected) for e in engine.log.filter(ev.Verified)]


class Uneven:
    """Another length for each request, and none now and then. (Policies that weigh look at the clock.)"""

    name = "uneven"

    def lengths(self, view: EngineView, items: Sequence[WorkItem], outlook: DraftOutlook) -> DraftLengths:
        return DraftLengths(tuple([(item.tokens[1] + i) % (outlook.longest + 1) for i, item in enumerate(items)]), "as it comes")


@st.composite
def rough_rides(draw: st.DrawFn) -> dict[str, Any]:
    return draw(rough_sizes()) | {
        "tiering": draw(st.sampled_from(["recompute", "swap"])), "num_speculative_tokens": draw(st.integers(1, 6)),
        "draft_policy": draw(st.sampled_from(["fixed", Uneven()])), "acceptance": draw(st.sampled_from(["keyed", "rejection"])),
    }  # fmt: skip


@pytest.mark.parametrize("source", ["itself", "layer_skip"])
@given(fields=rough_rides(), seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_chains_draft_what_passes_draft(source: str, fields: dict[str, Any], seed: int, tiny: Path) -> None:
    """Prompts in chunks, preemptions, aborts, prefix hits, rows that sample: with chains and without, the same story."""
    fields |= {"speculation": str(tiny) if source == "itself" else source}
    assert ride(tiny, seed, True, **fields) == ride(tiny, seed, False, **fields)


def test_a_chain_reads_a_shared_prompt_once(tiny: Path) -> None:
    """Long texts are read in one pass up to their last token, and what the prefix cache finds is not read again."""
    read: list[list[int]] = []
    with tiny_engine(tiny, kernels="numba", num_blocks=100, speculation=str(tiny), num_speculative_tokens=3) as engine:
        source = engine.executor._drafter._source  # type: ignore[attr-defined]
        run = source._run
        source._run = lambda feeds, last: (read.append([len(feed.ids) for feed in feeds]), run(feeds, last))[1]
        for _ in range(2):
            engine.add_request(PROMPTS[4], greedy(7))
            serve(engine)
    assert read[0] == [len(PROMPTS[4])] and sum(map(sum, read[1:])) <= len(PROMPTS[4]) - 16


def test_a_model_that_chains_for_itself_is_always_right(tiny: Path) -> None:
    with tiny_engine(tiny, kernels="numba", num_blocks=200, speculation=str(tiny), num_speculative_tokens=5) as engine:
        for prompt in PROMPTS:
            engine.add_request(prompt, greedy(16))
        serve(engine)
    metrics = Run.of(engine.log).metrics
    assert metrics.drafted_tokens > 50 and metrics.acceptance_rate == 1.0
