"""Compression of 1×1 layers: of blocks that have one, and of blocks whose two have filters of different sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from sample_networks import random_variables

from shared_basis.compression import compress, ranks
from shared_basis.compression.layers import PlainLayers
from shared_basis.compression.moments import input_moments
from shared_basis.config import DataConfig, ModelConfig
from shared_basis.models import create_model
from shared_basis.models.base import Network
from shared_basis.models.summary import count_network
from shared_basis.nn.ops import quick_compiler_options
from shared_basis.optim.penalty import orthogonality_penalty

SHAPE = (16, 16, 3)
DATA = DataConfig(mean=(0.3, 0.4, 0.5), std=(0.4, 0.4, 0.4))
SMALL: dict[str, dict[str, Any]] = {
    "mobilenetv1": {"width": 4, "stages": ((1, 2, 1), (4, 2, 2))},
    "shufflenetv2_x1_0": {"widths": (16,), "units": (3,), "neck": 16},
    "mobilenetv2": {},
    "efficientnet_b0": {"stages": ((1, 8, 1, 3, 1), (3, 8, 2, 5, 3))}}


def small(name: str) -> Network:
    return create_model(name, scan_blocks=False).clone(**SMALL[name.partition("-")[0]])


def take_apart(network: Network, measured: bool) -> tuple[Any, PlainLayers]:
    """Returns random variables of a plain network, and its layers, whose inputs may be measured on random images."""
    variables = random_variables(network, SHAPE)
    images = np.random.default_rng(0).integers(0, 256, (30, *SHAPE), dtype=np.uint8)
    paths = [path for group in network.basis_layer_paths().values() for path in group]
    moments = input_moments(network, variables, DATA, paths, [(images, np.zeros(30, int))]) if measured else {}
    return variables, PlainLayers(flatten_dict(variables), moments)


def logits(network: Network, variables: Any) -> np.ndarray:
    images = np.random.default_rng(1).normal(size=(3, *SHAPE)).astype(np.float32)
    return np.asarray(jax.jit(lambda v: network.apply(v, images, train=False),
                              compiler_options=quick_compiler_options())(variables))


@pytest.mark.parametrize("name", [
    "mobilenetv1-s6u2", pytest.param("mobilenetv1-s0u8", marks=pytest.mark.slow), "efficientnet_b0-s0u8",
    pytest.param("shufflenetv2_x1_0-s8u0-double", marks=pytest.mark.slow),
    pytest.param("shufflenetv2_x1_0-s5u3", marks=pytest.mark.slow)])
def test_at_full_rank_the_logits_are_those_of_the_plain_network(name: str) -> None:
    """Each layer of these has 8 filters, or filters of 8 numbers, or both."""
    plain, network = small(name.partition("-")[0]), small(name)
    variables, source = take_apart(plain, measured=name == "mobilenetv1-s6u2")
    arrays, errors = compress.factorised(source, network, SHAPE)
    np.testing.assert_allclose(logits(network, unflatten_dict(arrays)), logits(plain, variables), atol=1e-4)
    assert max(layer["filters"] for layer in errors) < 1e-5
    assert len(errors) == sum(map(len, network.basis_layer_paths().values()))


@pytest.mark.parametrize("name", ["efficientnet_b0-s4u1", "mobilenetv1-s3u2",
                                  pytest.param("mobilenetv2-s9u2", marks=pytest.mark.slow)])
def test_below_it_layers_of_each_size_have_the_best_basis_of_theirs(name: str) -> None:
    network = small(name)
    _, source = take_apart(small(name.partition("-")[0]), measured=False)
    arrays, errors = compress.factorised(source, network, SHAPE)
    assert orthogonality_penalty(unflatten_dict(arrays)["params"], network.basis_groups("shared+unique")) < 1e-10
    found_errors = {each["path"]: each["filters"] for each in errors}
    for g, (group, paths) in enumerate(network.basis_layer_paths().items()):
        shared_rank, unique_rank = network.sharing.shared_rank << g, network.sharing.unique_rank << g
        for layer in set(paths.values()):
            kernels = [source.arrays["params", *path, "kernel"] for path, each in paths.items() if each == layer]
            matrices = [kernel.reshape(-1, kernel.shape[-1]) for kernel in kernels]
            stacked = np.concatenate([matrix / np.linalg.norm(matrix) for matrix in matrices], 1)
            shared = np.linalg.svd(stacked)[0][:, :shared_rank]
            found = arrays["params", "bases", group, dict(network.sharing.layers)[layer]]
            found = found.reshape(-1, found.shape[-1])
            np.testing.assert_allclose(found @ found.T, shared @ shared.T, atol=1e-5)
            for matrix, path in zip(matrices, [path for path, each in paths.items() if each == layer], strict=True):
                values = np.linalg.svd(matrix - shared @ (shared.T @ matrix), compute_uv=False)
                left = np.linalg.norm(values[unique_rank:]) / np.linalg.norm(matrix)
                assert found_errors["/".join(path)] == pytest.approx(left, rel=1e-4)
        remaining = source.group(network, group).remaining(shared_rank)
        assert remaining[unique_rank] == pytest.approx(np.mean([found_errors["/".join(path)]**2 for path in paths]))
        assert remaining[-1] < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv1", "mobilenetv2"])
def test_a_budget_chooses_among_the_ranks_that_1x1_layers_admit(name: str) -> None:
    config, spec = ModelConfig(name, "cifar"), SimpleNamespace(classes=range(10), image_shape=(32, 32, 3))
    source = PlainLayers(flatten_dict(random_variables(create_model(name), (32, 32, 3))), {})
    candidates = ranks.Candidates(source, config, spec)
    assert candidates.space == {"mobilenetv1": 512, "mobilenetv2": 20}[name]
    chosen = ranks.choose(candidates, 0.8, "parameters", lambda line: None)
    part = count_network(ModelConfig(chosen, "cifar"), 10, (32, 32, 3))["parameters"] / count_network(
        config, 10, (32, 32, 3))["parameters"]
    assert 0.7 < part <= 0.8
