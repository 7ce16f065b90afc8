"""The mode `report --runs`: a page that compares runs by error against parameters, MACs and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared_basis.plotting import COLORS, MARKERS, Picture, picture, set_log
from shared_basis.report.html import Html, element, page, section, shown, table
from shared_basis.report.output import FOLDER, PAGE, picture_files, write_report
from shared_basis.report.plots import short_number
from shared_basis.report.points import Point, Spread, as_result, gather_points, value
from shared_basis.runtime.files import as_path, csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("error_parameters.png", "error_macs.png", "error_time.png", "comparison.csv")
"""All files that may be in the folder next to the page."""

_BEST = {"validation": "the best validation epoch",
         "test": "the best test epoch, chosen on the test images as in the paper"}
"""The epoch of the column `best`, by `Point.chosen_on`."""

_AXES = {"parameters": ("Error against parameters", "parameters"),
         "macs": ("Error against MACs", "multiply-accumulates of one image"),
         "time": ("Error against time", "time of training (seconds)")}


def compare(directories: Sequence[str], output: str) -> dict[str, Any]:
    """Writes `report.html` and `report/` on the runs in `directories` to the directory `output`.

    Returns:
      `report` (the page's path), `files` (the paths of other files), `points`: see `points.as_result`, and `warnings`
      about damaged metrics.

    Raises:
      UserError: see `gather_points`; or the report cannot be written.
    """
    points, fields = gather_points(directories)
    pictures = [found for axis in _AXES if (found := _scatter(points, axis))]
    header, rows, numbers = _rows(points, fields)
    files = picture_files(pictures) | {"comparison.csv": _csv(points)}
    count = sum(len(point.runs) for point in points)
    warnings = [run.warning for point in points for run in point.runs if run.warning]
    drawn = ([element("p", "Numbers refer to the table of networks below.", class_="soft"),
              element("div", *(shown(each, FOLDER) for each in pictures), class_="panels")]
             if pictures else [element("p", "No run has been evaluated yet.")])
    content = page(
        f"{count} run{'s' * (count > 1)} compared", element("p", _explanation(points), class_="soft"),
        *(element("p", f"Warning: {warning}.") for warning in warnings), section("Test error", *drawn),
        section("Networks", table(header, rows, "Networks", numbers=numbers)),
        section("Runs", _runs(points)))
    directory = as_path(output)
    write_report(directory, content, files, FILES)
    return {"report": str(directory / PAGE), "files": [str(directory / FOLDER / name) for name in files],
            "points": as_result(points), "warnings": warnings}


def render(result: Mapping[str, Any]) -> str:
    """Returns the result of `compare` as human-readable lines."""
    lines = []
    for point in result["points"]:
        error = (spread_text(Spread(*(math.nan if number is None else number for number in (
            point["test_error_mean"], point["test_error_deviation"])))))
        lines.append(f"  {point['label']}: test error {error} %, n = {point['n']}, {point['parameters']:,} parameters, "
                     f"{point['macs']:,} MACs")
    return "\n".join([result["report"], *lines, *(f"warning: {warning}" for warning in result["warnings"])])


def spread_text(spread: Spread, digits: int = 2) -> str:
    """Returns mean ± standard deviation, only the mean for a single run, or a dash if unknown."""
    if math.isnan(spread.mean):
        return "–"
    return f"{spread.mean:,.{digits}f}" + ("" if math.isnan(spread.deviation) else f" ± {spread.deviation:,.{digits}f}")


def _explanation(points: Sequence[Point]) -> str:
    protocols = {point.chosen_on for point in points if point.chosen_on}
    return ("Runs that differ only in the seed, or in fields without effect on the result, are one point: mean ± "
            "standard deviation (n − 1) of n runs. Error: misclassified test images after the last epoch"
            + (f"; best: after {' or '.join(_BEST[name] for name in sorted(protocols))}"
               if protocols else "")
            + ". Time: of training, without compilation and evaluations; comparable only on the same "
              "devices.")


def _scatter(points: Sequence[Point], axis: str) -> Picture | None:
    """Returns a plot of the errors against `axis`, with standard deviations; None if no values are known.

    Points are labelled with their numbers in the table next to the plot.
    """
    title, unit = _AXES[axis]
    at = [(number, point, _position(point, axis)) for number, point in enumerate(points, start=1)
          if not math.isnan(point.error.mean) and not math.isnan(_position(point, axis).mean)]
    if not at:
        return None

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import EngFormatter
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=unit, ylabel="test error (%)")
        for number, point, where in at:
            kind = (number - 1) % len(COLORS)
            axes.errorbar(where.mean, point.error.mean, xerr=_bar(where), yerr=_bar(point.error), capsize=3,
                          color=COLORS[kind], marker=MARKERS[kind], markersize=6)
            axes.annotate(str(number), (where.mean, point.error.mean), (6, 6), textcoords="offset points",
                          color=COLORS[kind])
        means, errors = [where.mean for _, _, where in at], [point.error.mean for _, point, _ in at]
        axes.margins(0.15)
        if max(means) > 8 * min(means):
            set_log(axes, "x")
        elif axes.get_xlim()[0] < 0:
            axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if max(errors) > 8 * min(errors) > 0:
            set_log(axes, "y")
            axes.set_ylim(min(errors) / 3, min(100.0, max(errors) * 2))  # error bars may extend below 0

    text = "; ".join(f"{number}: {point.label} {spread_text(point.error)} % at {short_number(where.mean)}"
                     for number, point, where in at)
    return picture(f"error_{axis}", f"{title}: {text}.", paint, (4.8, 3.8))


def _position(point: Point, axis: str) -> Spread:
    return point.seconds if axis == "time" else Spread(getattr(point, axis), math.nan)


def _bar(spread: Spread) -> float | None:
    return None if math.isnan(spread.deviation) else spread.deviation


def _rows(points: Sequence[Point], fields: Sequence[str]) -> tuple[list[str], list[list[str]], range]:
    """Returns the header and rows of the table of points, and the indices of its numeric columns."""
    differing = [field for field in fields if field != "model.name"]
    header = ["point", "network", "error (%)", "best (%)", "n", "epochs", "parameters", "MACs", "time (s)", *differing]
    rows = [[str(number), point.first.config.model.name, spread_text(point.error), spread_text(point.best_error),
             str(len(point.runs)), _epochs(point), f"{point.parameters:,}", f"{point.macs:,}",
             spread_text(point.seconds, 1), *(value(point.first, field) for field in differing)]
            for number, point in enumerate(points, start=1)]
    return header, rows, range(2, len(header) - len(differing))


def _epochs(point: Point) -> str:
    done, wanted = point.first.epoch, point.first.config.train.epochs
    return str(done) if done == wanted else f"{done} of {wanted}"


def _runs(points: Sequence[Point]) -> Html:
    rows = []
    for number, point in enumerate(points, start=1):
        for run in point.runs:
            alone = Point([run], point.label)
            rows.append([str(run.path), str(number), run.config.model.name, str(run.config.seed),
                         str(run.record["devices"] or "–"), spread_text(alone.seconds, 1), spread_text(alone.error),
                         spread_text(alone.best_error)])
    return table(["workdir", "point", "network", "seed", "devices", "time (s)", "error (%)", "best (%)"], rows, "Runs",
                 numbers=(1, 3, 5, 6, 7))


def _csv(points: Sequence[Point]) -> bytes:
    rows = as_result(points)
    cells = [["" if entry is None else " ".join(map(str, entry)) if isinstance(entry, list) else str(entry)
              for entry in row.values()] for row in rows]
    return csv_text(list(rows[0]), cells).encode(errors="backslashreplace")  # a path may not be valid Unicode
