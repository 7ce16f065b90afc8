"""PyTorch weights, in and out: the official implementation's networks, and torchvision's plain ones.

The mapping is complete both ways: every tensor of the file is consumed exactly once, and every variable of the network
is filled. The path of a variable maps to the tensor that holds it and to the copies of that tensor that the file has in
the blocks that share it; each may have one of several names. Which names those are the architecture says
(`Network.published_names`).
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
"""The names that a tensor may have; exactly one of them is expected."""

WRAPPERS = ("module", "_orig_mod", "model", "net", "network", "backbone", "ema_model")
"""What trainers put before all names, nested in any order: DataParallel, torch.compile, Lightning and others."""

_STEM, _HEAD = ("params", "stem", "kernel"), ("params", "head", "kernel")
"""The first and the last layer of every network that has published weights."""


def load_pytorch_weights(path: str | os.PathLike[str], model: Network) -> dict[str, Any]:
    """Returns `{'params': …, 'batch_stats': …}` of `model`, read from a published state dict as float32 NumPy arrays.

    Plain ResNets and MobileNetV2 load from the layouts of torchvision and timm too. Their MobileNetV2 has ReLU6 where
    the paper's has ReLU inside the blocks, so that its outputs are only reproduced while no activation exceeds 6.

    Args:
      path: a file of safetensors or of `torch.save` (either format); nothing in it is executed.
      model: the network that the file is said to hold, e.g. `create_model('resnet32-s16u1-double')`.

    Raises:
      UserError: the file cannot be read, or a tensor is missing, extra, misshapen, or differs from its alias.
    """
    tensors = read_state_dict(path)
    return _naming(path, lambda: convert_official(tensors, model))


def load_official(path: str | os.PathLike[str], model: Network) -> dict[str, Any]:
    """Returns `load_pytorch_weights`, by its name in version 0.1."""
    note_renamed("load_official", "load_pytorch_weights")
    return load_pytorch_weights(path, model)


def load_network(path: str | os.PathLike[str], model: Network, plain: Network) -> tuple[Network, dict[str, Any]]:
    """Returns the network that a published state dict holds, with as many outputs as it has there, and its variables.

    The network is that of `model` or, where the file has none of its bases, of `plain`, its plain counterpart; the
    images may have any number of channels.

    Raises:
      UserError: as `load_pytorch_weights`.
    """
    tensors, _ = _unwrap(read_state_dict(path))

    def read() -> tuple[Network, dict[str, Any]]:
        model.published_names()  # for its error
        found = model if model.sharing == plain.sharing or any(name in tensors for name in _own_names(model)) else plain
        adapted = found.adapt_published(tensors)[0]

        def size(path: Path, axis: int, usual: int) -> int:
            sizes = [adapted[name].shape[axis] for name in aliases_of(path, found)[0]
                     if name in adapted and adapted[name].ndim > axis]
            return sizes[0] if sizes else usual
        found = found.clone(num_classes=size(_HEAD, 0, found.num_classes))
        return found, convert_official(tensors, found, abstract_variables(found, (32, 32, size(_STEM, 1, 3))))
    return _naming(path, read)


def _own_names(model: Network) -> set[str]:
    """Returns the names of all tensors of a shared network that its plain counterpart has not."""
    paths = (path for path in flatten_dict(dict(abstract_variables(model, (32, 32, 3))))
             if path[1] == "bases" or path[-1] in ("unique", "coefficients"))
    return {name for path in paths for names in aliases_of(path, model) for name in names}


def _naming(path: str | os.PathLike[str], read: Callable[[], Any]) -> Any:
    """Returns what `read` does, whose errors then name the file."""
    try:
        return read()
    except UserError as error:
        raise UserError(f"{path} does not hold this network: {error}") from error


def _unwrap(tensors: Tensors) -> tuple[dict[str, np.ndarray], str]:
    """Returns the tensors without the `WRAPPERS` that most of their names begin with, and these."""
    found, prefix = dict(tensors), ""
    while wrapper := next((f"{word}." for word in WRAPPERS if found and
                           2 * sum(name.startswith(f"{word}.") for name in found) > len(found)), ""):
        bare = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
        if len(bare) < len(found):
            break
        found, prefix = bare, prefix + wrapper
    if prefix:
        found.pop("n_averaged", None)  # which torch.optim.swa_utils.AveragedModel counts beside its module
    return found, prefix


def convert_official(tensors: Tensors, model: Network, shapes: Tree = None) -> dict[str, Any]:
    """Returns the variables of `model` from a published state dict; see `load_pytorch_weights`.

    Args:
      shapes: the result of `abstract_variables` for `model`, where the caller has it: it takes seconds.
    """
    shapes = abstract_variables(model, (32, 32, 3)) if shapes is None else shapes
    bare, prefix = _unwrap(tensors)
    left, renamed = model.adapt_published(bare)

    def source_name(name: str) -> str:
        """Returns the name in the file, quoted."""
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
                raise UserError(f"tensor {source_name(alias)} differs from {source_name(name)}, whose alias it is.")
        if path[-1] == "var":  # counts batches beside each pair of running statistics; nothing needs it
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
    """Returns the state dict of `model`, which `convert_official` reads: the inverse of that function.

    Plain networks that torchvision has are in its layout, all others in the official implementation's. Whatever is
    shared stands there once more for each block that shares it, as the official implementation has it.

    Args:
      batches: the number of batches that running statistics have seen, which PyTorch keeps beside them.

    Raises:
      UserError: there is no published layout of this network.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(jax.device_get(dict(variables))).items():
        owner, *copies = (model.choose_published(names) for names in aliases_of(path, model))
        tensors |= dict.fromkeys((owner, *copies), to_pytorch_layout(np.asarray(leaf), path, owner))
        if path[-1] == "var":
            tensors[owner.removesuffix("running_var") + "num_batches_tracked"] = np.array(batches, np.int64)
    return model.restore_published(tensors)


def to_pytorch_layout(array: np.ndarray, path: Path, name: str) -> np.ndarray:
    """Returns the array of the variable at `path` as the tensor `name` has it: the inverse of `to_jax_layout`."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T
        if path[-1] == "coefficients" or name == "conv2.weight":  # 1×1 convolutions there
            array = array[:, :, None, None]
    return np.ascontiguousarray(array)


def to_jax_layout(tensor: np.ndarray, ndim: int) -> np.ndarray:
    """Returns a PyTorch weight in this package's layout.

    Convolutions `[T, C, k, k]` become `[k, k, C, T]`; matrices, and 1×1 convolutions where a matrix is asked for
    (`ndim` 2), `[T, C]` become `[C, T]`; anything else stays as it is.
    """
    if tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T if tensor.ndim == 2 else tensor


_LEAVES = {"kernel": "weight", "unique": "weight", "coefficients": "weight", "bias": "bias",
           "scale": "weight", "mean": "running_mean", "var": "running_var"}


def aliases_of(path: Path, model: Network) -> list[TensorAliases]:
    """Returns the names of the tensor of the variable at `path` (its collection first), then of each copy of it."""
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
        raise UserError("there are no published weights with bases of it; import the plain network and compress it.")
    in_block = names.factorised if has_basis else names.plain
    return [tuple(f"{prefix}.{name}.{leaf}" for prefix in model.published_blocks(top, block)
                  for name in in_block[module].split("|"))]


def _shared_aliases(group: str, name: str, model: Network) -> list[TensorAliases]:
    """Returns the names of a shared array: the network's own, and a copy in each block that uses it."""
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
