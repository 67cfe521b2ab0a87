import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Policy lab")

with app.setup:
    import marimo as mo

    from llmlab.applab import charts, pages, pictures, trial, words


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("policy_lab")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    example = mo.ui.dropdown(list(trial.EXAMPLES), value="shortest prompt first", label="begin with")
    machine = mo.ui.dropdown(["t4", "a10", "a100", "h100", "h200", trial.HERE], value="a100", label="machine")
    goal = mo.ui.dropdown(list(trial.GOALS), value="mean time to first token", label="goal")
    load = mo.ui.slider(0.5, 2.0, step=0.1, value=1.3, label="load", show_value=True, debounce=True)
    blocks = mo.ui.slider(150, 1000, step=50, value=300, label="KV blocks", show_value=True, debounce=True)
    seeds = mo.ui.slider(1, 8, value=3, label="seeds", show_value=True, debounce=True)
    return blocks, example, goal, load, machine, seeds


@app.cell(hide_code=True)
def _(example):
    editor = mo.ui.code_editor(value=trial.EXAMPLES[example.value], language="python", min_height=230, show_copy_button=False)
    go = mo.ui.run_button(label="Check and race")
    submitted, submit = mo.state(trial.EXAMPLES[example.value])
    return editor, go, submit, submitted


@app.cell(hide_code=True)
def _(editor, go, submit):
    if go.value:
        submit(editor.value)
    return


@app.cell(hide_code=True)
def _(submitted):
    entry = trial.read(submitted())
    return (entry,)


@app.cell(hide_code=True)
def _(blocks, editor, example, go, goal, load, machine, seeds):
    mo.vstack([
        mo.hstack([machine, load, blocks, seeds, goal], justify="start", gap=1.2, wrap=True),
        editor,
        mo.hstack([go, example], justify="start", gap=1.2, wrap=True),
    ])  # fmt: skip
    return


@app.cell(hide_code=True)
def _(blocks, entry, load, machine, seeds):
    mo.stop(bool(entry.problem), words.problem(entry))
    course = trial.Course(machine.value, float(load.value), int(blocks.value), seeds=int(seeds.value))
    laps = pages.race(entry, course)
    return course, laps


@app.cell(hide_code=True)
def _(course, entry, goal, laps, sheet):
    aim = trial.GOALS[goal.value]
    mo.vstack([
        pictures.drawn(sheet, lambda: charts.race_chart(laps, aim, entry.seam)),
        mo.md(charts.leaderboard_table(trial.leaderboard(laps, aim, entry.seam), aim, course.seeds)),
        mo.hstack([mo.download(lambda: pictures.png("light", lambda: charts.race_chart(laps, aim, entry.seam)), filename="race.png",
                    mimetype="image/png", label="Save the figure")], justify="start"),
    ])  # fmt: skip
    return


@app.cell(hide_code=True)
def _(entry, laps):
    mo.stop(not laps)
    words.verdict(entry)
    return


@app.cell(hide_code=True)
def _(course, entry, sheet):
    mo.accordion({"Head to head: the default and yours, request by request": mo.lazy(lambda: pages.head_to_head(entry, course, sheet))})
    return


if __name__ == "__main__":
    app.run()
