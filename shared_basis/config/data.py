"""The section `data` of a configuration: which images to use and how to preprocess them."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from shared_basis.config.checks import require, require_choice
from shared_basis.errors import UserError

DATA_NAMES = ("digits", "folder", "cifar10", "cifar100", "fashion_mnist", "imagenet2012")
"""The values that `data.name` accepts, besides names with the prefix `TFDS_PREFIX`."""

TFDS_PREFIX = "tfds:"

SPLIT_FIELDS = ("train_split", "test_split", "validation_split")
"""Fields that name TFDS splits."""

AUTO_VALIDATION = -1.0
"""The value of `data.validation` that selects the default of a folder of images."""


_FOR_SMALL_IMAGES = re.compile(r"resnet(14|20|32|44|56|110)(?!\d)|densenet|resnext")


def is_for_small_images(network: str) -> bool:
    """Returns whether the named network, shared or narrow variants included, exists for 32×32 images only."""
    return _FOR_SMALL_IMAGES.match(network) is not None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images to use, and how to preprocess them."""

    name: str = "digits"
    """'digits' (embedded), 'folder' (a directory of images), 'cifar10', 'cifar100', 'fashion_mnist' or 'imagenet2012'
    (from TFDS), or 'tfds:<name>[/<config>]', any data set that TFDS finds prepared as ArrayRecord."""
    directory: str = ""
    """folder: the directory, with train/<class>/* and test/<class>/* (or val/), or only <class>/*; also set by
    --images=DIR. TFDS: the data directory; empty for TFDS's default."""
    manual_directory: str = ""
    """TFDS: directory with manually downloaded source files, to prepare the data set without network access."""
    train_split: str = ""
    """TFDS: the split to train on, e.g. 'train[:90%]'; empty for 'train'."""
    test_split: str = ""
    """TFDS: the split to test on; empty for 'test', or 'validation' if there is no labelled 'test'."""
    validation_split: str = ""
    """TFDS: the split used to choose the best checkpoint; empty for none."""
    validation: float = 0.0
    """Fraction of the training images to hold out for choosing the best checkpoint. If 0, and if the data set has no
    validation images of its own, the best checkpoint is chosen on the test images, as published. folder: -1 holds out
    a tenth of each class, or uses the images in val/ if test/ exists too."""
    test: float = 0.2
    """folder without train/ and test/: fraction of each class to hold out for testing."""
    split_seed: int = 0
    """Seed for drawing the images of `validation` and `test`; separate from `seed`, so that runs with different seeds
    are comparable."""
    image_size: int = 0
    """Height and width in pixels to which `crop` brings the images; 0 keeps their size."""
    crop: str = "center"
    """'center': scale the shorter side to image_size and cut out the centre. 'random_resized' (ImageNet): scale random
    crops with 8 to 100 % of the area to image_size for training; for testing, scale images to 8/7 of it and cut out
    the centre."""
    on_broken: str = "fail"
    """What to do with an image that cannot be decoded: 'fail', or 'skip' it with a warning."""
    placement: str = "auto"
    """'device': keep decoded images on the device. 'stream': read them from disk during training. 'auto': choose by
    their size."""
    workers: int = -1
    """Number of processes that read and decode streamed images; 0 uses threads of the main process, −1 chooses by the
    number of cores."""
    train_examples: int = 0
    """Number of training images to use, a fixed random subset that does not depend on the seed; 0 for all."""
    test_examples: int = 0
    """Number of test images to use, a fixed random subset that does not depend on the seed; 0 for all."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from each channel of an image in [0, 1]; one value per channel, or one for all. If `mean` and `std`
    are empty, they are measured on the training images when training begins, and recorded."""
    std: tuple[float, ...] = (0.5,)
    """Divisor of each channel after subtracting `mean`; one value per channel, or one for all."""
    pad: int = 0
    """Training only: zero padding in pixels on each side before a random crop to the original size."""
    flip: bool = False
    """Training only: mirror images horizontally with probability 1/2."""

    def __post_init__(self) -> None:
        if not self.name.startswith(TFDS_PREFIX):
            require_choice("data.name", self.name, DATA_NAMES, f"{TFDS_PREFIX}<name>")
        require(self.name != TFDS_PREFIX, "data.name", self.name, "followed by a name, as in 'tfds:cifar10'")
        for field in ("image_size", "train_examples", "test_examples", "pad", "split_seed"):
            value = getattr(self, field)
            require(0 <= value < 2**31, f"data.{field}", value, "0 or a positive whole number below 2^31")
        require(self.image_size <= 16384, "data.image_size", self.image_size, "at most 16384 pixels")
        if self.name == "folder":
            require(bool(self.directory), "data.directory", self.directory,
                    "the directory of images when data.name='folder': give --images=DIR")
        auto = self.validation == AUTO_VALIDATION and self.name == "folder"
        require(auto or 0 <= self.validation < 1, "data.validation", self.validation,
                "at least 0 and below 1, or -1 when data.name='folder'")
        require(not (self.validation and self.validation_split), "data.validation", self.validation,
                f"0 when data.validation_split={self.validation_split!r}")
        require(0 < self.test <= 1, "data.test", self.test, "above 0 and at most 1")
        require_choice("data.crop", self.crop, ("center", "random_resized"))
        require_choice("data.on_broken", self.on_broken, ("fail", "skip"))
        require_choice("data.placement", self.placement, ("auto", "device", "stream"))
        require(-1 <= self.workers <= 512, "data.workers", self.workers, "-1, or 0 to 512")
        if self.crop == "random_resized":
            require(self.image_size > 0, "data.image_size", self.image_size,
                    "positive when data.crop='random_resized'; 224 is usual")
            require(self.placement != "device", "data.placement", self.placement,
                    "auto or stream when data.crop='random_resized', which needs the original images for each new "
                    "crop")
        for field in ("mean", "std"):
            value = getattr(self, field)
            require(len(value) in (0, 1, 3), f"data.{field}", value, "one value, or one for each of three channels")
            require(all(abs(v) <= 1e30 for v in value), f"data.{field}", value, "numbers up to 1e30")
        require(all(v >= 1e-6 for v in self.std), "data.std", self.std, "positive, at least 1e-6")
        require(bool(self.mean) == bool(self.std), "data.std", self.std,
                f"{'given' if self.mean else 'empty'} when data.mean={self.mean}; leave both empty to measure them")
        require(self.pad <= 1024, "data.pad", self.pad, "at most 1024 pixels")
        self._require_no_other_fields()

    @property
    def is_measured(self) -> bool:
        """Whether mean and standard deviation are set, by the user or by a measurement."""
        return bool(self.mean)

    def _require_no_other_fields(self) -> None:
        """Raises `UserError` if a field is set that the data set ignores."""
        for field in ignored_fields(self.name):
            value = getattr(self, field)
            if value != DEFAULTS[field]:
                why = ", which only applies to TFDS" if field in SPLIT_FIELDS else ""
                advice = (" To train on a folder of images, give --images=DIR or also set --config.data.name=folder."
                          if field == "directory" else "")
                raise UserError(f"data.{field}={value!r}: data.name={self.name!r} ignores this field{why}; omit it."
                                f"{advice}")


