"""A workload: timed requests with prompts, drawn once from a seed or read from a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmlab.types import ConfigError, SamplingParams
from llmlab.workloads import arrivals as times
from llmlab.workloads.arrivals import Pauses
from llmlab.workloads.lengths import Lengths, draw
from llmlab.workloads.prompt_tokens import BlockTokens, PromptTokens, RandomTokens
from llmlab.workloads.source import OpenSource, TimedRequest

if TYPE_CHECKING:
    from llmlab.workloads.feedback import ClosedLoop, Sessions

__all__ = ["TimedRequest", "Workload"]


@dataclass(frozen=True, repr=False)
class Workload:
    """Arrivals [s] and lengths [tokens]; the tokens themselves are drawn request by request, when the vocabulary is known.

    `shared_prefix` tokens at the beginning of every prompt are the same for all requests of one family (`families` of
    them, in turn, or by popularity with `family_skew` > 0: family k has a share of (k + 1) ** -family_skew), so that a
    prefix cache has something to find. `blocks` names the blocks of `block_tokens` tokens that each prompt consists of:
    equal names mean equal tokens. `session_ids` name each request's session. Raises ConfigError.
    """

    arrivals: tuple[float, ...]
    prompt_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    seed: int = 0
    shared_prefix: int = 0
    families: int = 1
    temperature: float = 0.0
    family_skew: float = 0.0
    blocks: tuple[tuple[int, ...], ...] = ()
    block_tokens: int = 512
    session_ids: tuple[str | None, ...] = ()
    about: str = ""

    def __post_init__(self) -> None:
        if not len(self.arrivals) == len(self.prompt_lens) == len(self.output_lens):
            raise ConfigError("workload", len(self.arrivals), "arrivals, prompts and outputs differ in number")
        if any(b < a for a, b in zip(self.arrivals, self.arrivals[1:])) or any(t < 0 for t in self.arrivals[:1]):
            raise ConfigError("arrivals", self.arrivals[:5], "must be ascending and not negative")
        for name in ("blocks", "session_ids"):
            if getattr(self, name) and len(getattr(self, name)) != len(self):
                raise ConfigError(name, len(getattr(self, name)), f"must name one for each of {len(self)} requests")
        self._check_content()

    def _check_content(self) -> None:
        for name, low in (("seed", 0), ("shared_prefix", 0), ("families", 1), ("block_tokens", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(name, value, f"must be an integer of at least {low}")
        if not times.is_number(self.family_skew) or not 0 <= self.family_skew < 100:
            raise ConfigError(
                "family_skew", self.family_skew, "must be a number from 0 to 100", "0: all equally often."
            )

    def __len__(self) -> int:
        return len(self.arrivals)

    def __repr__(self) -> str:
        if not self.arrivals:
            return "Workload(0 requests)"
        prompts, outputs = (sorted(lens)[len(self) // 2] for lens in (self.prompt_lens, self.output_lens))
        return (f"Workload({self.about + ': ' if self.about else ''}{len(self)} requests in {self.arrivals[-1]:.4g} s, median "
                f"prompt {prompts} and output {outputs} tokens, seed {self.seed})")  # fmt: skip

    # ------------------------------------------------------------------------------------ drawn
    @classmethod
    def poisson(cls, rate: float, n: int, prompt: Lengths = "lognormal:256,1.0", output: Lengths = "lognormal:64,0.8",
                seed: int = 0, **more: Any) -> Workload:  # fmt: skip
        """`n` requests with independent exponential gaps, `rate` a second on average."""
        times.checked_rate(rate)
        rng = _generator(n, seed)
        return cls.drawn(np.cumsum(rng.exponential(1 / rate, n)).tolist(), prompt, output, rng, seed, **more)

    @classmethod
    def gamma(cls, rate: float, cv: float, n: int, prompt: Lengths = "lognormal:256,1.0",
              output: Lengths = "lognormal:64,0.8", seed: int = 0, **more: Any) -> Workload:  # fmt: skip
        """`n` requests with independent gamma gaps: `cv` is their standard deviation over their mean (1: Poisson,
        larger: bursts, 0: a metronome)."""
        rng = _generator(n, seed)
        return cls.drawn(times.gamma(rate, cv, n, rng).tolist(), prompt, output, rng, seed, **more)

    @classmethod
    def ramp(cls, rates: Sequence[tuple[float, float]], prompt: Lengths = "lognormal:256,1.0",
             output: Lengths = "lognormal:64,0.8", seed: int = 0, **more: Any) -> Workload:  # fmt: skip
        """Poisson arrivals whose rate changes in steps: `rates=[(60, 2.0), (60, 8.0)]` is a minute at 2 requests per
        second, then one at 8. How many come is drawn, too."""
        rng = _generator(1, seed)
        return cls.drawn(times.ramp(rates, rng).tolist(), prompt, output, rng, seed, **more)

    @classmethod
    def batch(cls, n: int, prompt: Lengths = (16, 128), output: Lengths = (32, 128), seed: int = 0,
              **more: Any) -> Workload:  # fmt: skip
        """`n` requests that all arrive at time 0 (an offline job)."""
        return cls.drawn([0.0] * n, prompt, output, _generator(n, seed), seed, **more)

    @classmethod
    def drawn(cls, arrivals: Sequence[float], prompt: Lengths, output: Lengths, rng: np.random.Generator, seed: int,
              **more: Any) -> Workload:  # fmt: skip
        """Given arrivals, drawn lengths."""
        n = len(arrivals)
        prompts, outputs = draw(prompt, rng, n, "prompt"), draw(output, rng, n, "output")
        return cls(tuple(arrivals), tuple(prompts.tolist()), tuple(outputs.tolist()), seed, **more)

    @classmethod
    def sessions(cls, rate: float, n: int, turns: Lengths = (2, 6), prompt: Lengths = "lognormal:64,0.8",
                    output: Lengths = "lognormal:128,0.8", think: Pauses = "exponential:10", seed: int = 0,
                    **more: Any) -> Sessions:  # fmt: skip
        """`n` conversations that begin as a Poisson process. Each turn's prompt is all that was said before, answers as
        they really came, plus `prompt` new tokens; it comes `think` seconds after the answer before it."""
        from llmlab.workloads.feedback import Sessions

        times.checked_rate(rate)
        rng = _generator(n, seed)
        starts = np.cumsum(rng.exponential(1 / rate, n)).tolist()
        lengths = draw(turns, rng, n, "turns")
        total = int(lengths.sum())
        work = cls.drawn([0.0] * total, prompt, output, rng, seed, **more)
        return Sessions(work, tuple(starts), tuple(lengths.tolist()), tuple(times.pauses(think, rng, total).tolist()))

    # ------------------------------------------------------------------- read from traces and fits
    @classmethod
    def azure(cls, path: str | Path, n: int | None = None, **more: Any) -> Workload:
        """The Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens). Raises TraceError."""
        from llmlab.workloads.traces import read_azure

        return read_azure(path, n, **more)

    @classmethod
    def burstgpt(cls, path: str | Path, n: int | None = None, **more: Any) -> Workload:
        """The BurstGPT traces (CSV: Timestamp, Request tokens, Response tokens, ...). Failed requests, which have no
        tokens, are left out. `model=` and `log_type=` choose rows. Raises TraceError."""
        from llmlab.workloads.traces import read_burstgpt

        return read_burstgpt(path, n, **more)

    @classmethod
    def mooncake(cls, path: str | Path, n: int | None = None, **more: Any) -> Workload:
        """The Mooncake traces (JSON lines: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks).
        Equal hash ids give equal tokens. Raises TraceError."""
        from llmlab.workloads.traces import read_mooncake

        return read_mooncake(path, n, **more)

    @classmethod
    def like(cls, twin: str | Path, rate: float | None = None, n: int = 1000, seed: int = 0, **more: Any) -> Workload:
        """`n` requests drawn from the figures fitted to a trace: `"azure-conv-2023"`, or a file that `Twin.save` wrote.
        `rate` None is the trace's own. Raises ConfigError with the nearest names."""
        from llmlab.workloads.twins import Twin

        return Twin.load(twin).draw(n, rate, seed, **more)

    # ---------------------------------------------------------------------------- made from others
    def at_rate(self, rate: float) -> Workload:
        """The same requests on a stretched time axis: `rate` a second on average."""
        span = self.arrivals[-1] - self.arrivals[0] if self.arrivals else 0.0
        if span <= 0:
            raise ConfigError("at_rate", rate, "all requests arrive at once, so there is no time to stretch")
        factor = (len(self) - 1) / (span * times.checked_rate(rate))
        return replace(self, arrivals=tuple(t * factor for t in self.arrivals))

    def closed_loop(self, concurrency: int, think: Pauses = 0.0) -> ClosedLoop:
        """The same requests, but asked by `concurrency` clients: each asks, waits for the whole answer, pauses for `think`
        seconds and asks again. The arrivals of this workload do not matter."""
        from llmlab.workloads.feedback import ClosedLoop

        thinking = times.pauses(think, np.random.default_rng((self.seed, 5)), len(self))
        return ClosedLoop(self, concurrency, tuple(thinking.tolist()))

    # ------------------------------------------------------------------------------------- serving
    def source(self, vocab_size: int) -> OpenSource:
        """See `llmlab.workloads.source.Load`."""
        return OpenSource(self.requests(vocab_size))

    def requests(self, vocab_size: int) -> Iterator[TimedRequest]:
        """The requests with their tokens, drawn one by one; the same for the same seed and vocabulary."""
        tokens = self.tokens(vocab_size)
        for index, arrival in enumerate(self.arrivals):
            yield self.request(index, arrival, tokens.prompt(index, self.prompt_lens[index]))

    def request(self, index: int, arrival: float, prompt: tuple[int, ...]) -> TimedRequest:
        """Request `index`, with this prompt, at this time."""
        output = self.output_lens[index]
        sampling = SamplingParams(max_tokens=output, temperature=self.temperature, ignore_eos=True)
        session = self.session_ids[index] if self.session_ids else None
        return TimedRequest(arrival, prompt, sampling, session=session, metadata={"output_len": output})

    def tokens(self, vocab_size: int) -> PromptTokens:
        """Where the prompts' tokens come from."""
        if self.blocks:
            return BlockTokens(vocab_size, self.seed, self.blocks, self.block_tokens)
        return RandomTokens(vocab_size, self.seed, len(self), self.shared_prefix, self.families, self.family_skew)


def _generator(n: int, seed: int) -> np.random.Generator:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError("n", n, "must be a positive number of requests")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError("seed", seed, "must be an integer of at least 0")
    return np.random.default_rng((seed, 0))
