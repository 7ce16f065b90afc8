"""Selects the plots of an analysis and their sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from shared_basis.analysis import bases, basis_figures, gradient_figures
from shared_basis.analysis.collect import Analysis
from shared_basis.plotting import Paint

WIDTH = 8.2
"""The default size of plots, in inches."""

Painting = tuple[Paint, tuple[float, float]]
"""A paint function, and the plot's width and height in inches: see `plotting.png`."""


def paintings(analyses: Sequence[Analysis]) -> dict[str, Painting]:
    """Returns the plots of one run, or of two side by side, by name.

    Filters, stem and coefficients are only shown for the first run.
    """
    one = analyses[0]
    found: dict[str, Painting] = {}
    for each in one.sets:
        name = each.name.replace("/", "_")
        pairs = [(run, other) for run in analyses for other in run.sets if other.name == each.name]
        found[f"products_{name}"] = (functools.partial(basis_figures.paint_products, pairs), (WIDTH, 3.5 * len(pairs)))
        found[f"filters_{name}"] = basis_figures.filters(one, each)
        if each.coefficients:
            rows = math.ceil(min(len(each.coefficients), basis_figures.MATRICES) / 4)
            found[f"coefficients_{name}"] = (functools.partial(basis_figures.paint_coefficients, one, each),
                                             (WIDTH, 1.0 + 2.2 * rows))
    for name, layers, matrices in bases.compared(one.sets):
        found[f"similarity_{name.replace('/', '_')}"] = (
            functools.partial(basis_figures.paint_similarity, one, name, layers, matrices), (WIDTH, 4.3))
    if one.stem is not None:
        found["stem"] = functools.partial(basis_figures.paint_stem, one, one.stem), (4.8, 5.0)
    if sharing := [run for run in analyses if run.sets]:
        names = list(dict.fromkeys(name for run in sharing for name in run.described))
        found["singular_values"] = (functools.partial(basis_figures.paint_singular_values, sharing, names),
                                    (WIDTH, 0.6 + 2.7 * math.ceil(len(names) / min(3, len(names)))))
        found["effective_rank"] = functools.partial(basis_figures.paint_effective_rank, sharing), (WIDTH, 3.6)
    if flowing := [run for run in analyses if run.flow]:
        found["gradient_flow"] = functools.partial(gradient_figures.paint_flow, flowing), (WIDTH, 6.4)
    if recorded := [run for run in analyses if run.recorded]:
        found["gradient_training"] = (functools.partial(gradient_figures.paint_training, recorded),
                                      (WIDTH, 3.4 * len(recorded)))
    return found
