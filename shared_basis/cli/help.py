"""The text that --help, help MODE and --version print."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from shared_basis.cli.flags import CONFIG, FLAGS, MODES, Flag

_WIDEST = 100


def program_name(path: str) -> str:
    """Returns how a user calls the program at `path`."""
    name = os.path.basename(path)
    if name == "__main__.py":
        return "python -m shared_basis"
    return f"python {path}" if name.endswith(".py") else name


def render(program: str, mode: str = "") -> str:
    """Returns the help for all modes, or for `mode`."""
    return "\n".join(_overview(program) if not mode else _one_mode(program, mode))


def version() -> str:
    """Returns one line with the versions of this package, of its main dependencies and of Python."""
    found = {}
    for name in ("shared-basis", "jax", "flax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout without installation
            found[name] = "(not installed)"
    own, *others = (f"{name} {number}" for name, number in found.items())
    return f"{own} ({', '.join(others)}, Python {platform.python_version()})"


def _overview(program: str) -> list[str]:
    lines = ["Convolutional networks with shared filter bases: train, evaluate, compress, export.", "",
             f"usage: {program} [--mode=MODE] [--FLAG=VALUE ...]",
             f"       {program} help MODE", "", "Modes:"]
    lines += _table((name, mode.purpose) for name, mode in MODES.items())
    lines += ["", "Examples:", *_examples(program, [mode.examples[0] for mode in MODES.values()])]
    groups: dict[tuple[str, ...], list[Flag]] = {}
    for flag in (CONFIG, *FLAGS):
        groups.setdefault(flag.modes, []).append(flag)
    for modes, members in groups.items():
        of = "all modes" if modes == tuple(MODES) else ", ".join(modes)
        lines += ["", f"Flags of {of}:", *_flags(members)]
    return lines


def _one_mode(program: str, mode: str) -> list[str]:
    lines = [f"--mode={mode}: {MODES[mode].purpose}", "", "Examples:", *_examples(program, MODES[mode].examples)]
    taken = [flag for flag in (CONFIG, *FLAGS) if mode in flag.modes]
    own = [flag for flag in taken if flag.modes != tuple(MODES)]
    if own:
        lines += ["", f"Flags of {mode}:", *_flags(own)]
    return [*lines, "", "Flags of all modes:", *_flags(flag for flag in taken if flag not in own)]


def _examples(program: str, examples: Sequence[tuple[str, str]]) -> list[str]:
    calls = [f"  {program} {arguments}".rstrip() for arguments, _ in examples]
    width = max(map(len, calls))
    return [f"{call:{width}}  # {effect}" for call, (_, effect) in zip(calls, examples, strict=True)]


def _flags(members: Iterable[Flag]) -> list[str]:
    return _table((flag.usage, flag.text + _default(flag)) for flag in members)


def _default(flag: Flag) -> str:
    """Returns the help's sentence on the default value, or an empty string if there is none to show."""
    if flag.kind is bool:
        return " Default: yes." if flag.default else ""
    return f" Default: {flag.default}." if flag.default not in (None, "", []) else ""


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Returns rows of a name and a text, with the text wrapped to the width of the terminal."""
    width, column = min(shutil.get_terminal_size().columns, _WIDEST), 26
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - column - 2, 30))
        if len(name) > column - 2:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:{column - 2}}  {wrapped.pop(0)}" if wrapped else f"  {name}")
        lines += [" " * (column + 2) + line for line in wrapped]
    return lines
