"""The section `data` of a configuration: which images, and what is done to them before the network sees them."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from shared_basis.config.checks import require, require_choice
from shared_basis.errors import UserError

DATA_NAMES = ("digits", "folder", "cifar10", "cifar100", "fashion_mnist", "imagenet2012")
"""The data sets that `data.name` accepts, beside those that begin with `TFDS_PREFIX`."""

TFDS_PREFIX = "tfds:"

SPLIT_FIELDS = ("train_split", "test_split", "validation_split")
"""Fields that name splits of TFDS."""

AUTO_VALIDATION = -1.0
"""The value of `data.validation` that lets a folder decide."""


_FOR_SMALL_IMAGES = re.compile(r"resnet(14|20|32|44|56|110)(?!\d)|densenet|resnext")


def is_for_small_images(network: str) -> bool:
    """Returns whether the network of this name, which may share or be narrow, has a form for images of 32×32 alone."""
    return _FOR_SMALL_IMAGES.match(network) is not None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images, and what is done to them before the network sees them."""

    name: str = "digits"
    """'digits' (embedded), 'folder' (a directory of images), 'cifar10', 'cifar100', 'fashion_mnist' or 'imagenet2012'
    (by TFDS), or 'tfds:<name>[/<config>]', anything that TFDS finds prepared as ArrayRecord."""
    directory: str = ""
    """folder: holds train/<class>/* and test/<class>/* (or val/), or <class>/* alone; --images=DIR is short for it.
    TFDS names: its data directory; empty is TFDS's default."""
    manual_directory: str = ""
    """TFDS names: holds source files downloaded by hand, for preparing the data set without a network."""
    train_split: str = ""
    """TFDS names: the split to train on, e.g. 'train[:90%]'; empty is 'train'."""
    test_split: str = ""
    """TFDS names: the split to test on; empty is 'test', or 'validation' where there is no labelled 'test'."""
    validation_split: str = ""
    """TFDS names: a split to choose the best checkpoint on; empty is none."""
    validation: float = 0.0
    """The part of the training images that is held out, to choose the best checkpoint on. At 0, and where the data set
    has no validation images of its own, it is chosen on the test images, as published. folder: -1 is a tenth of each
    class, or those in val/ where there is test/ too."""
    test: float = 0.2
    """folder, without train/ and test/: the part of each class that is held out to test on."""
    split_seed: int = 0
    """Seeds what `validation` and `test` draw; apart from `seed`, so that runs of several seeds can be compared."""
    image_size: int = 0
    """Height and width in pixels that images are brought to, by `crop`; 0 keeps their size."""
    crop: str = "center"
    """'center': the shorter side is scaled to image_size and the centre cut out. 'random_resized' (ImageNet): training
    images are random parts, of 8 to 100 % of the area, scaled to image_size; test images are scaled to 8/7 of it, and
    the centre is cut out."""
    on_broken: str = "fail"
    """'fail' at an image that cannot be decoded, or 'skip' it, with a warning."""
    placement: str = "auto"
    """'device': decoded images are kept on the device. 'stream': they are read from disk during training. 'auto'
    decides by their size."""
    workers: int = -1
    """Processes that read and decode streamed images; 0 uses threads of the main process; −1 decides by the cores."""
    train_examples: int = 0
    """Train on this many images, a fixed random subset that does not depend on the seed; 0 is all of them."""
    test_examples: int = 0
    """Test on this many images, a fixed random subset that does not depend on the seed; 0 is all of them."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from each channel of an image in [0, 1]; one value per channel, or one for all. If it and
    `std` are empty, they are measured on the training images when training begins, and recorded."""
    std: tuple[float, ...] = (0.5,)
    """Divides each channel after that; one value per channel, or one for all."""
    pad: int = 0
    """Training only: zero pixels added on each side before a random crop to the original size."""
    flip: bool = False
    """Training only: mirror left and right with probability one half."""

    def __post_init__(self) -> None:
        if not self.name.startswith(TFDS_PREFIX):
            require_choice("data.name", self.name, DATA_NAMES, f"{TFDS_PREFIX}<name>")
        require(self.name != TFDS_PREFIX, "data.name", self.name, "followed by a name, as in 'tfds:cifar10'")
        for field in ("image_size", "train_examples", "test_examples", "pad", "split_seed"):
            value = getattr(self, field)
            require(0 <= value < 2**31, f"data.{field}", value, "0 or a positive whole number below 2^31")
        require(self.image_size <= 1024, "data.image_size", self.image_size, "at most 1024 pixels")
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
                    "positive when data.crop='random_resized'; usual is 224")
            require(self.placement != "device", "data.placement", self.placement,
                    "auto or stream when data.crop='random_resized', which cuts a new part out of the original image "
                    "each time")
        for field in ("mean", "std"):
            value = getattr(self, field)
            require(len(value) in (0, 1, 3), f"data.{field}", value, "one value, or one for each of three channels")
            require(all(abs(v) <= 1e30 for v in value), f"data.{field}", value, "numbers up to 1e30")
        require(all(v >= 1e-6 for v in self.std), "data.std", self.std, "positive, at least 1e-6")
        require(bool(self.mean) == bool(self.std), "data.std", self.std,
                f"{'given' if self.mean else 'empty'} when data.mean={self.mean} is: both are measured, or neither")
        require(self.pad <= 1024, "data.pad", self.pad, "at most 1024 pixels")
        self._require_no_other_fields()

    @property
    def is_measured(self) -> bool:
        """Whether mean and deviation are known, and not yet to be measured."""
        return bool(self.mean)

    def _require_no_other_fields(self) -> None:
        """Raises `UserError` if a field is set that the data set does not read: it would have no effect."""
        for field in ignored_fields(self.name):
            value = getattr(self, field)
            if value != DEFAULTS[field]:
                why = ", which is for splits of TFDS" if field in SPLIT_FIELDS else ""
                advice = (" To train on a folder of images give --images=DIR, or set --config.data.name=folder too."
                          if field == "directory" else "")
                raise UserError(f"data.{field}={value!r}: data.name={self.name!r} does not read it{why}; leave it out."
                                f"{advice}")


DEFAULTS = {field.name: field.default for field in dataclasses.fields(DataConfig)}
"""The default values of `DataConfig`, by field."""


def ignored_fields(name: str) -> tuple[str, ...]:
    """Returns the fields that say which images are meant, and that the data set `name` does not read."""
    if name == "digits":
        return ("directory", "manual_directory", *SPLIT_FIELDS, "test")
    return ("manual_directory", *SPLIT_FIELDS) if name == "folder" else ("test",)


def folder_fields(directory: str) -> dict[str, Any]:
    """Returns the fields, by dotted path, that make a data set the folder of images `directory`, whatever it was."""
    ignored = {field: DEFAULTS[field] for field in ignored_fields("folder")}
    return {f"data.{field}": value for field, value in {"name": "folder", "directory": directory, **ignored}.items()}


def named_after(name: str, directory: str) -> str:
    """Returns the `name` of a run with the last part of the path `directory` in place of {folder}.

    Raises:
      UserError: it asks for a directory, and there is none.
    """
    if FOLDER not in name:
        return name
    require(bool(directory), "name", name, "without {folder} unless data.directory names one: give --images=DIR")
    last = os.path.basename(os.path.abspath(os.path.expanduser(directory)))
    proper = "".join(char if char.isprintable() and char not in "/\\" else "_" for char in last).lstrip(".")
    return name.replace(FOLDER, proper or "images")


FOLDER = "{folder}"
"""What stands in the name of a recipe's run for the last part of data.directory."""
