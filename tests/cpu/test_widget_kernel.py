"""The timeline widget under a real Jupyter kernel: it opens, says hello, and answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("anywidget")
pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")

CODE = """
import llmlab
from llmlab.ui.widget import Timeline
engine = llmlab.Engine(model="lab-s", executor="sim", hardware="t4", num_blocks=24, log_level=3)
for i in range(12):
    engine.add_request([5 + i] * 30, llmlab.SamplingParams(max_tokens=20))
while engine.has_unfinished_requests():
    engine.step()
timeline = {make}
timeline
"""


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    manager, client = jupyter_client.manager.start_new_kernel(startup_timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def heard(client: Any, wanted: int, seconds: float = 60.0) -> list[dict[str, Any]]:
    """Messages of the kernel until `wanted` of them are comm messages."""
    found: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    while sum(m["msg_type"] == "comm_msg" for m in found) < wanted and time.monotonic() < end:
        found.append(client.get_iopub_msg(timeout=seconds))
        assert found[-1]["msg_type"] != "error", found[-1]["content"]
    return found


def opened(client: Any, make: str) -> dict[str, Any]:
    """The state of the widget as the kernel announces it, with its id."""
    replies: list[dict[str, Any]] = []
    client.execute_interactive(CODE.replace("{make}", make), timeout=60, output_hook=replies.append)
    opens = [m for m in replies if m["msg_type"] == "comm_open" and m["content"]["data"]["state"].get("_esm")]
    shown = next(m for m in replies if m["msg_type"] == "execute_result")
    assert shown["content"]["data"]["application/vnd.jupyter.widget-view+json"]["model_id"] == opens[-1]["content"]["comm_id"]
    return {**opens[-1]["content"]["data"]["state"], "id": opens[-1]["content"]["comm_id"], "buffers": opens[-1]["buffers"]}


def say(client: Any, widget: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """Send what the page would send; the first custom message that comes back."""
    data = {"method": "custom", "content": message}
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": widget["id"], "data": data}))
    replies = [m["content"]["data"] for m in heard(client, 1) if m["msg_type"] == "comm_msg"]
    return next(r["content"] for r in replies if r["method"] == "custom")


def test_a_finished_run_opens_with_its_data_and_answers_why(client: Any) -> None:
    widget = opened(client, "Timeline(llmlab.Run.of(engine.log))")
    assert "export default" in widget["_esm"] and widget["_mode"] == "static" and widget["step"] >= 0
    assert any(bytes(buffer)[:2] == b"\x1f\x8b" for buffer in widget["buffers"]), "the batch, zipped"
    answer = say(client, widget, {"type": "why", "request": "r3"})
    assert answer["type"] == "why" and answer["headline"].startswith("r3 ended")


def test_a_live_one_sends_everything_to_whoever_says_hello(client: Any) -> None:
    widget = opened(client, "Timeline.live(engine.log)")
    batch = say(client, widget, {"type": "hello"})["batch"]
    assert batch["whole"] and len(batch["requests"]) == 12 and batch["meta"]["mode"] == "simulated"
