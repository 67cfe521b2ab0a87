"""Recorded routing: which experts the tokens of real sequences took, layer by layer. Needs numpy only.

A trace of one model drives simulations of larger ones with the same number of experts a layer; what is carried over is
the skew between experts and their locality in time, not the larger model's own choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

import llmlab
from llmlab.seams import ExpertUse
from llmlab.types import LabError, TraceError


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Tokens of all sequences one behind the other.

    `experts` [T, L, k] uint8, `weights` [T, L, k] float32: who was taken, and the gate weights (they sum to 1).
    `guess` [T, L, k] uint8: what layer l's input says to the router of layer l + 1 (of no meaning in the last layer).
    `starts` [S + 1], `prompts` [S]: where sequences begin, and how many of their tokens are the prompt's.
    """

    model: str
    num_experts: int
    experts: NDArray[np.uint8]
    weights: NDArray[np.float32]
    guess: NDArray[np.uint8]
    starts: NDArray[np.int64]
    prompts: NDArray[np.int64]

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    def save(self, path: str | Path) -> None:
        arrays = {name: getattr(self, name) for name in ("experts", "weights", "guess", "starts", "prompts")}
        arrays["weights"] = np.round(self.weights * 255).astype(np.uint8)
        np.savez_compressed(Path(path), model=self.model, num_experts=self.num_experts, **arrays)

    def sequences(self, start: int, stop: int) -> RoutingTrace:
        """The sequences [start, stop) alone."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        cut = {name: getattr(self, name)[first:last] for name in ("experts", "weights", "guess")}
        return replace(self, **cut, starts=self.starts[start : stop + 1] - first, prompts=self.prompts[start:stop])

    def popularity(self) -> tuple[tuple[float, ...], ...]:
        """Share of the tokens that take each expert, [layer][expert]; a row sums to k."""
        shares = [np.bincount(self.experts[:, layer].ravel(), minlength=self.num_experts) for layer in range(self.num_layers)]
        return tuple(tuple((row / len(self.experts)).tolist()) for row in shares)

    def deeper(self, num_layers: int) -> RoutingTrace:
        """The trace of a model with more layers: recorded layers again and again, their experts renamed each time, so
        that layers differ. Where one repetition ends, the guess is as good as chance."""
        index = np.arange(num_layers) % self.num_layers
        names = np.stack([np.roll(np.arange(self.num_experts), -(i // self.num_layers)) for i in range(num_layers)])
        turned = np.arange(num_layers)[None, :, None]
        following = np.minimum(turned + 1, num_layers - 1)
        return replace(self, experts=names[turned, self.experts[:, index]].astype(np.uint8), weights=self.weights[:, index],
                       guess=names[following, self.guess[:, index]].astype(np.uint8))  # fmt: skip

    def decode_steps(self, batch_size: int, num_steps: int) -> Iterator[list[int]]:
        """Rows of the trace that decode together: `batch_size` sequences side by side, the next one when one ends."""
        waiting = iter(range(self.num_sequences))
        seats: list[Iterator[int]] = [iter(()) for _ in range(batch_size)]
        for _ in range(num_steps):
            rows = []
            for seat in range(batch_size):
                row = next(seats[seat], None)
                while row is None:
                    sequence = next(waiting, None)
                    if sequence is None:
                        waiting = iter(range(self.num_sequences))
                        continue
                    seats[seat] = iter(self._output_rows(sequence))
                    row = next(seats[seat], None)
                rows.append(row)
            yield rows

    def _output_rows(self, sequence: int) -> range:
        return range(int(self.starts[sequence] + self.prompts[sequence]), int(self.starts[sequence + 1]))

    def prompt_rows(self, num_tokens: int) -> list[int]:
        """Rows of a prompt of any length: tokens of the trace, from its beginning, again and again if need be."""
        return [i % len(self.experts) for i in range(num_tokens)]

    def uses(self, rows: Sequence[int], layer: int) -> tuple[ExpertUse, ...]:
        """Who is taken by these tokens in a layer."""
        return _uses(self.experts[rows, layer], self.weights[rows, layer], self.num_experts)

    def guesses(self, rows: Sequence[int], layer: int) -> tuple[ExpertUse, ...]:
        """What the next layer will be asked for, as far as this layer can tell."""
        if layer + 1 >= self.num_layers:
            return ()
        return _uses(self.guess[rows, layer], self.weights[rows, layer], self.num_experts)


def _uses(experts: NDArray[np.uint8], weights: NDArray[np.float32], num_experts: int) -> tuple[ExpertUse, ...]:
    taken = experts.ravel()
    counts = np.bincount(taken, minlength=num_experts)
    sums = np.bincount(taken, weights=weights.ravel(), minlength=num_experts)
    return tuple(ExpertUse(int(e), int(counts[e]), float(sums[e])) for e in np.flatnonzero(counts))


def load_routing(name: str | Path) -> RoutingTrace:
    """A trace from a file, or a shipped one by its name. Raises TraceError."""
    path = Path(name)
    if not path.exists():
        package = Path(llmlab.__path__[0])
        roots = package / "_data" / "workloads", package.parent / "datasets" / "workloads"
        shipped = [file for root in roots for file in sorted(root.glob("routing-*.npz"))]
        known = {file.stem.removeprefix("routing-"): file for file in shipped}
        if str(name) not in known:
            raise TraceError("routing", str(name), "is neither a file nor a shipped trace",
                             f"Shipped: {', '.join(known) or 'none'}.")  # fmt: skip
        path = known[str(name)]
    try:
        with np.load(path) as data:
            weights = data["weights"].astype(np.float32)
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-9)
            return RoutingTrace(str(data["model"]), int(data["num_experts"]), data["experts"], weights, data["guess"],
                                data["starts"], data["prompts"])  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        if isinstance(error, LabError):
            raise
        raise TraceError("routing", str(path), f"cannot be read ({error})", "Record it again.") from None
