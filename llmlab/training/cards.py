"""Model cards: what a lab model was trained on, for how long, and what it can do. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from llmlab.types import ModelError

CARD_FILE = "card.json"


class Recipe(msgspec.Struct, frozen=True):
    """One kind of training document and its share of the documents."""

    suite: str
    k: int
    style: str | None
    share: float


class Phase(msgspec.Struct, frozen=True):
    """A stretch of training: pools of 4,096 documents, tokens per step (padding included), and the mixture."""

    pools: int
    batch_tokens: int
    mixture: list[Recipe]


class Gate(msgspec.Struct, frozen=True):
    """One measured accuracy on held-out problems.

    ``method`` is ``greedy``, ``sample`` (one sample at temperature 1) or ``majority16``; ``low`` and ``high``
    are the Wilson 95 % interval; ``required`` is the accuracy that the model must reach (None: reported only).
    """

    suite: str
    k: int
    style: str | None
    method: str
    n: int
    right: int
    low: float
    high: float
    required: float | None = None

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.n

    @property
    def name(self) -> str:
        """As in ``arith-2 slow greedy``."""
        return f"{self.suite}-{self.k} {self.style or 'plain'} {self.method}"

    @property
    def passed(self) -> bool:
        """Is the required accuracy reached (or none required)?"""
        return self.required is None or self.accuracy >= self.required


class HeadsCard(msgspec.Struct, frozen=True):
    """The draft heads that lie beside a model. ``states``: what they were trained on, states of the model's own greedy answers;
    ``loss``: mean of the last 50 steps, nats per token; ``acceptance``: how often the i-th draft held, given those before it,
    over ``held_out`` states of answers to held-out problems; ``minutes`` of CPU time, answers included."""

    parameters: int
    inner: int
    window: int
    seed: int
    steps: int
    states: int
    loss: float
    acceptance: list[float]
    held_out: int
    minutes: float
    machine: str
    sha256: str


class Card(msgspec.Struct, frozen=True):
    """The card of one model. ``loss`` is the mean completion loss (nats per token) of the last 100 steps."""

    name: str
    role: str
    parameters: int
    shape: dict[str, int]
    seed: int
    steps: int
    tokens: int
    learned_tokens: int
    minutes: float
    loss: float
    machine: str
    recipe: str
    phases: list[Phase]
    sha256: dict[str, str]
    finished: bool
    gates: list[Gate] = []
    working_points: list[str] = []
    heads: HeadsCard | None = None


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share (95 % by default).

    Raises:
        ValueError: if ``n`` is not positive.
    """
    if n <= 0:
        raise ValueError(f"n={n}: an interval needs at least one trial")
    p, zz = right / n, z * z / n
    middle = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, middle - half), min(1.0, middle + half)


def load_card(directory: Path) -> Card:
    """The card of one model directory.

    Raises:
        ModelError: if there is none, or it does not read as a card.
    """
    path = directory / CARD_FILE
    if not path.is_file():
        raise ModelError("model", str(directory), f"there is no {CARD_FILE}", "Write one: python -m llmlab.training.export.")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Card)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError("card", str(path), f"does not read as a model card ({error})",
                         "Restore the file, or delete it: the model runs without.") from None


def load_cards(directory: Path) -> list[Card]:
    """The cards of all model directories below ``directory``, the smallest model first."""
    found = (load_card(path.parent) for path in sorted(directory.glob(f"*/{CARD_FILE}")))
    return sorted(found, key=lambda card: (card.parameters, card.name))


def save_card(card: Card, directory: Path) -> None:
    """Write card.json and the README.md that says the same in words."""
    (directory / CARD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
    (directory / "README.md").write_text(readme(card))


def describe(cards: Sequence[Card]) -> list[dict[str, str]]:
    """Plain rows for a table: one per gate of each card."""
    return [{"model": card.name, "parameters": f"{card.parameters / 1e6:.2f} M", "tokens": f"{card.tokens / 1e6:.1f} M",
             **_gate_row(gate)} for card in cards for gate in card.gates]


def _gate_row(gate: Gate) -> dict[str, str]:
    required = "" if gate.required is None else f">= {gate.required:.0%}"
    verdict = "" if gate.required is None else "pass" if gate.passed else "MISS"
    return {"gate": gate.name, "accuracy": f"{gate.accuracy:.1%}", "interval": f"{gate.low:.1%} .. {gate.high:.1%}",
            "n": str(gate.n), "required": required, "verdict": verdict}


def readme(card: Card) -> str:
    """The card as a Markdown page."""
    shape = ", ".join(f"{key} {value}" for key, value in card.shape.items())
    mixture = "\n".join(f"| {i} | {phase.pools} | {phase.batch_tokens:,} | {r.suite} | {r.k} | {r.style or ''} | {r.share:.3f} |"
                        for i, phase in enumerate(card.phases, 1) for r in phase.mixture)
    gates = "\n".join(f"| {' | '.join(_gate_row(g).values())} |" for g in card.gates)
    state = "The learning rate had come down to its end." if card.finished else \
        "Exported before the learning rate had come down: a later export will be better."
    return f"""# {card.name}

{card.role} A standard Llama directory (bfloat16): `transformers.AutoModelForCausalLM` loads it as it is.

{card.parameters:,} parameters ({shape}). Trained from scratch on problems drawn by this project's own seeded
generators, {card.steps:,} steps, {card.tokens:,} tokens ({card.learned_tokens:,} of them with loss), seed {card.seed},
{card.minutes:.0f} minutes on {card.machine}. Completion loss at the end: {card.loss:.4f} nats per token. {state}

{card.recipe}

## Accuracy on held-out problems

Held out by hash (`sha1(problem) % 10 == 0`); the interval is Wilson's, 95 %.

| gate | accuracy | interval | n | required | verdict |
|---|---|---|---|---|---|
{gates}

## Training documents

| phase | pools of 4,096 documents | tokens per step | suite | k | style | share of documents |
|---|---|---|---|---|---|---|
{mixture}
{_heads_section(card.heads)}"""


def _heads_section(heads: HeadsCard | None) -> str:
    if heads is None:
        return ""
    numbers = " | ".join(str(i + 1) for i in range(len(heads.acceptance)))
    held = " | ".join(f"{a:.2f}" for a in heads.acceptance)
    return f"""
## Draft heads (`heads.safetensors`)

{heads.parameters:,} parameters (gate of {heads.inner}, window of {heads.window} tokens), for `speculation="heads"`. Trained on {heads.states:,} states of this model's own
greedy answers, {heads.steps:,} steps, seed {heads.seed}, {heads.minutes:.1f} minutes of CPU time on {heads.machine}; loss at the end
{heads.loss:.3f} nats per token. How often the i-th draft holds, given those before it, on held-out problems ({heads.held_out:,} states):

| draft | {numbers} |
|---|{"---|" * len(heads.acceptance)}
| holds | {held} |
"""
