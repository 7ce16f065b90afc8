"""Writes examples/own_model.ipynb from own_model.py, and runs it so that it shows its output and pictures.

    pip install -e '.[notebook]'
    python examples/make_notebook.py

In the script a line `# %%` begins a cell of code, and `# %% [markdown]` one of text.
"""

from __future__ import annotations

import pathlib
import re

SCRIPT = pathlib.Path(__file__).with_name("own_model.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def cells_of(script: str) -> list[tuple[str, str]]:
    """Returns the cells of a script: 'code' or 'markdown', and the text of each."""
    _, *parts = re.split(r"^# %%( \[markdown\])?\n", script, flags=re.MULTILINE)
    cells = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if mark else body
        cells.append(("markdown" if mark else "code", text.strip()))
    return cells


def main() -> None:
    """Writes the notebook."""
    import nbclient
    import nbformat
    from nbformat import v4

    make = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}
    cells = [make[kind](text, id=f"cell{number}") for number, (kind, text) in enumerate(cells_of(SCRIPT.read_text()))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False,
                            resources={"metadata": {"path": str(SCRIPT.parents[1])}}).execute()
    notebook.metadata = {"kernelspec": kernel}  # not the version of Python
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
