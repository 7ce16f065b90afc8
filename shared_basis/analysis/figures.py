"""The pictures of an analysis: bases, coefficients, gradients, painted by functions that `figures.png` calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shared_basis.analysis import bases
from shared_basis.analysis.bases import BasisSet
from shared_basis.analysis.gradient_flow import by_depth
from shared_basis.plotting import DASHES, MARKERS, Paint, Theme, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shared_basis.analysis.collect import Analysis

SIGNED = "RdBu_r"
"""The colour map of values of both signs, white at 0."""

SHADES = 33
"""Colours of a heat map, few enough for a PNG's palette to hold all of them."""

TILES = (24, 16)
"""Elements (rows) and channels (columns) of k×k filters that a picture shows at most; the CSV has all."""

PIXELS = 96
"""Rows and columns of 1×1 filters that it shows at most."""

MATRICES = 12
"""Coefficient matrices that a picture shows at most."""

NAMED = 24
"""Up to so many rows of a matrix are named."""

Painting = tuple[str, Paint, tuple[float, float]]
"""What a picture shows, in words; what paints it; its width and height in inches."""


def paintings(analyses: Sequence[Analysis]) -> dict[str, Painting]:
    """Returns the pictures of one run, or of two beside each other, by name.

    Filters, stem and coefficients are those of the first run.
    """
    one = analyses[0]
    found: dict[str, Painting] = {}
    for each in one.sets:
        name = each.name.replace("/", "_")
        pairs = [(run, other) for run in analyses for other in run.sets if other.name == each.name]
        found[f"products_{name}"] = (
            f"Products of the basis elements of {each.name}, and those of different elements alone.",
            functools.partial(_paint_products, pairs), (8.2, 3.5 * len(pairs)))
        found[f"filters_{name}"] = (f"The basis elements of {each.name} as images.", *_filters(one, each))
        if each.coefficients:
            found[f"coefficients_{name}"] = (
                f"The effective coefficients of layers of {each.name}.",
                functools.partial(_paint_coefficients, one, each),
                (8.2, 1.0 + 2.2 * math.ceil(min(len(each.coefficients), MATRICES) / 4)))
    for name, layers, matrices in bases.compared(one.sets):
        found[f"similarity_{name.replace('/', '_')}"] = (
            f"How alike the coefficients of the layers of {name} are.",
            functools.partial(_paint_similarity, one, name, layers, matrices), (8.2, 4.3))
    found["stem"] = ("The filters of the first layer.", functools.partial(_paint_stem, one), (4.8, 5.0))
    sharing = [run for run in analyses if run.sets]
    if sharing:
        names = list(dict.fromkeys(name for run in sharing for name in run.described))
        found["singular_values"] = (
            "Singular values of the shared arrays, falling.", functools.partial(_paint_singular_values, sharing, names),
            (8.2, 0.6 + 2.7 * math.ceil(len(names) / min(3, len(names)))))
        found["effective_rank"] = ("The effective rank of each basis over its number of elements.",
                                   functools.partial(_paint_effective_rank, sharing), (8.2, 3.6))
    if any(run.flow for run in analyses):
        found["gradient_flow"] = ("Norms of gradients by depth.", functools.partial(
            _paint_flow, [run for run in analyses if run.flow]), (8.2, 6.4))
    recorded = [run for run in analyses if run.recorded]
    if recorded:
        found["gradient_training"] = ("Norms of gradients by depth while training.",
                                      functools.partial(_paint_training, recorded), (8.2, 3.4 * len(recorded)))
    return found


def _title(run: Analysis) -> str:
    return f"{drawable(run.label, run.model, 40)}, step {run.step:,}"


def _heat(figure: Figure, axes: Axes, matrix: np.ndarray, *, limit: float | None = None, colormap: str = SIGNED,
          low: float | None = None) -> None:
    """Draws a matrix with its colour bar; `limit` is the largest value, by default that of the matrix."""
    finite = np.abs(matrix[np.isfinite(matrix)])
    limit = limit or float(finite.max(initial=0)) or 1.0
    image = axes.imshow(matrix, cmap=_colours(colormap), vmin=-limit if low is None else low, vmax=limit, aspect="auto",
                        interpolation="nearest" if max(matrix.shape) < 150 else "antialiased")
    axes.grid(False)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)


def _colours(name: str) -> Any:
    from matplotlib import colormaps
    return colormaps[name].resampled(SHADES)


