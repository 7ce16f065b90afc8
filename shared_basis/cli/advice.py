"""Suggestions for arguments that the command line does not accept."""

from __future__ import annotations

import difflib
import os

from absl import flags

from shared_basis.cli.flags import FLAGS, MODES
from shared_basis.config import OTHER_TRAINERS, Config, fields_meant, flatten, to_dict


def on_flag(name: str) -> str:
    """Returns what to give instead of an unknown flag: the answer to other trainers' flags, or near names."""
    name = name.replace("-", "_")
    if name in OTHER_TRAINERS:
        return f": {OTHER_TRAINERS[name]}"
    near = difflib.get_close_matches(name, [flag.name for flag in FLAGS], n=1, cutoff=0.7)
    meant = [*near, *(f"config.{field}" for field in fields_meant(name, flatten(to_dict(Config()))))]
    return f". Did you mean --{' or --'.join(meant)}?" if meant else ""


def on_argument(argument: str, values: flags.FlagValues) -> str:
    """Returns what to do about a positional argument, since none is accepted."""
    if argument in MODES:
        return f"give the mode as --mode={argument}"
    for flag in FLAGS:
        if flag.kind is list and values[flag.name].present:
            return f"repeat the flag for each value: --{flag.name}={argument}"
    if os.path.exists(argument):
        return f"pass a path with its flag, such as --workdir={argument} or --images={argument}"
    return "flags look like --mode=train"
