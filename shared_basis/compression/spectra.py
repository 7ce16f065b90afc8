"""Spectra: the energy of a trained plain network that shared bases capture, by rank, without any training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from shared_basis.compression.layers import extract_layers, load_images, open_plain
from shared_basis.compression.ranks import Candidates, spectrum
from shared_basis.errors import UserError
from shared_basis.plotting import COLORS, DASHES, MARKERS, PANEL, png
from shared_basis.runtime.files import align, as_path, csv_text, open_files
from shared_basis.runtime.reporter import Reporter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIQUE = (0, 1, 2, 4)
"""The values of U in the printed table."""

COLUMNS = ("sharing", "group", "S", "U", "shared_elements", "unique_elements", "captured", "parameters", "macs")
"""The rows of the table; see `shared_basis.compression.ranks.spectrum`."""

Rows = Sequence[Mapping[str, Any]]


def write_spectra(source: str, reporter: Reporter, *, which: str = "latest",
                  overrides: Mapping[str, Any] | None = None, calibration: int | None = None,
                  output: str = "") -> dict[str, Any]:
    """Writes the energy of the plain network in the run `source` that shared bases capture, as a table and a plot.

    Args:
      which, overrides: see `Trained.open`.
      calibration: see `shared_basis.compression.compress.compress`.
      output: the table, FILE.csv; the plot FILE.png is put next to it. By default spectra.csv in `source`.

    Returns:
      `source`, `step`, `model`, `calibration`, `csv`, `png` and `rows` (see `shared_basis.compression.ranks.spectrum`).

    Raises:
      UserError: see `open_plain`; or `source` is a file, or a file cannot be written.
    """
    if os.path.isfile(source):
        raise UserError(f"--source={source} is a file, but --spectra needs a run: first --mode=import "
                        f"--weights={source} --workdir=RUN, then --source=RUN.")
    path = as_path(output) if output else as_path(source) / "spectra.csv"
    if path.suffix != ".csv":
        raise UserError(f"--output={output}: must end in .csv; the plot is put next to it.")
    if output and not open_files(path.parent).is_directory():
        raise UserError(f"--output={output}: the directory {path.parent} does not exist.")
    origin = open_plain(source, which, overrides)
    images = None
    if calibration != 0:
        images = load_images(origin.config, origin, calibration, False, reporter, origin.spec)
    plain = extract_layers(origin, origin.config, images, reporter)
    rows = spectrum(Candidates(plain, origin.config.model, origin.spec), UNIQUE, reporter)
    measured = images.count("train") if images else 0
    metric = f"outputs on {measured:,} training images" if measured else "filters"

    def paint(figure: Figure) -> None:
        draw(figure, rows, f"{origin.config.model.name}: what shared bases capture of its {metric}")

    groups = len({row["group"] for row in rows})
    picture = png(paint, size=(PANEL[0] * 0.8 * groups, PANEL[1]))
    _write(path, rows, picture)
    return {"source": origin.path, "step": origin.step, "model": origin.config.model.name,
            "calibration": measured, "csv": str(path), "png": str(path.with_suffix(".png")), "rows": rows}


def draw(figure: Figure, rows: Rows, title: str) -> None:
    """Draws a panel per group: explained energy over S, single and double, with U = 0 and U = 1."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    kinds = [(sharing, unique) for sharing in dict.fromkeys(row["sharing"] for row in rows) for unique in (0, 1)]
    for axes, group in zip(panels, groups, strict=True):
        for i, (sharing, unique) in enumerate(kinds):
            line = [row for row in rows if (row["group"], row["sharing"], row["U"]) == (group, sharing, unique)]
            axes.plot([row["S"] for row in line], [100 * row["captured"] for row in line], color=COLORS[i],
                      linestyle=DASHES[i], marker=MARKERS[i], label=f"{sharing}, U = {unique}")
        elements = next((row["shared_elements"] // row["S"] for row in rows if row["group"] == group
                         and "shared_elements" in row), None)
        axes.set_title("mean of all layers" if elements is None else
                       f"{group}: {'S' if elements == 1 else f'{elements} S'} shared elements")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("S")
    figure.suptitle(title, x=0, ha="left")
    panels[0].set_ylabel("explained energy, %")
    panels[0].set_ylim(0, 102)
    panels[-1].legend(loc="lower right")


def _write(path: PurePath, rows: Rows, picture: bytes) -> None:
    """Writes the table and the plot, either both or neither."""
    cells = [[f"{value:.6f}" if isinstance(value := row.get(name, ""), float) else value for name in COLUMNS]
             for row in rows]
    try:
        open_files(path.parent).write({path.name: csv_text(COLUMNS, cells), path.with_suffix(".png").name: picture})
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --output=FILE.csv.") from error


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `write_spectra` as a human-readable table for all layers; files have it by group."""
    rows = [row for row in result["rows"] if row["group"] == "all"]
    kinds = list(dict.fromkeys((row["sharing"], row["U"]) for row in rows))
    found = {(row["sharing"], row["U"], row["S"]): row for row in rows}
    metric = f"outputs on {result['calibration']:,} training images" if result["calibration"] else "filters"
    table = [["S", *(f"{sharing} U={unique}" for sharing, unique in kinds)]]
    for shared in dict.fromkeys(row["S"] for row in rows):
        cells = [found.get((*kind, shared)) for kind in kinds]
        table.append([str(shared), *("" if cell is None else f"{100 * cell['captured']:.1f} ({cell['parameters']:.2f})"
                                     for cell in cells)])
    return "\n".join([
        f"{result['model']} at step {result['step']:,} of {result['source']}: explained energy of {metric}, in %, mean "
        "of all layers (in parentheses: parameters relative to the plain network)",
        *align(table, right=True),
        f"by group and as a plot: {result['csv']}, {result['png']}"])
