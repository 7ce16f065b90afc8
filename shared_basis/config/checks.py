"""Checks that reject invalid field values with a one-line message that states what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from shared_basis.errors import UserError


def split(text: str) -> tuple[str, ...]:
    """Returns the entries of the comma-separated list `text`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raises `UserError` naming `field`, its `value` and what is `allowed`, unless `condition` holds."""
    if not condition:
        raise UserError(f"{field}={value!r}: must be {allowed}.")


def require_choice(field: str, value: str, choices: Sequence[str], *others: str) -> None:
    """Raises `UserError`, suggesting the closest choice, unless `value` is in `choices`; lists `others` as well."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{field}={value!r}: must be one of {', '.join((*choices, *others))}.{hint}")
