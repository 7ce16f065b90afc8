"""Converts configurations recorded by earlier versions to the current format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared_basis.config.data import DEFAULTS, ignored_fields

FORMAT = 2
"""The format of records that this version writes. Format 1 is not marked in the record: all boundaries were epochs,
and fields that the data set ignores could be set."""


def in_present_terms(config: Any, record_format: int) -> Any:
    """Returns a recorded configuration, given as nested JSON mappings, converted to the current format.

    Invalid values are left unchanged; the validation of the configuration reports them.
    """
    if record_format >= FORMAT or not isinstance(config, Mapping):
        return config
    sections = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    data, optimizer, train = (sections.get(key) for key in ("data", "optimizer", "train"))
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        data |= {field: DEFAULTS[field] for field in ignored_fields(data["name"])
                 if field in data}
    if isinstance(optimizer, dict) and isinstance(train, dict):
        boundaries, epochs = optimizer.get("boundaries"), train.get("epochs")
        if isinstance(boundaries, list) and isinstance(epochs, int) and epochs > 1 and all(
                isinstance(boundary, (int, float)) and 0 < boundary < 1 for boundary in boundaries):
            optimizer["boundaries"] = [boundary / epochs for boundary in boundaries]
    return sections
