"""HTML elements with escaped text, and the self-contained page around them."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Sequence

from shared_basis.errors import printable
from shared_basis.plotting import Picture, data_uri

NO_BREAK = "\u00a0"
"""A no-break space, which Python considers unprintable."""


class Html(str):
    """Markup; any other string is text, which is escaped when it becomes part of a page."""


def element(tag: str, *children: str, **attributes: str) -> Html:
    """Returns an element; the attributes `class_` and `aria_label` become class and aria-label."""
    inside = "".join(markup(child) for child in children)
    names = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(printable(value, NO_BREAK))}"'
                    for name, value in attributes.items())
    return Html(f"<{tag}{names}>" if tag in ("img", "meta") else f"<{tag}{names}>{inside}</{tag}>")


def markup(child: str) -> Html:
    """Returns `child`, escaped unless it is markup already."""
    return child if isinstance(child, Html) else Html(html.escape(printable(child, NO_BREAK)))


def join(children: Iterable[str]) -> Html:
    """Returns the concatenated children."""
    return Html("".join(map(markup, children)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], label: str, numbers: Container[int] = ()) -> Html:
    """Returns a table in a box that scrolls on narrow screens; `label` describes it.

    The first column contains row headers. Columns in `numbers`, counted from 0, are right-aligned.
    """
    def cells(tag: str, row: Sequence[str], **attributes: str) -> Html:
        return join(element(tag, cell, **attributes, **({"class_": "number"} if place in numbers else {}))
                    for place, cell in enumerate(row) if place)

    head = element("tr", element("th", header[0], scope="col"), cells("th", header, scope="col"))
    body = join(element("tr", element("th", row[0], scope="row"), cells("td", row)) for row in rows)
    return element("div", element("table", element("thead", head), element("tbody", body)),
                   class_="box", role="region", aria_label=label, tabindex="0")


def shown(picture: Picture, folder: str) -> Html:
    """Returns a picture, linked to its file in `folder`."""
    image = element("img", src=data_uri(picture.png), alt=picture.text, class_="plot")
    return element("figure", element("a", image, href=f"{folder}/{picture.name}.png"))


def section(title: str, *children: str) -> Html:
    """Returns a section of the page with a heading."""
    return element("section", element("h2", title), *children)


def page(title: str, *children: str) -> bytes:
    """Returns the contents of the page's file."""
    head = join((Html('<meta charset="utf-8">'), element("meta", name="viewport", content="width=device-width"),
                 # The browser must neither load nor run anything, whatever names on the page contain.
                 Html('<meta http-equiv="Content-Security-Policy" '
                      '''content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">'''),
                 element("title", title), Html(f"<style>{_STYLE}</style>")))
    body = element("body", element("main", element("h1", title), *children))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'.encode()


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ground: #f3f5f7; --ink: #1f2328; --soft: #57606a; --line: #d0d7de;
  --wrong: #b03a00; --right: #00664b; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ground: #0c0e11; --ink: #e6e9ed; --soft: #a5afba;
  --line: #3a4149; --wrong: #f0a030; --right: #2dc79a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
p { margin: .4rem 0; max-width: 48rem; overflow-wrap: anywhere; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }
.beside > * { min-width: 0; }
figure { margin: 0; }
figure img { max-width: 100%; height: auto; display: block; }
.panels img { width: 100%; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
.gallery figcaption { overflow-wrap: anywhere; line-height: 1.35; margin-top: .3rem; }
.gallery img { border: 1px solid var(--line); max-width: 100%; }
/* Plots are light: on a dark screen brightness is turned over, hues stay, and black becomes the paper. */
@media (prefers-color-scheme: dark) { img.plot { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
img.small { image-rendering: pixelated; }
.wrong { color: var(--wrong); } .right { color: var(--right); }
.box { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
.number, thead th.number { text-align: right; white-space: nowrap; }
summary { cursor: pointer; padding: .3rem 0; }
code { font-size: .875em; overflow-wrap: anywhere; }
"""
