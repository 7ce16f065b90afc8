"""Checks the metadata of prepared TFDS data before TFDS reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared_basis.data.tfds.names import damaged
from shared_basis.errors import UserError
from shared_basis.runtime.files import one_line


def check_metadata(directory: Path) -> None:
    """Raises `UserError` if prepared data refers to classes outside of TFDS, whose modules would be imported."""
    for path in _feature_files(directory):
        def check(found: dict[str, Any], path: Path = path) -> dict[str, Any]:
            for key in ("pythonClassName", "python_class_name", "type"):
                name = found.get(key)
                if isinstance(name, str) and not name.startswith("tensorflow_datasets.core.features."):
                    raise damaged(path.parent, f"it names the class {name!r}, which is not part of TFDS")
            return found
        try:
            json.loads(path.read_text(), object_hook=check)
        except UserError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise damaged(path.parent, one_line(error)) from error


def _feature_files(directory: Path) -> Iterator[Path]:
    """Yields the features.json in `directory` and below, following links, as TFDS does; each directory counts once."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a directory above, or to one that was seen
            folders.clear()
        elif "features.json" in names:
            yield Path(parent) / "features.json"
        seen.add(real)
