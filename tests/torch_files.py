"""Files as PyTorch's users write them, made without PyTorch."""

from __future__ import annotations

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

_TYPES = {"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
          "bfloat16": "BFloat16Storage", "int64": "LongStorage", "bool": "BoolStorage"}

_TORCH, _UTILS = types.ModuleType("torch"), types.ModuleType("torch._utils")
for _module, _names in ((_TORCH, tuple(_TYPES.values())), (_UTILS, ("_rebuild_tensor_v2",))):
    for _name in _names:
        setattr(_module, _name, type(_name, (), {"__module__": _module.__name__}))


class _Storage:
    """Pickled by a persistent id."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


class _Tensor:
    """Pickled as the call that makes a tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = np.array(array, order="C")

    def __reduce__(self) -> Any:
        strides = tuple(stride // self._array.itemsize for stride in self._array.strides)
        return _UTILS._rebuild_tensor_v2, (  # type: ignore[attr-defined]
            _Storage(self._array), 0, self._array.shape, strides, False, OrderedDict())


def save(path: Path, content: Any) -> Path:
    """Writes `content`, whose NumPy arrays become tensors, and returns `path`."""
    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _Tensor(value)
        return {key: convert(item) for key, item in value.items()} if isinstance(value, dict) else value

    arrays: list[np.ndarray] = []

    def persistent_id(item: Any) -> Any:
        if not isinstance(item, _Storage):
            return None
        arrays.append(item.array)
        return "storage", getattr(_TORCH, _TYPES[item.array.dtype.name]), str(len(arrays) - 1), "cpu", item.array.size

    pickled = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": _TORCH, "torch._utils": _UTILS}):
        pickler = pickle.Pickler(pickled, 2)
        pickler.persistent_id = persistent_id  # type: ignore[method-assign]
        pickler.dump(convert(content))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def save_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """Writes `tensors` as safetensors, whose own NumPy face knows no bfloat16, and returns `path`."""
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    header, body = {}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape,
                        "data_offsets": (len(body), len(body) + array.nbytes)}
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path
