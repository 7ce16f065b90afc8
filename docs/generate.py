"""Regenerates the generated parts of the pages: python -m docs.generate

Each stands between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`: the outline of every page, the flags, the
fields of the configuration, the table of networks, the list of the public names. Pictures are drawn by `docs.pictures`,
and figures that come from rows of results/ are written by the programs that measure them (docs/contributing.md).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import shared_basis
import shared_basis.nnx
from benchmarks.common import replace_section, section_of
from shared_basis.cli.flags import FLAGS, MODES, define_flags
from shared_basis.config import Config
from studies import experiments, published

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ORDER = ("train", "evaluate", "predict", "export", "inspect", "analyze", "report", "summary", "prepare", "import",
         "compress")
"""Modes, in the order of the page."""


def sections() -> Iterable[tuple[Path, str, str]]:
    """Yields the generated parts but the table of networks: file, name of the marks, content."""
    yield DOCS / "command-line.md", "flags", flags_tables()
    yield DOCS / "configuration.md", "fields", fields_tables()
    yield DOCS / "api.md", "names", public_names()
    for page in sorted(DOCS.glob("*.md")):
        yield page, "outline", outline(page)


def main() -> None:
    """Writes all of them, and what `studies.experiments` writes."""
    replace_section(DOCS / "networks.md", "networks", published.table() + "\n")  # a minute
    for page, name, text in sections():
        replace_section(page, name, text)
    experiments.write_pages(ROOT)


def stale() -> list[str]:
    """Returns which of `sections` are not current."""
    return [f"{page.name}: {name}" for page, name, text in sections() if section_of(page, name) != text]


def headings(text: str) -> list[str]:
    """Returns the headings of the second level, without those that stand in blocks of code."""
    return re.findall(r"^## (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)


def anchor(heading: str) -> str:
    """Returns the anchor of a heading, by the rule of GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def outline(page: Path) -> str:
    """Returns links to the sections of a page."""
    found = headings(page.read_text(encoding="utf-8"))
    return " · ".join(f"[{heading}](#{anchor(heading)})" for heading in found) + "\n"


def escape(text: str) -> str:
    """Returns text as it stands in a cell of a Markdown table."""
    for char, safe in (("&", "&amp;"), ("<", "&lt;"), ("*", "\\*"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(char, safe)
    return text


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)) + "\n"


def flags_tables() -> str:
    """Returns the flags of the command line, those of all modes first."""
    values, _ = define_flags(["main.py"])
    modes = {flag.name: flag.modes for flag in FLAGS if flag.modes != tuple(MODES)}
    own = [name for name in values if name not in modes and name != "help"]
    parts = ["## Flags of all modes\n\n" + _flags(values, sorted(own, key=lambda name: (name != "config", name)))]
    for mode in ORDER:
        names = [name for name in values if mode in modes.get(name, ())]
        if names:
            parts.append(f"## Flags of {mode}\n\n{_flags(values, names)}")
    return "\n".join(parts)


def _flags(values: Any, names: Iterable[str]) -> str:
    rows = []
    for name in names:
        flag = values[name]
        choices = getattr(flag.parser, "enum_values", None)
        # Without what absl adds.
        own = re.sub(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$", "", flag.help)
        meaning = " ".join(own.split()) + (f" One of `{'`, `'.join(choices)}`." if choices else "")
        default = "" if flag.default in (None, "", []) or name == "config" else f"`{flag.default}`"
        rows.append((f"`--{name}`", default, escape(meaning).replace("&amp;", "&")))
    return table(("flag", "default", "meaning"), rows)


def fields_tables() -> str:
    """Returns the fields of the configuration, a table for each section."""
    config = Config()
    own = [field for field in dataclasses.fields(config) if not dataclasses.is_dataclass(getattr(config, field.name))]
    parts = [f"## Top-level fields\n\n{_fields('', config, [field.name for field in own])}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            about = escape(" ".join((inspect.getdoc(type(value)) or "").split()))
            names = [each.name for each in dataclasses.fields(value)]
            parts.append(f"## Section {field.name}\n\n{about}\n\n{_fields(field.name + '.', value, names)}")
    return "\n".join(parts)


def _fields(prefix: str, section: Any, names: Iterable[str]) -> str:
    documented = field_docs(type(section))
    return table(("field", "default", "meaning"), (
        (f"`{prefix}{name}`", f"`{getattr(section, name)!r}`", escape(documented[name])) for name in names))


def field_docs(cls: type) -> dict[str, str]:
    """Returns the docstring that follows each field of a dataclass, or '' where there is none."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = str(after.value.value) if said else ""  # type: ignore[union-attr]
            found[node.target.id] = " ".join(text.split())
    return found


def public_names() -> str:
    """Returns the public names with the summaries of their docstrings, and the entries of mkdocstrings."""
    modules = {"shared_basis": [(f"shared_basis.{module}", name) for module, found in shared_basis._MODULES.items()
                                for name in found if name in shared_basis.__all__],
               "shared_basis.nnx": [("shared_basis.nn.nnx", name) for name in shared_basis.nnx.__all__]}
    parts = []
    for title, names in modules.items():
        objects = [(name, getattr(importlib.import_module(module), name)) for module, name in names]
        summary = table(("name", "what it is"), sorted(
            (f"`{name}`", escape((inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")))
            for name, value in objects))
        parts += [f"## Names of {title}\n", f"{summary}\n", *(f"::: {module}.{name}\n" for module, name in names)]
    return "\n".join(parts)


if __name__ == "__main__":
    main()
