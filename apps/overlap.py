import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="CPU and GPU in parallel")

with app.setup:
    import marimo as mo

    from llmlab.applab import overlap, pages, pictures


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("overlap")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    speed = mo.ui.slider(steps=overlap.SPEEDS, value=8, label="CPU's attention, % of GPU's", show_value=True, debounce=True)
    memory = mo.ui.slider(steps=overlap.BUDGETS, value=864, label="KV tokens on the GPU", show_value=True, debounce=True)
    left = mo.ui.dropdown(list(overlap.NAMES), value="neo", label="compare")
    right = mo.ui.dropdown(list(overlap.NAMES), value="apex", label="with")
    stretch = mo.ui.dropdown(list(overlap.STRETCHES), value="two iterations", label="look at")
    mo.hstack([speed, memory, left, right, stretch], justify="start", gap=1.2, wrap=True)
    return left, memory, right, speed, stretch


@app.cell(hide_code=True)
def _(memory, speed):
    machine = overlap.Machine(int(speed.value), int(memory.value))
    served = pages.placements(machine)
    return machine, served


@app.cell(hide_code=True)
def _(left, right):
    chosen = (left.value, right.value)
    return (chosen,)


@app.cell(hide_code=True)
def _(chosen, machine, served, sheet):
    pictures.drawn(sheet, lambda: overlap.rates_chart(machine, served, chosen))
    return


@app.cell(hide_code=True)
def _(chosen, machine, served):
    _rates_come_first = served
    seen = pages.iterations(machine, chosen)
    return (seen,)


@app.cell(hide_code=True)
def _(chosen, seen, sheet, stretch):
    pages.side_by_side(chosen, seen, overlap.STRETCHES[stretch.value], sheet)
    return


@app.cell(hide_code=True)
def _(chosen, served, sheet):
    pictures.drawn(sheet, lambda: overlap.latency_chart(served, chosen))
    return


if __name__ == "__main__":
    app.run()
