"""A tiny model on disk with a tokenizer of one character a token, and transformers as the judge of its tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from models_util import hf_greedy, hf_logits, hf_model, tiny_config

from llmlab.engine import Engine
from llmlab.events import catalog as ev
from llmlab.events.state import LabState
from llmlab.outputs import RequestOutput
from llmlab.types import SamplingParams

VOCAB = 96
PRACTICE = [[(7 * i + j) % (VOCAB - 1) for j in range(1 + i % 5)] for i in range(24)]  # prompts that heads learn from
POISON = VOCAB - 1  # a token whose embedding is NaN in the poisoned model


def char(token: int) -> str:
    return chr(32 + token) if token < VOCAB - 1 else "é"


def text(tokens: Sequence[int]) -> str:
    return "".join(map(char, tokens))


def write_model(directory: Path, eos: int | None = None, poisoned: bool = False, vocab: int = VOCAB, seed: int = 0, case: str = "llama"
                ) -> Any:  # fmt: skip
    """Save the tiny model and its tokenizer; transformers' own model of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = tiny_config(case)
    config.eos_token_id, config.vocab_size = eos, vocab
    model = hf_model(config, seed)
    if poisoned:
        with torch.no_grad():
            model.get_input_embeddings().weight[POISON] = float("nan")
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer = Tokenizer(models.WordLevel({char(i): i for i in range(vocab)}, unk_token=char(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


class Oracle:
    """What transformers says about the model in `directory`."""

    def __init__(self, directory: Path, model: Any) -> None:
        self.directory = directory
        self._model = model
        self._greedy = functools.cache(lambda prompt, count: tuple(hf_greedy(model, prompt, count)))

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        return list(self._greedy(tuple(prompt), count))

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities after every token, [len(tokens), V]."""
        return torch.log_softmax(hf_logits(self._model, tokens), -1)


def tiny_engine(directory: Path, **fields: Any) -> Engine:
    """A real engine with plain torch kernels, everything logged and checked."""
    base: dict[str, Any] = {
        "model": str(directory), "executor": "torch", "kernels": "torch", "device": "cpu", "block_size": 4,
        "num_blocks": 64, "max_num_batched_tokens": 64, "max_num_seqs": 16, "log_level": 3, "check_interval": 1,
    }  # fmt: skip
    return Engine(**{**base, **fields})


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


def serve(engine: Engine, max_steps: int = 3000) -> dict[str, RequestOutput]:
    """Run to the end; the finished outputs. The log's fold must agree with every recorded hash, no memory may be lost."""
    done: dict[str, RequestOutput] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            break
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert not engine.has_unfinished_requests(), f"not finished after {max_steps} steps"
    state = LabState()
    for event in engine.log:
        state.apply(event)
        if isinstance(event, ev.StepFinished):
            assert (event.state_hash, event.blocks_hash) == (state.state_hash, state.blocks_hash), event.step
    memory = engine.scheduler.memory
    assert (memory.pool.num_free, memory.num_quarantined) == (memory.pool.num_blocks, 0)
    assert memory.host.num_free == memory.host.num_blocks
    return done


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [answer.token_ids for answer in output.outputs]


@st.composite
def rough_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Memory and batches so small that requests are cut into chunks, preempted, swapped and made to share."""
    block_size = draw(st.sampled_from([1, 2, 3, 5, 8]))
    return {
        "block_size": block_size, "num_blocks": -(-draw(st.integers(44, 90)) // block_size),
        "max_num_batched_tokens": draw(st.sampled_from([1, 3, 7, 20, 64])), "max_num_seqs": draw(st.integers(1, 8)),
        "overlap_depth": draw(st.integers(0, 2)), "enable_prefix_caching": draw(st.booleans()),
        "num_host_blocks": draw(st.sampled_from([None, 0, 10])),
    }  # fmt: skip


def check_greedy_answers(engine: Engine, oracle: Oracle, longest: int) -> None:
    """All that was released is the beginning of what the model says, and all of it unless the request was aborted."""
    specs = {e.spec.id: e.spec for e in engine.log.filter(ev.RequestArrived)}
    outputs: dict[str, list[int]] = {}
    for event in engine.log.filter(ev.TokensReleased):
        outputs.setdefault(event.request, []).extend(event.token_ids)
    for event in engine.log.filter(ev.RequestFinished):
        spec, tokens = specs[event.request], outputs.get(event.request, [])
        assert tokens == oracle.greedy(spec.prompt_token_ids, longest)[: len(tokens)], event
        assert event.reason == "abort" or len(tokens) == spec.sampling.max_tokens


def write_heads(directory: Path, steps: int = 120) -> tuple[Any, Any]:
    """Train draft heads on a few answers of the tiny model and save them beside it; (what training said, its samples)."""
    from llmlab.decoding.draft_heads import save_heads
    from llmlab.training import heads

    plan = heads.Plan(inner=64, window=4, levels=3, rows=128, rate=1e-2, max_tokens=20)
    samples = heads.record(str(directory), PRACTICE, plan)
    made = heads.train(heads.Output.of(directory), samples, plan, steps)
    save_heads(made.heads.weights(), directory)
    return made, samples
