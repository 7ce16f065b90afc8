"""Plots of bases: inner products of elements, filters, coefficients, singular values."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shared_basis.analysis import bases
from shared_basis.analysis.bases import BasisSet
from shared_basis.plotting import BACKGROUND, COLORS, DASHES, INK, MARKERS, POSITIVE, SIGNED, Paint, colormap, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shared_basis.analysis.collect import Analysis
    from shared_basis.nn.types import Array

TILES = (24, 16)
"""Maximum numbers of elements (rows) and channels (columns) of k×k filters in a plot; the CSV contains all."""

PIXELS = 96
"""Maximum numbers of rows and columns for 1×1 filters."""

MATRICES = 12
"""Maximum number of coefficient matrices in a plot."""

LETTERS = 13
"""Characters of a title per inch."""

NAMED = 24
"""Maximum number of matrix rows to label."""


def _title(run: Analysis) -> str:
    return f"{run.drawn_name()}, step {run.step:,}"


def _heat(figure: Figure, axes: Axes, matrix: np.ndarray, limit: float | None = None, *, signed: bool = True) -> None:
    """Draws a matrix with a colour bar from −`limit` (or 0 unless `signed`) to `limit`, by default its maximum."""
    finite = np.abs(matrix[np.isfinite(matrix)])
    limit = limit or float(finite.max(initial=0)) or 1.0
    image = axes.imshow(matrix, cmap=colormap(SIGNED if signed else POSITIVE), vmin=-limit if signed else 0.0,
                        vmax=limit, aspect="auto",
                        interpolation="nearest" if max(matrix.shape) < 150 else "antialiased")
    axes.grid(False)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)


def _blocks(found: BasisSet) -> list[tuple[str, int]]:
    """Returns the name and number of rows of each part of `BasisSet.all_rows`, with unique elements combined."""
    parts = [(name, array.shape[-1]) for name, array in found.shared.items()]
    unique = len(found.all_rows()[1]) - sum(count for _, count in parts)
    return [*parts, *([("unique", unique)] if unique else [])]


def paint_products(pairs: Sequence[tuple[Analysis, BasisSet]], figure: Figure) -> None:
    """Paints inner products of elements and cosines of different elements, one row per run."""
    grid = figure.subplots(len(pairs), 2, squeeze=False)
    matrices = [found.all_rows()[0] for _, found in pairs]
    cosines = [bases.cosines(list(rows)) * (1 - np.eye(len(rows))) for rows in matrices]
    largest = max(float(np.abs(each).max()) for each in cosines)
    for (run, found), rows, apart, (whole, others) in zip(pairs, matrices, cosines, grid, strict=True):
        for axes, matrix, limit in ((whole, rows @ rows.T, None), (others, apart, largest)):
            _heat(figure, axes, matrix, limit)
            edge, ticks = 0, []
            for name, count in _blocks(found):
                ticks.append((edge + (count - 1) / 2, name))
                edge += count
                if edge < len(matrix):
                    axes.axhline(edge - 0.5, color=INK, linewidth=0.5)
                    axes.axvline(edge - 0.5, color=INK, linewidth=0.5)
            axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks])
            axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], rotation=90, va="center")
        whole.set_title(f"{found.name}: inner products of elements\n{_title(run)}")
        others.set_title("cosines of different elements")


# Filters

def _tiles(array: np.ndarray, limits: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Arranges elements `[k, k, …, elements]` as an image with a row per element and a column per channel.

    k×k tiles are separated by one pixel, 1×1 tiles are not. Returns the image and a description of what it omits.
    """
    size = array.shape[0]
    flat = np.asarray(array, np.float64).reshape(size, size, -1, array.shape[-1])
    limits = limits if size > 1 else (PIXELS, PIXELS)
    channels, elements = bases.strongest_channels(array, limits[1]), min(flat.shape[3], limits[0])
    chosen = flat[:, :, channels, :elements].transpose(3, 0, 2, 1)  # [elements, k, channels, k]
    if size > 1:
        chosen = np.pad(chosen, ((0, 0), (0, 1), (0, 0), (0, 1)), constant_values=np.nan)
    image = chosen.reshape(elements * chosen.shape[1], -1)
    shown = f"{_part(elements, flat.shape[3], 'elements')}, {_part(len(channels), flat.shape[2], 'channels')}"
    return image, shown + (" (the strongest)" if len(channels) < flat.shape[2] else "")


