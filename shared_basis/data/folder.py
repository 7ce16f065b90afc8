"""A directory of images, `train/<class>/*` and `test/<class>/*`, decoded into arrays."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shared_basis.config import DataConfig
from shared_basis.data.splits import SPLITS, Spec, Split, choose
from shared_basis.errors import UserError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""Files with other suffixes, and hidden files, are passed over."""

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Pillow's decoders for these suffixes. Its many others stay closed to files that merely carry such a suffix."""

_LAYOUT = "data.directory must hold train/<class>/* and test/<class>/*"


class _Files(NamedTuple):
    """The image files of one split, sorted by class and then by name, and their labels int32 [N]."""

    paths: list[str]
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> _Files:
        return _Files([self.paths[index] for index in indices], self.labels[indices])


def describe(config: DataConfig) -> Spec:
    """Returns the names of the class directories, and the shape that the first training image comes to.

    Raises:
      UserError: the directory is not laid out as it must be, or that image is broken.
    """
    root = _root(config)
    classes = _classes(root)
    height, width = (config.image_size,) * 2 if config.image_size else _shape(_first_image(root, classes))
    return Spec(image_shape=(height, width, 3), classes=classes)


def load(config: DataConfig, names: Sequence[str]) -> dict[str, Split]:
    """Decodes the images of the splits `names` that `config` asks for; only these files are opened.

    The order is that of class names and then file names, by code point, the same on every machine. Images become RGB:
    grey is repeated, transparency is laid over white, 16 bits are scaled to 8, an EXIF orientation is applied. With
    `config.image_size` the shorter side is scaled to it (bilinear, antialiased) and the centre is cut out.

    Raises:
      UserError: the directory is not laid out as it must be, fewer images exist than asked for, the images do not fit
        into memory, one is broken, or their sizes differ and `config.image_size` is 0.
    """
    root = _root(config)
    classes = _classes(root)
    files = {name: _list_split(root / name, classes) for name in names}
    chosen = choose(config, {name: len(files[name].paths) for name in names})
    files = {name: files[name].take(chosen[name]) for name in names}
    reference = _first_image(root, classes)
    height, width = (config.image_size,) * 2 if config.image_size else _shape(reference)
    _check_memory(sum(len(part.paths) for part in files.values()), height, width)
    return {name: Split(_decode_all(part.paths, height, width, config.image_size, reference), part.labels)
            for name, part in files.items()}


def _root(config: DataConfig) -> Path:
    """Returns the directory, after checking that it and its train/ and test/ exist."""
    root = Path(config.directory).expanduser()
    for directory in (root, *(root / name for name in SPLITS)):
        if not os.path.isdir(directory):  # unlike Path.is_dir, False where permissions are missing
            problem = "is not a directory" if os.path.exists(directory) else "cannot be found"
            raise UserError(f"data.directory={config.directory!r}: {directory} {problem}; {_LAYOUT}.")
    return root


def _classes(root: Path) -> tuple[str, ...]:
    """Returns the sorted names of the class directories, after checking that train/ and test/ hold the same."""
    train, test = (set(_list_directories(root / name)) for name in SPLITS)
    for here, there, missing in (("test", "train", test - train), ("train", "test", train - test)):
        if missing:
            raise UserError(f"class {min(missing)!r} is in {root / here} and not in {root / there}; "
                            "both must hold the same class directories.")
    if len(train) < 2:
        raise UserError(f"{root / 'train'} holds {len(train)} class directories; at least 2 are needed. {_LAYOUT}.")
    return tuple(sorted(train))


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    """Returns what `directory` holds, hidden entries apart, sorted by name."""
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the directory {directory}: {error.strerror}; mend its permissions.") from error


def _list_directories(directory: Path) -> list[str]:
    return [entry.name for entry in _scan(directory) if entry.is_dir()]


def _list_images(directory: Path) -> list[str]:
    """Returns the paths of the images in a class directory, at least one."""
    paths = [entry.path for entry in _scan(directory) if entry.name.lower().endswith(SUFFIXES) and
             (entry.is_file() or entry.is_symlink())]  # not a pipe, which would wait; a dangling link is told of later
    if not paths:
        raise UserError(f"class directory {directory} holds no image ({', '.join(SUFFIXES)}); "
                        "put images there, or remove the class from train/ and test/.")
    return paths


def _first_image(root: Path, classes: Sequence[str]) -> str:
    """Returns the training image whose size all others must have."""
    return _list_images(root / "train" / classes[0])[0]


def _list_split(directory: Path, classes: Sequence[str]) -> _Files:
    paths = [_list_images(directory / name) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(part) for part in paths])
    return _Files([path for part in paths for path in part], labels)


def _check_memory(count: int, height: int, width: int) -> None:
    """Raises `UserError` unless `count` RGB images fit into the memory that is free."""
    needed, available = count * height * width * 3, _available_memory()
    if available is not None and needed > available:
        raise UserError(f"{count} images of {height}×{width} pixels need {needed / 2**30:.1f} GiB of memory and "
                        f"{available / 2**30:.1f} GiB are available; set a smaller --config.data.image_size, or fewer "
                        "--config.data.train_examples and --config.data.test_examples.")


def _available_memory() -> int | None:
    """Returns bytes of memory that can be had without swapping; the total where only that is known; or None."""
    try:  # sysconf's count of free pages leaves out the file cache, which the kernel gives back when asked
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _shape(path: str) -> tuple[int, int]:
    """Returns the height and width of one image."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        height, width, _ = _decode(path, 0).shape
    return height, width


def _decode_all(paths: Sequence[str], height: int, width: int, size: int, reference: str) -> np.ndarray:
    """Returns the images uint8 [N, height, width, 3]; `reference` is the file that set height and width."""
    images = np.empty((len(paths), height, width, 3), np.uint8)
    with warnings.catch_warnings():  # one thread: 65 µs an image of 32×32; threads contend and take twice as long
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for index, path in enumerate(paths):
            image = _decode(path, size)
            if image.shape != images.shape[1:]:
                raise UserError(f"images differ in size: {path} has {image.shape[0]}×{image.shape[1]} pixels (height×"
                                f"width) and {reference} has {height}×{width}; set --config.data.image_size to bring "
                                "all images to one size.")
            images[index] = image
    return images


def _decode(path: str, size: int) -> np.ndarray:
    """Returns one image uint8 [H, W, 3], of its own size if `size` is 0 and [size, size, 3] otherwise."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if size:
                image.draft(image.mode, (2 * size, 2 * size))  # a JPEG much too large decodes faster at a fraction
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR) if size else rgb)
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image of the kinds {', '.join(FORMATS)}; replace or remove it.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} has more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down or remove it.") from error
    except Exception as error:  # Pillow's decoders raise many types for broken data
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"cannot decode the image {path}: {reason}; replace or remove it.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` in RGB: transparent pixels on white, 16 bits of grey scaled to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
