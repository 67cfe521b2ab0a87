"""What watching costs: a live engine, a page's timeline on it, and nobody at the other end of the wire.

    python benchmarks/live.py [SECONDS]

Prints one JSON object: batches a second, the share of a core that reading the log and building batches takes (the
thread's own CPU time, without the engine's), bytes a second as they would go to the page, and how memory grew over the
second half. The engine is real (lab-s); it runs at the speed that the engine room opens with.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import msgspec

from llmlab.applab.live import LiveEngine
from llmlab.applab.timeline import BEAT, LiveTimeline


class Watcher:
    """Does what a page's pump does, and counts. `send` encodes each batch as marimo would, and throws it away."""

    def __init__(self, live: LiveEngine) -> None:
        self.timeline = LiveTimeline(live)
        self.timeline.go_live()
        self.timeline.send = self._send  # type: ignore[method-assign]
        self.batches = self.bytes = self.events = 0
        self.cpu = 0.0
        self._live, self._stop = live, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _send(self, content: object, buffers: object = None) -> None:
        self.batches += 1
        self.bytes += len(msgspec.json.encode(content))

    def _watch(self) -> None:
        with self._live.watching():
            while not self._stop.wait(BEAT):
                began = time.thread_time()
                self.events += self.timeline.pull()
                self.cpu += time.thread_time() - began

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def resident() -> float:
    """MiB in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(seconds: float, speed: float) -> dict[str, object]:
    """One session."""
    live = LiveEngine(speed=speed)
    assert live.wait_until_ready(120), live.state
    watcher = Watcher(live)
    began = time.monotonic()
    time.sleep(seconds / 2)
    half = resident()
    time.sleep(seconds / 2)
    took, end = time.monotonic() - began, resident()
    watcher.stop()
    assert not live.ended, live.state
    steps = live.vitals.step
    live.close()
    return {
        "seconds": round(took, 1), "speed": speed, "engine_steps": steps, "batches_per_second": round(watcher.batches / took, 1),
        "events_per_second": round(watcher.events / took, 1), "cpu_share_of_page_data": round(watcher.cpu / took, 4),
        "kilobytes_per_second": round(watcher.bytes / took / 1e3, 1), "mebibytes": round(end, 1),
        "grown_in_second_half": round(end - half, 1), "requests": live.vitals.num_finished,
    }  # fmt: skip


if __name__ == "__main__":
    wanted = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    for pace in (0.1, 1.0):
        print(json.dumps(measured(wanted, pace)))
