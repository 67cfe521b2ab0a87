"""What the apps share: the live engine, policies from text, recorded runs, figures in a page's theme, and the server that
shows all apps in one process. The apps themselves (apps/*.py, marimo) only wire controls to pictures."""
