"""Files from strangers: no code in them is run, nothing is written or read outside, and bombs are refused by size.

Such files are weights (.pth, .safetensors), workdirs (run.json, metrics, Orbax checkpoints), prepared TFDS data, source
archives and images. What `test_official.py` and `data/test_images.py` try already is not tried here again.
"""

from __future__ import annotations

import contextlib
import copyreg
import gc
import gzip
import importlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, save_run, user_error, write_folder
from PIL import EpsImagePlugin, Image

from shared_basis import data
from shared_basis.config import Config, DataConfig, ModelConfig, to_dict
from shared_basis.data import images
from shared_basis.data.images import BrokenImage
from shared_basis.data.tfds import builders
from shared_basis.errors import UserError
from shared_basis.evaluation.evaluate import evaluate
from shared_basis.interop.state_dict import read_state_dict
from shared_basis.runs.checkpoints import Checkpoints
from shared_basis.runs.workdir import Workdir, make_record

MIB = 2**20

CHILD_MEMORY = 256 * MIB
"""What reading a small hostile file may take."""

# A process that reads files in children of its own, which may take so much memory and may crash.
_READER = """
import json, os, resource, sys
sys.path.insert(0, sys.argv[1])
from shared_basis.data.images import decode, size_of
from shared_basis.errors import UserError
from shared_basis.interop.state_dict import read_state_dict
readers = {"weights": read_state_dict, "image": lambda path: decode(path, 3, (8, 8)), "size": size_of}
while line := sys.stdin.readline():
    kind, path = json.loads(line)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]),) * 2)
        try:
            readers[kind](path)
            answer = "", "read"
        except UserError as error:
            answer = type(error.__cause__).__name__, str(error)
        except BaseException as error:
            answer = type(error).__name__, "no UserError"
        os.write(writing, json.dumps([answer[0], answer[1][:2000]]).encode())
        os._exit(0)
    os.close(writing)
    text = os.fdopen(reading).read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, *(json.loads(text) if text else ("", "died"))]), flush=True)
"""


class Reader:
    """Reads files in processes that may take `CHILD_MEMORY` more than nothing."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _READER, str(ROOT), str(CHILD_MEMORY)],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def refusal(self, path: Path, kind: str = "weights") -> str:
        """Returns the message with which the file is refused: not for want of memory, and not by dying of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        self._process.stdin.flush()
        code, cause, message = json.loads(self._process.stdout.readline())
        assert code == 0, f"reading it ended the process with {code}"
        assert cause not in ("MemoryError", "_ArrayMemoryError"), f"reading it takes the memory: {message[:200]}"
        assert message != "read", "it was read"
        assert message != "no UserError", cause
        assert "\n" not in message
        return message

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the memory of a process is limited as Linux does it")
    process = Reader()
    yield process
    process.close()


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts the module `trap_module` where Python finds it; yields the file that appears once it is imported."""
    directory, marker = tmp_path / "modules", tmp_path / "sprung"
    directory.mkdir()
    (directory / "trap_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(directory))
    yield marker
    sys.modules.pop("trap_module", None)


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
    with user_error(f"it asks for {module}.{name}, which a state dict does not need"):
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
    reader.refusal(tmp_path / "network.pth")


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
    "a deflated byte order": deflated(state_dict(), {"byteorder": bytes(LARGE)}),
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
    reader.refusal(path)


def test_a_member_that_declares_more_than_it_holds_is_refused(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    write_zip(path, state_dict(weight=tensor(storage("0", 2**29), 0, (2**29,), (1,))), {"data/0": bytes(16)})
    body = path.read_bytes()
    entry = body.index(b"PK\x01\x02", body.index(b"PK\x01\x02") + 1)  # of the storage in the central directory
    path.write_bytes(body[:entry + 24] + struct.pack("<I", 2**31) + body[entry + 28:])  # its size, not what is stored
    reader.refusal(path)


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
    reader.refusal(write_safetensors(tmp_path / "network.safetensors", header, length=length))


def test_tensors_that_share_their_bytes_do_not_fill_the_memory(reader: Reader, tmp_path: Path) -> None:
    tensors = {str(index): entry(0, MIB, (MIB,), "U8") for index in range(1000)}
    reader.refusal(write_safetensors(tmp_path / "network.safetensors", tensors, bytes(MIB)))


# Runs

@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the workdir of a run with two checkpoints; for reading only."""
    return save_run(tmp_path_factory.mktemp("honest") / "run", Config(model=ModelConfig(name="resnet14")),
                    {10: 0.5, 20: 0.6})


