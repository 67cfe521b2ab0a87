"""Record the runs that the apps open with: `python -m llmlab.applab.record FILE.jsonl.zst`
(the engine room), `python -m llmlab.applab.record FOLDER` (speculation), `python -m llmlab.applab.record FILE.json` and
`FILE.msgpack.zst` (CPU and GPU in parallel, what the page opens with and all that its sliders offer; simulated, so it is the same
everywhere; the second takes minutes).

The first two are real and measured, on the machine at hand: the live engine's configuration with a pool that is too small, 40 requests of
its stream, and a long prompt in the middle.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from llmlab.applab import overlap, spec
from llmlab.applab.live import LIVE
from llmlab.applab.stream import Stream
from llmlab.engine import Engine
from llmlab.runs import Run
from llmlab.types import SamplingParams

REQUESTS, RATE, BLOCKS = 48, 30.0, 68


def record(path: Path) -> Run:
    """Serve the stream once and write its trace."""
    config = msgspec.structs.replace(LIVE, num_blocks=BLOCKS)
    stream, t = Stream(seed=3), 0.0
    with Engine(config) as engine:
        t = engine.clock.now()
        for number in range(REQUESTS):
            t += stream.gap(RATE)
            problem = stream.long_prompt() if number == REQUESTS // 3 else stream.next()
            engine.add_request(problem.prompt, SamplingParams(max_tokens=96), arrival=t)
        while engine.has_unfinished_requests():
            engine.step()
        run = Run.of(engine.log)
        run.save(path)
        return run


def record_drafts(folder: Path) -> None:
    """What the page on speculation opens with: the same problems with drafts and without."""
    drafting = spec.Drafting()
    spec.plain(drafting.task, drafting.batch).save(folder / "no-drafts.jsonl.zst")
    spec.served(drafting, drafting.task, drafting.batch)
    spec.served(drafting, drafting.task, drafting.batch).save(folder / "drafts.jsonl.zst")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if place.is_dir():
        record_drafts(place)
    elif place.suffix == ".json":
        overlap.write(place)
    elif place.suffixes[-2:] == [".msgpack", ".zst"]:
        overlap.write_atlas(place, print)
    else:
        print(record(place))
