"""From encoded images to pixels: kinds of files, the two JPEG decoders, crops; and the order that images come in."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared_basis.data import epoch_order, images
from shared_basis.data.examples import crop_generator
from shared_basis.data.images import TEST_PART, BrokenImage, central, decode, random_resized, size_of, whole

Encoded = tuple[str, np.ndarray | Image.Image, dict[str, Any]]
"""The format, what is saved in it, and how."""


def noise(seed: int, height: int = 4, width: int = 5) -> np.ndarray:
    """Returns a random RGB image uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def waves(height: int, width: int) -> np.ndarray:
    """Returns an RGB image uint8 [height, width, 3] without sharp edges."""
    rows, columns = np.mgrid[:height, :width]
    parts = [np.sin(rows / 19 + phase) + np.cos(columns / 23 - phase) for phase in (0, 1, 2)]
    return np.rint(np.dstack(parts) * 60 + 128).astype(np.uint8)


def encode(kind: str, image: np.ndarray | Image.Image, **options: Any) -> bytes:
    """Returns the file of an image."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


# Kinds of files

COLOUR = noise(1)
GREY = COLOUR[..., 0]  # 121 among others
BITS = GREY > 99
DEEP = GREY.astype(np.uint16) * 257
ALPHA = noise(2)[..., 0]
CLEAR = np.zeros((4, 5), np.uint8)
INDICES = GREY % 4
COLOURS = np.array([(0, 0, 0), (10, 20, 30), (200, 100, 50), (255, 255, 0)], np.uint8)
PALETTE = Image.fromarray(INDICES)
PALETTE.putpalette(COLOURS.flatten().tolist())


def thrice(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def white_where(transparent: np.ndarray, colours: np.ndarray) -> np.ndarray:
    return np.where(transparent[..., None], 255, colours)


def over_white(colours: np.ndarray) -> np.ndarray:
    return 255 - (255 - colours) * (ALPHA[..., None] / 255)


EXACT: dict[str, tuple[Encoded, np.ndarray]] = {
    "png": (("PNG", COLOUR, {}), COLOUR),
    "png, grey": (("PNG", GREY, {}), thrice(GREY)),
    "png, bits": (("PNG", BITS, {}), thrice(BITS * 255)),
    "png, 16 bits": (("PNG", DEEP, {}), thrice(GREY)),
    "png, 16 bits, up": (("PNG", np.full((4, 5), 257 * 7 + 129, np.uint16), {}), np.full((4, 5, 3), 8)),
    "png, 16 bits, down": (("PNG", np.full((4, 5), 257 * 7 + 128, np.uint16), {}), np.full((4, 5, 3), 7)),
    "png, palette": (("PNG", PALETTE, {}), COLOURS[INDICES]),
    "png, palette, a transparent colour": (
        ("PNG", PALETTE, {"transparency": 2}), white_where(INDICES == 2, COLOURS[INDICES])),
    "png, palette, transparent colours": (
        ("PNG", PALETTE, {"transparency": bytes([255, 0, 255, 0])}), white_where(INDICES % 2 == 1, COLOURS[INDICES])),
    "png, opaque": (("PNG", np.dstack([COLOUR, CLEAR + 255]), {}), COLOUR),
    "png, transparent": (("PNG", np.dstack([COLOUR, CLEAR]), {}), np.full((4, 5, 3), 255)),
    "png, grey, transparent": (("PNG", np.dstack([GREY, CLEAR]), {}), np.full((4, 5, 3), 255)),
    "png, a transparent colour": (
        ("PNG", COLOUR, {"transparency": tuple(COLOUR[0, 1].tolist())}), white_where(GREY == 121, COLOUR)),
    "webp": (("WEBP", COLOUR, {"lossless": True}), COLOUR),
    "webp, grey": (("WEBP", GREY, {"lossless": True}), thrice(GREY)),
    "webp, palette": (("WEBP", PALETTE, {"lossless": True}), COLOURS[INDICES]),
    "webp, transparent": (("WEBP", np.dstack([COLOUR, CLEAR]), {"lossless": True}), np.full((4, 5, 3), 255)),
    "bmp": (("BMP", COLOUR, {}), COLOUR),
    "bmp, grey": (("BMP", GREY, {}), thrice(GREY)),
    "bmp, bits": (("BMP", BITS, {}), thrice(BITS * 255)),
    "bmp, palette": (("BMP", PALETTE, {}), COLOURS[INDICES]),
}

ABOUT: dict[str, tuple[Encoded, np.ndarray]] = {
    "png, alpha": (("PNG", np.dstack([COLOUR, ALPHA]), {}), over_white(COLOUR)),
    "png, grey, alpha": (("PNG", np.dstack([GREY, ALPHA]), {}), over_white(thrice(GREY))),
    "webp, alpha": (("WEBP", np.dstack([COLOUR, ALPHA]), {"lossless": True}), over_white(COLOUR)),
    "jpeg": (("JPEG", np.full((4, 5, 3), (9, 200, 77), np.uint8), {"quality": 100}), np.full((4, 5, 3), (9, 200, 77))),
    "jpeg, grey": (("JPEG", np.full((4, 5), 77, np.uint8), {"quality": 100}), np.full((4, 5, 3), 77)),
    "jpeg, stored as rgb": (("JPEG", Image.new("RGB", (5, 4), (255, 55, 0)), {"quality": 100, "keep_rgb": True}),
                            np.full((4, 5, 3), (255, 55, 0))),
    "jpeg, cmyk": (("JPEG", Image.new("CMYK", (5, 4), (0, 200, 255, 0)), {"quality": 100}),
                   np.full((4, 5, 3), (255, 55, 0))),
}

TRANSPARENT_GREYS: dict[str, tuple[np.ndarray, int, np.ndarray]] = {
    "bits": (BITS, 0, np.full((4, 5, 3), 255)),
    "grey": (GREY, 121, white_where(GREY == 121, thrice(GREY))),
    "16 bits": (DEEP, 121 * 257, white_where(GREY == 121, thrice(GREY))),
}


@pytest.mark.parametrize(("encoded", "expected"), EXACT.values(), ids=EXACT)
def test_images_become_rgb(encoded, expected):
    kind, image, options = encoded
    body = encode(kind, image, **options)
    pixels = decode(body, 3)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == np.uint8
    assert size_of(body) == (4, 5)


@pytest.mark.parametrize(("encoded", "expected"), ABOUT.values(), ids=ABOUT)
def test_images_become_rgb_to_within_rounding(encoded, expected):
    kind, image, options = encoded
    np.testing.assert_allclose(decode(encode(kind, image, **options), 3).astype(float), expected, atol=1.5)


@pytest.mark.parametrize(("encoded", "expected"), (EXACT | ABOUT).values(), ids=EXACT | ABOUT)
def test_images_become_grey(encoded, expected):
    kind, image, options = encoded
    grey = decode(encode(kind, image, **options), 1)
    assert grey.shape == (4, 5, 1)
    np.testing.assert_allclose(grey[..., 0].astype(float), expected @ [0.299, 0.587, 0.114], atol=1.5)  # ITU-R 601


@pytest.mark.parametrize(("image", "value", "expected"), TRANSPARENT_GREYS.values(), ids=TRANSPARENT_GREYS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_grey_becomes_white(image, value, expected, channels):
    pixels = decode(encode("PNG", image, transparency=value), channels)
    np.testing.assert_array_equal(pixels, expected[..., :channels])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", [None, (3, 2)])
@pytest.mark.parametrize(("orientation", "stored"), [
    (1, lambda shown: shown), (2, np.fliplr), (3, lambda shown: np.rot90(shown, 2)), (4, np.flipud),
    (5, lambda shown: shown.swapaxes(0, 1)), (6, np.rot90), (7, lambda shown: np.rot90(shown.swapaxes(0, 1), 2)),
    (8, lambda shown: np.rot90(shown, -1))])
def test_the_exif_orientation_is_applied(kind, size, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = waves(96, 64)  # large enough for a JPEG file to be decoded at 1/8 of its size
    lossless = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "TIFF": {}}[kind]
    body = encode(kind, np.ascontiguousarray(stored(shown)), exif=exif, **lossless)
    assert size_of(body) == (96, 64)
    expected = shown if size is None else Image.fromarray(shown).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(decode(body, 3, size).astype(int), expected, atol=5 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 6000])
def test_an_unknown_orientation_is_passed_over(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode("PNG", COLOUR, exif=exif), 3), COLOUR)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"x", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"],
                         ids=["garbage", "too short", "cut off"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_flawed_exif_data_does_not_condemn_the_pixels(kind, exif):
    assert decode(encode(kind, COLOUR, exif=exif), 3).shape == (4, 5, 3)


@pytest.mark.parametrize("entry", [
    struct.pack("<HHI4s", 0x0100, 2, 4, b"\xff\xfe\0\0"), struct.pack("<HHIf", 0x0111, 11, 1, math.inf)],
    ids=["a width of letters", "an infinite offset"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_beside_flawed_entries_is_applied(kind, entry):
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entry + turned + bytes(4)
    body = encode(kind, np.rot90(waves(20, 30)).copy(), exif=exif)
    assert size_of(body) == (20, 30)
    np.testing.assert_allclose(decode(body, 3).astype(int), waves(20, 30), atol=40)


def test_the_orientation_may_follow_the_pixels_of_a_png_file():
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encode("PNG", np.rot90(COLOUR).copy(), exif=exif)
    begin = body.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(body[begin:begin + 4], "big")
    moved = body[:begin] + body[end:-12] + body[begin:end] + body[-12:]  # IEND, the last chunk, has 12 bytes
    assert moved.index(b"IDAT") < moved.index(b"eXIf")
    assert size_of(moved) == (4, 5)
    np.testing.assert_array_equal(decode(moved, 3), COLOUR)
    np.testing.assert_array_equal(decode(moved, 3, (2, 2)), decode(body, 3, (2, 2)))


def test_the_first_of_several_images_counts():
    others = [Image.fromarray(noise(seed)) for seed in (2, 3)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        np.testing.assert_array_equal(decode(encode(kind, COLOUR, save_all=True, append_images=others, **options), 3),
                                      COLOUR)
    photograph = encode("MPO", COLOUR, save_all=True, append_images=others)  # what telephones name .jpg
    np.testing.assert_array_equal(decode(photograph, 3), Image.open(io.BytesIO(photograph)).convert("RGB"))
    assert decode(photograph, 3, (1, 1)).shape == (1, 1, 3)


def test_pixels_are_passed_through_or_converted():
    assert decode(COLOUR, 3) is COLOUR
    np.testing.assert_array_equal(decode(COLOUR, 1)[..., 0], Image.fromarray(COLOUR).convert("L"))
    np.testing.assert_array_equal(decode(GREY[..., None], 3), thrice(GREY))
    np.testing.assert_array_equal(decode(GREY[..., None], 1, (2, 3))[..., 0],
                                  Image.fromarray(GREY).resize((3, 2), Image.Resampling.BILINEAR))
    assert size_of(COLOUR) == (4, 5)


def test_an_image_is_given_by_its_bytes_or_by_its_path(tmp_path):
    path = tmp_path / "a.jpg"  # the content decides, not the suffix
    path.write_bytes(encode("PNG", COLOUR))
    np.testing.assert_array_equal(decode(str(path), 3), COLOUR)
    assert size_of(str(path)) == (4, 5)


# Broken images

def outcome(body: bytes, size: tuple[int, int] | None = None) -> tuple[tuple[int, ...], bytes] | str:
    """Returns shape and pixels of an image, or what is wrong with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # damage can make an image huge
        try:
            pixels = decode(body, 3, size)
            return pixels.shape, pixels.tobytes()
        except BrokenImage as error:
            return str(error)


