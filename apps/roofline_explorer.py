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
    pages.heading("roofline_explorer")
    return


@app.cell(hide_code=True)
def _():
    def knobs(name, machine, batch):
        return mo.ui.dictionary({
            "model": mo.ui.dropdown(list(roof.MODELS), value="llama-3.1-8b", label=f"{name} model"),
            "machine": mo.ui.dropdown(list(roof.MACHINES), value=machine, label=f"{name} machine"),
            "width": mo.ui.dropdown(list(roof.WIDTHS), value="fp16", label=f"{name} numbers"),
            "batch": mo.ui.slider(steps=[1, 2, 4, 8, 16, 32, 64, 128, 256], value=batch, label=f"{name} batch", show_value=True),
            "context": mo.ui.slider(steps=[128, 256, 512, 1024, 2048, 4096, 8192, 32768], value=1024, label=f"{name} context",
                                    show_value=True),
            "prefill": mo.ui.switch(label=f"{name} computes prompts"),
        })  # fmt: skip

    a, b = knobs("A", "a100", 8), knobs("B", "h100", 8)
    mo.vstack([mo.hstack(list(one.elements.values()), justify="start", gap=1, wrap=True, align="center") for one in (a, b)], gap=1.2)
    return a, b


@app.cell(hide_code=True)
def _(a, b):
    try:
        both = [roof.priced(name, roof.SetUp(**one.value)) for name, one in (("A", a), ("B", b))]
    except RooflineError as error:
        both = []
        said = str(error)
    mo.stop(not both, mo.callout(mo.md(f"**This cannot be priced.** {said if not both else ''}"), kind="warn"))
    return (both,)


@app.cell(hide_code=True)
def _(both):
    mo.vstack([
        pictures.modelled(pages.sheet(), lambda: roof.roofline_chart(*both)),
        mo.md(roof.table(both)),
    ])  # fmt: skip
    return


@app.cell(hide_code=True)
def _(both):
    _names = roof.lens_names(both[0])
    lenses = mo.ui.multiselect(_names, value=_names, label="techniques, applied to A one at a time", full_width=True)
    return (lenses,)


@app.cell(hide_code=True)
def _(both, lenses):
    _gains = roof.gains(both[0], lenses.value)
    _drawn = pictures.modelled(pages.sheet(), lambda: charts.lens_gains(_gains, f"{both[0].setup.label} (modelled)"))
    mo.vstack([lenses, _drawn if _gains else mo.md("Choose a technique.")])
    return


@app.cell(hide_code=True)
def _(both):
    _sheet = pages.sheet()
    mo.ui.tabs({
        "Joules of a token (A)": pictures.modelled(_sheet, lambda: charts.energy_waterfall(both[0].step, both[0].case.tokens)),
        "Where the time goes": pictures.modelled(_sheet, lambda: charts.time_stack({p.setup.label: p.step for p in both})),
        "What fits": pictures.modelled(_sheet, lambda: roof.memory_chart(both)),
    })  # fmt: skip
    return


if __name__ == "__main__":
    app.run()
