"""Records of runs of earlier versions, in the terms of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared_basis.config.data import DEFAULTS, ignored_fields

FORMAT = 2
"""Of the records that this version writes. In those of 1, which do not say so, all boundaries were epochs, and a data
set might have fields that it does not read."""


def in_present_terms(config: Any, record_format: int) -> Any:
    """Returns the configuration of a record, nested mappings as JSON has them, as this version means it.

    What is not as it should be stays as it is: it is for the validation of the configuration to say so.
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
