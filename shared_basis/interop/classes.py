"""Class names for the outputs of a file of weights, which does not contain any."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shared_basis.errors import UserError

SHOWN = 6
"""Maximum number of outputs to list in a message."""

_SYNSET = re.compile(r"(n\d{8})\s+(\S.*)")
"""A line of ImageNet's class lists: 'n01440764 tench, Tinca tinca'."""


def read_classes(path: str) -> list[tuple[str, ...]]:
    """Returns, for each output, the names by which its class may be called.

    The file has one name per line, or is JSON: a list of names, or torchvision's ImageNet list by index,
    `{"0": ["n01440764", "tench"], …}`.

    Raises:
      UserError: the file cannot be read or has another format.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            return _from_json(json.loads(text))
    except OSError as error:
        raise UserError(f"--classes={path}: cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"--classes={path}: must have one name per line, or be JSON: a list of names or "
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
    """Returns one name for each output, taken from `classes` where possible.

    Args:
      names: the names of each output, from `read_classes`.
      outputs: the number of outputs in the file `weights`.
      classes: the classes of the data.
      path: the file that `names` come from.

    Raises:
      UserError: the number of names differs from that of outputs, or a class matches no name or several.
    """
    if len(names) != outputs:
        raise UserError(f"--classes={path}: holds {len(names)} names, but {weights} has {outputs} outputs; one per "
                        "line, in the order of the outputs.")
    for name in classes:
        found = [number for number, entry in enumerate(names) if name in entry]
        if len(found) != 1:
            what = f"names outputs {' and '.join(map(str, found))}" if found else "is none of the names there"
            raise UserError(f"--classes={path}: class {name!r} of the data {what}; each class must occur once, "
                            f"spelled as in the data. Omit --classes to initialise the classifier at random if "
                            "the numbers of classes differ.")
    wanted = set(classes)
    return tuple(next((name for name in entry if name in wanted), entry[0]) for entry in names)


class Order(NamedTuple):
    """A message about the order in which outputs are mapped to the classes of a folder."""

    text: str
    surprising: bool
    """Whether the classes are numbers that are not in numerical order."""


def describe_order(classes: Sequence[str], weights: str) -> Order:
    """Describes the assumed mapping from outputs of the file `weights` to classes, which the file does not specify."""
    numbers = all(name.isdecimal() for name in classes)
    surprising = numbers and list(classes) != sorted(classes, key=int)
    shown = [f"{number} {name!r}" for number, name in enumerate(classes[:SHOWN])]
    if len(classes) > SHOWN:
        shown += ["…", f"{len(classes) - 1} {classes[-1]!r}"]
    why = "not numerically" if surprising else "as torchvision's ImageFolder does"
    return Order(f"{weights} does not name its classes; assuming the order of the folder's classes, sorted as "
                 f"text, {why}: {', '.join(shown)}. If the weights use another order, give it with --classes=FILE, "
                 "one name per line.", surprising)