def _part(shown: int, all_of_them: int, what: str) -> str:
    return f"{shown} {what}" if shown == all_of_them else f"{shown} of {all_of_them} {what}"


def filters(run: Analysis, found: BasisSet) -> tuple[Paint, tuple[float, float]]:
    """Returns the paint function for the elements of a set as images, and the size of the plot."""
    panels = dict(found.shared)
    if found.unique:
        panels[f"unique, {len(found.unique)} layers"] = np.concatenate(list(found.unique.values()), axis=-1)
    return _filters(panels, f"{found.name}: ", f". {_title(run)}")


def draw_basis(basis: Array | np.ndarray, name: str = "basis") -> bytes:
    """Plots the elements of a basis `[k, k, C, s]` as images, with a row per element and a column per channel.

        pathlib.Path("basis.png").write_bytes(draw_basis(params["bases"]["body"]))

    Large bases are cropped to the first elements and the strongest channels. Requires Matplotlib.

    Returns:
      The contents of a PNG file.

    Raises:
      ValueError: `basis` is not an array of that shape, or is empty.
      UserError: Matplotlib is not installed.
    """
    array = np.asarray(basis, np.float64)
    if array.ndim != 4 or array.shape[0] != array.shape[1] or not array.size:
        raise ValueError(f"basis of shape {list(array.shape)}: must be [k, k, C, elements]; draw the members of a "
                         "stack one by one")
    return png(*_filters({name: array}))


def _filters(panels: dict[str, np.ndarray], before: str = "", after: str = "") -> tuple[Paint, tuple[float, float]]:
    """Returns the paint function for named arrays side by side, and the size; `before` and `after` frame the title."""
    images = {name: _tiles(array, TILES) for name, array in panels.items()}
    height = max(image.shape[0] / image.shape[1] for image, _ in images.values())
    width = min(4.6, 9.6 / len(images))
    return functools.partial(_paint_filters, images, before, after), (
        width * len(images), min(max(width * height, 1.2), 9.0) + 0.75)


def _paint_filters(images: dict[str, tuple[np.ndarray, str]], before: str, after: str, figure: Figure) -> None:
    grid = figure.subplots(1, len(images), squeeze=False)[0]
    limit = max(float(np.nanmax(np.abs(image))) for image, _ in images.values()) or 1.0
    for axes, (name, (image, shown)) in zip(grid, images.items(), strict=True):
        _image(axes, image, limit)
        axes.set_title(f"{name}\n{shown}", fontsize=8.5)
    title = (f"{before}one row per element, one column per channel; red is {limit:.2g}, blue −{limit:.2g}, "
             f"white 0{after}")
    figure.suptitle(textwrap.fill(title, int(LETTERS * figure.get_figwidth())), fontsize=9.5)


