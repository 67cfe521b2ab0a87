"""A device that stops answering in mid-run: requests begin anew where it can be replaced, and end with the reason where it
cannot. The device is the CPU with a queue of its own; the fault is injected into the model's forward pass."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_util import VOCAB, greedy, serve, tiny_engine, tokens_of, write_model

from llmlab import backends, executors
from llmlab.config import EngineConfig
from llmlab.events import catalog as ev
from llmlab.events.trace import Run
from llmlab.execution import stream_executor
from llmlab.execution.device_line import HostLine, answers
from llmlab.models.transformer import Transformer
from llmlab.replaying import replay_decisions
from llmlab.types import RequestError, SamplingParams

FAULT = "CUDA error: unspecified launch failure"


class Fault:
    """Passes with these numbers kill the device; it lives again once a new queue is made for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: Sequence[int], stays_dead: bool = False) -> None:
        self.passes, self.dead = 0, False
        forward = Transformer.forward

        def mortal(*args: Any, **named: Any) -> torch.Tensor:
            self.passes += 1
            self.dead = self.dead or self.passes in at
            if self.dead:
                raise RuntimeError(FAULT)
            return forward(*args, **named)

        def line(loaded: Any) -> HostLine:
            self.dead = False
            return MortalLine(self)

        monkeypatch.setattr(Transformer, "forward", mortal)
        monkeypatch.setattr(executors, "device_line", line)
        if stays_dead:
            monkeypatch.setattr(executors, "anew", lambda *parts: None)


class MortalLine(HostLine):
    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def answers(self) -> bool:
        return not self._fault.dead


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


SAMPLING: dict[str, list[SamplingParams]] = {
    "greedy": [greedy(9), greedy(17)],
    "mixed": [greedy(8), SamplingParams(max_tokens=9, temperature=0.9, ignore_eos=True),
              SamplingParams(max_tokens=7, temperature=0.0, repetition_penalty=1.3, ignore_eos=True, logprobs=2)],
}  # fmt: skip
TIGHT = {"num_blocks": 16, "tiering": "swap"}


def loaded_engine(directory: Path, sampling: Sequence[SamplingParams], **fields: Any) -> Any:
    engine = tiny_engine(directory, **fields)
    generator = np.random.default_rng(5)
    for i in range(7):
        prompt = generator.integers(0, VOCAB - 1, int(generator.integers(1, 30))).tolist()
        engine.add_request(prompt, sampling[i % len(sampling)], request_id=f"r{i}")
    return engine


def answers_of(engine: Any) -> dict[str, list[list[int]]]:
    return {name: tokens_of(output) for name, output in sorted(serve(engine).items())}


@pytest.mark.parametrize("kind", SAMPLING)
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "swapping"])
def test_requests_begin_anew_and_say_the_same(
    directory: Path, kind: str, depth: int, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"overlap_depth": depth, **(TIGHT if tight else {})}
    want = answers_of(loaded_engine(directory, SAMPLING[kind], **fields))
    Fault(monkeypatch, at=(9, 14))
    engine = loaded_engine(directory, SAMPLING[kind], **fields)
    assert answers_of(engine) == want
    lost = engine.log.filter(ev.ResourceLost)
    assert [event.resource for event in lost] == ["device memory"] * 2 and all(FAULT in event.why for event in lost)
    back = [event for event in engine.log.filter(ev.RequestPreempted) if event.beneficiary is None]
    assert back and {event.cause for event in back} == {event.seq for event in lost}
    assert all(event.mode == "recompute" for event in back)
    assert not engine.log.filter(ev.PolicyFailed)


