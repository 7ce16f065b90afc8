"""Images in memory: the memory that there is, and decoding a split block by block, broken images among it."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared_basis.config import DataConfig
from shared_basis.data import Spec, in_memory
from shared_basis.data.examples import ArrayExamples, Encoded
from shared_basis.errors import UserError
from shared_basis.runtime import memory

SPEC = Spec((4, 5, 3), ("cat", "dog"))

SYSTEM = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n"}
CONTAINER = {"/sys/fs/cgroup/memory.max": "500000\n", "/sys/fs/cgroup/memory.current": "300000\n",
             "/sys/fs/cgroup/memory.stat": "active_file 5\ninactive_file 70000\nslab 9\n"}


def examples(count: int) -> ArrayExamples:
    rng = np.random.default_rng(count)
    return ArrayExamples(rng.integers(0, 256, (count, 4, 5, 3), np.uint8), rng.integers(0, 2, count).astype(np.int32))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def lay_out(monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    """Lets `files` be all that can be read."""
    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return files[str(path)]
    monkeypatch.setattr(Path, "read_text", read_text)


def test_available_memory_is_plausible():
    available = memory.available_memory()
    assert available is not None
    assert 2**20 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("files", "expected"), [
    (SYSTEM, 1000 * 1024),
    (SYSTEM | CONTAINER, 500_000 - 300_000 + 70_000),
    (CONTAINER | {"/proc/meminfo": "MemAvailable: 1 kB\n"}, 1024),
    (SYSTEM | CONTAINER | {"/sys/fs/cgroup/memory.max": "max\n"}, 1000 * 1024),
    (SYSTEM | CONTAINER | {"/sys/fs/cgroup/memory.current": "600000\n"}, 0),
    (SYSTEM | CONTAINER | {"/sys/fs/cgroup/memory.stat": ""}, 1000 * 1024),
    (SYSTEM | CONTAINER | {"/sys/fs/cgroup/memory.max": "much\n"}, 1000 * 1024),
], ids=["no container", "tight container", "wide container", "unlimited container", "full container", "no cache known",
        "unreadable limit"])
def test_available_memory_is_what_system_and_container_both_leave(monkeypatch, files, expected):
    lay_out(monkeypatch, files)
    assert memory.available_memory() == expected


def test_the_total_stands_in_where_the_system_does_not_tell_what_is_available(monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lay_out(monkeypatch, {"/proc/meminfo": "MemTotal: 1 kB\n"})
    assert memory.available_memory() == total
    lay_out(monkeypatch, CONTAINER)
    assert memory.available_memory() == 270_000
    monkeypatch.delattr(os, "sysconf")
    assert memory.available_memory() == 270_000
    lay_out(monkeypatch, {})
    assert memory.available_memory() is None


def test_resident_bytes_are_those_of_the_decoded_images():
    splits = {"train": examples(7), "test": examples(2)}
    assert in_memory.resident_bytes(splits, SPEC) == sum(part.images.nbytes for part in splits.values())


@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_blocks_do_not_show(monkeypatch, count):
    monkeypatch.setattr(in_memory, "BLOCK", 3)
    part = examples(count)
    split = in_memory.load_split(part, SPEC, DataConfig(), pytest.fail)
    np.testing.assert_array_equal(split.images, part.images)
    np.testing.assert_array_equal(split.labels, part.labels)


@dataclasses.dataclass(frozen=True)
class Files:
    """Examples whose images are encoded; all of label 1."""

    bodies: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.bodies)

    def take(self, indices: np.ndarray) -> Files:
        return Files(tuple(self.bodies[index] for index in indices))

    def read(self, indices: Sequence[int]) -> list[tuple[Encoded, int]]:
        return [(self.bodies[index], 1) for index in indices]

    def name(self, index: int) -> str:
        return f"file {index}"


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_broken_images_are_told_and_do_not_count(monkeypatch, block):
    monkeypatch.setattr(in_memory, "BLOCK", block)
    pixels = examples(3).images
    told: list[str] = []
    files = Files((png(pixels[0]), b"", png(pixels[1])[:60], png(pixels[2])))
    split = in_memory.load_split(files, SPEC, DataConfig(on_broken="skip"), told.append)
    assert split.labels.tolist() == [1, -1, -1, 1]
    np.testing.assert_array_equal(split.images, [pixels[0], np.zeros((4, 5, 3)), np.zeros((4, 5, 3)), pixels[2]])
    assert [text.split(" ")[:3] for text in told] == [["skipped:", "file", "1"], ["skipped:", "file", "2"]]
    with pytest.raises(UserError, match=r"^file 1 is not an image .*Set --config.data.on_broken=skip \(a run that"):
        in_memory.load_split(files, SPEC, DataConfig(), pytest.fail)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_that_is_no_class_is_named(label):
    part = examples(4)
    part.labels[2] = label
    with pytest.raises(UserError, match=f"image 2 has the label {label}, but there are 2 classes"):
        in_memory.load_split(part, SPEC, DataConfig(), pytest.fail)
