"""Hooks of MkDocs: the pages link to files of the repository, and the site has copies of them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "benchmarks/README.md": "measurements.md", "results/README.md": "rows.md",
         **{f"results/{name}": name for name in (
             "reliability.md", "reliability-bucket.md", "reliability-bucket-2.md")}}
"""Pages outside docs/, and what they are called in the site."""
LINK = re.compile(r'(\]\(|src="|srcset="|href=")(?!\w+:)([^)"#\s]+)')
"""A link to a file, in Markdown or HTML."""
STAR = re.compile(r"(S\d+U\d)\*")
"""The star of a name such as S16U1*."""


def on_files(files: Files, config: Any) -> Files:
    """Adds `PAGES`, and every other file outside docs/ that a page links to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    places = {_place(_resolve(target, _source(file.src_uri)))
              for file in files.documentation_pages() for _, target in LINK.findall(file.content_string)}
    for place in sorted(places):
        outside = ROOT / place.removeprefix("repository/")
        if place.startswith("repository/") and outside.is_file():
            files.append(File.generated(config, place, abs_src_path=str(outside)))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Returns the page with links as they are in the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _place(_resolve(match[2], _source(here)))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")
    blocks = re.split(r"(^```.*?^```$)", LINK.sub(moved, text), flags=re.DOTALL | re.MULTILINE)
    blocks[::2] = [STAR.sub(r"\1\\*", prose) for prose in blocks[::2]]  # what GitHub leaves, Python-Markdown pairs
    return "".join(blocks)


def _source(place: str) -> str:
    """Returns the path in the repository of a page of the site."""
    return next((source for source, other in PAGES.items() if other == place), f"docs/{place}")


def _resolve(target: str, source: str) -> str:
    """Returns the path in the repository of a link in the file `source`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _place(path: str) -> str:
    """Returns the path in the site of a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")
