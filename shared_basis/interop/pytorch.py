"""Import of published PyTorch weights: the official implementation's networks, and torchvision's plain ones.

The mapping is complete both ways: every tensor of the file is consumed exactly once, and every variable of the network
is filled. The path of a variable maps to the tensor that holds it and to the copies of that tensor that the file has in
the blocks that share it; each may have one of several names. Which names those are the architecture says
(`Network.published_names`).
"""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from shared_basis.errors import UserError, note_renamed
from shared_basis.interop.state_dict import read_state_dict
from shared_basis.models.base import Network, Tensors, unexpected_tensors
from shared_basis.models.parameters import abstract_variables
from shared_basis.nn.types import Path, Tree

TensorAliases = tuple[str, ...]
"""The names that a tensor may have; exactly one of them is expected."""


def load_pytorch_weights(path: str | os.PathLike[str], model: Network) -> dict[str, Any]:
    """Returns `{'params': …, 'batch_stats': …}` of `model`, read from a published state dict as float32 NumPy arrays.

    Plain ResNets and MobileNetV2 load from torchvision's layout too. torchvision's MobileNetV2 has ReLU6 where the
    paper's has ReLU inside the blocks, so that its outputs are only reproduced while no activation exceeds 6.

    Args:
      path: a `.safetensors` file, or a `.pth` file of `torch.save` (either format); nothing in it is executed.
      model: the network that the file is said to hold, e.g. `create_model('resnet32-s16u1-double')`.

    Raises:
      UserError: the file cannot be read, or a tensor is missing, extra, misshapen, or differs from its alias.
    """
    tensors = read_state_dict(path)
    try:
        return convert_official(tensors, model)
    except UserError as error:
        raise UserError(f"{path} does not hold this network: {error}") from error


def load_official(path: str | os.PathLike[str], model: Network) -> dict[str, Any]:
    """Returns `load_pytorch_weights`, by its name in version 0.1."""
    note_renamed("load_official", "load_pytorch_weights")
    return load_pytorch_weights(path, model)


def convert_official(tensors: Tensors, model: Network, shapes: Tree = None) -> dict[str, Any]:
    """Returns the variables of `model` from a published state dict; see `load_pytorch_weights`.

    Args:
      shapes: the result of `abstract_variables` for `model`, where the caller has it: it takes seconds.
    """
    shapes = abstract_variables(model, (32, 32, 3)) if shapes is None else shapes
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""  # as DataParallel saves it
    left, renamed = model.adapt_published({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})

    def source_name(name: str) -> str:
        """Returns the name in the file, quoted."""
        module, _, leaf = name.rpartition(".")
        return repr(f"{renamed.get(module, module)}.{leaf}")

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
        aliases.append("shared_basis")
    else:
        owner += f"_{position}"
    users = [model.published_blocks(group, block) for block in model.sharing_blocks()[group]]
    return [(f"{owner}.weight",), *(
        tuple(f"{name}.{alias}.weight" for name in names for alias in aliases) for names in users)]
