import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Engine room")

with app.setup:
    import marimo as mo

    from llmlab.applab import pictures
    from llmlab.applab.live import shared_engine
    from llmlab.applab.words import numbers
    from llmlab.assembly import REGISTRIES
    from llmlab.ui import figures


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Engine room
    """)
    return


@app.cell(hide_code=True)
def _():
    live = shared_engine()
    theme = pictures.page_theme()
    return live, theme


@app.cell(hide_code=True)
def _(live):
    now = live.settings()
    ordering = mo.ui.dropdown(REGISTRIES["ordering"].names(), value=now["ordering"], label="order of the queue")
    composer = mo.ui.dropdown(REGISTRIES["composer"].names(), value=now["composer"], label="a step contains")
    tiering = mo.ui.dropdown(REGISTRIES["tiering"].names(), value=now["tiering"], label="who is preempted")
    budget = mo.ui.slider(steps=[16, 32, 64, 128, 256, 512], value=now["max_num_batched_tokens"], label="token budget", show_value=True)
    blocks = mo.ui.slider(72, 160, step=8, value=now["num_blocks"], label="KV blocks", show_value=True)
    rate = mo.ui.slider(steps=[2, 5, 10, 15, 20, 30, 40, 60], value=live.rate, label="arrivals/s", show_value=True)
    speed = mo.ui.slider(steps=[0.02, 0.05, 0.1, 0.2, 0.5, 1.0], value=live.speed, label="speed", show_value=True)
    drop = mo.ui.run_button(label="Drop a long prompt")
    mo.hstack([ordering, composer, tiering, budget, blocks, rate, speed, drop], justify="start", gap=1.2, wrap=True)
    return blocks, budget, composer, drop, ordering, rate, speed, tiering


@app.cell(hide_code=True)
def _(blocks, budget, composer, live, ordering, rate, speed, tiering):
    live.rate, live.speed = float(rate.value), float(speed.value)
    live.turn_to(ordering=ordering.value, composer=composer.value, tiering=tiering.value,
                 max_num_batched_tokens=int(budget.value), num_blocks=int(blocks.value))  # fmt: skip
    return


@app.cell(hide_code=True)
def _(drop, live):
    mo.stop(not drop.value)
    live.drop_long_prompt()
    return


@app.cell(hide_code=True)
def _():
    refresh = mo.ui.refresh(default_interval="1s")
    refresh.style({"display": "none"})
    return (refresh,)


@app.cell(hide_code=True)
def _(live, refresh):
    numbers(live, refresh.value)
    return


@app.cell(hide_code=True)
def _(live, refresh, theme):
    mo.stop(refresh is None or live.window() is None, mo.md("The model is being loaded."))
    pictures.drawn(theme, lambda: figures.request_timeline(live.window(newest=26)))
    return


@app.cell(hide_code=True)
def _(live):
    def watch(live, page_of=mo.current_thread) -> None:
        page = page_of()
        with live.watching():
            while not page.should_exit:
                live.wait(0.2)

    mo.Thread(target=watch, args=(live,), daemon=True).start()
    return


if __name__ == "__main__":
    app.run()
