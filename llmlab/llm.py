"""The offline API: prompts in, finished answers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llmlab.config import EngineConfig, engine_config
from llmlab.engine import Engine
from llmlab.outputs import RequestOutput
from llmlab.prompts import Prompt
from llmlab.runs import Run
from llmlab.types import RequestError, SamplingParams


class LLM:
    """A model with an engine around it. `LLM("lab-s", block_size=16, num_blocks=256, ...)` takes the fields of
    EngineConfig as keywords.

    Raises ConfigError or ModelError on construction; see `generate`.
    """

    def __init__(self, model: str = "lab-s", config: EngineConfig | None = None, **fields: Any) -> None:
        self.engine = Engine(config if config is not None else engine_config(model=model, **fields))
        if self.engine.chosen:
            print(self.engine.chosen, file=sys.stderr)

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or None."""
        return self.engine.tokenizer

    @property
    def log(self) -> Any:
        return self.engine.log

    @property
    def run(self) -> Run:
        """Everything that this engine did so far, ready for `why`, `at`, `metrics`, `save`."""
        return Run.of(self.engine.log)

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 progress: bool = False) -> list[RequestOutput]:  # fmt: skip
        """Finished outputs in the order of the prompts. `sampling_params`: one for all, or one a prompt.

        If a prompt is refused, nothing of this call is queued and RequestError says which one and why.
        """
        batch = as_batch(prompts)
        ids = self._queue(batch, as_params(sampling_params, len(batch)))
        done: dict[str, RequestOutput] = {}
        report = _progress(len(ids)) if progress else None
        while len(done) < len(ids):
            for output in self.engine.step():
                if output.finished:
                    done[output.request_id] = output
            if report is not None:
                report(len(done))
        return [done[name] for name in ids]

    def _queue(self, batch: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[str]:
        ids: list[str] = []
        try:
            for prompt, one in zip(batch, params, strict=True):
                ids.append(self.engine.add_request(prompt, one))
        except RequestError:
            for name in ids:
                self.engine.abort(name)
            raise
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None) -> RequestOutput:
        """The answer to one conversation ([{"role": "user", "content": "..."}]), by the model's chat template."""
        return self.generate([messages], sampling_params)[0]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text in pieces, as they come. Closing the iterator aborts the request.

        What could be the beginning of a stop string is held back until that is settled.
        """
        name = self.engine.add_request(prompt, sampling_params)
        stops = sampling_params.stop if sampling_params is not None else ()
        sent, finished = 0, False
        try:
            while not finished:
                for output in self.engine.step():
                    if output.request_id == name:
                        text, finished = output.outputs[0].text, output.finished
                        safe = len(text) if finished else len(text) - _held_back(text, stops)
                        if safe > sent:
                            yield text[sent:safe]
                            sent = safe
        finally:
            self.engine.abort(name)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of ints is one prompt, and so is a list of chat messages."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not prompts:
        raise RequestError("prompts", prompts, "is empty", "Give at least one prompt.")
    first = prompts[0]
    if isinstance(first, int) or (isinstance(first, Mapping) and "role" in first):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError("sampling_params", f"{len(params)} of them", f"do not fit {count} prompts",
                           "Give one for all, or one a prompt.")  # fmt: skip
    return list(params)


def _progress(total: int) -> Callable[[int], None]:
    def show(done: int) -> None:
        print(f"\r{done}/{total} finished", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
