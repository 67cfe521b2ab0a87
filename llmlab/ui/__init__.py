"""Pictures of a run: altair figures, themes, and the report of one HTML file. Imports no engine.

    from llmlab.ui import theme, figures, report
    theme.enable("light")
    figures.request_timeline(run)
    report.write_report(run, "report.html")
"""
