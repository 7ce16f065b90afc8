"""Pictures: one look for all of them, as PNG.

A picture is painted by a function of a Matplotlib figure and its `Theme`. Matplotlib's settings are its defaults and
ours while it is painted, and the caller's again afterwards; pyplot, which keeps figures and opens windows, is never
imported. Pictures are light; a page turns them dark (`shared_basis.report.html`).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared_basis.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 180
"""Pixels an inch: twice what a screen of 1280 pixels shows of a picture, for those that have more."""

PANEL = (4.8, 3.3)
"""Width and height in inches of a picture with one pair of axes: its letters can be read on a telephone too."""


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours of pictures, as '#rrggbb'."""

    background: str
    ink: str
    """Text and axes."""
    faint: str
    """Grid lines and what should step back."""
    colors: tuple[str, ...]
    """For data, each 3:1 or more against the background, and to be told apart by the colour-blind (after Okabe and
    Ito). Lines have a dash and a marker of their own as well."""
    colormap: str
    """Matplotlib's name of a map from the background, for the smallest value, to its opposite."""


LIGHT = Theme("#ffffff", "#1f2328", "#d0d7de",
              ("#0072b2", "#d55e00", "#007a5a", "#a3408a", "#7a6200", "#56606b"), "Blues")

DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""The dash and the marker of line i, as `Theme.colors[i]` is its colour."""

Paint = Callable[["Figure", Theme], None]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture."""

    name: str
    """Of its file, without the ending."""
    text: str
    """What it shows, for those who cannot see it."""
    light: bytes
    """The PNG file."""


def picture(name: str, text: str, paint: Paint, size: tuple[float, float] = PANEL,
            colors: int | None = 128) -> Picture:
    """Paints a picture; `size` and `colors` as in `png`.

    Raises:
      UserError: Matplotlib is not installed.
    """
    return Picture(name, text, png(paint, size=size, colors=colors))


def png(paint: Paint, theme: Theme = LIGHT, size: tuple[float, float] = PANEL, colors: int | None = 128) -> bytes:
    """Paints a picture, and returns it as a PNG file.

    Args:
      size: width and height in inches.
      colors: the number that the file is limited to, for a third of its size; None, for photographs and colour maps, is
        no limit.

    Raises:
      UserError: Matplotlib is not installed.
    """
    with _style(theme):
        from matplotlib.figure import Figure
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        paint(figure, theme)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue() if colors is None else _limit_colors(file.getvalue(), colors)


def data_uri(image: bytes, kind: str = "png") -> str:
    """Returns an image file, of the `kind` 'png' or 'jpeg', as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def label_lines(axes: Axes) -> None:
    """Writes the label of each line of `axes` at its right end, in its colour; those that would meet move apart."""
    axes.autoscale_view()
    ends = []
    for line in axes.get_lines():
        points = np.asarray(line.get_xydata(), float)
        points = points[np.isfinite(points).all(1)]
        if len(points) and not str(line.get_label()).startswith("_"):
            ends.append((float(axes.transData.transform(points[-1])[1]), tuple(points[-1]), line))
    points_a_pixel = 72 / DPI
    last = float("-inf")
    for y, end, line in sorted(ends, key=lambda each: each[0]):
        last = max(y, last + 11 / points_a_pixel)
        axes.annotate(str(line.get_label()), end, xytext=(7, (last - y) * points_a_pixel), textcoords="offset points",
                      va="center", color=line.get_color(), fontsize=9, annotation_clip=False)


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], bars: Sequence[tuple[float, float]],
                 labels: Sequence[str], theme: Theme) -> None:
    """Writes each label beside its point, where it meets no other label, point or bar, if there is such a place.

    Args:
      points: x and y of each point.
      bars: by how much the error bars of each reach out in x and y.
    """
    from matplotlib.patheffects import withStroke
    axes.autoscale_view()
    height, width = 11.0, 5.6  # of a letter, in points, as are all that follow
    spots = [axes.transData.transform(point) * 72 / DPI for point in points]
    taken: list[tuple[Any, ...]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    for (x, y), (x_bar, y_bar) in zip(points, bars, strict=True):
        for ends in ([(x - x_bar, y), (x + x_bar, y)], [(x, y - y_bar), (x, y + y_bar)]):
            (left, bottom), (right, top) = axes.transData.transform(ends) * 72 / DPI
            taken.append((left - 1, bottom - 1, right + 1, top + 1))
    left_end, _, right_end, top_end = np.asarray(axes.get_window_extent().extents) * 72 / DPI
    for (x, y), point, label in zip(spots, points, labels, strict=True):
        wide = width * len(label)

        def box(offset: tuple[float, float], x: float = x, y: float = y, wide: float = wide) -> tuple[Any, ...]:
            left, middle = x + offset[0] - (0 if offset[0] > 0 else wide if offset[0] < 0 else wide / 2), y + offset[1]
            return left, middle - height / 2, left + wide, middle + height / 2

        def clash(offset: tuple[float, float]) -> float:
            one = box(offset)
            outside = max(0.0, left_end - one[0]) + max(0.0, one[2] - right_end) + max(0.0, one[3] - top_end - height)
            far = abs(offset[1])  # a thin bar across a label is better than a label that may be another point's
            return outside + far + sum(max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
                                 * max(0.0, min(one[3], other[3]) - max(one[1], other[1])) for other in taken)

        offset = min(((side * (7 if side else 0), up) for up in (0, 12, -12, 24, -24, 36, -36) for side in (1, -1, 0)
                      if side or up), key=clash)
        taken.append(box(offset))
        axes.annotate(label, point, offset, textcoords="offset points", va="center", fontsize=8.5, color=theme.ink,
                      path_effects=[withStroke(linewidth=2.5, foreground=theme.background)],
                      ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center", annotation_clip=False)


def set_log(axes: Axes, which: Literal["x", "y"]) -> None:
    """Gives one axis of `axes` a logarithmic scale, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def drawable(text: str, otherwise: str, limit: int = 18) -> str:
    """Returns `text`, cut to `limit` characters, if the pictures' font has its letters, and else `otherwise`."""
    if not text or not text.isprintable() or not set(map(ord, text)) <= _letters():
        return otherwise
    return text if len(text) <= limit else text[:limit - 1] + "…"


@functools.cache
def _letters() -> set[int]:
    """Returns the code points that the pictures' font has."""
    with _style(LIGHT):
        from matplotlib import font_manager, ft2font
        path = font_manager.findfont("DejaVu Sans")
        return set(ft2font.FT2Font(path).get_charmap())


@contextlib.contextmanager
def _style(theme: Theme) -> Iterator[None]:
    """Sets Matplotlib's defaults and ours, whatever the user's own settings are, until the context ends."""
    try:
        import matplotlib
        from cycler import cycler
    except ImportError:
        raise UserError("Matplotlib, which draws the pictures, is not installed: pip install matplotlib.") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "font.family": ["DejaVu Sans"], "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
            "text.parse_math": False,  # names hold dollars
            "figure.facecolor": theme.background, "savefig.facecolor": theme.background,
            "axes.facecolor": theme.background, "axes.edgecolor": theme.ink, "axes.labelcolor": theme.ink,
            "text.color": theme.ink, "xtick.color": theme.ink, "ytick.color": theme.ink,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
            "grid.color": theme.faint, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9,
            "lines.linewidth": 1.7, "lines.markersize": 4, "axes.prop_cycle": cycler(color=theme.colors)})
        yield


def _limit_colors(png: bytes, colors: int) -> bytes:
    from PIL import Image
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(
        file, "png", optimize=True)
    return file.getvalue()
