"""Weights as people save them: prefixes, keys, suffixes and types of trainers, and objects that are not tensors."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_files
from helpers import assert_trees_equal, tiny_network, user_error
from safetensors.numpy import save_file
from sample_networks import random_variables

from shared_basis.interop.pytorch import load_network, load_pytorch_weights, to_published
from shared_basis.models.base import Sharing

SHARED = tiny_network(5)
PLAIN = tiny_network(5, sharing=Sharing())


@functools.cache
def variables(plain: bool = False) -> Any:
    return random_variables(PLAIN if plain else SHARED)


@functools.cache
def tensors(plain: bool = False) -> dict[str, np.ndarray]:
    return to_published(variables(plain), PLAIN if plain else SHARED, 7)


def wrapped(prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: tensor for name, tensor in tensors().items()}


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.module.net.",
    "backbone."])
def test_what_trainers_put_before_all_names_is_taken_away(tmp_path: Path, prefix: str) -> None:
    path = torch_files.save(tmp_path / "weights.pth", wrapped(prefix))
    assert_trees_equal(load_pytorch_weights(path, SHARED), variables())


def test_errors_have_the_names_of_the_file(tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in wrapped("model.").items() if name != "model.conv1.weight"}
    with user_error("tensor 'model.conv1.weight' (for params/stem/kernel) is missing"):
        load_pytorch_weights(torch_files.save(tmp_path / "missing.pth", without), SHARED)
    more = {**wrapped("model."), "criterion.weight": np.zeros(5, np.float32)}
    with user_error("unexpected tensors: criterion.weight"):
        load_pytorch_weights(torch_files.save(tmp_path / "more.pth", more), SHARED)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "ema", "net_state_dict", "model_ema",
                                 "state_dict_ema"])
def test_the_usual_keys_are_known(tmp_path: Path, key: str) -> None:
    content = {"epoch": 3, "best": 93.1, "optimizer": {"state": {0: {"momentum_buffer": np.zeros(3)}}, "lr": 0.1},
               key: tensors()}
    assert_trees_equal(load_pytorch_weights(torch_files.save(tmp_path / "weights.pth", content), SHARED), variables())


def test_weights_come_before_their_average_and_may_lie_deeper(tmp_path: Path) -> None:
    average = {f"module.{name}": np.zeros_like(tensor) for name, tensor in tensors().items()}
    average["n_averaged"] = np.array(3)
    both = torch_files.save(tmp_path / "both.pth", {"model_ema": average, "model": {"state_dict": tensors()}})
    assert_trees_equal(load_pytorch_weights(both, SHARED), variables())
    alone = load_pytorch_weights(torch_files.save(tmp_path / "average.pth", {"model_ema": average}), SHARED)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(alone))


@pytest.mark.parametrize("suffix", [".pth.tar", ".th", ".ckpt", ".bin", ""])
def test_the_content_tells_what_a_file_is(tmp_path: Path, suffix: str) -> None:
    path = torch_files.save(tmp_path / f"weights{suffix}", {"state_dict": tensors()})
    assert_trees_equal(load_pytorch_weights(path, SHARED), variables())
    torch_files.save_safetensors(path, tensors())
    assert_trees_equal(load_pytorch_weights(path, SHARED), variables())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("save", [torch_files.save, torch_files.save_safetensors])
def test_other_types_become_float32(tmp_path: Path, dtype: Any, save: Any) -> None:
    rounded = {name: tensor.astype(dtype) if tensor.dtype == np.float32 else tensor
               for name, tensor in tensors().items()}
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), variables())
    assert_trees_equal(load_pytorch_weights(save(tmp_path / "weights", rounded), SHARED), expected)


def test_objects_are_not_made_and_the_way_out_is_said(tmp_path: Path) -> None:
    path = torch_files.save(tmp_path / "weights.pth", {"model": tensors(), "args": argparse.Namespace(lr=0.1)})
    with user_error("it refers to argparse.Namespace, which a state dict does not need", "If you trust the file",
                    f"torch.load({str(path)!r}, weights_only=False", "torch.save(c['model'], 'tensors.pth')"):
        load_pytorch_weights(path, SHARED)
    with user_error("it holds no dict of tensors", "torch.save("):
        load_pytorch_weights(torch_files.save(tmp_path / "numbers.pth", {"lr": 0.1}), SHARED)


def test_the_file_tells_which_network_and_how_many_outputs(tmp_path: Path) -> None:
    shared = torch_files.save(tmp_path / "shared.pth", tensors())
    plain = torch_files.save(tmp_path / "plain.pth", {"module." + name: each for name, each in tensors(True).items()})
    for model in (SHARED.clone(num_classes=3), SHARED):
        found, loaded = load_network(shared, model, PLAIN)
        assert (found.num_classes, found.sharing) == (5, SHARED.sharing)
        assert_trees_equal(loaded, variables())
        found, loaded = load_network(plain, model, PLAIN.clone(num_classes=3))
        assert (found.num_classes, found.sharing) == (5, Sharing())
        assert_trees_equal(loaded, variables(True))
    with user_error(str(shared), "does not hold this network", "conv1.weight' (for params/group1/block2/first/kernel)"):
        load_network(shared, PLAIN, PLAIN)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_may_have_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    expected = random_variables(SHARED, (8, 8, channels))
    path = tmp_path / "weights.safetensors"
    save_file(to_published(expected, SHARED), path)
    assert_trees_equal(load_pytorch_weights(path, SHARED), expected)
    save_file({**to_published(expected, SHARED), "conv1.weight": np.zeros((4, 0, 3, 3), np.float32)}, path)
    with user_error("conv1.weight", "[4, 0, 3, 3]"):
        load_pytorch_weights(path, SHARED)