@pytest.fixture
def stranger(honest: Path, tmp_path: Path) -> Path:
    """Returns a copy of that run, to be spoilt."""
    return shutil.copytree(honest, tmp_path / "run")


RECORDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a class in Python's words": lambda record: record["config"].update({"__class__": "trap_module.X"}),
    "a reduction": lambda record: record["config"]["model"].update({"__reduce__": ["trap_module.X", []]}),
    "an object of jsonpickle": lambda record: record["config"].update(model={"py/object": "trap_module.X"}),
    "a tag of YAML": lambda record: record["config"]["model"].update({"!!python/object/apply": "trap_module.X"}),
    "a method for a field": lambda record: record["config"].update({"__init__": 1}),
    "a configuration that is none": lambda record: record.update(config=None),
    "a part that is none": lambda record: record["config"].update(train=[1]),
    "a module for a network": lambda record: record["config"]["model"].update(name="trap_module.X"),
    "a path for a name": lambda record: record["config"].update(name="../../outside"),
    "a seed beyond all limits": lambda record: record["config"].update(seed=10**4000),
    "a rate beyond all limits": lambda record: record["config"]["optimizer"].update(learning_rate=10**4000),
    "a rate that is none": lambda record: record["config"]["optimizer"].update(learning_rate=float("nan")),
    "no classes": lambda record: record["data"].update(classes=[]),
    "classes that are none": lambda record: record["data"].update(classes=[[1], {}, None]),
    "images beyond all limits": lambda record: record["data"].update(image_shape=[10**9, 10**9, 10**9]),
    "no shape": lambda record: record["data"].update(image_shape=[]),
    "a shape of shapes": lambda record: record["data"].update(image_shape=[[8], 8, 1]),
}


@pytest.mark.parametrize("change", RECORDS)
def test_a_record_is_data_and_is_checked(stranger: Path, trap: Path, change: str) -> None:
    record = json.loads((stranger / "run.json").read_text())
    RECORDS[change](record)
    (stranger / "run.json").write_text(json.dumps(record))
    with user_error():
        evaluate(stranger)
    assert not trap.exists()


@pytest.mark.parametrize("words", ["[" * 100_000, '{"config":' * 100_000, '{"seed": ' + "9" * 5000 + "}", "\x00",
                                   '{"config": {}, "data": {"classes": [], "image_shape": []}, "versions": [1]}'],
                         ids=["deep", "deep dicts", "a number of many digits", "no text", "versions that are none"])