def _image(axes: Axes, image: np.ndarray, limit: float) -> None:
    shades = colormap(SIGNED).with_extremes(bad=BACKGROUND)
    axes.imshow(image, cmap=shades, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_facecolor(BACKGROUND)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def paint_stem(run: Analysis, stem: np.ndarray, figure: Figure) -> None:
    """Paints the filters `[k, k, channels, T]` of the first layer, in colour if the images are."""
    size, _, channels, count = stem.shape
    columns = math.ceil(math.sqrt(count))
    axes = figure.subplots()
    limit = float(np.abs(stem).max()) or 1.0
    tiles = np.full((-(-count // columns) * (size + 1), columns * (size + 1), channels), np.nan)
    for index in range(count):
        top, left = (size + 1) * (index // columns), (size + 1) * (index % columns)
        tiles[top:top + size, left:left + size] = stem[..., index]
    if channels == 3:
        light = np.array([int(BACKGROUND[at:at + 2], 16) / 255 for at in (1, 3, 5)])
        axes.imshow(np.where(np.isnan(tiles), light, 0.5 + tiles / (2 * limit)), interpolation="nearest")
        how = f"red, green and blue from −{limit:.2g} to {limit:.2g}; grey is 0"
    else:
        how = f"red is {limit:.2g}, blue −{limit:.2g}, white 0" + (
            f"; means over {channels} channels" if channels > 1 else "")
        _image(axes, tiles.mean(-1), limit)
    _bare(axes)
    axes.set_title(f"stem: {count} filters of {size}×{size}×{channels}\n{how}. {_title(run)}", fontsize=8.5)


# Coefficients

def paint_coefficients(run: Analysis, found: BasisSet, figure: Figure) -> None:
    """Paints the effective coefficients of layers with a common colour scale."""
    shown = dict(list(found.coefficients.items())[:MATRICES])
    grid = np.ravel(figure.subplots(math.ceil(len(shown) / 4), 4, squeeze=False))
    limit = max(float(np.abs(matrix).max()) for matrix in shown.values()) or 1.0
    for axes in grid[len(shown):]:
        axes.set_visible(False)
    for axes, (layer, matrix) in zip(grid, shown.items(), strict=False):
        image = axes.imshow(matrix, cmap=colormap(SIGNED), vmin=-limit, vmax=limit, aspect="auto",
                            interpolation="nearest")
        if layer in found.unique and found.shared:
            axes.axhline(found.unique[layer].shape[-1] - 0.5, color=INK, linewidth=0.6)
        axes.set_title(layer.partition("/")[2], fontsize=9)
        axes.grid(False)
        axes.locator_params(integer=True, nbins=5)
    figure.colorbar(image, ax=list(grid), fraction=0.03, pad=0.01)
    figure.supxlabel("output channels", fontsize=9)
    figure.supylabel("elements" + (", unique ones above the line" if found.unique and found.shared else ""), fontsize=9)
    figure.suptitle(f"{found.name}: effective coefficients of {_part(len(shown), len(found.coefficients), 'layers')}. "
                    f"{_title(run)}", fontsize=9.5)


def paint_similarity(run: Analysis, name: str, layers: Sequence[str], matrices: list[np.ndarray],
                     figure: Figure) -> None:
    """Paints cosine and alignment of the coefficients of all pairs of `layers`, which share one array."""
    left, right = figure.subplots(1, 2)
    _heat(figure, left, bases.cosines(matrices), 1.0)
    _heat(figure, right, bases.uncentered_linear_cka(matrices), 1.0, signed=False)
    names = [layer.partition("/")[2].removeprefix("block") for layer in layers]
    for axes in (left, right):
        if len(names) <= NAMED:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
    left.set_title(f"{name}: cosine of\ncoefficient matrices")
    right.set_title(f"alignment of elements\n(by chance {bases.chance_alignment(matrices[0]):.2f})")
    figure.suptitle(_title(run), fontsize=9.5)


# Spectra

def paint_singular_values(runs: Sequence[Analysis], names: Sequence[str], figure: Figure) -> None:
    """Paints the singular values of the shared arrays in decreasing order, one axes for each of the sets `names`."""
    columns = min(3, len(names))
    grid = np.ravel(figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False))
    for axes in grid[len(names):]:
        axes.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        for run, colour in zip(runs, COLORS, strict=False):
            described = run.described.get(name, [])
            shared = [basis for basis in described if not basis["unique"]] or described
            for basis, dash in zip(shared, (*DASHES, *DASHES * len(shared)), strict=False):
                values = basis["singular_values"]
                axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=dash,
                          label=f"{run.drawn_name(30)}: {basis['basis'].removeprefix(f'{name}/')}")
        axes.set_ylim(bottom=0)
        axes.locator_params("x", integer=True)
        axes.set_xlabel("singular value number")
        axes.set_title(name)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid), key=lambda both: len(both[1]))
    if len(labels) <= 9:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.supylabel("singular value", fontsize=9)


def paint_effective_rank(runs: Sequence[Analysis], figure: Figure) -> None:
    """Paints the effective rank of each basis relative to its number of elements."""
    axes = figure.subplots()
    names: dict[str, int] = {}
    for run in runs:
        for name, described in run.described.items():
            for basis in described:
                names.setdefault(_short(name, basis["basis"]), len(names))
    for run, colour, marker in zip(runs, COLORS, MARKERS, strict=False):
        points = [(names[_short(name, basis["basis"])], basis["effective_rank"] / (basis["shared"] + basis["unique"]))
                  for name, described in run.described.items() for basis in described]
        axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=colour, label=run.drawn_name())
    step = max(1, math.ceil(len(names) / 40))
    axes.set_xticks(list(names.values())[::step], list(names)[::step], rotation=90, fontsize=6.5)
    axes.set_ylabel("effective rank ÷ elements")
    axes.set_ylim(top=1.03)
    axes.legend()
    axes.set_title("effective rank of each basis; 1 is orthonormal" + (
        "" if step == 1 else f" (one name in {step} is shown)"))


def _short(name: str, basis: str) -> str:
    return basis.replace("block", "") if basis.startswith(f"{name}/") else f"{name} {basis.replace(' (shared)', '')}"


