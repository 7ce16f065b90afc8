"""Reads PyTorch state dicts without PyTorch and without executing code from the file."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from shared_basis.errors import UserError, printable
from shared_basis.runtime.files import first_line

_STORAGE_TYPES: dict[str, Any] = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_}
_SAFETENSORS_TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
_KEYS = ("net_state_dict", "state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema",
         "ema_state_dict", "ema")
"""Keys under which trainers save the state dict; if several exist, the first one is used, so averages come last."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by name; no code from the file is executed.

    The file is in safetensors or `torch.save` format, whatever its suffix: `.safetensors`, `.pth`, `.pt`, `.th`,
    `.ckpt`, `.bin`, `.pth.tar`. A `torch.save` file may contain the state dict itself, or a dict with it under a usual
    key, such as `state_dict`, `model` or `ema`.

    Raises:
      UserError: the file is missing, unreadable, damaged, of another format, or contains objects other than tensors,
        which would require executing code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors" or _begins_as_safetensors(path):
            return _read_safetensors(path)
        return _state_dict(_read_torch(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except _NotTensorsError as error:
        raise UserError(
            f"{path}: not a readable state dict: {first_line(error)}. If you trust the file, save only its tensors: "
            f"import torch; c = torch.load({str(path)!r}, weights_only=False, map_location='cpu'); "
            "torch.save(c['model'], 'tensors.pth'), using the file's key instead of 'model', or c.state_dict() "
            "if c is a whole network.") from error
    except Exception as error:  # a damaged file can fail anywhere in its decoding
        raise UserError(f"{path}: not a readable state dict: {first_line(error)}.") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata of a safetensors file; this package's exports store `classes` and others there.

    Values are parsed as JSON, and invalid ones omitted. Returns an empty dict for other formats and damaged files.
    """
    try:
        with safetensors.safe_open(os.fspath(path), "numpy") as file:
            metadata = file.metadata() or {}
    except Exception:  # `read_state_dict` reports the problem
        return {}
    found = {}
    for name, value in metadata.items():
        with contextlib.suppress(ValueError, RecursionError):
            found[name] = json.loads(value)
    return found


class _NotTensorsError(ValueError):
    """The file contains something other than a dict of tensors."""


def _begins_as_safetensors(path: Path) -> bool:
    """Returns whether the file starts with a safetensors header: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" and not zipfile.is_zipfile(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors; `safetensors.numpy` does not support bfloat16."""
    tensors = {}
    for name, view in safetensors.deserialize(path.read_bytes()):
        if view["dtype"] not in _SAFETENSORS_TYPES:
            raise ValueError(f"tensor {printable(name)} is of type {printable(str(view['dtype']))}; must be one of "
                             f"{', '.join(_SAFETENSORS_TYPES)}")
        array = np.frombuffer(view["data"], _SAFETENSORS_TYPES[view["dtype"]])
        tensors[name] = array.reshape(view["shape"])
    return tensors


def _state_dict(content: Any) -> dict[str, np.ndarray]:
    """Returns the state dict inside the contents of a `torch.save` file."""
    for _ in range(3):  # may be nested: {'model': {'state_dict': …}}
        inner = [content[key] for key in _KEYS if isinstance(content, Mapping) and
                 isinstance(content.get(key), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping) or not all(isinstance(value, np.ndarray) for value in content.values()):
        raise _NotTensorsError(f"it holds no dict of tensors, nor one under {', '.join(_KEYS[:-1])} or {_KEYS[-1]}")
    return dict(content)


class _Ignored:
    """Placeholder for a NumPy scalar, such as an accuracy saved by a trainer; discards its value."""

    def __init__(self, *_: Any) -> None:
        """Ignores the arguments of the scalar's constructor."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state of the scalar's dtype."""


_IGNORED = {("numpy", "dtype"), ("_codecs", "encode"),
            *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core"))}
"""The functions and classes by which pickles create NumPy scalars."""


class _Storage:
    """The flat buffer that tensors of a `.pth` file view; filled after the pickle is read (legacy format)."""

    def __init__(self, dtype: Any, size: int) -> None:
        self.array = np.empty(size, dtype)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it modifies a storage")


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    """Replaces PyTorch's tensor constructor: returns a view of `storage`, after checking its bounds."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if offset < 0 or min(strides, default=0) < 0 or (0 not in shape and last >= storage.array.size):
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(shape) > storage.array.size:
        raise ValueError("a tensor repeats its storage")
    item = storage.array.itemsize
    return np.lib.stride_tricks.as_strided(storage.array[offset:], shape, [item * stride for stride in strides],
                                           writeable=False)


class _Unpickler(pickle.Unpickler):
    """Creates dicts, tensors and numbers; rejects all other classes and functions, so that no code is executed."""

    def __init__(self, file: BinaryIO, load_storage: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) in _IGNORED:
            return _Ignored
        raise _NotTensorsError(f"it refers to {printable(f'{module}.{name}')}, which a state dict does not need")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or dtype not in _STORAGE_TYPES.values() or any(part is not None for part in view):
            raise ValueError("it holds a storage of an unknown kind")
        return self._load_storage(dtype, str(key), int(size))


def _checked(pickled: BinaryIO) -> None:
    """Raises `ValueError` for pickles that could exhaust memory or the stack; leaves the file after the pickle."""
    counts: Counter[str] = Counter()
    for opcode, argument, position in pickletools.genops(pickled):
        counts[opcode.name] += 1
        if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > int(position or 0) + 1:
            raise ValueError("its memo has more entries than a state dict needs")
        if opcode.name.startswith("TUPLE") and counts[opcode.name] > 10_000:
            raise ValueError("it has more tuples than a state dict needs")


def _read_torch(path: Path) -> Any:
    """Returns the contents of a `torch.save` file, with tensors as NumPy arrays."""
    if zipfile.is_zipfile(path):
        return _read_torch_zip(path)
    with io.BytesIO(path.read_bytes()) as file:
        storages: dict[str, _Storage] = {}
        size_limit = path.stat().st_size

        def declare(dtype: Any, key: str, size: int) -> _Storage:
            if size * np.dtype(dtype).itemsize > size_limit:
                raise ValueError("a tensor is larger than the file")
            return storages.setdefault(key, _Storage(dtype, size))

        def read() -> Any:
            start = file.tell()
            _checked(file)
            file.seek(start)
            return _Unpickler(file, declare).load()

        if read() != _LEGACY_MAGIC or read() != _LEGACY_PROTOCOL:
            raise ValueError("it was not written by torch.save")
        if not read().get("little_endian", True) or sys.byteorder != "little":
            raise ValueError("it is not in this machine's byte order")
        content = read()
        for key in read():  # storages follow in this order, each preceded by its size
            array = storages[str(key)].array
            if int.from_bytes(file.read(8), "little") != array.size:
                raise ValueError(f"storage {key} does not have the declared size")
            if file.readinto(array.data) != array.nbytes:  # type: ignore[attr-defined]
                raise ValueError("it is truncated")
        return content


def _read_torch_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > info.compress_size
               for info in archive.infolist()):
            raise ValueError("it is compressed, which torch.save never does")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("it is not in this machine's byte order")
        storages: dict[str, _Storage] = {}

        def load(dtype: Any, key: str, size: int) -> _Storage:
            if key not in storages:
                if archive.getinfo(f"{root}data/{key}").file_size != size * np.dtype(dtype).itemsize:
                    raise ValueError(f"storage {key} does not have the declared size")
                storages[key] = _Storage(dtype, 0)
                storages[key].array = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
            return storages[key]

        with io.BytesIO(archive.read(pickled)) as file:
            _checked(file)
            file.seek(0)
            return _Unpickler(file, load).load()  # type: ignore[arg-type]