def test_a_record_that_is_none_is_told(stranger: Path, words: str) -> None:
    (stranger / "run.json").write_text(words)
    with user_error("run.json"):
        Workdir(stranger).require(make_record(Config(), {}))


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    """Replaces the JSON in `path` by what `change` returns, or has made of it."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def each_value(**fields: Any) -> Callable[[Any], None]:
    return lambda metadata: [leaf["value_metadata"].update(fields) for leaf in metadata["tree_metadata"].values()][:0]


def each_key(**fields: Any) -> Callable[[Any], None]:
    return lambda metadata: [key.update(fields) for leaf in metadata["tree_metadata"].values()
                             for key in leaf["key_metadata"]][:0]


HANDLERS, METADATA, SHARDING = "_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding"

METADATAS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "handlers": (HANDLERS, lambda found: found.update(item_handlers=dict.fromkeys(found["item_handlers"],
                                                                                  "trap_module.X"))),
    "a handler for all": (HANDLERS, lambda found: found.update(item_handlers="trap_module.X")),
    "a class": (HANDLERS, lambda found: found.update(custom_metadata={"__class__": "trap_module.X"})),
    "times that are none": (HANDLERS, lambda found: found.update(init_timestamp_nsecs="now")),
    "no object": (HANDLERS, lambda found: [1]),
    "types of values": (METADATA, each_value(value_type="trap_module.X")),
    "types of keys": (METADATA, each_key(key_type=99)),
    "keys that climb": (METADATA, each_key(key="../../../outside")),
    "a module": (METADATA, lambda found: found.update(custom_metadata={"module": "trap_module", "name": "X"})),
    "another driver": (METADATA, lambda found: found.update(use_zarr3=True, use_ocdbt=False)),
    "sizes": (METADATA, each_value(write_shape=[2**40, 2**40])),
    "no tree": (METADATA, lambda found: [1]),
    "shardings": (SHARDING, lambda found: dict.fromkeys(found, json.dumps(
        {"sharding_type": "trap_module.X", "module": "trap_module", "device_str": "cpu:0"}))),
    "shardings that are none": (SHARDING, lambda found: [1]),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax leaves unfinished
@pytest.mark.parametrize("change", METADATAS)
def test_names_in_the_metadata_of_a_checkpoint_are_not_imported(stranger: Path, trap: Path, change: str) -> None:
    """It is refused in one line, or read all the same: Orbax asks for little of what stands there."""
    name, spoiling = METADATAS[change]
    spoil(stranger / "checkpoints" / "20" / name, spoiling)
    refusals = []
    try:
        assert evaluate(stranger, "20")["step"] == 20
    except UserError as error:
        refusals.append(str(error))
    for message in refusals:
        assert "\n" not in message
        assert str(stranger / "checkpoints") in message
    gc.collect()
    assert not trap.exists()


@pytest.mark.parametrize("name", [HANDLERS, METADATA, SHARDING, "metrics/metrics"])
def test_metadata_of_great_depth_is_refused(stranger: Path, name: str) -> None:
    (stranger / "checkpoints" / "20" / name).write_text("[" * 100_000)
    with user_error(str(stranger / "checkpoints")):
        evaluate(stranger, "20")


@pytest.mark.parametrize("metrics", ["[]", '{"test_accuracy": "0.9"}', '{"test_accuracy": [0.9]}', "null",
                                     '{"validation_accuracy": {"__class__": "trap_module.X"}}'])
def test_metrics_are_numbers(stranger: Path, trap: Path, metrics: str) -> None:
    (stranger / "checkpoints" / "20" / "metrics" / "metrics").write_text(metrics)
    with user_error("metrics"):
        evaluate(stranger, "best")
    assert not trap.exists()


def test_a_damaged_checkpoint_that_links_elsewhere_is_set_aside_and_what_it_links_to_is_left(stranger: Path,
                                                                                             tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (stranger / "checkpoints" / "20").rename(outside)
    (outside / "metrics" / "metrics").write_text("damaged")
    (stranger / "checkpoints" / "20").symlink_to(outside)
    before = tree(outside)
    assert Checkpoints(stranger / "checkpoints", aside=stranger / "damaged").steps == [10]
    assert tree(outside) == before
    assert (stranger / "damaged" / "20.1").is_symlink()


# Prepared data and archives

def tree(root: Path) -> dict[str, bytes]:
    """Returns what lies below `root`, by path."""
    return {str(path.relative_to(root)): os.readlink(path).encode() if path.is_symlink() else
            path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


@pytest.fixture(scope="module")
def fakes() -> Iterator[Any]:
    """Returns the module of fake sources, which the tests of `shared_basis.data` have beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "data"))
        yield importlib.import_module("tfds_fakes")


