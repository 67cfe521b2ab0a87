import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="KV lab")

with app.setup:
    import marimo as mo

    from llmlab.applab import kv, pages, pictures
    from llmlab.memory.eviction import EVICTIONS
    from llmlab.ui import figures


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("kv_lab")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    block_size = mo.ui.slider(steps=[4, 8, 16, 32, 64, 128], value=16, label="tokens in a block", show_value=True, debounce=True)
    memory = mo.ui.slider(1024, 6144, step=256, value=1536, label="KV tokens", show_value=True, debounce=True)
    shared = mo.ui.slider(0, 512, step=64, value=256, label="shared beginning", show_value=True, debounce=True)
    families = mo.ui.slider(1, 16, value=6, label="families", show_value=True, debounce=True)
    rate = mo.ui.slider(steps=[1, 2, 4, 6, 8, 12], value=2, label="arrivals/s", show_value=True, debounce=True)
    eviction = mo.ui.dropdown(EVICTIONS.names(), value="lru", label="eviction")
    caching = mo.ui.switch(value=True, label="prefix cache")
    mo.hstack([block_size, memory, shared, families, rate, eviction, caching], justify="start", gap=1.2, wrap=True)
    return block_size, caching, eviction, families, memory, rate, shared


@app.cell(hide_code=True)
def _(block_size, caching, eviction, families, memory, rate, shared):
    pool = kv.Pool(int(block_size.value), int(memory.value), eviction.value, caching.value, int(shared.value),
                   int(families.value), float(rate.value))  # fmt: skip
    run = kv.served(pool)
    return pool, run


@app.cell(hide_code=True)
def _(pool, run, sheet):
    mo.vstack([
        mo.md(f"**{kv.finding(pool, kv.account(run))}** (simulated)."),
        pictures.drawn(sheet, lambda: figures.kv_block_map(run)),
    ])  # fmt: skip
    return


@app.cell(hide_code=True)
def _(pool, run, sheet):
    _others = kv.others(pool)
    pictures.drawn(sheet, lambda: kv.others_chart(pool, _others, run))
    return


if __name__ == "__main__":
    app.run()
