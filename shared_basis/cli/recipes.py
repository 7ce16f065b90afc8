"""Finds recipes: in configs/ of the repository or of the installed package, or in the file given by --config."""

from __future__ import annotations

import difflib
import os
from pathlib import Path, PurePath

from shared_basis.errors import UserError


def _directory() -> Path:
    """Returns the directory of the recipes: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


DIRECTORY = _directory()


def names() -> list[str]:
    """Returns the names of the recipes of this package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.py"))


def locate(recipe: str) -> str:
    """Returns `FILE.py[:network]` with the path of an existing file.

    If that file does not exist, `NAME`, `NAME.py` and `configs/NAME.py` refer to a recipe of this package, so that the
    commands in the documentation work in any directory.

    Raises:
      UserError: neither a file nor a recipe has that name.
    """
    given, colon, network = recipe.partition(":")
    file = os.path.expanduser(given)
    if os.path.isfile(file):
        return f"{file}{colon}{network}"
    path = PurePath(file)
    name = path.name.removesuffix(".py")
    if path.parent in (PurePath("."), PurePath("configs")) and name in names():
        return f"{DIRECTORY / name}.py{colon}{network}"
    close = difflib.get_close_matches(name, names(), 1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"--config={given}: no such file or recipe. Give FILE.py or one of {', '.join(names())}; a network "
                    f"follows a colon, as in cifar_resnet:resnet56.{meant}")