def test_what_pillow_says_becomes_one_line(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("two\nlines")
    body = encode("PNG", COLOUR)
    monkeypatch.setitem(Image.OPEN, "PNG", (fail, None))
    with pytest.raises(BrokenImage, match=r"^cannot be decoded: two lines$"):
        decode(body, 3)


def bomb(side: int) -> bytes:
    """Returns a PNG file of a few bytes that claims to be black and `side` pixels high and wide."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("body", "reason"), [
    (b"", "is not an image of the kinds BMP, GIF, JPEG, PNG, TIFF, WEBP"),
    (b"some text", "is not an image"),
    (encode("PPM", COLOUR), "is not an image"),
    (encode("GIF", noise(1, 40, 40))[:-300], "cannot be decoded"),
    (encode("TIFF", noise(1, 40, 40))[:-300], "cannot be decoded"),
    (encode("TIFF", np.ones((8, 8), np.float32)), "has pixels of 32 bits"),
    (encode("TIFF", np.ones((8, 8), np.int32)), "has pixels of 32 bits"),
    (encode("JPEG", waves(64, 64))[:-300], "cannot be decoded: .*[Tt]runcated"),
    (encode("JPEG", waves(64, 64))[:200], "cannot be decoded|is not an image"),
    (encode("PNG", noise(1, 40, 40))[:-300], "cannot be decoded: .*[Tt]runcated"),
    (encode("PNG", noise(1, 40, 40))[:1000] + bytes(50) + encode("PNG", noise(1, 40, 40))[1050:], "cannot be decoded"),
    (encode("WEBP", noise(1, 40, 40))[:-100], "cannot be decoded|is not an image"),
    (encode("BMP", noise(1, 40, 40))[:-100], "cannot be decoded: .*truncated"),
], ids=["empty", "text", "ppm", "gif cut", "tiff cut", "tiff float", "tiff int", "jpeg cut", "jpeg header", "png cut",
        "png damaged", "webp cut", "bmp cut"])
@pytest.mark.parametrize("size", [None, (4, 4)])
def test_what_cannot_be_decoded_is_told(body, reason, size):
    with pytest.raises(BrokenImage, match=f"^({reason})"):
        decode(body, 3, size)


def test_what_cannot_be_read_is_told(tmp_path):
    for read in (size_of, lambda path: decode(path, 3)):
        with pytest.raises(BrokenImage, match=r"^cannot be decoded: No such file"):
            read(str(tmp_path / "nowhere.png"))
        with pytest.raises(BrokenImage, match=r"^cannot be decoded: Is a directory"):
            read(str(tmp_path))


@pytest.mark.parametrize("limit", [19, 9], ids=["where Pillow warns", "where Pillow refuses"])
def test_images_with_too_many_pixels_are_refused_without_a_warning(monkeypatch, recwarn, limit):
    bodies = [encode(kind, COLOUR) for kind in ("BMP", "JPEG", "PNG", "WEBP")]
    for allowed in (20, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
        assert all(decode(body, 3).shape == (4, 5, 3) for body in bodies)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    warnings.simplefilter("always")  # within `recwarn`
    for body in bodies:
        for read in (size_of, lambda body: decode(body, 3), lambda body: decode(body, 3, (1, 1))):
            with pytest.raises(BrokenImage, match=f"^has more than {limit} pixels; scale it down"):
                read(body)
    assert not list(recwarn)


def test_importing_the_decoders_leaves_the_filters_of_warnings_alone():
    code = "import warnings, shared_basis.data, PIL.Image as pil; " \
           "assert pil.DecompressionBombWarning not in [entry[2] for entry in warnings.filters]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_small_file_that_would_fill_the_memory_is_refused():
    body = bomb(10_000)
    assert len(body) < 100
    with pytest.raises(BrokenImage, match="pixels; scale it down"):
        decode(body, 3)


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_pixels_or_is_told(source):
    body = bytearray(encode(source.draw(st.sampled_from(["BMP", "JPEG", "PNG", "WEBP"])), waves(20, 30)))
    for _ in range(source.draw(st.integers(1, 4))):
        body[source.draw(st.integers(0, len(body) - 1))] = source.draw(st.integers(0, 255))
    result = outcome(bytes(body), (2, 2))
    assert "\n" not in result if isinstance(result, str) else result[0] == (2, 2, 3)


# JPEG files

FLAVOURS: dict[str, tuple[str, dict[str, Any]]] = {
    "4:2:0": ("RGB", {"subsampling": "4:2:0"}), "4:2:2": ("RGB", {"subsampling": "4:2:2"}),
    "4:4:4": ("RGB", {"subsampling": "4:4:4"}), "progressive": ("RGB", {"progressive": True}),
    "coarse": ("RGB", {"quality": 20}), "fine": ("RGB", {"quality": 100}),
    "restarts": ("RGB", {"restart_marker_rows": 1}), "stored as rgb": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}), "grey, progressive": ("L", {"progressive": True})}


@pytest.mark.parametrize(("mode", "options"), FLAVOURS.values(), ids=FLAVOURS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 16), (41, 53), (120, 333)])
def test_jpeg_files_are_decoded_as_other_decoders_do(mode, options, height, width):
    """The choice among decoders of equal quality is one of speed alone: benchmarks/README.md has the figures."""
    simplejpeg = pytest.importorskip("simplejpeg")
    body = encode("JPEG", Image.fromarray(noise(height, height, width)).convert(mode), **options)
    np.testing.assert_array_equal(decode(body, 3), simplejpeg.decode_jpeg(body, "RGB"))


@pytest.mark.parametrize(("mode", "options"), FLAVOURS.values(), ids=FLAVOURS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 16), (41, 53)])
def test_jpeg_files_of_all_kinds_are_decoded(mode, options, height, width):
    body = encode("JPEG", Image.fromarray(noise(height, height, width)).convert(mode), **options)
    np.testing.assert_array_equal(decode(body, 3), Image.open(io.BytesIO(body)).convert("RGB"))
    assert decode(body, 1, (3, 2)).shape == (3, 2, 1)


@pytest.fixture
def scaled_from(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects the height and width of the images that are scaled."""
    seen, resize = [], Image.Image.resize

    def resize_and_tell(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        seen.append((image.height, image.width))
        return resize(image, *args, **kwargs)
    monkeypatch.setattr(Image.Image, "resize", resize_and_tell)
    return seen


@pytest.mark.parametrize(("side", "reduction"), [(127, 1), (128, 2), (255, 2), (256, 4), (511, 4), (512, 8)])
@pytest.mark.parametrize("turned", [False, True])
def test_large_jpeg_files_are_decoded_smaller_and_twice_what_is_needed_is_left(scaled_from, side, reduction, turned):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    decode(encode("JPEG", waves(side, side + 40), exif=exif), 3, (32, 32))
    expected = (-(-side // reduction), -(-(side + 40) // reduction))
    assert scaled_from == [expected[::-1] if turned else expected]
    assert reduction == 1 or min(expected) >= 2 * 32


@pytest.mark.parametrize("side", [127, 255, 512])
def test_decoding_smaller_does_not_show(side):
    pixels = waves(side, side + 40)
    expected = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    assert abs(decode(encode("JPEG", pixels, quality=95), 3, (32, 32)).astype(int) - expected).mean() < 0.8


def test_a_small_part_of_a_large_jpeg_file_is_decoded_in_full(scaled_from):
    body = encode("JPEG", noise(1, 200, 200), quality=95)
    part = decode(body, 3, (40, 40), lambda height, width: (7, 50, 67, 110))
    assert scaled_from == [(200, 200)]
    expected = Image.open(io.BytesIO(body)).resize((40, 40), Image.Resampling.BILINEAR, box=(7, 50, 67, 110))
    np.testing.assert_array_equal(part, expected)


JPEG = encode("JPEG", noise(1, 40, 50))
TABLES = JPEG.index(b"\xff\xdb")  # where the first marker segment of tables begins


@pytest.mark.parametrize("body", [
    JPEG + b"trailing garbage" * 9, JPEG + JPEG, JPEG[:TABLES] + b"\0\0\0" + JPEG[TABLES:],
    JPEG[:-2] + b"\1\2\3" * 5 + JPEG[-2:],
], ids=["behind", "another file behind", "between markers", "before the end"])
def test_a_jpeg_file_with_surplus_bytes_is_decoded(body):
    np.testing.assert_array_equal(decode(body, 3), Image.open(io.BytesIO(JPEG)))


# What is kept of an image, and scaling

def scale_then_cut(image: Image.Image, shorter: int, size: int) -> np.ndarray:
    """Returns what published recipes make of a test image: the shorter side is scaled, and the centre cut out."""
    factor = shorter / min(image.size)
    scaled = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(("height", "width"), [(8, 16), (16, 8), (16, 40), (2, 4), (12, 12)])
def test_the_centre_is_cut_out_of_the_scaled_image(height, width):
    image = Image.fromarray(noise(14, height, width))
    pixels = decode(encode("PNG", image), 3, (4, 4), central(1, 1))
    np.testing.assert_allclose(pixels.astype(int), scale_then_cut(image, 4, 4), atol=1)  # rounding


@pytest.mark.parametrize(("height", "width"), [(256, 256), (512, 768), (384, 256), (128, 192)])
def test_test_images_are_scaled_to_256_and_224_pixels_cut_out(height, width):
    image = Image.fromarray(noise(15, height, width) // 4 + waves(height, width) // 2)
    pixels = decode(encode("PNG", image), 3, (224, 224), central(TEST_PART, 1))
    np.testing.assert_allclose(pixels.astype(int), scale_then_cut(image, 256, 224), atol=1)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.1, 1), st.floats(0.2, 5))
@settings(derandomize=True, deadline=None)
def test_a_central_box_is_the_largest_of_its_aspect(height, width, part, aspect):
    left, top, right, bottom = central(part, aspect)(height, width)
    assert math.isclose((right - left) / (bottom - top), aspect, rel_tol=1e-6)
    assert math.isclose(left + right, width, abs_tol=1e-6)
    assert math.isclose(top + bottom, height, abs_tol=1e-6)
    assert math.isclose(max((right - left) / width, (bottom - top) / height), part, rel_tol=1e-6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("across", [0, 1])
def test_scaling_averages_what_it_drops(kind, across):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[(slice(None),) * across + (slice(None, None, 2),)] = 255
    inner = decode(encode(kind, stripes), 3, (8, 8))[1:-1, 1:-1].astype(int)
    assert abs(inner - 127).max() <= 2


def test_a_halved_image_is_weighted_by_a_triangle():
    row = np.array([0, 0, 0, 0, 80, 0, 0, 0, 0, 0], np.uint8)  # four neighbours weigh 1/8, 3/8, 3/8, 1/8
    halved = decode(encode("PNG", np.tile(row, (10, 1))), 1, (5, 5))
    np.testing.assert_array_equal(halved[2, :, 0], [0, 10, 30, 0, 0])


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]),
       st.sampled_from(["BMP", "JPEG", "PNG", "WEBP", ""]), st.booleans(),
       st.sampled_from([whole, central(1, 1), central(TEST_PART, 1.5), None]))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_decoding_gives_the_shape_that_was_asked_for(height, width, rows, columns, channels, kind, grey, choose):
    image = noise(height * width, height, width)[..., :1 if grey else 3]
    encoded = encode(kind, image[..., 0] if grey else image) if kind else image
    choose = choose or random_resized(np.random.default_rng(height))
    assert size_of(encoded) == (height, width)
    for size, shape in ((None, (height, width)), ((rows, columns), (rows, columns))):
        pixels = decode(encoded, channels, size, choose)
        assert pixels.shape == (*shape, channels)
        assert pixels.dtype == np.uint8


# Random parts

def sides(box: images.Box) -> tuple[float, float]:
    """Returns height and width."""
    return box[3] - box[1], box[2] - box[0]


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 2**31 - 1))
@settings(derandomize=True, deadline=None)
def test_random_boxes_lie_within_the_image(height, width, seed):
    left, top, right, bottom = random_resized(np.random.default_rng(seed))(height, width)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (375, 500), (500, 375)])
