import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Speculation")

with app.setup:
    import marimo as mo

    from llmlab.applab import pages, pictures, spec, words
    from llmlab.ui import figures


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("speculation")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    source = mo.ui.dropdown(spec.SOURCES, value=next(iter(spec.SOURCES)), label="drafts from")
    tokens = mo.ui.slider(1, 8, value=4, label="tokens in a draft", show_value=True, debounce=True)
    policy = mo.ui.dropdown(list(spec.POLICIES), value="fixed", label="how many")
    task = mo.ui.dropdown(spec.TASKS, value="sums", label="what is asked")
    batch = mo.ui.slider(steps=[1, 2, 4, 8], value=2, label="at once", show_value=True, debounce=True)
    mo.hstack([source, tokens, policy, task, batch], justify="start", gap=1.2, wrap=True)
    return batch, policy, source, task, tokens


@app.cell(hide_code=True)
def _(batch, policy, source, task, tokens):
    drafting = spec.Drafting(source.value, int(tokens.value), policy.value, task.value, int(batch.value))
    if drafting == spec.Drafting():
        run, without = pages.recorded("drafts"), pages.recorded("no-drafts")
        where = "Recorded earlier; turn a knob and it runs here."
    else:
        run, without, where = spec.served(drafting, task.value, int(batch.value)), spec.plain(task.value, int(batch.value)), "Run here just now."
    return run, where, without


@app.cell(hide_code=True)
def _(run, sheet, where, without):
    _same = "All answers are the same, token by token." if spec.same_answers(run, without) else "**Some answers differ.**"
    mo.vstack([
        words.headline(spec.finding(run, without)),
        mo.md(f"{where} {_same}"),
        pictures.drawn(sheet, lambda: figures.speculation_strip(run)),
    ])  # fmt: skip
    return


if __name__ == "__main__":
    app.run()
