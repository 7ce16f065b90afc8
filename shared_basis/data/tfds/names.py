"""Metadata of TFDS data sets that is known before they are opened: names, classes and directories.

`tensorflow_datasets` is slow to import, so it is only imported where unavoidable.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from shared_basis.config import TFDS_PREFIX, DataConfig
from shared_basis.data.examples import Spec
from shared_basis.errors import UserError
from shared_basis.runtime.files import one_line

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree
wolf woman worm
"""

SPECS = {
    "cifar10": Spec((32, 32, 3), ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                                  "truck")),
    "cifar100": Spec((32, 32, 3), tuple(_CIFAR100.split())),
    "fashion_mnist": Spec((28, 28, 1), ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt",
                                        "Sneaker", "Bag", "Ankle boot")),
}
"""Fixed here, since TFDS only provides CIFAR's class names once it is prepared; they are compared on opening."""


def tfds_name(config: DataConfig) -> str:
    """Returns the data set's name in TFDS."""
    return config.name.removeprefix(TFDS_PREFIX)


def data_directory(config: DataConfig) -> str:
    """Returns the directory in which TFDS stores prepared data sets."""
    if config.directory:
        return os.path.expanduser(config.directory)
    from tensorflow_datasets.core import constants

    return os.path.expanduser(constants.DATA_DIR)


def imagenet_classes() -> tuple[str, ...]:
    """Returns the 1,000 WordNet ids in the order of TFDS."""
    package = importlib.util.find_spec("tensorflow_datasets")  # locates the files without the slow import
    if package is None or package.origin is None:
        raise UserError("imagenet2012 needs the package tensorflow-datasets, which holds the names of its classes.")
    labels = Path(package.origin).parent / "datasets" / "imagenet2012" / "labels.txt"
    return tuple(labels.read_text().split())


def own_builder(config: DataConfig) -> Any | None:
    """Returns this package's builder for the data set, or None if there is none."""
    from shared_basis.data.tfds.builders import BUILDERS

    if tfds_name(config) not in BUILDERS:
        return None
    directory = data_directory(config)
    try:
        return BUILDERS[tfds_name(config)](data_dir=directory)
    except Exception as error:  # prepared metadata, which it reads, may be damaged
        raise UserError(f"cannot read the {config.name} that is prepared in {directory}: {one_line(error)}; delete it "
                        "there to have it prepared again.") from error


def damaged(where: Any, reason: str) -> UserError:
    """Returns the error for prepared data that cannot be read; `where` is a builder or its directory."""
    directory = getattr(where, "data_dir", where)
    return UserError(f"cannot read the prepared data in {directory}: {reason}; delete that directory to have it "
                     "prepared again, or set another --config.data.directory.")