def test_random_boxes_have_8_to_100_percent_of_the_area_and_aspects_of_3_4_to_4_3(height, width):
    choose = random_resized(np.random.default_rng(0))
    boxes = np.array([sides(choose(height, width)) for _ in range(2000)])
    areas, aspects = boxes.prod(1) / (height * width), boxes[:, 1] / boxes[:, 0]
    rounding = 1.01
    assert 0.08 / rounding <= areas.min() <= 0.1
    assert 0.9 <= areas.max() <= 1
    assert 3 / 4 / rounding <= aspects.min() <= 0.76
    assert 1.32 <= aspects.max() <= 4 / 3 * rounding
    np.testing.assert_array_equal(boxes, np.rint(boxes))


def test_random_boxes_are_uniform_in_area_logarithm_of_the_aspect_and_place():
    choose = random_resized(np.random.default_rng(0))
    boxes = np.array([choose(1000, 1000) for _ in range(3000)])
    columns, rows = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = rows * columns / 1e6
    always_fits = area < 0.74  # so small a box fits whatever its aspect, so that none is preferred
    assert 0.55 < always_fits.mean() < 0.85
    assert_uniform(area[always_fits], 0.08, 0.74)
    assert_uniform(np.log(columns / rows)[always_fits], math.log(3 / 4), math.log(4 / 3))
    for first, length in ((boxes[:, 0], columns), (boxes[:, 1], rows)):
        assert_uniform(first / (1000 - length + 1e-9), 0, 1)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Asserts that the distribution functions differ by no more than chance lets them (Kolmogorov–Smirnov)."""
    expected = (np.sort(values) - low) / (high - low)
    assert abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max() < 2 / math.sqrt(len(values))


def test_random_boxes_reach_every_border():
    choose = random_resized(np.random.default_rng(0))
    boxes = {choose(4, 4) for _ in range(500)}
    assert {box[0] for box in boxes if box[2] - box[0] == 2} == {box[1] for box in boxes if box[3] - box[1] == 2} == {
        0, 1, 2}


@pytest.mark.parametrize(("height", "width", "expected"), [
    (1000, 10, (0, 500 - 20 / 3, 10, 500 + 20 / 3)),
    (10, 1000, (500 - 20 / 3, 0, 500 + 20 / 3, 10))])
def test_of_extreme_aspects_the_centre_is_kept(height, width, expected):
    for seed in range(20):  # 8 % of such an image, in an aspect of 3/4 to 4/3, are wider or higher than it
        box = random_resized(np.random.default_rng(seed))(height, width)
        np.testing.assert_allclose(box, expected)


class Largest:
    """A generator that draws the highest values: all of the area in an aspect of 4/3."""

    def __init__(self) -> None:
        self.drawn = 0

    def uniform(self, low: float, high: float) -> float:
        self.drawn += 1
        return high


def test_after_ten_boxes_that_do_not_fit_an_image_of_usual_aspect_is_kept_whole():
    generator = Largest()
    box = random_resized(generator)(90, 100)  # 100 of 110 pixels
    np.testing.assert_allclose(box, (0, 0, 100, 90))
    assert generator.drawn == 20


def test_rounding_leads_no_box_out_of_the_image():
    # BUG: left = -7e-15, and Pillow says "box offset can't be negative"
    for height, width in ((83, 94), (97, 107), (105, 116), (89, 92)):
        pixels = noise(1, height, width)
        for encoded in (pixels, encode("PNG", pixels)):
            for choose in (random_resized(Largest()), central(1, width / height)):
                assert decode(encoded, 3, (8, 8), choose).shape == (8, 8, 3)


def test_random_boxes_are_a_function_of_the_generator():
    def boxes(seed: int) -> list[images.Box]:
        choose = random_resized(np.random.default_rng(seed))
        return [choose(300, 400) for _ in range(5)]
    assert boxes(1) == boxes(1)
    assert not set(boxes(1)) & set(boxes(2))
    assert len(set(boxes(1))) == 5


def test_a_random_part_is_what_is_scaled():
    choose = random_resized(np.random.default_rng(7))
    box = random_resized(np.random.default_rng(7))(60, 80)
    image = Image.fromarray(noise(16, 60, 80))
    expected = image.resize((24, 24), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(decode(encode("PNG", image), 3, (24, 24), choose), expected)


# Order and chance

@pytest.mark.parametrize("examples", [0, 1, 1000])
def test_an_epoch_visits_every_image_once(examples):
    order = epoch_order(3, 5, examples)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(examples))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 100)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    np.random.default_rng(0).random(9)
    assert all(tuple(epoch_order(seed, epoch, 100)) == order for (seed, epoch), order in orders.items())


def test_each_image_is_cropped_by_a_generator_of_its_own():
    draws = {(seed, position): tuple(crop_generator(seed, position).random(3)) for seed in range(4)
             for position in (0, 1, 100, 2**32)}
    assert len(set(draws.values())) == 16
    assert all(tuple(crop_generator(*key).random(3)) == draw for key, draw in draws.items())
    # The order of the images and their crops are independent of each other, also for equal numbers.
    assert not np.array_equal(crop_generator(1, 2).permutation(100), epoch_order(1, 2, 100))
