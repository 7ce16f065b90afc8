"""Where the recipes lie: in configs/ of the repository, or as installed; and the file that --config means."""

from __future__ import annotations

import difflib
import os
from pathlib import Path, PurePath

from shared_basis.errors import UserError


def _directory() -> Path:
    """Returns the directory of the recipes: within the package as it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


DIRECTORY = _directory()


def names() -> list[str]:
    """Returns the names of the recipes of this package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.py"))


def locate(recipe: str) -> str:
    """Returns `FILE.py[:network]` with the path of an existing file.

    Where there is no such file, `NAME`, `NAME.py` and `configs/NAME.py` mean a recipe of this package, so that the
    commands of the documentation work in every directory.

    Raises:
      UserError: there is none.
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
    raise UserError(f"--config={given}: no such file, and no recipe of this package; these are {', '.join(names())}, "
                    f"and one of your own is FILE.py; a network follows a colon, as in cifar_resnet:resnet56.{meant}")
