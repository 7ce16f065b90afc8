"""Pictures as PNG files, all in one style.

A picture is painted by a function of a Matplotlib figure. While it is painted, Matplotlib's settings are its defaults
and the ones below, whatever the caller's are; these are restored afterwards. pyplot, which keeps figures and opens
windows, is never imported. Pictures are light; a page inverts them on dark screens (`shared_basis.report.html`).
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
"""Pixels an inch: twice what a screen of 1280 pixels shows of a picture, for those that have more."""

PANEL = (4.8, 3.3)
"""Width and height in inches of a picture with one pair of axes: its letters can be read on a telephone too."""

BACKGROUND = "#ffffff"
INK = "#1f2328"
"""Text and axes."""
FAINT = "#d0d7de"
"""Grid lines."""
COLORS = ("#0072b2", "#d55e00", "#007a5a", "#a3408a", "#7a6200", "#56606b")
"""Of data, each 3:1 or more against the background, and distinguishable by the colour-blind (after Okabe and Ito)."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""The dash and the marker of line i, as `COLORS[i]` is its colour."""

POSITIVE = "Blues"
"""The colour map of values of one sign, from the background for the smallest value."""
SIGNED = "RdBu_r"
"""The colour map of values of both signs, white at 0."""
SHADES = 33
"""Colours of a heat map, few enough for a PNG's palette to hold all of them."""

Paint = Callable[["Figure"], None]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture."""

    name: str
    """Of its file, without the ending."""
    text: str
    """What it shows, for those who cannot see it."""
    png: bytes
    """The content of its file."""


def picture(name: str, text: str, paint: Paint, size: tuple[float, float] = PANEL,
            colors: int | None = 128) -> Picture:
    """Paints a picture; `size` and `colors` as in `png`.

    Raises:
      UserError: Matplotlib is not installed.
    """
    return Picture(name, text, png(paint, size, colors))


def png(paint: Paint, size: tuple[float, float] = PANEL, colors: int | None = 128) -> bytes:
    """Paints a picture, and returns the content of its PNG file.

    Args:
      size: width and height in inches.
      colors: the number that the file is limited to, for a third of its size; None, for photographs and smooth colour
        maps, is no limit.

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


def data_uri(image: bytes, kind: str = "png") -> str:
    """Returns the content of an image file, of the `kind` 'png' or 'jpeg', as a data URI."""
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


def set_log(axes: Axes, which: Literal["x", "y"]) -> None:
    """Gives one axis of `axes` a logarithmic scale, with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def colormap(name: str) -> Colormap:
    """Returns Matplotlib's colour map `name` in `SHADES` colours, for a heat map."""
    from matplotlib import colormaps
    return colormaps[name].resampled(SHADES)


def drawable(text: str, otherwise: str, limit: int = 18) -> str:
    """Returns `text`, cut to `limit` characters, if the pictures' font has all its letters; `otherwise` if not."""
    if not text or not text.isprintable() or not set(map(ord, text)) <= _letters():
        return otherwise
    return text if len(text) <= limit else text[:limit - 1] + "…"


@functools.cache
def _letters() -> set[int]:
    """Returns the code points that the pictures' font has."""
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
    """Sets Matplotlib's defaults and ours, whatever the user's own settings are, until the context ends."""
    try:
        with _silent("matplotlib"):  # warns where it cannot keep its cache in a home directory, which costs time only
            import matplotlib
            import matplotlib.font_manager
            from cycler import cycler
    except ImportError:
        raise UserError("Matplotlib, which draws the pictures, is not installed: pip install matplotlib.") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "font.family": ["DejaVu Sans"], "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
            "text.parse_math": False,  # names hold dollars
            "figure.facecolor": BACKGROUND, "savefig.facecolor": BACKGROUND,
            "axes.facecolor": BACKGROUND, "axes.edgecolor": INK, "axes.labelcolor": INK,
            "text.color": INK, "xtick.color": INK, "ytick.color": INK,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
            "grid.color": FAINT, "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 9,
            "lines.linewidth": 1.7, "lines.markersize": 4, "axes.prop_cycle": cycler(color=COLORS)})
        yield


def _limit_colors(content: bytes, colors: int) -> bytes:
    """Returns the PNG file `content` with a palette of at most so many colours."""
    from PIL import Image
    file = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(
        file, "png", optimize=True)
    return file.getvalue()