DEFAULTS = {field.name: field.default for field in dataclasses.fields(DataConfig)}
"""The default values of `DataConfig`, by field."""


def ignored_fields(name: str) -> tuple[str, ...]:
    """Returns the fields for selecting images that the data set `name` ignores."""
    if name == "digits":
        return ("directory", "manual_directory", *SPLIT_FIELDS, "test")
    return ("manual_directory", *SPLIT_FIELDS) if name == "folder" else ("test",)


def folder_fields(directory: str) -> dict[str, Any]:
    """Returns the fields, by dotted path, that select the folder of images `directory` and reset other selections."""
    ignored = {field: DEFAULTS[field] for field in ignored_fields("folder")}
    return {f"data.{field}": value for field, value in {"name": "folder", "directory": directory, **ignored}.items()}


def named_after(name: str, directory: str) -> str:
    """Returns the run name `name` with {folder} replaced by the last component of the path `directory`.

    Raises:
      UserError: `name` contains {folder} and `directory` is empty.
    """
    if FOLDER not in name:
        return name
    require(bool(directory), "name", name, "without {folder} unless data.directory is set: give --images=DIR")
    last = os.path.basename(os.path.abspath(os.path.expanduser(directory)))
    proper = "".join(char if char.isprintable() and char not in "/\\" else "_" for char in last).lstrip(".")
    return name.replace(FOLDER, proper or "images")


FOLDER = "{folder}"
"""The placeholder in a recipe's run name for the last component of data.directory."""
