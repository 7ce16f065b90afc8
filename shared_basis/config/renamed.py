"""Fields that had another name in version 0.1, which goes on working for one version, with a note."""

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
"""The present names by the earlier ones, as dotted paths."""

_Class = TypeVar("_Class", bound=type)


def takes_old_names(section: str) -> Callable[[_Class], _Class]:
    """Returns a decorator by which the dataclass of a `section` of the configuration takes earlier names, too."""
    def decorate(cls: _Class) -> _Class:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def take(self: Any, *args: Any, **fields: Any) -> None:
            init(self, *args, **with_present_names(fields, f"{section}.", note=True))

        cls.__init__ = take  # type: ignore[misc]
        return cls
    return decorate


def with_present_names(fields: Mapping[str, Any], prefix: str, *, note: bool) -> dict[str, Any]:
    """Returns the `fields` of a section by their present names; `prefix` is its dotted path.

    A field that is there by both of its names has the value that the earlier one has.

    Args:
      note: whether an earlier name is noted: in recipes it is to be changed, in the record of a run it need not.
    """
    old = {name: RENAMED[prefix + name].removeprefix(prefix) for name in fields if prefix + name in RENAMED}
    for name, present in old.items() if note else ():
        note_renamed(f"{prefix}{name}", f"{prefix}{present}", stacklevel=3)
    return {**{name: value for name, value in fields.items() if name not in old},
            **{present: fields[name] for name, present in old.items()}}
