"""The names of the outputs of a file of weights, which holds none: which output is which class."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared_basis.errors import UserError

SHOWN = 6
"""Outputs that a message names."""

_SYNSET = re.compile(r"(n\d{8})\s+(\S.*)")
"""A line of ImageNet's lists: 'n01440764 tench, Tinca tinca'."""


def read_classes(path: str) -> list[tuple[str, ...]]:
    """Returns for each output the names by which its class may be called.

    The file has one name a line, or is JSON: a list of names, or torchvision's list for ImageNet by index,
    `{"0": ["n01440764", "tench"], …}`.

    Raises:
      UserError: it cannot be read, or is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            return _from_json(json.loads(text))
    except OSError as error:
        raise UserError(f"--classes={path}: cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"--classes={path}: is neither a text of one name a line nor JSON, a list of names or "
                        '{"0": ["n01440764", "tench"], …} by index.') from error
    lines = [line.strip() for line in text.splitlines()]
    return [match.groups() if (match := _SYNSET.fullmatch(line)) else (line,) for line in lines if line]


def _from_json(content: Any) -> list[tuple[str, ...]]:
    if isinstance(content, dict):
        content = [content[str(index)] for index in range(len(content))]
    names = [tuple(entry) if isinstance(entry, list) else (entry,) for entry in content]
    if not all(entry and all(isinstance(name, str) for name in entry) for entry in names):
        raise TypeError("not names")
    return names


def name_outputs(names: Sequence[tuple[str, ...]], outputs: int, classes: Sequence[str], path: str,
                 weights: str) -> tuple[str, ...]:
    """Returns one name for each output, the one among `classes` where there is one.

    Args:
      names: of each output, from `read_classes`.
      outputs: how many the file `weights` has.
      classes: those of the data.
      path: where the names come from.

    Raises:
      UserError: there are more or fewer names than outputs, or a class has none, or several.
    """
    if len(names) != outputs:
        raise UserError(f"--classes={path}: holds {len(names)} names, and {weights} has {outputs} outputs; give one a "
                        "line, in the order of the outputs.")
    for name in classes:
        found = [number for number, entry in enumerate(names) if name in entry]
        if len(found) != 1:
            what = f"names outputs {' and '.join(map(str, found))}" if found else "is none of the names there"
            raise UserError(f"--classes={path}: class {name!r} of the data {what}; each class must be there once, "
                            "spelled as the data has it. Leave --classes out to have the classifier drawn anew where "
                            "the numbers of classes differ.")
    wanted = set(classes)
    return tuple(next((name for name in entry if name in wanted), entry[0]) for entry in names)


class Order(NamedTuple):
    """What is said of the order in which outputs are taken for the classes of a folder."""

    text: str
    surprising: bool
    """Whether the classes are numbers, and the order is not theirs."""


def describe_order(classes: Sequence[str], weights: str) -> Order:
    """Returns which output of the file `weights` is called what, as nothing in the file tells, and how to say it."""
    numbers = all(name.isdecimal() for name in classes)
    surprising = numbers and list(classes) != sorted(classes, key=int)
    shown = [f"{number} {name!r}" for number, name in enumerate(classes[:SHOWN])]
    if len(classes) > SHOWN:
        shown += ["…", f"{len(classes) - 1} {classes[-1]!r}"]
    why = "not by number" if surprising else "as torchvision's ImageFolder does"
    return Order(f"{weights} does not name its classes; its outputs are taken in the order of the folder's, sorted as "
                 f"text, {why}: {', '.join(shown)}. If the weights have another order, give it with --classes=FILE, "
                 "one name a line.", surprising)
