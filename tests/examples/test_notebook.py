"""The notebook is what its script says, runs in Jupyter, and keeps what it claims."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from helpers import ROOT

from examples.make_notebook import NOTEBOOK, SCRIPT, cells_of

CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def printed(cells: list[Any]) -> str:
    """Returns what cells print."""
    return "".join("".join(output["text"]) for cell in cells for output in cell.get("outputs", ())
                   if output["output_type"] == "stream" and output["name"] == "stdout")


def test_the_notebook_is_its_script() -> None:
    """If not: python examples/make_notebook.py."""
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in CELLS]
    assert found == cells_of(SCRIPT.read_text())
    assert [kind for kind, _ in found[:3]] == ["markdown", "markdown", "code"]
    assert all(text and "# %%" not in text for _, text in found)


def test_cells_are_told_apart() -> None:
    assert cells_of("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1  # %% no\n\n# a comment\n") == [
        ("markdown", "# Title\n\ntext"), ("code", "x = 1  # %% no\n\n# a comment")]


def test_it_shows_what_it_printed_and_drew() -> None:
    text = printed(CELLS)
    pictures = [output for cell in CELLS for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert len(pictures) == (SCRIPT.read_text().count("plt.show()")) == 4
    assert_keeps_its_claims(text)


def assert_keeps_its_claims(text: str) -> None:
    """Asserts what the text of the notebook says of the figures that it prints."""
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) parameters, test", text)]
    scores = [float(score) for score in re.findall(r"test accuracy ([\d.]+) %", text)]
    products = [float(product) for product in re.findall(r"two elements ([\d.]+)", text)]
    plain, *smaller = sizes
    assert len(smaller) == len(scores) - 1 == 8
    assert max(smaller) < plain / 2
    assert min(scores[:3]) > 93
    assert products[2] < 0.1 < products[1]
    for compressed, tuned in zip(scores[3::2], scores[4::2], strict=True):
        assert tuned > max(93, compressed - 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_it_runs_in_jupyter() -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert_keeps_its_claims(printed(notebook.cells))