def _logarithmic(axes: Axes) -> None:
    """Makes the y axis logarithmic, with plain numbers: powers of ten would be set as mathematics."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _blocks(found: BasisSet) -> list[tuple[str, int]]:
    """Returns the name and number of rows of each part of `BasisSet.all_rows`, unique elements together."""
    parts = [(name, array.shape[-1]) for name, array in found.shared.items()]
    unique = len(found.all_rows()[1]) - sum(count for _, count in parts)
    return [*parts, *([("unique", unique)] if unique else [])]


def _paint_products(pairs: Sequence[tuple[Analysis, BasisSet]], figure: Figure, theme: Theme) -> None:
    grid = figure.subplots(len(pairs), 2, squeeze=False)
    matrices = [found.all_rows()[0] for _, found in pairs]
    cosines = [bases.cosines(list(rows)) * (1 - np.eye(len(rows))) for rows in matrices]
    largest = max(float(np.abs(each).max()) for each in cosines)
    for (run, found), rows, apart, (whole, others) in zip(pairs, matrices, cosines, grid, strict=True):
        for axes, matrix, limit in ((whole, rows @ rows.T, None), (others, apart, largest)):
            _heat(figure, axes, matrix, limit=limit)
            edge, ticks = 0, []
            for name, count in _blocks(found):
                ticks.append((edge + (count - 1) / 2, name))
                edge += count
                if edge < len(matrix):
                    axes.axhline(edge - 0.5, color=theme.ink, linewidth=0.5)
                    axes.axvline(edge - 0.5, color=theme.ink, linewidth=0.5)
            axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks])
            axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], rotation=90, va="center")
        whole.set_title(f"{found.name}: products of elements\n{_title(run)}")
        others.set_title("cosines of different elements")


# Filters

def _tiles(array: np.ndarray, limits: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Arranges elements `[k, k, …, elements]` as an image, a row each and a column for each channel.

    Tiles of k×k pixels are apart by one; those of one pixel are not. Returns the image and what it leaves out.
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


def _filters(run: Analysis, found: BasisSet) -> tuple[Paint, tuple[float, float]]:
    """Returns what paints the elements of a set, and the size of the picture."""
    panels = dict(found.shared)
    if found.unique:
        panels[f"unique, {len(found.unique)} layers"] = np.concatenate(list(found.unique.values()), axis=-1)
    images = {name: _tiles(array, TILES) for name, array in panels.items()}
    height = max(image.shape[0] / image.shape[1] for image, _ in images.values())
    width = min(4.6, 9.6 / len(images))
    return functools.partial(_paint_filters, run, found, images), (
        width * len(images), min(max(width * height, 1.2), 9.0) + 0.75)


def _paint_filters(run: Analysis, found: BasisSet, images: dict[str, tuple[np.ndarray, str]], figure: Figure,
                   theme: Theme) -> None:
    grid = figure.subplots(1, len(images), squeeze=False)[0]
    limit = max(float(np.nanmax(np.abs(image))) for image, _ in images.values()) or 1.0
    for axes, (name, (image, shown)) in zip(grid, images.items(), strict=True):
        _image(axes, image, limit, theme)
        axes.set_title(f"{name}\n{shown}", fontsize=8.5)
    figure.suptitle(f"{found.name}: a row for each element, a column for each channel; red is {limit:.2g}, blue "
                    f"−{limit:.2g}, white 0. {_title(run)}", fontsize=9.5)


def _image(axes: Axes, image: np.ndarray, limit: float, theme: Theme) -> None:
    colours = _colours(SIGNED).with_extremes(bad=theme.background)
    axes.imshow(image, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_facecolor(theme.background)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _paint_stem(run: Analysis, figure: Figure, theme: Theme) -> None:
    size, _, channels, count = run.stem.shape
    columns = math.ceil(math.sqrt(count))
    axes = figure.subplots()
    limit = float(np.abs(run.stem).max()) or 1.0
    tiles = np.full((-(-count // columns) * (size + 1), columns * (size + 1), channels), np.nan)
    for index in range(count):
        top, left = (size + 1) * (index // columns), (size + 1) * (index % columns)
        tiles[top:top + size, left:left + size] = run.stem[..., index]
    if channels == 3:
        light = np.array([int(theme.background[at:at + 2], 16) / 255 for at in (1, 3, 5)])
        axes.imshow(np.where(np.isnan(tiles), light, 0.5 + tiles / (2 * limit)), interpolation="nearest")
        how = f"red, green and blue from −{limit:.2g} to {limit:.2g}; grey is 0"
    else:
        how = f"red is {limit:.2g}, blue −{limit:.2g}, white 0" + (
            f"; means over {channels} channels" if channels > 1 else "")
        _image(axes, tiles.mean(-1), limit, theme)
    _bare(axes)
    axes.set_title(f"stem: {count} filters of {size}×{size}×{channels}\n{how}. {_title(run)}", fontsize=8.5)


# Coefficients

def _paint_coefficients(run: Analysis, found: BasisSet, figure: Figure, theme: Theme) -> None:
    shown = dict(list(found.coefficients.items())[:MATRICES])
    grid = np.ravel(figure.subplots(math.ceil(len(shown) / 4), 4, squeeze=False))
    limit = max(float(np.abs(matrix).max()) for matrix in shown.values()) or 1.0
    for axes in grid[len(shown):]:
        axes.set_visible(False)
    for axes, (layer, matrix) in zip(grid, shown.items(), strict=False):
        image = axes.imshow(matrix, cmap=_colours(SIGNED), vmin=-limit, vmax=limit, aspect="auto",
                            interpolation="nearest")
        if layer in found.unique and found.shared:
            axes.axhline(found.unique[layer].shape[-1] - 0.5, color=theme.ink, linewidth=0.6)
        axes.set_title(layer.partition("/")[2], fontsize=9)
        axes.grid(False)
        axes.locator_params(integer=True, nbins=5)
    figure.colorbar(image, ax=list(grid), fraction=0.03, pad=0.01)
    figure.supxlabel("output channels", fontsize=9)
    figure.supylabel("elements" + (", unique ones above the line" if found.unique and found.shared else ""), fontsize=9)
    figure.suptitle(f"{found.name}: effective coefficients of {_part(len(shown), len(found.coefficients), 'layers')}. "
                    f"{_title(run)}", fontsize=9.5)


def _paint_similarity(run: Analysis, name: str, layers: Sequence[str], matrices: list[np.ndarray], figure: Figure,
                      theme: Theme) -> None:
    del theme
    left, right = figure.subplots(1, 2)
    _heat(figure, left, bases.cosines(matrices), limit=1.0)
    _heat(figure, right, bases.uncentered_linear_cka(matrices), limit=1.0, colormap="Blues", low=0.0)
    names = [layer.partition("/")[2].removeprefix("block") for layer in layers]
    for axes in (left, right):
        if len(names) <= NAMED:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
    left.set_title(f"{name}: cosine of\ncoefficient matrices")
    right.set_title("alignment of elements\n"
                    f"(by chance {bases.chance_alignment(matrices[0]):.2f})")
    figure.suptitle(_title(run), fontsize=9.5)


# Spectra

def _paint_singular_values(runs: Sequence[Analysis], names: Sequence[str], figure: Figure, theme: Theme) -> None:
    columns = min(3, len(names))
    grid = np.ravel(figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False))
    for axes in grid[len(names):]:
        axes.set_visible(False)
    for axes, name in zip(grid, names, strict=False):
        for run, colour in zip(runs, theme.colors, strict=False):
            described = run.described.get(name, [])
            shared = [basis for basis in described if not basis["unique"]] or described
            for basis, dash in zip(shared, (*DASHES, *DASHES * len(shared)), strict=False):
                values = basis["singular_values"]
                axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=dash,
                          label=f"{drawable(run.label, run.model, 30)}: {basis['basis'].removeprefix(f'{name}/')}")
        axes.set_ylim(bottom=0)
        axes.locator_params("x", integer=True)
        axes.set_xlabel("singular value number")
        axes.set_title(name)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid), key=lambda both: len(both[1]))
    if len(labels) <= 9:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.supylabel("singular value", fontsize=9)


def _paint_effective_rank(runs: Sequence[Analysis], figure: Figure, theme: Theme) -> None:
    axes = figure.subplots()
    names: dict[str, int] = {}
    for run in runs:
        for name, described in run.described.items():
            for basis in described:
                names.setdefault(_short(name, basis["basis"]), len(names))
    for run, colour, marker in zip(runs, theme.colors, MARKERS, strict=False):
        points = [(names[_short(name, basis["basis"])], basis["effective_rank"] / (basis["shared"] + basis["unique"]))
                  for name, described in run.described.items() for basis in described]
        axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=colour,
                  label=drawable(run.label, run.model, 40))
    step = max(1, math.ceil(len(names) / 40))
    axes.set_xticks(list(names.values())[::step], list(names)[::step], rotation=90, fontsize=6.5)
    axes.set_ylabel("effective rank ÷ elements")
    axes.set_ylim(top=1.03)
    axes.legend()
    axes.set_title("effective rank of each basis; 1 is orthonormal" + (
        "" if step == 1 else f" (one name in {step} is written)"))


def _short(name: str, basis: str) -> str:
    return basis.replace("block", "") if basis.startswith(f"{name}/") else f"{name} {basis.replace(' (shared)', '')}"


# Gradients

def _own_norms(layers: Sequence[str], norms: dict[str, float]) -> tuple[list[int], list[float]]:
    """Returns the depth of each layer that has parameters of its own, and the norm of all these together."""
    by_layer: dict[str, float] = {}
    for path in by_depth(layers, norms):
        layer = path.rpartition("/")[0]
        if layer in layers:
            by_layer[layer] = math.hypot(by_layer.get(layer, 0.0), norms[path])
    return [layers.index(layer) for layer in by_layer], list(by_layer.values())


def _paint_flow(runs: Sequence[Analysis], figure: Figure, theme: Theme) -> None:
    blocks, parameters = figure.subplots(2, 1)
    for run, colour, marker in zip(runs, theme.colors, MARKERS, strict=False):
        for step, dash in zip(_chosen(run), (":", "-"), strict=False):
            label = f"{drawable(run.label, run.model, 40)}, " + ("initialisation" if not step else f"step {step:,}")
            norms = list(run.flow[step]["blocks"].values())
            blocks.plot(range(1, len(norms) + 1), norms, color=colour, linestyle=dash, marker=marker, label=label)
            depths, own = _own_norms(run.layers, run.flow[step]["parameters"])
            parameters.plot([depth + 1 for depth in depths], own, color=colour, linestyle=dash, marker=marker,
                            markersize=3)
    blocks.set_title("gradient with respect to the output of each block")
    blocks.set_xlabel("block, in order of depth")
    parameters.set_title("gradient with respect to each layer's own parameters")
    parameters.set_xlabel("layer, in order of depth")
    for axes in (blocks, parameters):
        axes.locator_params("x", integer=True)
        _logarithmic(axes)
        axes.set_ylabel("norm")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _chosen(run: Analysis) -> list[int]:
    """Returns initialisation and the step that is analysed; the CSV has the other checkpoints too."""
    return sorted({0, run.step})


def _paint_training(runs: Sequence[Analysis], figure: Figure, theme: Theme) -> None:
    grid = figure.subplots(len(runs), 2, squeeze=False, width_ratios=(3, 2))
    depths = [_by_epoch(run, lambda path: path.endswith(("/coefficients", "/kernel"))) for run in runs]
    values = np.log10(np.concatenate([np.ravel(matrix) for _, matrix in depths if matrix.size]))
    for run, (paths, matrix), (heat, lines) in zip(runs, depths, grid, strict=True):
        epochs = [line["epoch"] for line in run.recorded]
        image = heat.pcolormesh(epochs, range(1, len(paths) + 1), np.log10(matrix), cmap=_colours("viridis"),
                                vmin=values.min(), vmax=values.max(), shading="nearest")
        heat.invert_yaxis()
        heat.grid(False)
        heat.set_ylabel("layer, in order of depth")
        heat.set_title(f"coefficients and kernels\n{drawable(run.label, run.model, 40)}", fontsize=9)
        figure.colorbar(image, ax=heat, label="log10 of the norm")
        names, bases = _by_epoch(run, lambda path: path.startswith("bases/"))
        for name, row, colour, dash in zip(names, bases, _cycle(theme.colors, len(names)),
                                           _cycle(DASHES, len(names)), strict=True):
            lines.plot(epochs, row, color=colour, linestyle=dash, label=name.removeprefix("bases/"))
        lines.set_title("shared arrays", fontsize=9)
        _logarithmic(lines)
        lines.set_ylabel("norm")
        heat.locator_params(integer=True)
        lines.locator_params("x", integer=True)
    limits = [axes.get_ylim() for axes in grid[:, 1]]
    for axes in grid[:, 1]:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    handles, labels = grid[0, 1].get_legend_handles_labels()
    if 0 < len(labels) <= 12:
        figure.legend(handles, labels, loc="outside lower right", ncols=4, fontsize=8)


def _cycle(values: Sequence[Any], count: int) -> list[Any]:
    return [values[index % len(values)] for index in range(count)]


def _by_epoch(run: Analysis, wanted: Callable[[str], bool]) -> tuple[list[str], np.ndarray]:
    """Returns the paths that are wanted, in order of depth, and the norms `[paths, lines of the record]`."""
    paths = [path for path in by_depth(run.layers, run.recorded[0]["norms"]) if wanted(path)]
    matrix = np.array([[line["norms"][path] for line in run.recorded] for path in paths])
    return paths, np.maximum(matrix, np.finfo(np.float32).tiny)
