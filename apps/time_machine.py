import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Time machine")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from llmlab.applab import album, pages, pictures, traces, words
    from llmlab.ui.widget import Timeline


@app.cell(hide_code=True)
def _():
    sheet = pages.sheet()
    pages.heading("time_machine")
    return (sheet,)


@app.cell(hide_code=True)
def _():
    here = traces.traces_here(Path.cwd())
    chosen = mo.ui.dropdown(list(here), value="shipped: first-look", label="trace")
    path = mo.ui.text(placeholder="run.jsonl.zst", label="or the path of a file")
    upload = mo.ui.file(kind="button", label="or upload one", max_size=50_000_000)
    mo.hstack([chosen, path, upload], justify="start", gap=1.2, wrap=True, align="center")
    return chosen, here, path, upload


@app.cell(hide_code=True)
def _(chosen, here, path, upload):
    if upload.value:
        trace = traces.uploaded(upload.value[0].name, upload.value[0].contents)
    else:
        trace = traces.opened(path.value.strip() or here[chosen.value])
    mo.stop(trace.run is None, mo.callout(mo.md(f"**This cannot be opened.** {trace.problem}"), kind="danger"))
    run = trace.run
    mo.callout(mo.md(trace.note), kind="warn") if trace.note else None
    return (run,)


@app.cell(hide_code=True)
def _(run, sheet):
    shown = mo.ui.anywidget(Timeline(run, theme=sheet.theme))
    shown
    return (shown,)


@app.cell(hide_code=True)
def _(run, shown):
    step = traces.finished_step(run, int(shown.value.get("step", -1)))
    mo.vstack([words.headline(f"What was decided in step {step}"), mo.md(traces.decision_table(run, step))], gap=0)
    return (step,)


@app.cell(hide_code=True)
def _():
    seam = mo.ui.dropdown(list(traces.FORKED_SEAMS), value="victim", label="let it go on from here with another")
    return (seam,)


@app.cell(hide_code=True)
def _(run, seam):
    policy = mo.ui.dropdown(traces.choices(run, seam.value), value=traces.choices(run, seam.value)[0], label="namely")
    return (policy,)


@app.cell(hide_code=True)
def _(run, step):
    others = traces.others(run, step)
    other = mo.ui.dropdown(list(others), value=next(iter(others), None), label="or with another choice in this step, once")
    return other, others


@app.cell(hide_code=True)
def _(other, others, policy, seam, step):
    fork = mo.ui.run_button(label=f"Fork after step {step}")
    take = mo.ui.run_button(label="Fork here with this one")
    mo.vstack([mo.hstack([seam, policy, fork], justify="start", gap=1), *([mo.hstack([other, take], justify="start", gap=1)] if others else [])])
    return fork, take


@app.cell(hide_code=True)
def _(fork, other, others, policy, run, seam, sheet, step, take):
    mo.stop(not (fork.value or take.value), mo.md("A fork replays the recorded history up to that step and simulates what follows."))
    _forced = others[other.value] if take.value else None
    words.forked(run, _forced.at, _forced.seam, _forced, sheet) if _forced else words.forked(run, step, seam.value, policy.value, sheet)
    return


@app.cell(hide_code=True)
def _():
    picture = mo.ui.dropdown(list(album.pictures()), value="time to first token", label="another picture of this run")
    return (picture,)


@app.cell(hide_code=True)
def _(picture):
    limit = mo.ui.slider(steps=album.LIMITS, value=200, label="limit, ms", show_value=True, debounce=True)
    mo.hstack([picture, limit] if album.has_limit(picture.value) else [picture], justify="start", gap=1.2)
    return (limit,)


@app.cell(hide_code=True)
def _(limit, picture, run, sheet, step):
    _look = album.Look(step, limit.value / 1e3)
    pictures.drawn(sheet, lambda: album.pictures()[picture.value](run, _look))
    return


if __name__ == "__main__":
    app.run()
