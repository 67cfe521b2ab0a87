import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Roofline explorer")

with app.setup:
    import marimo as mo

    from llmlab.applab import pages, pictures, roof
    from roofline import charts
    from roofline.errors import RooflineError


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("roofline_explorer")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    def knobs(name, machine, batch):
        return (
            mo.ui.dropdown(list(roof.MODELS), value="llama-3.1-8b", label=f"{name} model"),
            mo.ui.dropdown(list(roof.MACHINES), value=machine, label=f"{name} machine"),
            mo.ui.dropdown(list(roof.WIDTHS), value="fp16", label=f"{name} numbers"),
            mo.ui.slider(steps=[1, 2, 4, 8, 16, 32, 64, 128, 256], value=batch, label=f"{name} batch", show_value=True),
            mo.ui.slider(steps=[128, 256, 512, 1024, 2048, 4096, 8192, 32768], value=1024, label=f"{name} context", show_value=True),
            mo.ui.switch(label=f"{name} computes prompts"),
        )

    # each a name of its own: of the elements of one mo.ui.dictionary, only the last that moves while the kernel is busy arrives
    a_model, a_machine, a_width, a_batch, a_context, a_prefill = _a = knobs("A", "a100", 8)
    b_model, b_machine, b_width, b_batch, b_context, b_prefill = _b = knobs("B", "h100", 8)
    mo.vstack([mo.hstack(one, justify="start", gap=1, wrap=True, align="center") for one in (_a, _b)], gap=1.2)
    return (
        a_batch,
        a_context,
        a_machine,
        a_model,
        a_prefill,
        a_width,
        b_batch,
        b_context,
        b_machine,
        b_model,
        b_prefill,
        b_width,
    )


@app.cell(hide_code=True)
def _(
    a_batch,
    a_context,
    a_machine,
    a_model,
    a_prefill,
    a_width,
    b_batch,
    b_context,
    b_machine,
    b_model,
    b_prefill,
    b_width,
):
    _setups = {
        "A": roof.SetUp(a_model.value, a_machine.value, a_width.value, a_batch.value, a_context.value, a_prefill.value),
        "B": roof.SetUp(b_model.value, b_machine.value, b_width.value, b_batch.value, b_context.value, b_prefill.value),
    }
    try:
        both = [roof.priced(name, setup) for name, setup in _setups.items()]
    except RooflineError as error:
        both = []
        said = str(error)
    mo.stop(not both, mo.callout(mo.md(f"**This cannot be priced.** {said if not both else ''}"), kind="warn"))
    return (both,)


@app.cell(hide_code=True)
def _(both, sheet):
    mo.vstack([
        pictures.modelled(sheet, lambda: roof.roofline_chart(*both)),
        mo.md(roof.table(both)),
    ])  # fmt: skip
    return


@app.cell(hide_code=True)
def _(both):
    _names = roof.lens_names(both[0])
    lenses = mo.ui.multiselect(_names, value=_names, label="techniques, applied to A one at a time", full_width=True)
    return (lenses,)


@app.cell(hide_code=True)
def _(both, lenses, sheet):
    _gains = roof.gains(both[0], lenses.value)
    _drawn = pictures.modelled(sheet, lambda: charts.lens_gains(_gains, f"{both[0].setup.label} (modelled)"))
    mo.vstack([lenses, _drawn if _gains else mo.md("Choose a technique.")])
    return


@app.cell(hide_code=True)
def _(both, sheet):
    mo.ui.tabs({
        "Joules of a token (A)": pictures.modelled(sheet, lambda: charts.energy_waterfall(both[0].step, both[0].case.tokens)),
        "Where the time goes": pictures.modelled(sheet, lambda: charts.time_stack({p.setup.label: p.step for p in both})),
        "What fits": pictures.modelled(sheet, lambda: roof.memory_chart(both)),
    })  # fmt: skip
    return


if __name__ == "__main__":
    app.run()
