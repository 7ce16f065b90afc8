"""Import of published PyTorch weights: the official implementation's networks, and torchvision's plain ones.

The mapping is complete both ways: every tensor of the file is consumed exactly once, and every variable of the network
is filled. It works by *slots*: the path of a variable maps to the tensor that holds it and to that tensor's aliases,
each slot listing the names that it may have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shared_basis.errors import UserError
from shared_basis.interop.state_dict import read_state_dict
from shared_basis.models.base import Network
from shared_basis.models.densenet import DenseNet
from shared_basis.models.mobilenetv2 import NECK, STAGES, STEM, MobileNetV2
from shared_basis.models.parameters import abstract_variables
from shared_basis.models.resnext import ResNeXt

Tensors = Mapping[str, np.ndarray]
TensorAliases = tuple[str, ...]
"""The names that a tensor may have; exactly one of them is expected."""


def load_official(path: str | Path, model: Network) -> dict[str, Any]:
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


def convert_official(tensors: Tensors, model: Network) -> dict[str, Any]:
    """Returns the variables of `model` from a published state dict; see `load_official`."""
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""  # as DataParallel saves it
    left, renamed = _prepare({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, model)

    def source_name(name: str) -> str:
        """Returns the name in the file, quoted."""
        module, _, leaf = name.rpartition(".")
        return repr(f"{renamed.get(module, module)}.{leaf}")

    def take(slot: TensorAliases, path: str) -> tuple[str, np.ndarray]:
        for name in slot:
            if name in left:
                return name, left.pop(name)
        names = dict.fromkeys(map(source_name, slot))
        raise UserError(f"tensor {' or '.join(names)} (for {path}) is missing.")

    def fill(entry: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = tuple(key.key for key in entry)
        owner, *aliases = slots(path, model)
        name, tensor = take(owner, "/".join(path))
        for slot in aliases:
            alias, copy = take(slot, "/".join(path))
            if not np.array_equal(copy, tensor, equal_nan=True):
                raise UserError(f"tensor {source_name(alias)} differs from {source_name(name)}, whose alias it is.")
        if path[-1] == "var":  # counts batches beside each pair of running statistics; nothing needs it
            left.pop(name.removesuffix("running_var") + "num_batches_tracked", None)
        array = to_jax_layout(tensor, leaf.ndim)
        if array.shape != leaf.shape:
            raise UserError(f"tensor {source_name(name)} has shape {list(tensor.shape)}, in this layout {list(array.shape)}; "
                            f"{'/'.join(path)} needs {list(leaf.shape)}.")
        return array.astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, dict(abstract_variables(model, (32, 32, 3))))
    if left:
        raise _no_place(source_name(name).strip("'") for name in left)
    return variables


def _no_place(names: Iterable[str]) -> UserError:
    return UserError(f"the network has no place for the tensors {', '.join(sorted(names))}.")


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


# Names of modules by the path of ours: at the top level, and within a block. '|' separates alternatives: of versions of
# the official implementation, and of torchvision.

_RESNET_TOP = {"stem": "conv1", "stem_norm": "bn1", "head": "fc|linear"}
_SHORTCUT = {"shortcut": "shortcut.0|downsample.0", "shortcut_norm": "shortcut.1|downsample.1"}
_PLAIN = {"first": "conv1", "first_norm": "bn1", "second": "conv2", "second_norm": "bn2", "third": "conv3",
          "third_norm": "bn3", **_SHORTCUT}
_BASIC_BASIS = {"first/unique": "basis_conv1", "first/norm": "basis_bn1", "first/coefficients": "coeff_conv1",
                "second/unique": "basis_conv2", "second/norm": "basis_bn2", "second/coefficients": "coeff_conv2"}
_RESNEXT_PLAIN = {
    **{name: f"residual_function.{index}" for name, index in (
        ("first", 0), ("first_norm", 1), ("second", 3), ("second_norm", 4), ("third", 6), ("third_norm", 7))},
    **_SHORTCUT}
_RESNEXT_BASIS = {"first": "conv1", "first_norm": "bn1", "second/unique": "basis_conv2", "second/norm": "bn2",
                  "second/coefficients": "conv3", "third_norm": "bn3"}
_DENSE_TOP = {"stem": "conv1", "final_norm": "features.bn", "head": "linear", **{
    name: f"features.transition_layer_{index - 1}.down_sample.{position}" for index in (1, 2, 3)
    for position, name in enumerate((f"transition{index}_norm", f"transition{index}"))}}
_DENSE_PLAIN = {name: f"residual_function.{index}" for name, index in (
    ("input_norm", 0), ("first", 2), ("first_norm", 3), ("second", 5))}
_DENSE_BASIS = {"input_norm": "bn0", "first": "conv1", "first_norm": "bn1", "second/unique": "basis_conv2",
                "second/norm": "basis_bn2", "second/coefficients": "coeff_conv2"}
_MOBILE_TOP = {"stem": "pre.0", "stem_norm": "pre.1", "neck": "conv1.0", "neck_norm": "conv1.1",
               "head": "conv2|classifier.1"}

_LEAVES = {"kernel": "weight", "unique": "weight", "coefficients": "weight", "bias": "bias",
           "scale": "weight", "mean": "running_mean", "var": "running_var"}


def slots(path: tuple[str, ...], model: Network) -> list[TensorAliases]:
    """Returns the slots of the variable at `path` (its collection first): of its tensor, then of its aliases."""
    _, top, *rest = path
    leaf = _LEAVES[path[-1]] if top != "bases" else "weight"
    if top == "bases":
        return _shared_slots(rest[0], rest[1], model)
    if len(rest) < 2:
        names = (_MOBILE_TOP if isinstance(model, MobileNetV2) else _DENSE_TOP if isinstance(model, DenseNet)
                 else _RESNET_TOP)
        return [tuple(f"{module}.{leaf}" for module in names[top].split("|"))]
    block, *inner = rest
    module = "/".join(inner if inner[-1] in ("unique", "coefficients") else inner[:-1])
    return [tuple(f"{prefix}.{name}.{leaf}" for prefix in _block_names(top, block, model)
                  for name in _names_in_block(top, block, model)[module].split("|"))]


def _names_in_block(group: str, block: str, model: Network) -> Mapping[str, str]:
    factorised = model.sharing.factorised and block in model.sharing_blocks().get(group, ())
    if isinstance(model, ResNeXt):
        return _RESNEXT_BASIS if factorised else _RESNEXT_PLAIN
    if isinstance(model, DenseNet):
        return _DENSE_BASIS if factorised else _DENSE_PLAIN
    return {**_PLAIN, **_BASIC_BASIS} if factorised else _PLAIN


def _block_names(group: str, block: str, model: Network) -> list[str]:
    """Returns the names that a block may have."""
    number, index = int(group[-1]), int(block.removeprefix("block")) - 1
    if isinstance(model, DenseNet):
        names = [f"features.dense_block_layer_{number - 1}", f"features.dense_block{number - 1}"]  # the plain last
        return [f"{name}.bottle_neck_layer_{index}" for name in names]
    if isinstance(model, MobileNetV2):
        return [f"stage{number}" if STAGES[number - 1][0] == 1 else f"stage{number}.{index}"]
    return [f"layer{number}.{index}"]


def _shared_slots(group: str, name: str, model: Network) -> list[TensorAliases]:
    """Returns the slots of a shared array: the network's own, and one in each block that uses it."""
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
    users = [_block_names(group, block, model) for block in model.sharing_blocks()[group]]
    return [(f"{owner}.weight",), *(
        tuple(f"{name}.{alias}.weight" for name in names for alias in aliases) for names in users)]


