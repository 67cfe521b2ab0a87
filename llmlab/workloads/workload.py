"""A workload: timed requests with prompts, drawn once from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmlab.types import ConfigError, SamplingParams
from llmlab.workloads.lengths import Lengths, draw


@dataclass(frozen=True)
class TimedRequest:
    """One request of a workload. `metadata["output_len"]` is its true output length, for oracles and simulation."""

    arrival: float
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    session: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """Arrivals [s] and lengths [tokens]; the tokens themselves are drawn when the vocabulary is known.

    `shared_prefix` tokens at the beginning of every prompt are the same for all requests of one family
    (`families` of them), so that a prefix cache has something to find.
    """

    arrivals: tuple[float, ...]
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    seed: int = 0
    shared_prefix: int = 0
    families: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.arrivals) == len(self.prompt_lens) == len(self.output_lens):
            raise ConfigError("workload", len(self.arrivals), "arrivals, prompts and outputs differ in number")
        if any(b < a for a, b in zip(self.arrivals, self.arrivals[1:])) or any(t < 0 for t in self.arrivals):
            raise ConfigError("arrivals", self.arrivals[:5], "must be ascending and not negative")

    def __len__(self) -> int:
        return len(self.arrivals)

    @classmethod
    def poisson(cls, rate: float, n: int, prompt: Lengths = "lognormal:256,1.0", output: Lengths = "lognormal:64,0.8",
                seed: int = 0, **more: Any) -> Workload:  # fmt: skip
        """`n` requests with independent exponential gaps, `rate` a second on average."""
        if not rate > 0 or not np.isfinite(rate):
            raise ConfigError("rate", rate, "must be a positive number of requests per second")
        rng = _generator(n, seed)
        return cls.drawn(np.cumsum(rng.exponential(1 / rate, n)).tolist(), prompt, output, rng, seed, **more)

    @classmethod
    def batch(cls, n: int, prompt: Lengths = (16, 128), output: Lengths = (32, 128), seed: int = 0, **more: Any) -> Workload:
        """`n` requests that all arrive at time 0 (an offline job)."""
        return cls.drawn([0.0] * n, prompt, output, _generator(n, seed), seed, **more)

    @classmethod
    def drawn(cls, arrivals: Sequence[float], prompt: Lengths, output: Lengths, rng: np.random.Generator, seed: int,
              **more: Any) -> Workload:  # fmt: skip
        """Given arrivals, drawn lengths."""
        n = len(arrivals)
        prompts, outputs = draw(prompt, rng, n, "prompt"), draw(output, rng, n, "output")
        return cls(tuple(arrivals), tuple(prompts.tolist()), tuple(outputs.tolist()), seed, **more)

    def requests(self, vocab_size: int) -> Iterator[TimedRequest]:
        """The requests with their tokens, the same for the same seed and vocabulary."""
        rng = np.random.default_rng((self.seed, 1))
        prefixes = [rng.integers(0, vocab_size, self.shared_prefix).tolist() for _ in range(self.families)]
        for index, (arrival, prompt, output) in enumerate(zip(self.arrivals, self.prompt_lens, self.output_lens)):
            shared = prefixes[index % self.families][: max(0, prompt - 1)]
            ids = (*shared, *rng.integers(0, vocab_size, prompt - len(shared)).tolist())
            sampling = SamplingParams(max_tokens=output, temperature=self.temperature, ignore_eos=True)
            yield TimedRequest(arrival, ids, sampling, metadata={"output_len": output})


def _generator(n: int, seed: int) -> np.random.Generator:
    if not isinstance(n, int) or n < 1:
        raise ConfigError("n", n, "must be a positive number of requests")
    return np.random.default_rng((seed, 0))
