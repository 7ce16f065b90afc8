"""Weights from strangers: no code in them is run, nothing beyond a storage is read, and bombs are refused by size."""

from __future__ import annotations

import contextlib
import copyreg
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_files
from helpers import user_error
from hostile import MIB, Reader

from shared_basis.interop.state_dict import read_state_dict

# Pickles, put together by hand

def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def numbers(*values: int) -> bytes:
    return tuple_of(*map(number, values))


def called(function: str, *arguments: bytes) -> bytes:
    """Returns what pickles as a call of `module name`."""
    return b"c" + function.replace(" ", "\n").encode() + b"\n" + tuple_of(*arguments) + b"R"


def storage(key: str, size: int, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), f"ctorch\n{kind}\n".encode(), text(key), text("cpu"), number(size)) + b"Q"


def legacy_storage(key: str, size: int, kind: str = "FloatStorage") -> bytes:
    return storage(key, size, kind)[:-2] + b"NtQ"


def tensor(of: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    return called("torch._utils _rebuild_tensor_v2", of, number(offset), numbers(*shape), numbers(*strides), b"\x89",
                  b"N")


def state_dict(**tensors: bytes) -> bytes:
    return b"}" + b"".join(text(name) + body + b"s" for name, body in tensors.items())


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write_zip(path: Path, body: bytes, members: Mapping[str, bytes] | None = None,
              method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("network/data.pkl", pickled(body))
        for name, content in (members or {}).items():
            archive.writestr(f"network/{name}", content)


def write_legacy(path: Path, body: bytes, header: bytes | None = None) -> None:
    """Writes PyTorch's older format; `header` replaces its first pickle, which only says what file this is."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) if header is None else pickled(header)
    path.write_bytes(magic + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + pickled(body)
                     + pickle.dumps([], 2))


def code(marker: Path) -> dict[str, bytes]:
    """Returns pickles that make the file `marker`, each in another way."""
    command = text(f"touch {marker}")
    python = text(f"open({str(marker)!r}, 'w').close()")
    system = b"cposix\nsystem\n"
    return {
        "posix.system": called("posix system", command),
        "os.system": called("os system", command),
        "exec": called("builtins exec", python),
        "eval under its old name": called("__builtin__ eval", python),
        "subprocess": called("subprocess check_call", b"]" + text("touch") + b"a" + text(str(marker)) + b"a"),
        "an instance": b"(" + command + b"iposix\nsystem\n",
        "an object": b"(" + system + command + b"o",
        "by name on the stack": text("posix") + text("system") + b"\x93" + tuple_of(command) + b"R",
        "from the memo": system + b"q\x07" + b"0" + b"h\x07" + tuple_of(command) + b"R",
        "nested": called("builtins print", called("posix system", command)),
        "as a new object": b"cfunctools\npartial\n" + tuple_of(system, command) + b"\x81" + b")R",
        "by attributes": called("builtins getattr", b"cos\n_wrap_close\n", text("__init__")) + b"0" + called(
            "posix system", command),
        "state of an object": called("posix system", command) + b"}b",
        "an extension": b"\x82\xfa" + tuple_of(command) + b"R",
        "a module": called("builtins __import__", text("trap_module")),
    }


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("posix", "system", 250)
    yield
    copyreg.remove_extension("posix", "system", 250)


@pytest.mark.parametrize("way", code(Path("marker")))
def test_no_pickle_runs_code_wherever_it_stands(tmp_path: Path, trap: Path, extension: None, way: str) -> None:
    marker = trap
    payload = code(marker)[way]
    places = {
        "content": payload, "value": state_dict(weight=payload), "key": b"}" + payload + b"Ns",
        "under a storage": b"(" + payload + b"tQ", "shape": called(
            "torch._utils _rebuild_tensor_v2", storage("0", 1), number(0), payload, numbers(1), b"\x89", b"N"),
        "after it": state_dict() + payload + b"0",
        "type of a storage": tuple_of(text("storage"), payload, text("0"), text("cpu"), number(1)) + b"Q"}
    for body in places.values():
        write_zip(tmp_path / "zip.pth", body, {"data/0": bytes(4)})
        write_legacy(tmp_path / "legacy.pth", body)
        for name in ("zip.pth", "legacy.pth"):
            with user_error(str(tmp_path / name), "which a state dict does not need"):
                read_state_dict(tmp_path / name)
    write_legacy(tmp_path / "header.pth", state_dict(), header=payload)
    with user_error("which a state dict does not need"):
        read_state_dict(tmp_path / "header.pth")
    assert not marker.exists()
    with contextlib.suppress(Exception):
        pickle.loads(pickled(payload))
    assert marker.exists(), "the pickle of this test does nothing"


@pytest.mark.parametrize(("module", "name"), [
    ("torch", "FloatStorage.__init__"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch._utils", "_rebuild_tensor"), ("torch.storage", "_load_from_bytes"), ("torch", "load"),
    ("collections", "OrderedDict.fromkeys"), ("numpy", "float32"), ("numpy.core.multiarray", "_reconstruct"),
    ("copyreg", "_reconstructor"), ("builtins", "getattr"), ("shared_basis.interop.state_dict", "_tensor"), ("", "")])
def test_only_the_names_of_a_state_dict_are_known(tmp_path: Path, module: str, name: str) -> None:
    write_zip(tmp_path / "network.pth", state_dict(weight=text(module) + text(name) + b"\x93"))
    with user_error(f"it refers to {module}.{name}, which a state dict does not need"):
        read_state_dict(tmp_path / "network.pth")


def test_a_name_in_a_pickle_does_not_break_the_line(tmp_path: Path) -> None:
    write_zip(tmp_path / "network.pth", text("two\nlines\x1b[2J") + text("x") + b"\x93")
    with user_error("which a state dict does not need"):
        read_state_dict(tmp_path / "network.pth")


@pytest.mark.parametrize("holder", [storage("1", 1), called("collections OrderedDict")], ids=["storage", "dict"])
def test_a_tensor_reads_nothing_beyond_its_storage_whatever_the_pickle_makes_of_that(tmp_path: Path,
                                                                                      holder: bytes) -> None:
    """The size of a view tells nothing of where it ends: rows are skipped, and elements are counted."""
    square = tensor(storage("0", 16), 0, (4, 4), (4, 1))
    forged = holder + b"}" + text("array") + square + b"sb"
    write_zip(tmp_path / "network.pth", state_dict(weight=tensor(forged, 3, (13,), (1,))),
              {"data/0": bytes(64), "data/1": bytes(4)})
    with user_error("not a readable state dict"):
        read_state_dict(tmp_path / "network.pth")


@pytest.mark.parametrize(("offset", "shape", "strides"), [
    (0, (2**30, 2**30), (0, 0)), (0, (2**30,), (0,)), (0, (-2, -3), (1, 1)), (0, (2,), (2**31 - 1,)),
    (2**31 - 1, (1,), (1,)), (0, (2, 2), (1,)), (0, (5,), (1,))], ids=str)
def test_a_tensor_stays_in_its_storage(reader: Reader, tmp_path: Path, offset: int, shape: tuple[int, ...],
                                       strides: tuple[int, ...]) -> None:
    write_zip(tmp_path / "network.pth", state_dict(weight=tensor(storage("0", 4), offset, shape, strides)),
              {"data/0": bytes(16)})
    assert "network.pth" in reader.refusal(tmp_path / "network.pth")


# Bombs of weights

LARGE = 300 * MIB


def deflated(body: bytes, members: Mapping[str, bytes] | None = None) -> Callable[[Path], None]:
    return lambda path: write_zip(path, body, members, zipfile.ZIP_DEFLATED)


WEIGHT_BOMBS: dict[str, Callable[[Path], None]] = {
    "bytes in a deflated pickle": deflated(b"\x8e" + struct.pack("<Q", LARGE) + bytes(LARGE)),
    "lists in a deflated pickle": deflated(b"]" * (20 * MIB)),
    "marks in a deflated pickle": deflated(b"(" * (40 * MIB)),
    "a deflated storage": deflated(state_dict(weight=tensor(storage("0", LARGE, "ByteStorage"), 0, (LARGE,), (1,))),
                                   {"data/0": bytes(LARGE)}),
    "a place in the memo": lambda path: write_zip(path, b"Nr" + struct.pack("<I", 2**28)),
    "a place in the memo of the older format": lambda path: write_legacy(path, b"Nr" + struct.pack("<I", 2**28)),
    "a storage of the older format": lambda path: write_legacy(
        path, state_dict(weight=tensor(legacy_storage("0", 2**31 - 1, "DoubleStorage"), 0, (1,), (1,)))),
    "bytes declared": lambda path: write_legacy(path, b"\x8e" + struct.pack("<Q", 2**40)),
    "a text declared": lambda path: write_zip(path, b"\x8d" + struct.pack("<Q", 2**40)),
    "a frame declared": lambda path: write_legacy(path, b"\x95" + struct.pack("<Q", 2**40) + b"N"),
    "a number of many digits": lambda path: write_legacy(path, b"L" + b"9" * MIB + b"L\n"),
    "a key of many tuples": lambda path: write_zip(path, b"})" + b"\x85" * MIB + b"Ns"),
    "a value of many tuples": lambda path: write_zip(path, b"}" + text("weight") + b")" + b"\x85" * MIB + b"s"),
}


@pytest.mark.parametrize("bomb", WEIGHT_BOMBS)
def test_weights_that_would_fill_the_memory_are_refused(reader: Reader, tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "network.pth"
    WEIGHT_BOMBS[bomb](path)
    assert path.stat().st_size < 2 * MIB
    assert "network.pth" in reader.refusal(path)


def test_a_member_that_declares_more_than_it_holds_is_refused(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    write_zip(path, state_dict(weight=tensor(storage("0", 2**29), 0, (2**29,), (1,))), {"data/0": bytes(16)})
    body = path.read_bytes()
    entry = body.index(b"PK\x01\x02", body.index(b"PK\x01\x02") + 1)  # of the storage in the central directory
    path.write_bytes(body[:entry + 24] + struct.pack("<I", 2**31) + body[entry + 28:])  # its size, not what is stored
    assert "network.pth" in reader.refusal(path)


def write_safetensors(path: Path, header: Any, body: bytes = bytes(8), length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + body)
    return path


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(("header", "length"), [
    ({}, 2**62), ({}, 2**64 - 1), ({}, 3), ({}, 0), (b'{"a":' * 100_000, None), (b"[" * 100_000 + b"]" * 100_000, None),
    ([], None), (None, None), ({"a": None}, None), ({"a": {}}, None),
    ({"a": entry(begin=-8, end=0)}, None), ({"a": entry(begin=8, end=0)}, None), ({"a": entry(end=2**70)}, None),
    ({"a": entry(end=16, shape=(4,))}, None), ({"a": entry(), "b": entry()}, None), ({"a": entry(shape=(-1,))}, None),
    ({"a": entry(shape=(2**40,))}, None), ({"a": entry(shape=(2**62, 0))}, None), ({"a": entry(shape=2)}, None),
    ({"a": entry(shape=(2.0,))}, None), ({"a": entry(shape="2")}, None), ({"a": entry(dtype="O", shape=(1,))}, None),
    ({"a": entry(dtype=["F32"])}, None), ({"a": entry(dtype="two\nlines\x1b")}, None),
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8' + b"0" * 5000 + b"]}}", None),
], ids=lambda value: str(value)[:40])
def test_a_safetensors_header_that_lies_is_refused(reader: Reader, tmp_path: Path, header: Any,
                                                   length: int | None) -> None:
    path = write_safetensors(tmp_path / "network.safetensors", header, length=length)
    assert "network.safetensors" in reader.refusal(path)


def test_tensors_that_share_their_bytes_do_not_fill_the_memory(reader: Reader, tmp_path: Path) -> None:
    tensors = {str(index): entry(0, MIB, (MIB,), "U8") for index in range(1000)}
    path = write_safetensors(tmp_path / "network.safetensors", tensors, bytes(MIB))
    assert "network.safetensors" in reader.refusal(path)


def test_scalars_of_numpy_beside_the_tensors_are_passed_over(tmp_path: Path) -> None:
    """Trainers note the best accuracy so; torch.load(weights_only=True) refuses the file."""
    weights = {"conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    notes = {"best_acc1": np.float64(71.5), "epoch": np.int64(3), "lr": [np.float32(0.1)]}
    found = read_state_dict(torch_files.save(tmp_path / "best.pth.tar", {"state_dict": weights, **notes}))
    assert found.keys() == weights.keys()
    np.testing.assert_array_equal(found["conv.weight"], weights["conv.weight"])
    with user_error("it holds no dict of tensors"):
        read_state_dict(torch_files.save(tmp_path / "mixed.pth", {**weights, **notes}))
