"""Draws the gallery of docs/figures.md anew: `python docs/make_figures.py [NAME ...]`. Seeds are fixed; what is measured (the
speculation strip) differs from machine to machine, and says so. The picture of the widget needs Playwright and Chromium."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llmlab
from llmlab.ui import figures, theme

HEAVY = ("kv_block_map", "resource_gantt", "roofline_steps", "speculation_strip")  # thousands of marks: smaller as pixels
OUT = Path(__file__).parent / "assets" / "figures"


@cache
def crowded() -> llmlab.Run:
    """Too little memory for the load: preemptions, waiting, everything that a timeline can show."""
    config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="a100", log_level=3, num_blocks=200, max_num_seqs=64)
    return llmlab.run(config, llmlab.Workload.poisson(rate=6, n=24, prompt="lognormal:200,1.0", output="lognormal:100,0.8", seed=0))


@cache
def on_the_host() -> llmlab.Run:
    """Attention of all rows on the CPU, behind the link."""
    config = llmlab.EngineConfig(model="llama-2-7b", executor="sim", hardware="a10", log_level=4, num_blocks=200, placement="fastdecode")
    return llmlab.run(config, llmlab.Workload.poisson(rate=4, n=8, prompt=200, output=8, seed=0))


@cache
def queued(ordering: str) -> llmlab.Run:
    config = llmlab.EngineConfig(model="llama-3.1-8b", executor="sim", hardware="a10", num_blocks=180, ordering=ordering)
    return llmlab.run(config, llmlab.Workload.poisson(rate=3, n=20, prompt="lognormal:300,0.9", output="lognormal:90,0.7", seed=1))


@cache
def budgets() -> dict[int, llmlab.Run]:
    def at(budget: int) -> llmlab.Run:
        config = llmlab.EngineConfig(model="llama-3.1-8b", executor="sim", hardware="a10", max_num_batched_tokens=budget, num_blocks=2000)
        return llmlab.run(config, llmlab.Workload.poisson(rate=1.2, n=40, prompt="lognormal:500,0.8", output="lognormal:60,0.6", seed=3))

    return {budget: at(budget) for budget in (32, 64, 128, 192, 256, 384, 512, 1024)}


@cache
def drafted() -> llmlab.Run:
    """The real engine and the lab model, drafting from what its requests said before."""
    prompts = ("37*46-23*58?", "12+13? 12+13? 12+13?", "1 2 3 4 1 2 3 4 1 2 3 4")
    with llmlab.Engine(model="lab-s", executor="torch", speculation="ngram", num_blocks=256) as engine:
        for prompt in prompts:
            engine.add_request(prompt, llmlab.SamplingParams(max_tokens=96, temperature=0.0))
        while engine.has_unfinished_requests():
            engine.step()
        return llmlab.Run.of(engine.log)


@cache
def mixture() -> llmlab.Run:
    """A mixture with random weights of which a third fits: the traffic of its experts on the real engine."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = MixtralConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                          num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256)  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / "random-mixture")
        MixtralForCausalLM(shape).save_pretrained(folder)
        with llmlab.Engine(model=folder, dtype="float32", num_blocks=64, log_level=3, weights="lru", num_expert_slots=11) as engine:
            for i in range(6):
                engine.add_request([3 + 7 * i % 90, 5, 11 + i, 40], llmlab.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
            while engine.has_unfinished_requests():
                engine.step()
            return llmlab.Run.of(engine.log)


def a_decision() -> Any:
    run = crowded()
    return figures.decision_card(run, next(e.seq for e in run.events("Decision") if e.seam == "victim"))


FIGURES: dict[str, Callable[[], Any]] = {
    "request_timeline": lambda: figures.request_timeline(crowded()),
    "kv_block_map": lambda: figures.kv_block_map(crowded()),
    "batch_composition": lambda: figures.batch_composition(crowded()),
    "latency_ecdf": lambda: figures.latency_ecdf({name: queued(name) for name in ("fcfs", "sjf_oracle")}, "ttft", slo=2.0),
    "policy_race": lambda: figures.policy_race(queued("fcfs"), queued("sjf_oracle")),
    "frontier": lambda: figures.frontier(budgets(), "budget"),
    "roofline_steps": lambda: figures.roofline_steps(crowded()),
    "resource_gantt": lambda: figures.resource_gantt(on_the_host()),
    "speculation_strip": lambda: figures.speculation_strip(drafted()),
    "expert_heat_map": lambda: figures.expert_heat_map(mixture()),
    "event_inspector": lambda: figures.event_inspector(crowded()),
    "decision_card": a_decision,
}


def draw(name: str) -> None:
    import vl_convert

    with theme.enable("light"):
        spec = FIGURES[name]().to_dict()
    if name in HEAVY:
        (OUT / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))
    else:
        (OUT / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")


def photograph() -> None:
    """The widget, as `run.to_html` shows it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        path = crowded().to_html(Path(folder) / "run.html", theme="light")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(path.as_uri())
        page.locator(".llt[data-drawn=yes]").screenshot(path=OUT / "timeline.png")
        browser.close()


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for wanted in sys.argv[1:] or [*FIGURES, "timeline"]:
        print(wanted, flush=True)
        photograph() if wanted == "timeline" else draw(wanted)
