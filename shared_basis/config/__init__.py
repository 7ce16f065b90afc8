"""The configuration: frozen dataclasses that hold every default, their validation, and their conversion to plain data.

A configuration file (`configs/*.py`) builds a `Config`, hands it to ml_collections as a `ConfigDict` so that
`--config.a.b=value` can override any field, and `from_config_dict` turns the result back into a checked `Config`.
"""

from shared_basis.config.checks import split
from shared_basis.config.convert import (
    check_field,
    differences,
    flatten,
    from_config_dict,
    replace,
    to_config_dict,
    to_dict,
)
from shared_basis.config.fields import (
    DATA_NAMES,
    LOCATION_FIELDS,
    PARAMETER_LABELS,
    TFDS_PREFIX,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    split_factors,
)
from shared_basis.config.renamed import RENAMED
from shared_basis.config.training import DistillationConfig, TrainConfig

__all__ = [
    "DATA_NAMES",
    "LOCATION_FIELDS",
    "PARAMETER_LABELS",
    "RENAMED",
    "TFDS_PREFIX",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OrthogonalityConfig",
    "TrainConfig",
    "check_field",
    "differences",
    "flatten",
    "from_config_dict",
    "replace",
    "split",
    "split_factors",
    "to_config_dict",
    "to_dict",
]
