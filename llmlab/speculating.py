"""Putting the drafting side of an engine together: the source that its configuration names, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmlab.config import EngineConfig
from llmlab.decoding.draft_book import DraftBook
from llmlab.decoding.draft_sizes import DraftSizes
from llmlab.decoding.drafts import DRAFT_SOURCES, DraftSetup, Oracle
from llmlab.execution.draft_price import DraftPrice, RoundPrices, draft_price
from llmlab.registry import policy_name
from llmlab.seams import CostModel, DraftSource
from llmlab.types import ConfigError, ModelError, unknown_name
from roofline import shapes
from roofline.errors import RooflineError
from roofline.shapes import Shape

if TYPE_CHECKING:
    from llmlab.execution.sim_executor import TokenSource


class Simulated(NamedTuple):
    """Drafts for the simulator, which knows the tokens to come: the i-th draft of a proposal (of a tree: the first choice at
    depth i) holds with the probability `acceptance[i]`, given that those before it do (the last one counts for all behind it).
    `draft` is the shape whose steps are paid for; None: drafting is free, as with n-grams."""

    acceptance: tuple[float, ...]
    draft: str | None = None

    @property
    def name(self) -> str:
        return f"simulated {self.draft or 'drafts'}"


class Speculation(NamedTuple):
    """A draft source, and the sizes that its price depends on (None: nobody knows them, or it costs nothing)."""

    source: DraftSource
    name: str
    sizes: DraftSizes | None = None


def real_speculation(config: EngineConfig, setup: DraftSetup, kernels: str) -> Speculation | None:
    """What drafts for a model that really runs. Raises ConfigError or ModelError."""
    choice = config.speculation
    if choice is None:
        return None
    if isinstance(choice, str) and choice not in DRAFT_SOURCES.names():
        from llmlab.backends import roofline_shape
        from llmlab.decoding.draft_model import load_draft

        try:
            model = load_draft(choice, setup, kernels)
        except ModelError as error:
            sources = f"Sources without a model: {', '.join(DRAFT_SOURCES.names())}."
            raise ConfigError("speculation", choice, error.problem, f"{error.way_out} {sources}") from None
        return Speculation(model, model.name, roofline_shape(model.loaded))
    return _sized(_source(choice, setup, config), choice)


def simulated_speculation(config: EngineConfig, setup: DraftSetup, tokens: TokenSource) -> Speculation | None:
    """What drafts in the simulator. Raises ConfigError."""
    choice = config.speculation
    if choice is None:
        return None
    if isinstance(choice, str) and choice not in DRAFT_SOURCES.names():
        raise ConfigError("speculation", choice, "the simulator runs no draft model, so it cannot know what would be accepted",
                          f"Give it: speculation=llmlab.speculating.Simulated((0.8, 0.7), draft={choice!r}); on the command line "
                          f"--speculate 0.8,0.7@{choice}.")  # fmt: skip
    if config.acceptance != "keyed":
        raise ConfigError("acceptance", config.acceptance, "means nothing to the simulator, which draws no tokens",
                          "Say how often drafts hold: llmlab.speculating.Simulated((0.8, 0.7)).")  # fmt: skip
    if not isinstance(choice, Simulated):
        return _sized(_source(choice, setup, config), choice)
    check_acceptance(choice.acceptance)
    source = Oracle(tokens.token, choice.acceptance, setup.vocab_size, setup.seed, setup.plan)
    return Speculation(source, choice.name, None if choice.draft is None else _shape(choice.draft))


def _sized(source: DraftSource, choice: Any) -> Speculation:
    """A source with the sizes that it tells of itself."""
    sizes = getattr(source, "sizes", None)
    if sizes is not None and not isinstance(sizes, DraftSizes):
        raise ConfigError("speculation", choice, f"has sizes that nobody can price: {sizes!r}",
                          "Leave the attribute out (the price is learned), or see llmlab.decoding.draft_sizes.")  # fmt: skip
    return Speculation(source, source_name(choice), sizes)


def check_acceptance(acceptance: Sequence[float]) -> None:
    if not acceptance or not all(isinstance(a, (int, float)) and 0 <= a <= 1 for a in acceptance):
        raise ConfigError("acceptance", acceptance, "must be probabilities, one for each position of a proposal",
                          "Write (0.8, 0.7): the last one counts for all that follow.")  # fmt: skip


def _source(choice: Any, setup: DraftSetup, config: EngineConfig) -> DraftSource:
    if isinstance(choice, str):
        return DRAFT_SOURCES.resolve(choice, setup=setup)
    if isinstance(choice, type) or not callable(getattr(choice, "propose", None)):
        raise ConfigError("speculation", choice, "has no method propose(contexts)",
                          f"Give a name ({', '.join(DRAFT_SOURCES.names())}, or a draft model), or an object as described in "
                          "llmlab.seams.DraftSource.")  # fmt: skip
    if config.draft_tree is not None:
        raise ConfigError("draft_tree", config.draft_tree, "is for the sources that have a name: an object grows its own trees",
                          "Leave draft_tree out; num_speculative_tokens bounds the nodes.")  # fmt: skip
    return choice  # type: ignore[no-any-return]


def _shape(name: str) -> Shape:
    try:
        return shapes.get(name)
    except RooflineError:
        raise unknown_name("speculation", name, [*DRAFT_SOURCES.names(), *shapes.names()]) from None


def source_name(choice: Any) -> str:
    """The name that drafts of this choice go by in the log."""
    return choice if isinstance(choice, str) else policy_name(choice)


def price_of(cost: CostModel, sizes: DraftSizes | None, config: EngineConfig) -> DraftPrice | None:
    """What drafting costs on the device of the target."""
    return draft_price(cost, sizes, config.branches, config.block_size)


def book_of(cost: CostModel, price: DraftPrice | None, config: EngineConfig) -> DraftBook:
    """An empty book on the drafts of an engine."""
    return DraftBook(RoundPrices(cost, price, config.branches), config.num_drafts)
