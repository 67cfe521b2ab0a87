import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Experts")

with app.setup:
    import marimo as mo

    from llmlab.applab import experts, pages, pictures
    from llmlab.plugins import REGISTRIES
    from llmlab.ui import figures


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("experts")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    _known = [name for name in REGISTRIES["weights"].names() if name != "resident"]
    policy = mo.ui.dropdown(_known, value="lru", label="who decides")
    fit = mo.ui.slider(1, 6, value=2, label="experts of a layer that fit", show_value=True, debounce=True)
    machine = mo.ui.dropdown(["a10", "a100", "h100"], value="a10", label="machine")
    batch = mo.ui.slider(steps=[1, 2, 4, 8], value=4, label="requests at once", show_value=True, debounce=True)
    mo.hstack([policy, fit, machine, batch], justify="start", gap=1.2, wrap=True)
    return batch, fit, machine, policy


@app.cell(hide_code=True)
def _(batch, fit, machine, policy):
    offload = experts.Offload(policy.value, int(fit.value), machine.value, int(batch.value))
    runs = experts.compared(offload)
    return offload, runs


@app.cell(hide_code=True)
def _(offload, runs, sheet):
    pictures.drawn(sheet, lambda: experts.chart(offload, runs))
    return


@app.cell(hide_code=True)
def _(offload, sheet):
    pictures.drawn(sheet, lambda: figures.expert_heat_map(experts.served(offload, 3)))
    return


if __name__ == "__main__":
    app.run()
