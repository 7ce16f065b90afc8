"""Import and export of PyTorch weights in the layouts of the official implementation, torchvision and timm.

The mapping is complete in both directions: every tensor of the file is used exactly once, and every variable of the
network is filled. The path of a variable maps to its tensor and to the copies of that tensor in the blocks that share
it; each may have one of several names, which the architecture defines (`Network.published_names`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from shared_basis.errors import UserError, note_renamed
from shared_basis.interop.state_dict import read_state_dict
from shared_basis.models.base import Network, Tensors, unexpected_tensors
from shared_basis.models.parameters import abstract_variables
from shared_basis.nn.types import Path, Tree

TensorAliases = tuple[str, ...]
"""The possible names of a tensor, exactly one of which must exist."""

WRAPPERS = ("module", "_orig_mod", "model", "net", "network", "backbone", "ema_model")
"""Prefixes that trainers add to all names, possibly nested: DataParallel, torch.compile, Lightning and others."""

_STEM, _HEAD = ("params", "stem", "kernel"), ("params", "head", "kernel")
"""The first and last layer of every network with published weights."""


def load_pytorch_weights(path: str | os.PathLike[str], model: Network) -> dict[str, Any]:
    """Returns `{'params': …, 'batch_stats': …}` of `model`, read from a published state dict as float32 NumPy arrays.

    Plain ResNets, MobileNetV2, ShuffleNet V2 and EfficientNet-B0 also load from the layout of torchvision, and all but
    ShuffleNet V2 from that of timm, as does MobileNetV1. Where torchvision and timm use ReLU6 instead of ReLU
    (MobileNetV2 inside the blocks, timm's MobileNetV1), outputs are only reproduced as long as no activation exceeds 6.
    The images may have any number of channels.

    Args:
      path: a safetensors file, or one from `torch.save` (either format); nothing in it is executed.
      model: the network stored in the file, e.g. `create_model('resnet32-s16u1-double')`.

    Raises:
      UserError: the file cannot be read, or a tensor is missing, extra, of the wrong shape, or differs from its alias.
    """
    tensors = read_state_dict(path)
    return _naming(path, lambda: convert_official(tensors, model))


def load_official(path: str | os.PathLike[str], model: Network) -> dict[str, Any]:
    """Calls `load_pytorch_weights`; deprecated name of version 0.1."""
    note_renamed("load_official", "load_pytorch_weights")
    return load_pytorch_weights(path, model)


def load_network(path: str | os.PathLike[str], model: Network, plain: Network) -> tuple[Network, dict[str, Any]]:
    """Returns the network stored in a published state dict, with as many outputs as in the file, and its variables.

    The network is `model` or, if the file has none of its bases, its plain counterpart `plain`; the images may have any
    number of channels.

    Raises:
      UserError: see `load_pytorch_weights`.
    """
    tensors, _ = _unwrap(read_state_dict(path))

    def read() -> tuple[Network, dict[str, Any]]:
        names = model.published_names()  # raises if there is no published layout
        can_exist = bool(names.factorised) or not model.sharing.factorised
        is_model = can_exist and any(name in tensors for name in _own_names(model))
        found = model if model.sharing == plain.sharing or is_model else plain
        found = found.clone(num_classes=_size(found.adapt_published(tensors)[0], found, _HEAD, 0, found.num_classes))
        return found, convert_official(tensors, found)
    return _naming(path, read)


def _size(adapted: Tensors, model: Network, path: Path, axis: int, usual: int) -> int:
    """Returns the size of an axis of the tensor for the variable at `path`; `usual` if there is none or it is empty."""
    sizes = [adapted[name].shape[axis] for name in aliases_of(path, model)[0]
             if name in adapted and adapted[name].ndim > axis and adapted[name].size]
    return sizes[0] if sizes else usual


def _own_names(model: Network) -> set[str]:
    """Returns the names of all tensors of a shared network that its plain counterpart lacks."""
    paths = (path for path in flatten_dict(dict(abstract_variables(model, (32, 32, 3))))
             if path[1] == "bases" or path[-1] in ("unique", "coefficients"))
    return {name for path in paths for names in aliases_of(path, model) for name in names}


def _naming(path: str | os.PathLike[str], read: Callable[[], Any]) -> Any:
    """Returns the result of `read`, and adds the file name to its errors."""
    try:
        return read()
    except UserError as error:
        raise UserError(f"{path} does not hold this network: {error}") from error


def _unwrap(tensors: Tensors) -> tuple[dict[str, np.ndarray], str]:
    """Strips `WRAPPERS` that most tensor names begin with; returns the tensors and the stripped prefix."""
    found, prefix = dict(tensors), ""
    while wrapper := next((f"{word}." for word in WRAPPERS if found and
                           2 * sum(name.startswith(f"{word}.") for name in found) > len(found)), ""):
        bare = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
        if len(bare) < len(found):
            break
        found, prefix = bare, prefix + wrapper
    if prefix:
        found.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return found, prefix


def convert_official(tensors: Tensors, model: Network, shapes: Tree = None) -> dict[str, Any]:
    """Converts a published state dict to the variables of `model`; see `load_pytorch_weights`.

    Args:
      shapes: the result of `abstract_variables` for `model`, if already computed, as it takes seconds.
    """
    bare, prefix = _unwrap(tensors)
    left, renamed = model.adapt_published(bare)
    if shapes is None:
        shapes = abstract_variables(model, (32, 32, _size(left, model, _STEM, 1, 3)))

    def source_name(name: str) -> str:
        """Returns the quoted name in the file."""
        module, _, leaf = name.rpartition(".")
        whole = f"{renamed.get(module, module)}.{leaf}"
        return repr(prefix + whole if prefix + whole in tensors or whole not in tensors else whole)

    def take(names: TensorAliases, path: str) -> tuple[str, np.ndarray]:
        for name in names:
            if name in left:
                return name, left.pop(name)
        wanted = dict.fromkeys(map(source_name, names))
        raise UserError(f"tensor {' or '.join(wanted)} (for {path}) is missing.")

    def fill(entry: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = tuple(key.key for key in entry)
        owner, *copies = aliases_of(path, model)
        name, tensor = take(owner, "/".join(path))
        for names in copies:
            alias, copy = take(names, "/".join(path))
            if not np.array_equal(copy, tensor, equal_nan=True):
                raise UserError(f"tensor {source_name(alias)} differs from {source_name(name)}; aliases must be equal.")
        if path[-1] == "var":  # the batch counter next to running statistics, which is unused
            left.pop(name.removesuffix("running_var") + "num_batches_tracked", None)
        array = to_jax_layout(tensor, leaf.ndim)
        if array.shape != leaf.shape:
            raise UserError(f"tensor {source_name(name)} has shape {list(tensor.shape)}, in this layout "
                            f"{list(array.shape)}; {'/'.join(path)} needs {list(leaf.shape)}.")
        return array.astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, dict(shapes))
    if left:
        raise unexpected_tensors(source_name(name).strip("'") for name in left)
    return variables


def to_published(variables: Tree, model: Network, batches: int = 0) -> dict[str, np.ndarray]:
    """Converts variables to the state dict of `model`; the inverse of `convert_official`.

    Plain networks that torchvision provides use its layout, MobileNetV1 timm's, all others that of the official
    implementation, where shared arrays are repeated for each block that uses them.

    Args:
      batches: the number of batches that the running statistics have seen, which PyTorch stores next to them.

    Raises:
      UserError: there is no published layout for this network.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(jax.device_get(dict(variables))).items():
        owner, *copies = (model.choose_published(names) for names in aliases_of(path, model))
        tensors |= dict.fromkeys((owner, *copies), to_pytorch_layout(np.asarray(leaf), path, owner))
        if path[-1] == "var":
            tensors[owner.removesuffix("running_var") + "num_batches_tracked"] = np.array(batches, np.int64)
    return model.restore_published(tensors)


def to_pytorch_layout(array: np.ndarray, path: Path, name: str) -> np.ndarray:
    """Converts the variable at `path` to the layout of the tensor `name`; the inverse of `to_jax_layout`."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
        if path[-1] == "coefficients" or name == "conv2.weight":  # 1×1 convolutions in PyTorch
            array = array[:, :, None, None]
    return np.ascontiguousarray(array)


def to_jax_layout(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """Converts a PyTorch weight to this package's layout.

    Convolutions `[T, C, k, k]` become `[k, k, C, T]`; matrices `[T, C]`, and 1×1 convolutions where a matrix is needed
    (`ndim` 2), become `[C, T]`; other arrays are unchanged.
    """
    if tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if tensor.ndim == 2 else tensor


_LEAVES = {"kernel": "weight", "unique": "weight", "coefficients": "weight", "bias": "bias",
           "scale": "weight", "mean": "running_mean", "var": "running_var"}


def aliases_of(path: Path, model: Network) -> list[TensorAliases]:
    """Returns the tensor names of the variable at `path` (starting with its collection), then those of each copy."""
    _, top, *rest = path
    if top == "bases":
        return _shared_aliases(rest[0], rest[1], model)
    names, leaf = model.published_names(), _LEAVES[path[-1]]
    if len(rest) < 2:
        return [tuple(f"{module}.{leaf}" for module in names.top[top].split("|"))]
    block, *inner = rest
    module = "/".join(inner if inner[-1] in ("unique", "coefficients") else inner[:-1])
    has_basis = model.sharing.factorised and block in model.sharing_blocks().get(top, ())
    if has_basis and not names.factorised:
        raise UserError("no layout with bases has been published for it, only for the plain network.")
    in_block = names.factorised if has_basis else names.plain
    return [tuple(f"{prefix}.{name}.{leaf}" for prefix in model.published_blocks(top, block)
                  for name in in_block[module].split("|"))]


def _shared_aliases(group: str, name: str, model: Network) -> list[TensorAliases]:
    """Returns the names of a shared array: that of the network, and of the copy in each block that uses it."""
    if not model.sharing.orthonormal:
        raise UserError("the official implementation has no such network.")
    arrays = sorted(model.shared_shapes()[group])
    number = 1 + list(model.shared_shapes()).index(group)
    position = arrays.index(name) + 1
    owner, aliases = f"shared_basis_{number}", [f"shared_basis_{position}", f"shared_basis{position}"]
    if len(arrays) == 1:
        aliases.insert(0, "shared_basis")
    else:
        owner += f"_{position}"
    users = [model.published_blocks(group, block) for block in model.sharing_blocks()[group]]
    return [(f"{owner}.weight",), *(
        tuple(f"{name}.{alias}.weight" for name in names for alias in aliases) for names in users)]
