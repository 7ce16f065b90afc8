"""Suggestions for arguments that the command line does not accept."""

from __future__ import annotations

import os

from absl import flags

from shared_basis.cli.flags import FLAGS, MODES
from shared_basis.config import Config, flatten, to_dict


def on_flag(name: str) -> str:
    """Returns a suggestion for an unknown flag with the name or the initials of a recipe field, such as --lr."""
    fields = [field for field in flatten(to_dict(Config())) for last in [field.rpartition(".")[2]]
              if name in (last, "".join(word[0] for word in last.split("_")))]
    return f". Did you mean --config.{' or --config.'.join(fields)}?" if fields and len(name) > 1 else ""


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
