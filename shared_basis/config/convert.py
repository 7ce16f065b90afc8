"""Converts configurations to and from plain data: dotted paths, `ConfigDict`, JSON."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from shared_basis.config.fields import LOCATION_FIELDS, Config
from shared_basis.config.renamed import with_present_names
from shared_basis.errors import UserError


def to_dict(config: Config) -> dict[str, Any]:
    """Returns `config` as nested, JSON-serialisable dicts (tuples become lists)."""
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value
    return plain(dataclasses.asdict(config))


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """Returns `config` as the mutable, type-checked `ConfigDict` that `get_config` functions return."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(tree: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Builds a validated `Config` from nested mappings, e.g. a `ConfigDict` or parsed JSON.

    Missing fields take their defaults. Field names of version 0.1 are accepted; a `ConfigDict` with them prints a note.

    Raises:
      UserError: a key is unknown (the message suggests the closest one), or a value has the wrong type or is invalid.
    """
    if isinstance(tree, ml_collections.ConfigDict):
        return _build(Config, tree.to_dict(), "", recipe=True)
    return _build(Config, tree, "", recipe=False)


def replace(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns `config` with the given dotted paths replaced and validated, e.g. `{'train.epochs': 3}`.

    Raises:
      UserError: see `from_config_dict`.
    """
    tree = dataclasses.asdict(config)
    for path, value in values.items():
        check_field(path)
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return from_config_dict(tree)


def check_field(path: str) -> None:
    """Raises `UserError`, suggesting the closest field, unless the dotted `path` names a field of `Config`."""
    known = sorted(flatten(dataclasses.asdict(Config())))
    if path not in known:
        raise UserError(_unknown(path, known))


def differences(config: Config, other: Config, *, locations: bool = False) -> dict[str, tuple[Any, Any]]:
    """Returns `{dotted path: (value, other value)}` for all fields that differ.

    Schedule boundaries are compared as epochs, so fractions of the run equal the epochs that they stand for.

    Args:
      locations: whether to compare `LOCATION_FIELDS` too.
    """
    mine, theirs = flatten(dataclasses.asdict(config)), flatten(dataclasses.asdict(other))
    if config.optimizer.boundary_epochs(config.train.epochs) == other.optimizer.boundary_epochs(other.train.epochs):
        mine["optimizer.boundaries"] = theirs["optimizer.boundaries"]
    return {path: (mine[path], theirs[path]) for path in mine
            if mine[path] != theirs[path] and (locations or path not in LOCATION_FIELDS)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings, keyed by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


_DEVICES = "all devices are used; CUDA_VISIBLE_DEVICES and JAX_PLATFORMS choose among them"
_PRECISION = "--config.model.dtype=bfloat16 computes in half precision"
_RESUME = "the same --workdir resumes a run"

OTHER_TRAINERS = {
    "num_classes": "the classes are those of the images, a directory for each",
    **dict.fromkeys(("gpus", "gpu", "num_gpus", "devices", "device", "accelerator", "tpu", "cuda"), _DEVICES),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "ckpt_path"), _RESUME),
    **dict.fromkeys(("pretrained", "finetune"), "--init=RUN or --init=FILE starts from trained weights"),
    **dict.fromkeys(("amp", "fp16", "bf16", "precision", "half"), _PRECISION),
    **dict.fromkeys(("output_dir", "save_dir", "log_dir", "logdir"), "--workdir=RUN is the directory of a run"),
}
"""What other trainers have an option of this name for: how it is done here."""


def fields_meant(name: str, fields: Iterable[str]) -> list[str]:
    """Returns the dotted `fields` whose last component `name` repeats, ends with (max_epochs) or abbreviates (lr)."""
    def is_meant(last: str) -> bool:
        initials = "".join(word[0] for word in last.split("_"))
        return name == last or name.endswith(f"_{last}") or (len(name) > 1 and name == initials)
    return [field for field in fields if is_meant(field.rpartition(".")[2])]


def _unknown(path: str, known: Sequence[str]) -> str:
    """Returns the message about an unknown field; its section must exist."""
    section, _, name = path.rpartition(".")
    beside = [field for field in known if section and field.rpartition(".")[0] == section]
    near = (difflib.get_close_matches(path, fields_meant(name, known), n=1, cutoff=0.0) or _nearest(name, beside, 0.5)
            or _nearest(name, known, 0.8 if beside else 0.5))
    advice = "".join(f" Did you mean {field!r}?" for field in near)
    if name in OTHER_TRAINERS:
        advice = f" {OTHER_TRAINERS[name][0].upper()}{OTHER_TRAINERS[name][1:]}."
    return (f"unknown configuration field {path!r}.{advice} The fields "
            f"{f'of {section} ' if beside else ''}are: {', '.join(beside or known)}.")


def _nearest(name: str, fields: Sequence[str], cutoff: float) -> list[str]:
    """Returns a list of the field whose last component is closest to `name`; empty if none is close."""
    last = {field.rpartition(".")[2]: field for field in fields}  # full paths would match on the section
    return [last[near] for near in difflib.get_close_matches(name, last, n=1, cutoff=cutoff)]


def _build(cls: type, tree: Any, prefix: str, recipe: bool) -> Any:
    """Builds the dataclass `cls` from `tree`; `prefix` is its dotted path, `recipe` whether to note renamed fields."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={tree!r}: must hold the fields of {cls.__name__}.")
    hints = typing.get_type_hints(cls)
    tree = with_present_names(tree, prefix, note=recipe)
    for key in tree:
        if key not in hints:
            raise UserError(_unknown(f"{prefix}{key}", [f"{prefix}{name}" for name in sorted(hints)]))
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), value, f"{prefix}{key}.", recipe)
        else:
            values[key] = _convert(hint, value, f"{prefix}{key}")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns `value` as type `hint`: bool, int, float, str or a tuple of one of them; raises `UserError` otherwise."""
    if isinstance(hint, types.GenericAlias):
        item = typing.get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else (value,)
        if item is str:  # the command line gives --config.optimizer.weight_decay_labels=kernel,basis as one string
            items = [part.strip() for text in items for part in str(text).split(",") if part.strip()]
        return tuple(_convert(item, entry, path) for entry in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{path}: must be a number below 1e308.") from None
    if type(value) is not hint:
        raise UserError(f"{path}={value!r}: must be of type {hint.__name__}.")
    return value
