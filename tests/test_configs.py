"""The recipes of configs/: what they hold, and that their docstrings say how to run them."""

import importlib.util
from pathlib import Path

import pytest

from shared_basis.config import from_config_dict, to_dict
from shared_basis.models import create_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.py"))


def load(path):
    """Imports the configuration file at `path`."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", [None, "resnet14", "resnet32-s8u1", "resnet56-s16u1-double"])
def test_a_recipe_takes_any_network_and_names_the_run_after_it(path, variant):
    get_config = load(path).get_config
    config = from_config_dict(get_config(variant) if variant else get_config())
    if variant:
        assert config.model.name == variant
    assert config.name == f"{path.stem}-{config.model.name}"
    create_model(config.model.name, stem=config.model.stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_docstring_holds_the_command_for_the_default_network(path):
    module = load(path)
    default = module.get_config().model.name
    commands = [line.strip() for line in module.__doc__.splitlines() if line.startswith("    ")]
    embedded = ["python main.py"] if path.stem == "digits_resnet" else []
    assert commands == (embedded or [f"python main.py --config=configs/{path.name}:{default}"])


def test_cifar_resnet_is_the_published_recipe():
    assert to_dict(from_config_dict(load(CONFIGS / "cifar_resnet.py").get_config("resnet32-s8u1"))) == {
        "name": "cifar_resnet-resnet32-s8u1",
        "seed": 0,
        "model": {"name": "resnet32-s8u1", "stem": "cifar", "dtype": "float32"},
        "data": {"name": "cifar10", "directory": "", "manual_directory": "", "image_size": 0,
                 "train_examples": 0, "test_examples": 0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                 "pad": 4, "flip": True},
        "orthogonality": {"weight": 10.0, "elements": "shared+unique", "reduction": "mean"},
        "optimizer": {"learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
                      "decay": ["basis", "coefficients", "kernel", "norm", "bias"], "schedule": "piecewise",
                      "boundaries": [150.0, 225.0], "factors": [0.1, 0.1], "warmup_epochs": 0.0},
        "train": {"epochs": 300, "batch_size": 256, "eval_batch_size": 1000, "evaluate_every": 1},
    }
