import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Engine room")

with app.setup:
    import marimo as mo

    from llmlab.applab import pages, words
    from llmlab.applab.live import shared_engine
    from llmlab.applab.timeline import LiveTimeline, Pump
    from llmlab.plugins import REGISTRIES


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("engine_room")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    live = shared_engine()
    ready, set_ready = mo.state(live.wait_until_ready(0.0))
    if not ready():
        pages.once(lambda: live.wait_until_ready(600.0) and set_ready(True))
    return live, ready


@app.cell(hide_code=True)
def _(live):
    _now = live.settings()
    ordering = mo.ui.dropdown(REGISTRIES["ordering"].names(), value=_now["ordering"], label="who goes first")
    composer = mo.ui.dropdown(REGISTRIES["composer"].names(), value=_now["composer"], label="a step is")
    tiering = mo.ui.dropdown(REGISTRIES["tiering"].names(), value=_now["tiering"], label="the preempted")
    drafts = mo.ui.dropdown(pages.DRAFTS, value=pages.drafting(_now["speculation"]), label="drafts from")
    budget = mo.ui.slider(steps=[16, 32, 64, 128, 256, 512], value=_now["max_num_batched_tokens"], label="token budget",
                          show_value=True)  # fmt: skip
    blocks = mo.ui.slider(72, 128, step=8, value=_now["num_blocks"], label="KV blocks", show_value=True)
    rate = mo.ui.slider(steps=[2, 5, 10, 15, 20, 30, 40, 60], value=int(live.rate), label="arrivals/s", show_value=True)
    speed = mo.ui.slider(steps=[0.02, 0.05, 0.1, 0.2, 0.5, 1.0], value=live.speed, label="speed", show_value=True)
    drop = mo.ui.run_button(label="Drop a long prompt")
    mo.hstack([budget, rate, blocks, ordering, composer, tiering, drafts, speed, drop], justify="start", gap=1.2, wrap=True)
    return blocks, budget, composer, drafts, drop, ordering, rate, speed, tiering


@app.cell(hide_code=True)
def _(blocks, budget, composer, drafts, live, ordering, rate, speed, tiering):
    live.rate, live.speed = float(rate.value), float(speed.value)
    live.turn_to(ordering=ordering.value, composer=composer.value, tiering=tiering.value, speculation=drafts.value,
                 max_num_batched_tokens=int(budget.value), num_blocks=int(blocks.value))  # fmt: skip
    return


@app.cell(hide_code=True)
def _(live, ready):
    _ready = ready()
    words.beginning(live)
    return


@app.cell(hide_code=True)
def _(live, sheet):
    timeline = LiveTimeline(live, pages.recorded("first-look"), theme=sheet.theme)
    shown = mo.ui.anywidget(timeline)
    shown
    return shown, timeline


@app.cell(hide_code=True)
def _(live, ready, timeline):
    _loaded = ready() and live.engine is not None
    if _loaded:
        timeline.go_live()
    pump = Pump(live, timeline) if _loaded else None
    return (pump,)


@app.cell(hide_code=True)
def _(drop, live, timeline):
    mo.stop(not drop.value)
    timeline.selected = live.drop_long_prompt()
    return


@app.cell(hide_code=True)
def _():
    prompt = mo.ui.text(value="37*46-23*58", label="your prompt", max_length=400)
    send = mo.ui.run_button(label="Send")
    mo.hstack([prompt, send], justify="start")
    return prompt, send


@app.cell(hide_code=True)
def _(live, prompt, send, timeline):
    if send.value and prompt.value.strip():
        timeline.selected = live.ask(prompt.value)
    return


@app.cell(hide_code=True)
def _():
    beat = mo.ui.refresh(default_interval="1s")
    return (beat,)


@app.cell(hide_code=True)
def _(beat):
    mo.Html(f'<div style="display:none">{beat}</div>')
    return


@app.cell(hide_code=True)
def _(beat, live, shown):
    _now = beat.value
    words.engine_room(live, shown.value.get("selected", ""))
    return


if __name__ == "__main__":
    app.run()
