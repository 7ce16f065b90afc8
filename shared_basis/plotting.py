"""Plots as PNG files in a common style.

A plot is painted by a function of a Matplotlib figure. Meanwhile, Matplotlib uses its default settings with the changes
below, independent of the caller's settings, which are restored afterwards. pyplot, which keeps figures and opens
windows, is never imported. Plots have a light background; pages invert them in dark mode (`shared_basis.report.html`).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shared_basis.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

DPI = 180
"""Pixels per inch: twice the resolution at which a 1280-pixel screen shows a plot, for high-density screens."""

PANEL = (4.8, 3.3)
"""Width and height in inches of a plot with one pair of axes, legible on a phone too."""

BACKGROUND = "#ffffff"
INK = "#1f2328"
"""The colour of text and axes."""
FAINT = "#d0d7de"
"""Grid lines."""
COLORS = ("#0072b2", "#d55e00", "#007a5a", "#a3408a", "#7a6200", "#56606b")
"""Colours of data, each with a contrast of at least 3:1, distinguishable by the colour-blind (after Okabe and Ito)."""
DARK = dict(zip((INK, FAINT, BACKGROUND, *COLORS), (
    "#e6e9ed", "#3d444d", "#0d1117", "#58b0e6", "#f2984c", "#2dc79a", "#e08bd0", "#d9c25a", "#a5afba"), strict=True))
"""For each of these colours, the one in a picture for dark pages."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""The dash and marker of line i, which correspond to `COLORS[i]`."""

POSITIVE = "Blues"
"""The colour map for values of one sign, starting with the background colour."""
SIGNED = "RdBu_r"
"""The colour map for values of both signs, white at 0."""
SHADES = 33
"""Number of colours of a heat map, few enough for the palette of a PNG file."""

Paint = Callable[["Figure"], None]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A plot."""

    name: str
    """The name of its file, without extension."""
    text: str
    """The alternative text."""
    png: bytes
    """The contents of its PNG file."""


def picture(name: str, text: str, paint: Paint, size: tuple[float, float] = PANEL,
            colors: int | None = 128) -> Picture:
    """Paints a plot; see `png` for `size` and `colors`.

    Raises:
      UserError: Matplotlib is not installed.
    """
    return Picture(name, text, png(paint, size, colors))


def png(paint: Paint, size: tuple[float, float] = PANEL, colors: int | None = 128) -> bytes:
    """Paints a plot and returns the contents of its PNG file.

    Args:
      size: width and height in inches.
      colors: the maximum number of colours, which reduces the file to a third; None for no limit, e.g. for photographs
        and smooth colour maps.

    Raises:
      UserError: Matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        paint(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue() if colors is None else _limit_colors(file.getvalue(), colors)


def svg(paint: Paint, size: tuple[float, float] = PANEL) -> str:
    """Paints a plot and returns the text of its SVG file, with letters as outlines and a transparent background.

    Args:
      size: width and height in inches.

    Raises:
      UserError: Matplotlib is not installed.
    """
    with _style():
        import matplotlib
        from matplotlib.figure import Figure
        matplotlib.rcParams["svg.hashsalt"] = "shared basis"  # the same plot is the same file
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def data_uri(image: bytes, kind: str = "png") -> str:
    """Returns the contents of an image file, of `kind` 'png' or 'jpeg', as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def label_lines(axes: Axes) -> None:
    """Writes the label of each line of `axes` at its right end, in its colour; overlapping labels are moved apart."""
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


def set_log(axes: Axes, which: Literal["x", "y"]) -> None:
    """Sets a logarithmic scale for one axis of `axes`, with plain numbers as tick labels."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def colormap(name: str) -> Colormap:
    """Returns Matplotlib's colour map `name` with `SHADES` colours, for heat maps."""
    from matplotlib import colormaps
    return colormaps[name].resampled(SHADES)


def drawable(text: str, otherwise: str, limit: int = 18) -> str:
    """Returns `text`, cut to `limit` characters, if the plots' font has all of its characters, else `otherwise`."""
    if not text or not text.isprintable() or not set(map(ord, text)) <= _letters():
        return otherwise
    return text if len(text) <= limit else text[:limit - 1] + "…"


@functools.cache
def _letters() -> set[int]:
    """Returns the code points in the plots' font."""
    with _style():
        from matplotlib import font_manager, ft2font
        path = font_manager.findfont("DejaVu Sans")
        return set(ft2font.FT2Font(path).get_charmap())


@contextlib.contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Silences the warnings of the package `logger` until the context ends."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Sets Matplotlib's defaults and this module's changes until the context ends, whatever the user's settings."""
    try:
        with _silent("matplotlib"):  # warns where it cannot keep its cache in a home directory, which costs time only
            import matplotlib
            import matplotlib.font_manager
            from cycler import cycler
    except ImportError:
        raise UserError("plots require Matplotlib, which is not installed: pip install matplotlib.") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "font.family": ["DejaVu Sans"], "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
            "text.parse_math": False,  # names may contain dollar signs
            "figure.facecolor": BACKGROUND, "savefig.facecolor": BACKGROUND,
            "axes.facecolor": BACKGROUND, "axes.edgecolor": INK, "axes.labelcolor": INK,
            "text.color": INK, "xtick.color": INK, "ytick.color": INK,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
            "grid.color": FAINT, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9,
            "lines.linewidth": 1.7, "lines.markersize": 4, "axes.prop_cycle": cycler(color=COLORS)})
        yield


def _limit_colors(content: bytes, colors: int) -> bytes:
    """Returns the PNG file `content` with a palette of at most `colors` colours."""
    from PIL import Image
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(
        file, "png", optimize=True)
    return file.getvalue()
