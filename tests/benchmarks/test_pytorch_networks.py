"""What is compared in PyTorch is the same network: pytest -m slow tests/benchmarks."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from helpers import user_error

from benchmarks import cases
from shared_basis.models import create_model
from shared_basis.models.parameters import abstract_variables
from shared_basis.optim.penalty import orthogonality_penalty

pytestmark = pytest.mark.slow

NETWORKS = (
    "resnet14-s8u0", "resnet20", "resnet32-s16u1-double", "resnet110-s8u1", "resnet18-s0u8", "resnet34",
    "resnet34-s32u1", "resnet50", "resnet50-shared++", "mobilenetv2", "mobilenetv2-shared")


@pytest.fixture
def networks() -> Any:
    """The networks in PyTorch."""
    pytest.importorskip("torch", reason="PyTorch is not installed; the extra 'bench' brings it", exc_type=ImportError)
    from benchmarks import pytorch_networks
    return pytorch_networks


def torch_name(path: tuple[str, ...]) -> str:
    """Returns the name in PyTorch of the variable at `path`."""
    leaves = {"kernel": "weight", "unique": "unique.weight", "coefficients": "coefficients.weight", "bias": "bias",
              "scale": "weight", "mean": "running_mean", "var": "running_var"}
    if path[0] == "bases":
        return ".".join((*path, "weight"))
    modules = {"shortcut": "shortcut.0", "shortcut_norm": "shortcut.1"}
    parts = [modules.get(part, part) for part in path[:-1]]
    return ".".join(str(int(part[5:]) - 1) if part.startswith("block") else part for part in (*parts, leaves[path[-1]]))


def torch_layout(array: np.ndarray, name: str) -> np.ndarray:
    """Returns an array of ours as PyTorch has it: [T, C, k, k] and [T, C]."""
    if array.ndim == 2 and name.endswith("coefficients.weight"):
        return array.T[:, :, None, None]
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def copy(variables: Any, network: Any) -> None:
    """Copies all our variables into a network of PyTorch, each of whose tensors is filled by one of them."""
    import torch

    owned = {**dict(network.named_parameters()), **{name: tensor for name, tensor in network.named_buffers()
                                                    if not name.endswith("num_batches_tracked")}}
    for path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        name = torch_name(tuple(entry.key for entry in path[1:]))
        with torch.no_grad():
            owned.pop(name).copy_(torch.from_numpy(np.array(torch_layout(np.asarray(leaf), name))))
    assert not owned


def random_variables(model: Any) -> Any:
    """Returns variables as after some training: batch statistics are not the initial ones, nor are biases."""
    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "bias", "mean", "var"):
            return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return random.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
    return jax.tree_util.tree_map_with_path(draw, dict(abstract_variables(model, (32, 32, 3))))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_pytorch_have_as_many_parameters(networks: Any, name: str) -> None:
    import torch

    case = cases.make_case(name, "cpu")
    model = create_model(name, num_classes=case.classes, stem=case.stem)
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model, (32, 32, 3))["params"]))
    with torch.device("meta"):  # has shapes and no numbers
        theirs = networks.create(name, case.classes, case.stem, case.elements)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == ours


@pytest.mark.parametrize(("name", "stem", "size"), [
    ("resnet14-s4u1-double", "cifar", 16), ("resnet18", "cifar", 16),
    *((name, "imagenet", 40) for name in ("resnet18-s8u2", "resnet50-shared++", "mobilenetv2-shared++"))])
def test_networks_in_pytorch_compute_the_same(networks: Any, name: str, stem: str, size: int) -> None:
    import torch

    elements = "shared+unique" if "14" in name else "shared"
    model, theirs = create_model(name, stem=stem), networks.create(name, 10, stem, elements)
    variables = random_variables(model)
    copy(variables, theirs)
    images = np.random.default_rng(1).standard_normal((3, size, size, 3), np.float32)
    expected = np.asarray(jax.jit(lambda x: model.apply(variables, x, train=False))(images))
    with torch.inference_mode():
        logits = theirs.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
        penalty = float(networks.orthogonality_penalty(theirs))
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    groups = model.basis_groups(elements)
    expected_penalty = float(orthogonality_penalty(variables["params"], groups)) if groups else 0
    assert penalty == pytest.approx(expected_penalty, rel=1e-4)


def test_what_is_not_written_in_pytorch_is_refused(networks: Any) -> None:
    for name, stem in (("densenet121", "cifar"), ("resnet20-tied", "cifar"), ("mobilenetv2", "cifar")):
        with user_error(name, "not implemented in PyTorch"):
            networks.create(name, 10, stem, "shared")


def test_steps_in_pytorch_train_and_each_measurement_begins_anew(networks: Any) -> None:
    import torch

    from benchmarks.pytorch_trainer import make_trainer
    torch.manual_seed(0)
    trainer = make_trainer(cases.Case("resnet14-s4u1", 4, image_size=8), "eager")
    first = float(trainer.loss().detach())
    assert trainer.run(5) > 0
    assert float(trainer.loss().detach()) < first
    after = {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}
    trainer.run(5)
    assert all(torch.equal(after[name], tensor) for name, tensor in trainer.network.named_parameters())
    assert trainer.evaluate(trainer.images, trainer.labels) > 0
