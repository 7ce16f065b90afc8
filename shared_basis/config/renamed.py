"""Fields renamed since version 0.1; their old names are accepted for one more version, with a note."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from shared_basis.errors import note_renamed

RENAMED = {
    "model.loop": "model.scan_blocks",
    "optimizer.accumulate": "optimizer.grad_accumulation_steps",
    "optimizer.decay": "optimizer.weight_decay_labels",
}
"""The current names, keyed by old name, as dotted paths."""

_Class = TypeVar("_Class", bound=type)


def takes_old_names(section: str) -> Callable[[_Class], _Class]:
    """Returns a decorator that makes the dataclass of a configuration `section` accept old field names too."""
    def decorate(cls: _Class) -> _Class:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def take(self: Any, *args: Any, **fields: Any) -> None:
            init(self, *args, **with_present_names(fields, f"{section}.", note=True))

        cls.__init__ = take  # type: ignore[misc]
        return cls
    return decorate


def with_present_names(fields: Mapping[str, Any], prefix: str, *, note: bool) -> dict[str, Any]:
    """Returns the `fields` of a section with old names replaced by current ones; `prefix` is its dotted path.

    If a field is given by both names, the value given by the old name is used.

    Args:
      note: whether to print a note for each old name: yes for recipes, no for recorded configurations.
    """
    old = {name: RENAMED[prefix + name].removeprefix(prefix) for name in fields if prefix + name in RENAMED}
    for name, present in old.items() if note else ():
        note_renamed(f"{prefix}{name}", f"{prefix}{present}", stacklevel=3)
    return {**{name: value for name, value in fields.items() if name not in old},
            **{present: fields[name] for name, present in old.items()}}