def _prepare(tensors: Tensors, model: Network) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns `tensors` in the layout of `slots`, and by module the name that it has in the file if it is another."""
    if isinstance(model, MobileNetV2) and any(name.startswith("features.") for name in tensors):
        return _from_torchvision_mobilenet(tensors, model)
    if isinstance(model, DenseNet) and model.shared_shapes()["group4"]:
        return _with_fourth_basis(tensors), {}
    return dict(tensors), {}


def _with_fourth_basis(tensors: Tensors) -> dict[str, np.ndarray]:
    """Gives DenseNet's fourth block a basis of its own: the third block's, which the official code uses there.

    The official fourth basis is in the file and unused. A file whose fourth block uses it already is left as it is.
    """
    used = tensors.get("features.dense_block_layer_3.bottle_neck_layer_0.shared_basis.weight")
    third, fourth = tensors.get("shared_basis_3.weight"), tensors.get("shared_basis_4.weight")
    if used is None or third is None or fourth is None or fourth.shape != third.shape:
        return dict(tensors)  # what is wrong with it will be told
    return {**tensors, "shared_basis_4.weight": third} if np.array_equal(used, third) else dict(tensors)


def _from_torchvision_mobilenet(tensors: Tensors, model: MobileNetV2) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns torchvision's MobileNetV2 under the official names, and torchvision's name of each module.

    torchvision has no 1×1 layer in the first stage and no biases before batch normalisation: identities and zeros.
    """
    modules = {"features.0.0": "pre.0", "features.0.1": "pre.1", "features.18.0": "conv1.0", "features.18.1": "conv1.1",
               "classifier.1": "classifier.1",
               "features.1.conv.0.0": "stage1.conv2", "features.1.conv.0.1": "stage1.bn2",
               "features.1.conv.1": "stage1.conv3", "features.1.conv.2": "stage1.bn3"}
    index = 2
    for number, (blocks, *_) in enumerate(STAGES[1:], 2):
        for block in range(blocks):
            prefix = _block_names(f"stage{number}", f"block{block + 1}", model)[0]
            for source, target in (("0.0", "conv1"), ("0.1", "bn1"), ("1.0", "conv2"), ("1.1", "bn2"), ("2", "conv3"),
                                   ("3", "bn3")):
                modules[f"features.{index}.conv.{source}"] = f"{prefix}.{target}"
            index += 1
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules or name in ("features.0.0.bias", "features.18.0.bias"):
            raise _no_place([name])
        renamed[f"{modules[module]}.{leaf}"] = tensor
    names = {ours: theirs for theirs, ours in modules.items()}
    ones, zeros = np.ones(STEM, np.float32), np.zeros(STEM, np.float32)
    return {**renamed, "pre.0.bias": zeros, "conv1.0.bias": np.zeros(NECK, np.float32),
            "stage1.conv1.weight": np.eye(STEM, dtype=np.float32)[:, :, None, None],
            "stage1.bn1.weight": ones, "stage1.bn1.bias": zeros, "stage1.bn1.running_mean": zeros,
            "stage1.bn1.running_var": ones * (1 - 1e-5)}, names  # the variance is 1 with ε added