def test_a_replay_decides_the_same_after_a_loss(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fault(monkeypatch, at=(9,))
    engine = loaded_engine(directory, SAMPLING["greedy"], overlap_depth=1, **TIGHT)
    serve(engine)
    run = Run.of(engine.log)
    assert replay_decisions(run).differences == []
    told = " ".join(" ".join(s.sentences) for name in run.requests for s in run.why(name).stretches if s.kind == "preempted")
    assert "The device lost its memory" in told


def test_what_was_cached_before_a_loss_is_not_found_after_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(40))
    Fault(monkeypatch, at=(20,))
    engine = tiny_engine(directory, overlap_depth=1)
    first = serve_one(engine, prompt, 4)
    assert engine.scheduler.memory.pool.by_hash
    serve_one(engine, [1, 2, 3], 16)  # the device is lost here
    assert engine.log.filter(ev.ResourceLost)
    assert serve_one(engine, prompt, 4) == first
    assert engine.log.filter(ev.RequestAdmitted)[-1].num_cached_tokens == 0


def serve_one(engine: Any, prompt: list[int], tokens: int) -> list[int]:
    name = engine.add_request(prompt, greedy(tokens))
    return list(serve(engine)[name].outputs[0].token_ids)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_without_a_device_all_end_with_the_reason_and_new_ones_are_refused(
    directory: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(monkeypatch, at=(9,), stays_dead=True)
    engine = loaded_engine(directory, SAMPLING["greedy"], overlap_depth=depth, max_num_seqs=3)
    engine.add_request([1, 2, 3], greedy(4), request_id="later", arrival=engine.clock.now() + 3600)
    done = serve(engine)
    assert len(done) == 8 and "later" in done
    assert all(FAULT in (o.outputs[0].error or "") for o in done.values() if o.outputs[0].finish_reason == "error")
    assert sum(o.outputs[0].finish_reason == "error" for o in done.values()) >= 6
    with pytest.raises(RequestError, match=r"lost its device.*Make a new engine"):
        engine.add_request([1, 2, 3], greedy(4))
    assert [event.resource for event in engine.log.filter(ev.ResourceLost)] == ["device"]
    assert engine.log.filter(ev.RequestRefused)
    engine.close()


def test_what_kills_every_device_does_not_go_on_for_ever(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fault(monkeypatch, at=range(9, 10_000, 4))
    engine = loaded_engine(directory, SAMPLING["greedy"], overlap_depth=1)
    done = serve(engine)
    assert any(FAULT in (o.outputs[0].error or "") for o in done.values())
    resources = [event.resource for event in engine.log.filter(ev.ResourceLost)]
    assert resources == ["device memory"] * stream_executor.MOST_LIVES + ["device"]


def test_the_cpu_takes_over_only_where_that_was_asked_for(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(model=str(directory), device="cpu", kernels="torch")
    backend = backends.torch_backend(config)
    gone = dataclasses.replace(backend.loaded, model=_Elsewhere(backend.loaded.model))  # type: ignore[arg-type, type-var]
    backend = backend._replace(loaded=gone)
    if answers("cuda"):
        pytest.skip("there is a GPU that answers")
    assert executors.anew(config, backend, 8, 8) is None
    asked = EngineConfig(model=str(directory), device="cpu", kernels="torch", on_device_loss="cpu")
    anew = executors.anew(asked, backend, 8, 8)
    assert anew is not None and anew.loaded.device.type == "cpu" and anew.line.device.type == "cpu"
    with caplog.at_level(logging.WARNING):
        missing = EngineConfig(model=str(directory / "gone"), device="cpu", on_device_loss="cpu")
        assert executors.anew(missing, backend, 8, 8) is None
    assert "could not be replaced by cpu" in caplog.text


class _Elsewhere:
    """A model that says it is on a GPU."""

    def __init__(self, model: Transformer) -> None:
        self._model, self.device = model, torch.device("cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def test_a_plain_executor_that_lost_its_device_ends_everything(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmlab.execution import torch_executor

    fault = Fault(monkeypatch, at=(4,))
    monkeypatch.setattr(torch_executor, "answers", lambda device: not fault.dead)
    engine = loaded_engine(directory, SAMPLING["greedy"], overlap_depth=1, speculation="ngram")
    done = serve(engine)
    assert len(done) == 7 and all(FAULT in (o.outputs[0].error or "") for o in done.values())
    assert [event.resource for event in engine.log.filter(ev.ResourceLost)] == ["device"]
