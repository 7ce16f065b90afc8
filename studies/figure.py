"""Draws the errors of all studies against numbers of parameters, for light and dark pages."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared_basis.plotting import COLORS, DARK, MARKERS, set_log, svg
from shared_basis.runtime.files import write_atomic
from studies.definitions import EXACT, NO_PENALTY, Study, Variant
from studies.findings import StudyRow, interval, of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path("docs") / "images"
"""Where the pictures are, relative to the repository's root."""

KINDS = ("plain", "plain, narrower", "shared", "shared, no penalty", "shared, exactly orthonormal",
         "whole filters shared (tied, templates)")
"""What the colours and markers mean."""

COLUMNS = 3
"""Panels side by side."""

TICKS = (1, 1.5, 2, 3, 5, 7)
"""The leading figures of the labels of a logarithmic axis."""

OUTLIER = 4.0
"""A variant above this many times the panel's median error is drawn at the upper edge, with its error as a number."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A variant in a panel: parameters, and the mean and 95 % confidence interval of its error in percent."""

    kind: str
    parameters: int
    error: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Panel:
    """The variants that a study compares."""

    title: str
    points: tuple[Point, ...]


def kind(variant: Variant) -> str:
    """Returns which of `KINDS` a variant is."""
    if re.search(r"-(tied|template)", variant.network):
        return KINDS[5]
    if "-" not in variant.network:
        return KINDS[bool(re.search(r"w\d+$", variant.network))]
    return KINDS[3 if NO_PENALTY in variant.settings else 4 if EXACT in variant.settings else 2]


def panels(studies: Mapping[str, Study], rows: Mapping[str, Sequence[StudyRow]]) -> list[Panel]:
    """Returns a panel for each group of variants, of those with two runs or more; the plain network must be one."""
    found = []
    for name, study in studies.items():
        for group in study.groups:
            points = []
            for variant in group:
                runs = list(of(rows[name], variant).values())
                if len(runs) > 1:
                    mean, low, high = interval([run.final_error for run in runs])
                    points.append(Point(kind(variant), runs[0].parameters, mean, low, high))
            if len(points) > 1 and points[0].kind == KINDS[0]:
                data = re.split(r", | of |: ", study.title)[0]
                condition = "".join(group[0].label.partition(", ")[1:])
                found.append(Panel(f"{data}: {group[0].network}{condition}", tuple(points)))
    return found


def write_pictures(root: Path, studies: Mapping[str, Study], rows: Mapping[str, Sequence[StudyRow]]) -> None:
    """Draws docs/images/results-light.svg and results-dark.svg, if there are results to draw.

    Raises:
      UserError: Matplotlib is not installed.
    """
    drawn = panels(studies, rows)
    if not drawn:
        return
    lines = -(-len(drawn) // COLUMNS)
    light = svg(functools.partial(_paint, drawn), size=(9, 0.7 + 2.6 * lines))
    dark = re.sub("|".join(DARK), lambda match: DARK[match[0]], light)
    for theme, text in (("light", light), ("dark", dark)):
        (root / IMAGES).mkdir(parents=True, exist_ok=True)
        write_atomic(root / IMAGES / f"results-{theme}.svg", text)


def _paint(drawn: Sequence[Panel], figure: Figure) -> None:
    """Draws all panels and a legend."""
    grid = figure.subplots(-(-len(drawn) // COLUMNS), COLUMNS, squeeze=False).flatten()
    for number, axes in enumerate(grid):
        if number < len(drawn):
            _draw(drawn[number], axes)
            axes.set_xlabel("parameters, thousands")
            if number % COLUMNS == 0:
                axes.set_ylabel("test error, %")
        else:
            axes.set_axis_off()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [label for label in KINDS if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside upper left", ncols=3)


def _draw(panel: Panel, axes: Axes) -> None:
    """Draws the points of a panel."""
    from matplotlib.ticker import FixedLocator, NullLocator
    from matplotlib.transforms import ScaledTranslation

    axes.set_title(panel.title, fontsize=9.5)
    set_log(axes, "x")
    axes.xaxis.set_major_locator(FixedLocator([lead * 10**power for power in range(5) for lead in TICKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    limit = OUTLIER * statistics.median(point.error for point in panel.points)
    inside = [point for point in panel.points if point.error <= limit]
    low, high = min(point.low for point in inside), max(point.high for point in inside)
    margin = 0.06 * (high - low)
    edge = high + 2 * margin * (len(inside) < len(panel.points))
    axes.set(ylim=(max(0.0, low - margin), edge + margin))
    for point, shift in zip(panel.points, shifts([point.parameters for point in panel.points]), strict=True):
        index = KINDS.index(point.kind)
        scale = axes.figure.dpi_scale_trans  # type: ignore[union-attr]
        place = axes.transData + ScaledTranslation(shift * 7 / 72, 0, scale)
        x, color, marker = point.parameters / 1000, COLORS[index], MARKERS[index]
        if point in inside:
            axes.errorbar(x, point.error, [[point.error - point.low], [point.high - point.error]], color=color,
                          fmt=marker, markersize=5, elinewidth=1.3, transform=place, label=point.kind)
        else:
            axes.plot(x, edge, color=color, marker=marker, markersize=5, linestyle="", transform=place,
                      label=point.kind)
            axes.annotate(f"↑ {point.error:.0f} %", (x, edge), xytext=(shift * 7 + 5, 0), textcoords="offset points",
                          va="center", color=color, fontsize=9)
    smallest, largest = (end(point.parameters for point in panel.points) / 1000 for end in (min, max))
    axes.set(xlim=(0.75 * smallest, 1.15 * largest))


def shifts(parameters: Sequence[int]) -> list[float]:
    """Returns how far to move each point sideways, in widths of a marker, so that none hides another.

    Points of numbers of parameters within 4 % stand side by side, centred on where they are.
    """
    order = sorted(range(len(parameters)), key=lambda index: parameters[index])
    moved = [0.0] * len(parameters)
    together: list[int] = []
    for index in [*order, -1]:
        if together and (index < 0 or parameters[index] > 1.04 * parameters[together[0]]):
            for place, each in enumerate(together):
                moved[each] = place - (len(together) - 1) / 2
            together = []
        together.append(index)
    return moved
