import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Chunked prefill")

with app.setup:
    import marimo as mo

    from llmlab.applab import chunks, pages, pictures


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("chunked_prefill")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    prompt = mo.ui.slider(steps=chunks.PROMPTS, value=4096, label="tokens of the long prompt", show_value=True)
    budget = mo.ui.slider(steps=chunks.BUDGETS, value=8192, label="token budget of a step", show_value=True)
    mo.vstack([mo.md(chunks.GUIDE), mo.hstack([prompt, budget], justify="start", gap=3, wrap=True)], gap=1)
    return budget, prompt


@app.cell(hide_code=True)
def _(budget, prompt, sheet):
    scene = chunks.scene(int(prompt.value), int(budget.value))
    mo.vstack([
        pictures.drawn(sheet, lambda: chunks.scene_chart(scene, chunks.longest(scene.prompt))),
        mo.md(chunks.reason(scene)),
    ], gap=0)  # fmt: skip
    return (scene,)


@app.cell(hide_code=True)
def _(scene, sheet):
    pictures.drawn(sheet, lambda: chunks.frontier_chart(chunks.frontier(scene.prompt), scene.budget))
    return


@app.cell(hide_code=True)
def _():
    mo.md(chunks.ELSEWHERE)
    return


if __name__ == "__main__":
    app.run()
