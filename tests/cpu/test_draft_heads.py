"""Draft heads: what a source sees of the target, that answers stay those of plain decoding, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from engine_util import Oracle, greedy, serve, tiny_engine, tokens_of, write_model

from llmlab.events import catalog as ev
from llmlab.seams import DraftContext, Proposal

PROMPTS = [[(i * 31 + n * 7) % 96 for i in range(n)] for n in (1, 3, 8, 17)] + [[4, 5, 6, 7] * 6]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    directory = tmp_path_factory.mktemp("tiny")
    yield Oracle(directory, write_model(directory))


# ------------------------------------------------------------------------------------------- the seam
class Watching:
    """Drafts as often right as wrong, and keeps what it is shown."""

    reads_hidden = True

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.seen = oracle, []  # type: ignore[var-annotated]

    def propose(self, contexts: Sequence[DraftContext]) -> list[Proposal]:
        self.seen += [(list(c.token_ids), None if c.hidden is None else c.hidden.clone()) for c in contexts]
        return [Proposal(self._next(c)) for c in contexts]

    def _next(self, context: DraftContext) -> tuple[int, ...]:
        told = self.oracle.greedy(context.request.prompt_token_ids, 20)
        at = len(context.token_ids) - context.request.num_prompt_tokens
        right = told[at : at + context.k]
        hold = (at * at + context.request.num_prompt_tokens) % 5
        return (*right[:hold], *[(t + 1) % 96 for t in right[hold:]])


@pytest.mark.parametrize("budget", [3, 64])
def test_the_state_shown_is_the_one_that_the_newest_token_was_drawn_from(budget: int, oracle: Oracle) -> None:
    """After drafts that held, drafts that did not, prompts in chunks, and several requests in one step."""
    source = Watching(oracle)
    with tiny_engine(oracle.directory, speculation=source, max_num_batched_tokens=budget, num_blocks=120) as engine:
        names = [engine.add_request(prompt, greedy(12)) for prompt in PROMPTS]
        done = serve(engine)
        model: Any = engine.executor._model  # type: ignore[attr-defined]
        shown = [(tokens, hidden) for tokens, hidden in source.seen if hidden is not None]
        again = model.logits(torch.stack([hidden for _, hidden in shown])).argmax(-1).tolist()
    assert [tokens[-1] for tokens, _ in shown] == again
    assert [tokens_of(done[name]) for name in names] == [[oracle.greedy(prompt, 12)] for prompt in PROMPTS]
    held = [len(e.accepted) for e in engine.log.filter(ev.Verified)]
    assert len(shown) > 20 and len(set(held)) > 2


def test_nobody_gathers_states_for_a_source_that_does_not_ask(oracle: Oracle) -> None:
    class Deaf(Watching):
        reads_hidden = False

    source = Deaf(oracle)
    with tiny_engine(oracle.directory, speculation=source) as engine:
        engine.add_request(PROMPTS[2], greedy(8))
        serve(engine)
    assert source.seen and all(hidden is None for _, hidden in source.seen)
