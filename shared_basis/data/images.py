"""Converts one encoded image at a time to pixels: decoding, colour conversion, cropping and scaling.

Pillow decodes and scales. Its JPEG decoder is libjpeg-turbo with the accurate inverse transform and smooth upsampling;
simplejpeg and OpenCV wrap the same decoder, give the same pixels, and are not noticeably faster at 224×224
(benchmarks/README.md). All scaling uses Pillow's bilinear filter, whose support grows with the reduction
(antialiasing), as in the published recipes. JPEG files at least four times as large as
needed are decoded at 1/2, 1/4 or 1/8 of their size, leaving at least twice the needed size for the filter.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from shared_basis.data.examples import Encoded
from shared_basis.data.listing import HEIF_ADVICE
from shared_basis.errors import UserError

FORMATS: tuple[str, ...] = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The Pillow decoders in use. All others are disabled, since a file's suffix may not match its contents."""

_REGISTERED = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
"""The modules of these decoders, which register themselves in `PIL.Image.OPEN` when imported."""

_HEIF_BEGINNINGS = tuple(b"ftyp" + brand for brand in (
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
"""Bytes 4 to 12 of HEIF files from phones, independent of their suffix."""

TEST_PART = 7 / 8
"""Fraction of the shorter side that the published ImageNet recipe keeps of a test image: 224 of 256 pixels."""

_ORIENTATION = 0x0112
"""The EXIF tag for the orientation of a photograph, a key of `_TURNS`."""

_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}

_SPARE = 2
"""Minimum size after reduced JPEG decoding, as a multiple of the needed size."""

Box = tuple[float, float, float, float]
"""Left, upper, right, lower, in pixels."""

class BrokenImage(UserError):
    """An image cannot be decoded."""


def whole(height: int, width: int) -> Box:
    """Returns the box of the whole image."""
    return 0, 0, width, height


def central(part: float, aspect: float) -> Callable[[int, int], Box]:
    """Returns a function from height and width to the largest central box of `aspect` (width/height), scaled by `part`.

    Scaling this box to `size` equals scaling the shorter side of the image to size/part and cutting out the centre.
    """
    def box(height: int, width: int) -> Box:
        rows = min(height, width / aspect) * part
        columns = min(rows * aspect, width)  # guards against rounding errors
        return (width - columns) / 2, (height - rows) / 2, (width + columns) / 2, (height + rows) / 2
    return box


def random_resized(generator: np.random.Generator) -> Callable[[int, int], Box]:
    """Returns a function from height and width to a random box, the training crop of the published ImageNet recipes.

    The area is uniform in 8 to 100 % of the image, the aspect ratio log-uniform in 3/4 to 4/3. After ten boxes that do
    not fit, it is the largest central box with an aspect ratio in that range.
    """
    def box(height: int, width: int) -> Box:
        for _ in range(10):
            area = generator.uniform(0.08, 1) * height * width
            aspect = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
            rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < rows <= height and 0 < columns <= width:
                top = int(generator.integers(height - rows + 1))
                left = int(generator.integers(width - columns + 1))
                return left, top, left + columns, top + rows
        return central(1, min(max(width / height, 3 / 4), 4 / 3))(height, width)
    return box


def size_of(encoded: Encoded) -> tuple[int, int]:
    """Returns the height and width after applying the EXIF orientation.

    Raises:
      BrokenImage: see `decode`.
    """
    if isinstance(encoded, np.ndarray):
        return encoded.shape[0], encoded.shape[1]
    with _Opened(encoded) as opened:
        return opened.height, opened.width


def decode(encoded: Encoded, channels: int, size: tuple[int, int] | None = None,
           choose: Callable[[int, int], Box] = whole) -> np.ndarray:
    """Returns the pixels uint8 [H, W, channels] of an image.

    Colours are converted to RGB (`channels` 3) or grey (1), transparent pixels are blended with white, 16 bits are
    scaled to 8, and the EXIF orientation is applied.

    Args:
      channels: 1 or 3.
      size: height and width to scale to; None keeps the image's size.
      choose: maps the image's height and width to the box to scale.

    Raises:
      BrokenImage: the image is damaged, not in one of `FORMATS`, or larger than `PIL.Image.MAX_IMAGE_PIXELS`. The
        message does not include the image's name.
    """
    if isinstance(encoded, np.ndarray):
        if size is None and encoded.shape[2] == channels:
            return encoded
        image = Image.fromarray(encoded if encoded.shape[2] == 3 else encoded[..., 0])
        return _finish(image, channels, size, choose(image.height, image.width))
    with _Opened(encoded) as opened:
        box = choose(opened.height, opened.width)
        reduction = opened.reduce(_reduction(box, size))
        left, upper, right, lower = (side / reduction for side in box)  # the last pixels may be partial
        image = opened.load()
        return _finish(image, channels, size, (left, upper, min(right, image.width), min(lower, image.height)))


def _finish(image: Image.Image, channels: int, size: tuple[int, int] | None, box: Box) -> np.ndarray:
    converted = _to_grey(image) if channels == 1 else _to_rgb(image)
    if size is not None:
        converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(converted)
    return pixels[..., None] if channels == 1 else pixels


def _reduction(box: Box, size: tuple[int, int] | None) -> int:
    """Returns the factor by which a JPEG may be reduced while decoding."""
    if size is None:
        return 1
    spare = min((box[3] - box[1]) / size[0], (box[2] - box[0]) / size[1]) / _SPARE
    return next((factor for factor in (8, 4, 2) if spare >= factor), 1)


class _Opened:
    """An image whose header has been read; converts Pillow's exceptions, also while decoding, to `BrokenImage`."""

    def __init__(self, encoded: bytes | str) -> None:
        self._encoded = encoded

    def __enter__(self) -> _Opened:
        try:
            self._body = self._encoded if isinstance(self._encoded, bytes) else Path(self._encoded).read_bytes()
            self._image = _open(self._body)
            if self._image.width * self._image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            if self._image.mode == "F" or (self._image.mode == "I" and self._image.format == "TIFF"):
                raise BrokenImage("has pixels of 32 bits, whose range is not known; convert it to 8 or 16 bits")
            if self._image.format in ("PNG", "TIFF"):
                # A PNG may store its orientation after the pixels; of a TIFF, Pillow applies it while loading.
                self._image.load()
        except Exception as error:
            raise _broken(error) from error
        self._turn = _turn(self._image)
        sideways = self._turn is not None and self._turn not in (
            Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM)
        self.height, self.width = self._image.size if sideways else self._image.size[::-1]
        return self

    def reduce(self, factor: int) -> int:
        """Requests decoding of a JPEG at 1/`factor` of its size, and returns the factor that will be used."""
        if factor > 1:
            width, height = self._image.size
            self._image.draft(self._image.mode, (width // factor, height // factor))
            return factor if self._image.size != (width, height) else 1
        return 1

    def load(self) -> Image.Image:
        """Returns the decoded image with its orientation applied."""
        self._image.load()
        return self._image.transpose(self._turn) if self._turn is not None else self._image

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._image.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise _broken(error) from error


def _open(body: bytes) -> Image.Image:
    """Opens the image whose header is at the start of `body`, without decoding pixels.

    Like `PIL.Image.open`, but without its warning about large images, which could only be silenced by a process-wide
    filter.
    """
    for kind in (_heif(),) if body[4:12] in _HEIF_BEGINNINGS else FORMATS:
        factory, accept = Image.OPEN[kind]
        accepted = accept is None or accept(body[:16])
        if accepted and not isinstance(accepted, str):  # a string says what is missing
            try:
                return factory(io.BytesIO(body), "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # the prefix matches another format
                continue
    raise UnidentifiedImageError


def _heif() -> str:
    """Returns Pillow's name of the HEIF format after registering its plugin.

    Raises:
      BrokenImage: the plugin is not installed.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise BrokenImage(f"is an HEIF file; {HEIF_ADVICE}") from None
    if "HEIF" not in Image.OPEN:
        register_heif_opener()
    return "HEIF"


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition for the EXIF orientation of `image`; None if there is none or it cannot be read.

    `PIL.ImageOps.exif_transpose` decodes first, but the crop must be chosen before decoding; it also fails if unrelated
    EXIF data are damaged.
    """
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many types for broken data
        return None


def _broken(error: Exception) -> BrokenImage:
    """Returns a `BrokenImage` that describes `error`; Pillow's decoders raise many types for broken data."""
    if isinstance(error, BrokenImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        return BrokenImage(f"is not an image of the kinds {', '.join(FORMATS)}")
    if isinstance(error, Image.DecompressionBombError):
        return BrokenImage(f"has more than {Image.MAX_IMAGE_PIXELS} pixels; scale it down")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return BrokenImage(f"cannot be decoded: {reason}")


def _to_grey(image: Image.Image) -> Image.Image:
    if "transparency" in image.info or not (image.mode in ("L", "1") or image.mode.startswith("I")):
        return _to_rgb(image).convert("L")
    return _eight_bits(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns `image` in RGB, with transparent pixels blended with white and 16-bit grey scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a grey image in mode L; Pillow's own conversion clips 16-bit values at 255."""
    if not image.mode.startswith("I"):
        return image.convert("L")
    deep = np.asarray(image).astype(np.uint32)
    grey = (deep + 128) // 257
    if "transparency" in image.info:
        grey[deep == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))
