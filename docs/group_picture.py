"""Draws the picture of a group, one basis and many coefficients: python -m docs.group_picture"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from shared_basis.plotting import COLORS, DARK, INK

IMAGES = Path(__file__).resolve().parent / "images"
WIDTH, HEIGHT = 560, 452
LAYERS = (24, 158, 292, 426)
"""The left sides of the boxes of layers."""
BOX = 110
"""Their width."""


@dataclasses.dataclass(frozen=True)
class Theme:
    """The colours on one kind of page, whose own background shows through."""

    ink: str
    soft: str
    line: str
    positive: str
    negative: str
    unique: str


THEMES = {
    "light": Theme(INK, "#57606a", "#8c959f", *COLORS[:3]),
    "dark": Theme(DARK[INK], "#a5afba", "#6e7681", *(DARK[color] for color in COLORS[:3])),
}


def cosine_filters() -> list[np.ndarray]:
    """Returns the two-dimensional cosine transform's 3×3 filters but the constant one: orthonormal, as a basis is."""
    rows = np.array([[math.cos(math.pi * (2 * x + 1) * k / 6) for x in range(3)] for k in range(3)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return [np.outer(rows[i], rows[j]) for i in range(3) for j in range(3) if i + j]


def draw(theme: Theme) -> str:
    """Returns the picture as SVG."""
    rng = np.random.default_rng(5)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" font-size="17">',
        "<title>A group of plain layers has kernels in each layer; a shared group has one filter basis, and in each "
        "layer one unique element and coefficients</title>",
        _text(24, 24, "Plain: k×k kernels in every layer", theme.ink, bold=True)]
    for left in LAYERS:
        parts.append(_frame(left, 38, BOX, 78, theme))
        for row in range(3):
            for column in range(5):
                pixels = rng.normal(size=(3, 3))
                parts.append(_tile(left + 10 + 19 * column, 46 + 22 * row, 5, pixels / np.abs(pixels).max(), theme))
    parts += [_text(24, 166, "Shared: one basis, many coefficients", theme.ink, bold=True),
              f'<rect x="{LAYERS[0]}" y="182" width="{LAYERS[-1] + BOX - LAYERS[0]}" height="62" rx="8" '
              f'fill="{theme.positive}" fill-opacity="0.10" stroke="{theme.positive}" stroke-width="1.5"/>']
    for number, pixels in enumerate(cosine_filters()):
        parts.append(_tile(38 + 34 * number, 199, 9, pixels / np.abs(pixels).max(), theme))
    parts += [_text(312, 209, "filter basis: k×k elements,", theme.ink, 16),
              _text(312, 230, "shared by all layers", theme.ink, 16)]
    for left in LAYERS:
        middle = left + BOX / 2
        parts += [f'<path d="M{middle} 244V270" stroke="{theme.positive}" stroke-width="2"/>',
                  f'<path d="M{middle - 5} 268h10l-5 9z" fill="{theme.positive}"/>', _frame(left, 278, BOX, 86, theme)]
        pixels = rng.normal(size=(3, 3))
        parts.append(f'<rect x="{left + 8}" y="304" width="33" height="33" rx="3" fill="none" '
                     f'stroke="{theme.unique}" stroke-width="2"/>')
        parts.append(_tile(left + 11, 307, 9, pixels / np.abs(pixels).max(), theme))
        values = rng.uniform(-1, 1, (9, 6))
        parts += [_cell(left + 51 + 8.5 * column, 283 + 8.5 * row, 7.5, values[row, column], theme)
                  for row in range(9) for column in range(6)]
    parts += [
        f'<rect x="24" y="377" width="15" height="15" rx="2" fill="none" stroke="{theme.unique}" stroke-width="2"/>',
        _text(47, 390, "unique element", theme.ink, 16),
        _cell(200, 377, 15, 0.8, theme), _cell(217, 377, 15, -0.5, theme),
        _text(240, 390, "coefficients: a 1×1 convolution", theme.ink, 16),
        _text(24, 430, "y = coefficients( BN( [unique ∗ x ; shared ∗ x] ) )", theme.soft, 17), "</svg>"]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, words: str, color: str, size: int = 18, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}"{weight}>{words}</text>'


def _frame(x: float, y: float, width: float, height: float, theme: Theme) -> str:
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="none" stroke="{theme.line}" '
            'stroke-width="1.2"/>')


def _tile(x: float, y: float, side: float, pixels: np.ndarray, theme: Theme) -> str:
    """Returns a filter as 3×3 squares."""
    return "".join(_cell(x + side * column, y + side * row, side, pixels[row, column], theme)
                   for row in range(3) for column in range(3))


def _cell(x: float, y: float, side: float, value: float, theme: Theme) -> str:
    """Returns a square whose colour is the sign of a value, and whose opacity its size."""
    color = theme.positive if value > 0 else theme.negative
    return (f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="{color}" '
            f'fill-opacity="{0.12 + 0.88 * abs(value):.2f}"/>')


def main() -> None:
    """Writes both files."""
    IMAGES.mkdir(exist_ok=True)
    for name, theme in THEMES.items():
        (IMAGES / f"group-{name}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
