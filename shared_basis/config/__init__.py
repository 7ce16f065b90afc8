"""The configuration: frozen dataclasses that hold every default, their validation, and their conversion to plain data.

A configuration file (`configs/*.py`) builds a `Config` and converts it to an ml_collections `ConfigDict`, so that
`--config.a.b=value` can override any field; `from_config_dict` converts the result back to a validated `Config`.
"""

from shared_basis.config.checks import split
from shared_basis.config.convert import (
    OTHER_TRAINERS,
    check_field,
    differences,
    fields_meant,
    flatten,
    from_config_dict,
    replace,
    to_config_dict,
    to_dict,
)
from shared_basis.config.data import (
    AUTO_VALIDATION,
    DATA_NAMES,
    FOLDER,
    TFDS_PREFIX,
    DataConfig,
    folder_fields,
    is_for_small_images,
    named_after,
)
from shared_basis.config.earlier import FORMAT, in_present_terms
from shared_basis.config.fields import (
    ADJUSTABLE_FIELDS,
    LOCATION_FIELDS,
    PARAMETER_LABELS,
    SCHEDULE_FIELDS,
    Config,
    ModelConfig,
    OptimizerConfig,
    OrthogonalityConfig,
    split_factors,
)
from shared_basis.config.renamed import RENAMED
from shared_basis.config.training import DistillationConfig, TrainConfig

__all__ = [
    "ADJUSTABLE_FIELDS",
    "AUTO_VALIDATION",
    "DATA_NAMES",
    "FOLDER",
    "FORMAT",
    "LOCATION_FIELDS",
    "OTHER_TRAINERS",
    "PARAMETER_LABELS",
    "RENAMED",
    "SCHEDULE_FIELDS",
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
    "fields_meant",
    "flatten",
    "folder_fields",
    "from_config_dict",
    "in_present_terms",
    "is_for_small_images",
    "named_after",
    "replace",
    "split",
    "split_factors",
    "to_config_dict",
    "to_dict",
]
