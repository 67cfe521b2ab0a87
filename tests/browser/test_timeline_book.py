"""What the page makes of batches (`Book` in timeline.js) is what Python folded, however the batches were cut."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest

import llmlab
from llmlab.ui.frames import FREE, Frames, frames
from llmlab.ui.offline import SCRIPT

TELL = """
batches => {
  const book = new Book();
  const answers = batches.map(batch => book.add(batch));
  const last = book.base + book.length - 1, middle = book.base + Math.floor(book.length / 2);
  const owners = row => book.wallAt(row).slice();
  return {answers, base: book.base, steps: book.steps, notes: book.notes.map(n => [n.step, n.t, n.kind, n.text]),
    requests: book.byArrival.map(r => [r.id, r.first, r.end, r.spans.map(s => [s.kind, s.a, s.b, s.steps, s.tokens])]),
    last: owners(last), middle: owners(middle), again: owners(last)};
}
"""


def crowded() -> llmlab.Run:
    engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, max_num_batched_tokens=64, log_level=3)
    for i in range(30):
        engine.add_request([1 + j % 7 for j in range(10 + 3 * i)], llmlab.SamplingParams(max_tokens=40), metadata={"output_len": 10 + i},
                           arrival=2e-4 * i)  # fmt: skip
    while engine.has_unfinished_requests():
        engine.step()
    return llmlab.Run.of(engine.log)


@pytest.fixture(scope="module")
def page(browser: Any) -> Any:
    made = browser.new_page()
    made.set_content(f"<script type=module>{SCRIPT.read_text(encoding='utf-8')}\nwindow.Book = Book;</script>")
    made.wait_for_function("() => !!window.Book")
    yield made
    made.close()


def cut(run: llmlab.Run, seed: int, keep: int | None = None) -> tuple[list[Any], Frames]:
    """The run as a page would get it: batches of random sizes, and everything once more in the middle."""
    rng, fold, batches, at = random.Random(seed), Frames(keep), [], 0
    while at < len(run.log_events):
        size = rng.randrange(1, 120)
        for event in run.log_events[at : at + size]:
            fold.write(event)
        at += size
        batches.append(fold.all() if len(batches) == 3 else fold.take())
    batches.append(fold.take())
    return json.loads(msgspec.json.encode(batches)), fold


def wall_at(batch: dict[str, Any], row: int, num_blocks: int) -> list[int]:
    wall = dict(zip(batch["wall0"][::2], batch["wall0"][1::2]))
    for number, flat in batch["walls"]:
        if number <= row:
            wall |= zip(flat[::2], flat[1::2])
    return [wall.get(block, FREE) for block in range(num_blocks)]


@pytest.mark.parametrize("seed", range(3))
def test_batches_become_the_whole_run(page: Any, seed: int) -> None:
    run = crowded()
    batches, _ = cut(run, seed)
    told, whole = page.evaluate(TELL, batches), frames(run)
    assert all(told["answers"])
    assert told["steps"]["step"] == [e.step for e in run.events("StepFinished")]
    assert told["steps"]["used"] == whole["steps"]["used"] and told["steps"]["prefill"] == whole["steps"]["prefill"]
    assert [n[:3] for n in told["notes"]] == [n[:3] for n in whole["notes"]]
    for request, (name, first, end, spans) in zip(sorted(whole["requests"], key=lambda r: r[2]), told["requests"]):
        assert (request[1], request[4], request[5]) == (name, first, end)
        assert request[-1] == [n for span in spans for n in span]
    rows = len(told["steps"]["step"])
    assert told["last"] == told["again"] == wall_at(whole, rows - 1, 24) and told["middle"] == wall_at(whole, rows // 2, 24)


def test_a_page_that_misses_a_batch_asks_again(page: Any) -> None:
    batches, _ = cut(crowded(), 5)
    told = page.evaluate(TELL, [batches[0], batches[1], batches[4]])
    assert told["answers"] == [True, True, False]


def test_page_and_kernel_forget_the_same(page: Any) -> None:
    run = crowded()
    batches, fold = cut(run, 1, keep=40)
    told, kept = page.evaluate(TELL, batches), json.loads(msgspec.json.encode(fold.all()))
    assert told["base"] > 0 and len(told["steps"]["step"]) <= 51
    first = max(told["base"], kept["row"])
    known, used = told["steps"]["used"][first - told["base"] :], kept["steps"]["used"][first - kept["row"] :]
    assert known == used
    assert told["last"] == wall_at(kept, 10**9, 24)
