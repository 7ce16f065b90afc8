"""Images and folders from strangers: bombs are refused by size, other decoders stay closed, names break no line."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import load
from helpers import write_folder
from hostile import MIB, Reader
from PIL import Image

from shared_basis import data
from shared_basis.config import DataConfig
from shared_basis.data import images
from shared_basis.data.images import BrokenImage
from shared_basis.errors import UserError


def image_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def headers(side: int) -> dict[str, bytes]:
    """Returns small files that say they are `side` pixels high and wide, or as many as their format has."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    small = {kind: image_of(kind) for kind in ("JPEG", "BMP")}
    frame = small["JPEG"].index(b"\xff\xc0") + 5
    lossy = b"VP8 " + struct.pack("<I", 10) + b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", *[min(side, 16_383)] * 2)
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + struct.pack("<I", min(side, 2**24) - 1)[:3] * 2
    return {
        "PNG": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)) + chunk(
            b"IDAT", zlib.compress(bytes(10 * MIB), 9)) + chunk(b"IEND", b""),
        "JPEG": small["JPEG"][:frame] + struct.pack(">HH", *[min(side, 65_535)] * 2) + small["JPEG"][frame + 4:],
        "BMP": small["BMP"][:18] + struct.pack("<ii", side, side) + small["BMP"][26:],
        "BMP upside down": small["BMP"][:18] + struct.pack("<ii", side, -side) + small["BMP"][26:],
        "WEBP": b"RIFF" + struct.pack("<I", len(lossy) + 4) + b"WEBP" + lossy,
        "WEBP extended": b"RIFF" + struct.pack("<I", len(extended) + len(lossy) + 4) + b"WEBP" + extended + lossy,
    }


@pytest.mark.parametrize("side", [16_000, 2**31 - 1])
@pytest.mark.parametrize("kind", headers(100))
def test_images_that_say_they_are_huge_are_refused_by_their_size(reader: Reader, tmp_path: Path, kind: str,
                                                                 side: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(headers(side)[kind])
    assert path.stat().st_size < MIB
    for read in ("image", "size"):
        assert reader.refusal(path, read).startswith(("has more than", "is not an image", "cannot be decoded"))


def test_text_in_a_png_file_does_not_unpack_to_more_than_there_is_room_for(reader: Reader, tmp_path: Path) -> None:
    """Pillow holds texts to 64 MiB, and each of them to 1 MiB; a colour profile too."""
    body = image_of("PNG")
    end = body.index(b"IDAT") - 4
    packed = zlib.compress(bytes(300 * MIB), 9)
    for name, prefix in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"Profile\0\0")):
        content = prefix + packed
        chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        (tmp_path / "image.png").write_bytes(body[:end] + chunk + body[end:])
        assert "cannot be decoded" in reader.refusal(tmp_path / "image.png", "image")


FOREIGN = ("DDS", "EPS", "ICNS", "ICO", "JPEG2000", "PCX", "PDF", "PPM", "SGI", "SPIDER", "TGA", "XBM")


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_decoders_of_pillow_stay_closed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    Image.init()
    opened = []
    for name, (factory, accept) in list(Image.OPEN.items()):
        def watch(*arguments: Any, name: str = name, factory: Any = factory) -> Any:
            opened.append(name)
            return factory(*arguments)
        monkeypatch.setitem(Image.OPEN, name, (watch, accept))
    buffer = io.BytesIO()
    with contextlib.suppress(OSError, ValueError):
        Image.new("1" if kind == "XBM" else "RGB", (32, 32)).save(buffer, kind)
    for read in (images.size_of, lambda body: images.decode(body, 3, (4, 4))):
        with pytest.raises(BrokenImage, match="is not an image of the kinds"):
            read(buffer.getvalue() or b"nothing")
    assert set(opened) <= set(images.FORMATS)


def test_ghostscript_would_be_called_by_pillow_alone(ghostscript: list[Any]) -> None:
    Image.open(io.BytesIO(image_of("EPS"))).load()
    assert len(ghostscript) == 1


SIGNATURES = {"PSD": b"8BPS\0\1" + bytes(30), "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
              "FLI": bytes(4) + b"\x11\xaf" + bytes(200), "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(40),
              "DDS": b"DDS " + bytes(124), "FITS": b"SIMPLE  =                    T" + bytes(80),
              "MPO": b"\xff\xd8\xff\xe2" + struct.pack(">H", 40) + b"MPF\0" + bytes(40), "SVG": b"<svg/>",
              "AVIF": bytes(4) + b"ftypavif" + bytes(40), "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(40)}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_a_signature_of_another_format_opens_no_other_decoder(kind: str, ghostscript: list[Any]) -> None:
    for read in (images.size_of, lambda body: images.decode(body, 3)):
        with pytest.raises(BrokenImage):
            read(SIGNATURES[kind])
    assert not ghostscript


@pytest.mark.parametrize(("part", "name"), [
    ("class", "two\nlines"), ("class", "\x1b[2Jcleared"), ("image", "return\rback"), ("image", "[red]x"),
    ("directory", "\u2028line"), ("directory", "%s{x}")], ids=ascii)
def test_names_of_strangers_do_not_break_the_line(tmp_path: Path, name: str, part: str) -> None:
    root = write_folder(tmp_path / (name if part == "directory" else "images"), ("cat", "dog"), count=2)
    broken = root / "train" / "cat" / "0.png"
    if part == "class":
        for split in ("train", "test"):
            (root / split / "cat").rename(root / split / name)
        broken = root / "train" / name / "0.png"
    if part == "image":
        broken = broken.rename(broken.with_name(f"{name}.png"))
    config = DataConfig(name="folder", directory=str(root))
    assert len(load(config).train.labels) == 4
    broken.write_bytes(b"no image")
    for read in (load, data.describe, data.prepare):
        with contextlib.suppress(UserError):
            read(config)
            continue
        with pytest.raises(UserError) as caught:
            read(config)
        assert len(str(caught.value).splitlines()) == 1
        assert not set(str(caught.value)) & set("\n\r\x1b\x07\t")


def test_labels_are_numbers_and_images_are_bytes(tmp_path: Path) -> None:
    """NumPy files in a folder of images, which could hold pickles, are passed over."""
    root = write_folder(tmp_path / "images", ("cat", "dog"), count=2)
    np.save(root / "train" / "cat" / "labels.npy", np.array([{}], object), allow_pickle=True)
    assert len(load(DataConfig(name="folder", directory=str(root))).train.labels) == 4
