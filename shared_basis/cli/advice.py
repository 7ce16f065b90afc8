"""What a user probably meant by an argument that the command line does not take."""

from __future__ import annotations

import os

from absl import flags

from shared_basis.cli.flags import FLAGS, MODES
from shared_basis.config import Config, flatten, to_dict


def on_flag(name: str) -> str:
    """Returns a sentence on an unknown flag that is called like a field of the recipe, or by its initials, as --lr."""
    fields = [field for field in flatten(to_dict(Config())) for last in [field.rpartition(".")[2]]
              if name in (last, "".join(word[0] for word in last.split("_")))]
    return f". Did you mean --config.{' or --config.'.join(fields)}?" if fields and len(name) > 1 else ""


def on_argument(argument: str, values: flags.FlagValues) -> str:
    """Returns what to do about an argument that belongs to no flag."""
    if argument in MODES:
        return f"give the mode as --mode={argument}"
    for flag in FLAGS:
        if flag.kind is list and values[flag.name].present:
            return f"of several values each has a flag of its own: --{flag.name}={argument}"
    if os.path.exists(argument):
        return f"give a path by the flag that it is for, such as --workdir={argument} or --images={argument}"
    return "flags look like --mode=train"