@pytest.fixture(scope="module")
def pets(fakes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the data directory of a small TFDS data set; for reading only."""
    directory = tmp_path_factory.mktemp("tfds")
    fakes.write(directory, {"train": fakes.pets(4), "test": fakes.pets(2)})
    return directory


FEATURES: dict[str, Callable[[Any], Any]] = {
    "all features": lambda features: features.update(pythonClassName="trap_module.X"),
    "one feature": lambda features: features["featuresDict"]["features"]["label"].update(
        pythonClassName="trap_module.X"),
    "a further feature": lambda features: features["featuresDict"]["features"].update(
        more={"pythonClassName": "trap_module.X", "jsonFeature": {"json": "{}"}}),
    "a feature of a sequence": lambda features: features["featuresDict"]["features"].update(
        more={"pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
              "sequence": {"feature": {"pythonClassName": "trap_module.X", "jsonFeature": {"json": "{}"}}}}),
    "the older form": lambda features: {"type": "trap_module.X", "content": {}},
    "the older form within": lambda features: {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": {"image": {"type": "trap_module.X", "content": "{}"}}},
}


@pytest.mark.parametrize("change", FEATURES)
def test_modules_named_in_prepared_data_are_not_imported(pets: Path, tmp_path: Path, trap: Path, change: str) -> None:
    directory = shutil.copytree(pets, tmp_path / "tfds")
    spoil(directory / "pets_fake" / "1.0.0" / "features.json", FEATURES[change])
    config = DataConfig(name="tfds:pets_fake", directory=str(directory), image_size=8)
    for read in (data.describe, data.open_source):
        with user_error(str(directory)):
            read(config)
        assert not trap.exists()


@pytest.mark.parametrize("fields", [
    {"moduleName": "trap_module"}, {"name": "../outside"}, {"version": "../outside"}, {"fileFormat": "trap_module"},
    {"configName": "../../outside"}, {"splits": [{"name": "train", "shardLengths": ["4"], "filepathTemplate":
                                                  "../../outside/{SPLIT}.{SHARD_X_OF_Y}"}]}], ids=str)
def test_names_in_the_description_of_prepared_data_are_not_followed(pets: Path, tmp_path: Path, trap: Path,
                                                                    fields: dict[str, Any]) -> None:
    directory = shutil.copytree(pets, tmp_path / "tfds")
    spoil(directory / "pets_fake" / "1.0.0" / "dataset_info.json", lambda info: info.update(fields))
    before = tree(tmp_path)
    with contextlib.suppress(UserError):
        data.open_source(DataConfig(name="tfds:pets_fake", directory=str(directory), image_size=8))
    assert not trap.exists()
    assert tree(tmp_path) == before


@pytest.fixture
def ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns the calls of Ghostscript, which would run the programs in EPS files."""
    calls: list[Any] = []

    def called(*arguments: Any) -> Any:
        calls.append(arguments)
        return Image.new("RGB", (8, 8)).im
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", called)
    return calls


def test_ghostscript_would_be_called_by_pillow_alone(ghostscript: list[Any]) -> None:
    Image.open(io.BytesIO(image_of("EPS"))).load()
    assert len(ghostscript) == 1


def test_images_beside_the_one_that_is_trained_on_are_not_decoded(fakes: Any, tmp_path: Path,
                                                                  ghostscript: list[Any]) -> None:
    import tensorflow_datasets as tfds
    features = {**fakes.FEATURES, "other": tfds.features.Image()}
    rows = [{"image": image_of("PNG"), "label": index, "other": image_of("EPS")} for index in range(3)]
    fakes.write(tmp_path, {"train": rows, "test": rows}, features)
    data.load(DataConfig(name="tfds:pets_fake", directory=str(tmp_path), image_size=8))
    assert not ghostscript


def test_images_of_an_archive_that_are_encoded_anew_are_what_they_should_be(
        fakes: Any, tmp_path: Path, ghostscript: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum of an archive as large as ImageNet's is not compared."""
    files = dict(fakes.imagenet_files())
    image = fakes.tar({fakes.CMYK: image_of("EPS")}, "w")
    files["ILSVRC2012_img_train.tar"] = fakes.tar({"n01739381.tar": image}, "w")
    with user_error("imagenet2012", "cannot prepare"):
        data.prepare(sources(fakes, tmp_path, "imagenet2012", files, monkeypatch))
    assert not ghostscript


def sources(fakes: Any, root: Path, name: str, files: Mapping[str, bytes],
            monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Writes source files as the published ones, and returns where they and the prepared data lie."""
    (root / "manual").mkdir()
    for file, body in files.items():
        (root / "manual" / file).write_bytes(body)
    fakes.publish(name, files, monkeypatch.setattr)
    return DataConfig(name=name, directory=str(root / "tfds"), manual_directory=str(root / "manual"))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def hostile(outside: Path) -> dict[str, tarfile.TarInfo]:
    return {
        "a climbing name": member("../../../outside/escaped"), "an absolute name": member(str(outside / "escaped")),
        "a link out": member("link", tarfile.SYMTYPE, str(outside / "secret")),
        "a climbing link": member("link", tarfile.SYMTYPE, "../" * 9 + str(outside / "secret")),
        "a hard link": member("link", tarfile.LNKTYPE, str(outside / "secret")),
        "a link to itself": member("link", tarfile.SYMTYPE, "link"),
        "a device": member("device", tarfile.CHRTYPE), "a pipe": member("pipe", tarfile.FIFOTYPE),
        "a directory": member("directory", tarfile.DIRTYPE),
    }


@pytest.mark.parametrize("kind", hostile(Path("/outside")))
@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_archives_write_nothing_outside_and_are_followed_nowhere(
        fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """The hostile member takes the place of each file that the builder reads, and stands beside them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret" * 1000)
    info = hostile(outside)[kind]
    if name == "cifar10":
        files = {"cifar-10-binary.tar.gz": spiked(fakes.cifar10_files()["cifar-10-binary.tar.gz"], info,
                                                  "cifar-10-batches-bin/data_batch_1.bin")}
    else:
        files = dict(fakes.imagenet_files())
        files["ILSVRC2012_img_train.tar"] = spiked(files["ILSVRC2012_img_train.tar"], info, "n01440764.tar")
    config = sources(fakes, tmp_path, name, files, monkeypatch)
    before = tree(outside)
    with contextlib.suppress(UserError):  # a file of a strange name stands beside the others and is not looked at
        data.prepare(config)
    assert tree(outside) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manual", "outside", "tfds"]
    assert not any(b"secret" in body for body in tree(tmp_path / "tfds").values())


def spiked(archive: bytes, info: tarfile.TarInfo, replaced: str) -> bytes:
    """Returns the tar archive with the member `info` before all others, and once more in place of `replaced`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        new.addfile(info)
        for found in old:
            if found.name == replaced:
                new.addfile(info.replace(name=replaced))
            else:
                new.addfile(found, old.extractfile(found))
    return buffer.getvalue()


def test_a_file_that_unpacks_to_more_than_the_published_one_is_not_unpacked(
        fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum stands before: it is refused without a look into it."""

    files = fakes.fashion_files()
    config = sources(fakes, tmp_path, "fashion_mnist", files, monkeypatch)
    (tmp_path / "manual" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(50 * MIB)))
    monkeypatch.setattr(builders, "_read_idx", lambda path: pytest.fail("it was unpacked"))
    with user_error("train-images-idx3-ubyte.gz", "the published file has"):
        data.prepare(config)


# Images

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
    for name, prefix in ((b"zTXt", b"Comment\0\0"), (b"iCCP", b"Profile\0\0")):
        content = prefix + zlib.compress(bytes(500 * MIB), 9)
        chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        (tmp_path / "image.png").write_bytes(body[:end] + chunk + body[end:])
        assert "cannot be decoded" in reader.refusal(tmp_path / "image.png", "image")


FOREIGN = ("EPS", "GIF", "ICNS", "ICO", "JPEG2000", "PCX", "PDF", "PPM", "SGI", "SPIDER", "TGA", "TIFF", "XBM")


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_other_decoders_of_pillow_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
                                              suffix: str) -> None:
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
    path = tmp_path / f"image{suffix}"
    path.write_bytes(buffer.getvalue() or b"nothing")
    for read in (images.size_of, lambda name: images.decode(name, 3, (4, 4))):
        with pytest.raises(BrokenImage, match="is not an image of the kinds"):
            read(str(path))
    assert set(opened) <= set(images.FORMATS)


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


STRANGE = ("two\nlines", "return\rback", "\x1b[2Jcleared", "tab\tbed", "bell\x07", "quote'\"", "; rm -rf", "$(touch x)",
           "ﬁ🙂", "%s{x}", "[red]x", "\u2028line", "\x85next")


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
@pytest.mark.parametrize("part", ["class", "image", "directory"])
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
    assert len(data.load(config).train.labels) == 4
    broken.write_bytes(b"no image")
    for read in (data.load, data.describe, data.prepare):
        with contextlib.suppress(UserError):
            read(config)
            continue
        with pytest.raises(UserError) as caught:
            read(config)
        assert len(str(caught.value).splitlines()) == 1
        assert not set(str(caught.value)) & set("\n\r\x1b\x07\t")


def test_a_record_that_json_holds_is_all_that_is_written(honest: Path) -> None:
    """What was written can be read by any program: nothing in it is a pickle, or names a class of this package."""
    record = json.loads((honest / "run.json").read_text())
    assert record["config"] == to_dict(Config(model=ModelConfig(name="resnet14")))
    for path in honest.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith(b"\x80")
            assert b"shared_basis" not in path.read_bytes()


def test_labels_are_numbers_and_images_are_bytes(tmp_path: Path) -> None:
    """NumPy files in a folder of images, which could hold pickles, are passed over."""
    root = write_folder(tmp_path / "images", ("cat", "dog"), count=2)
    np.save(root / "train" / "cat" / "labels.npy", np.array([{}], object), allow_pickle=True)
    assert len(data.load(DataConfig(name="folder", directory=str(root))).train.labels) == 4
