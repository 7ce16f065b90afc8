"""What tests of data sets share: whole data sets in memory, as the package itself never needs them."""

from __future__ import annotations

import dataclasses
import io

import numpy as np

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import in_memory
from shared_basis.data.examples import warn_on_stderr
from shared_basis.runtime.reporter import Reporter


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A whole data set in memory; `validation` is None unless the configuration holds a part out."""

    spec: data.Spec
    train: data.Split
    test: data.Split
    validation: data.Split | None = None


def load(config: DataConfig) -> Dataset:
    """Opens and decodes all splits; images that are broken and may be skipped are left out, with a warning."""
    source = data.open_source(config)
    return Dataset(source.spec, **{name: decoded(source, config, name) for name in source.splits})


def load_split(config: DataConfig, name: str) -> data.Split:
    """Opens and decodes one split alone, `name` being 'train' or 'test'."""
    return decoded(data.open_source(config, (name,)), config, name)


def decoded(source: data.Source, config: DataConfig, name: str) -> data.Split:
    split = in_memory.load_split(source.splits[name], source.spec, config, warn_on_stderr)
    counts = split.labels >= 0
    return split if counts.all() else data.Split(split.images[counts], split.labels[counts])


def reporter() -> tuple[Reporter, io.StringIO]:
    """Returns a reporter, and what it has written."""
    written = io.StringIO()
    return Reporter(written), written


def pixels(seed: int, height: int = 4, width: int = 5) -> np.ndarray:
    """Returns a random RGB image uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
