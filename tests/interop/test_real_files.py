"""Files of the real torch, torchvision and timm, in and back out; by hand, as those take gigabytes:

    python -m venv VENV && VENV/bin/pip install torch torchvision timm -e '.[test]'
    VENV/bin/python -m pytest -m slow tests/interop/test_real_files.py

Last run: 2026-11-26, torch 2.14.1, torchvision 0.29.1, timm 1.0.31: 29 passed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import user_error

from shared_basis.interop.pytorch import load_pytorch_weights, to_published
from shared_basis.models import create_model

pytestmark = pytest.mark.slow

torch: Any = None
torchvision: Any = None
timm: Any = None


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imports what takes seconds, where it is installed."""
    for name in ("torch", "torchvision", "timm"):
        globals()[name] = pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


NETWORKS = {"resnet18": ("resnet18", "resnet18"), "resnet34": ("resnet34", "resnet34"),
            "resnet50": ("resnet50", "resnet50"), "resnet101": ("resnet101", "resnet101"),
            "mobilenetv2": ("mobilenet_v2", "mobilenetv2_100")}
"""What the networks are called here, in torchvision and in timm."""


def network_of(library: str, name: str, classes: int = 7) -> Any:
    """Returns a network with random weights and statistics, whose activations stay below 6 where ReLU6 is ReLU."""
    torch.manual_seed(0)
    theirs = NETWORKS[name][0 if library == "torchvision" else 1]
    if library == "torchvision":
        network = torchvision.models.get_model(theirs, weights=None, num_classes=classes)
    else:
        network = timm.create_model(theirs, pretrained=False, num_classes=classes)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.6)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    return network.eval()


def logits_of(network: Any, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()


IMAGES = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)


def logits_here(name: str, variables: Any) -> np.ndarray:
    model = create_model(name, num_classes=7, stem="imagenet")
    return np.asarray(jax.jit(lambda x: model.apply(variables, x, train=False))(IMAGES))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_logits_are_theirs_and_torchvision_loads_what_is_written(tmp_path: Path, library: str, name: str) -> None:
    network = network_of(library, name)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = create_model(name, num_classes=7, stem="imagenet")
    variables = load_pytorch_weights(tmp_path / "w.pth", model)
    expected = logits_of(network, IMAGES)
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits_here(name, variables), expected, atol=1e-4 * max(1, np.abs(expected).max()))
    back = network_of("torchvision", name)
    torch.nn.init.zeros_(back.get_parameter("conv1.weight" if "resnet" in name else "features.0.0.weight"))
    written = {key: torch.from_numpy(tensor) for key, tensor in to_published(variables, model).items()}
    back.load_state_dict(written, strict=True)
    np.testing.assert_allclose(logits_of(back, IMAGES), expected, atol=1e-4 * max(1, np.abs(expected).max()))


def averaged(network: Any) -> Any:
    model = torch.optim.swa_utils.AveragedModel(network)
    model.update_parameters(network)
    return model


WAYS: dict[str, Any] = {
    "state dict": lambda network: network.state_dict(),
    "DataParallel": lambda network: torch.nn.DataParallel(network).state_dict(),
    "torch.compile": lambda network: torch.compile(network).state_dict(),
    "both": lambda network: torch.nn.DataParallel(torch.compile(network)).state_dict(),
    "AveragedModel": lambda network: averaged(network).state_dict(),
    "timm's average": lambda network: {"state_dict_ema": timm.utils.ModelEmaV3(network).module.state_dict()},
    "Lightning": lambda network: {"state_dict": {f"model.{key}": each for key, each in network.state_dict().items()},
                                  "epoch": 3, "optimizer_states": [torch.optim.SGD(
                                      network.parameters(), 0.1, momentum=0.9).state_dict()], "lr_schedulers": []},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_trainers_save_loads(tmp_path: Path, way: str, legacy: bool) -> None:
    network = network_of("torchvision", "resnet18")
    torch.save(WAYS[way](network), tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    model = create_model("resnet18", num_classes=7, stem="imagenet")
    variables = load_pytorch_weights(tmp_path / "w.ckpt", model)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], network.fc.bias.detach().numpy())
    np.testing.assert_array_equal(variables["batch_stats"]["stem_norm"]["mean"], network.bn1.running_mean.numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["torch.save", "safetensors"])
def test_half_precision_loads(tmp_path: Path, dtype: str, kind: str) -> None:
    from safetensors.torch import save_file
    state = network_of("torchvision", "resnet18").to(getattr(torch, dtype)).state_dict()
    (torch.save if kind == "torch.save" else save_file)(state, tmp_path / "w")
    variables = load_pytorch_weights(tmp_path / "w", create_model("resnet18", num_classes=7, stem="imagenet"))
    kernel = variables["params"]["stem"]["kernel"]
    np.testing.assert_array_equal(kernel, state["conv1.weight"].float().numpy().transpose(2, 3, 1, 0))


def test_the_way_out_that_a_refusal_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = network_of("torchvision", "resnet18")
    torch.save({"model": network.state_dict(), "args": argparse.Namespace(lr=0.1)}, "w.pth")
    model = create_model("resnet18", num_classes=7, stem="imagenet")
    with user_error("argparse.Namespace", "If you trust the file") as caught:
        load_pytorch_weights("w.pth", model)
    exec(str(caught.value).partition("only its tensors: ")[2].partition(", using the")[0], {})
    variables = load_pytorch_weights("tensors.pth", model)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], network.fc.bias.detach().numpy())
