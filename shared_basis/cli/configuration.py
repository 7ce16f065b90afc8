"""Determines the configuration for a command line: that of a recipe, or that of an existing run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from shared_basis.cli.flags import FOLDER_MODES
from shared_basis.compression.compress import named_for
from shared_basis.config import FOLDER, Config, folder_fields, from_config_dict, named_after, replace
from shared_basis.errors import UserError
from shared_basis.interop.weights import find_weights
from shared_basis.runs.workdir import Workdir, stored_config
from shared_basis.training.start import Init, begins

RUN_OF = {"train": "workdir", "summary": "workdir", "prepare": "workdir", "compress": "source"}
"""By mode, the flag naming the run whose configuration is used if no recipe is given; a new run with --init=RUN uses
that of RUN."""


class Configuration(NamedTuple):
    """The configuration, its overrides and the workdir."""

    config: Config
    overrides: dict[str, Any]
    """The fields that the user set, by dotted path."""
    workdir: str


def read(values: flags.FlagValues, trained: bool) -> Configuration:
    """Returns the configuration and the workdir that the flags `values` select.

    Args:
      trained: whether the mode reads a trained run; its stored configuration is then used instead of a recipe, and
        overrides are validated against it later.

    Raises:
      UserError: a field has an invalid value, --source is neither a run nor a file, or --images is not a single
        directory.
    """
    set_by_user = config_flags.get_override_values(values["config"])
    if "model.name" in set_by_user and "name" not in set_by_user:
        network = str(values["config.model.name"].default)  # the recipe's
        values.config.name = named_for(values.config.name, network, values.config.model.name)
    images = _images(values, set_by_user)
    overrides = {**images, **set_by_user}
    if trained:
        return Configuration(Config(), overrides, _workdir(values, values.config.name, images))
    then = _stored(values, bool(images))
    if then is None:
        if images:
            with values.config.unlocked():
                values.config.update_from_flattened_dict(overrides)
        config = from_config_dict(values.config)
    else:
        config = replace(then, overrides)
        if config.model.name != then.model.name and "name" not in overrides:
            config = replace(config, {"name": named_for(then.name, then.model.name, config.model.name)})
    return Configuration(config, overrides, _workdir(values, config.name, images))


def _stored(values: flags.FlagValues, has_images: bool) -> Config | None:
    """Returns the configuration of the run that the flags name (see `RUN_OF`); None if a recipe is to be used."""
    asks_recipe = values["config"].present and values.mode != "summary"  # see `shared_basis.cli.app.parse`
    run = getattr(values, RUN_OF.get(values.mode, ""), None)
    if run and values.mode == "compress":
        run, which = find_weights(run, "--source")
        if which is None and not asks_recipe:
            raise UserError(f"--source={run}: a file of weights holds no configuration; add "
                            "--config=RECIPE.py:NETWORK, the recipe and the plain network.")
    if asks_recipe:
        return None
    if values.mode == "train" and values.init and (not run or begins(Workdir(os.path.expanduser(run)),
                                                                     Init(values.init))):
        source, which = find_weights(values.init)
        return None if which is None or has_images else stored_config(source)
    return stored_config(os.path.expanduser(run)) if run else None


def _images(values: flags.FlagValues, set_by_user: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that --images=DIR sets, by dotted path."""
    if not values.images or values.mode not in FOLDER_MODES:
        return {}
    if len(values.images) > 1:
        raise UserError(f"--images={values.images[1]}: --mode={values.mode} takes one directory of images; "
                        "only --mode=predict takes several.")
    directory = os.path.expanduser(values.images[0])
    if not os.path.isdir(directory):
        problem = "is a file, and" if os.path.exists(directory) else "cannot be found;"
        raise UserError(f"--images={values.images[0]}: {problem} --mode={values.mode} takes a directory containing "
                        "train/<class>/* and test/<class>/*, or only <class>/*.")
    fields = folder_fields(directory)
    for field in ("data.name", "data.directory"):
        if set_by_user.get(field, fields[field]) != fields[field]:
            raise UserError(f"--config.{field}={set_by_user[field]} conflicts with --images={directory}, which sets "
                            f"--config.{field}={fields[field]}; give only one of them.")
    return fields


def _workdir(values: flags.FlagValues, name: str, images: Mapping[str, Any]) -> str:
    """Returns the workdir; by default, the one that the recipe `name` implies."""
    if values.workdir:
        return os.path.expanduser(values.workdir)
    if FOLDER in name and not images:
        raise UserError("this recipe names its runs after the folder of images; give --workdir=RUN or --images=DIR.")
    return os.path.join("runs", named_after(name, images.get("data.directory", "")))
